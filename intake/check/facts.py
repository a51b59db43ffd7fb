"""What is measured of each case, once, so that checks are functions of small facts and no voxel is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semisam_core.data.cases import Role
from semisam_core.data.geometry import Geometry
from semisam_core.plan import Plan


@dataclass(frozen=True)
class Terms:
    """What data is judged against.

    Attributes:
        plan: the study plan, or None where none is given; checks that need one are then not done.
        annotated: the plan's classes (from 1) that the site's labels mark; empty without a plan.
        channels: names of the channels, the plan's or `channel 0`, `channel 1`, ...
        memory_gb: the site's `storage.memory_gb`.
    """

    plan: Plan | None
    annotated: tuple[int, ...]
    channels: tuple[str, ...]
    memory_gb: float


@dataclass(frozen=True)
class Intensities:
    """The values of one channel.

    Attributes:
        nan: number of NaN voxels.
        infinite: number of infinite voxels.
        nan_in_label: number of NaN voxels where the label marks something.
        minimum: smallest finite value.
        maximum: largest finite value.
        percentiles: the 0.5th, 5th, 50th, 95th and 99.5th of the finite values, or of a regular sample of a large scan.
    """

    nan: int
    infinite: int
    nan_in_label: int
    minimum: float
    maximum: float
    percentiles: tuple[float, float, float, float, float]

    @property
    def width(self) -> float:
        """Distance from the 0.5th to the 99.5th percentile."""
        return self.percentiles[4] - self.percentiles[0]


@dataclass(frozen=True)
class ChannelFacts:
    """One channel of a case.

    Attributes:
        name: the channel's name.
        geometry: where its voxels lie.
        has_orientation: whether its header says how the patient lies (a qform or an sform).
        notes: sentences on conversions when it was opened.
        intensities: its values; None if there is no finite one.
        contents: hashes of its voxels, in the file's order and in the order of the patient's axes.
        miniature: (512,) its means in 8 x 8 x 8 blocks along the patient's axes, scaled to mean 0 and length 1; zeros
            if they are all equal.
    """

    name: str
    geometry: Geometry
    has_orientation: bool
    notes: tuple[str, ...]
    intensities: Intensities | None
    contents: frozenset[str]
    miniature: NDArray[np.float32]


@dataclass(frozen=True)
class ClassFacts:
    """What one label marks of one structure.

    Attributes:
        index: the plan's class, counted from 1; without a plan the value in the file.
        name: the class's name; without a plan `value 3`.
        volume_ml: its volume.
        components_ml: volumes of its connected components, largest first.
        touches: the sides of the volume that it touches, such as `left`.
        outside_body: the share of it that lies outside of the body; None where the body was not found.
    """

    index: int
    name: str
    volume_ml: float
    components_ml: tuple[float, ...]
    touches: tuple[str, ...]
    outside_body: float | None


@dataclass(frozen=True)
class LabelFacts:
    """The label of a case.

    Attributes:
        geometry: where its voxels lie.
        notes: sentences on conversions and rounding.
        off_grid: why it does not lie on the image; None if it does.
        values: distinct values in ascending order; at most `MOST_VALUES` of them.
        foreign: the sentence on whole values that mark no class of the plan; None if there is none, or no plan.
        not_whole: values that are no whole numbers from 0 up.
        content: hash of its voxels.
        classes: what it marks, as far as its values are those of a label.
    """

    geometry: Geometry
    notes: tuple[str, ...]
    off_grid: str | None
    values: tuple[float, ...]
    foreign: str | None
    not_whole: tuple[float, ...]
    content: str
    classes: tuple[ClassFacts, ...]


@dataclass(frozen=True)
class CaseFacts:
    """One case.

    Attributes:
        id: the case's id.
        role: what it is used for.
        unreadable: why files could not be read, one sentence each.
        off_grid: why channels do not lie on the first.
        too_large: why it does not fit into memory; its voxels were then not read.
        channels: the channels that could be read.
        label: the label if the role allows reading it and it could be read.
        has_label: whether there is a label that may be read.
        picture: a PNG of three planes; None if there is none.
    """

    id: str
    role: Role
    unreadable: tuple[str, ...] = ()
    off_grid: tuple[str, ...] = ()
    too_large: str | None = None
    channels: tuple[ChannelFacts, ...] = ()
    label: LabelFacts | None = None
    has_label: bool = False
    picture: bytes | None = None
