"""The plan's section on differential privacy of patients, and which other keys do not go with it."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from semisam_core.configuration import StrictModel
from semisam_core.plan_sections.aggregation import Aggregation
from semisam_core.plan_sections.pseudo_labels import PseudoLabels
from semisam_core.plan_sections.training import RegularizerSettings, SpecialistSettings
from semisam_core.regularizers import why_not_private


class Privacy(StrictModel):
    """Local training with differential privacy (DP-SGD, Abadi et al., CCS 2016) whose unit is the patient.

    At each step every patient of the site is drawn at random. The gradient of each drawn patient's loss is clipped,
    noise is added to their sum, and the sum is divided by the expected number of patients. `training.labeled_batch` and
    `training.unlabeled_batch` have no effect.

    Nothing that was learned from other patients' labels is used: generalists all count the same, and pseudo-labels are
    made from the patient's own scan and the teacher, an average of private specialists. How much epsilon a site spends
    at most is the site's decision, not the plan's.

    Attributes:
        noise_multiplier: standard deviation of the Gaussian noise, as a multiple of `clipping_norm`.
        clipping_norm: norm to which a patient's gradient is clipped.
        sampling_rate: probability with which a step draws a patient.
        patches_per_patient: patches of a drawn patient's labeled scans, and as many of the unlabeled ones.
        delta: the probability with which the guarantee may fail, well below one in the number of patients.
    """

    noise_multiplier: float = Field(gt=0, le=1000)
    clipping_norm: float = Field(default=1.0, gt=0, le=1000)
    sampling_rate: float = Field(gt=0, le=1)
    patches_per_patient: int = Field(default=1, ge=1, le=64)
    delta: float = Field(default=1e-5, gt=0, le=1e-3)


def privacy_conflicts(
    specialist: SpecialistSettings,
    regularizer: RegularizerSettings,
    pseudo_labels: PseudoLabels | None,
    aggregation: Aggregation,
) -> list[str]:
    """Return a sentence for each key of a plan that breaks the guarantee to a patient; empty if all go with it."""
    found = []
    if specialist.arguments.get("normalization") == "batch":
        found.append(
            "specialist.arguments.normalization: batch computes its statistics over several patients; choose instance "
            "or group"
        )
    if (reason := why_not_private(regularizer.name)) is not None:
        found.append(f"regularizer.name: {regularizer.name} {reason}; choose none or one that keeps patients apart")
    if pseudo_labels is not None:
        found += _of_pseudo_labels(pseudo_labels)
    if aggregation.weights in ("evidence", "confidence"):
        found.append(
            f"aggregation.weights: {aggregation.weights} needs the number of accepted pseudo-labels, which would leave "
            "the site without noise; choose samples or equal"
        )
    return found


def _of_pseudo_labels(pseudo_labels: PseudoLabels) -> Iterator[str]:
    """Yield what the section takes from the labels of patients other than the one whose pseudo-label is made."""
    if pseudo_labels.cold_start is not None:
        yield "pseudo_labels.cold_start takes prototypes from other patients' labels; set it to null"
    if pseudo_labels.gates.volume_factor is not None:
        yield (
            "pseudo_labels.gates.volume_factor takes plausible volumes from other patients' labels; set it to null and "
            "give minimum_volume_ml and maximum_volume_ml"
        )
    if pseudo_labels.method != "evidence":
        return
    yield "pseudo_labels.method: evidence scores its sources on other patients' labels; choose semisam+"
    sources = pseudo_labels.sources
    for key, used, why in (
        ("registration", sources.registration, "carries other patients' labels over"),
        ("prototypes", sources.prototypes, "takes prototypes from other patients' labels"),
        ("feature_head", sources.feature_head, "is trained on labels, and sends their mean volumes, without noise"),
        ("volume_tolerance", sources.volume_tolerance, "takes volumes from other patients' labels"),
    ):
        if used is not None:
            yield f"pseudo_labels.sources.{key} {why}; set it to null"
