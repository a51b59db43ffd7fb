"""Which patient each case is of, by an import's manifest, and on which side of a split each patient is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from semisam_core.data.names import case_name
from semisam_core.errors import ConfigError

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 64 * 2**20  # bytes; 100,000 cases of four channels take 50 MB
Pseudonym = Annotated[str, Field(min_length=1, max_length=200)]


class _CaseLine(BaseModel):
    """What matters here of a case; an import writes more."""

    model_config = ConfigDict(extra="ignore", strict=True)
    case: Pseudonym
    patient: Pseudonym


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    version: Literal[1]
    cases: list[_CaseLine]


def read_patients(images: Path) -> dict[str, str] | None:
    """Return case -> patient from the manifest beside a folder of images, or None if there is no manifest.

    Raises:
        ConfigError: the manifest cannot be read, is too large, no manifest of this version, or names a case twice.
    """
    path = images.parent / MANIFEST
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_MANIFEST + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: the manifest cannot be read ({error.strerror}).") from None
    if len(content) > LARGEST_MANIFEST:
        raise ConfigError(f"{path}: the manifest is larger than {LARGEST_MANIFEST >> 20} MB, which none is.")
    found: dict[str, str] = {}
    for line in _parse(path, content).cases:
        if found.setdefault(case_name(line.case), line.patient) != line.patient:
            raise ConfigError(f"{path}: the case {line.case!a} is there twice, with two patients; import again.")
    return found


def on_validation_side(patient: str, share: float, seed: int) -> bool:
    """Return whether a patient is for validation: by a hash of the pseudonym alone, so that no other patient matters.

    Args:
        patient: the pseudonym.
        share: the share of patients for validation; of few patients, the real share may be some way off.
        seed: the split's seed.
    """
    return _draw("validation", patient, seed) < share


def labeled_first(patients: Iterable[str], seed: int) -> list[str]:
    """Return patients in the order in which a split makes them labeled."""
    return sorted(patients, key=lambda patient: (_draw("labeled", patient, seed), patient))


def patients_on_both_sides(sides: Mapping[str, bool], patients: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return patient -> a case for training and a case for validation, of every patient who has both.

    Args:
        sides: case -> whether it is for validation.
        patients: case -> patient.
    """
    training, validation = (
        {patients[case]: case for case in sorted(sides, reverse=True) if sides[case] is side and case in patients}
        for side in (False, True)
    )
    return {patient: (training[patient], validation[patient]) for patient in sorted(set(training) & set(validation))}


def _draw(purpose: str, patient: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on these alone."""
    digest = hashlib.sha256(json.dumps([purpose, seed, patient]).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _parse(path: Path, content: bytes) -> _Manifest:
    try:
        parsed: Any = json.loads(content)
        return _Manifest.model_validate(parsed)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(each) for each in first["loc"])[:80] or "the whole"
        raise ConfigError(f"{path}: {place}: {first['msg']}; expected is what `semisam import` writes.") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: the manifest is not JSON; import again, or remove it.") from None
