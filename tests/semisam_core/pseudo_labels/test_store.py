"""Pseudo-labels on disk: what was saved comes back, to half precision; a damaged file counts as absent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.fusion import PseudoLabel
from semisam_core.pseudo_labels.store import PseudoLabelStore
from tests.semisam_core.pseudo_labels.scenes import (
    FIRST,
    TWO_CLASSES,
    cuboid,
    image_of,
    plain_plan,
    pseudo_label,
    teacher_of,
)


@pytest.fixture
def label(tmp_path: Path) -> PseudoLabel:
    """Return a pseudo-label whose first class was accepted and whose second was refused."""
    first = cuboid(FIRST)
    return pseudo_label(tmp_path, plain_plan(TWO_CLASSES), image_of(first), teacher_of(0.9 * first, 0 * first))


def test_a_pseudo_label_comes_back_in_half_precision(tmp_path: Path, label: PseudoLabel) -> None:
    store = PseudoLabelStore(tmp_path / "kept")
    store.save("a" * 64, label)
    kept = store.load("a" * 64)
    assert kept is not None
    assert kept.refusals == label.refusals == (None, Refusal.EMPTY)
    assert kept.valid.tolist() == [True, False]
    for name in ("target", "uncertainty", "generalist"):
        made, loaded = getattr(label, name), getattr(kept, name)
        assert bool(made.any())
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, made.half().float())


def test_confidence_survives_the_store(tmp_path: Path, label: PseudoLabel) -> None:
    store = PseudoLabelStore(tmp_path / "kept")
    store.save("scan", label)
    kept = store.load("scan")
    assert kept is not None
    assert 0 < label.confidences()[0] < 1
    assert kept.confidences() == pytest.approx(label.confidences(), abs=1e-2)


def test_a_damaged_pseudo_label_counts_as_absent(tmp_path: Path) -> None:
    store = PseudoLabelStore(tmp_path)
    (tmp_path / f"{'a' * 64}.safetensors").write_bytes(b"torn")
    assert store.load("a" * 64) is None
    assert store.load("b" * 64) is None


def test_an_uncertainty_beyond_half_precision_stays_finite_and_says_as_little(
    tmp_path: Path, label: PseudoLabel
) -> None:
    store = PseudoLabelStore(tmp_path / "kept")
    store.save("a" * 64, replace(label, uncertainty=label.uncertainty + 1e6))
    kept = store.load("a" * 64)
    assert kept is not None
    assert bool(kept.uncertainty.isfinite().all())
    assert not bool(torch.exp(-kept.uncertainty).any())
