"""Which cases are of one patient: what the import wrote down, and what names suggest."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_LAST_PART = re.compile(r"[-_. ][^-_. ]+$")


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
