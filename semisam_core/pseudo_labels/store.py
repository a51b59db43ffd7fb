"""Pseudo-labels of one run on the site's disk; training reads them patch by patch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from semisam_core.data.scans import StoredVolume
from semisam_core.errors import CaseError
from semisam_core.files import TensorParts, save_tensor_parts
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.fusion import PseudoLabel, confidence
from semisam_core.scratch import Scratch

# exp(-U) is 0 long before; beyond 65,504 half precision has infinity, which resamples to NaN.
MAXIMUM_UNCERTAINTY = 1e4


@dataclass(frozen=True, eq=False)
class StoredPseudoLabel:
    """A pseudo-label on disk: what was decided about it, and its maps, which are read patch by patch.

    Attributes:
        target: y of each class (K, H, W, D), half precision, unread.
        uncertainty: U, likewise.
        valid: (K,) bool, the classes that were accepted.
        refusals: for each class, why it was refused, or None.
        confidences: the confidence in each accepted class.
        foreground: how many voxels of each class are foreground.
        round: the round that made it; None if its file does not say.
    """

    target: StoredVolume
    uncertainty: StoredVolume
    valid: Tensor
    refusals: tuple[Refusal | None, ...]
    confidences: tuple[float, ...]
    foreground: tuple[int, ...]
    round: int | None = None

    def voxels(self, k: int) -> Tensor:
        """Return the foreground voxels (N, 3) of the k-th class, from 1, in array order.

        Raises:
            CaseError: the file is gone or damaged.
        """
        numbers = StoredVolume(self.target.path, f"foreground.{k}", (self.foreground[k - 1],))[(slice(None),)]
        return torch.stack(torch.unravel_index(numbers.long(), self.target.shape[1:]), 1)


class PseudoLabelStore:
    """Pseudo-labels of one run on the site's disk, so that rounds between two refreshes can reuse them."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, created on the first write."""
        self._folder = folder

    def save(self, key: str, label: PseudoLabel, round_number: int | None = None) -> None:
        """Write a pseudo-label in half precision, class by class.

        Args:
            key: the scan's, such as `prepared_key`.
            label: the pseudo-label.
            round_number: the round that makes it.

        Raises:
            OSError: the disk is full.
        """
        shape, scratch = label.target.shape, label.scratch
        maps = {"target": label.target, "uncertainty": label.uncertainty, "generalist": label.generalist}
        tensors = {
            name: TensorParts(torch.float16, shape, partial(_halves, each, scratch)) for name, each in maps.items()
        }
        tensors["valid"] = TensorParts(torch.bool, label.valid.shape, lambda: [label.valid])
        numbers = torch.int32 if label.target[0].numel() < 2**31 else torch.int64
        confidences = []
        for k, accepted in enumerate(label.valid.tolist()):
            inside = _numbers_above(label.target[k], numbers, scratch)
            tensors[f"foreground.{1 + k}"] = TensorParts(numbers, inside.shape, partial(_pieces, inside, scratch))
            if accepted:
                stored = [_as_stored(each[k], scratch) for each in (label.target, label.uncertainty)]
                confidences.append(confidence(stored[0], stored[1], scratch))
        about = {
            "refusals": [refusal and refusal.value for refusal in label.refusals],
            "confidences": confidences,
            "round": round_number,
        }
        save_tensor_parts(self._path(key), tensors, {"about": json.dumps(about)})

    def open(self, key: str) -> StoredPseudoLabel | None:
        """Return a scan's pseudo-label without its maps, or None if there is none or its file cannot be read."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                maps = [
                    StoredVolume(path, name, tuple(file.get_slice(name).get_shape()))
                    for name in ("target", "uncertainty")
                ]
                valid = file.get_tensor("valid")
                foreground = [int(file.get_slice(f"foreground.{k}").get_shape()[0]) for k in range(1, 1 + len(valid))]
                refusals = [None if word is None else Refusal(word) for word in about["refusals"]]
                confidences = [float(value) for value in about["confidences"]]
                number = None if about.get("round") is None else int(about["round"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        decided = (tuple(refusals), tuple(confidences), tuple(foreground), number)
        return StoredPseudoLabel(maps[0], maps[1], valid, *decided)

    def load(self, key: str) -> PseudoLabel | None:
        """Return a scan's pseudo-label with all its maps, or None if there is none or its file cannot be read."""
        stored = self.open(key)
        if stored is None:
            return None
        everything = (slice(None),)
        generalist = StoredVolume(stored.target.path, "generalist", stored.target.shape)
        try:
            target, uncertainty, own = (
                volume[everything].float() for volume in (stored.target, stored.uncertainty, generalist)
            )
        except CaseError:
            return None
        return PseudoLabel(target, uncertainty, stored.valid, stored.refusals, own)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"


def _half(map_: Tensor) -> Tensor:
    return map_.clamp_max(MAXIMUM_UNCERTAINTY).half()


def _halves(maps: Tensor, scratch: Scratch) -> Iterator[Tensor]:
    for (each,) in scratch.blocks(maps):
        yield _half(each)


def _pieces(values: Tensor, scratch: Scratch) -> Iterator[Tensor]:
    for (each,) in scratch.blocks(values):
        yield each


def _as_stored(map_: Tensor, scratch: Scratch) -> Tensor:
    """Return a map as it is read back, float32."""
    found = scratch.zeros(map_.shape)
    for to, values in scratch.blocks(found, map_):
        to.copy_(_half(values))
    return found


def _numbers_above(target: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Return the numbers of the voxels that are foreground once stored, in array order."""
    inside = [(_half(each) > 0.5) for (each,) in scratch.blocks(target)]
    found, end, first = scratch.zeros((sum(int(each.sum()) for each in inside),), dtype), 0, 0
    for each in inside:
        numbers = each.nonzero()[:, 0] + first
        found[end : end + len(numbers)] = numbers
        end, first = end + len(numbers), first + len(each)
        scratch.release()
    return found
