"""Masks as run lengths, between the page and the command. `page/codec.js` does the same.

A run is one 32-bit number, little-endian: the class in its highest 8 bits, its voxels in the other 24. Longer runs are
split.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from semisam_core.errors import SemiSAMError

LONGEST_RUN = 2**24 - 1
RUN_BYTES = 4


class CodecError(SemiSAMError):
    """Bytes that are no mask of the size that is expected."""


def encode(mask: NDArray[np.uint8]) -> bytes:
    """Return the runs of a mask of any shape, in array order (the last axis fastest)."""
    flat = mask.reshape(-1)
    if not flat.size:
        return b""
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(np.append(starts, flat.size))
    pieces = -(-lengths // LONGEST_RUN)
    values = np.repeat(flat[starts], pieces).astype(np.uint32)
    counts = np.full(int(pieces.sum()), LONGEST_RUN, dtype=np.int64)
    counts[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * LONGEST_RUN
    return (values << np.uint32(24) | counts.astype(np.uint32)).astype("<u4").tobytes()


def decode(content: bytes, shape: tuple[int, ...], classes: int) -> NDArray[np.uint8]:
    """Return the mask of this shape that runs describe.

    Args:
        content: the runs.
        shape: of the mask.
        classes: the highest class.

    Raises:
        CodecError: the runs are cut, empty, of too many or too few voxels, or of an unknown class.
    """
    voxels = int(np.prod(shape, dtype=np.int64))
    if len(content) % RUN_BYTES:
        raise CodecError(f"a mask's runs take {RUN_BYTES} bytes each; {len(content)} bytes came.")
    runs = np.frombuffer(content, dtype="<u4")
    values, lengths = (runs >> 24).astype(np.uint8), (runs & LONGEST_RUN).astype(np.int64)
    if (lengths == 0).any():
        raise CodecError("a run of a mask has no voxel.")
    if int(lengths.sum()) != voxels:
        raise CodecError(f"the mask's runs have {int(lengths.sum())} voxels; the scan has {voxels}.")
    if int(values.max(initial=0)) > classes:
        raise CodecError(f"the mask has the class {int(values.max())}; the plan has {classes}.")
    return np.repeat(values, lengths).reshape(shape)
