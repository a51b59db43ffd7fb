"""A whole study in one process whose sites review between rounds: labels grow, and nothing else than before leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from client.app import app as client_app
from client.report import SiteReport
from client.site import Site
from client.site_config import load_site_config
from engines.in_process_grid import run_in_process
from review.reviewing import Reviewing
from semisam_core.files import read_json_lines
from semisam_core.plan import Plan
from server.app import app as server_app
from server.run_folder import RunFolder
from tests.conftest import tiny_plan
from tests.review.site import EAGER, corrected

MakeSite = Callable[..., Path]
RATER = "rater-of-alpha"


def _run(plan: Plan, sites: list[Path], folder: Path) -> list[dict[str, object]]:
    path = folder.parent / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(path), "num-sites": len(sites), "run-folder": str(folder)}
    run_in_process(server_app, client_app, [{"site-config": str(site)} for site in sites], config)
    return read_json_lines(folder / "metrics.jsonl")


def _review_after(monkeypatch: pytest.MonkeyPatch, reviewed: dict[int, list[str]]) -> None:
    """Let alpha's radiologist correct scans after some rounds, once."""
    original = Site.train

    def train(self: Site, weights: dict[str, torch.Tensor]) -> SiteReport:
        report = original(self, weights)
        names = reviewed.pop(self.round, []) if self.config.site == "alpha" else []
        for name in names:
            review = Reviewing(self.config, self.plan, RATER, self.run)
            opened = review.open(name)
            review.keep(opened, {"blob": 2}, 5.0, corrected(opened), "page")
        return report

    monkeypatch.setattr(Site, "train", train)


@pytest.mark.parametrize("numbers", ["exact", "rounded"])
def test_reviewed_labels_join_the_next_round_and_every_reply_is_admitted(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: str
) -> None:
    egress = {"egress": {"numbers": numbers}}
    sites = [make_site("alpha", cases=8, **egress), make_site("beta", cases=8, first_seed=20, **egress)]
    _review_after(monkeypatch, {1: ["case-1", "case-3"], 2: ["case-4", "case-5", "case-6"]})
    lines = _run(tiny_plan("training.rounds=3", *EAGER), sites, tmp_path / "run")
    assert not [line for line in lines if line["event"] in ("refused", "rejected", "failed")]
    trained = [line for line in lines if line["event"] == "trained" and line["site"] == "alpha"]
    counts = [(line["labeled"], line["unlabeled"]) for line in trained]
    assert counts == ([(1, 6), (3, 4), (6, 1)] if numbers == "exact" else [(1, 5), (1, 1), (5, 1)])
    storage = load_site_config(sites[0]).storage.folder
    assert len(read_json_lines(storage / "review" / "records.jsonl")) == 5
    for path in [*(tmp_path / "run").rglob("*"), storage / "audit.jsonl"]:
        assert path.is_dir() or RATER.encode() not in path.read_bytes(), path


def test_a_killed_study_resumes_to_the_same_weights_though_labels_came_in_between(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, original = tiny_plan("training.rounds=3", *EAGER), RunFolder.save_round
    final = []
    for broken in (False, True):
        place = tmp_path / str(broken)
        place.mkdir()
        sites = [make_site(cases=5, storage={"folder": str(place / "storage")})]
        with monkeypatch.context() as patch:
            _review_after(patch, {2: ["case-1"]})
            if broken:
                patch.setattr(RunFolder, "save_round", _killed_once(original))
                with pytest.raises(KeyboardInterrupt):
                    _run(plan, sites, place / "run")
            lines = _run(plan, sites, place / "run")
        trained = [(line["round"], line["labeled"]) for line in lines if line["event"] == "trained"]
        assert trained[-2:] == [(2, 1), (3, 2)]
        final.append(load_file(place / "run" / "checkpoints" / "round-00003.safetensors"))
    assert final[0].keys() == final[1].keys()
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def _killed_once(original: Callable[..., None]) -> Callable[..., None]:
    """Return `save_round` that is killed once in round 2, after the site has replied and reviewed."""
    killed: list[int] = []

    def save_round(self: RunFolder, number: int, *rest: object) -> None:
        if number == 2 and not killed:
            killed.append(number)
            raise KeyboardInterrupt
        original(self, number, *rest)

    return save_round
