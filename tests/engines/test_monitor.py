"""How a run's faults and a round's training are shown: one line each, with site names."""

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
    ("sum-given-up", {"round": 2, "attempt": 1, "reason": "x"}, "round 2: the secure sum was given up at attempt 1: x"),
    ("not-logged", {"logger": "TensorBoard", "reason": "x"}, "TensorBoard could not be written, the run goes on: x"),
    ("refused", {"round": 2, "site": "beta", "reason": "refused by rule storage"}, "beta is left out: refused"),
    (
        "rejoined",
        {"round": 2, "site": "beta", "labeled": 1, "unlabeled": 2, "validation": 3, "quarantined": 0},
        "beta rejoined: 1 labeled, 2 unlabeled",
    ),
]


@pytest.mark.parametrize(("event", "content", "words"), EVENTS, ids=[event for event, _, _ in EVENTS])
def test_what_went_wrong_is_shown_as_a_line(tmp_path: Path, event: str, content: dict[str, Any], words: str) -> None:
    assert words in _said(tmp_path, event, content)


TRAINED = {"round": 2, "site": "beta", "steps": 30, "accepted": 3, "gated": 1}


def test_a_term_that_teaches_next_to_nothing_is_seen_in_the_line_of_its_round(tmp_path: Path) -> None:
    norms = {"gradient.supervised": 0.58, "gradient.consistency": 0.007, "gradient.generalist": 0.04}
    line = _said(tmp_path, "trained", TRAINED | norms)
    assert "3 accepted, 1 gated; gradient consistency 1%, generalist 6%, supervised 93%" in line


@pytest.mark.parametrize("norms", [{}, {"gradient.supervised": 1.0}, {"gradient.a": 0.0, "gradient.b": 0.0}])
def test_without_terms_to_compare_nothing_is_said_of_gradients(tmp_path: Path, norms: dict[str, float]) -> None:
    assert "gradient" not in _said(tmp_path, "trained", TRAINED | norms)


def test_counts_in_buckets_are_shown_as_ranges_and_withheld_numbers_are_named(tmp_path: Path) -> None:
    said = io.StringIO()
    with RunMonitor("study", tmp_path, {}, Console(file=said, width=200)):
        record, counts = RunFolder(tmp_path).record, {"labeled": 1, "unlabeled": 10, "validation": 1, "quarantined": 0}
        record("joined", round=0, site="beta", counts="buckets", **counts)
        gradients = {"gradient.consistency": 0.1, "gradient.generalist": 0.1}  # the labels' term was withheld
        record("trained", **TRAINED | {"accepted": 5, "gated": 0} | counts | gradients)
        record("evaluated", round=2, site="beta", validation=1)
        record("joined", round=0, site="alpha", **counts)
    assert "beta joined: 1-4 labeled, 10-19 unlabeled, 1-4 validation, 0 quarantined" in said.getvalue()
    assert "5-9 accepted, 0 gated\n" in said.getvalue()
    assert "beta Dice withheld" in said.getvalue()
    assert "alpha joined: 1 labeled, 10 unlabeled" in said.getvalue()


def test_a_private_round_says_what_it_cost_if_its_site_allows(tmp_path: Path) -> None:
    private = {"round": 2, "site": "beta", "steps": 30, "labeled": 4, "unlabeled": 6}
    assert _said(tmp_path, "trained", private).strip().endswith("beta trained 30 steps")
    cost = {"epsilon.round": 0.512, "epsilon.total": 3.04, "epsilon.delta": 1e-5}
    line = _said(tmp_path, "trained", private | cost)
    assert "beta trained 30 steps; privacy: epsilon 0.51, in total 3.04 at delta 1e-05" in line


def _said(folder: Path, event: str, content: dict[str, Any]) -> str:
    said = io.StringIO()
    with RunMonitor("study", folder, {}, Console(file=said, width=200)):
        RunFolder(folder).record(event, **content)
    return said.getvalue()
