"""Pseudo-labels from all of a site's sources: with real files, a real registration and a fake generalist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from client.site import Site
from client.site_config import load_site_config
from semisam_core.contract import TRAIN_SCALARS
from semisam_core.data.cases import Role
from semisam_core.evaluation import dice_of
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist, predict
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.fusion import PseudoLabel
from semisam_core.pseudo_labels.store import PseudoLabelStore
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
EVIDENCE = ("pseudo_labels.method=evidence", "pseudo_labels.gates.minimum_volume_ml=0.0")
PROTOTYPES = "pseudo_labels.sources.prototypes={generalist: fake}"
NO_REGISTRATION = "pseudo_labels.sources.registration=null"
NO_GENERALISTS = "pseudo_labels.generalists=[]"
FIVE = {"data": {"labeled": ["case-0", "case-3"], "validation": ["case-2"]}}


def _plan(*changes: str) -> Plan:
    return tiny_plan(*EVIDENCE, *changes)


def _labels(path: Path, plan: Plan, number: int = 1, run: str = "run") -> tuple[Site, dict[str, PseudoLabel]]:
    """Return a site's pseudo-labels, made with a specialist that has learned nothing and calls all background."""
    site = Site(load_site_config(path), plan, run, number)
    unlabeled, labeled = site.scans.keyed_pair_loaders(Role.UNLABELED), site.scans.pair_loaders(Role.LABELED)
    found = site._labeler.labels(number, _Background(), unlabeled, labeled)
    store = PseudoLabelStore(site.state.folder / "pseudo_labels")
    loaded = {case: label for case, key, _ in unlabeled if key is not None and (label := store.load(key)) is not None}
    assert loaded.keys() == found.keys()
    return site, loaded


class _Background(torch.nn.Module):
    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(patches[:, :1], 5.0), torch.zeros_like(patches[:, :1])], 1)


def _truth(path: Path, case: str) -> torch.Tensor:
    file = path.parents[1] / "data" / path.stem / "labels" / f"{case}.nii.gz"
    return torch.from_numpy(np.asarray(nib.load(file).dataobj)) > 0


def _weights(path: Path, run: str = "run") -> dict[str, float]:
    """Return each source's weight in the pseudo-label of the last scan that was logged."""
    folder = load_site_config(path).storage.folder / "runs" / run
    return dict(read_json_lines(folder / "evidence.jsonl")[-1]["weights"])


def test_before_the_specialist_has_learned_anything_the_others_find_the_object(make_site: MakeSite) -> None:
    path = make_site()
    _, labels = _labels(path, _plan(PROTOTYPES))
    label = labels["case-1"]
    assert label.refusals == (None,)
    assert dice_of(label.target[0] > 0.5, _truth(path, "case-1")) > 0.85
    weights = _weights(path)
    assert weights["specialist"] == 0
    assert min(weights[name] for name in ("registration", "prototypes", "generalists")) > 0


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        (NO_REGISTRATION, "registration"),
        (NO_GENERALISTS, "generalists"),
        ("pseudo_labels.sources.generalists=false", "generalists"),
        ("pseudo_labels.sources.specialist=false", "specialist"),
        ("seed=0", "prototypes"),
    ],
)
def test_a_source_that_the_plan_leaves_out_has_no_say(make_site: MakeSite, change: str, left_out: str) -> None:
    path = make_site()
    prototypes = [] if left_out == "prototypes" or change == NO_GENERALISTS else [PROTOTYPES]
    _labels(path, _plan(*prototypes, change))
    assert _weights(path).get(left_out, 0) == 0


def test_one_source_alone_makes_no_pseudo_label(make_site: MakeSite) -> None:
    _, labels = _labels(make_site(), _plan(NO_GENERALISTS))
    assert [refusal and refusal.value for refusal in labels["case-1"].refusals] == ["uncorroborated"]
    assert float(labels["case-1"].target.sum()) == 0


