"""The specialist as a source: what its teacher predicts."""

from __future__ import annotations

from semisam_core.sources.base import Evidence, SourceName, SourceScan


class SpecialistSource:
    """Says what the teacher predicts.

    It has learned from the labels of every site, so no labeled scan of this site can score it.
    """

    name = SourceName.SPECIALIST

    def look(self, scan: SourceScan) -> Evidence:
        """Return the teacher's foreground probabilities.

        Raises:
            ValueError: the scan has no prediction.
        """
        if scan.teacher is None:
            raise ValueError("the teacher has not predicted this scan")
        return Evidence.of(scan.teacher[1:], scan.scratch)

    def without(self, key: str) -> None:
        """Return None: the teacher cannot unlearn a scan."""
        return
