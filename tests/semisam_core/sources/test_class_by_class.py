"""Pseudo-labels made class by class on disk are those that are made of all classes at once in memory, bit by bit.

The oracles below are the formulas of both methods as they are written down: on (K, H, W, D) tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from semisam_core import scratch as scratch_module
from semisam_core.components import largest_component, meaningful_components
from semisam_core.evaluation import dice_of
from semisam_core.generalists import EmbeddingStore
from semisam_core.plan import Plan
from semisam_core.prompting import Refusal, Region, depth, find_region
from semisam_core.pseudo_labels import views
from semisam_core.pseudo_labels.ensemble import GeneralistEnsemble, GeneralistOutput
from semisam_core.pseudo_labels.fusion import PseudoLabel, fuse_with_teacher, make_pseudo_label
from semisam_core.pseudo_labels.policy import policy_of
from semisam_core.pseudo_labels.store import PseudoLabelStore
from semisam_core.scratch import Scratch
from semisam_core.sources.base import Evidence, SourceName, SourceScan
from semisam_core.sources.combine import AGREEMENT_FLOOR
from semisam_core.sources.generalists import PromptedGeneralists
from semisam_core.sources.labeling import EvidenceLabeler, sharpened, uncertainty_of
from semisam_core.sources.volume import REACH
from tests.conftest import tiny_plan
from tests.semisam_core.generalists.fake import FakeGeneralist

SHAPE = (15, 13, 9)  # no multiple of what a CPU computes at once
NAMES = (SourceName.SPECIALIST, SourceName.FEATURE_HEAD, SourceName.REGISTRATION)


@dataclass
class _Says:
    """A source that says the same of every scan."""

    foreground: Tensor
    name: SourceName

    def look(self, scan: SourceScan) -> Evidence:
        return Evidence.of(scan.scratch.keep(self.foreground), scan.scratch)

    def without(self, key: str) -> None:
        return


def _maps(seed: int, classes: int) -> Tensor:
    """Return smooth probabilities of classes that overlap, (1 + K, H, W, D), background first."""
    noise = torch.randn((1 + classes, *SHAPE), generator=torch.Generator().manual_seed(seed))
    smooth = torch.from_numpy(ndimage.gaussian_filter(noise.numpy(), (0, 2, 2, 2)))
    return torch.sigmoid(12 * smooth / smooth.std() / 4)


def _plan(classes: int, method: str, *changes: str) -> Plan:
    named = ", ".join(
        f"{{name: c{k}, value: {k}, connected: {str(k % 2 == 1).lower()}}}" for k in range(1, 1 + classes)
    )
    gates = ("minimum_volume_ml=0.0", "minimum_agreement=0.2", "minimum_confidence=0.1")
    return tiny_plan(
        f"task.classes=[{named}]",
        f"pseudo_labels.method={method}",
        *(f"pseudo_labels.gates.{gate}" for gate in gates),
        *changes,
    )


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (scratch_module, views, depth):
            patch.setattr(module, "BLOCK", 256)
        yield


def _soft_dice(one: Tensor, other: Tensor) -> float:
    size = float((one.double() ** 2).sum() + (other.double() ** 2).sum())
    return 2 * float((one.double() * other.double()).sum()) / size if size > 1e-6 else 0.0


def _at_plausible_volume(probability: Tensor, expected: float | None, tolerance: float) -> Tensor:
    found = int((probability > 0.5).sum())
    if expected is None or expected < 1:
        return probability
    wanted = round(min(max(found, expected / tolerance), expected * tolerance, probability.numel() - 1))
    if wanted == found:
        return probability
    threshold = probability.flatten().topk(wanted + 1).values[-2:].mean().clamp(REACH, 1 - REACH)
    return torch.sigmoid(probability.clamp(1e-6, 1 - 1e-6).logit() - threshold.logit())


def _one_piece(probability: Tensor) -> Tensor:
    mask = (probability > 0.5).numpy()
    island = torch.from_numpy(mask & ~largest_component(mask))
    return torch.where(island, probability.clamp_max(0.49), probability)


def _without_islands(probability: Tensor, share: float) -> Tensor:
    mask = (probability > 0.5).numpy()
    island = torch.from_numpy(mask & ~meaningful_components(mask, share))
    return torch.where(island, probability.clamp_max(0.49), probability)


def _moments(outputs: Mapping[str, GeneralistOutput]) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance over all maps of models that count alike."""
    maps = torch.cat([torch.stack(list(each.maps)) for each in outputs.values()])
    shares = torch.cat([torch.full((len(each.maps),), 1.0 / len(each.maps)) for each in outputs.values()])
    shares = (shares / shares.sum())[:, None, None, None]
    mean = (shares * maps).sum(0)
    return mean, (shares * (maps - mean) ** 2).sum(0)


def _confidence(target: Tensor, uncertainty: Tensor) -> float:
    inside = torch.exp(-uncertainty.double())[target > 0.5]
    return min(1.0, float(inside.mean())) if inside.numel() else 0.0


