"""Training patches: seeded, of one shape, with image and label aligned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.data.patches import PatchStream, TrainingScan
from tests.conftest import blob, tiny_plan

NO_AUGMENTATION = (
    "training.augmentation={flip: 0, rotation_degrees: 0, scale: 0, affine_probability: 0, intensity: 0, noise: 0}"
)


def _scan(seed: int = 0, shape: tuple[int, int, int] = (24, 24, 16)) -> TrainingScan:
    image, label = blob(shape, seed)
    return TrainingScan(torch.from_numpy(image)[None], torch.from_numpy(label))


def _stream(*scans: TrainingScan, seed: int = 0, batch: int = 1, changes: tuple[str, ...] = ()) -> PatchStream:
    return PatchStream(lambda k: scans[k], len(scans), tiny_plan(*changes), batch, seed)


def test_equal_seeds_draw_equal_patches() -> None:
    first, second = _stream(_scan(), _scan(1)), _stream(_scan(), _scan(1))
    for _ in range(3):
        one, other = first.next(), second.next()
        assert torch.equal(one.image, other.image)
        assert one.label is not None
        assert other.label is not None
        assert torch.equal(one.label, other.label)


@settings(deadline=None, max_examples=10)
@given(shape=st.tuples(*(st.integers(5, 30) for _ in range(3))))
def test_patches_have_the_plans_shape_however_small_the_scan(shape: tuple[int, int, int]) -> None:
    batch = _stream(_scan(shape=shape), batch=2).next()
    assert batch.image.shape == (2, 1, 16, 16, 8)
    assert batch.label is not None
    assert batch.label.shape == (2, 16, 16, 8)
    assert batch.target.shape == batch.uncertainty.shape == (2, 1, 16, 16, 8)
    assert batch.valid.shape == (2, 1)


@pytest.mark.parametrize(
    ("axes", "flipped"),
    [
        ("[]", ()),
        ("[right-left]", (0,)),
        ("[anterior-posterior]", (1,)),
        ("[superior-inferior, right-left]", (0, 2)),
        ("[right-left, anterior-posterior, superior-inferior]", (0, 1, 2)),
    ],
)
def test_patches_are_flipped_along_the_plans_axes_only(axes: str, flipped: tuple[int, ...]) -> None:
    scan = _scan(shape=(16, 16, 8))  # exactly one patch
    changes = (NO_AUGMENTATION, "training.augmentation.flip=1", f"training.augmentation.flip_axes={axes}")
    batch = _stream(scan, changes=changes).next()
    assert torch.equal(batch.image[0, 0], scan.image[0].flip(flipped))
    assert batch.label is not None
    assert scan.label is not None
    assert torch.equal(batch.label[0].long(), scan.label.flip(flipped).long())


def test_image_label_and_pseudo_label_stay_aligned_through_augmentation() -> None:
    _, label = blob()
    mask = torch.from_numpy(label)
    scan = TrainingScan(100.0 * mask[None].float(), mask, mask[None].float(), mask[None].float(), torch.tensor([True]))
    stream = _stream(scan, changes=("training.augmentation={intensity: 0, noise: 0}",))
    for _ in range(5):
        batch = stream.next()
        assert batch.label is not None
        assert float(((batch.image[:, 0] > 50) == (batch.label > 0)).float().mean()) > 0.97
        assert torch.allclose(batch.target[:, 0], batch.image[:, 0] / 100, atol=1e-3)
        assert torch.allclose(batch.uncertainty, batch.target, atol=1e-5)


def test_labels_stay_class_indices() -> None:
    stream = _stream(_scan())
    for _ in range(5):
        label = stream.next().label
        assert label is not None
        assert set(label.unique().tolist()) <= {0, 1}


def test_every_scan_is_drawn_once_before_any_is_drawn_again() -> None:
    seen: list[int] = []
    scans = [_scan(k) for k in range(4)]

    def load(k: int) -> TrainingScan:
        seen.append(k)
        return scans[k]

    stream = PatchStream(load, 4, tiny_plan(), 1, 0)
    for _ in range(8):
        stream.next()
    assert sorted(seen[:4]) == sorted(seen[4:]) == [0, 1, 2, 3]


def test_the_foreground_share_sets_how_often_patches_contain_foreground() -> None:
    label = torch.zeros(40, 40, 24, dtype=torch.uint8)
    label[2:4, 2:4, 2:4] = 1
    scan = TrainingScan(torch.zeros(1, 40, 40, 24), label)
    always = _stream(scan, changes=(NO_AUGMENTATION, "data.foreground_share=1.0"))
    never = _stream(scan, changes=(NO_AUGMENTATION, "data.foreground_share=0.0"))
    assert all(bool((always.next().label == 1).any()) for _ in range(5))
    hits = sum(bool((never.next().label == 1).any()) for _ in range(10))
    assert hits < 10


def test_an_unlabeled_stream_carries_no_label() -> None:
    scan = TrainingScan(_scan().image)
    batch = _stream(scan).next()
    assert batch.label is None
    assert not batch.valid.any()


def test_without_augmentation_a_patch_is_a_plain_crop() -> None:
    scan = _scan(shape=(16, 16, 8))
    batch = _stream(scan, changes=(NO_AUGMENTATION,)).next()
    assert torch.equal(batch.image[0], scan.image)


def test_a_stream_without_scans_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one scan"):
        _stream()


def test_a_small_class_is_sampled_as_often_as_a_large_one() -> None:
    label = torch.zeros(60, 40, 24, dtype=torch.uint8)
    label[:20] = 1
    label[50:52, 20:22, 12:14] = 3
    scan = TrainingScan(torch.zeros(1, 60, 40, 24), label)
    classes = "task.classes=[{name: a, value: 1}, {name: b, value: 2}, {name: c, value: 3}]"
    stream = _stream(scan, changes=(NO_AUGMENTATION, classes, "data.foreground_share=1.0"))
    hits = 0
    for _ in range(40):
        found = stream.next().label
        assert found is not None
        hits += bool((found == 3).any())
    assert 10 <= hits <= 30


def test_a_small_class_of_a_pseudo_label_is_sampled_as_often_as_a_large_one() -> None:
    target = torch.zeros(2, 60, 40, 24)
    target[0, :20] = 0.9
    target[1, 50:52, 20:22, 12:14] = 0.9
    scan = TrainingScan(torch.zeros(1, 60, 40, 24), None, target, torch.zeros_like(target), torch.tensor([True, True]))
    classes = "task.classes=[{name: a, value: 1}, {name: b, value: 2}]"
    stream = _stream(scan, changes=(NO_AUGMENTATION, classes, "data.foreground_share=1.0"))
    hits = sum(bool((stream.next().target[0, 1] > 0.5).any()) for _ in range(40))
    assert 10 <= hits <= 30
