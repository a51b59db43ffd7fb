"""Studies over real sites in one process: the same weights every time, and every wait has a deadline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from client.app import app as client_app
from client.site import Site
from engines.in_process_grid import InProcessGrid, run_in_process
from semisam_core.errors import ConfigError
from semisam_core.files import read_json_lines
from semisam_core.plan import Plan
from server.app import app as server_app
from server.run_folder import RunFolder
from server.study import Study, StudyFailedError
from tests.conftest import tiny_plan, write_nifti
from tests.server.scripted import events, grid_of, run, study_plan

MakeSite = Callable[..., Path]


@pytest.fixture
def sites(make_site: MakeSite) -> list[Path]:
    """Three hospitals: labeled, partly labeled, unlabeled."""
    return [
        make_site("alpha", data={"labeled": ["case-0", "case-1"]}),
        make_site("beta", first_seed=10),
        make_site("gamma", first_seed=20, data={"labeled": []}),
    ]


def _run(plan: Plan, sites: list[Path], folder: Path, app: ClientApp = client_app) -> list[dict[str, object]]:
    path = folder.parent / f"{plan.hash[:8]}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(path), "num-sites": len(sites), "run-folder": str(folder)}
    run_in_process(server_app, app, [{"site-config": str(site)} for site in sites], config)
    return read_json_lines(folder / "metrics.jsonl")


def _checkpoint(folder: Path, number: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"round-{number:05d}.safetensors")


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_study_leaves_its_plan_checkpoints_metrics_and_status(sites: list[Path], tmp_path: Path, plan: Plan) -> None:
    lines = _run(plan, sites, tmp_path / "run")
    assert [line["event"] for line in lines if line["event"] in ("aggregated", "selected")] == [
        "aggregated",
        "aggregated",
        "selected",
    ]
    assert {line["site"] for line in lines if line["event"] == "evaluated"} == {"alpha", "beta", "gamma"}
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "completed"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["plan_hash"] == plan.hash
    best = load_file(tmp_path / "run" / "best.safetensors")
    assert _same(best, _checkpoint(tmp_path / "run", 2))


def test_the_same_plan_seed_and_data_give_the_same_weights(sites: list[Path], tmp_path: Path, plan: Plan) -> None:
    _run(plan, sites, tmp_path / "first")
    _run(plan, sites, tmp_path / "second")
    for number in (0, 1, 2):
        assert _same(_checkpoint(tmp_path / "first", number), _checkpoint(tmp_path / "second", number))


def test_the_order_in_which_sites_connect_changes_nothing(sites: list[Path], tmp_path: Path, plan: Plan) -> None:
    _run(plan, sites, tmp_path / "first")
    _run(plan, sites[::-1], tmp_path / "second")
    assert _same(_checkpoint(tmp_path / "first", 2), _checkpoint(tmp_path / "second", 2))


def test_another_seed_gives_other_weights(sites: list[Path], tmp_path: Path, plan: Plan) -> None:
    _run(plan, sites, tmp_path / "first")
    _run(tiny_plan("seed=1"), sites, tmp_path / "second")
    assert not _same(_checkpoint(tmp_path / "first", 2), _checkpoint(tmp_path / "second", 2))


@pytest.mark.parametrize("start", ["global", "site"])
def test_a_killed_run_resumes_to_the_same_weights(
    sites: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    plan = tiny_plan("training.rounds=3", f"teacher.start={start}")
    _run(plan, sites, tmp_path / "whole")
    original = RunFolder.save_round

    def killed(self: RunFolder, number: int, *rest: object) -> None:
        if number == 2:
            raise KeyboardInterrupt
        original(self, number, *rest)

    monkeypatch.setattr(RunFolder, "save_round", killed)
    with pytest.raises(KeyboardInterrupt):
        _run(plan, sites, tmp_path / "broken")
    monkeypatch.undo()
    _run(plan, sites, tmp_path / "broken")
    assert _same(_checkpoint(tmp_path / "whole", 3), _checkpoint(tmp_path / "broken", 3))


def test_a_run_folder_cannot_be_used_with_another_plan(sites: list[Path], tmp_path: Path, plan: Plan) -> None:
    _run(plan, sites, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run of another plan"):
        _run(tiny_plan("seed=1"), sites, tmp_path / "run")


def test_one_site_that_fails_does_not_stop_the_others(
    sites: list[Path], tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Site.train

    def train(self: Site, weights: dict[str, torch.Tensor]) -> object:
        if self.config.site == "beta" and self.round == 1:
            raise FloatingPointError("diverged")
        return original(self, weights)

    monkeypatch.setattr(Site, "train", train)
    lines = _run(plan, sites, tmp_path / "run")
    refused = [line for line in lines if line["event"] == "refused"]
    assert [(line["site"], line["reason"]) for line in refused] == [("beta", "refused by rule training-diverged")]
    trained = [(line["round"], line["site"]) for line in lines if line["event"] == "trained"]
    assert trained == [(1, "alpha"), (1, "gamma"), (2, "alpha"), (2, "beta"), (2, "gamma")]


def test_a_non_finite_update_is_stopped_by_the_sites_own_egress_gate(
    sites: list[Path], tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Site.train

    def train(self: Site, weights: dict[str, torch.Tensor]) -> object:
        report = original(self, weights)
        if self.config.site == "alpha" and report.weights is not None:
            next(iter(report.weights.values())).fill_(float("nan"))
        return report

    monkeypatch.setattr(Site, "train", train)
    lines = _run(plan, sites, tmp_path / "run")
    reasons = {line["reason"] for line in lines if line["event"] == "refused"}
    assert reasons == {"refused by rule egress"}
    final = _checkpoint(tmp_path / "run", 2)
    assert all(bool(torch.isfinite(value).all()) for value in final.values())


def test_a_round_in_which_all_sites_fail_ends_the_run_with_the_reason(
    sites: list[Path], tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(self: Site, weights: object) -> object:
        raise FloatingPointError("diverged")

    monkeypatch.setattr(Site, "train", train)
    with pytest.raises(StudyFailedError, match=r"Round 1: no site contributed\..*training-diverged"):
        _run(plan, sites, tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "training-diverged" in status["reason"]


def test_too_few_sites_end_the_run_at_the_join_deadline(sites: list[Path], tmp_path: Path) -> None:
    plan = tiny_plan("aggregation.minimum_sites=2", "aggregation.join_deadline_s=0.5")
    grid = InProcessGrid(client_app, [{"site-config": str(sites[0])}], {})
    with pytest.raises(StudyFailedError, match=r"1 of 3 sites connected within 0.5 s; the plan needs 2"):
        Study(plan, grid, RunFolder(tmp_path / "run"), "run", 3).execute()


def test_enough_sites_start_without_the_missing_one(sites: list[Path], tmp_path: Path) -> None:
    plan = tiny_plan("aggregation.minimum_sites=1", "aggregation.join_deadline_s=0.5")
    grid = InProcessGrid(client_app, [{"site-config": str(sites[0])}], {})
    Study(plan, grid, RunFolder(tmp_path / "run"), "run", 3).execute()
    assert (tmp_path / "run" / "best.safetensors").exists()


def test_two_sites_of_one_name_count_once(sites: list[Path], tmp_path: Path, plan: Plan) -> None:
    lines = _run(plan, [sites[0], sites[0], sites[1]], tmp_path / "run")
    assert [line["reason"] for line in lines if line["event"] == "refused"] == ["a second site of this name"]
    assert sum(line["event"] == "trained" for line in lines) == 4


def test_a_silent_site_is_recorded_and_costs_one_deadline(sites: list[Path], tmp_path: Path, plan: Plan) -> None:
    class Silent(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            replies = super().pull_messages(message_ids)
            return [r for r in replies if r.metadata.src_node_id != 2 or r.metadata.message_type != "train"]

    plan = tiny_plan("aggregation.round_deadline_s=0.6")
    grid = Silent(client_app, [{"site-config": str(site)} for site in sites], {})
    folder = RunFolder(tmp_path / "run")
    Study(plan, grid, folder, "run", 3).execute()
    assert [(line["round"], line["sites"]) for line in folder.records("silent")] == [(1, 1), (2, 1)]


def test_selection_by_validation_takes_the_best_round_and_says_that_labels_were_used(
    sites: list[Path], tmp_path: Path
) -> None:
    lines = _run(tiny_plan("selection=validation", "training.rounds=3"), sites, tmp_path / "run")
    scores: dict[int, list[float]] = {}
    for line in lines:
        if line["event"] == "evaluated":
            scores.setdefault(int(str(line["round"])), []).append(float(str(line["dice.blob"])))
    means = {number: sum(values) / len(values) for number, values in scores.items()}
    (selected,) = [line for line in lines if line["event"] == "selected"]
    assert means[int(str(selected["round"]))] == max(means.values())
    assert "validation labels were used" in str(selected["by"])


def test_validation_selects_the_later_of_two_equal_rounds(tmp_path: Path) -> None:
    plan = study_plan("selection=validation", "evaluation.every_rounds=1")
    record = run(grid_of("alpha", "beta"), plan, tmp_path, 2)
    assert events(record, "selected", "round") == [(3,)]


def test_two_classes_go_through_the_whole_study(sites: list[Path], tmp_path: Path) -> None:
    for path in tmp_path.glob("data/*/labels/*.nii.gz"):
        label = np.array(nib.load(path).dataobj, dtype=np.uint8)
        label[:12] *= 2
        write_nifti(path, label)
    plan = tiny_plan("task.classes=[{name: left, value: 2}, {name: right, value: 1}]")
    lines = _run(plan, sites, tmp_path / "run")
    (alpha,) = [line for line in lines if line["event"] == "evaluated" and line["site"] == "alpha" and line["final"]]
    assert {"dice.left", "dice.right"} <= alpha.keys()


def test_a_client_app_that_raises_gives_an_error_reply_without_the_text(plan: Plan) -> None:
    broken = ClientApp()

    @broken.query()
    def _(message: Message, context: Context) -> Message:
        raise RuntimeError("secret")

    grid = InProcessGrid(broken, [{}], {})
    message = Message(RecordDict(), 1, "query")
    (reply,) = grid.send_and_receive([message])
    assert reply.has_error()
    assert "secret" not in repr(reply.error)