def _settled(probability: Tensor) -> Tensor:
    winner = probability.argmax(0, keepdim=True)
    wins = torch.zeros_like(probability, dtype=torch.bool).scatter_(0, winner, True)
    contested = (probability > 0.5).sum(0, keepdim=True) > 1
    return torch.where(contested & ~wins, probability.clamp_max(0.49), probability)


def _combined(evidence: Mapping[str, Evidence], plan: Plan, voxels: Sequence[float | None]) -> tuple[Tensor, Tensor]:
    """Return the combination of all sources (K, H, W, D) and their agreement (K,)."""
    maps = torch.stack([each.foreground for each in evidence.values()])  # (S, K, H, W, D)
    answered = torch.stack([each.answered for each in evidence.values()])
    trust = torch.ones(maps.shape[:2]) * answered
    agreement = torch.ones_like(trust)
    for k in range(maps.shape[1]):
        for s in torch.nonzero(answered[:, k])[:, 0].tolist():
            others = trust[:, k].clone()
            others[s] = 0
            if float(others.sum()) > 0:
                mean = (others[:, None, None, None] * maps[:, k]).sum(0) / others.sum()
                agreement[s, k] = _soft_dice(maps[s, k], mean)
    weights = trust * (AGREEMENT_FLOOR + (1 - AGREEMENT_FLOOR) * agreement)
    shares = weights / weights.sum(0).clamp_min(1e-6)
    mean = (shares[:, :, None, None, None] * maps).sum(0)
    tolerance = policy_of(plan).sources.volume_tolerance
    if tolerance is not None:
        specialist = evidence[SourceName.SPECIALIST].foreground
        mean = torch.stack(
            [
                _at_plausible_volume(p, float((s > 0.5).sum()), 1.0)
                if v is None
                else _at_plausible_volume(p, v, tolerance)
                for p, v, s in zip(mean, voxels, specialist, strict=True)
            ]
        )
    pieces = [_one_piece(p) if target.connected else p for p, target in zip(mean, plan.task.classes, strict=True)]
    return torch.stack(pieces), (shares * agreement).sum(0)


def _prompts(probability: Tensor, k: int, plan: Plan) -> object:
    policy = policy_of(plan)
    others = (torch.cat([probability[1:k], probability[k + 1 :]]) > policy.prompting.threshold).any(0)
    connected = plan.task.classes[k - 1].connected
    return find_region(probability[k], plan.data.spacing_mm, policy.prompting, policy.gates, others, connected)


def _asked(scan: SourceScan, foreground: Tensor, plan: Plan, store: EmbeddingStore) -> tuple[Evidence, list[object]]:
    policy = policy_of(plan)
    ensemble = GeneralistEnsemble(scan.image[0], scan.spacing_mm, [FakeGeneralist()], store, policy)
    prediction, found, refusals = torch.cat([foreground[:1], foreground]), torch.zeros_like(foreground), []
    for k in range(1, len(prediction)):
        region = _prompts(prediction, k, plan)
        refusals.append(region if isinstance(region, Refusal) else None)
        if not isinstance(region, Refusal):
            outputs = ensemble.ask(region, prediction[k])  # type: ignore[arg-type]
            found[k - 1] = _without_islands(_moments(outputs)[0], policy.prompting.component_share)
    return Evidence(found, (found > 0.5).flatten(1).any(1)), refusals


def _by_evidence(
    sources: Sequence[_Says], scan: SourceScan, plan: Plan, voxels: Sequence[float | None], store: EmbeddingStore
) -> PseudoLabel:
    evidence = {each.name: Evidence(each.foreground, (each.foreground > 0.5).flatten(1).any(1)) for each in sources}
    combined, _ = _combined(evidence, plan, voxels)
    evidence[SourceName.GENERALISTS], unprompted = _asked(scan, combined, plan, store)
    combined, agreement = _combined(evidence, plan, voxels)
    count = torch.stack([each.answered for each in evidence.values()]).sum(0)
    sharp = sharpened(combined, policy_of(plan).sources.sharpness)
    uncertainty, gates, refusals = uncertainty_of(sharp), policy_of(plan).gates, []
    for k in range(len(sharp)):
        word: object = None
        if not bool((sharp[k] > 0.5).any()) or not int(count[k]):
            word = Refusal.EMPTY
        elif int(count[k]) < 2:
            word = unprompted[k] or Refusal.UNCORROBORATED
        elif float(agreement[k]) < gates.minimum_agreement:
            word = Refusal.DISAGREEMENT
        elif _confidence(sharp[k], uncertainty[k]) < gates.minimum_confidence:
            word = Refusal.LOW_CONFIDENCE
        refusals.append(word)
    valid = torch.tensor([word is None for word in refusals])
    keep = valid[:, None, None, None]
    target, own = (torch.where(keep, each, 0.0) for each in (sharp, evidence[SourceName.GENERALISTS].foreground))
    if len(sharp) > 1:
        target, own = _settled(target), _settled(own)
    return PseudoLabel(target, torch.where(keep, uncertainty, 0.0), valid, tuple(refusals), own)  # type: ignore[arg-type]


