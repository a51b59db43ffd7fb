"""Import scans into the one layout that a site trains on: list first, then convert, one scan after another.

The folder that results::

    images/<case>.nii.gz        with several channels <case>_0000.nii.gz, <case>_0001.nii.gz, ...
    labels/<case>.nii.gz
    manifest.json               pseudonyms, geometry, checksums; no name, date, UID or path
    private/                    key of the pseudonyms, and for each case what it was made from; never to be passed on
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intake.candidates import Candidate, Listing, Source
from intake.conversion import convert
from intake.guards import LIMITS, Limits, Worker
from intake.manifest import FILE_NAME, CaseRecord, ChannelRecord, LabelRecord, Manifest
from intake.pseudonyms import Pseudonyms, key_at
from intake.volume import IntakeError
from semisam_core.files import write_atomically, write_json
from semisam_core.progress import ProgressCallback

PRIVATE, KEY, RECORDS = "private", "pseudonyms.key", "records"
PARTIAL = ("refuse", "crop")


@dataclass(frozen=True)
class Settings:
    """How scans are converted.

    Attributes:
        classes: name -> value of the label's structures; None keeps a label as it is.
        spacing_mm: voxel size, for h5 files.
        partial_labels: what happens to a label of a part of its scan: `refuse` it, or `crop` the scan.
        key: file with the key of pseudonyms; None for the folder's own.
    """

    classes: Mapping[str, int] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    partial_labels: str = "refuse"
    key: Path | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of everything that changes what is written."""
        parts = [dict(self.classes) if self.classes is not None else None, self.spacing_mm, self.partial_labels]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What became of one scan.

    Attributes:
        case: its pseudonym.
        scan: what the layout calls it; identifying.
        state: new, changed (the source or the settings have), unchanged, or failed.
        labeled: whether it has a label here.
        remarks: sentences: notes, why there is no label, or why it failed.
    """

    case: str
    scan: str
    state: str
    labeled: bool
    remarks: tuple[str, ...]


class Import:
    """Imports scans into a folder. It can be stopped and started again at any time; nothing finished is done twice.

    Args:
        folder: the site's working folder.
        settings: how scans are converted.
        limits: what one scan may cost.
    """

    def __init__(self, folder: Path, settings: Settings, limits: Limits = LIMITS) -> None:
        self.folder, self._settings, self._limits = folder, settings, limits
        self._private = folder / PRIVATE
        self._private.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._private.chmod(0o700)
        self.pseudonyms = Pseudonyms(key_at(settings.key or self._private / KEY))

    def run(
        self, listing: Listing, progress: ProgressCallback | None = None, worker: Worker | None = None
    ) -> list[Outcome]:
        """Import every candidate, and write the manifest even if stopped in between.

        Args:
            listing: what a layout found.
            progress: called with (scans done, scans).
            worker: one of `convert` that is running already; by default one is started and ended.
        """
        outcomes = []
        try:
            with contextlib.nullcontext(worker) if worker else Worker(convert, self._limits) as reader:
                for done, candidate in enumerate(listing.candidates):
                    if progress:
                        progress(done, len(listing.candidates))
                    outcomes.append(self._one(candidate, reader))
            if progress:
                progress(len(listing.candidates), len(listing.candidates))
        finally:
            self.write_manifest()
        return outcomes

    def write_manifest(self) -> None:
        """Write the manifest of all scans imported so far."""
        records = [record["manifest"] for record in self._records()]
        manifest = Manifest(cases=tuple(CaseRecord.model_validate(each, strict=False) for each in records))
        write_json(self.folder / FILE_NAME, manifest.model_dump(mode="json"))

    def _one(self, candidate: Candidate, worker: Worker) -> Outcome:
        case = self.pseudonyms.case(candidate.patient, candidate.scan)
        kept = self._record(case)
        state = "new" if kept is None else "changed"
        try:
            stamps = _stamps(candidate)
            if kept is not None and self._is_current(kept, candidate, stamps):
                labeled = kept["manifest"]["label"] is not None
                return Outcome(case, candidate.scan, "unchanged", labeled, tuple(kept["remarks"]))
            source = self._source(candidate)
            answer = worker.call(self._request(candidate, case))
        except (IntakeError, OSError) as error:
            return Outcome(case, candidate.scan, "failed", False, (*candidate.notes, str(error)))
        remarks = [*candidate.notes, *answer["notes"]]
        if answer["without_label"]:
            remarks.append(f"taken without its label: {answer['without_label']}")
        if answer["label"] is None:
            self._label_file(case).unlink(missing_ok=True)
        record = self._case_record(candidate, case, source, answer)
        self._keep(case, {"manifest": record.model_dump(mode="json"), "stamps": stamps, "remarks": remarks}, candidate)
        return Outcome(case, candidate.scan, state, record.label is not None, tuple(remarks))

    def _request(self, candidate: Candidate, case: str) -> dict[str, Any]:
        settings = self._settings
        return {
            "channels": [each.model_dump(mode="json") for each in candidate.channels],
            "label": candidate.label.model_dump(mode="json") if candidate.label else None,
            "images": [str(self._image_file(case, k, len(candidate.channels))) for k in range(len(candidate.channels))],
            "label_file": str(self._label_file(case)),
            "classes": dict(settings.classes) if settings.classes is not None else None,
            "spacing_mm": settings.spacing_mm,
            "partial_labels": settings.partial_labels,
        }

    def _case_record(self, candidate: Candidate, case: str, source: str, answer: dict[str, Any]) -> CaseRecord:
        channels = tuple(
            ChannelRecord(
                file=f"images/{self._image_file(case, k, len(candidate.channels)).name}",
                sha256=written["sha256"],
                modality=origin.modality,
                series=self.pseudonyms.digest("series", origin.series),
                shape=tuple(written["shape"]),
                spacing_mm=tuple(written["spacing_mm"]),
            )
            for k, (origin, written) in enumerate(zip(candidate.channels, answer["channels"], strict=True))
        )
        found = answer["label"]
        label = found and LabelRecord(
            file=f"labels/{case}.nii.gz",
            sha256=found["sha256"],
            classes={int(k): v for k, v in found["classes"].items()},
        )
        patient = self.pseudonyms.patient(candidate.patient)
        return CaseRecord(
            case=case, patient=patient, channels=channels, label=label, source=source, settings=self._settings.digest
        )

    def _image_file(self, case: str, channel: int, channels: int) -> Path:
        number = f"_{channel:04d}" if channels > 1 else ""
        return self.folder / "images" / f"{case}{number}.nii.gz"

    def _label_file(self, case: str) -> Path:
        return self.folder / "labels" / f"{case}.nii.gz"

    def _source(self, candidate: Candidate) -> str:
        """Return the keyed hash of the content of all source files."""
        hashes = []
        for path in _paths(candidate):
            with Path(path).open("rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
        return self.pseudonyms.digest("source", *hashes, *(each.series for each in _sources(candidate)))

    def _is_current(self, kept: dict[str, Any], candidate: Candidate, stamps: list[list[Any]]) -> bool:
        """Return whether a record's files are whole, and source and settings are those that they were made with."""
        entry = kept["manifest"]
        if not self._is_whole(kept) or entry["settings"] != self._settings.digest:
            return False
        return bool(kept["stamps"] == stamps or entry["source"] == self._source(candidate))

    def _is_whole(self, kept: dict[str, Any]) -> bool:
        """Return whether the files that a record names are there, in the size that they had."""
        for name, size in kept["sizes"].items():
            try:
                if (self.folder / name).stat().st_size != size:
                    return False
            except OSError:
                return False
        return True

    def _keep(self, case: str, record: dict[str, Any], candidate: Candidate) -> None:
        entry = record["manifest"]
        names = [each["file"] for each in entry["channels"]] + ([entry["label"]["file"]] if entry["label"] else [])
        sizes = {name: (self.folder / name).stat().st_size for name in names}
        content = {**record, "sizes": sizes, "made_from": candidate.model_dump(mode="json")}
        write_atomically(self._private / RECORDS / f"{case}.json", json.dumps(content, indent=1).encode(), 0o600)

    def _record(self, case: str) -> dict[str, Any] | None:
        try:
            found = json.loads((self._private / RECORDS / f"{case}.json").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else None
        except (OSError, ValueError):
            return None

    def _records(self) -> Iterator[dict[str, Any]]:
        for path in sorted((self._private / RECORDS).glob("*.json")):
            if (record := self._record(path.stem)) is not None and self._is_whole(record):
                yield record


def _sources(candidate: Candidate) -> list[Source]:
    return [*candidate.channels, *((candidate.label,) if candidate.label else ())]


def _paths(candidate: Candidate) -> list[str]:
    return list(dict.fromkeys(path for source in _sources(candidate) for path in source.paths))


def _stamps(candidate: Candidate) -> list[list[Any]]:
    """Return path, size and time of change of every source file."""
    found = [(path, os.stat(path)) for path in _paths(candidate)]
    return [[path, status.st_size, status.st_mtime_ns] for path, status in found]
