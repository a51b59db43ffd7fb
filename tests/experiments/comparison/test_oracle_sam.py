"""A tiny random SAM as an oracle: loaded through the site file and the registry, on ordinary scans."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from experiments.comparison.arms import CLICKS
from experiments.comparison.jobs import Job
from experiments.comparison.oracle import execute
from semisam_core.errors import WeightsError
from semisam_core.files import read_json_lines
from semisam_core.generalists import load_generalist, registry
from semisam_core.generalists.sam import Sam
from tests.conftest import tiny_plan
from tests.experiments.comparison.studies import Recorder, prepare, shown
from tests.semisam_core.generalists.tiny_sam import save, tiny_sam

BOXES = None
PLAN = ("pseudo_labels.generalists=[lite-medsam, sam]", "pseudo_labels.prompting.strategy=uncertainty-rectified")
NO_CLICKS = "lite-medsam has no oracle with 1, 3, 5 and 10 points, since it takes no points; it gets boxes."


@dataclass(frozen=True)
class Study:
    """A plan and a site with a tiny SAM whose prompt encoder records its inputs."""

    folder: Path
    plan: Path
    entry: dict[str, str]
    given: list[tuple[int, bool]]

    def ask(self, clicks: int | None) -> dict[str, Any]:
        """Run an oracle; return the score of the only case."""
        self.given.clear()
        run = self.folder / f"oracle-{clicks}"
        execute(self.plan, self.folder / "sites", run, "sam", clicks)
        status = json.loads((run / "status.json").read_text())
        assert status["state"] == "completed"
        (line,) = read_json_lines(self.folder / "storage" / "alpha" / "runs" / status["run"] / "scores.jsonl")
        assert (line["case"], line["class"]) == ("case-2", "blob")
        assert 0 <= line["dice"] <= 1
        return dict(line)


@pytest.fixture
def study(make_site: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(registry, "_loaded", {})
    weights = tmp_path / "weights" / "tiny.pth"
    weights.parent.mkdir()
    entry = {"weights": str(weights), "sha256": save(tiny_sam().state_dict(), weights)}
    make_site(generalists={"lite-medsam": {"weights": "packaged"}, "sam": entry})
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(tiny_plan("training.rounds=1", *PLAN).model_dump(mode="json")))
    given: list[tuple[int, bool]] = []

    def record(_: object, __: object, prompts: dict[str, Any]) -> None:
        points, boxes = prompts["points"], prompts["boxes"]
        given.append((0 if points is None else points[0].shape[1], boxes is not None))

    sam = load_generalist("sam", torch.device("cpu"), weights, entry["sha256"])
    assert isinstance(sam, Sam)
    sam.network.prompt_encoder.register_forward_pre_hook(record, with_kwargs=True)
    return Study(tmp_path, plan, entry, given)


def test_every_number_of_clicks_and_boxes_reach_the_network_and_are_scored(study: Study) -> None:
    dice, most = [], []
    for clicks in CLICKS:
        dice.append(study.ask(clicks)["dice"])
        most.append(max(count for count, _ in study.given))
        assert not any(boxed for _, boxed in study.given)
    # A slice gets no further click once the next one would repeat an earlier one, which depends on the processor.
    assert most[:2] == [1, 3]
    assert 3 < most[2] <= 5 < most[3] <= 10
    assert len(set(dice)) == len(CLICKS)
    boxed = study.ask(BOXES)["dice"]
    assert set(study.given) == {(0, True)}
    assert boxed not in dice


def test_a_completed_run_prompts_nothing_again(study: Study) -> None:
    first = study.ask(1)
    assert study.given
    assert study.ask(1) == first
    assert not study.given


def test_weights_with_another_hash_than_in_the_site_file_are_refused_and_recorded(study: Study) -> None:
    save(tiny_sam(seed=2).state_dict(), Path(study.entry["weights"]))
    registry._loaded.clear()
    with pytest.raises(WeightsError, match="expected"):
        study.ask(1)
    status = json.loads((study.folder / "oracle-1" / "status.json").read_text())
    assert (status["state"], "tiny.pth" in status["reason"]) == ("failed", True)


def test_prompts_that_a_generalist_does_not_take_are_left_out_and_the_report_says_why(study: Study) -> None:
    def skip(job: Job) -> None:
        """Run nothing: the jobs are known beforehand."""

    out = study.folder / "out"
    comparison, console = prepare((study.plan, study.folder / "sites"), out, arms=["federated-supervised"])
    assert [job.title for job in comparison.jobs if job.seed is None] == [
        "oracle-lite-medsam-boxes",
        *(f"oracle-sam-{clicks}-point{'s' if clicks > 1 else ''}" for clicks in CLICKS),
    ]
    comparison.execute(skip)
    for text in (shown(console), (out / "report.md").read_text()):
        assert NO_CLICKS in text
        assert "sam has no oracle: no site" not in text


def test_a_site_without_validation_cases_has_no_oracle_and_the_others_are_compared(
    study: Study, make_site: Callable[..., Path]
) -> None:
    make_site("alpha", data={"labeled": ["case-0"], "validation": []}, generalists={"sam": study.entry})
    make_site("beta", first_seed=10, generalists={})
    out = study.folder / "out"
    sites = (study.plan, study.folder / "sites")
    comparison, console = prepare(sites, out, arms=["federated-supervised"])
    assert comparison.execute(Recorder())
    for text in (shown(console), (out / "report.md").read_text()):
        assert "sam has no oracle: no site with validation cases has it." in text
