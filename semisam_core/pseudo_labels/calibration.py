"""What a site's labeled scans teach of its generalists and targets, before either is trusted on unlabeled ones."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semisam_core.generalists.base import Generalist
from semisam_core.generalists.embedding_store import EmbeddingStore
from semisam_core.plan import Plan
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.ensemble import GeneralistEnsemble, GeneralistOutput
from semisam_core.pseudo_labels.fusion import Calibration, policy_of, region_of_class

PRIOR_ERROR = 0.01  # keeps the trust in a model that happens to be right on one scan finite
MENTIONED = 0.05  # below this probability a voxel is not claimed as foreground by anybody


@dataclass(frozen=True)
class LabeledExample:
    """One labeled scan, with what the teacher says of it.

    Attributes:
        image: (C, H, W, D) on the plan's grid.
        label: (H, W, D) class indices.
        teacher: the teacher's probabilities (1 + K, H, W, D).
    """

    image: Tensor
    label: Tensor
    teacher: Tensor


def calibrate(
    examples: Iterable[LabeledExample],
    generalists: Sequence[Generalist],
    store: EmbeddingStore,
    plan: Plan,
    annotated: Sequence[int] | None = None,
) -> Calibration:
    """Return the volumes of the labeled targets and how far each generalist can be trusted.

    Trust is the inverse of a model's mean squared error (Brier score) against the expert's mask, when it is prompted as
    on unlabeled scans, over the voxels that the expert or any of the models calls foreground. A model that answers none
    of the prompts is trusted as much as the worst of the others. With a single generalist there is nothing to weigh: it
    is not asked.

    Args:
        examples: labeled scans; may be none.
        generalists: the models available at this site.
        store: where embeddings are kept.
        plan: policy; must have `pseudo_labels`.
        annotated: the classes (from 1) that the labels mark; None for all. Nothing is learned of the others.
    """
    everything = range(1, len(plan.task.classes) + 1)
    classes = everything if annotated is None else annotated
    voxel_ml = math.prod(plan.data.spacing_mm) / 1000
    volumes: dict[int, list[float]] = {k: [] for k in everything}
    errors: dict[str, list[float]] = defaultdict(list)
    for example in examples:
        for k in classes:
            truth = example.label == k
            if bool(truth.any()):
                volumes[k].append(float(truth.sum()) * voxel_ml)
        if len(generalists) > 1:
            for name, error in _errors(example, classes, generalists, store, plan):
                errors[name].append(error)
    trust = {name: 1 / (PRIOR_ERROR + sum(each) / len(each)) for name, each in errors.items()}
    for generalist in generalists if trust else ():
        trust.setdefault(generalist.card.name, min(trust.values()))
    return Calibration(trust, tuple(tuple(volumes[k]) for k in everything))


def _errors(
    example: LabeledExample,
    classes: Sequence[int],
    generalists: Sequence[Generalist],
    store: EmbeddingStore,
    plan: Plan,
) -> Iterable[tuple[str, float]]:
    ensemble = GeneralistEnsemble(example.image[0], plan.data.spacing_mm, generalists, store, policy_of(plan))
    for k in classes:
        region = region_of_class(example.teacher, k, plan)
        if isinstance(region, Refusal):
            continue
        outputs = ensemble.ask(region, example.teacher[k])
        yield from brier_scores(outputs, example.label == k).items()


def brier_scores(outputs: dict[str, GeneralistOutput], truth: Tensor) -> dict[str, float]:
    """Return each model's mean squared error over the voxels that the expert or any model calls foreground."""
    means = {name: output.maps.mean(0) for name, output in outputs.items()}
    if not means:
        return {}
    where = torch.stack([truth, *(mean > MENTIONED for mean in means.values())]).any(0)
    if not bool(where.any()):
        return {}
    return {name: float(((mean - truth.float())[where] ** 2).mean()) for name, mean in means.items()}
