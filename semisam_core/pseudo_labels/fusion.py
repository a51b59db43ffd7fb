"""From generalists' answers to a pseudo-label: fused over models, planes and prompt sets, with a map of uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from semisam_core.components import Mask, meaningful_components
from semisam_core.evaluation import dice_of
from semisam_core.generalists.base import Generalist
from semisam_core.generalists.embedding_store import EmbeddingStore
from semisam_core.plan import Plan
from semisam_core.plan_sections.pseudo_labels import PseudoLabels
from semisam_core.progress import ProgressCallback
from semisam_core.prompting import Refusal, Region, volume_refusal
from semisam_core.pseudo_labels.calibration import Calibration
from semisam_core.pseudo_labels.ensemble import GeneralistEnsemble, GeneralistOutput, weighted_moments
from semisam_core.pseudo_labels.policy import claims_of, policy_of, region_of_class
from semisam_core.scratch import Scratch

UNDECIDED = 0.49


@dataclass(frozen=True)
class PseudoLabel:
    """The pseudo-label of one scan.

    Attributes:
        target: y, foreground probability of each class (K, H, W, D) in [0, 1]; 0 for a class that was refused.
        uncertainty: U >= 0, same shape.
        valid: (K,) bool, the classes that were accepted.
        refusals: for each class, why it was refused, or None.
        generalist: the generalists' probability before fusion with the teacher, (K, H, W, D).
        scratch: where the maps are.
    """

    target: Tensor
    uncertainty: Tensor
    valid: Tensor
    refusals: tuple[Refusal | None, ...]
    generalist: Tensor
    scratch: Scratch = field(default_factory=Scratch)

    def moved(self, move: Callable[[Tensor], Tensor]) -> PseudoLabel:
        """Return this pseudo-label with `move` applied to each of its maps, to bring them to another grid."""
        target, uncertainty, generalist = (move(each) for each in (self.target, self.uncertainty, self.generalist))
        return replace(self, target=target, uncertainty=uncertainty, generalist=generalist)

    def confidences(self) -> list[float]:
        """Return the confidence in each accepted class."""
        found = []
        for k, accepted in enumerate(self.valid.tolist()):
            if accepted:
                found.append(confidence(self.target[k], self.uncertainty[k], self.scratch))
        return found


@dataclass(frozen=True)
class _ClassLabel:
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
    scratch: Scratch | None = None,
) -> PseudoLabel:
    """Prompt the generalists for every class of one scan and fuse what they answer.

    Args:
        image: (C, H, W, D) on the plan's grid; generalists see the first channel.
        teacher: the teacher's probabilities (1 + K, H, W, D), background first. Only foreground channels prompt.
        generalists: the models available at this site, at least one.
        store: cache of embeddings.
        plan: policy; must have `pseudo_labels`.
        calibration: what the site's labeled scans taught.
        progress: called with (embedding units ready, units needed).
        scratch: where the teacher's probabilities are and the pseudo-label will be; None for memory.
    """
    calibration, scratch = calibration or Calibration(), scratch or Scratch()
    ensemble = GeneralistEnsemble(
        image[0], plan.data.spacing_mm, generalists, store, policy_of(plan), progress, scratch
    )
    claims = claims_of(teacher[1:], plan, scratch)
    target, uncertainty, own = (scratch.zeros(teacher[1:].shape) for _ in range(3))
    refusals: list[Refusal | None] = []
    for k in range(1, teacher.shape[0]):
        found: _ClassLabel | Refusal | Region = region_of_class(teacher[k], k, plan, claims, scratch)
        if isinstance(found, Region):
            outputs = ensemble.ask(found, teacher[k])
            found = _gate_and_fuse(outputs, found, teacher[k], plan, calibration, k, scratch)
            del outputs
        if isinstance(found, _ClassLabel):
            for place, made in ((target, found.target), (uncertainty, found.uncertainty), (own, found.generalist)):
                scratch.copy(place[k - 1], made)
        refusals.append(found if isinstance(found, Refusal) else None)
        del found
    if len(refusals) > 1:
        target, own = settle_overlaps(target, scratch), settle_overlaps(own, scratch)
    valid = torch.tensor([refusal is None for refusal in refusals])
    return PseudoLabel(target, uncertainty, valid, tuple(refusals), own, scratch)


def fuse_with_teacher(
    teacher: Tensor, mean: Tensor, variance: Tensor, agreement: float, policy: PseudoLabels
) -> tuple[Tensor, Tensor]:
    """Fuse the generalists' answer with the teacher's into a target y and an uncertainty U.

    y = share * generalists + (1 - share) * teacher. The less the two agree, the larger the generalists' share: a good
    specialist agrees with them and the two correct each other, a weak one deserves less weight.

    Args:
        teacher: the teacher's foreground probability (H, W, D).
        mean: the generalists' (H, W, D), over models, planes and prompt sets.
        variance: its variance over them.
        agreement: Dice overlap of the generalists' mask and the prompted region.
        policy: weights of U, and whether the target is the generalists' alone or fused.

    Returns:
        (y, U), each (H, W, D).
    """
    weights = policy.uncertainty
    uncertainty = weights.prompts * variance + weights.specialist * (teacher - mean) ** 2
    if policy.target == "generalist":
        return mean, uncertainty
    share = min(1.0, policy.generalist_share + policy.share_gain * (1 - agreement))
    return share * mean + (1 - share) * teacher, uncertainty


def confidence(target: Tensor, uncertainty: Tensor, scratch: Scratch | None = None) -> float:
    """Return the mean of exp(-U) over the foreground of a target, (H, W, D) each; 0 if it has no foreground.

    They are in `scratch`, if not in memory.
    """
    scratch, end = scratch or Scratch(), 0
    inside = torch.empty(sum([int((y > 0.5).sum()) for (y,) in scratch.blocks(target)]), dtype=torch.float64)
    for y, u in scratch.blocks(target, uncertainty):
        found = torch.exp(-u.double())[y > 0.5]
        inside[end : end + len(found)] = found
        end += len(found)
    return min(1.0, float(inside.mean())) if inside.numel() else 0.0


def _gate_and_fuse(
    outputs: Mapping[str, GeneralistOutput],
    region: Region,
    teacher: Tensor,
    plan: Plan,
    calibration: Calibration,
    k: int,
    scratch: Scratch | None = None,
) -> _ClassLabel | Refusal:
    """Turn the answers about class k (from 1) into its part of the pseudo-label; `teacher` is its channel (H, W, D)."""
    scratch = scratch or Scratch()
    if not outputs:
        return Refusal.FAILED
    policy = policy_of(plan)
    gates = policy.gates
    if gates.minimum_quality > 0 and _mean_quality(outputs, calibration.trust) < gates.minimum_quality:
        return Refusal.LOW_QUALITY
    mean, variance = weighted_moments(outputs, calibration.trust, scratch)
    kept = without_islands(mean, policy.prompting.component_share, scratch)
    if refusal := volume_refusal(float(kept.sum()), plan.data.spacing_mm, gates):
        return refusal
    if gates.volume_factor is not None and (plausible := calibration.volume_range_ml(k - 1, gates.volume_factor)):
        millilitres = float(kept.sum()) * math.prod(plan.data.spacing_mm) / 1000
        if not plausible[0] <= millilitres <= plausible[1]:
            return Refusal.IMPLAUSIBLE
    agreement = dice_of(torch.from_numpy(kept), torch.from_numpy(region.mask))
    if agreement < gates.minimum_agreement:
        return Refusal.DISAGREEMENT
    target, uncertainty = (scratch.zeros(mean.shape) for _ in range(2))
    for y, u, *each in scratch.blocks(target, uncertainty, teacher, mean, variance):
        fused, doubt = fuse_with_teacher(each[0], each[1], each[2], agreement, policy)
        y.copy_(fused)
        u.copy_(doubt)
    if gates.minimum_confidence > 0 and confidence(target, uncertainty, scratch) < gates.minimum_confidence:
        return Refusal.LOW_CONFIDENCE
    return _ClassLabel(mean, target, uncertainty)


def _mean_quality(outputs: Mapping[str, GeneralistOutput], trust: Mapping[str, float]) -> float:
    weights = {name: trust.get(name, 1.0) for name in outputs}
    return sum(weights[name] * each.quality for name, each in outputs.items()) / sum(weights.values())


def settle_overlaps(probability: Tensor, scratch: Scratch | None = None) -> Tensor:
    """Where several classes (K, H, W, D) exceed 0.5, keep the highest and cap the others just below 0.5, in place.

    Args:
        probability: of each class; of equally high ones the first counts.
        scratch: where it is, if not in memory.
    """
    for classes in (scratch or Scratch()).blocks(*probability):
        highest = torch.full_like(classes[0], -torch.inf)
        winner, claims = (torch.zeros_like(highest, dtype=torch.int16) for _ in range(2))
        for k, each in enumerate(classes):
            winner.masked_fill_(each > highest, k)
            torch.maximum(highest, each, out=highest)
            claims += each > 0.5
        contested = claims > 1
        for k, each in enumerate(classes if bool(contested.any()) else ()):
            lost = contested & (winner != k)
            each[lost] = each[lost].clamp_max(UNDECIDED)
    return probability


def without_islands(probability: Tensor, share: float, scratch: Scratch | None = None) -> Mask:
    """Cap islands just below 0.5, in place: a slice-wise model cannot see that they are attached to nothing in 3D.

    Args:
        probability: (H, W, D).
        share: see `meaningful_components`.
        scratch: where it is, if not in memory.

    Returns:
        What is still above 0.5.
    """
    return cap_all_but(probability, partial(meaningful_components, share=share), scratch)


def cap_all_but(probability: Tensor, choose: Callable[[Mask], Mask], scratch: Scratch | None = None) -> Mask:
    """Cap just below 0.5, in place, what of a foreground is not chosen.

    Args:
        probability: (H, W, D).
        choose: returns the part of a mask to leave as it is.
        scratch: where the probability is, if not in memory.

    Returns:
        That part.
    """
    scratch = scratch or Scratch()
    foreground = scratch.above(probability, 0.5)
    kept = choose(foreground.numpy())
    for each, inside, stays in scratch.blocks(probability, foreground, torch.from_numpy(kept)):
        each.copy_(torch.where(inside & ~stays, each.clamp_max(UNDECIDED), each))
    return kept
