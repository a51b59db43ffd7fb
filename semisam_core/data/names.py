"""Names of scan and label files: which case a name stands for, and which names look alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable

SUFFIXES = (".nii.gz", ".nii")
LABEL_ENDING = "_seg"
CHANNEL_ZERO = "_0000"
_CHANNEL = re.compile(r"_[0-9]{4}$")
_ENDINGS = re.compile(r"([._ -](seg|segmentation|labels?|mask|gt|bak|copy|old|orig|image|img|0000)|~| \([0-9]+\))$")
_FORMATS = (*SUFFIXES, ".nrrd", ".seg.nrrd", ".mha", ".mhd", ".img", ".hdr", ".gz", ".zip", ".bak", ".old", ".orig")


def nifti_suffix(name: str) -> str | None:
    """Return a NIfTI file's suffix as it is written, such as ".nii.gz" or ".NII.GZ"; None for another file."""
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[-len(suffix) :]
    return None


def case_name(name: str) -> str:
    """Return a name in composed Unicode (NFC). File names from macOS may be decomposed; typed names are composed."""
    return unicodedata.normalize("NFC", name)


def one_channel_id(stem: str, stems: Collection[str], named: Collection[str]) -> str:
    """Return the case id of a one-channel image.

    nnU-Net's `_0000` is dropped if it can only be a channel number. It stays if another image has the same name without
    it or with another number (then numbers distinguish cases), or if a label or the site's YAML uses the name with it.

    Args:
        stem: the image's name without suffix.
        stems: names of all images.
        named: names of all labels, and all names in the site's lists.
    """
    base = stem.removesuffix(CHANNEL_ZERO)
    if base in ("", stem) or stem in named or stem + LABEL_ENDING in named or base in stems:
        return stem
    numbered = any(other != stem and _CHANNEL.sub("", other) == base for other in stems)
    return stem if numbered else base


def look_alikes(name: str, others: Iterable[str]) -> list[str]:
    """Return the names that differ from `name` only in capitals, a common ending, or the format of the file."""
    wanted = _core(name)
    return [other for other in others if other != name and _core(other) == wanted]


def _core(name: str) -> str:
    core = unicodedata.normalize("NFKC", name).casefold().strip()
    while True:
        shorter = core
        for suffix in _FORMATS:
            shorter = shorter.removesuffix(suffix)
        shorter = _ENDINGS.sub("", shorter).strip()
        if shorter in ("", core):
            return core
        core = shorter
