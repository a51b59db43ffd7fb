"""What making one pseudo-label takes at most, judged by the shape of a scan before any voxel is read.

Counted is what grows with the scan. Beyond it, the networks take what they take for one window or batch, and blocks of
maps, libraries and what the system's allocator holds back about 0.3 GB.
"""

from __future__ import annotations

import math

from semisam_core.data.geometry import Geometry
from semisam_core.data.nifti import by_axis, planned_shape
from semisam_core.errors import CaseError
from semisam_core.generalists.base import SLICE_KINDS
from semisam_core.generalists.registry import generalist_spec
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.policy import policy_of

LABEL = 0.25  # labeled scans are worked on in the same way, to learn from them what unlabeled ones need
PROMPTING = 3.0
"""Float32 maps at most while slice-wise generalists are prompted: the region and the others' (0.5), components as int32
(1) with their counts (0.5) and masks (1); or an answer (1) and one that it is united with (1)."""

EVIDENCE = 3.5  # a label that is carried over (mask, copies and result), or products in double precision (2) and masks
VOLUMETRIC = 5.0  # clicks in a volume: the nearest voxel outside a mask as three int32 (3), and six masks
LATTICE_MM = 1.5  # voxels of the grid on which 3D generalists work
LATTICE_MAPS = 6.0  # on that grid: cubes, which overlap, their sums, counts and quotient
STORING = 2.5  # exp(-U) of every foreground voxel in double precision (2), and masks
REGISTRATION = 12.0  # by ITK: two scans, their copies and gradients
REGISTERED = 1 << 25  # voxels of a scan that are registered at most; of a larger one, every second or third is
FEATURES = 64 * 64 * 100  # numbers a slice: of its 64 x 64 features, the channels that are averaged at once, thrice


def pseudo_label_bytes(seen: tuple[int, int, int], trained: tuple[int, int, int], plan: Plan) -> int:
    """Return the memory that making a pseudo-label of one scan takes at most, its image on both grids included.

    Neither the number of scans, classes, planes, margins nor generalists matters.

    Args:
        seen: the scan's shape (H, W, D) on the grid on which generalists see it.
        trained: its shape on the plan's grid.
        plan: must have `pseudo_labels`.
    """
    policy, channels = policy_of(plan), len(plan.task.channels)
    voxels, voxels_trained = math.prod(seen), math.prod(trained)
    images = voxels_trained + (0 if policy.spacing_mm in (None, plan.data.spacing_mm) else voxels)
    work = [STORING * voxels_trained, PROMPTING * voxels]
    names, reads = set(policy.generalists), policy.cold_start is not None
    if policy.method == "evidence":
        work.append(EVIDENCE * voxels)
        if policy.sources.registration is not None:
            work.append(REGISTRATION * min(voxels, REGISTERED))
        if policy.sources.feature_head is not None:
            names.add(policy.sources.feature_head.generalist)
        reads |= policy.sources.feature_head is not None or policy.sources.prototypes is not None
    if any(not generalist_spec(name).card.prompt_kinds & SLICE_KINDS for name in names):
        lattice = math.prod(plan.as_generalists_see.data.spacing_mm) / LATTICE_MM**3
        work += [VOLUMETRIC * voxels, (2 + LATTICE_MAPS * lattice) * voxels]
    if reads:
        work.append(FEATURES * max(seen))
    return int(4 * ((channels + LABEL) * images + max(work)))


def check_pseudo_label_memory(case_id: str, original: Geometry, plan: Plan, memory_gb: float) -> None:
    """Check by headers alone that a pseudo-label of a scan can be made within a limit.

    Args:
        case_id: for messages.
        original: the grid of the image file.
        plan: must have `pseudo_labels`.
        memory_gb: the limit of the site's `storage.memory_gb`.

    Raises:
        CaseError: it would take more.
    """
    seen = planned_shape(original, plan.as_generalists_see.data.spacing_mm)
    needed_gb = pseudo_label_bytes(seen, planned_shape(original, plan.data.spacing_mm), plan) / 1e9
    if needed_gb > memory_gb:
        raise CaseError(
            f"{case_id}: making a pseudo-label would take {needed_gb:.3g} GB of memory, storage.memory_gb allows "
            f"{memory_gb:g}. The image has shape {original.shape} and voxels of {by_axis(original.spacing_mm)} mm; "
            f"generalists would see shape {seen}. Raise storage.memory_gb, or name the case in data.excluded; the "
            "study's lead may set pseudo_labels.spacing_mm to a coarser grid."
        )
