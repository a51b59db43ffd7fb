"""How much a site's update of one round is worth, by its own report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol


class EvidenceSettings(Protocol):
    """The settings that weights are made by, from the plan's `aggregation` section."""

    @property
    def weights(self) -> str:
        """What counts: samples, equal, evidence or confidence."""

    @property
    def unlabeled_share(self) -> float:
        """What an accepted pseudo-label counts, where a labeled scan counts one."""


def evidence(scalars: Mapping[str, float], settings: EvidenceSettings, progress: float, classes: int = 1) -> float:
    """Return an update's evidence, in labeled scans. One of a site that took no steps carries nothing new: 0.

    Args:
        scalars: the site's report.
        settings: `samples`: labeled and unlabeled scans; `equal`: 1; `evidence`: labeled scans plus unlabeled_share *
            exp(-5 (1 - progress)^2) * accepted pseudo-labels / classes (a scan has up to one per class); `confidence`:
            the same with the sum of the pseudo-labels' mean confidences instead of their number.
        progress: finished share of the study's rounds, in [0, 1].
        classes: the plan's number of foreground classes.
    """
    if scalars["steps"] <= 0:
        return 0.0
    if settings.weights == "equal":
        return 1.0
    if settings.weights == "samples":
        return float(scalars["labeled"] + scalars["unlabeled"])
    ramp = math.exp(-5 * (1 - progress) ** 2)
    pseudo_labels = scalars["accepted"]
    if settings.weights == "confidence":
        pseudo_labels *= scalars["confidence"]
    return float(scalars["labeled"] + settings.unlabeled_share * ramp * pseudo_labels / classes)
