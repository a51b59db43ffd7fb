"""A run's scalars in TensorBoard: all of them, once, whatever happened to the run or to the disk."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, MetricRecord
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from semisam_core.contract import METRICS_RECORD
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from server.metrics_log import gradient_shares
from server.run_folder import RunFolder
from server.run_log import RunLog
from server.scalars import RoundScalars, ScalarReader, history
from server.study import Study
from server.tensorboard_log import TensorBoardLogger
from tests.server.scripted import JOIN, ScriptedGrid, answer_well, grid_of, study_plan

COUNTS = {"labeled": 2, "unlabeled": 8, "accepted": 5, "gated": 3, "gated.too-small": 3, "confidence": 0.75, "steps": 2}
TERMS = {"loss.supervised": 0.4, "gradient.supervised": 3.0, "gradient.generalist": 1.0, "seconds": 9.5}


def _plan() -> Plan:
    return study_plan("evaluation.every_rounds=1", "selection=validation")


def _answer(scalars: dict[str, Any]) -> Callable[[ScriptedGrid, Message], Message]:
    return lambda grid, sent: answer_well(grid, sent, **{METRICS_RECORD: MetricRecord(scalars)})


def _grid() -> ScriptedGrid:
    grid = grid_of("alpha", "beta")
    joined = JOIN | {"labeled": 2, "unlabeled": 8}
    for site, dice, distance in (("alpha", 0.5, 4.0), ("beta", 0.75, 2.0)):
        grid.always[site, "query"] = _answer(joined)
        grid.always[site, "train"] = _answer(COUNTS | TERMS)
        grid.always[site, "evaluate"] = _answer({"validation": 1, "dice.blob": dice, "hd95_mm.blob": distance})
    return grid


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing happened to."""
    torch.set_num_threads(1)
    return _execute(tmp_path_factory.mktemp("whole")).path


def _execute(folder: Path) -> RunFolder:
    plan, record, grid = _plan(), RunFolder(folder), _grid()
    log = RunLog(record, plan, [TensorBoardLogger(folder)])
    Study(plan, grid, record, "run", 2, grid.time.clock).execute()
    log.end("completed")
    return record


