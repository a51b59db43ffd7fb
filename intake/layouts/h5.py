"""The h5 releases of the semi-supervised papers: one file a case, with datasets `image` and `label`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from intake.candidates import Candidate, Listing, Source, Wishes
from intake.dicom.headers import files_below
from intake.guards import inside
from intake.volume import IntakeError

NAME = "h5"
_SUFFIXES = (".h5", ".hdf5")


def recognises(source: Path) -> bool:
    """Return whether it is an h5 file, or a folder with one somewhere below."""
    if source.is_file():
        return source.suffix.lower() in _SUFFIXES
    return any(path.suffix.lower() in _SUFFIXES for path in files_below(source))


def find(source: Path, wishes: Wishes, progress: Callable[[int, int], None] | None = None) -> Listing:
    """List every h5 file; the left atrium's are named by their folders (`<case>/mri_norm2.h5`)."""
    candidates, left_out = [], []
    root = source.parent if source.is_file() else source
    for path in [source] if source.is_file() else files_below(source):
        name = str(path.relative_to(root))
        if path.suffix.lower() not in _SUFFIXES:
            left_out.append((name, "no h5 file"))
            continue
        try:
            inside(root, path)
        except IntakeError as error:
            left_out.append((name, str(error)))
            continue
        image = Source(kind="h5", paths=(str(path),), series=name)
        case = str(Path(name).with_suffix(""))
        candidates.append(Candidate(patient=wishes.patient_of(case), scan=case, channels=(image,), label=image))
    return Listing(tuple(candidates), tuple(left_out))
