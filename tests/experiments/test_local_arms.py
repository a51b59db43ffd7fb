"""The local baselines of a simulated study: the same study for one site, supervised, beside the study itself."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from client.site_config import SiteConfig, load_site_config
from engines.processes import ProcessTree
from engines.run_state import run_state
from experiments.local_arms import LocalArms, supervised_alone
from tests.conftest import tiny_plan, write_blobs, write_site


def test_the_local_baseline_is_supervised_and_otherwise_the_same_study() -> None:
    plan = tiny_plan("aggregation.minimum_sites=2", "training.proximal=0.1", "seed=5")
    alone = supervised_alone(plan)
    assert (alone.regularizer.name, alone.pseudo_labels, alone.uses_unlabeled) == ("none", None, False)
    assert (alone.aggregation.minimum_sites, alone.training.proximal) == (1, 0.0)
    assert (alone.seed, alone.data, alone.specialist) == (plan.seed, plan.data, plan.specialist)
    assert alone.training.steps_per_round == plan.training.steps_per_round
    assert alone.training.rounds == plan.training.rounds


@pytest.fixture
def configs(tmp_path: Path) -> list[SiteConfig]:
    for name in ("alpha", "beta"):
        write_blobs(tmp_path / "data" / name, 4)
    return [load_site_config(write_site(tmp_path, name, generalists={})) for name in ("alpha", "beta")]


def _arms(tmp_path: Path, configs: list[SiteConfig], said: io.StringIO) -> LocalArms:
    plan = tiny_plan("training.rounds=1", "training.steps_per_round=1")
    return LocalArms(plan, tmp_path / "sites", tmp_path / "local", configs, Console(file=said, width=200))


def test_one_arm_runs_at_a_time_and_one_that_fails_does_not_stop_the_next(
    tmp_path: Path, configs: list[SiteConfig]
) -> None:
    for image in (tmp_path / "data" / "alpha" / "images").iterdir():
        image.write_bytes(b"torn")
    said = io.StringIO()
    with _arms(tmp_path, configs, said) as arms:
        arms.advance()
        began = time.monotonic()
        while not (tmp_path / "local" / "alpha" / "status.json").exists() and time.monotonic() - began < 120:
            time.sleep(0.1)
        arms.advance()
        assert not (tmp_path / "local" / "beta.log").exists()
        arms.finish()
    assert run_state(tmp_path / "local" / "alpha") == "failed"
    assert "alpha alone did not complete: " in said.getvalue()
    assert run_state(tmp_path / "local" / "beta") == "completed"
    kept = (tmp_path / "local" / "beta" / "metrics.jsonl").read_bytes()
    with _arms(tmp_path, configs[1:], said) as arms:
        arms.finish()
    assert (tmp_path / "local" / "beta" / "metrics.jsonl").read_bytes() == kept  # it was not run again


def test_no_arm_outlives_the_study(tmp_path: Path, configs: list[SiteConfig]) -> None:
    with _arms(tmp_path, configs, io.StringIO()) as arms:
        arms.advance()
        mark = arms.mark
        assert ProcessTree(mark).alive()
    assert not ProcessTree(mark).alive()
