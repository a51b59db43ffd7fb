"""Find a site's scans and decide what each may be used for, by file names alone: no file is opened."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from semisam_core.data.names import (
    CHANNEL_ZERO,
    LABEL_ENDING,
    SUFFIXES,
    case_name,
    look_alikes,
    nifti_suffix,
    one_channel_id,
)
from semisam_core.errors import ConfigError


class Role(StrEnum):
    """What a case may be used for."""

    LABELED = "labeled"
    UNLABELED = "unlabeled"
    VALIDATION = "validation"


@dataclass(frozen=True)
class Case:
    """One scan. Unlabeled cases have no `label`, so that nothing downstream can read it.

    Attributes:
        id: file name without channel number and suffix, in composed Unicode (NFC).
        images: one file per channel, in the plan's order.
        label: the expert's label file, only where the role allows reading it.
        role: what the case is used for.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    role: Role


@dataclass(frozen=True)
class Quarantined:
    """A case that is left out, and why. Stays at the site."""

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

    The image of case `x` is `x.nii.gz`; with several channels `x_0000.nii.gz`, `x_0001.nii.gz`, ... With one channel
    `x_0000.nii.gz` is accepted where the number can only be a channel's (see `one_channel_id`). The label is `x.nii.gz`
    in the labels folder, else `x_seg.nii.gz`. Suffixes may be in capitals. Hidden files (such as macOS's
    `._x.nii.gz`) and files without a NIfTI suffix (such as `x.nii.gz.bak`) are ignored.

    Args:
        images: folder of images.
        labels: folder of labels, or None.
        channels: number of channels per case.
        labeled: ids whose labels may be trained on; None means every case that has a label and is not validation.
        validation: ids whose labels are for scoring only.
        excluded: ids to leave out altogether.

    Raises:
        ConfigError: a folder is missing, unreadable or without NIfTI files, two files are the same case, or the lists
            contradict each other or name unknown cases.
    """
    if labels is not None and labels == images:
        raise ConfigError(f"{images}: data.images and data.labels are one folder; labels need a folder of their own.")
    image_files = _nifti_files(images, "images")
    if not image_files:
        raise ConfigError(f"{images}: the images folder has no NIfTI file (.nii.gz or .nii).")
    label_files = _nifti_files(labels, "labels") if labels is not None else {}
    named = {*label_files, *(labeled or ()), *validation, *excluded}
    grouped, quarantined = (
        _one_channel(image_files, named) if channels == 1 else _several_channels(image_files, channels)
    )
    _check_lists(images, set(grouped), labeled, validation, excluded, {q.id for q in quarantined})
    cases = []
    for case_id in sorted(set(grouped) - set(excluded)):
        label = _label_of(case_id, label_files)
        role = _role(case_id, label, labeled, validation)
        if role is not Role.UNLABELED and label is None:
            hint = _rename_hint(case_id, labels, set(label_files) & set(grouped))
            reason = f"listed as {role.value}, but the labels folder has no file of this name{hint}"
            quarantined.append(Quarantined(case_id, reason))
        else:
            cases.append(Case(case_id, grouped[case_id], label if role is not Role.UNLABELED else None, role))
    quarantined += _orphans(label_files, grouped, {q.id for q in quarantined})
    return Inventory(tuple(cases), tuple(quarantined))


def _role(case_id: str, label: Path | None, labeled: Collection[str] | None, validation: Collection[str]) -> Role:
    if case_id in validation:
        return Role.VALIDATION
    if labeled is None:
        return Role.LABELED if label is not None else Role.UNLABELED
    return Role.LABELED if case_id in labeled else Role.UNLABELED


def _listing(folder: Path, what: str) -> list[str]:
    """Return the names of all files of a folder that are not hidden, sorted."""
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: the {what} folder does not exist.") from None
    except OSError as error:
        raise ConfigError(f"{folder}: the {what} folder cannot be read ({error.strerror}).") from None


def _nifti_files(folder: Path, what: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in _listing(folder, what):
        suffix = nifti_suffix(name)
        if suffix is None:
            continue
        stem = case_name(name.removesuffix(suffix))
        if stem in found:
            raise ConfigError(f"{folder}: {found[stem].name!a} and {name!a} are the same case twice; remove one.")
        found[stem] = folder / name
    return found


def _one_channel(
    files: Mapping[str, Path], named: Collection[str]
) -> tuple[dict[str, tuple[Path, ...]], list[Quarantined]]:
    """Group one-channel images by case; quarantine those that look like a copy or a label of another image."""
    grouped: dict[str, tuple[Path, ...]] = {}
    quarantined = []
    for stem, path in files.items():
        whole, label_of = stem.removesuffix(CHANNEL_ZERO), stem.removesuffix(LABEL_ENDING)
        if stem in named:
            grouped[stem] = (path,)
        elif stem.lower().endswith(".bak"):
            reason = "its name says that it is a backup copy; move it elsewhere, or give it another name"
            quarantined.append(Quarantined(stem, reason))
        elif whole != stem and whole in files:
            reason = f"{files[whole].name} may be the same scan; remove one of them, or give this one another name"
            quarantined.append(Quarantined(stem, reason))
        elif label_of != stem and label_of in files:
            reason = f"looks like the label of {files[label_of].name}; move it to the labels folder"
            quarantined.append(Quarantined(stem, reason))
        else:
            grouped[one_channel_id(stem, files, named)] = (path,)
    return grouped, quarantined


def _several_channels(
    files: Mapping[str, Path], channels: int
) -> tuple[dict[str, tuple[Path, ...]], list[Quarantined]]:
    parts: dict[str, dict[int, Path]] = {}
    quarantined = []
    for name, path in files.items():
        stem, separator, number = name.rpartition("_")
        if not separator or not number.isdecimal() or len(number) != 4:
            reason = f"the plan has {channels} channels, so image names end in _0000, _0001, ...; this one does not"
            quarantined.append(Quarantined(name, reason))
            continue
        parts.setdefault(stem, {})[int(number)] = path
    grouped = {}
    for case_id, by_channel in parts.items():
        if sorted(by_channel) != list(range(channels)):
            found = ", ".join(f"_{k:04d}" for k in sorted(by_channel))
            quarantined.append(Quarantined(case_id, f"the plan has {channels} channels, found {found}"))
            continue
        grouped[case_id] = tuple(by_channel[k] for k in range(channels))
    return grouped, quarantined


def _label_of(case_id: str, labels: Mapping[str, Path]) -> Path | None:
    return labels.get(case_id) or labels.get(case_id + LABEL_ENDING)


def _orphans(
    labels: Mapping[str, Path], grouped: Mapping[str, tuple[Path, ...]], quarantined: Collection[str]
) -> list[Quarantined]:
    """Report labels without an image, each with the image that it looks like."""
    used = {_label_of(case_id, labels) for case_id in (*grouped, *quarantined)}
    orphans = []
    for stem in sorted(set(labels) - set(quarantined)):
        if labels[stem] in used:
            continue
        owner = stem.removesuffix(LABEL_ENDING)
        if owner in labels and owner in grouped:
            reason = f"case {owner} already has the label {labels[owner].name}; remove one of them"
        else:
            alike = look_alikes(stem, grouped)
            hint = f"; {grouped[alike[0]][0].name} looks like it: name the label {alike[0]}.nii.gz" if alike else ""
            reason = f"a label without an image: no image file has this name{hint}"
        orphans.append(Quarantined(stem, reason))
    return orphans


def _rename_hint(case_id: str, labels: Path | None, taken: Collection[str]) -> str:
    """Name the file in the labels folder that looks like a case's label, other than labels of other cases."""
    names = _listing(labels, "labels") if labels is not None else []
    alike = [name for name in look_alikes(case_id, names) if name.removesuffix(nifti_suffix(name) or "") not in taken]
    if not alike:
        return ""
    is_nifti = any(suffix in alike[0].lower() for suffix in SUFFIXES)
    return f"; {alike[0]} looks like it: {'name it' if is_nifti else 'export it as'} {case_id}.nii.gz"


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
            alike = {each: look_alikes(each, sorted(known)) for each in unknown}
            shown = ", ".join(f"{each} (is it {names[0]}?)" if names else each for each, names in alike.items())
            raise ConfigError(f"{folder}: data.{name} names cases that are not there: {shown}.")
    for position, (first, ids) in enumerate(lists):
        for second, others in lists[position + 1 :]:
            both = sorted(set(ids) & set(others))
            if both:
                raise ConfigError(f"{folder}: data.{first} and data.{second} both name {', '.join(both)}.")
