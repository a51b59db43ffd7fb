"""The feature head: what it reads, that it learns from few labels, and that the same seed trains the same head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from semisam_core.errors import ConfigError
from semisam_core.evaluation import dice_of
from semisam_core.generalists import EmbeddingStore, GeneralistSpec, Prompts, Segmentation, VolumeGrid, registry
from semisam_core.generalists.crops import CropLattice
from semisam_core.plan import Plan
from semisam_core.plan_sections.sources import FeatureHeadSettings
from semisam_core.scratch import Scratch
from semisam_core.sources import feature_head
from semisam_core.sources.base import SourceScan
from semisam_core.sources.feature_head import FeatureHeadSource, FeatureReader, head_loss, train_head
from semisam_core.sources.head_network import FeatureHead, feature_head_of
from tests.conftest import balls, blob, tiny_plan
from tests.semisam_core.generalists.fake import CARD, FakeGeneralist

CPU = torch.device("cpu")
SPACING = (2.0, 2.0, 2.0)
PLANES = ("axial", "coronal", "sagittal")
HEAD = "pseudo_labels.sources.feature_head={generalist: fake, steps_per_round: 60, learning_rate: 0.01}"


def _plan(*changes: str) -> Plan:
    return tiny_plan(
        "pseudo_labels.method=evidence", HEAD, f"pseudo_labels.prompting.planes=[{', '.join(PLANES)}]", *changes
    )


def _head(plan: Plan) -> FeatureHead:
    head = feature_head_of(plan)
    assert head is not None
    return head


def _settings(plan: Plan) -> FeatureHeadSettings:
    assert plan.pseudo_labels is not None
    assert plan.pseudo_labels.sources.feature_head is not None
    return plan.pseudo_labels.sources.feature_head


def _scan(seed: int) -> tuple[Tensor, Tensor]:
    image, label = blob(seed=seed)
    scan = torch.from_numpy(image)[None]
    return (scan - scan.mean()) / scan.std(), torch.from_numpy(label)


@pytest.fixture
def reader(tmp_path: Path) -> FeatureReader:
    return FeatureReader(FakeGeneralist(), EmbeddingStore(tmp_path, 10**9), 4.0, 1.0)


def _trained(reader: FeatureReader, plan: Plan, seed: int = 0) -> FeatureHead:
    head, (image, label) = _head(plan), _scan(0)
    scans = {view: [reader.labeled(image, label, SPACING, view, 1)] for view in head.views}
    train_head(head, scans, _settings(plan), seed, CPU)
    return head


def test_a_head_trained_on_one_scan_finds_the_object_on_another(reader: FeatureReader) -> None:
    plan = _plan()
    image, label = _scan(7)
    scan = SourceScan(image, SPACING, 1)
    untrained = FeatureHeadSource(_head(plan), reader, CPU).look(scan)
    evidence = FeatureHeadSource(_trained(reader, plan), reader, CPU).look(scan)
    assert evidence.foreground.shape == (1, *label.shape)
    assert dice_of(evidence.foreground[0] > 0.5, label == 1) > 0.8
    assert dice_of(untrained.foreground[0] > 0.5, label == 1) < 0.5
    assert evidence.answered.tolist() == [True]


def test_the_same_seed_trains_the_same_head_and_another_seed_another(reader: FeatureReader) -> None:
    one, same, other = (_trained(reader, _plan(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_initial_weights_depend_on_the_plans_seed_alone() -> None:
    torch.rand(3)
    state = torch.random.get_rng_state()
    one, same, other = (_head(_plan(f"seed={seed}")).state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert not bool(one.pop("log_volumes").any())
    assert {name.split(".")[1] for name in one} == set(PLANES)


def test_only_a_plan_by_evidence_with_a_head_has_one() -> None:
    assert feature_head_of(tiny_plan(HEAD)) is None
    assert feature_head_of(tiny_plan("pseudo_labels.method=evidence")) is None
    assert feature_head_of(tiny_plan("pseudo_labels=null")) is None


@pytest.mark.parametrize("plane", PLANES)
def test_what_is_read_lies_where_it_is_written_back(reader: FeatureReader, plane: str) -> None:
    image, label = _scan(0)
    seen = reader.read(image, SPACING, plane)
    masks = reader.labeled(image, label, SPACING, plane, 1).targets[:, 1]
    assert dice_of(seen.space.spread(masks) > 0.5, label == 1) > 0.8


def test_features_have_no_offset_or_scale_of_their_scan(reader: FeatureReader) -> None:
    image, _ = _scan(0)
    seen = reader.read(image, SPACING, "axial")
    own = seen.values.movedim(1, -1)[seen.inside]
    assert torch.allclose(own.mean(0), torch.zeros(2), atol=1e-4)
    assert torch.allclose(own.std(0, correction=0), torch.ones(2), atol=1e-3)
    assert float(seen.places.abs().max()) <= 1


def test_shares_of_all_classes_sum_to_one(reader: FeatureReader) -> None:
    image, label = balls()
    known = reader.labeled(torch.from_numpy(image)[None], torch.from_numpy(label), SPACING, "axial", 3)
    assert torch.allclose(known.targets.sum(1), torch.ones(known.targets[:, 0].shape), atol=1e-4)
    assert [bool((known.targets[:, k] > 0.5).any()) for k in range(4)] == [True] * 4


def test_the_loss_is_cross_entropy_and_dice_over_the_scan_without_its_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator)
    targets = torch.rand(2, 3, 4, 4, generator=generator)
    targets[:, 2] = 0  # a class that the batch does not show has no Dice
    targets = targets / targets.sum(1, keepdim=True)
    inside = torch.ones(2, 4, 4, dtype=torch.bool)
    inside[:, 0] = False
    p, entropy, overlap, size = logits.softmax(1), 0.0, 0.0, 0.0
    for n in range(2):
        for row in range(1, 4):
            for column in range(4):
                place = (n, slice(None), row, column)
                entropy -= float((targets[place] * p[place].log()).sum()) / 24
                overlap += float(p[n, 1, row, column] * targets[n, 1, row, column])
                size += float(p[n, 1, row, column] + targets[n, 1, row, column])
    expected = 0.5 * (entropy + 1 - (2 * overlap + 1) / (size + 1))
    assert float(head_loss(logits, targets, inside)) == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_is_an_error(reader: FeatureReader) -> None:
    plan, (image, label) = _plan(), _scan(0)
    known = reader.labeled(image, label, SPACING, "axial", 1)
    known.values[:] = torch.nan
    with pytest.raises(FloatingPointError, match="loss of the feature head became nan in the view axial"):
        train_head(_head(plan), {"axial": [known]}, _settings(plan), 0, CPU)


CUBES = replace(CARD, name="fake-cubes", feature_dimensions=3)


class FakeCubes:
    """A 3D generalist whose features are cubes' intensities, dark and bright."""

    card = CUBES
    weights_sha256 = "1" * 64

    def lattice(self, grid: VolumeGrid) -> CropLattice:
        return CropLattice(grid, 16, 2.0)

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        return ()

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        lattice = self.lattice(grid)
        cubes = {unit: lattice.cut(lattice.resample(volume), unit) for unit in units}
        bright = {unit: torch.sigmoid(6 * adaptive_avg_pool3d(cube[None], 8)[0]) for unit, cube in cubes.items()}
        return {unit: torch.stack([1 - each, each]) for unit, each in bright.items()}

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        return Segmentation(torch.zeros(grid.shape), {})


