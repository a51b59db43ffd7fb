"""A folder as exported from a PACS: DICOM files of any name, images and labels mixed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from intake.candidates import Candidate, Listing, Source, Wishes
from intake.dicom.headers import HEADER_SECONDS
from intake.dicom.labels import segment_names
from intake.dicom.series import DicomLabel, DicomSeries, FoundSeries, describe, find_series
from intake.files import ITK_SUFFIXES
from intake.guards import LIMITS, Worker, shown
from intake.volume import IntakeError

NAME = "dicom"


def recognises(source: Path) -> bool:
    """Return True for any folder or file: DICOM files have no agreed names."""
    return source.exists()


def find(source: Path, wishes: Wishes, progress: Callable[[int, int], None] | None = None) -> Listing:
    """List every series that is a regular volume; with channels named, every study that has a series for each.

    Raises:
        IntakeError: it is a file, and no volume.
    """
    found = find_series(source, progress)
    if source.is_file():
        _check_alone(source, found)
        source = source.parent
    left_out = [(str(path.relative_to(source)), reason) for path, reason in found.skipped]
    usable = []
    with Worker(describe, replace(LIMITS, seconds=HEADER_SECONDS)) as worker:
        for series in found.series:
            try:
                if series.slices[0].frames > 1:
                    worker.call({"files": [str(each) for each in series.files]})
                else:
                    _ = series.stack
                usable.append(series)
            except IntakeError as error:
                left_out.append((_name(series), str(error)))
    labels, unused = _labels(usable, found.labels, wishes)
    left_out += unused
    if wishes.channels:
        candidates, more = _by_channels(source, usable, labels, wishes)
        left_out += more
    else:
        candidates = [_candidate(source, (series,), labels) for series in usable]
    return Listing(tuple(candidates), tuple(left_out))


def _check_alone(path: Path, found: FoundSeries) -> None:
    """Check that a file by itself is an image of several frames; its place among others is judged like a series'."""
    formats = "accepted are one multi-frame DICOM image, .nii, .nii.gz, .h5, " + ", ".join(ITK_SUFFIXES)
    for _, reason in found.skipped:
        raise IntakeError(f"{path.name!a}: it is {reason}; {formats}, or a folder.")
    for label in found.labels:
        raise IntakeError(f"{path.name!a}: it is a label ({label.modality}), no image; {formats}, or a folder.")
    if found.series[0].slices[0].frames == 1:
        raise IntakeError(
            f"{path.name!a}: it is one slice of {_name(found.series[0])}; name the folder that holds all its slices."
        )


def _name(series: DicomSeries) -> str:
    return f"series {series.description or series.uid}"


def _candidate(source: Path, channels: Sequence[DicomSeries], labels: dict[int, Source]) -> Candidate:
    first = channels[0]
    notes = [] if first.patient else ["it has no patient ID; each of its studies counts as a patient"]
    sources = tuple(
        Source(
            kind="dicom",
            paths=tuple(map(str, each.files)),
            modality=shown(each.modality, 16),
            series=_identity(source, each),
        )
        for each in channels
    )
    label = next((labels[id(each)] for each in channels if id(each) in labels), None)
    scan = " | ".join(each.series for each in sources)
    return Candidate(
        patient=first.patient or first.study_uid or scan, scan=scan, channels=sources, label=label, notes=tuple(notes)
    )


def _identity(source: Path, series: DicomSeries) -> str:
    """Return what tells a series from all others; its folder where an anonymiser has emptied its UID."""
    uid = series.uid or f"folder {series.files[0].parent.relative_to(source)} {series.frame_of_reference}"
    return f"{uid} {series.part}".strip()


def _labels(
    series: Sequence[DicomSeries], labels: Sequence[DicomLabel], wishes: Wishes
) -> tuple[dict[int, Source], list[tuple[str, str]]]:
    """Tie each label to the series that it names, or to the only one in its frame of reference."""
    tied: dict[int, list[Source]] = defaultdict(list)
    left_out = []
    wanted = None if wishes.wanted is None else {name.casefold() for name in wishes.wanted}
    for label in labels:
        owners = [each for each in series if each.uid in label.refers_to]
        if not owners and not label.refers_to:
            owners = [each for each in series if each.frame_of_reference in label.frames_of_reference]
        name = f"label {label.path.name!a}"
        try:
            names = segment_names(label.path)
        except IntakeError as error:
            left_out.append((name, str(error)))
            continue
        if len(owners) != 1:
            which = "several volumes" if owners else "none of the usable series"
            left_out.append((name, f"it refers to {which} here; one is expected"))
        elif wanted is not None and not wanted & {each.casefold() for each in names.values()}:
            left_out.append(
                (name, f"its segments are {', '.join(names.values())}; wanted: {', '.join(sorted(wanted))}")
            )
        elif _elsewhere(label, owners[0]):
            left_out.append((name, "its frame of reference is not that of its series, so it lies elsewhere"))
        else:
            source = Source(
                kind="dicom-label",
                paths=(str(label.path),),
                modality=label.modality,
                series=label.path.name,
                names=names,
            )
            tied[id(owners[0])].append(source)
    for several in [sources for sources in tied.values() if len(sources) > 1]:
        for source in several:
            left_out.append(
                (f"label {Path(source.paths[0]).name!a}", "its series has several labels; keep one of them")
            )
    return {owner: sources[0] for owner, sources in tied.items() if len(sources) == 1}, left_out


def _elsewhere(label: DicomLabel, series: DicomSeries) -> bool:
    frames = label.frames_of_reference
    return bool(frames and series.frame_of_reference and series.frame_of_reference not in frames)


def _by_channels(
    source: Path, series: Sequence[DicomSeries], labels: dict[int, Source], wishes: Wishes
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    studies: dict[str, list[DicomSeries]] = defaultdict(list)
    for each in series:
        studies[each.study_uid].append(each)
    candidates, left_out, used = [], [], set()
    for study in studies.values():
        chosen = []
        for channel, pattern in wishes.channels.items():
            fitting = [each for each in study if pattern.search(each.description)]
            if len(fitting) != 1:
                names = ", ".join(each.description or "(no description)" for each in fitting or study)
                reason = f"the study has {len(fitting)} series for the channel {channel}: {names}"
                left_out.append((_name(study[0]), reason))
                break
            chosen.append(fitting[0])
        else:
            candidates.append(_candidate(source, chosen, labels))
            used |= {id(each) for each in chosen}
    left_out += [(_name(each), "it is none of the channels asked for") for each in series if id(each) not in used]
    return candidates, left_out
