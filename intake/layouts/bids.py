"""BIDS: `sub-<patient>/[ses-<session>/]anat/*.nii.gz`, labels in a derivative as `*_dseg.nii.gz` or `*_mask.nii.gz`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from intake.candidates import Candidate, Listing, Source, Wishes
from intake.files import volume_suffix
from intake.guards import inside, shown
from intake.manifest import LONGEST_MODALITY
from intake.volume import IntakeError

NAME = "bids"
_FOLDERS = ("anat", "ct", "pet")
_LABEL_SUFFIXES = ("dseg", "mask", "seg")
_ENTITIES = re.compile(r"(sub|ses|acq|run|rec)-([A-Za-z0-9]+)")


def recognises(source: Path) -> bool:
    """Return whether the folder has subjects."""
    return source.is_dir() and any(path.is_dir() for path in source.glob("sub-*"))


def find(source: Path, wishes: Wishes, progress: Callable[[int, int], None] | None = None) -> Listing:
    """List each subject's images, as channels of one scan where channels are named, with labels from `derivatives`."""
    images, labels, left_out = [], defaultdict(list), []
    for path in sorted(source.glob("sub-*/**/*")) + sorted(source.glob("derivatives/**/*")):
        if not path.is_file() or volume_suffix(path.name) is None or path.name.startswith("."):
            continue
        name = str(path.relative_to(source))
        try:
            inside(source, path)
        except IntakeError as error:
            left_out.append((name, str(error)))
            continue
        kind = path.name.split(".")[0].rpartition("_")[2]
        if kind in _LABEL_SUFFIXES:
            labels[_scan(path)].append(path)
        elif path.parent.name in _FOLDERS and "derivatives" not in path.relative_to(source).parts:
            images.append((path, kind))
        else:
            left_out.append((name, "no anatomical image, CT or PET"))
    candidates = []
    for scan, members in _grouped(images, wishes).items():
        chosen, reason = _channels(members, wishes)
        own = labels.pop(scan[0], [])
        if reason or len(own) > 1:
            left_out.append((" ".join(scan), reason or "it has several labels; keep one of them"))
            continue
        label = Source(kind="file", paths=(str(own[0]),), series=own[0].name) if own else None
        patient = dict(_ENTITIES.findall(members[0][0].name)).get("sub", scan[0])
        candidates.append(Candidate(patient=patient, scan=" ".join(scan), channels=tuple(chosen), label=label))
    left_out += [(path.name, "a label without an image") for paths in labels.values() for path in paths]
    return Listing(tuple(candidates), tuple(left_out))


def _scan(path: Path) -> str:
    """Return subject and session; labels and channels of one scan share them."""
    entities = dict(_ENTITIES.findall(path.name))
    return "_".join(f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities)


def _grouped(images: list[tuple[Path, str]], wishes: Wishes) -> dict[tuple[str, ...], list[tuple[Path, str]]]:
    """Group images into scans: by subject and session if channels are named, else each image by itself."""
    grouped: dict[tuple[str, ...], list[tuple[Path, str]]] = defaultdict(list)
    for path, kind in images:
        grouped[(_scan(path),) if wishes.channels else (_scan(path), path.name)].append((path, kind))
    return grouped


def _channels(members: list[tuple[Path, str]], wishes: Wishes) -> tuple[list[Source], str]:
    if not wishes.channels:
        return [_source(*members[0])], ""
    chosen = []
    for channel, pattern in wishes.channels.items():
        fitting = [(path, kind) for path, kind in members if pattern.search(path.name)]
        if len(fitting) != 1:
            return [], f"it has {len(fitting)} files for the channel {channel}"
        chosen.append(_source(*fitting[0]))
    return chosen, ""


def _source(path: Path, kind: str) -> Source:
    return Source(kind="file", paths=(str(path),), modality=shown(kind, LONGEST_MODALITY), series=path.name)
