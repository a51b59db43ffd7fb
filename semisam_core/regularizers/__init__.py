"""L_unsup by name: learning from unlabeled scans without labels or pseudo-labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from semisam_core.registry import add_entry
from semisam_core.regularizers.adversarial import DeepAdversarial
from semisam_core.regularizers.auxiliary_networks import AuxiliaryNetworks
from semisam_core.regularizers.base import (
    LabeledPatches,
    Regularizer,
    RegularizerContext,
    RegularizerLosses,
    TrainingStep,
    UnlabeledPatches,
)
from semisam_core.regularizers.copy_paste import CopyPaste
from semisam_core.regularizers.cross_pseudo import CrossPseudoSupervision
from semisam_core.regularizers.entropy_minimisation import EntropyMinimisation
from semisam_core.regularizers.fixmatch import FixMatch
from semisam_core.regularizers.interpolation import InterpolationConsistency
from semisam_core.regularizers.mean_teacher import MeanTeacher
from semisam_core.regularizers.uncertainty_aware import UncertaintyAwareMeanTeacher

__all__ = [
    "NONE",
    "REGULARIZERS",
    "AuxiliaryNetworks",
    "LabeledPatches",
    "Regularizer",
    "RegularizerContext",
    "RegularizerLosses",
    "RegularizerSpec",
    "TrainingStep",
    "UnlabeledPatches",
    "build_regularizer",
    "check_regularizer",
    "register_regularizer",
    "teaches",
    "why_not_private",
]

NONE = "none"


@dataclass(frozen=True)
class RegularizerSpec:
    """A registry entry: what is known about a regularizer before it is built.

    Attributes:
        build: builds the regularizer for one round.
        minimum_patches: fewest unlabeled patches per step.
        needs_labels: whether it has no effect at a site without labeled scans.
        not_private: why its loss of one patient depends on others beyond the weights of student and teacher, which
            rules it out under differential privacy; None if it does not.
    """

    build: Callable[[RegularizerContext], Regularizer]
    minimum_patches: int = 1
    needs_labels: bool = False
    not_private: str | None = "has not been shown to keep patients apart"


_MIXES = "mixes patches of several patients"
_SECOND_NETWORK = "trains a network of its own on all patients without noise"

REGULARIZERS: dict[str, RegularizerSpec] = {
    "mean-teacher": RegularizerSpec(lambda context: MeanTeacher(), not_private=None),
    "ua-mt": RegularizerSpec(lambda context: UncertaintyAwareMeanTeacher(), not_private=None),
    "entropy-minimisation": RegularizerSpec(lambda context: EntropyMinimisation(), not_private=None),
    "ict": RegularizerSpec(lambda context: InterpolationConsistency(), minimum_patches=2, not_private=_MIXES),
    "cps": RegularizerSpec(CrossPseudoSupervision, not_private=_SECOND_NETWORK),
    "dan": RegularizerSpec(DeepAdversarial, needs_labels=True, not_private=_SECOND_NETWORK),
    "fixmatch": RegularizerSpec(lambda context: FixMatch(), not_private=None),
    "bcp": RegularizerSpec(lambda context: CopyPaste(), needs_labels=True, not_private=_MIXES),
}


def register_regularizer(name: str, spec: RegularizerSpec) -> None:
    """Add a regularizer to the registry of this process.

    Raises:
        ValueError: another regularizer has the name.
    """
    add_entry(REGULARIZERS, "regularizer", name, spec)


def check_regularizer(name: str, unlabeled_batch: int) -> None:
    """Check that the regularizer exists and that a step has enough unlabeled patches for it.

    Raises:
        ValueError: a sentence that names what is accepted.
    """
    if name == NONE:
        return
    spec = _spec(name)
    if unlabeled_batch < spec.minimum_patches:
        raise ValueError(
            f"training.unlabeled_batch = {unlabeled_batch} is too small for the regularizer {name}, which mixes "
            f"the patches of a step: it must be at least {spec.minimum_patches}"
        )


def build_regularizer(name: str, context: RegularizerContext) -> Regularizer | None:
    """Return the regularizer of this name, or None for `none`.

    The initial weights of its auxiliary networks depend only on the plan's seed.

    Raises:
        ValueError: the name is unknown.
    """
    return None if name == NONE else _spec(name).build(context)


def teaches(name: str, labeled: int) -> bool:
    """Return whether this regularizer has an effect at a site with so many labeled scans.

    Raises:
        ValueError: the name is unknown.
    """
    return name != NONE and (labeled > 0 or not _spec(name).needs_labels)


def why_not_private(name: str) -> str | None:
    """Return why this regularizer does not go with differential privacy, or None if it does.

    Raises:
        ValueError: the name is unknown.
    """
    return None if name == NONE else _spec(name).not_private


def _spec(name: str) -> RegularizerSpec:
    if name not in REGULARIZERS:
        accepted = ", ".join(sorted((*REGULARIZERS, NONE)))
        raise ValueError(f"regularizer.name = {name!r}: unknown regularizer; accepted: {accepted}")
    return REGULARIZERS[name]
