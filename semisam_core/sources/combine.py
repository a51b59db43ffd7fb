"""Several sources' evidence to one probability and one map of uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semisam_core.scratch import Scratch
from semisam_core.sources.base import Evidence

AGREEMENT_FLOOR = 0.1  # weight of a source that agrees with none of the others, against one that agrees fully
_EMPTY = 1e-6


@dataclass(frozen=True, eq=False)
class CombinedEvidence:
    """What all sources together say of one scan.

    Attributes:
        foreground: probability of each class (K, H, W, D).
        agreement: (K,) mean soft Dice of each source with the others, weighted as the sources are; 1 for a single one.
        sources: (K,) how many sources said anything of each class.
        weights: source -> (K,) its share, 0 where it said nothing.
    """

    foreground: Tensor
    agreement: Tensor
    sources: Tensor
    weights: Mapping[str, Tensor]


def combine_evidence(
    evidence: Mapping[str, Evidence],
    reliability: Mapping[str, Tensor] | None = None,
    scratch: Scratch | None = None,
) -> CombinedEvidence:
    """Return the weighted mean over sources, class by class.

    A source's weight is its reliability times (floor + (1 - floor) * its soft Dice with the mean of the others): a
    source that is alone in what it says of this scan counts little, whichever it is. With two sources both agree
    alike, so reliability alone decides.

    Args:
        evidence: source -> evidence, at least one, all of one shape.
        reliability: source -> (K,) score on labeled scans in [0, 1]; a source without one counts as much as the mean of
            those that have one.
        scratch: where the evidence is and the combination will be; None for memory.
    """
    scratch = scratch or Scratch()
    names = list(evidence)
    shape = evidence[names[0]].foreground.shape
    answered = torch.stack([evidence[name].answered for name in names])  # (S, K)
    trust = _trust(names, shape[0], reliability or {}) * answered

    def maps_of(k: int) -> list[Tensor]:
        return [evidence[name].foreground[k] for name in names]

    agreement, mean = torch.ones_like(trust), scratch.zeros(shape)
    for k in range(shape[0]):
        maps = maps_of(k)
        for s in torch.nonzero(answered[:, k])[:, 0].tolist():
            others = trust[:, k].clone()
            others[s] = 0
            if float(others.sum()) > 0:
                for place, *each in scratch.blocks(mean[k], *maps):
                    place.copy_(_weighted(each, others).div_(others.sum()))
                agreement[s, k] = soft_dice(maps[s], mean[k], scratch)
    weights = trust * (AGREEMENT_FLOOR + (1 - AGREEMENT_FLOOR) * agreement)
    shares = weights / weights.sum(0).clamp_min(_EMPTY)
    for k in range(shape[0]):
        for place, *each in scratch.blocks(mean[k], *maps_of(k)):
            place.copy_(_weighted(each, shares[:, k]))
    return CombinedEvidence(
        foreground=mean,
        agreement=(shares * agreement).sum(0),
        sources=answered.sum(0),
        weights={name: shares[s] for s, name in enumerate(names)},
    )


def soft_dice(one: Tensor, other: Tensor, scratch: Scratch | None = None) -> float:
    """Return 2 sum(p q) / sum(p^2 + q^2) of two probability maps; 0 where both are empty.

    They are in `scratch`, if not in memory. Products are summed all at once: sums of blocks would round otherwise.
    """
    products = torch.empty(one.numel(), dtype=torch.float64)

    def total(first: Tensor, second: Tensor) -> float:
        for place, p, q in (scratch or Scratch()).blocks(products, first, second):
            place.copy_(p).mul_(q)
        return float(products.sum())

    size = total(one, one) + total(other, other)
    return 2 * total(one, other) / size if size > _EMPTY else 0.0


def _trust(names: list[str], classes: int, reliability: Mapping[str, Tensor]) -> Tensor:
    known = [reliability[name] for name in names if name in reliability]
    usual = torch.stack(known).mean(0) if known else torch.ones(classes)
    return torch.stack([reliability.get(name, usual) for name in names]).clamp_min(0.01)


def _weighted(maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    total = torch.zeros_like(maps[0])
    for each, weight in zip(maps, weights, strict=True):
        total += weight * each
    return total
