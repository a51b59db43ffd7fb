"""Import scans into the one layout that a site trains on: list first, then convert, one scan after another.

The folder that results::

    images/<case>.nii.gz        with several channels <case>_0000.nii.gz, <case>_0001.nii.gz, ...
    labels/<case>.nii.gz
    manifest.json               pseudonyms, geometry, checksums; no name, date, UID or path
    private/                    key of the pseudonyms, and for each case what it was made from; never to be passed on
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from intake.candidates import Candidate, Listing, Source
from intake.conversion import convert
from intake.files import detached
from intake.guards import LIMITS, Limits, Worker, shown
from intake.manifest import FILE_NAME, CaseRecord, ChannelRecord, LabelRecord, Manifest
from intake.pseudonyms import Pseudonyms, key_at
from intake.volume import IntakeError
from semisam_core.configuration import StrictModel
from semisam_core.files import write_atomically, write_json
from semisam_core.progress import ProgressCallback

PRIVATE, KEY, RECORDS, LOCK = "private", "pseudonyms.key", "records", "lock"
IMAGES, LABELS = "images", "labels"
FULL_BYTES = 64 << 20  # with less than this free, a failed scan means a full disk
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}")  # of a write that was killed
PARTIAL = ("refuse", "crop")

Stamps = tuple[tuple[str, int, int], ...]


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


class Record(StrictModel):
    """What is kept of one imported scan. Identifying: it stays in the private folder.

    Attributes:
        manifest: its entry in the manifest.
        stamps: path, size and time of change of every source file.
        remarks: sentences.
        sizes: bytes of every file that was written, by its name in the folder.
        made_from: the candidate.
    """

    manifest: CaseRecord
    stamps: tuple[tuple[str, int, int], ...]
    remarks: tuple[str, ...]
    sizes: dict[str, int]
    made_from: Candidate


class Import:
    """Imports scans into a folder. It can be stopped and started again at any time; nothing finished is done twice.

    Args:
        folder: the site's working folder.
        settings: how scans are converted.
        limits: what one scan may cost.

    Raises:
        IntakeError: the key is damaged, or not the one that the folder's pseudonyms were made with.
    """

    def __init__(self, folder: Path, settings: Settings, limits: Limits = LIMITS) -> None:
        self.folder, self._settings, self._limits = folder, settings, limits
        self._private = folder / PRIVATE
        self._private.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._private.chmod(0o700)
        with self._locked():
            self.pseudonyms = self._named(settings.key or self._private / KEY)

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
        with self._locked():
            self._sweep()
            try:
                with contextlib.nullcontext(worker) if worker else Worker(convert, self._limits) as reader:
                    for done, candidate in enumerate(listing.candidates):
                        if progress:
                            progress(done, len(listing.candidates))
                        outcomes.append(self._one(candidate, reader))
                        if outcomes[-1].state == "failed":
                            self._check_disk()
                if progress:
                    progress(len(listing.candidates), len(listing.candidates))
            finally:
                self.write_manifest()
        return outcomes

    def write_manifest(self) -> None:
        """Write the manifest of all scans imported so far."""
        manifest = Manifest(cases=tuple(each.manifest for each in self._kept() if self._is_whole(each)))
        write_json(self.folder / FILE_NAME, manifest.model_dump(mode="json"))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other imports out of this folder; the system lets go of the lock whatever ends the process."""
        with os.fdopen(os.open(self._private / LOCK, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise IntakeError(f"{self.folder}: another import into this folder is running.") from None
            yield

    def _named(self, key: Path) -> Pseudonyms:
        """Return the pseudonyms of a key; another than that of the scans already here would name each a second time."""
        kept = list(self._kept())
        if not kept or key.exists():
            pseudonyms = Pseudonyms(key_at(key))
            if all(pseudonyms.case(each.made_from.patient, each.made_from.scan) == each.manifest.case for each in kept):
                return pseudonyms
        raise IntakeError(
            f"{key}: the scans in {self.folder} were imported with another key, and each would be there twice. Restore "
            "that key, or import into another folder."
        )

    def _sweep(self) -> None:
        for folder in (self.folder, self.folder / IMAGES, self.folder / LABELS, self._private, self._private / RECORDS):
            for path in folder.glob(".*") if folder.is_dir() else ():
                if _LEFTOVER.fullmatch(path.name) and path.is_file():
                    path.unlink(missing_ok=True)

    def _check_disk(self) -> None:
        if shutil.disk_usage(self.folder).free < FULL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))

    def _one(self, candidate: Candidate, worker: Worker) -> Outcome:
        case = ""
        try:
            case = self.pseudonyms.case(candidate.patient, candidate.scan)
            kept = self._record(case)
            if kept is not None and _identity(kept.made_from) != _identity(candidate):
                raise IntakeError("two scans would get one pseudonym; import them with another key.")
            stamps = _stamps(candidate)
            if kept is not None and self._is_current(kept, candidate, stamps):
                return Outcome(case, candidate.scan, "unchanged", kept.manifest.label is not None, kept.remarks)
            source = self._source(candidate)
            answer = worker.call(self._request(candidate, case))
            remarks = [*candidate.notes, *answer["notes"]]
            if answer["without_label"]:
                remarks.append(f"taken without its label: {answer['without_label']}")
            entry = self._case_record(candidate, case, source, answer)
            self._keep(Record(**self._written(entry), stamps=stamps, remarks=tuple(remarks), made_from=candidate))
        except (IntakeError, OSError, ValidationError) as error:
            if case:
                self._drop_if_torn(case)
            return Outcome(case, candidate.scan, "failed", False, (*candidate.notes, _sentence(error)))
        state = "new" if kept is None else "changed"
        return Outcome(case, candidate.scan, state, entry.label is not None, tuple(remarks))

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
                file=f"{IMAGES}/{self._image_file(case, k, len(candidate.channels)).name}",
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
            file=f"{LABELS}/{case}.nii.gz",
            sha256=found["sha256"],
            classes={int(k): v for k, v in found["classes"].items()},
        )
        patient = self.pseudonyms.patient(candidate.patient)
        return CaseRecord(
            case=case, patient=patient, channels=channels, label=label, source=source, settings=self._settings.digest
        )

    def _image_file(self, case: str, channel: int, channels: int) -> Path:
        number = f"_{channel:04d}" if channels > 1 else ""
        return self.folder / IMAGES / f"{case}{number}.nii.gz"

    def _label_file(self, case: str) -> Path:
        return self.folder / LABELS / f"{case}.nii.gz"

    def _source(self, candidate: Candidate) -> str:
        """Return the keyed hash of the content of all source files."""
        hashes = []
        for path in _paths(candidate):
            hashes.append(_sha256(Path(path)))
        return self.pseudonyms.digest("source", *hashes, *(each.series for each in _sources(candidate)))

    def _is_current(self, kept: Record, candidate: Candidate, stamps: Stamps) -> bool:
        """Return whether a record's files are whole, and source and settings are those that they were made with."""
        if not self._is_whole(kept) or kept.manifest.settings != self._settings.digest:
            return False
        return kept.stamps == stamps or kept.manifest.source == self._source(candidate)

    def _is_whole(self, kept: Record) -> bool:
        """Return whether the files that a record names are there, in the size that they had."""
        for name, size in kept.sizes.items():
            try:
                if (self.folder / name).stat().st_size != size:
                    return False
            except OSError:
                return False
        return True

    def _written(self, entry: CaseRecord) -> dict[str, Any]:
        return {
            "manifest": entry,
            "sizes": {name: (self.folder / name).stat().st_size for name, _ in _checksums(entry)},
        }

    def _keep(self, record: Record) -> None:
        """Write a record, and remove files of the case that it no longer has: a label, or other channels."""
        case = record.manifest.case
        write_atomically(self._record_file(case), record.model_dump_json(indent=1).encode(), 0o600)
        for folder in (IMAGES, LABELS):
            for path in (self.folder / folder).glob(f"{case}*"):
                if f"{folder}/{path.name}" not in record.sizes:
                    path.unlink(missing_ok=True)

    def _drop_if_torn(self, case: str) -> None:
        """Remove a case after a failed try, unless its record is there and no file of it was written anew."""
        kept = self._record(case)
        if kept is not None and all(_sha256(self.folder / file) == sha for file, sha in _checksums(kept.manifest)):
            return
        written = [path for folder in (IMAGES, LABELS) for path in (self.folder / folder).glob(f"{case}*")]
        for path in (self._record_file(case), *written):
            with contextlib.suppress(OSError):
                path.unlink()

    def _record_file(self, case: str) -> Path:
        return self._private / RECORDS / f"{case}.json"

    def _record(self, case: str) -> Record | None:
        try:
            return Record.model_validate_json(self._record_file(case).read_bytes(), strict=False)
        except (OSError, ValidationError):
            return None

    def _kept(self) -> Iterator[Record]:
        for path in sorted((self._private / RECORDS).glob("*.json")):
            if (record := self._record(path.stem)) is not None and record.manifest.case == path.stem:
                yield record


