"""Pseudo-labels of one run on the site's disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from semisam_core.files import save_tensors
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.fusion import PseudoLabel

# exp(-U) is 0 long before; beyond 65,504 half precision has infinity, which resamples to NaN.
MAXIMUM_UNCERTAINTY = 1e4


class PseudoLabelStore:
    """Pseudo-labels of one run on the site's disk, so that rounds between two refreshes can reuse them."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, created on the first write."""
        self._folder = folder

    def save(self, scan_key: str, label: PseudoLabel) -> None:
        """Write a pseudo-label in half precision.

        Raises:
            OSError: the disk is full.
        """
        tensors = {
            "target": label.target.half(),
            "uncertainty": label.uncertainty.clamp_max(MAXIMUM_UNCERTAINTY).half(),
            "generalist": label.generalist.half(),
            "valid": label.valid,
        }
        refusals = ",".join(r.value if r else "" for r in label.refusals)
        save_tensors(self._path(scan_key), tensors, {"refusals": refusals})

    def load(self, scan_key: str) -> PseudoLabel | None:
        """Return a scan's pseudo-label, or None if there is none or its file cannot be read."""
        try:
            with safe_open(self._path(scan_key), framework="pt") as file:
                tensors: Mapping[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                refusals = (file.metadata() or {}).get("refusals", "").split(",")
        except (OSError, SafetensorError):
            return None
        return PseudoLabel(
            target=tensors["target"].float(),
            uncertainty=tensors["uncertainty"].float(),
            valid=tensors["valid"],
            refusals=tuple(Refusal(r) if r else None for r in refusals),
            generalist=tensors["generalist"].float(),
        )

    def _path(self, scan_key: str) -> Path:
        return self._folder / f"{scan_key}.safetensors"
