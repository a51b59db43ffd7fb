"""Prompts to generalists to pseudo-labels: fused over prompt sets and models, with a map of uncertainty, gated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from scipy import ndimage
from torch import Tensor

from semisam_core.evaluation import dice_of
from semisam_core.files import save_tensors
from semisam_core.generalists.base import Generalist, VolumeGrid
from semisam_core.generalists.embedding_store import EmbeddingStore
from semisam_core.plan import Plan, PseudoLabels
from semisam_core.prompting import PromptSets, Refusal, make_prompts

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


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


@dataclass(frozen=True)
class _ClassAnswer:
    generalist: Tensor
    target: Tensor
    uncertainty: Tensor


def make_pseudo_label(
    image: Tensor,
    teacher: Tensor,
    scan_key: str,
    generalists: Sequence[Generalist],
    store: EmbeddingStore,
    plan: Plan,
    progress: Progress | None = None,
) -> PseudoLabel:
    """Ask the generalists for every class of one scan.

    Args:
        image: (C, H, W, D) on the plan's grid; generalists see the first channel.
        teacher: the teacher's probabilities (1 + K, H, W, D), background first. Only foreground channels prompt.
        scan_key: content key of the scan, for stored embeddings.
        generalists: the models available at this site, at least one.
        store: where embeddings are kept.
        plan: policy; must have `pseudo_labels`.
        progress: told how many embedding units of how many are there.
    """
    policy = plan.pseudo_labels
    if policy is None:
        raise ValueError("the plan has no pseudo_labels section")
    volume = image[0]
    answers: list[_ClassAnswer | Refusal] = []
    for k in range(1, teacher.shape[0]):
        prompts = make_prompts(teacher[k], plan.data.spacing_mm, policy.prompting, policy.gates)
        if isinstance(prompts, Refusal):
            answers.append(prompts)
            continue
        answers.append(_ask(volume, teacher[k], scan_key, prompts, generalists, store, plan, policy, progress))
    return _assemble(answers, teacher.shape[1:])


def confidence_fused(teacher: Tensor, maps: Tensor, policy: PseudoLabels) -> tuple[Tensor, Tensor, Tensor]:
    """Fuse the answers to several prompt sets into a mean, a target y and an uncertainty U.

    Args:
        teacher: the teacher's foreground probability (H, W, D).
        maps: foreground probabilities (S, H, W, D), one a prompt set and model.
        policy: weights of U, and whether the target is the generalist's or fused with the teacher's.

    Returns:
        (mean over maps, y, U), each (H, W, D).
    """
    mean = maps.mean(0)
    variance = maps.var(0, unbiased=False)
    weights = policy.uncertainty
    uncertainty = weights.prompts * variance + weights.specialist * (teacher - mean) ** 2
    target = 0.5 * (teacher + mean) if policy.target == "fused" else mean
    return mean, target, uncertainty


def _ask(
    volume: Tensor,
    teacher: Tensor,
    scan_key: str,
    prompts: PromptSets,
    generalists: Sequence[Generalist],
    store: EmbeddingStore,
    plan: Plan,
    policy: PseudoLabels,
    progress: Progress | None,
) -> _ClassAnswer | Refusal:
    maps: list[Tensor] = []
    qualities: list[float] = []
    shape = (int(volume.shape[0]), int(volume.shape[1]), int(volume.shape[2]))
    grid = VolumeGrid(shape, plan.data.spacing_mm)
    for generalist in generalists:
        try:
            units = sorted({unit for each in prompts.sets for unit in generalist.units(each, grid)})
            embeddings = store.fetch(generalist, scan_key, volume, grid, units, progress)
            for each in prompts.sets:
                answer = generalist.segment(embeddings, each, grid)
                maps.append(_smooth_over_slices(answer.probability, policy.smooth_sigma_slices))
                qualities.extend(answer.quality.values())
        except (RuntimeError, ValueError) as error:  # one model that fails does not stop the others
            logger.warning("The generalist %s failed on a scan: %s", generalist.card.name, error)
    if not maps:
        return Refusal.FAILED
    if policy.gates.minimum_quality > 0 and sum(qualities) / len(qualities) < policy.gates.minimum_quality:
        return Refusal.LOW_QUALITY
    mean, target, uncertainty = confidence_fused(teacher, torch.stack(maps), policy)
    answered = mean > 0.5
    millilitres = float(answered.sum()) * torch.tensor(plan.data.spacing_mm).prod().item() / 1000
    if millilitres < policy.gates.minimum_volume_ml:
        return Refusal.TOO_SMALL
    if millilitres > policy.gates.maximum_volume_ml:
        return Refusal.TOO_LARGE
    if dice_of(answered, prompts.region) < policy.gates.minimum_agreement:
        return Refusal.DISAGREEMENT
    return _ClassAnswer(mean, target, uncertainty)


def _smooth_over_slices(probability: Tensor, sigma: float) -> Tensor:
    if sigma <= 0:
        return probability
    return torch.from_numpy(ndimage.gaussian_filter1d(probability.numpy(), sigma, axis=-1, mode="nearest"))


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


class PseudoLabelStore:
    """Pseudo-labels of one run on the site's disk, so that a round can go on from the last refresh.

    Args:
        folder: the run's folder of pseudo-labels.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, scan_key: str, label: PseudoLabel) -> None:
        """Keep a pseudo-label, half precision.

        Raises:
            OSError: the disk is full.
        """
        tensors = {
            "target": label.target.half(),
            "uncertainty": label.uncertainty.half(),
            "generalist": label.generalist.half(),
            "valid": label.valid,
        }
        refusals = ",".join(r.value if r else "" for r in label.refusals)
        save_tensors(self._path(scan_key), tensors, {"refusals": refusals})

    def load(self, scan_key: str) -> PseudoLabel | None:
        """Return what was kept, or None where nothing readable is there."""
        try:
            with safe_open(self._path(scan_key), framework="pt") as file:
                tensors: Mapping[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                refusals = (file.metadata() or {}).get("refusals", "").split(",")
        except (OSError, SafetensorError):
            return None
        return PseudoLabel(
            target=tensors["target"].float(),
            uncertainty=tensors["uncertainty"].float(),
            valid=tensors["valid"],
            refusals=tuple(Refusal(r) if r else None for r in refusals),
            generalist=tensors["generalist"].float(),
        )

    def _path(self, scan_key: str) -> Path:
        return self._folder / f"{scan_key}.safetensors"
