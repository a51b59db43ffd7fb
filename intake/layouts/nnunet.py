"""nnU-Net's raw layout: dataset.json, imagesTr with `_0000` for each channel, labelsTr, imagesTs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from intake.candidates import Listing, Wishes
from intake.guards import inside, read_json, shown
from intake.layouts.paired import _volumes, left_out, paired
from intake.volume import IntakeError

NAME = "nnunet"
DESCRIPTION = "dataset.json"
MOST_CHANNELS = 100
_FOLDERS = ("imagesTr", "imagesTs", "labelsTr")


def recognises(source: Path) -> bool:
    """Return whether the folder has nnU-Net's dataset.json and its folders."""
    return (source / DESCRIPTION).is_file() and (source / "imagesTr").is_dir()


def find(source: Path, wishes: Wishes, progress: Callable[[int, int], None] | None = None) -> Listing:
    """List training images with their labels, and test images without."""
    description = read_json(source / DESCRIPTION) if (source / DESCRIPTION).is_file() else {}
    channels = (
        description.get("channel_names") or description.get("modality") if isinstance(description, dict) else None
    )
    count = channel_count(channels)
    if wishes.channels and len(wishes.channels) != count:
        raise IntakeError(f"{DESCRIPTION}: it names {count} channels; {len(wishes.channels)} were asked for.")
    own = Wishes(wishes.labels, {str(k): None for k in range(count)}, wishes.patient_pattern, wishes.wanted)
    for name in _FOLDERS:
        if (source / name).exists():
            inside(source, source / name)
    images = _volumes(source / "imagesTr")
    for name, path in (_volumes(source / "imagesTs") if (source / "imagesTs").is_dir() else {}).items():
        images.setdefault(name, path)
    folder = wishes.labels or source / "labelsTr"
    labels = _volumes(folder) if folder.is_dir() else {}
    found = paired(images, labels, own, label_names(description))
    there = [each for each in (source / "imagesTr", source / "imagesTs", folder) if each.is_dir()]
    return Listing(found.candidates, (*found.left_out, *(line for each in there for line in left_out(each, wishes))))


def channel_count(names: Any) -> int:
    """Return how many channels a dataset.json names; 1 if it names none.

    Raises:
        IntakeError: it names more than any dataset has.
    """
    count = len(names) if isinstance(names, dict) and names else 1
    if count > MOST_CHANNELS:
        raise IntakeError(f"{DESCRIPTION}: it names {count} channels; at most {MOST_CHANNELS} are read.")
    return count


def label_names(description: Any) -> dict[int, str]:
    """Return value -> name of the structures that a dataset.json lists, as nnU-Net or the Decathlon writes it.

    Raises:
        IntakeError: a structure is a region of several values; such regions overlap.
    """
    found = description.get("labels") if isinstance(description, dict) else None
    names: dict[int, str] = {}
    for key, value in found.items() if isinstance(found, dict) else ():
        name, number = (str(value), key) if str(key).isdecimal() else (str(key), value)
        if isinstance(number, list):
            raise IntakeError(
                f"{DESCRIPTION}: the label {shown(name)} is a region of several values. Name the plain values, "
                "and let the plan's class have `values` for the region."
            )
        if str(number).isdecimal() and len(str(number)) <= 5 and 0 < int(number) < 65536:
            names[int(number)] = shown(name, 64)
    return names
