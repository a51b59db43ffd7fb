"""Segment many scans: what is done is kept, what fails is told, and the rest goes on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from release.inputs import Input
from release.outputs import default_format, write_dicom_seg, write_nifti
from release.prediction import Predictor
from semisam_core.errors import ConfigError, SemiSAMError
from semisam_core.files import write_json
from semisam_core.progress import ProgressCallback

FORMATS = ("auto", "nifti", "dicom-seg", "both")


@dataclass(frozen=True)
class Order:
    """What to write.

    Attributes:
        out: folder of the outputs.
        format: nifti, dicom-seg, both; auto gives DICOM SEG for DICOM and NIfTI for everything else.
        uncertainty: whether to write a map of it too (always NIfTI).
        spacing_mm: voxel size, for h5 files.
    """

    out: Path
    format: str = "auto"
    uncertainty: bool = False
    spacing_mm: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        """Check the format.

        Raises:
            ConfigError: it is unknown.
        """
        if self.format not in FORMATS:
            raise ConfigError(f"--format {self.format}: accepted are {', '.join(FORMATS)}.")


def predict_all(
    predictor: Predictor, inputs: Sequence[Input], order: Order, progress: ProgressCallback | None = None
) -> list[dict[str, Any]]:
    """Segment every scan and write its outputs, and beside them `<name>.json`, which says how they were made.

    A scan whose outputs were made before from the same files by the same models is not segmented again.

    Args:
        predictor: the models.
        inputs: the scans.
        order: what to write.
        progress: called with (scans done, scans).

    Returns:
        For each scan its record: name, state (done, kept or failed), volumes_ml, seconds, outputs, notes; or the error.
    """
    records = []
    for done, scan in enumerate(inputs):
        if progress:
            progress(done, len(inputs))
        try:
            records.append(_one(predictor, scan, order))
        except (SemiSAMError, OSError, MemoryError) as error:
            reason = str(error) if isinstance(error, SemiSAMError) else f"{type(error).__name__}: {error}"
            records.append({"name": scan.name, "state": "failed", "error": reason})
    if progress:
        progress(len(inputs), len(inputs))
    return records


def _one(predictor: Predictor, scan: Input, order: Order) -> dict[str, Any]:
    began = time.monotonic()
    version = importlib.metadata.version("fedsemisam")
    formats = {"auto": (default_format(scan),), "both": ("nifti", "dicom-seg")}.get(order.format, (order.format,))
    made_from = {
        "models": [each.sha256 for each in predictor.models],
        "plans": [each.plan.hash for each in predictor.models],
        "input": scan.sha256,
        "formats": list(formats),
        "uncertainty": order.uncertainty,
        "spacing_mm": order.spacing_mm,
        "version": version,
    }
    record_path = order.out / f"{scan.name}.json"
    if (kept := _kept(record_path, made_from)) is not None:
        return {**kept, "state": "kept"}
    stack, grid, notes = scan.read(order.spacing_mm)
    found = predictor.segment(stack, grid, scan.name, order.uncertainty)
    outputs: dict[str, str] = {}
    for kind in formats:
        path = order.out / f"{scan.name}{'.nii.gz' if kind == 'nifti' else '.dcm'}"
        if kind == "nifti":
            labels = found.labels.astype("uint8") if found.labels.max(initial=0) < 256 else found.labels
            write_nifti(path, labels, grid, scan.nifti)
        else:
            series = scan.series
            if series is None:
                raise ConfigError(f"{scan.name}: a DICOM SEG needs a DICOM series as input; choose --format nifti.")
            model = _joint([each.sha256 for each in predictor.models])
            write_dicom_seg(path, found.labels, grid, series, predictor.plan.task.classes, model, version)
        outputs[path.name] = _sha256(path)
    if found.uncertainty is not None:
        path = order.out / f"{scan.name}_uncertainty.nii.gz"
        write_nifti(path, found.uncertainty, grid, scan.nifti)
        outputs[path.name] = _sha256(path)
    record = {
        "name": scan.name,
        "volumes_ml": found.volumes_ml,
        "seconds": round(time.monotonic() - began, 2),
        "outputs": outputs,
        "notes": notes,
        "made_from": made_from,
    }
    write_json(record_path, record)
    return {**record, "state": "done"}


def _kept(path: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of whole outputs that were made in the same way, or None."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        same = record["made_from"] == json.loads(json.dumps(made_from))
        whole = same and all(_sha256(path.parent / name) == value for name, value in record["outputs"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole and isinstance(record, dict) else None


def _joint(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("|".join(hashes).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