def _fused(outputs: Mapping[str, GeneralistOutput], region: Region, teacher: Tensor, plan: Plan) -> object:
    policy = policy_of(plan)
    mean, variance = _moments(outputs)
    mean = _without_islands(mean, policy.prompting.component_share)
    agreement = dice_of(mean > 0.5, torch.from_numpy(region.mask))
    if agreement < policy.gates.minimum_agreement:
        return Refusal.DISAGREEMENT
    target, uncertainty = fuse_with_teacher(teacher, mean, variance, agreement, policy)
    if _confidence(target, uncertainty) < policy.gates.minimum_confidence:
        return Refusal.LOW_CONFIDENCE
    return SimpleNamespace(target=target, uncertainty=uncertainty, generalist=mean)


def _by_prompts(scan: SourceScan, plan: Plan, store: EmbeddingStore) -> PseudoLabel:
    ensemble = GeneralistEnsemble(scan.image[0], scan.spacing_mm, [FakeGeneralist()], store, policy_of(plan))
    found: list[object] = []
    for k in range(1, len(scan.teacher)):
        region = _prompts(scan.teacher, k, plan)
        if not isinstance(region, Refusal):
            region = _fused(ensemble.ask(region, scan.teacher[k]), region, scan.teacher[k], plan)  # type: ignore[arg-type]
        found.append(region)

    def stack(name: str) -> Tensor:
        return torch.stack([torch.zeros(SHAPE) if isinstance(f, Refusal) else getattr(f, name) for f in found])

    target, own = stack("target"), stack("generalist")
    if len(found) > 1:
        target, own = _settled(target), _settled(own)
    refusals = tuple(each if isinstance(each, Refusal) else None for each in found)
    valid = torch.tensor([each is None for each in refusals])
    return PseudoLabel(target, stack("uncertainty"), valid, refusals, own)


def _same(one: PseudoLabel, other: PseudoLabel) -> None:
    assert one.refusals == other.refusals
    for name in ("target", "uncertainty", "generalist", "valid"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def _scan(seed: int, classes: int, scratch: Scratch) -> SourceScan:
    image = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(seed))
    return SourceScan(image, (2.0, 2.0, 2.0), classes, scratch.keep(_maps(seed, classes)), scratch)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 999),
    classes=st.integers(1, 6),
    number=st.integers(1, 3),
    tolerance=st.sampled_from(["null", 1.25]),
)
def test_evidence(
    seed: int, classes: int, number: int, tolerance: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("site")
    plan = _plan(classes, "evidence", f"pseudo_labels.sources.volume_tolerance={tolerance}")
    store, scan = EmbeddingStore(folder / "embeddings", 10**9), _scan(seed, classes, Scratch(folder))
    sources = [_Says(_maps(seed + 1000 * s, classes)[1:], name) for s, name in enumerate(NAMES[:number])]
    sources[-1].foreground[-1] = 0.1  # has nothing to say of the last class
    volumes = [None if k % 3 == 2 else 1.0 + k for k in range(classes)]
    asked = PromptedGeneralists([FakeGeneralist()], store, plan)
    label = EvidenceLabeler(sources, asked, plan, volumes_ml=volumes).label(scan).label
    voxels = [None if each is None else each / 0.008 for each in volumes]
    _same(label, _by_evidence(sources, scan, plan, voxels, store))
    in_memory = SourceScan(scan.image, scan.spacing_mm, classes, scan.teacher)
    _same(EvidenceLabeler(sources, asked, plan, volumes_ml=volumes).label(in_memory).label, label)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), classes=st.integers(1, 6))
def test_prompts_of_the_teacher(seed: int, classes: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, plan = tmp_path_factory.mktemp("site"), _plan(classes, "semisam+")
    store, scan = EmbeddingStore(folder / "embeddings", 10**9), _scan(seed, classes, Scratch(folder))
    found = make_pseudo_label(scan.image, scan.teacher, [FakeGeneralist()], store, plan, scratch=scan.scratch)
    expected = _by_prompts(scan, plan, store)
    _same(found, expected)
    kept = PseudoLabelStore(folder / "labels")
    kept.save("disk", found)
    kept.save("memory", expected)
    paths = [folder / "labels" / f"{name}.safetensors" for name in ("disk", "memory")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_some_of_these_classes_are_accepted_and_contested(tmp_path: Path) -> None:
    """The comparisons above are not of refusals only."""
    plan, store = _plan(6, "semisam+"), EmbeddingStore(tmp_path / "embeddings", 10**9)
    scan = _scan(0, 6, Scratch(tmp_path))
    label = make_pseudo_label(scan.image, scan.teacher, [FakeGeneralist()], store, plan, scratch=scan.scratch)
    assert int(label.valid.sum()) >= 3
    assert bool((label.target == 0.49).any())
    assert int((label.target > 0.5).sum(0).max()) == 1
