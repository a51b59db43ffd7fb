"""Which runs a comparison consists of, where each lives, and which labels it trains on."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.comparison.arms import Arm, OracleArm, Standing, What, Who
from experiments.comparison.cohorts import Cohort
from experiments.comparison.jobs import Job, list_jobs

FEDERATED, ALONE, POOLED = (Arm(who, What.SUPERVISED) for who in (Who.FEDERATED, Who.ALONE, Who.POOLED))
LABELED = {"beta": ("x",), "alpha": ("a", "b"), "gamma": ()}


def _cohort(folder: Path, setting: str = "all") -> Cohort:
    place = folder / "sites" / f"labels-{setting}"
    storages = {site: folder / "storage" / site for site in LABELED}
    origin = {f"{site}--{case}": (site, case) for site, cases in LABELED.items() for case in cases}
    return Cohort(setting, LABELED, place / "each", storages, place / "pooled", folder / "storage" / "pooled", origin)


def test_an_arm_alone_runs_once_per_site_that_has_labels(tmp_path: Path) -> None:
    jobs = list_jobs(tmp_path, [ALONE], [], [_cohort(tmp_path)], [0, 1])
    assert [(job.site, job.seed) for job in jobs] == [("alpha", 0), ("beta", 0), ("alpha", 1), ("beta", 1)]
    assert jobs[0].training_labels == {"alpha": ("a", "b")}
    assert jobs[0].storages == {"alpha": tmp_path / "storage" / "alpha"}


def test_an_oracle_runs_once_before_all_others_and_trains_on_no_labels(tmp_path: Path) -> None:
    cohorts = [_cohort(tmp_path, "1"), _cohort(tmp_path, "all")]
    oracle, *others = list_jobs(tmp_path, [FEDERATED], [OracleArm("fake", None)], cohorts, [3])
    assert (oracle.title, oracle.seed, oracle.training_labels) == ("oracle-fake-boxes", None, {})
    assert [job.title for job in others] == [
        "federated-supervised, labels 1, seed 3",
        "federated-supervised, labels all, seed 3",
    ]


def test_every_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    cohorts = [_cohort(tmp_path, "1"), _cohort(tmp_path, "all")]
    oracles = [OracleArm("fake", None), OracleArm("fake", 3)]
    jobs = list_jobs(tmp_path, [FEDERATED, ALONE, POOLED], oracles, cohorts, [0, 1])
    assert len({job.folder for job in jobs}) == len(jobs) == 2 + 2 * 2 * (1 + 2 + 1)


def test_a_pooled_run_uses_the_pooled_site_and_names_cases_by_their_origin(tmp_path: Path) -> None:
    cohort = _cohort(tmp_path)
    pooled, federated = (Job(arm, cohort, 0, None, tmp_path) for arm in (POOLED, FEDERATED))
    assert pooled.sites == cohort.pooled_sites
    assert pooled.storages == {"pooled": cohort.pooled_storage}
    assert pooled.origin("pooled", "beta--x") == ("beta", "x")
    assert pooled.training_labels == LABELED
    assert federated.sites == cohort.sites
    assert federated.storages == cohort.storages
    assert federated.origin("beta", "x") == ("beta", "x")


def test_only_pooled_arms_are_references_and_only_oracles_are_oracles() -> None:
    assert [arm.standing for arm in (FEDERATED, ALONE, POOLED, OracleArm("fake", 1))] == [
        Standing.RESULT,
        Standing.RESULT,
        Standing.REFERENCE,
        Standing.ORACLE,
    ]


def test_seconds_of_all_attempts_add_up(tmp_path: Path) -> None:
    job = Job(FEDERATED, _cohort(tmp_path), 0, None, tmp_path / "run")
    assert job.seconds() == 0
    job.add_seconds(2.5)
    job.add_seconds(1.0)
    assert job.seconds() == pytest.approx(3.5)