@pytest.fixture
def cubes(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    registry.register(GeneralistSpec(CUBES, lambda *_: FakeCubes(), packaged=True))
    return _plan("pseudo_labels.generalists=[fake-cubes]", HEAD.replace("fake", "fake-cubes"))


def test_a_head_on_cubes_of_a_3d_generalist_finds_the_object_on_another_scan(cubes: Plan, tmp_path: Path) -> None:
    reader = FeatureReader(FakeCubes(), EmbeddingStore(tmp_path, 10**9), 4.0, 1.0)
    image, label = _scan(7)
    scan = SourceScan(image, SPACING, 1)
    head = _trained(reader, cubes)
    assert list(head.views) == ["volume"]
    evidence = FeatureHeadSource(head, reader, CPU).look(scan)
    assert dice_of(evidence.foreground[0] > 0.5, label == 1) > 0.8
    untrained = FeatureHeadSource(_head(cubes), reader, CPU).look(scan)
    assert dice_of(untrained.foreground[0] > 0.5, label == 1) < 0.5


@pytest.mark.parametrize("shape", [(24, 24, 16), (10, 30, 7)], ids=["larger than a cube", "smaller along two axes"])
def test_cubes_are_written_back_where_they_were_read(shape: tuple[int, int, int], tmp_path: Path) -> None:
    reader = FeatureReader(FakeCubes(), EmbeddingStore(tmp_path, 10**9), 4.0, 1.0)
    label = torch.zeros(shape, dtype=torch.long)
    label[3:9, 4:12, 1:6] = 1
    image = 4 * label[None].float() + 1
    seen = reader.read(image, SPACING, "volume")
    known = reader.labeled(image, label, SPACING, "volume", 1)
    assert seen.values.shape == (len(seen.space.units), 2, 8, 8, 8)
    assert torch.allclose(known.targets.sum(1), torch.ones_like(known.targets[:, 0]), atol=1e-5)
    assert dice_of(seen.space.spread(known.targets[:, 1]) > 0.5, label == 1) > 0.75
    assert torch.equal(seen.inside, seen.space.shares(torch.ones(shape), 8) > 0.5)
    assert bool(torch.isfinite(seen.values).all())
    # A feature's place, brought back, is the place of the voxels that it stands for.
    for axis, length in enumerate(shape):
        written = seen.space.spread(seen.places[:, axis]).movedim(axis, 0).flatten(1).mean(1)
        expected = 2 * (torch.arange(length) + 0.5) / length - 1
        assert torch.allclose(written, expected, atol=0.25)


def test_a_generalist_without_feature_maps_is_refused(tmp_path: Path) -> None:
    class Blind:
        card = FakeGeneralist().card

    with pytest.raises(ConfigError, match="embeddings of the generalist fake are not feature maps"):
        FeatureReader(Blind(), EmbeddingStore(tmp_path, 0), 4.0, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(9, 2, 16, 16), (9, 64, 16, 16), (9, 70, 13, 13), (3, 96, 5, 5, 5)])
def test_features_are_standardised_over_the_scan_as_they_would_be_in_memory(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    generator, room = torch.Generator().manual_seed(0), Scratch(tmp_path)
    values = 5 + 3 * torch.randn(shape, generator=generator)
    inside = torch.rand((shape[0], *shape[2:]), generator=generator) > 0.3
    own = values.movedim(1, -1)[inside]
    sides = (1,) * (len(shape) - 2)
    mean, deviation = (each.view(1, -1, *sides) for each in (own.mean(0), own.std(0, correction=0)))
    found = room.keep(values)
    feature_head._standardise(found, inside, room)
    assert torch.equal(found, (values - mean) / (deviation + 1e-6))
