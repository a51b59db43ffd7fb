"""L_unsup by name: what the specialist learns from unlabeled scans without any label, true or pseudo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from semisam_core.regularizers.adversarial import DeepAdversarial
from semisam_core.regularizers.base import (
    LabeledPatches,
    Losses,
    Regularizer,
    RegularizerContext,
    Step,
    UnlabeledPatches,
)
from semisam_core.regularizers.cross_pseudo import CrossPseudoSupervision
from semisam_core.regularizers.entropy_minimisation import EntropyMinimisation
from semisam_core.regularizers.interpolation import InterpolationConsistency
from semisam_core.regularizers.mean_teacher import MeanTeacher
from semisam_core.regularizers.own_networks import OwnNetworks
from semisam_core.regularizers.uncertainty_aware import UncertaintyAwareMeanTeacher

__all__ = [
    "NONE",
    "REGULARIZERS",
    "LabeledPatches",
    "Losses",
    "OwnNetworks",
    "Regularizer",
    "RegularizerContext",
    "RegularizerSpec",
    "Step",
    "UnlabeledPatches",
    "build_regularizer",
    "check_regularizer",
    "teaches",
]

NONE = "none"


@dataclass(frozen=True)
class RegularizerSpec:
    """What plan and site need to know of a regularizer before building it.

    Attributes:
        build: context -> the regularizer of one round.
        patches: the fewest unlabeled patches a step must have.
        needs_labels: whether it teaches nothing at a site without labeled scans.
    """

    build: Callable[[RegularizerContext], Regularizer]
    patches: int = 1
    needs_labels: bool = False


REGULARIZERS: Mapping[str, RegularizerSpec] = {
    "mean-teacher": RegularizerSpec(lambda context: MeanTeacher()),
    "ua-mt": RegularizerSpec(lambda context: UncertaintyAwareMeanTeacher()),
    "entropy-minimisation": RegularizerSpec(lambda context: EntropyMinimisation()),
    "ict": RegularizerSpec(lambda context: InterpolationConsistency(), patches=2),
    "cps": RegularizerSpec(CrossPseudoSupervision),
    "dan": RegularizerSpec(DeepAdversarial, needs_labels=True),
}


def check_regularizer(name: str, unlabeled_batch: int) -> None:
    """Check that the regularizer exists and that a step has as many unlabeled patches as it needs.

    Raises:
        ValueError: a sentence that names what is accepted.
    """
    if name == NONE:
        return
    spec = _spec(name)
    if unlabeled_batch < spec.patches:
        raise ValueError(
            f"training.unlabeled_batch = {unlabeled_batch} is too small for the regularizer {name}, which mixes "
            f"different patches of one step: {spec.patches} or more are accepted"
        )


def build_regularizer(name: str, context: RegularizerContext) -> Regularizer | None:
    """Return the regularizer of this name, or None for `none`.

    The initial weights of its own networks depend on the study's seed alone.

    Raises:
        ValueError: the name is unknown.
    """
    return None if name == NONE else _spec(name).build(context)


def teaches(name: str, labeled: int) -> bool:
    """Return whether the regularizer of this name teaches at a site with so many labeled scans.

    Raises:
        ValueError: the name is unknown.
    """
    return name != NONE and (labeled > 0 or not _spec(name).needs_labels)


def _spec(name: str) -> RegularizerSpec:
    if name not in REGULARIZERS:
        accepted = ", ".join(sorted((*REGULARIZERS, NONE)))
        raise ValueError(f"regularizer.name = {name!r}: there is no such regularizer; accepted: {accepted}")
    return REGULARIZERS[name]
