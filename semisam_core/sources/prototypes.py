"""Prototypes as a source: features that look like those inside the site's own labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from semisam_core.pseudo_labels.cold_start import ColdStarter, Prototypes
from semisam_core.sources.base import Evidence, LabeledScan, SourceName, SourceScan, nothing


class PrototypeSource:
    """Says where a scan's features look like each class.

    Args:
        starter: makes prototypes and looks for them.
        examples: the site's labeled scans.
    """

    name = SourceName.PROTOTYPES

    def __init__(self, starter: ColdStarter, examples: Sequence[LabeledScan]) -> None:
        self._starter, self._examples = starter, tuple(examples)
        self._learned: Prototypes | None = None

    def look(self, scan: SourceScan) -> Evidence:
        """Return the classes' probabilities by their nearest prototypes."""
        if not self._examples:
            return nothing(scan)
        if self._learned is None:
            self._learned = self._starter.learn(self._each(), scan.scratch)
        return Evidence.of(self._starter.rough(scan.image, self._learned, scan.scratch)[1:], scan.scratch)

    def _each(self) -> Iterator[tuple[Tensor, Tensor]]:
        for each in self._examples:
            yield each.image, each.label
            each.scratch.release()

    def without(self, key: str) -> PrototypeSource | None:
        """Return prototypes of the other labeled scans only, or None where there is no other."""
        others = [each for each in self._examples if each.key != key]
        return PrototypeSource(self._starter, others) if others else None
