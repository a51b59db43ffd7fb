"""Volume files: images in one folder, labels of the same names in another; or one image and its label."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from intake.candidates import Candidate, Listing, Source, Wishes
from intake.files import volume_suffix
from intake.guards import inside
from intake.volume import IntakeError
from semisam_core.data.names import LABEL_ENDING, case_name

NAME = "paired"
_CHANNEL = re.compile(r"^(.+)_([0-9]{4})$")
_IMAGES, _LABELS = ("images", "imagesTr"), ("labels", "labelsTr")


def recognises(source: Path) -> bool:
    """Return whether it is a volume file, or a folder of some, or has a folder `images` of some."""
    if source.is_file():
        return _stem(source) is not None
    return bool(_volumes(_images_folder(source)))


def find(source: Path, wishes: Wishes, progress: Callable[[int, int], None] | None = None) -> Listing:
    """List the images and pair them with labels by name."""
    if source.is_file():
        stem = _stem(source)
        if stem is None:
            raise IntakeError(f"{source.name!a}: it is no volume file that can be read.")
        return paired({stem: source}, _labels(source, wishes, only=stem), wishes, {})
    images = _images_folder(source)
    inside(source, images)
    found = paired(_volumes(images), _labels(source, wishes), wishes, {})
    return Listing(found.candidates, (*found.left_out, *left_out(images, wishes)))


def left_out(folder: Path, wishes: Wishes) -> tuple[tuple[str, str], ...]:
    """Return what is not read in a folder of images, such as links to elsewhere and DICOM files, with the reason."""
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    known = {folder / name for name in _LABELS} | {wishes.labels}
    headers = tuple(f"{path.stem}." for path in entries if path.suffix.lower() in (".mhd", ".nhdr"))
    found = []
    for path in entries:
        if path.is_dir():
            if path not in known:
                found.append((path.name, "a folder among volume files; name it to take what is in it"))
        elif _stem(path) is not None:
            try:
                inside(folder, path)
            except IntakeError as error:
                found.append((path.name, f"{error} Copy the file here, or import the folder where it is."))
        elif path.is_file() and not path.name.startswith(headers):
            found.append((path.name, "no volume file (--layout dicom reads DICOM files here instead)"))
    return tuple(found)


def paired(images: Mapping[str, Path], labels: Mapping[str, Path], wishes: Wishes, names: Mapping[int, str]) -> Listing:
    """Group image files into scans, by the channel number at the end of their names, and give each its label.

    Args:
        images: name without suffix -> file.
        labels: likewise.
        wishes: which part of a name is the patient, and how many channels there are.
        names: value -> name of the labels' structures.
    """
    grouped: dict[str, dict[int, Path]] = defaultdict(dict)
    for stem, path in images.items():
        match = _CHANNEL.match(stem)
        if match and (stem not in labels):
            grouped[match[1]][int(match[2])] = path
        else:
            grouped[stem][0] = path
    candidates, unpaired = [], []
    for case, by_channel in sorted(grouped.items()):
        if sorted(by_channel) != list(range(len(by_channel))) or len(by_channel) != max(1, len(wishes.channels)):
            found = ", ".join(f"_{k:04d}" for k in sorted(by_channel))
            unpaired.append((case, f"{max(1, len(wishes.channels))} channels are expected, found {found}"))
            continue
        channels = tuple(_source(by_channel[k]) for k in sorted(by_channel))
        own = labels.get(case) or labels.get(case + LABEL_ENDING)
        label = None if own is None else _source(own).model_copy(update={"names": dict(names)})
        candidates.append(Candidate(patient=wishes.patient_of(case), scan=case, channels=channels, label=label))
    taken = {each.label.paths[0] for each in candidates if each.label}
    unpaired += [
        (path.name, "a label without an image of its name") for path in labels.values() if str(path) not in taken
    ]
    return Listing(tuple(candidates), tuple(unpaired))


def _source(path: Path) -> Source:
    return Source(kind="file", paths=(str(path),), series=path.name)


def _images_folder(source: Path) -> Path:
    return next((source / name for name in _IMAGES if (source / name).is_dir()), source)


def _labels(source: Path, wishes: Wishes, only: str | None = None) -> dict[str, Path]:
    if wishes.labels is not None:
        if wishes.labels.is_file() and only is not None:
            return {only: wishes.labels}
        return _volumes(wishes.labels)
    folder = next((source / name for name in _LABELS if (source / name).is_dir()), None)
    if folder is None:
        return {}
    inside(source, folder)
    return _volumes(folder)


def _volumes(folder: Path) -> dict[str, Path]:
    """Return name without suffix -> volume file of a folder; links that leave the folder are not followed."""
    if not folder.is_dir():
        raise IntakeError(f"{folder}: there is no such folder.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        stem = None if path.name.startswith(".") or not path.is_file() else _stem(path)
        if stem is None:
            continue
        if not _is_inside(folder, path):
            continue
        if stem in found:
            raise IntakeError(f"{folder}: {found[stem].name!a} and {path.name!a} are the same scan twice; remove one.")
        found[stem] = path
    return found


def _is_inside(folder: Path, path: Path) -> bool:
    try:
        inside(folder, path)
    except IntakeError:
        return False
    return True


def _stem(path: Path) -> str | None:
    suffix = volume_suffix(path.name)
    return None if suffix is None else case_name(path.name.removesuffix(suffix))