def _shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return tag -> (step, value), as TensorBoard shows them."""
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_every_scalar_of_every_round_is_shown_once(whole: Path) -> None:
    shown = _shown(whole)
    assert all([step for step, _ in steps] == [1, 2, 3] for steps in shown.values()), shown
    last = {tag: steps[-1][1] for tag, steps in shown.items()}
    assert last["total/bytes"] == 2 * last["bytes/alpha"]
    assert last["bytes/alpha"] == 4 * sum(value.numel() for value in new_specialist(_plan()).state_dict().values())
    assert last["mean/dice"] == 0.625
    assert last["mean/hd95_mm"] == 3.0
    assert last["dice/beta"] == 0.75
    assert (last["pseudo-labels.accepted/alpha"], last["pseudo-labels.refused/alpha"]) == (5, 3)
    assert last["pseudo-labels.refused.too-small/beta"] == 3
    assert last["loss.supervised/alpha"] == pytest.approx(0.4)
    assert (last["gradient-share.supervised/beta"], last["gradient-share.generalist/beta"]) == (0.75, 0.25)
    assert (last["total/sites"], last["weight/alpha"], last["seconds/alpha"]) == (2, 0.5, 9.5)


def test_names_say_nothing_but_sites_quantities_and_reasons(whole: Path) -> None:
    known = {"alpha", "beta", "dice", "hd95_mm", "sites", "bytes", "seconds"}
    assert {tag.partition("/")[2] for tag in _shown(whole)} <= known
    assert [path.parent.name for path in whole.rglob("events.*")] == ["tensorboard"]


Hook = Callable[[str, dict[str, Any]], bool]
KILLS: dict[str, Hook] = {
    "before the round is recorded": lambda event, c: (event, c.get("round")) == ("aggregated", 2),
    "before the last site's score": lambda event, c: (event, c.get("round"), c.get("site")) == ("evaluated", 2, "beta"),
    "before the scores are complete": lambda event, c: (event, c.get("round")) == ("scored", 2),
    "before the last score": lambda event, c: event == "scored" and c["final"],
    "before the selection": lambda event, c: event == "selected",
}


def _run_and_die(folder: Path, moment: Hook | None) -> None:
    record = RunFolder.record

    def dying(self: RunFolder, event: str, **content: Any) -> None:
        if moment is not None and moment(event, content):
            os.kill(os.getpid(), signal.SIGKILL)
        record(self, event, **content)

    RunFolder.record = dying  # type: ignore[method-assign]
    if moment is None:
        TensorBoardLogger.log = _die_in_the_middle  # type: ignore[method-assign]
    _execute(folder)


def _die_in_the_middle(self: TensorBoardLogger, steps: Iterable[RoundScalars]) -> None:
    """Write half of round 2 and die."""
    for step in steps:
        for number, (name, value) in enumerate(step.values.items()):
            if step.round == 2 and number > 3:
                self._writer.flush()  # type: ignore[union-attr]
                os.kill(os.getpid(), signal.SIGKILL)
            self._writer.add_scalar(name, value, step.round, step.time)  # type: ignore[union-attr]


@pytest.mark.parametrize("moment", [*KILLS, "while TensorBoard is written"])
def test_a_resumed_run_goes_on_without_doubled_steps(moment: str, tmp_path: Path, whole: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_run_and_die, args=(tmp_path, KILLS.get(moment)))
    process.start()
    process.join(timeout=120)
    try:
        assert process.exitcode == -signal.SIGKILL
    finally:
        process.kill()
        process.join()
    (torn,) = (tmp_path / "tensorboard").iterdir()
    torn.write_bytes(torn.read_bytes()[:-3])  # as after a power failure
    _execute(tmp_path)
    shown, expected = _shown(tmp_path), _shown(whole)
    assert shown.keys() == expected.keys()
    for tag in expected:
        assert [step for step, _ in shown[tag]] == [1, 2, 3], tag
        if not tag.endswith("/seconds"):
            assert shown[tag] == expected[tag]


def test_a_tensorboard_that_is_open_forgets_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    """It has read the first event files by then, and reads the later ones after them."""
    logger = TensorBoardLogger(tmp_path)
    logger.begin()
    logger.log([RoundScalars(n, 100.0 + n, {"mean/dice": n / 10}) for n in (1, 2, 3)])
    watching = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    watching.Reload()
    later = TensorBoardLogger(tmp_path)
    later.begin()
    later.log([RoundScalars(n, 200.0 + n, {"mean/dice": n / 5}) for n in (1, 2)])
    watching.Reload()
    assert [(each.step, round(each.value, 3)) for each in watching.Scalars("mean/dice")] == [(1, 0.2), (2, 0.4)]


def test_event_files_of_one_second_are_told_apart(tmp_path: Path) -> None:
    for _ in range(3):
        TensorBoardLogger(tmp_path).begin()
    seconds = [path.name.split(".")[3] for path in (tmp_path / "tensorboard").iterdir()]
    assert len(set(seconds)) == 3


def test_a_tensorboard_that_cannot_be_written_stops_no_run_and_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    record = _execute(tmp_path)
    assert (tmp_path / "best.safetensors").exists()
    (line,) = record.records("not-logged")
    assert line["logger"] == "TensorBoard"
    assert "File exists" in line["reason"]


def _write_beyond(folder: Path, size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    logger = TensorBoardLogger(folder)
    for _ in range(2):
        with pytest.raises(OSError, match="File too large"):
            _begin_and_log(logger, [RoundScalars(n, 1.0, {f"dice/{k}": 0.5 for k in range(9)}) for n in range(99)])


def _begin_and_log(logger: TensorBoardLogger, steps: Iterable[RoundScalars]) -> None:
    logger.begin()
    logger.log(steps)


def test_event_files_that_cannot_grow_are_an_error_each_time_and_no_wait(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_write_beyond, args=(tmp_path, 4096))
    process.start()
    process.join(timeout=60)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


def test_a_disk_that_is_full_for_a_while_costs_no_scalar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, calls = TensorBoardLogger.log, []

    def full_at_first(self: TensorBoardLogger, steps: Iterable[RoundScalars]) -> None:
        calls.append(1)
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        log(self, steps)

    monkeypatch.setattr(TensorBoardLogger, "log", full_at_first)
    record = _execute(tmp_path)
    assert len(record.records("not-logged")) == 1
    assert all([step for step, _ in steps] == [1, 2, 3] for steps in _shown(tmp_path).values())


class _Remembering:
    """A logger that remembers what it was told."""

    name = "memory"

    def __init__(self) -> None:
        self.told: list[Any] = []

    def begin(self) -> None:
        self.told.append("begin")

    def log(self, steps: Iterable[RoundScalars]) -> None:
        self.told.append([(step.round, "mean/dice" in step.values) for step in steps])

    def end(self, state: str) -> None:
        self.told.append(state)


def test_a_log_begins_again_when_its_run_resumes(tmp_path: Path) -> None:
    folder, logger = RunFolder(tmp_path), _Remembering()
    log = RunLog(folder, _plan(), [logger])
    about = {"seconds": 1.0, "weights": {}}
    folder.record("aggregated", round=1, **about)
    folder.record("aggregated", round=2, **about)
    folder.record("resumed", round=1)
    folder.record("aggregated", round=2, **about)
    log.end("failed")
    again = [(1, False), (2, False)]
    assert logger.told == ["begin", [(1, False)], [(2, False)], "begin", again, [], "failed"]


def test_what_a_site_withholds_is_no_scalar_and_no_zero() -> None:
    reader = ScalarReader(_plan())
    reader.read({"event": "joined", "round": 0, "site": "alpha", "counts": "buckets"})
    reader.read(
        {"event": "trained", "round": 1, "site": "alpha", "accepted": 5, "labeled": 1, "gradient.consistency": 1.0}
    )
    reader.read({"event": "evaluated", "round": 1, "site": "alpha", "validation": 1})
    trained = reader.read({"event": "aggregated", "round": 1, "time": 1.0, "seconds": 2.0, "weights": {"alpha": None}})
    scored = reader.read({"event": "scored", "round": 1, "time": 2.0})
    assert trained is not None
    assert set(trained.values) == {
        *("total/sites", "total/bytes", "total/seconds"),
        *("bytes/alpha", "pseudo-labels.accepted/alpha"),
    }
    assert scored is not None
    assert not scored.values


@pytest.mark.parametrize(
    ("sent", "coarse", "shares"),
    [
        ({"labeled": 1, "gradient.consistency": 1.0, "gradient.generalist": 1.0}, True, {}),
        ({"labeled": 1, "gradient.consistency": 1.0, "gradient.supervised": 1.0, "accepted": 5}, True, {}),
        ({"labeled": 1, "gradient.consistency": 1.0, "gradient.supervised": 3.0, "accepted": 5}, False, None),
        ({"labeled": 0, "gradient.consistency": 1.0, "gradient.supervised": 3.0}, True, None),
        ({"labeled": 1, "gradient.supervised": 0.0}, False, {}),
        ({"labeled": 1}, False, {}),
    ],
)
def test_without_a_term_that_was_withheld_there_are_no_shares(
    sent: dict[str, Any], coarse: bool, shares: dict[str, float] | None
) -> None:
    whole = {"consistency": 0.25, "supervised": 0.75}
    assert gradient_shares(sent, coarse) == (whole if shares is None else shares)


def test_a_private_rounds_cost_is_shown_where_its_site_tells() -> None:
    reader = ScalarReader(_plan())
    reader.read({"event": "trained", "round": 1, "site": "alpha", "steps": 3, "epsilon.total": 1.5})
    found = reader.read({"event": "aggregated", "round": 1, "time": 1.0, "seconds": 2.0, "weights": {"alpha": 1.0}})
    assert found is not None
    assert found.values["epsilon.total/alpha"] == 1.5


def test_each_structure_is_shown_where_there_are_several() -> None:
    plan = study_plan("task.classes=[{name: left, value: 1}, {name: right, value: 2}]", "pseudo_labels=null")
    reader = ScalarReader(plan)
    reader.read({"event": "evaluated", "round": 1, "site": "alpha", "dice.left": 0.5, "dice.right": 1.0})
    found = reader.read({"event": "scored", "round": 1, "time": 2.0})
    assert found is not None
    expected = {"dice/alpha": 0.75, "mean/dice": 0.75, "dice.left/alpha": 0.5, "dice.right/alpha": 1.0}
    assert found.values == expected


@given(st.lists(st.tuples(st.sampled_from(("a", "b")), st.integers(1, 4)), max_size=12), st.integers(0, 4))
def test_the_history_holds_each_step_once_however_often_a_run_repeats_it(
    trained: list[tuple[str, int]], resumed: int
) -> None:
    lines: list[dict[str, Any]] = []
    for site, number in trained:
        lines.append({"event": "trained", "round": number, "site": site, "steps": len(lines)})
        about = {"round": number, "time": float(len(lines)), "seconds": 1.0, "weights": {}}
        lines.append({"event": "aggregated", **about})
    lines.append({"event": "resumed", "round": resumed, "time": 0.0})
    found = history(_plan(), lines)
    rounds = [each.round for each in found]
    assert len(set(rounds)) == len(rounds)
    assert set(rounds) == {number for _, number in trained if number <= resumed}
    for step in found:
        of_round = [line for line in lines if (line["event"], line.get("round")) == ("aggregated", step.round)]
        assert step.time == of_round[-1]["time"]
