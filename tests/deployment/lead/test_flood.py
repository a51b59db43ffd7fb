"""A real SuperLink and run, two honest sites, and an admitted one that uploads all it can."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from deployment.lead.run import last_run, new_run
from deployment.lead.service import control_of, find, log_file, start, stop
from deployment.lead.study_folder import NewStudy, StudyFolder
from deployment.lead.update_size import update_size
from deployment.lead.uploads import HELD, LATER, TOO_LARGE
from engines.run_state import COMPLETED, run_state, settled
from semisam_core.files import read_json_lines
from tests.conftest import tiny_plan, write_blobs, write_site
from tests.deployment.lead.conftest import processes_of, two_free_ports, wait_until
from tests.deployment.lead.supernodes import Flood, SuperNode, Working

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECONDS = 15.0
PLAN = tiny_plan(
    "pseudo_labels=null",
    "training.rounds=1",
    "aggregation.minimum_sites=2",
    "aggregation.join_deadline_s=100",
    "aggregation.round_deadline_s=40",
)


class Watch(threading.Thread):
    """Notes the most memory that a SuperLink has, and the most disk that its folder takes, in bytes."""

    def __init__(self, study: StudyFolder) -> None:
        super().__init__(daemon=True)
        service = find(study)
        assert service is not None
        self._process, self._folder, self._ended = psutil.Process(service.pid), study.server, threading.Event()
        self.at_first = self._now()
        self.most = self.at_first

    def run(self) -> None:
        """Look ten times a second."""
        while not self._ended.wait(0.1):
            self.most = tuple(max(pair) for pair in zip(self.most, self._now(), strict=True))  # type: ignore[assignment]

    def grown(self) -> tuple[int, int]:
        """Stop looking; return by how many bytes memory and disk have grown at most."""
        self._ended.set()
        self.join()
        return self.most[0] - self.at_first[0], self.most[1] - self.at_first[1]

    def _now(self) -> tuple[int, int]:
        files = [path for path in self._folder.rglob("*") if path.is_file()]
        return self._process.memory_info().rss, sum(_size(path) for path in files)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


@dataclass(frozen=True)
class Flooded:
    """A run with a flood, and what was observed.

    Attributes:
        folder: the run folder.
        flood: what the hostile site did.
        failures: exceptions at the honest sites.
        memory: by how many bytes the SuperLink grew at most.
        disk: by how many bytes its folder grew at most.
        log: the SuperLink's log.
    """

    folder: Path
    flood: Flood
    failures: list[Exception]
    memory: int
    disk: int
    log: str


@pytest.fixture(scope="module")
def flooded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flooded]:
    folder = tmp_path_factory.mktemp("flooded")
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN.model_dump(mode="json")))
    study = NewStudy(folder / "atrium", folder / "plan.yaml", [], two_free_ports(), 3).write()
    sites = {name: SuperNode(study, name) for name in ("north", "south", "east")}
    flood = Flood(update_size(PLAN, study.settings.uploads.factor), SECONDS)
    try:
        start(study)
        workers = []
        for seed, (name, site) in enumerate(sites.items()):
            write_blobs(folder / "data" / name, 3, 10 * seed)
            site.connect()
            file = write_site(folder, name)
            workers.append(Working(site, file, flood) if name == "east" else Working(site, file))
        watch = Watch(study)
        for thread in (watch, *workers):
            thread.start()
        with control_of(study) as control:
            new_run(study, control, 3)
            run = last_run(study)
            assert run is not None
            assert wait_until(lambda: settled(run), 300), log_file(study).read_text()
        for worker in workers:
            worker.stop.set()
        memory, disk = watch.grown()
        failures = [failure for worker in workers if worker.name != "east" for failure in worker.failures]
        yield Flooded(run, flood, failures, memory, disk, log_file(study).read_text())
    finally:
        stop(study)
    assert processes_of(folder) == []


def test_other_sites_finish_their_round(flooded: Flooded) -> None:
    assert flooded.failures == []
    assert run_state(flooded.folder) == COMPLETED
    lines = read_json_lines(flooded.folder / "metrics.jsonl")
    assert [set(line["weights"]) for line in lines if line["event"] == "aggregated"] == [{"north", "south"}]


def test_the_flood_was_one_and_most_of_it_was_refused(flooded: Flooded) -> None:
    flood = flooded.flood
    assert flood.sent > 300e6
    assert flood.statuses[TOO_LARGE] + flood.statuses[0] > 10
    assert flood.statuses[LATER] > 0
    assert 0 < flood.stored <= update_size(PLAN, 2.0).total_bytes


def test_memory_and_disk_of_the_lead_stay_bounded(flooded: Flooded) -> None:
    size = update_size(PLAN, 2.0)
    assert flooded.memory < 120e6
    assert flooded.disk < HELD * size.total_bytes + 15e6  # the bundle, SQLite's write-ahead log, the log


def test_the_lead_learns_who_was_refused_and_what_in_a_few_lines(flooded: Flooded) -> None:
    lines = [line for line in flooded.log.splitlines() if ": refused " in line]
    assert 1 <= len(lines) <= 8
    assert all("east: refused push-" in line for line in lines)