def test_a_site_without_labels_has_specialist_and_generalists_only(make_site: MakeSite) -> None:
    path = make_site(data={"labeled": [], "validation": []})
    plan = _plan(PROTOTYPES, "pseudo_labels.prompting.threshold=0.3")
    site = Site(load_site_config(path), plan, "run", 1)
    site.train(dict(new_specialist(plan).state_dict()))
    assert set(_weights(path)) <= {"specialist", "generalists", "registration", "prototypes"}
    assert {_weights(path).get(name, 0) for name in ("registration", "prototypes")} == {0}


def test_a_round_reports_agreed_scalars_and_keeps_the_log_of_evidence_at_the_site(make_site: MakeSite) -> None:
    path, plan = make_site(), _plan(PROTOTYPES)
    report = Site(load_site_config(path), plan, "run", 1).train(dict(new_specialist(plan).state_dict()))
    assert set(report.scalars) <= set(TRAIN_SCALARS)
    assert report.scalars["accepted"] == 1
    (line,) = read_json_lines(load_site_config(path).storage.folder / "runs" / "run" / "evidence.jsonl")
    assert (line["case"], line["class"], line["refused"]) == ("case-1", "blob", None)
    assert sum(line["weights"].values()) == pytest.approx(1, abs=0.01)


def test_with_two_labeled_scans_sources_are_scored_and_a_bad_one_counts_less(make_site: MakeSite) -> None:
    path = make_site(cases=5, **FIVE)
    _labels(path, _plan(PROTOTYPES), run="good")
    # The second expert marks a corner instead of the ball: labels carried from one scan to the other miss.
    wrong = path.parents[1] / "data" / "alpha" / "labels" / "case-3.nii.gz"
    label = np.zeros((24, 24, 16), np.uint8)
    label[1:6, 1:6, 1:5] = 1
    nib.save(nib.Nifti1Image(label, np.diag([2.0, 2.0, 2.0, 1.0])), wrong)
    _labels(path, _plan(PROTOTYPES), run="bad")
    assert _weights(path, "bad")["registration"] < _weights(path, "good")["registration"]


def test_a_pair_of_scans_is_registered_once(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plan = make_site(), _plan(PROTOTYPES)
    _, first = _labels(path, plan)
    monkeypatch.setattr("semisam_core.sources.registration.register_affine", _must_not_run)
    _, again = _labels(path, plan, run="other")
    assert torch.equal(first["case-1"].target, again["case-1"].target)
    stored = load_site_config(path).storage.folder / "transforms"
    assert len(list(stored.iterdir())) == 1
    for file in stored.iterdir():
        file.write_text("[1, 2")
    with pytest.raises(AssertionError, match="registered again"):
        _labels(path, plan, run="torn")


def _must_not_run(*_: object) -> list[float]:
    raise AssertionError("registered again")


def test_the_same_data_give_the_same_pseudo_labels(make_site: MakeSite) -> None:
    one, other = (_labels(make_site(name), _plan(PROTOTYPES))[1]["case-1"] for name in ("alpha", "beta"))
    assert torch.equal(one.target, other.target)
    assert torch.equal(one.uncertainty, other.uncertainty)


def test_a_generalist_that_fails_leaves_the_other_sources(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("tests.semisam_core.generalists.fake.FakeGeneralist.segment", fail)
    path = make_site()
    _, labels = _labels(path, _plan(PROTOTYPES))
    assert labels["case-1"].refusals == (None,)
    assert _weights(path)["generalists"] == 0


def test_the_picture_shows_the_pseudo_label(make_site: MakeSite) -> None:
    path, plan = make_site(), _plan(PROTOTYPES)
    site = Site(load_site_config(path), plan, "run", 1)
    site.evaluate(dict(new_specialist(plan).state_dict()), final=True)
    assert (site.state.folder / "overview.png").stat().st_size > 0
    assert read_json_lines(site.state.folder / "evidence.jsonl")[-1]["case"] == "case-2"


def test_labeled_scans_are_not_predicted_where_nothing_depends_on_it(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted: list[tuple[int, ...]] = []

    def counting(network: torch.nn.Module, image: torch.Tensor, *rest: object) -> torch.Tensor:
        predicted.append(tuple(image.shape))
        return predict(network, image, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("client.labeling.predict", counting)
    _, labels = _labels(make_site(**FIVE, cases=5), _plan(PROTOTYPES))
    assert len(predicted) == len(labels) == 2
