"""Segment many scans: what is done is kept, what fails is told, and the rest goes on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from intake.guards import shown
from release.dicom_seg import check_referable, write_dicom_seg
from release.inputs import MAPS, Input, maps_of
from release.outputs import default_format, write_nifti
from release.prediction import Predictor, Segmentation
from release.reading import ScanReader
from semisam_core import __version__
from semisam_core.data.geometry import Geometry
from semisam_core.errors import ConfigError, SemiSAMError
from semisam_core.files import write_json
from semisam_core.progress import ProgressCallback

FORMATS = ("auto", "nifti", "dicom-seg", "both")
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@dataclass(frozen=True)
class Order:
    """What to write.

    Attributes:
        out: folder of the outputs.
        format: nifti, dicom-seg, both; auto gives DICOM SEG for DICOM and NIfTI for everything else.
        uncertainty: whether to write maps of it too (always NIfTI).
        spacing_mm: voxel size, for h5 files.
        memory_gb: memory that one scan may take; None for no limit.
    """

    out: Path
    format: str = "auto"
    uncertainty: bool = False
    spacing_mm: tuple[float, float, float] | None = None
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        """Check the format.

        Raises:
            ConfigError: it is unknown.
        """
        if self.format not in FORMATS:
            raise ConfigError(f"--format {self.format}: accepted are {', '.join(FORMATS)}.")


def predict_all(
    predictor: Predictor,
    inputs: Sequence[Input],
    order: Order,
    progress: ProgressCallback | None = None,
    reader: ScanReader | None = None,
) -> list[dict[str, Any]]:
    """Segment every scan and write its outputs, and beside them `<name>.json`, which says how they were made.

    A scan whose outputs were made before from the same files by the same models is not segmented again. One that fails,
    for whatever reason, is recorded and stops no other.

    Args:
        predictor: the models.
        inputs: the scans.
        order: what to write.
        progress: called with (scans done, scans).
        reader: one that is running already; by default one with the order's limits is started and ended.

    Returns:
        For each scan its record: name, state (done, kept or failed), volumes_ml, seconds, outputs, notes; or the error.

    Raises:
        ConfigError: outputs would lie among the scans, or two scans would have the same outputs.
        OSError: nothing can be written to the folder any more, so going on would be in vain.
    """
    _check_places(inputs, order.out)
    order.out.mkdir(parents=True, exist_ok=True)
    if not os.access(order.out, os.W_OK):
        raise ConfigError(f"{order.out}: this folder cannot be written to; choose another one.")
    records = []
    own = nullcontext(reader) if reader else ScanReader(order.spacing_mm, order.memory_gb)
    with own as reading:
        for done, scan in enumerate(inputs):
            if progress:
                progress(done, len(inputs))
            records.append(_tried(predictor, scan, order, reading))
    if progress:
        progress(len(inputs), len(inputs))
    return records


def as_table(records: Sequence[Mapping[str, Any]], left_out: Sequence[tuple[str, str]]) -> Table:
    """Return what became of each scan, and what was left out, for people."""
    table = Table(box=None, header_style="bold", show_edge=False)
    for column in ("scan", "state", "ml", "files"):
        table.add_column(column, overflow="fold")
    for each in records:
        found = ", ".join(f"{name} {ml:g}" for name, ml in each.get("volumes_ml", {}).items())
        files = ", ".join(each.get("outputs", {})) or each.get("error", "")
        table.add_row(*(escape(text) for text in (each["name"], each["state"], found, files)))
    for what, reason in left_out:
        table.add_row(escape(what), "left out", "", escape(reason))
    return table


def _check_places(inputs: Sequence[Input], out: Path) -> None:
    folders = {
        Path(path).resolve().parent for scan in inputs for each in scan.candidate.channels for path in each.paths
    }
    if out.resolve() in folders:
        raise ConfigError(f"{out}: the scans lie in this folder, and outputs have their names; choose another one.")
    names = Counter(
        name.casefold() for scan in inputs for name in (scan.name, *(f"{scan.name}_{each}" for each in MAPS))
    )
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise ConfigError(f"{out}: two scans would have outputs of the same name, {twice[0]!a}; rename one of them.")


def _tried(predictor: Predictor, scan: Input, order: Order, reader: ScanReader) -> dict[str, Any]:
    """Return a scan's record, or why there is none."""
    try:
        return _one(predictor, scan, order, reader)
    except SemiSAMError as error:
        reason = str(error)
    except Exception as error:  # networks and writers raise many kinds; the other scans go on
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        reason = f"{scan.name}: {type(error).__name__}: {shown(error)}"
    return {"name": scan.name, "state": "failed", "error": reason}


def _one(predictor: Predictor, scan: Input, order: Order, reader: ScanReader) -> dict[str, Any]:
    began = time.monotonic()
    formats = {"auto": (default_format(scan),), "both": ("nifti", "dicom-seg")}.get(order.format, (order.format,))
    if "dicom-seg" in formats:
        if scan.series is None:
            raise ConfigError(f"{scan.name}: a DICOM SEG needs a DICOM series as input; choose --format nifti.")
        check_referable(scan.series)
    made_from = {
        "models": [each.sha256 for each in predictor.models],
        "plans": [each.plan.hash for each in predictor.models],
        "input": scan.sha256,
        "formats": list(formats),
        "maps": list(maps_of(len(predictor.models))) if order.uncertainty else [],
        "spacing_mm": order.spacing_mm,
        "version": __version__,
    }
    record_path = order.out / f"{scan.name}.json"
    if (kept := _kept(record_path, made_from)) is not None:
        return {**kept, "state": "kept"}
    stack, grid, notes = reader.read(scan)
    found = predictor.segment(stack, grid, scan.name, order.uncertainty, order.memory_gb)
    outputs = _write(predictor, scan, order.out, formats, grid, found)
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


def _write(
    predictor: Predictor, scan: Input, out: Path, formats: Sequence[str], grid: Geometry, found: Segmentation
) -> dict[str, str]:
    """Write a scan's outputs; return file name -> hash."""
    (out / f"{scan.name}.json").unlink(missing_ok=True)  # from here on it would not fit what lies beside it
    written = []
    for kind in formats:
        if kind == "nifti":
            written.append(out / f"{scan.name}.nii.gz")
            write_nifti(written[-1], found.labels, grid, scan.nifti)
        elif scan.series is not None:
            written.append(out / f"{scan.name}.dcm")
            models = [each.sha256 for each in predictor.models]
            write_dicom_seg(written[-1], found.labels, grid, scan.series, predictor.plan.task, models)
    for name, each in found.maps.items():
        written.append(out / f"{scan.name}_{name}.nii.gz")
        write_nifti(written[-1], each, grid, scan.nifti)
    return {path.name: _sha256(path) for path in written}


def _kept(path: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of whole outputs that were made in the same way, or None."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        same = record["made_from"] == json.loads(json.dumps(made_from))
        whole = same and all(_sha256(path.parent / name) == value for name, value in record["outputs"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole and isinstance(record, dict) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
