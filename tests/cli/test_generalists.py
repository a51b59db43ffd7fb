"""`semisam generalists`: each model's prompts, licence and training data, and whether its weights can be used here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli.main import app
from semisam_core.generalists import generalist_names, generalist_spec

runner = CliRunner()


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.main.console", Console(width=200))


def _said(*arguments: str) -> str:
    result = runner.invoke(app, ["generalists", *arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_every_generalist_is_listed_with_licence_source_training_data_and_overlaps() -> None:
    said = _said("--no-measure")
    for name in generalist_names():
        card = generalist_spec(name).card
        assert name in said
        for text in (card.licence, card.source, *card.training_data, *card.overlaps):
            assert " ".join(text.split())[:60] in said


def test_models_that_may_have_seen_the_left_atrium_challenge_say_so() -> None:
    for name in ("sam-med3d", "sam-med3d-turbo"):
        overlaps = " ".join(generalist_spec(name).card.overlaps).lower()
        assert "atri" in overlaps


def test_weights_of_a_site_that_cannot_be_used_are_listed_with_the_reason(make_site: Callable[..., Path]) -> None:
    weights = {"medsam": {"weights": "gone.pth", "sha256": "a" * 64}, "fake": {"weights": "packaged"}}
    said = _said("--no-measure", "--site", str(make_site(generalists=weights)))
    assert "cannot be used, see below" in said
    assert "gone.pth: the weights file cannot be read" in said
    assert "medsam_vit_b.pth" in said  # the published name of the accepted file


def test_models_whose_weights_are_here_are_timed(make_site: Callable[..., Path]) -> None:
    only = {"fake": {"weights": "packaged"}, "lite-medsam": {"weights": "packaged", "sha256": "b" * 64}}
    row = next(
        line
        for line in runner.invoke(app, ["generalists", "--site", str(make_site(generalists=only))]).output.splitlines()
        if "fake" in line and "box-2d" in line
    )
    assert "packaged, 000000000000" in row
    assert "+" in row


def test_a_missing_site_file_is_one_sentence(tmp_path: Path) -> None:
    result = runner.invoke(app, ["generalists", "--site", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert "there is no such file" in result.output
