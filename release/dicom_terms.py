"""What DICOM calls a structure: its own coded term where the name is one, else a private code."""

from __future__ import annotations

import hashlib
from typing import Any

import highdicom as hd
from pydicom.sr.codedict import codes

SCHEME = "99FEDSEMISAM"
_LONGEST_VALUE, _LONGEST_MEANING = 16, 64  # characters, of DICOM's value representations SH and LO


def terms_of(name: str) -> tuple[Any, Any]:
    """Return the category and the type of a segment.

    Terms are looked up in DICOM's lists of what a segment may be (context groups 7192, 7194, 7191 and 7193), and not in
    all of SNOMED: "anterior" is a term there, but of a direction.

    Args:
        name: the class in the plan, such as `left-atrium`.
    """
    term = "".join(part[:1].upper() + part[1:] for part in name.replace("_", "-").split("-"))
    for group, category in (
        (codes.cid7192, codes.SCT.AnatomicalStructure),
        (codes.cid7194, codes.SCT.MorphologicallyAbnormalStructure),
        (codes.cid7191, codes.SCT.Tissue),
        (codes.cid7193, codes.SCT.PhysicalObject),
    ):
        if term in group.concepts:
            return category, group.concepts[term]
    value = name if len(name) <= _LONGEST_VALUE else hashlib.sha256(name.encode()).hexdigest()[:_LONGEST_VALUE]
    return codes.SCT.Tissue, hd.sr.CodedConcept(value=value, scheme_designator=SCHEME, meaning=name[:_LONGEST_MEANING])
