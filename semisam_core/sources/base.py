"""The seam of evidence: what a source says of one scan, and what it may know of that scan."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from semisam_core.generalists.embedding_store import scan_key
from semisam_core.scratch import Scratch


class SourceName(StrEnum):
    """The sources for which a plan has a key of their own, as logs and metrics name them."""

    SPECIALIST = "specialist"
    GENERALISTS = "generalists"
    FEATURE_HEAD = "feature-head"
    REGISTRATION = "registration"
    PROTOTYPES = "prototypes"


@dataclass(frozen=True, eq=False)
class SourceScan:
    """One scan as the sources see it.

    Attributes:
        image: (C, H, W, D) on the grid of pseudo-labels, RAS; generalists see the first channel.
        spacing_mm: voxel size along H, W, D.
        classes: K.
        teacher: the teacher's class probabilities (1 + K, H, W, D) on the same grid; None for a scan that is only there
            to score sources that do without.
        scratch: where these are, and where sources make their maps, one class at a time.
    """

    image: Tensor
    spacing_mm: tuple[float, float, float]
    classes: int
    teacher: Tensor | None = None
    scratch: Scratch = field(default_factory=Scratch)

    @cached_property
    def key(self) -> str:
        """The scan's identity: a hash of its content."""
        return scan_key(self.image)

    def maps(self) -> Tensor:
        """Return zeros for a map of each class, (K, H, W, D)."""
        return self.scratch.zeros((self.classes, *self.image.shape[1:]))


@dataclass(frozen=True, eq=False)
class Evidence:
    """What one source says of one scan.

    Attributes:
        foreground: probability of each class (K, H, W, D) in [0, 1].
        answered: (K,) bool; where False, the source has nothing to say of that class, and its map means nothing.
    """

    foreground: Tensor
    answered: Tensor

    @classmethod
    def of(cls, foreground: Tensor, scratch: Scratch | None = None) -> Evidence:
        """Return evidence of every class of which a source finds anything at all, from maps that may be in scratch."""
        answered = [(scratch or Scratch()).any_above(each, 0.5) for each in foreground]
        return cls(foreground, torch.tensor(answered, dtype=torch.bool))


@dataclass(frozen=True, eq=False)
class LabeledScan:
    """One labeled scan of this site: its key, image (C, H, W, D) and label (H, W, D) of class indices.

    Image and label are in `scratch`, if not in memory: who has read them releases it.
    """

    key: str
    image: Tensor
    label: Tensor
    scratch: Scratch = field(default_factory=Scratch)


class Source(Protocol):
    """Tells where each class is in a scan. One object lives for one round at one site."""

    @property
    def name(self) -> str:
        """Its name: a `SourceName`, or that in the registry of further sources."""

    def look(self, scan: SourceScan) -> Evidence:
        """Return the source's evidence about a scan.

        Raises:
            RuntimeError, ValueError: it failed on this scan; the others still count.
        """

    def without(self, key: str) -> Source | None:
        """Return this source as if it had never learned from the scan of this key, to be scored on it; or None.

        None where it cannot be told apart, or where nothing would be left to learn from.
        """


def nothing(scan: SourceScan) -> Evidence:
    """Return the evidence of a source that has nothing to say."""
    return Evidence(scan.maps(), torch.zeros(scan.classes, dtype=torch.bool))
