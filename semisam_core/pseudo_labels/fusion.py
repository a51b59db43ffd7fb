"""Prompts to generalists to pseudo-labels: fused over prompt sets and models, with a map of uncertainty, gated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from semisam_core.evaluation import dice_of
from semisam_core.generalists.base import Generalist
from semisam_core.generalists.embedding_store import EmbeddingStore
from semisam_core.plan import Plan
from semisam_core.plan_sections.pseudo_labels import PseudoLabels
from semisam_core.progress import ProgressCallback
from semisam_core.prompting import Refusal, Region, find_region, meaningful_components, volume_refusal
from semisam_core.pseudo_labels.ensemble import GeneralistEnsemble, GeneralistOutput, weighted_moments


@dataclass(frozen=True)
class PseudoLabel:
    """What the generalists say of one scan.

    Attributes:
        target: y, foreground probability of each class (K, H, W, D) in [0, 1]; 0 where nothing was accepted.
        uncertainty: U >= 0, same shape.
        valid: (K,) bool, the classes that were accepted.
        refusals: for each class, why it was refused, or None.
        generalist: the generalists' own probability before it was fused with the teacher, (K, H, W, D).
    """

    target: Tensor
    uncertainty: Tensor
    valid: Tensor
    refusals: tuple[Refusal | None, ...]
    generalist: Tensor

    def moved(self, move: Callable[[Tensor], Tensor]) -> PseudoLabel:
        """Return this pseudo-label with its maps brought to another grid."""
        target, uncertainty, generalist = (move(each) for each in (self.target, self.uncertainty, self.generalist))
        return replace(self, target=target, uncertainty=uncertainty, generalist=generalist)

    def confidences(self) -> list[float]:
        """Return the confidence in each accepted class."""
        accepted = [k for k, accepted in enumerate(self.valid.tolist()) if accepted]
        return [confidence(self.target[k], self.uncertainty[k]) for k in accepted]


@dataclass(frozen=True)
class Calibration:
    """What the site's labeled scans teach of its generalists and targets; empty at a site without any.

    Attributes:
        trust: generalist -> weight in the mean over models; one without counts 1.
        volumes_ml: for each class, the volumes of its expert masks.
    """

    trust: Mapping[str, float] = field(default_factory=dict)
    volumes_ml: tuple[tuple[float, ...], ...] = ()

    def volume_range_ml(self, k: int, factor: float) -> tuple[float, float] | None:
        """Return the plausible volumes of class k (from 0): those seen, widened by a factor; None where none was."""
        seen = self.volumes_ml[k] if k < len(self.volumes_ml) else ()
        return (min(seen) / factor, max(seen) * factor) if seen else None


@dataclass(frozen=True)
class _ClassAnswer:
    generalist: Tensor
    target: Tensor
    uncertainty: Tensor


def make_pseudo_label(
    image: Tensor,
    teacher: Tensor,
    generalists: Sequence[Generalist],
    store: EmbeddingStore,
    plan: Plan,
    calibration: Calibration | None = None,
    progress: ProgressCallback | None = None,
) -> PseudoLabel:
    """Ask the generalists for every class of one scan.

    Args:
        image: (C, H, W, D) on the plan's grid; generalists see the first channel.
        teacher: the teacher's probabilities (1 + K, H, W, D), background first. Only foreground channels prompt.
        generalists: the models available at this site, at least one.
        store: where embeddings are kept.
        plan: policy; must have `pseudo_labels`.
        calibration: what the site's labeled scans taught.
        progress: told how many embedding units of how many are there.
    """
    policy = policy_of(plan)
    calibration = calibration or Calibration()
    ensemble = GeneralistEnsemble(image[0], plan.data.spacing_mm, generalists, store, policy, progress)
    answers: list[_ClassAnswer | Refusal] = []
    for k in range(1, teacher.shape[0]):
        region = region_of_class(teacher, k, plan)
        if isinstance(region, Refusal):
            answers.append(region)
            continue
        outputs = ensemble.ask(region, teacher[k])
        answers.append(_judge(outputs, region, teacher[k], plan, policy, calibration, k - 1))
    return _assemble(answers, teacher.shape[1:])


def policy_of(plan: Plan) -> PseudoLabels:
    """Return the plan's pseudo-label section.

    Raises:
        ValueError: it has none.
    """
    if plan.pseudo_labels is None:
        raise ValueError("the plan has no pseudo_labels section")
    return plan.pseudo_labels


def region_of_class(teacher: Tensor, k: int, plan: Plan) -> Region | Refusal:
    """Return what of class k (from 1) the generalists are prompted with; `teacher` is (1 + K, H, W, D)."""
    policy = policy_of(plan)
    others = (torch.cat([teacher[1:k], teacher[k + 1 :]]) > policy.prompting.threshold).any(0)
    return find_region(teacher[k], plan.data.spacing_mm, policy.prompting, policy.gates, others)


def confidence_fused(
    teacher: Tensor, mean: Tensor, variance: Tensor, agreement: float, policy: PseudoLabels
) -> tuple[Tensor, Tensor]:
    """Fuse what the generalists say with the teacher into a target y and an uncertainty U.

    y = share * generalists + (1 - share) * teacher. The less the two agree, the larger is the generalists' share: where
    a specialist is good, both agree and correct each other; where it is weak, its own output is worth less.

    Args:
        teacher: the teacher's foreground probability (H, W, D).
        mean: the generalists' (H, W, D), over models, planes and prompt sets.
        variance: its variance over them.
        agreement: Dice overlap of the generalists' mask and the prompted region.
        policy: weights of U, and whether the target is the generalists' or fused with the teacher's.

    Returns:
        (y, U), each (H, W, D).
    """
    weights = policy.uncertainty
    uncertainty = weights.prompts * variance + weights.specialist * (teacher - mean) ** 2
    if policy.target == "generalist":
        return mean, uncertainty
    share = min(1.0, policy.generalist_share + policy.share_gain * (1 - agreement))
    return share * mean + (1 - share) * teacher, uncertainty


def confidence(target: Tensor, uncertainty: Tensor) -> float:
    """Return the mean of exp(-U) over the voxels that a target calls foreground; maps of one class, (H, W, D).

    A target that calls none so vouches for nothing: the confidence in it is 0.
    """
    inside = torch.exp(-uncertainty.double())[target > 0.5]
    return min(1.0, float(inside.mean())) if inside.numel() else 0.0


def _judge(
    outputs: Mapping[str, GeneralistOutput],
    region: Region,
    teacher: Tensor,
    plan: Plan,
    policy: PseudoLabels,
    calibration: Calibration,
    k: int,
) -> _ClassAnswer | Refusal:
    if not outputs:
        return Refusal.FAILED
    gates = policy.gates
    if gates.minimum_quality > 0 and _mean_quality(outputs, calibration.trust) < gates.minimum_quality:
        return Refusal.LOW_QUALITY
    mean, variance = weighted_moments(outputs, calibration.trust)
    answered = (mean > 0.5).numpy()
    kept = meaningful_components(answered, policy.prompting.component_share) if answered.any() else answered
    # Islands of an answer are dropped in 3D, where a slice-wise model cannot see that they hang on nothing.
    mean = torch.where(torch.from_numpy(answered & ~kept), mean.clamp_max(0.49), mean)
    if refusal := volume_refusal(float(kept.sum()), plan.data.spacing_mm, gates):
        return refusal
    if gates.volume_factor is not None and (seen := calibration.volume_range_ml(k, gates.volume_factor)):
        millilitres = float(kept.sum()) * math.prod(plan.data.spacing_mm) / 1000
        if not seen[0] <= millilitres <= seen[1]:
            return Refusal.IMPLAUSIBLE
    agreement = dice_of(torch.from_numpy(kept), torch.from_numpy(region.mask))
    if agreement < gates.minimum_agreement:
        return Refusal.DISAGREEMENT
    target, uncertainty = confidence_fused(teacher, mean, variance, agreement, policy)
    if gates.minimum_confidence > 0 and confidence(target, uncertainty) < gates.minimum_confidence:
        return Refusal.LOW_CONFIDENCE
    return _ClassAnswer(mean, target, uncertainty)


def _mean_quality(outputs: Mapping[str, GeneralistOutput], trust: Mapping[str, float]) -> float:
    weights = {name: trust.get(name, 1.0) for name in outputs}
    return sum(weights[name] * each.quality for name, each in outputs.items()) / sum(weights.values())


def _assemble(answers: Sequence[_ClassAnswer | Refusal], shape: torch.Size) -> PseudoLabel:
    blank = torch.zeros(shape)

    def stack(pick: Callable[[_ClassAnswer], Tensor]) -> Tensor:
        return torch.stack([blank if isinstance(a, Refusal) else pick(a) for a in answers])

    target, generalist = stack(lambda a: a.target), stack(lambda a: a.generalist)
    if len(answers) > 1:
        target, generalist = settle_overlaps(target), settle_overlaps(generalist)
    return PseudoLabel(
        target=target,
        uncertainty=stack(lambda a: a.uncertainty),
        valid=torch.tensor([not isinstance(a, Refusal) for a in answers]),
        refusals=tuple(a if isinstance(a, Refusal) else None for a in answers),
        generalist=generalist,
    )


def settle_overlaps(probability: Tensor) -> Tensor:
    """Where several classes (K, H, W, D) exceed 0.5, keep the highest and cap the others just below 0.5."""
    winner = probability.argmax(0, keepdim=True)
    wins = torch.zeros_like(probability, dtype=torch.bool).scatter_(0, winner, True)
    contested = (probability > 0.5).sum(0, keepdim=True) > 1
    return torch.where(contested & ~wins, probability.clamp_max(0.49), probability)
