"""What a site's labeled scans teach about its generalists and targets, before pseudo-labels are trusted."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from semisam_core.generalists.base import Generalist
from semisam_core.generalists.embedding_store import EmbeddingStore
from semisam_core.plan import Plan
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.ensemble import GeneralistEnsemble, GeneralistOutput
from semisam_core.pseudo_labels.policy import claims_of, policy_of, region_of_class
from semisam_core.scratch import Scratch

PRIOR_ERROR = 0.01  # keeps the trust in a model that is perfect on a few scans finite
CLAIMED = 0.05  # a model claims a voxel as foreground above this probability


@dataclass(frozen=True)
class Calibration:
    """What a site's labeled scans teach about its generalists and targets; empty at a site that has none.

    Attributes:
        trust: generalist -> weight in the mean over models; a model that is not listed has weight 1.
        volumes_ml: for each class, the volumes of its expert masks.
    """

    trust: Mapping[str, float] = field(default_factory=dict)
    volumes_ml: tuple[tuple[float, ...], ...] = ()

    def volume_range_ml(self, k: int, factor: float) -> tuple[float, float] | None:
        """Return the plausible volumes of class k (from 0): the range of expert masks, widened by a factor.

        None if no expert mask shows the class.
        """
        seen = self.volumes_ml[k] if k < len(self.volumes_ml) else ()
        return (min(seen) / factor, max(seen) * factor) if seen else None


@dataclass(frozen=True)
class LabeledExample:
    """One labeled scan with the teacher's prediction.

    Attributes:
        image: (C, H, W, D) on the plan's grid.
        label: (H, W, D) class indices.
        teacher: returns the teacher's probabilities (1 + K, H, W, D); not asked where nothing depends on them.
        scratch: where these are.
    """

    image: Tensor
    label: Tensor
    teacher: Callable[[], Tensor]
    scratch: Scratch = field(default_factory=Scratch)


def calibrate(
    examples: Iterable[LabeledExample],
    generalists: Sequence[Generalist],
    store: EmbeddingStore,
    plan: Plan,
    annotated: Sequence[int] | None = None,
) -> Calibration:
    """Measure the volumes of the labeled targets and how far each generalist can be trusted.

    Trust is 1 / (`PRIOR_ERROR` + mean squared error), the error (Brier score) being measured against the expert's mask
    over the voxels that the expert or any model calls foreground, with models prompted as on unlabeled scans. A model
    that answers no prompt is trusted as little as the worst of the others. A single generalist needs no weight, so it
    is not run.

    Args:
        examples: labeled scans; may be empty.
        generalists: the models available at this site.
        store: cache of embeddings.
        plan: policy; must have `pseudo_labels`.
        annotated: the classes (from 1) that the labels mark; None for all. Other classes are skipped.
    """
    every_class = range(1, len(plan.task.classes) + 1)
    classes = every_class if annotated is None else annotated
    voxel_ml = math.prod(plan.data.spacing_mm) / 1000
    volumes: dict[int, list[float]] = {k: [] for k in every_class}
    errors: dict[str, list[float]] = defaultdict(list)
    for example in examples:
        for k in classes:
            truth = example.label == k
            if bool(truth.any()):
                volumes[k].append(float(truth.count_nonzero()) * voxel_ml)
        if len(generalists) > 1:
            for name, error in _errors(example, classes, generalists, store, plan):
                errors[name].append(error)
    trust = {name: 1 / (PRIOR_ERROR + sum(each) / len(each)) for name, each in errors.items()}
    for generalist in generalists if trust else ():
        trust.setdefault(generalist.card.name, min(trust.values()))
    return Calibration(trust, tuple(tuple(volumes[k]) for k in every_class))


def _errors(
    example: LabeledExample,
    classes: Sequence[int],
    generalists: Sequence[Generalist],
    store: EmbeddingStore,
    plan: Plan,
) -> Iterable[tuple[str, float]]:
    scratch, teacher = example.scratch, example.teacher()
    policy = policy_of(plan)
    ensemble = GeneralistEnsemble(example.image[0], plan.data.spacing_mm, generalists, store, policy, scratch=scratch)
    claims = claims_of(teacher[1:], plan, scratch)
    for k in classes:
        region = region_of_class(teacher[k], k, plan, claims, scratch)
        if not isinstance(region, Refusal):
            yield from brier_scores(ensemble.ask(region, teacher[k]), example.label == k, scratch).items()


def brier_scores(
    outputs: dict[str, GeneralistOutput], truth: Tensor, scratch: Scratch | None = None
) -> dict[str, float]:
    """Return each model's mean squared error over the voxels that the expert or any model calls foreground.

    Args:
        outputs: name -> output; may be empty.
        truth: the expert's mask (H, W, D), bool.
        scratch: where the outputs are, if not in memory.

    Returns:
        name -> error in [0, 1]; empty if neither the expert nor any model calls a voxel foreground.
    """
    scratch, claimed = scratch or Scratch(), truth.clone()
    for output in outputs.values():
        for found, *maps in scratch.blocks(claimed, *output.maps):
            found |= torch.stack(maps).mean(0) > CLAIMED
    if not bool(claimed.any()):
        return {}
    return {name: _squared_error(output, truth, claimed, scratch) for name, output in outputs.items()}


def _squared_error(output: GeneralistOutput, truth: Tensor, claimed: Tensor, scratch: Scratch) -> float:
    errors, end = torch.empty(int(claimed.count_nonzero())), 0
    for inside, true, *maps in scratch.blocks(claimed, truth, *output.maps):
        found = (torch.stack(maps).mean(0) - true.float())[inside] ** 2
        errors[end : end + len(found)] = found
        end += len(found)
    return float(errors.mean())
