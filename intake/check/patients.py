"""Which cases are of one patient: what the import wrote down, and what names suggest."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from semisam_core.data.names import case_name

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 64_000_000  # bytes
_LAST_PART = re.compile(r"[-_. ][^-_. ]+$")


def read_patients(images: Path) -> tuple[dict[str, str], str | None]:
    """Read which patient each case is of from the import's manifest, beside the images or beside their folder.

    Only `case` and `patient` of each entry are looked at; entries without both are skipped, and so are other keys.

    Args:
        images: the folder of images.

    Returns:
        The patient of each case, and why a manifest that is there could not be read (None if it was, or there is none).
    """
    for path in (images / MANIFEST, images.parent / MANIFEST):
        if path.is_file():
            return _read(path)
    return {}, None


def _read(path: Path) -> tuple[dict[str, str], str | None]:
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            return {}, f"{path} is larger than {LARGEST_MANIFEST // 1_000_000} MB"
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path} cannot be read ({error})"
    entries = content.get("cases") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        return {}, f"{path} has no list of cases"
    return patients_of(entries), None


def patients_of(entries: Collection[Any]) -> dict[str, str]:
    """Return the patient of each case from a manifest's entries."""
    found = {}
    for entry in entries:
        case, patient = (entry.get(key) for key in ("case", "patient")) if isinstance(entry, dict) else (None, None)
        if isinstance(case, str) and isinstance(patient, str) and case and patient:
            found[case_name(case)] = patient
    return found


def name_groups(names: Collection[str]) -> dict[str, list[str]]:
    """Return cases whose names differ only in their last part, where that suggests one patient: by the common part.

    `patient007_frame01` and `patient007_frame12` are a group. A common part without a digit names a data set rather
    than a patient (`la_001`), and so does one that all cases share (`atrium2018_001`).

    >>> name_groups(["patient007_a", "patient007_b", "patient008_a", "la_001", "la_002"])
    {'patient007': ['patient007_a', 'patient007_b']}
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        common = _LAST_PART.sub("", name)
        if common != name and re.search(r"[0-9]", common):
            groups.setdefault(common, []).append(name)
    return {common: group for common, group in groups.items() if 1 < len(group) < len(names)}


def by_patient(cases: Collection[str], patients: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the cases of each patient."""
    groups: dict[str, list[str]] = {}
    for case in sorted(cases):
        if case in patients:
            groups.setdefault(patients[case], []).append(case)
    return groups
