"""A source of evidence: voxels as bright as those inside the site's labels."""

from collections.abc import Sequence

import torch

from semisam_core.sources.base import Evidence, LabeledScan, SourceScan
from semisam_core.sources.registry import register_source


class BrightnessSource:
    """Compares each voxel with the mean intensity inside the labels of each class."""

    name = "brightness"

    def __init__(self, known: Sequence[LabeledScan]) -> None:
        self._known = tuple(known)  # none at a site without labels

    def look(self, scan: SourceScan) -> Evidence:
        """Return exp(-z^2 / 2) of each voxel and class (K, H, W, D), z how many deviations from the mean."""
        image, maps = scan.image[0], scan.maps()
        for k in range(scan.classes if self._known else 0):
            seen = torch.cat([each.image[0][each.label == k + 1] for each in self._known])
            if len(seen):  # else the labels say nothing of this class
                maps[k] = torch.exp(-((image - seen.mean()) / (seen.std(correction=0) + 1e-3)).square() / 2)
        return Evidence.of(maps, scan.scratch)

    def without(self, key: str) -> "BrightnessSource | None":
        """Return the source as if it had never seen this labeled scan, to be scored on it."""
        others = [each for each in self._known if each.key != key]
        return BrightnessSource(others) if others else None


def register() -> None:
    """Let plans say `pseudo_labels: {sources: {more: [brightness]}}`."""
    register_source(BrightnessSource.name, BrightnessSource)
