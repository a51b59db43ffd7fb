"""The manifest of an imported folder: which scans there are, by pseudonym. It holds no name, date, UID or path."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from intake.guards import read_json, shown
from intake.volume import IntakeError
from semisam_core.configuration import StrictModel

FILE_NAME = "manifest.json"
LONGEST_NAME, LONGEST_MODALITY = 64, 32
_HASH = r"^[0-9a-f]{64}$"
_PSEUDONYM = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"


def _within(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or len(path.parts) != 2 or path.parts[0] not in ("images", "labels") or ".." in path.parts:
        raise ValueError("a file in images/ or labels/ is expected")
    return value


FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]{0,199}$"), AfterValidator(_within)]
Hash = Annotated[str, Field(pattern=_HASH)]
Side = Annotated[int, Field(ge=1, le=1_000_000)]
Sides = tuple[Side, Side, Side]
Lengths = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class ChannelRecord(StrictModel):
    """One image file: its checksum, modality, keyed hash of the series it came from, and geometry."""

    file: FileName
    sha256: Hash
    modality: Annotated[str, Field(max_length=LONGEST_MODALITY)]
    series: Hash
    shape: Sides
    spacing_mm: Lengths


class LabelRecord(StrictModel):
    """The label file, and which classes it marks: value -> name, empty where names are unknown."""

    file: FileName
    sha256: Hash
    classes: dict[Annotated[int, Field(ge=1, le=65535)], Annotated[str, Field(max_length=LONGEST_NAME)]]


class CaseRecord(StrictModel):
    """One scan. `source` is the keyed hash of what it was made from, `settings` of how."""

    case: Annotated[str, Field(pattern=_PSEUDONYM)]
    patient: Annotated[str, Field(pattern=_PSEUDONYM)]
    channels: Annotated[tuple[ChannelRecord, ...], Field(min_length=1)]
    label: LabelRecord | None
    source: Hash
    settings: Hash


class Manifest(StrictModel):
    """All scans of an imported folder, by case."""

    version: Literal[1] = 1
    cases: tuple[CaseRecord, ...]

    @model_validator(mode="after")
    def _named_once(self) -> Manifest:
        names = [each.case for each in self.cases]
        files = [channel.file for each in self.cases for channel in each.channels]
        if len(set(names)) < len(names) or len(set(files)) < len(files):
            raise ValueError("a case or file is listed twice")
        return self

    def patient_of(self, case: str) -> str:
        """Return a case's patient.

        Raises:
            KeyError: there is no such case.
        """
        return {each.case: each.patient for each in self.cases}[case]


def read_manifest(path: Path) -> Manifest:
    """Read a manifest, whoever wrote it.

    Raises:
        IntakeError: it is none; the message says where.
    """
    content = read_json(path)
    try:
        return Manifest.model_validate(content, strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise IntakeError(f"{path.name!a}: {shown(place, 80)}: {shown(first['msg'])}.") from None
