"""Pseudo-labels on disk: what was saved comes back, to half precision; a damaged file counts as absent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from semisam_core.data.patches import PatchStream, TrainingScan
from semisam_core.errors import CaseError
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.fusion import PseudoLabel
from semisam_core.pseudo_labels.store import PseudoLabelStore
from tests.semisam_core.pseudo_labels.scenes import (
    FIRST,
    SECOND,
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
    unread = store.open("scan")
    assert unread is not None
    assert list(unread.confidences) == kept.confidences()  # what is reported is what is trained on


def test_a_damaged_pseudo_label_counts_as_absent(tmp_path: Path) -> None:
    store = PseudoLabelStore(tmp_path)
    (tmp_path / f"{'a' * 64}.safetensors").write_bytes(b"torn")
    assert store.load("a" * 64) is None
    assert store.load("b" * 64) is None
    assert store.open("a" * 64) is None


def test_an_uncertainty_beyond_half_precision_stays_finite_and_says_as_little(
    tmp_path: Path, label: PseudoLabel
) -> None:
    store = PseudoLabelStore(tmp_path / "kept")
    store.save("a" * 64, replace(label, uncertainty=label.uncertainty + 1e6))
    kept = store.load("a" * 64)
    assert kept is not None
    assert bool(kept.uncertainty.isfinite().all())
    assert not bool(torch.exp(-kept.uncertainty).any())


def test_patches_of_a_stored_pseudo_label_are_those_of_one_in_memory(tmp_path: Path, label: PseudoLabel) -> None:
    second = 0.3 + 0.6 * cuboid(SECOND)[None]
    label = replace(label, target=torch.cat([label.target[:1], second]), valid=torch.tensor([True, True]))
    store = PseudoLabelStore(tmp_path / "kept")
    store.save("scan", label)
    stored, loaded, plan = store.open("scan"), store.load("scan"), plain_plan(TWO_CLASSES)
    assert stored is not None
    assert loaded is not None
    assert stored.refusals == loaded.refusals
    for k in (1, 2):
        assert torch.equal(stored.voxels(k), (loaded.target[k - 1] > 0.5).nonzero())
        assert stored.foreground[k - 1] == int((loaded.target[k - 1] > 0.5).sum()) > 0
    image = image_of(cuboid(FIRST))
    in_memory = TrainingScan(image, None, loaded.target, loaded.uncertainty, loaded.valid)
    on_disk = TrainingScan(image, None, stored.target, stored.uncertainty, stored.valid, stored)
    streams = [PatchStream(lambda _, scan=scan: scan, 1, plan, 2, seed=3) for scan in (in_memory, on_disk)]
    for _ in range(6):
        one, other = (stream.next() for stream in streams)
        for name in ("image", "target", "uncertainty", "valid"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_a_pseudo_label_lost_during_a_round_is_an_error_of_its_case(tmp_path: Path, label: PseudoLabel) -> None:
    store = PseudoLabelStore(tmp_path / "kept")
    store.save("scan", label)
    stored = store.open("scan")
    assert stored is not None
    (tmp_path / "kept" / "scan.safetensors").unlink()
    with pytest.raises(CaseError):
        stored.voxels(1)
