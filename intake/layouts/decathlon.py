"""The Medical Segmentation Decathlon's layout: dataset.json with pairs of files, channels along a fourth axis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from intake.candidates import Candidate, Listing, Source, Wishes
from intake.files import volume_suffix
from intake.guards import inside, read_json, shown
from intake.layouts.nnunet import DESCRIPTION, channel_count, label_names
from intake.volume import IntakeError

NAME = "decathlon"


def recognises(source: Path) -> bool:
    """Return whether dataset.json lists pairs of files."""
    path = source / DESCRIPTION
    if not path.is_file():
        return False
    description = read_json(path)
    training = description.get("training") if isinstance(description, dict) else None
    return isinstance(training, list) and bool(training) and isinstance(training[0], dict)


def find(source: Path, wishes: Wishes, progress: Callable[[int, int], None] | None = None) -> Listing:
    """List the pairs that dataset.json names, and its test images without labels."""
    description = read_json(source / DESCRIPTION)
    if not isinstance(description, dict):
        raise IntakeError(f"{DESCRIPTION}: a JSON object is expected.")
    names = label_names(description)
    count = channel_count(description.get("modality"))
    entries = [(each, True) for each in _list(description, "training")]
    entries += [({"image": each}, False) for each in _list(description, "test")]
    candidates, left_out = [], []
    for entry, labeled in entries:
        try:
            candidates.append(_candidate(source, entry, labeled, count, names, wishes))
        except IntakeError as error:
            left_out.append((shown(entry, 100), str(error)))
    return Listing(tuple(candidates), tuple(left_out))


def _list(description: dict[str, Any], key: str) -> list[Any]:
    found = description.get(key) or []
    if not isinstance(found, list):
        raise IntakeError(f"{DESCRIPTION}: {key}: a list is expected.")
    return found


def _candidate(source: Path, entry: Any, labeled: bool, count: int, names: dict[int, str], wishes: Wishes) -> Candidate:
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise IntakeError("an entry with the path of an image is expected")
    image = _below(source, entry["image"])
    suffix = volume_suffix(image.name)
    if suffix is None:
        raise IntakeError("it is no volume file that can be read")
    channels = tuple(
        Source(kind="file", paths=(str(image),), channel=k if count > 1 else None, series=f"{image.name} {k}")
        for k in range(count)
    )
    label = None
    if labeled and isinstance(entry.get("label"), str):
        path = _below(source, entry["label"])
        label = Source(kind="file", paths=(str(path),), series=path.name, names=names)
    case = image.name.removesuffix(suffix)
    return Candidate(patient=wishes.patient_of(case), scan=case, channels=channels, label=label)


def _below(source: Path, name: str) -> Path:
    if Path(name).is_absolute() or "\0" in name:
        raise IntakeError(f"{shown(name)}: a path within the folder is expected.")
    path = source / name
    inside(source, path)
    return path
