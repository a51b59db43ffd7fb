"""A site's own labels carried to another scan."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import SimpleITK
import torch
from torch import Tensor

from semisam_core.data.phantom import DEMO_SCANNERS, make_phantom
from semisam_core.evaluation import dice_of
from semisam_core.sources import registration
from semisam_core.sources.base import SourceScan
from semisam_core.sources.registration import Atlas, RegistrationSource, TransformStore, _image, register_affine

SPACING = (2.0, 2.0, 3.0)
SHAPE = (32, 28, 20)


def _body(shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0), stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return an image (1, H, W, D) of a body with an organ beside its centre, and the organ's mask."""
    axes = [
        (torch.arange(n) - (n - 1) / 2) * side - shift for n, side, shift in zip(SHAPE, SPACING, shift_mm, strict=True)
    ]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    x = x / stretch
    body = (x / 26) ** 2 + (y / 22) ** 2 + (z / 24) ** 2 < 1
    organ = ((x - 9) / 8) ** 2 + ((y + 4) / 6) ** 2 + ((z - 3) / 9) ** 2 < 1
    spine = (x + 10) ** 2 + (y - 8) ** 2 < 25
    image = body.float() + 1.5 * organ.float() - 0.5 * (spine & body).float()
    return image[None], organ


def _scan(image: Tensor) -> SourceScan:
    return SourceScan(image, SPACING, 1)


def _atlas(key: str = "a") -> Atlas:
    image, organ = _body()
    return Atlas(key, image, organ.long(), SPACING)


@pytest.mark.parametrize(
    ("shift_mm", "stretch"),
    [((8.0, 0.0, 0.0), 1.0), ((0.0, -6.0, 0.0), 1.0), ((0.0, 0.0, 7.0), 1.0), ((4.0, 4.0, 3.0), 1.15)],
)
def test_a_label_follows_the_organ_to_a_scan_that_was_moved_or_stretched(
    shift_mm: tuple[float, float, float], stretch: float
) -> None:
    image, organ = _body(shift_mm, stretch)
    unmoved = dice_of(_body()[1], organ)
    carried = RegistrationSource([_atlas()]).look(_scan(image)).foreground[0] > 0.5
    assert dice_of(carried, organ) > max(0.85, unmoved)


def test_the_same_scans_give_the_same_label_bit_by_bit() -> None:
    image, _ = _body((5.0, 2.0, 0.0))
    one, other = (RegistrationSource([_atlas()]).look(_scan(image)).foreground for _ in range(2))
    assert torch.equal(one, other)


def test_a_registration_repeats_bit_by_bit_however_many_threads_there_are() -> None:
    """On a scan large enough for the metric to be summed by several threads."""
    scanner = DEMO_SCANNERS["south"]
    images = [torch.from_numpy(make_phantom(scanner, seed)[0]).float() for seed in (1, 2)]
    fixed, moving = (_image((image - image.mean()) / image.std(), scanner.spacing_mm) for image in images)
    before = SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(4)
    try:
        found = [register_affine(fixed, moving, 100) for _ in range(4)]
        assert SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads() == 4
    finally:
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    assert all(each == found[0] for each in found)


def test_a_transform_is_made_once_for_each_pair_of_scans() -> None:
    kept: dict[tuple[str, str], list[float]] = {}
    made: list[tuple[str, str]] = []

    def cached(one: str, other: str, make: object) -> list[float]:
        if (one, other) not in kept:
            made.append((one, other))
            kept[one, other] = make()  # type: ignore[operator]
        return kept[one, other]

    scan = _scan(_body((5.0, 2.0, 0.0))[0])
    source = RegistrationSource([_atlas("a"), _atlas("b")], cached=cached)
    first, second = source.look(scan), source.look(scan)
    assert made == [("a", scan.key), ("b", scan.key)]
    assert torch.equal(first.foreground, second.foreground)


def test_without_the_scan_that_is_scored_only_the_others_are_carried() -> None:
    source = RegistrationSource([_atlas("a"), _atlas("b")])
    others = source.without("a")
    assert others is not None
    assert others.without("b") is None
    assert RegistrationSource([_atlas("a")]).without("a") is None


def test_scans_that_show_nothing_in_common_give_no_evidence() -> None:
    evidence = RegistrationSource([]).look(_scan(_body()[0]))
    assert not bool(evidence.answered.any())


def test_scans_of_different_parts_of_the_body_give_no_evidence() -> None:
    image, organ = _body()
    far = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 40.0, 0.0, 0.0]  # of a field of view of 64 mm
    source = RegistrationSource([Atlas("a", image, organ.long(), SPACING)], cached=lambda *_: far)
    assert not bool(source.look(_scan(image)).answered.any())
    near = [*far[:9], 4.0, 0.0, 0.0]
    source = RegistrationSource([Atlas("a", image, organ.long(), SPACING)], cached=lambda *_: near)
    assert bool(source.look(_scan(image)).answered.all())


@pytest.mark.parametrize("content", ["", "[1.0, 2.0]", "{}", "null", '["a"]', f"[{', '.join(['NaN'] * 12)}]"])
def test_a_stored_transform_that_is_torn_is_made_again(tmp_path: Path, content: str) -> None:
    store, made = TransformStore(tmp_path / "transforms", 50), [float(k) for k in range(12)]
    assert store("a", "b", lambda: made) == made
    (file,) = (tmp_path / "transforms").iterdir()
    assert store("a", "b", lambda: [math.nan]) == made
    file.write_text(content)
    again = [2 * each for each in made]
    assert store("a", "b", lambda: again) == again
    assert store("a", "b", lambda: made) == again


def test_other_iterations_give_another_file(tmp_path: Path) -> None:
    for iterations in (50, 100):
        TransformStore(tmp_path, iterations)("a", "b", lambda: [0.0] * 12)
    assert len(list(tmp_path.iterdir())) == 2


def test_of_a_large_scan_some_voxels_are_registered_and_lie_where_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = torch.rand(20, 17, 9, generator=torch.Generator().manual_seed(0))
    whole = registration._image(volume, SPACING)
    monkeypatch.setattr(registration, "REGISTERED", volume.numel() // 9)
    thinned = registration._image(volume, SPACING)
    assert thinned.GetSize() == (7, 6, 3)
    for index in ((0, 0, 0), (6, 5, 2), (1, 4, 2)):
        there = tuple(3 * each for each in index)
        assert thinned[index] == whole[there]
        place = whole.TransformIndexToPhysicalPoint(there)
        assert thinned.TransformIndexToPhysicalPoint(index) == pytest.approx(place)


def test_a_label_that_is_carried_over_is_what_itk_makes_of_a_float_image() -> None:
    image, organ = _body((5.0, 2.0, 0.0))
    transform = SimpleITK.AffineTransform(3)
    transform.SetTranslation([3.7, -1.2, 0.4])
    fixed, moving = (registration._image(each, SPACING) for each in (image[0], organ.float()))
    expected = SimpleITK.GetArrayFromImage(SimpleITK.Resample(moving, fixed, transform, SimpleITK.sitkLinear, 0.0))
    grid = registration._Grid.of(image[0], SPACING)
    moved = registration._moved(organ, SPACING, grid, transform, SimpleITK.sitkLinear)
    assert torch.equal(moved, torch.from_numpy(expected.transpose(2, 1, 0)))
