"""How a run's faults are shown: one line each, with site names."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engines.monitor import RunMonitor
from server.run_folder import RunFolder

EVENTS = [
    ("late", {"round": 2, "site": "beta", "seconds": 31.4}, "the reply of beta came 31 s late and is not used"),
    ("left", {"round": 2, "site": "beta", "reason": "no heartbeats"}, "round 2: beta left: no heartbeats"),
    ("silent", {"round": 2, "sites": 1, "names": ["beta"], "seconds": 60.0}, "beta did not answer within 60 s"),
    ("waiting", {"round": 2, "sites": ["beta"], "seconds": 600.0}, "too few sites; waiting up to 600 s for beta"),
    ("excluded", {"round": 2, "site": "beta", "until": 4, "reason": "x"}, "beta is left out until round 4: x"),
    ("set-aside", {"checkpoint": 2, "reason": "it is torn"}, "a checkpoint was set aside: it is torn"),
    ("resumed", {"round": 2}, "resumed from round 2"),
    ("refused", {"round": 2, "site": "beta", "reason": "refused by rule storage"}, "beta is left out: refused"),
    (
        "rejoined",
        {"round": 2, "site": "beta", "labeled": 1, "unlabeled": 2, "validation": 3, "quarantined": 0},
        "beta rejoined: 1 labeled, 2 unlabeled",
    ),
]


@pytest.mark.parametrize(("event", "content", "words"), EVENTS, ids=[event for event, _, _ in EVENTS])
def test_what_went_wrong_is_shown_as_a_line(tmp_path: Path, event: str, content: dict[str, Any], words: str) -> None:
    said = io.StringIO()
    with RunMonitor("study", tmp_path, {}, Console(file=said, width=200)):
        RunFolder(tmp_path).record(event, **content)
    assert words in said.getvalue()
