"""From a plan to the bounds of an update: how many objects Flower makes of it, and how many bytes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK

from deployment.lead.uploads import SMALL, Size
from semisam_core.codecs import leaving_spec
from semisam_core.files import write_json
from semisam_core.packing import packed_spec
from semisam_core.plan import Plan

# In bytes; what was seen of Flower 1.42 is about half of each.
ARRAY_FRAME = 512  # a tensor's NPY header, its description, and the heads of both objects
ENTRY = 256  # a tensor's name and identifiers in the list of all
RECORDS = 10  # objects of the message itself and its records


def update_size(plan: Plan, factor: float) -> Size:
    """Return the bounds of an update of this plan.

    Args:
        plan: the study plan.
        factor: how much larger than its tensors and their framing an update may be; at least 1.
    """
    vectors = packed_spec(leaving_spec(plan))
    sizes = {name: math.prod(each.shape) * each.dtype.itemsize for name, each in vectors.items()}
    chunks = sum(math.ceil((size + ARRAY_FRAME) / CHUNK) for size in sizes.values())
    index = sum(len(name) + ENTRY for name in sizes)
    total = sum(sizes.values()) + ARRAY_FRAME * (len(sizes) + chunks) + index
    largest = max(min(CHUNK, factor * max(sizes.values())) + ARRAY_FRAME, factor * index)
    return Size(
        objects=math.ceil(factor * (len(sizes) + chunks)) + RECORDS,
        total_bytes=math.ceil(factor * total) + SMALL.total_bytes,
        object_bytes=max(math.ceil(largest), SMALL.object_bytes),
    )


def write_update_size(path: Path, plan: Plan, factor: float) -> None:
    """Tell the SuperLink how large the updates of the next run may be."""
    write_json(path, dataclasses.asdict(update_size(plan, factor)))
