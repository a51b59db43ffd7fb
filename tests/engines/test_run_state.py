"""How a run folder records the run's end, of which Flower, the lead and the run itself each know a part."""

from __future__ import annotations

from pathlib import Path

from engines.run_state import record_end, run_reason, run_state
from semisam_core.files import write_json

INTERRUPTED = {"state": "failed", "reason": "KeyboardInterrupt: "}


def test_a_completed_run_keeps_its_status(tmp_path: Path) -> None:
    write_json(tmp_path / "status.json", {"state": "completed", "reason": ""})
    record_end(tmp_path, "completed", "")
    assert run_state(tmp_path) == "completed"


def test_a_failed_runs_own_reason_is_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "status.json", {"state": "failed", "reason": "too few sites"})
    record_end(tmp_path, "failed", "exit code 1")
    assert run_reason(tmp_path) == "too few sites"


def test_a_run_that_died_silently_counts_as_failed(tmp_path: Path) -> None:
    write_json(tmp_path / "status.json", {"state": "running", "reason": ""})
    record_end(tmp_path, "failed", "")
    assert (run_state(tmp_path), run_reason(tmp_path)) == ("failed", "Flower says the run is failed.")


def test_who_stopped_a_run_is_recorded_whether_the_command_or_flower_reports_last(tmp_path: Path) -> None:
    for order in (("by hand", ""), ("", "by hand")):
        write_json(tmp_path / "status.json", INTERRUPTED)
        for details in order:
            record_end(tmp_path, "stopped", details)
        assert run_reason(tmp_path) == "Flower says the run is stopped: by hand"
