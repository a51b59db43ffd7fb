"""A whole scan's probabilities by a sliding window, row by row, so that they never exist all at once.

The arithmetic is that of MONAI's `sliding_window_inference` followed by a softmax: the same windows in the same
batches, added up in the same order. So results are equal bit by bit (with one CPU thread; with more, torch's softmax
itself rounds a few voxels by where each thread's share ends).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor, nn
from torch.nn import functional

from semisam_core.row_window import RowWindow
from semisam_core.scratch import Scratch

BATCH = 2
SIGMA_SCALE = 0.125
_VECTOR = 64  # a multiple of the floats that any CPU computes at once


class _ScratchRows:
    """A volume in scratch, used like a `RowWindow` but with all rows kept."""

    def __init__(self, volume: Tensor, scratch: Scratch) -> None:
        self.volume, self._scratch = volume, scratch

    def release(self, before: int) -> None:
        """Do nothing: rows are still needed."""

    def page_out(self) -> None:
        """Give back the memory of rows; they keep their values."""
        self._scratch.release()


class SlidingProbabilities:
    """Class probabilities of one scan, completed from its first row to its last.

    Args:
        network: the specialist, in evaluation mode.
        image: (C, H, W, D) on the CPU.
        classes: number of output channels, 1 + K.
        patch: the window's size.
        overlap: share of a window that its neighbour covers, below 1.
        device: where to compute; sums are kept on the CPU.
        scratch: where to keep all rows; None for memory, where they are kept until they are released.

    Attributes:
        volume: (1 + K, H, W, D) float32; only rows from the last `release` to those that `advance` returned are valid.
    """

    def __init__(
        self,
        network: nn.Module,
        image: Tensor,
        classes: int,
        patch: Sequence[int],
        overlap: float,
        device: torch.device,
        scratch: Scratch | None = None,
    ) -> None:
        self._network, self._device, self._patch = network, device, tuple(patch)
        height, width, depth = image.shape[1:]
        self._shape = (height, width, depth)
        missing = [max(side - have, 0) for side, have in zip(self._patch, self._shape, strict=True)]
        self._before = [each // 2 for each in missing]  # padding, as MONAI's
        pads = [(each // 2, each - each // 2) for each in reversed(missing)]
        self._image = functional.pad(image, [side for pair in pads for side in pair]) if any(missing) else image
        padded = self._image.shape
        sides = (padded[1], padded[2], padded[3])
        self._sums = (
            RowWindow(classes, sides) if scratch is None else _ScratchRows(scratch.zeros((classes, *sides)), scratch)
        )
        self._weights = RowWindow(1, sides)
        self._windows = dense_patch_slices(padded[1:], self._patch, self._steps(overlap))
        self._batches = iter(range(0, len(self._windows), BATCH))
        self._map = compute_importance_map(
            self._patch, mode="gaussian", sigma_scale=SIGMA_SCALE, device=device, dtype=torch.float32
        )
        self._complete = 0  # rows of the padded volume
        inside = [slice(start, start + side) for start, side in zip(self._before, self._shape, strict=True)]
        self.volume = self._sums.volume[(slice(None), *inside)]

    def advance(self, rows: int) -> None:
        """Compute until at least this many rows of `volume` are complete."""
        goal = min(rows, self._shape[0]) + self._before[0]
        while self._complete < goal:
            start = next(self._batches, None)
            if start is not None:
                self._add(self._windows[start : start + BATCH])
            following = len(self._windows) if start is None else start + BATCH
            remaining = self._windows[following:]
            self._finish(remaining[0][0].start if remaining else self._image.shape[1])

    def release(self, before: int) -> None:
        """Give back the memory of the rows of `volume` before this one."""
        self._sums.release(before + self._before[0])

    def _steps(self, overlap: float) -> list[int]:
        sides = zip(self._patch, self._image.shape[1:], strict=True)
        return [patch if patch == side else max(int(patch * (1 - overlap)), 1) for patch, side in sides]

    def _add(self, windows: Sequence[tuple[slice, ...]]) -> None:
        patches = torch.stack([self._image[(slice(None), *window)] for window in windows]).to(self._device)
        logits = torch.as_tensor(self._network(patches)).float() * self._map
        weight = self._map.cpu()
        for window, logit in zip(windows, logits.cpu(), strict=True):
            for sums, values in zip(self._sums.volume, logit, strict=True):
                sums[window] += values
                self._sums.page_out()
            self._weights.volume[(slice(None), *window)] += weight

    def _finish(self, until: int) -> None:
        """Turn the sums of all rows before this one, to which no window adds any more, into probabilities."""
        for row in range(self._complete, until):
            sums = self._sums.volume[:, row]
            sums /= self._weights.volume[:, row]
            sums.copy_(self._softmax(sums.to(self._device), row))
            self._sums.page_out()
        self._complete = max(self._complete, until)
        self._weights.release(self._complete)

    def _softmax(self, row: Tensor, number: int) -> Tensor:
        """Return the softmax over the first axis of one row (1 + K, W, D), rounded as in a softmax of all rows.

        On the CPU torch computes several voxels at once and the remainder at the end of the array one by one, which
        rounds differently. So padding puts the row's voxels where they would be in the whole array.
        """
        height, width, depth = self._shape  # MONAI cuts off padding after the sum and before the softmax
        top, left, front = self._before
        if not top <= number < top + height:
            return row
        inside = row[:, left : left + width, front : front + depth]
        voxels = inside.reshape(len(row), -1)
        size, following = voxels.shape[1], (top + height - number - 1) * width * depth
        behind = min(following, _VECTOR)
        ahead = (height * width * depth - size - behind) % _VECTOR
        found = functional.pad(voxels, (ahead, behind)).softmax(0)[:, ahead : ahead + size]
        inside.copy_(found.view(inside.shape))
        return row
