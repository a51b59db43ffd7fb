"""From evidence to a pseudo-label: its target, its uncertainty, its gates, and the scores of sources."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.evaluation import dice_of
from semisam_core.generalists import scan_key
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.calibration import Calibration
from semisam_core.pseudo_labels.fusion import PseudoLabel
from semisam_core.scratch import Scratch
from semisam_core.sources.base import Evidence, LabeledScan, Source, SourceName, SourceScan
from semisam_core.sources.generalists import PromptedGeneralists
from semisam_core.sources.labeling import EvidenceLabeler, reliability_of, sharpened, uncertainty_of
from semisam_core.sources.prototypes import PrototypeSource
from tests.conftest import tiny_plan

SHAPE = (12, 12, 8)


def _ball(shift: int = 0, high: float = 0.95) -> Tensor:
    maps = torch.full((1, *SHAPE), 1 - high)
    maps[:, 3 + shift : 8 + shift, 3:8, 2:6] = high
    return maps


@dataclass
class Says:
    """A source that says the same of every scan; of one that it has learned from, that all of it is foreground."""

    foreground: Tensor
    name: SourceName = SourceName.SPECIALIST
    learned: tuple[str, ...] = ()
    error: Exception | None = None
    left_out: list[str] = field(default_factory=list)

    def look(self, scan: SourceScan) -> Evidence:
        if self.error is not None:
            raise self.error
        return Evidence.of(torch.ones_like(self.foreground) if scan.key in self.learned else self.foreground)

    def without(self, key: str) -> Says | None:
        self.left_out.append(key)
        rest = tuple(each for each in self.learned if each != key)
        return Says(self.foreground, self.name, rest) if rest else None


def _scan(seed: int = 0) -> SourceScan:
    image = torch.rand((1, *SHAPE), generator=torch.Generator().manual_seed(seed))
    return SourceScan(image, (2.0, 2.0, 2.0), 1)


def _label(sources: Sequence[Source], *changes: str, calibration: Calibration | None = None) -> PseudoLabel:
    plan = tiny_plan("pseudo_labels.method=evidence", "pseudo_labels.gates.minimum_volume_ml=0.0", *changes)
    return EvidenceLabeler(sources, None, plan, calibration=calibration).label(_scan()).label


def _words(label: PseudoLabel) -> list[str | None]:
    return [None if refusal is None else refusal.value for refusal in label.refusals]


TWO = (Says(_ball()), Says(_ball(), SourceName.REGISTRATION))


@given(p=st.floats(0, 1), s=st.floats(1, 10))
def test_sharpening_moves_a_probability_away_from_one_half(p: float, s: float) -> None:
    sharp = float(sharpened(torch.tensor([p], dtype=torch.float64), s))
    assert sharp == pytest.approx(p**s / (p**s + (1 - p) ** s), abs=1e-9)
    assert abs(sharp - 0.5) >= abs(p - 0.5) - 1e-9


@given(st.floats(0, 1))
def test_the_weight_of_a_voxel_is_how_far_its_target_is_from_one_half(y: float) -> None:
    weight = math.exp(-float(uncertainty_of(torch.tensor([y], dtype=torch.float64))))
    assert weight == pytest.approx(max(0.02, abs(2 * y - 1)), rel=1e-6)


def test_sources_that_agree_give_a_sharp_target_and_little_uncertainty() -> None:
    label = _label(TWO)
    assert _words(label) == [None]
    assert torch.allclose(label.target, sharpened(_ball(), 2.0))
    assert float(label.target.max()) > 0.99
    assert torch.equal(label.uncertainty, uncertainty_of(label.target))
    assert float(_label(TWO, "pseudo_labels.sources.sharpness=1.0").target.max()) == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("sources", "changes", "word"),
    [
        ([Says(torch.zeros(1, *SHAPE))], (), "empty"),
        ([], (), "empty"),
        ([Says(_ball())], (), "uncorroborated"),
        (TWO, ("pseudo_labels.gates.minimum_volume_ml=2.0",), "too-small"),
        (TWO, ("pseudo_labels.gates.maximum_volume_ml=0.5",), "too-large"),
        (TWO, ("pseudo_labels.gates.minimum_confidence=0.999",), "low-confidence"),
    ],
)
def test_a_gate_refuses_with_its_own_word_and_nothing_is_taught(
    sources: Sequence[Source], changes: tuple[str, ...], word: str
) -> None:
    label = _label(sources, *changes)
    assert _words(label) == [word]
    assert not bool(label.valid.any())
    assert float(label.target.abs().sum() + label.uncertainty.abs().sum()) == 0


def test_sources_that_overlap_too_little_are_refused() -> None:
    sources = (*TWO, Says(_ball(2), SourceName.PROTOTYPES))
    gate = "pseudo_labels.gates.minimum_agreement"
    assert _words(_label(sources, f"{gate}=0.5")) == [None]
    assert _words(_label(sources, f"{gate}=0.95")) == ["disagreement"]


def test_an_implausible_volume_is_refused() -> None:
    small = Calibration({}, ((0.01,),))
    label = _label(TWO, "pseudo_labels.gates.volume_factor=2.0", calibration=small)
    assert _words(label) == ["implausible-volume"]


class _Asked(PromptedGeneralists):
    """Notes what it is prompted with and answers the same."""

    def __init__(self) -> None:
        self.prompts: list[Tensor] = []

    def ask(
        self, scan: SourceScan, foreground: Tensor, trust: Mapping[str, float] | None = None
    ) -> tuple[Evidence, tuple[Refusal | None, ...]]:
        self.prompts.append(foreground)
        return Evidence.of(foreground), (None,) * scan.classes


def _sized(
    *changes: str, volumes_ml: Sequence[float | None] = (1.0,), specialist: int | None = None
) -> tuple[PseudoLabel, Tensor]:
    """Return the pseudo-label and the prompts of sources that find 100 voxels of 8 mm^3, the specialist so many."""
    plan = tiny_plan("pseudo_labels.method=evidence", "pseudo_labels.gates.minimum_volume_ml=0.0", *changes)
    asked, graded = _Asked(), _ball(high=0.8) - 0.05 * torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    sources = [Says(graded, SourceName.PROTOTYPES), Says(graded, SourceName.REGISTRATION)]
    if specialist is not None:
        threshold = graded.flatten().topk(specialist + 1).values[-1]
        sources.append(Says(torch.where(graded > threshold, 0.9, 0.4)))
    return EvidenceLabeler(sources, asked, plan, volumes_ml=volumes_ml).label(_scan()).label, asked.prompts[0]


def test_prompts_and_target_have_the_volume_of_the_labels() -> None:
    label, prompts = _sized("pseudo_labels.sources.volume_tolerance=1.25", volumes_ml=(0.4,))
    assert int((prompts > 0.5).sum()) == 62  # 0.4 ml * 1.25 in voxels of 0.008 ml
    assert int((label.target > 0.5).sum()) == 62


@pytest.mark.parametrize("found", [40, 80])
def test_where_no_volume_is_known_it_is_what_the_specialist_finds_in_the_scan(found: int) -> None:
    label, prompts = _sized(volumes_ml=(None,), specialist=found)
    assert int((prompts > 0.5).sum()) == int((label.target > 0.5).sum()) == found


def test_a_specialist_that_finds_nothing_says_nothing_of_the_volume() -> None:
    label, prompts = _sized(volumes_ml=(None,), specialist=0)
    assert int((prompts > 0.5).sum()) == int((label.target > 0.5).sum()) == 100


@pytest.mark.parametrize("connected", [True, False])
def test_islands_of_a_structure_in_one_piece_teach_nothing(connected: bool) -> None:
    maps = _ball()
    maps[0, 10:, 10:, 6:] = 0.95
    classes = f"task.classes=[{{name: ball, value: 1, connected: {str(connected).lower()}}}]"
    label = _label((Says(maps), Says(maps, SourceName.REGISTRATION)), classes)
    assert _words(label) == [None]
    island = label.target[0, 10:, 10:, 6:], label.uncertainty[0, 10:, 10:, 6:]
    assert bool((island[0] > 0.5).all()) is not connected
    assert bool(((-island[1]).exp() < 0.05).all()) is connected
    assert torch.equal(label.target[0, :9], _label(TWO, classes).target[0, :9])


@pytest.mark.parametrize(
    ("changes", "volumes_ml"),
    [(("pseudo_labels.sources.volume_tolerance=null",), (0.4,)), ((), (None,)), ((), ()), ((), (0.7,))],
    ids=["switched off", "unknown", "not given", "plausible"],
)
def test_otherwise_the_volume_is_that_of_the_sources(
    changes: tuple[str, ...], volumes_ml: Sequence[float | None]
) -> None:
    label, prompts = _sized(*changes, volumes_ml=volumes_ml)
    assert int((prompts > 0.5).sum()) == int((label.target > 0.5).sum()) == 100


def test_a_source_that_fails_is_left_out_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    broken = Says(_ball(), SourceName.PROTOTYPES, error=RuntimeError("out of memory"))
    assert torch.equal(_label((*TWO, broken)).target, _label(TWO).target)
    assert "prototypes failed on a scan" in caplog.text


def test_sources_are_scored_on_scans_that_they_have_not_learned_from() -> None:
    scans = [_scan(0), _scan(1)]
    keys = tuple(scan.key for scan in scans)
    truth = (_ball()[0] > 0.5).long()
    good, bad = Says(_ball(), SourceName.REGISTRATION, keys), Says(_ball(2), SourceName.PROTOTYPES, keys)
    scores = reliability_of([good, bad, Says(_ball())], [(scan, truth) for scan in scans], [1])
    assert set(scores) == {SourceName.REGISTRATION, SourceName.PROTOTYPES}  # the specialist cannot unlearn a scan
    assert float(scores[SourceName.REGISTRATION]) == 1
    assert float(scores[SourceName.PROTOTYPES]) == pytest.approx(dice_of(_ball(2)[0] > 0.5, truth == 1))
    assert good.left_out == list(keys)


def test_with_a_single_labeled_scan_nothing_is_scored() -> None:
    scan, truth = _scan(0), (_ball()[0] > 0.5).long()
    assert reliability_of([Says(_ball(), SourceName.REGISTRATION, (scan.key,))], [(scan, truth)], [1]) == {}


class _Labels:
    """Stands for `ColdStarter`: what it finds in any scan is the mean of the labels that it learned from."""

    def learn(self, examples: Sequence[tuple[Tensor, Tensor]], scratch: Scratch) -> list[tuple[Tensor, Tensor]]:
        return list(examples)

    def rough(self, image: Tensor, learned: list[tuple[Tensor, Tensor]], scratch: Scratch) -> Tensor:
        return torch.stack([torch.zeros(SHAPE), torch.stack([label for _, label in learned]).float().mean(0)])


def test_prototypes_leave_out_the_scan_that_they_are_scored_on() -> None:
    scans = [_scan(0), _scan(1)]
    one, other = ((_ball(shift)[0] > 0.5).long() for shift in (0, 4))
    known = [
        LabeledScan(scan_key(scan.image), scan.image, label) for scan, label in zip(scans, (one, other), strict=True)
    ]
    rest = PrototypeSource(_Labels(), known).without(scans[0].key)  # type: ignore[arg-type]
    assert rest is not None
    assert torch.equal(rest.look(scans[0]).foreground[0], other.float())
    assert rest.without(scans[1].key) is None
