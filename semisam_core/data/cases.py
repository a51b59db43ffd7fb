"""Find the scans of a site and decide what each may be used for. No voxel is read here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from semisam_core.errors import ConfigError

SUFFIXES = (".nii.gz", ".nii")


class Role(StrEnum):
    """What a case may be used for."""

    LABELED = "labeled"
    UNLABELED = "unlabeled"
    VALIDATION = "validation"


@dataclass(frozen=True)
class Case:
    """One scan. `label` is None for unlabeled cases, so that nothing downstream can read what it must not.

    Attributes:
        id: file name without channel number and suffix.
        images: one file a channel, in the plan's order.
        label: the expert's label file, only where the role allows reading it.
        role: what the case is used for.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    role: Role


@dataclass(frozen=True)
class Quarantined:
    """A case that is left out, and the sentence that says why. Stays at the site."""

    id: str
    reason: str


@dataclass(frozen=True)
class Inventory:
    """What a site has: usable cases by role, and what was left out."""

    cases: tuple[Case, ...]
    quarantined: tuple[Quarantined, ...]

    def of(self, role: Role) -> tuple[Case, ...]:
        """Return the cases of one role, by id."""
        return tuple(case for case in self.cases if case.role is role)


def find_cases(
    images: Path,
    labels: Path | None,
    channels: int,
    labeled: Collection[str] | None,
    validation: Collection[str],
    excluded: Collection[str] = (),
) -> Inventory:
    """Pair images and labels by name and give every case its role.

    With one channel the image of case `x` is `x.nii.gz`; with several it is `x_0000.nii.gz`, `x_0001.nii.gz`, ...
    The label is `x.nii.gz` in the labels folder.

    Args:
        images: folder of images.
        labels: folder of labels, or None.
        channels: how many channels a case has.
        labeled: ids whose labels may be trained on; None means every case that has a label and is not validation.
        validation: ids whose labels are for scoring only.
        excluded: ids to leave out altogether.

    Raises:
        ConfigError: a folder is missing or has no NIfTI file, or the lists contradict each other or name cases
            which do not exist.
    """
    image_files = _nifti_files(images, "images")
    if not image_files:
        raise ConfigError(f"{images}: the images folder has no NIfTI file (.nii.gz or .nii).")
    label_files = _nifti_files(labels, "labels") if labels is not None else {}
    grouped, quarantined = _group_channels(image_files, channels)
    _check_lists(images, set(grouped), labeled, validation, excluded, {q.id for q in quarantined})
    for orphan in sorted(set(label_files) - set(grouped) - {q.id for q in quarantined}):
        quarantined.append(Quarantined(orphan, "a label without an image: no image file has this name"))
    cases = []
    for case_id in sorted(set(grouped) - set(excluded)):
        label = label_files.get(case_id)
        role = _role(case_id, label, labeled, validation)
        if role is not Role.UNLABELED and label is None:
            reason = f"listed as {role.value}, but the labels folder has no file of this name"
            quarantined.append(Quarantined(case_id, reason))
            continue
        cases.append(Case(case_id, grouped[case_id], label if role is not Role.UNLABELED else None, role))
    return Inventory(tuple(cases), tuple(quarantined))


def _role(case_id: str, label: Path | None, labeled: Collection[str] | None, validation: Collection[str]) -> Role:
    if case_id in validation:
        return Role.VALIDATION
    if labeled is None:
        return Role.LABELED if label is not None else Role.UNLABELED
    return Role.LABELED if case_id in labeled else Role.UNLABELED


def _nifti_files(folder: Path, what: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: the {what} folder does not exist.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        for suffix in SUFFIXES:
            if path.name.endswith(suffix) and not path.name.startswith("."):
                name = path.name.removesuffix(suffix)
                if name in found:
                    raise ConfigError(f"{folder}: {found[name].name} and {path.name} are the same case twice.")
                found[name] = path
                break
    return found


def _group_channels(files: dict[str, Path], channels: int) -> tuple[dict[str, tuple[Path, ...]], list[Quarantined]]:
    if channels == 1:
        return {name: (path,) for name, path in files.items()}, []
    parts: dict[str, dict[int, Path]] = {}
    quarantined = []
    for name, path in files.items():
        stem, separator, number = name.rpartition("_")
        if not separator or not number.isdigit() or len(number) != 4:
            reason = f"the plan has {channels} channels, so image names end in _0000, _0001, ...; this one does not"
            quarantined.append(Quarantined(name, reason))
            continue
        parts.setdefault(stem, {})[int(number)] = path
    grouped = {}
    for case_id, by_channel in parts.items():
        if sorted(by_channel) != list(range(channels)):
            found = ", ".join(f"_{k:04d}" for k in sorted(by_channel))
            quarantined.append(Quarantined(case_id, f"{channels} channels are due, found {found}"))
            continue
        grouped[case_id] = tuple(by_channel[k] for k in range(channels))
    return grouped, quarantined


def _check_lists(
    folder: Path,
    known: set[str],
    labeled: Collection[str] | None,
    validation: Collection[str],
    excluded: Collection[str],
    quarantined: set[str],
) -> None:
    lists: Sequence[tuple[str, Collection[str]]] = (
        ("labeled", labeled or ()),
        ("validation", validation),
        ("excluded", excluded),
    )
    for name, ids in lists:
        unknown = sorted(set(ids) - known - quarantined)
        if unknown:
            raise ConfigError(f"{folder}: data.{name} names cases that are not there: {', '.join(unknown)}.")
    for position, (first, ids) in enumerate(lists):
        for second, others in lists[position + 1 :]:
            both = sorted(set(ids) & set(others))
            if both:
                raise ConfigError(f"{folder}: data.{first} and data.{second} both name {', '.join(both)}.")