def check_apart(source: Path, folder: Path) -> None:
    """Check that an import writes nothing into its source, and reads nothing that it wrote.

    Raises:
        IntakeError: one folder lies in the other.
    """
    whence, into = source.resolve(), folder.resolve()
    if whence.is_dir() and into.is_relative_to(whence):
        raise IntakeError(f"{folder}: it lies in {source}, which is never written to; choose a folder elsewhere.")
    if any(whence.is_relative_to(into / part) for part in (IMAGES, LABELS, PRIVATE)):
        raise IntakeError(f"{source}: it lies in {folder}, where imported scans are; choose another folder.")


def _sources(candidate: Candidate) -> list[Source]:
    return [*candidate.channels, *((candidate.label,) if candidate.label else ())]


def _identity(candidate: Candidate) -> tuple[str, str]:
    return candidate.patient, candidate.scan


def _paths(candidate: Candidate) -> list[str]:
    """Return all files of a scan, those that hold the voxels of a header included."""
    named = dict.fromkeys(path for source in _sources(candidate) for path in source.paths)
    return [str(file) for path in named for file in (path, *detached(Path(path)))]


def _stamps(candidate: Candidate) -> Stamps:
    """Return path, size and time of change of every source file."""
    found = [(path, os.stat(path)) for path in _paths(candidate)]
    return tuple((path, status.st_size, status.st_mtime_ns) for path, status in found)


def _checksums(entry: CaseRecord) -> list[tuple[str, str]]:
    return [(each.file, each.sha256) for each in (*entry.channels, *((entry.label,) if entry.label else ()))]


def _sha256(path: Path) -> str:
    """Return the hash of a file's content; that of nothing if the file is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return hashlib.sha256().hexdigest()


def _sentence(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    return f"it cannot be recorded: {shown('.'.join(map(str, first['loc'])), 80)}: {shown(first['msg'])}."
