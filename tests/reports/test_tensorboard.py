"""Every run of the server app leaves its scalars for TensorBoard; here those of a real study."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from semisam_core.files import read_json_lines
from tests.reports.conftest import Ran


def _last(folder: Path) -> dict[str, float]:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: found.Scalars(tag)[-1].value for tag in found.Tags()["scalars"]}


def test_the_last_rounds_numbers_are_those_of_the_metrics(ran: Ran) -> None:
    shown, lines = _last(ran.folder), read_json_lines(ran.folder / "metrics.jsonl")
    (scored,) = [line for line in lines if line["event"] == "evaluated" and line["final"] and line["site"] == "alpha"]
    assert shown["dice/alpha"] == pytest.approx(scored["dice.blob"])
    trained = [line for line in lines if line["event"] == "trained" and line["site"] == "beta"][-1]
    assert shown["pseudo-labels.accepted/beta"] == trained["accepted"]
    assert shown["loss.supervised/beta"] == pytest.approx(trained["loss.supervised"])
    shares = [value for tag, value in shown.items() if tag.startswith("gradient-share") and tag.endswith("/alpha")]
    assert sum(shares) == pytest.approx(1.0)


def test_a_site_that_withholds_its_score_has_none(ran: Ran) -> None:
    shown = _last(ran.folder)
    assert "bytes/gamma" in shown
    assert not [tag for tag in shown if tag.startswith(("dice", "hd95_mm", "gradient-share")) and "gamma" in tag]


def test_sites_that_train_alone_have_their_own(ran: Ran) -> None:
    assert "dice/alpha" in _last(ran.folder / "local" / "alpha")


def test_nothing_but_scalars_is_written_and_no_path(ran: Ran) -> None:
    found = EventAccumulator(str(ran.folder / "tensorboard"))
    found.Reload()
    assert [kind for kind, tags in found.Tags().items() if tags] == ["scalars"]
    for path in (ran.folder / "tensorboard").iterdir():
        assert str(ran.folder).encode() not in path.read_bytes()
        assert b"case-" not in path.read_bytes()
