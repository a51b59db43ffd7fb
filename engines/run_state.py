"""A run's state, read from its folder, and written there where the run could not do so itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from semisam_core.files import write_json
from semisam_core.plan import Plan

COMPLETED = "completed"


def run_name(folder: Path) -> str:
    """Return the name under which sites know a run, or `none`."""
    return str(_content(folder / "run.json").get("run", "none"))


def run_status(folder: Path) -> dict[str, Any]:
    """Return what a run's status.json says; empty while there is none."""
    return _content(folder / "status.json")


def run_state(folder: Path) -> str:
    """Return a run's state: not started, running, completed or failed."""
    return str(_content(folder / "status.json").get("state", "not started"))


def run_reason(folder: Path) -> str:
    """Return why a run failed."""
    return str(_content(folder / "status.json").get("reason", "see the log folder"))


def settled(folder: Path) -> bool:
    """Return whether a run has recorded its end."""
    return run_state(folder) in (COMPLETED, "failed")


def record_end(folder: Path, status: str, details: str) -> None:
    """Record that a run did not complete, unless the run itself recorded why it failed.

    Args:
        folder: the run folder.
        status: Flower's word for the end: completed, failed, stopped or unknown.
        details: an explanation, may be empty.
    """
    if status == COMPLETED:
        return
    end = f"Flower says the run is {status}"
    stopped = status == "stopped"  # the run itself only knows that it was interrupted
    known = run_state(folder) == "failed" and not stopped
    if stopped and not details:
        known = run_reason(folder).startswith(end)  # the command that stopped it has recorded more
    if not known:
        write_json(folder / "status.json", {"state": "failed", "reason": f"{end}: {details}" if details else f"{end}."})


def longest(plan: Plan) -> float:
    """Return how long a study takes, in seconds, if every wait lasts until its deadline."""
    waits = plan.aggregation
    a_round = 4 * waits.round_deadline_s + waits.rejoin_window_s + waits.wait_for_quorum_s
    return 600 + 2 * waits.join_deadline_s + (plan.training.rounds + 2) * a_round


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
