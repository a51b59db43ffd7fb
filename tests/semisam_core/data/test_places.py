"""Patches cut out first are the patches that MONAI cuts out of the whole, padded scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose, RandCropByPosNegLabeld, RandSpatialCropd, SpatialPadd
from safetensors.torch import save_file

from semisam_core.data.patches import CARRIED, PatchStream, TrainingScan, _transforms
from semisam_core.data.places import Background
from semisam_core.data.scans import StoredVolume
from semisam_core.errors import CaseError
from semisam_core.plan import Plan
from tests.conftest import tiny_plan

CLASSES = "task.classes=[{name: a, value: 1}, {name: b, value: 2}]"
KEYS = (*CARRIED, "where")


def _whole(plan: Plan, scan: TrainingScan, random: np.random.RandomState) -> dict[str, torch.Tensor]:
    """Return the next patch of a scan: whole volumes are padded, cropped and augmented."""
    shape, classes = scan.image.shape[1:], 2
    if scan.label is not None:
        masks = [scan.label == k for k in (1, 2)]
    else:
        masks = [] if scan.target is None else list(scan.target > 0.5)
    masks = [mask for mask in masks if bool(mask.any())]
    chosen = int(random.randint(len(masks))) if len(masks) > 1 else 0
    where = masks[chosen][None] if masks else torch.zeros((1, *shape), dtype=torch.bool)
    blank = torch.zeros((classes, *shape))
    share, patch = plan.data.foreground_share, plan.data.patch
    crop = (
        RandCropByPosNegLabeld(KEYS, "where", patch, pos=share, neg=1 - share, num_samples=1)
        if masks
        else RandSpatialCropd(KEYS, patch, random_size=False)
    )
    steps = Compose([SpatialPadd(KEYS, patch), *_transforms(plan, crop).transforms])
    steps.set_random_state(seed=int(random.randint(2**31 - 1)))
    sample = {
        "image": scan.image,
        "label": torch.zeros((1, *shape)) if scan.label is None else scan.label[None].float(),
        "target": blank if scan.target is None else scan.target,
        "uncertainty": blank if scan.uncertainty is None else scan.uncertainty,
        "where": where,
    }
    found = steps({name: MetaTensor(value) for name, value in sample.items()})
    found = found[0] if isinstance(found, list) else found
    return {name: found[name].as_tensor() for name in CARRIED}


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(4, 28), st.integers(4, 28), st.integers(4, 20)),
    kind=st.sampled_from(["label", "target", "nothing", "empty label"]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 999),
    stored=st.booleans(),
)
def test_patches_are_equal_bit_by_bit(
    shape: tuple[int, int, int],
    kind: str,
    share: float,
    seed: int,
    stored: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    plan = tiny_plan(CLASSES, f"data.foreground_share={share}")
    image = torch.randn((2, *shape), generator=generator)
    label = (torch.rand(shape, generator=generator) < 0.02).to(torch.uint8) * (1 + seed % 2)
    label[0, 0, 0] = seed % 3
    maps = torch.rand((2, *shape), generator=generator)
    scan = {
        "label": TrainingScan(image, label),
        "empty label": TrainingScan(image, torch.zeros_like(label)),
        "target": TrainingScan(image, None, maps * 0.6, maps, torch.tensor([True, False])),
        "nothing": TrainingScan(image),
    }[kind]
    given_scan = scan
    if stored:
        path = tmp_path_factory.mktemp("stored") / "scan.safetensors"
        save_file({"image": image}, path)
        kept = StoredVolume(path, "image", tuple(image.shape))
        given_scan = TrainingScan(kept, scan.label, scan.target, scan.uncertainty, scan.valid)
    stream = PatchStream(lambda _: given_scan, 1, plan, 1, seed)
    random = np.random.RandomState(seed)
    for _ in range(3):
        random.permutation(1)
        batch, whole = stream.next(), _whole(plan, scan, random)
        assert torch.equal(batch.image[0], whole["image"])
        assert (batch.label is None) == (scan.label is None)
        if batch.label is not None:
            assert torch.equal(batch.label[0], whole["label"][0].round().to(torch.uint8))
        assert torch.equal(batch.target[0], whole["target"].clamp(0, 1))
        assert torch.equal(batch.uncertainty[0], whole["uncertainty"].clamp_min(0))


@given(st.sets(st.integers(0, 40)), st.integers(41, 60))
def test_the_background_is_what_is_not_foreground(foreground: set[int], count: int) -> None:
    background = Background(np.array(sorted(foreground), dtype=np.int64), count)
    listed = [k for k in range(count) if k not in foreground]
    assert [background[k] for k in range(len(background))] == listed


def test_a_stored_volume_that_is_gone_is_an_error_of_its_case(tmp_path: Path) -> None:
    volume = StoredVolume(tmp_path / "gone.safetensors", "image", (1, 4, 4, 4))
    with pytest.raises(CaseError, match="the prepared scan cannot be read"):
        volume[(slice(None), slice(0, 2), slice(0, 2), slice(0, 2))]
