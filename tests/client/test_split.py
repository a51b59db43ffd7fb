"""The split by patient: no patient on both sides, nobody moved by growth, and the same in every round of a run."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from flwr.app import MessageType
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from client.site import Site
from client.site_config import inventory, load_site_config
from client.split import SplitChangedError, run_split
from semisam_core.contract import RefusalRule
from semisam_core.data.cases import Case, Inventory, Role
from semisam_core.data.patients import on_validation_side
from semisam_core.errors import ConfigError
from semisam_core.files import read_json_lines
from semisam_core.plan import Plan
from tests.client.test_app import _message, _rule, _send
from tests.conftest import blob, tiny_plan, write_nifti, write_site

MakeSite = Callable[..., Path]
PLAN = tiny_plan("pseudo_labels=null")
RULE = {"validation_share": 0.4, "labeled_patients": 2, "seed": 0}


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0


def _data(folder: Path, patients: Sequence[int | None], labels: Sequence[bool], manifest: bool = True) -> None:
    """Write empty files: names alone decide. Case k is of patient `patients[k]`, or in no manifest if None."""
    data = folder / "data" / "alpha"
    for kind, wanted in (("images", [True] * len(patients)), ("labels", labels)):
        (data / kind).mkdir(parents=True, exist_ok=True)
        for k, there in enumerate(wanted):
            if there:
                (data / kind / f"case-{k}.nii.gz").write_bytes(b"")
    if manifest:
        cases = [{"case": f"case-{k}", "patient": f"p{p}", "more": 1} for k, p in enumerate(patients) if p is not None]
        (data / "manifest.json").write_text(json.dumps({"version": 1, "cases": cases}))


def _found(folder: Path, **data: Any) -> Inventory:
    data = {"labeled": [], "validation": []} | data
    return inventory(load_site_config(write_site(folder, "alpha", data=data)), PLAN)


def _roles(found: Inventory) -> dict[str, Role]:
    return {case.id: case.role for case in found.cases}


@settings(deadline=None, max_examples=40)
@given(
    cases=st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=16),
    more=st.lists(st.tuples(st.integers(9, 14), st.booleans()), max_size=8),
    share=st.sampled_from([0.0, 0.3, 0.7]),
    labeled=st.sampled_from(["all", 0, 2]),
    seed=st.integers(0, 5),
)
def test_patients_stay_together_and_growth_moves_nobody(
    cases: list[tuple[int, bool]],
    more: list[tuple[int, bool]],
    share: float,
    labeled: str | int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("split")
    rule = {"validation_share": share, "labeled_patients": labeled, "seed": seed}
    sides: list[dict[int, bool]] = []
    for grown in (cases, cases + more):
        patient, has_label = [p for p, _ in grown], [there for _, there in grown]
        _data(folder, patient, has_label)
        roles = _roles(_found(folder, split=rule))
        side: dict[int, bool] = {}
        for name, role in roles.items():
            k = int(name.removeprefix("case-"))
            assert side.setdefault(patient[k], role is Role.VALIDATION) is (role is Role.VALIDATION)
            assert role is Role.UNLABELED or has_label[k]
        marked = {p for p, there in grown if there}
        assert {p for p, held in side.items() if held} == {
            p for p in marked if on_validation_side(f"p{p}", share, seed)
        }
        trained = marked - {p for p, held in side.items() if held}
        with_labels = {patient[int(name.removeprefix("case-"))] for name, r in roles.items() if r is Role.LABELED}
        assert len(with_labels) == (len(trained) if labeled == "all" else min(int(labeled), len(trained)))
        sides.append(side)
    assert all(sides[1][patient] is held for patient, held in sides[0].items())


def test_the_share_is_kept_over_many_patients_and_the_seed_matters() -> None:
    drawn = [{k for k in range(2000) if on_validation_side(f"p{k}", 0.2, seed)} for seed in (0, 1)]
    assert all(340 < len(each) < 460 for each in drawn)
    assert len(drawn[0] & drawn[1]) < 140


def test_without_a_manifest_each_case_is_its_own_patient(tmp_path: Path) -> None:
    _data(tmp_path, [0] * 12, [True] * 12, manifest=False)
    assert set(_roles(_found(tmp_path, split=RULE)).values()) == {Role.LABELED, Role.UNLABELED, Role.VALIDATION}


def test_lists_that_put_a_patient_on_both_sides_are_refused(tmp_path: Path) -> None:
    _data(tmp_path, [0, 1, 1], [True] * 3)
    with pytest.raises(ConfigError, match="patient p1 is on both sides of the split: case-1 is for training, case-2"):
        _found(tmp_path, labeled=["case-0"], validation=["case-2"])
    assert len(_found(tmp_path, labeled=["case-0"], validation=["case-1", "case-2"]).cases) == 3
    with pytest.raises(ConfigError, match="give either it or them"):
        _found(tmp_path, validation=["case-2"], split=RULE)


def test_a_case_of_an_unknown_patient_is_quarantined(tmp_path: Path) -> None:
    _data(tmp_path, [0, None, 2], [True] * 3)
    found = _found(tmp_path, labeled="all")
    assert [(each.id, "patient is unknown" in each.reason) for each in found.quarantined] == [("case-1", True)]


@settings(deadline=None, max_examples=60)
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["version", "cases", "case", "patient"]), inner, max_size=4)
            ),
        ).map(lambda value: json.dumps(value).encode()),
        st.sampled_from([b"[" * 100_000, b'{"version": 1, "cases": [{"case": "a", "patient": 1}]}']),
    )
)
def test_a_manifest_from_anywhere_is_read_or_refused_with_a_sentence(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    _data(folder, [0], [True])
    (folder / "data" / "alpha" / "manifest.json").write_bytes(content)
    try:
        assert len(_found(folder, labeled="all").cases) == 1
    except ConfigError as error:
        said = str(error)
    else:
        said = "manifest"
    assert "manifest" in said or "nothing to learn" in said


def _run(path: Path, plan: Plan, number: int, run: str = "run") -> Site:
    return Site(load_site_config(path), plan, run, number)


def test_a_split_that_changes_during_a_run_stops_the_site_with_an_explanation(
    make_site: MakeSite, tmp_path: Path
) -> None:
    path = make_site(cases=4)
    first = _send(path, _message(PLAN, MessageType.QUERY, 0, weights=False))
    split = first.content.config_records["site"]["split-hash"]
    make_site(cases=4, data={"validation": ["case-2", "case-3"]})
    assert _rule(_send(path, _message(PLAN, MessageType.TRAIN, 1))) == RefusalRule.SPLIT_CHANGED.value
    lines = read_json_lines(tmp_path / "storage" / "alpha" / "audit.jsonl")
    assert lines[0]["split"] == split
    assert "case-3 (was unlabeled, is validation)" in lines[1]["reason_kept_here"]
    assert "start a new run" in lines[1]["reason_kept_here"]
    other = _send(path, _message(PLAN, MessageType.TRAIN, 1, run="next"))
    assert other.content.config_records["site"]["split-hash"] != split
    make_site(cases=4)
    again = _send(path, _message(PLAN, MessageType.TRAIN, 1))
    assert again.content.config_records["site"]["split-hash"] == split


def test_a_run_keeps_to_the_cases_that_it_began_with(make_site: MakeSite, tmp_path: Path) -> None:
    path, images = make_site(cases=4), tmp_path / "data" / "alpha" / "images"
    before = _run(path, PLAN, 0)
    write_nifti(images / "case-9.nii.gz", blob(seed=9)[0])
    (images / "case-1.nii.gz").unlink()  # a patient who withdrew
    after, fresh = _run(path, PLAN, 1), _run(path, PLAN, 0, "next")
    assert after.scans.split_sha256 == before.scans.split_sha256 != fresh.scans.split_sha256
    assert [case.id for case in after.scans.usable(*Role)] == ["case-0", "case-2", "case-3"]
    assert [case.id for case in fresh.scans.usable(*Role)] == ["case-0", "case-2", "case-3", "case-9"]


def test_a_damaged_record_stops_the_site_and_the_secret_is_the_owners(make_site: MakeSite, tmp_path: Path) -> None:
    path, storage = make_site(), tmp_path / "storage" / "alpha"
    _run(path, PLAN, 0)
    assert stat.S_IMODE((storage / "split-secret").stat().st_mode) == 0o600
    (storage / "runs" / "run" / "split.json").write_text("{}")
    with pytest.raises(SplitChangedError, match="Restore it from a backup"):
        _run(path, PLAN, 1)


def test_the_hash_tells_nothing_without_the_sites_secret(make_site: MakeSite) -> None:
    sites = [make_site(storage={"folder": f"storage-{k}"}) for k in range(2)]
    assert sites[0] == sites[1]
    hashes = []
    for k in range(2):
        path = make_site(storage={"folder": f"storage-{k}"})
        hashes.append(_run(path, PLAN, 0).scans.split_sha256)
    assert hashes[0] != hashes[1]


def test_the_hash_says_of_which_patient_each_case_is_and_in_which_role(tmp_path: Path) -> None:
    def split(run: str, patients: dict[str, str], role: Role = Role.UNLABELED) -> str:
        found = Inventory((Case("case-0", (tmp_path / "x.nii",), None, role),), ())
        return run_split(tmp_path / run, tmp_path, found, patients).sha256

    hashes = [split("a", {}), split("b", {}), split("c", {"case-0": "p1"}), split("d", {}, Role.LABELED)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_the_secret_is_made_once_for_all_runs(tmp_path: Path) -> None:
    found = Inventory((Case("case-0", (tmp_path / "x.nii",), None, Role.UNLABELED),), ())
    first = run_split(tmp_path / "a", tmp_path, found, {})
    secret = (tmp_path / "split-secret").read_bytes()
    assert run_split(tmp_path / "b", tmp_path, found, {}) == first
    assert (tmp_path / "split-secret").read_bytes() == secret
