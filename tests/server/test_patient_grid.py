"""A stalled upload costs the other sites nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.app.user_config import UserConfig
from flwr.serverapp import Grid

from server.app import app
from server.patient_grid import LONG_S, PatientGrid
from server.run_folder import RunFolder
from server.study import Study
from tests.conftest import tiny_plan
from tests.server.scripted import ScriptedGrid, Time, answer_well

TRAIN = MessageType.TRAIN
DEADLINE_S = 60.0
PATIENCE_S = 0.05


class StallingGrid(ScriptedGrid):
    """Like Flower's grid, pulling waits for the tensors that a site has announced, here until `uploaded` is set."""

    def __init__(self, time: Time, *sites: str) -> None:
        super().__init__(time, *sites)
        self.stalling: set[tuple[str, str, int]] = set()
        self.uploaded = threading.Event()
        self.pulling = 0
        self.at_once = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (identifier,) = message_ids
        sent = self._pending.get(identifier)
        if sent is not None and self._about(sent) in self.stalling:
            self.pulling += 1
            self.at_once = max(self.at_once, self.pulling)
            assert self.uploaded.wait(30)
            self.pulling -= 1
        return super().pull_messages([identifier])

    def _about(self, sent: Message) -> tuple[str, str, int]:
        number = int(str(sent.content.config_records["study"]["round"]))
        return self.names[sent.metadata.dst_node_id], sent.metadata.message_type, number


@pytest.fixture
def grid() -> Iterator[StallingGrid]:
    grid = StallingGrid(Time(), *(f"site-{k}" for k in range(5)))
    yield grid
    grid.uploaded.set()


def _run(grid: StallingGrid, folder: Path, at_once: int = 8) -> RunFolder:
    plan = tiny_plan(
        "training.rounds=2",
        f"aggregation.round_deadline_s={DEADLINE_S}",
        "aggregation.join_deadline_s=20",
        "evaluation.every_rounds=100",
    )
    record = RunFolder(folder)
    Study(plan, PatientGrid(grid, PATIENCE_S, at_once), record, "run", 5, grid.time.clock).execute()
    return record


def _contributors(record: RunFolder) -> list[int]:
    return [len(line["weights"]) for line in record.records("aggregated")]


def test_a_stalled_upload_costs_one_deadline_and_no_other_site_its_round(grid: StallingGrid, tmp_path: Path) -> None:
    grid.stalling = {("site-0", TRAIN, 1)}  # the first reply that is pulled
    began = time.monotonic()
    record = _run(grid, tmp_path)
    assert _contributors(record) == [4, 5]
    assert [line["names"] for line in record.records("silent")] == [["site-0"]]
    assert grid.time.now_s < DEADLINE_S + 10
    assert time.monotonic() - began < 20


def test_an_upload_completed_after_the_deadline_is_late(grid: StallingGrid, tmp_path: Path) -> None:
    grid.stalling = {("site-0", TRAIN, 1)}
    grid.seconds["site-1", TRAIN] = 40  # so that the second round takes a while
    grid.time.at(DEADLINE_S + 10, grid.uploaded.set)
    grid.time.at(DEADLINE_S + 12, lambda: time.sleep(0.2))  # the pulling thread runs in real time
    record = _run(grid, tmp_path)
    assert _contributors(record) == [4, 5]
    assert [line["site"] for line in record.records("late")] == ["site-0"]


def test_a_slow_upload_counts_once_it_is_complete(grid: StallingGrid, tmp_path: Path) -> None:
    grid.stalling = {("site-0", TRAIN, 1)}
    grid.time.at(10, grid.uploaded.set)
    grid.time.at(12, lambda: time.sleep(0.2))
    record = _run(grid, tmp_path)
    assert _contributors(record) == [5, 5]


def test_the_number_of_slow_uploads_in_memory_is_limited(grid: StallingGrid, tmp_path: Path) -> None:
    grid.stalling = {(f"site-{k}", TRAIN, 1) for k in range(4)}
    grid.time.at(10, grid.uploaded.set)
    grid.time.at(12, lambda: time.sleep(0.2))
    record = _run(grid, tmp_path, at_once=2)
    assert grid.at_once == 2
    assert _contributors(record) == [5, 5]


def test_a_very_long_upload_no_longer_counts_towards_the_limit() -> None:
    class Stuck(StallingGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            if "stuck" in message_ids:
                assert self.uploaded.wait(30)
            return [Message(RecordDict(), dst_node_id=1, message_type=TRAIN)]

    grid, now = Stuck(Time()), [0.0]
    patient = PatientGrid(grid, PATIENCE_S, at_once=1, now=lambda: now[0])
    try:
        assert patient.pull_messages(["stuck"]) == []
        assert patient.pull_messages(["whole"]) == []
        now[0] = 2 * LONG_S
        assert patient.pull_messages(["stuck"]) == []
        assert len(patient.pull_messages(["whole"])) == 1
    finally:
        grid.uploaded.set()


def test_an_error_while_pulling_reaches_the_caller(tmp_path: Path) -> None:
    def torn(grid: ScriptedGrid, sent: Message) -> Message:
        raise ValueError("no such object")

    grid = StallingGrid(Time(), *(f"site-{k}" for k in range(5)))
    grid.scripts["site-0", TRAIN, 1] = [torn]
    grid.always["site-1", TRAIN] = answer_well
    record = _run(grid, tmp_path)
    assert _contributors(record) == [4, 5]
    assert [line["reason"] for line in record.records("refused")] == ["the reply cannot be read"]


def test_only_a_run_behind_a_superlink_uses_the_patient_grid(
    grid: StallingGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Grid] = []

    class Recorded(Study):
        def execute(self) -> None:
            given.append(self.grid)

    monkeypatch.setattr("server.app.Study", Recorded)
    tiny = tmp_path / "plan.yaml"
    tiny.write_text(tiny_plan().canonical_json())
    config: UserConfig = {"plan": str(tiny), "num-sites": 5, "run-folder": str(tmp_path / "run")}
    with socket.create_server(("127.0.0.1", 0)) as listening:
        for address in ("", f"127.0.0.1:{listening.getsockname()[1]}"):
            monkeypatch.setenv("SEMISAM_SUPERLINK", address)
            app(grid, Context(1, 0, {}, RecordDict(), dict(config)))
    assert [type(each) for each in given] == [StallingGrid, PatientGrid]
