"""What raters said about pseudo-labels, and the labels that came of it: kept in the site's storage, never sent.

`records.jsonl` is only appended to; masks lie beside it under the SHA-256 of their file, so that none is overwritten.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from semisam_core.configuration import Name, StrictModel
from semisam_core.data.cases import Case, Inventory, Role
from semisam_core.files import append_json_line, read_json_lines, write_atomically
from semisam_core.plan_sections.task import Task
from semisam_core.pseudo_labels.store import StoredPseudoLabel

logger = logging.getLogger(__name__)

FOLDER, RECORDS, MASKS, ROUNDS = "review", "records.jsonl", "masks", "reviewed.jsonl"
LONGEST_MINUTES = 24 * 60
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Rating(IntEnum):
    """How much revision a pseudo-label needs; Zhang et al., SemiSAM+, Medical Image Analysis 2025."""

    NO_REVISION = 1
    MINOR_REVISION = 2
    MAJOR_REVISION = 3
    REJECT = 4


class Decision(StrEnum):
    """What became of a pseudo-label."""

    ACCEPTED = "accepted"
    CORRECTED = "corrected"
    RATED = "rated"
    REJECTED = "rejected"


class ReviewRecord(StrictModel):
    """One rater's word on one pseudo-label.

    Attributes:
        version: of this form.
        time: when, in UTC.
        case: the scan.
        rater: a pseudonym.
        ratings: class -> 1 to 4.
        minutes: how long it took.
        decision: what became of it: `accepted` as it is, `corrected`, only `rated`, or `rejected`.
        pseudo_label: SHA-256 of the mask that was shown, a file of the store.
        source: SHA-256 of the run's pseudo-label that the mask was made from; None if there was none.
        label: SHA-256 of the label that came of it, a file of the store; None if none did.
        run: the run whose pseudo-label it was.
        round: the round that made it; None if its file does not say.
        images: SHA-256 of the scan's image files, by channel.
        classes: class -> label values, as the plan had them.
        tool: with what the label was drawn.
    """

    version: Literal[1] = 1
    time: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
    case: Annotated[str, Field(min_length=1, max_length=300)]
    rater: Name
    ratings: Annotated[dict[str, Annotated[int, Field(ge=1, le=4)]], Field(min_length=1)]
    minutes: Annotated[float, Field(ge=0, le=LONGEST_MINUTES)]
    decision: Decision
    pseudo_label: Sha256
    source: Sha256 | None
    label: Sha256 | None
    run: Name
    round: Annotated[int, Field(ge=0)] | None
    images: Annotated[tuple[Sha256, ...], Field(min_length=1)]
    classes: dict[str, tuple[int, ...]]
    tool: Literal["page", "nifti", "dicom-seg", "simulated"]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> ReviewRecord:
        if set(self.ratings) != set(self.classes):
            raise ValueError(f"ratings: every class is rated once: {', '.join(self.classes)}")
        expected = decision_on(self.ratings, self.label is not None, self.label == self.pseudo_label)
        if self.decision is not expected:
            raise ValueError(f"decision: with these ratings and this label it is {expected.value}")
        return self


def decision_on(ratings: Mapping[str, int], labeled: bool, unchanged: bool) -> Decision:
    """Return what ratings and label say together.

    Args:
        ratings: class -> 1 to 4.
        labeled: whether a label came of it.
        unchanged: whether it is the pseudo-label as it was shown.

    Raises:
        ValueError: they contradict each other.
    """
    perfect = all(each == Rating.NO_REVISION for each in ratings.values())
    if perfect and not (labeled and unchanged):
        raise ValueError("a pseudo-label that needs no revision (1) is the label as it is; rate a changed one 2 or 3")
    if not perfect and labeled and unchanged:
        raise ValueError("nothing was corrected; rate it 1 (no revision), correct it, or save the rating alone")
    if labeled:
        return Decision.ACCEPTED if unchanged else Decision.CORRECTED
    return Decision.REJECTED if Rating.REJECT in ratings.values() else Decision.RATED


class ReviewStore:
    """The site's reviews.

    Args:
        storage: the site's storage folder.
    """

    def __init__(self, storage: Path) -> None:
        self.folder = storage / FOLDER

    def records(self) -> list[ReviewRecord]:
        """Return all records, oldest first. A line that cannot be understood is logged and skipped."""
        found = []
        for number, line in enumerate(read_json_lines(self.folder / RECORDS), start=1):
            try:
                found.append(ReviewRecord.model_validate_json(json.dumps(line)))
            except ValidationError as error:
                what = error.errors(include_url=False, include_input=False)[0]
                logger.warning("%s: record %d is skipped: %s", self.folder / RECORDS, number, what["msg"])
        return found

    def append(self, record: ReviewRecord) -> None:
        """Add a record.

        Raises:
            OSError: it cannot be written.
        """
        self.prepare()
        append_json_line(self.folder / RECORDS, record.model_dump(mode="json"))

    def keep(self, content: bytes) -> str:
        """Keep a mask file (.nii.gz) and return its SHA-256.

        Raises:
            OSError: it cannot be written.
        """
        digest = hashlib.sha256(content).hexdigest()
        if not self.mask(digest).exists():
            self.prepare()
            write_atomically(self.mask(digest), content)
        return digest

    def mask(self, sha256: str) -> Path:
        """Return the path of a mask."""
        return self.folder / MASKS / f"{sha256}.nii.gz"

    def prepare(self) -> None:
        """Make the folder, for its owner alone.

        Raises:
            OSError: it cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(self.folder, 0o700)


class InForce(StrictModel):
    """What reviews say in one round of a run.

    Attributes:
        round: the round.
        labels: case -> SHA-256 of its label.
        rejected: case -> SHA-256 of the pseudo-labels that nothing may be learned from.
    """

    round: Annotated[int, Field(ge=0)]
    labels: dict[str, Sha256]
    rejected: dict[str, tuple[Sha256, ...]]


def in_force(
    records: Iterable[ReviewRecord], task: Task, images: Callable[[str], tuple[str, ...] | None]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return case -> label, and case -> rejected pseudo-labels, of the records that hold for a task and for the scans.

    Of each rater the last word on a scan counts, and of several raters' labels the latest. A pseudo-label that one
    rater accepted and another rejected is no label.

    Args:
        records: oldest first.
        task: the plan's; records about other classes or label values do not hold.
        images: returns the SHA-256 of a case's image files now, None if there is no such case or it cannot be read.
    """
    classes = {each.name: tuple(each.label_values) for each in task.classes}
    words: dict[str, dict[str, ReviewRecord]] = {}
    for record in records:
        if record.classes == classes:
            of_case = words.setdefault(record.case, {})
            of_case.pop(record.rater, None)  # so that the order is that of the last words
            of_case[record.rater] = record
    labels: dict[str, str] = {}
    rejected: dict[str, tuple[str, ...]] = {}
    for case, of_case in sorted(words.items()):
        now = images(case)
        said = [record for record in of_case.values() if record.images == now]
        refused = {record.pseudo_label for record in said if record.decision is Decision.REJECTED}
        standing = [record.label for record in said if record.label is not None and record.label not in refused]
        if standing:
            labels[case] = standing[-1]
        sources = {record.source for record in said if record.decision is Decision.REJECTED}
        if known := sorted(source for source in sources if source is not None):
            rejected[case] = tuple(known)
    return labels, rejected


def reviews_of_round(run_folder: Path, round_number: int, now: Callable[[], InForce]) -> InForce:
    """Return what reviews say in a round: what they said when the round was first asked for, so that it repeats.

    Args:
        run_folder: the run's folder at this site.
        round_number: the round; 0, while joining, is as of now.
        now: returns what they say now.

    Raises:
        OSError: the record of the round cannot be written.
    """
    if round_number == 0:
        return now()
    path = run_folder / ROUNDS
    for line in read_json_lines(path):
        if line.get("round") == round_number:
            try:
                return InForce.model_validate_json(json.dumps(line))
            except ValidationError:
                logger.warning("%s: a line of round %d cannot be understood.", path, round_number)
    current = now()
    append_json_line(path, current.model_dump(mode="json"))
    return current


def with_reviewed_labels(
    found: Inventory, labels: Mapping[str, str], store: ReviewStore, sha256: Callable[[Path], str]
) -> Inventory:
    """Make unlabeled cases labeled where a review left a label. Cases for validation stay what they are.

    A label whose file is gone or altered is logged and not used.

    Args:
        found: the site's cases.
        labels: case -> SHA-256 of the label.
        store: the site's reviews.
        sha256: returns a file's content hash, or raises OSError.
    """
    return replace(found, cases=tuple(_reviewed(case, labels.get(case.id), store, sha256) for case in found.cases))


def _reviewed(case: Case, label: str | None, store: ReviewStore, sha256: Callable[[Path], str]) -> Case:
    if case.role is not Role.UNLABELED or label is None:
        return case
    path = store.mask(label)
    try:
        whole = sha256(path) == label
    except OSError:
        whole = False
    if not whole:
        logger.warning("%s: its reviewed label %s is gone or was altered, so it stays unlabeled.", case.id, path)
        return case
    return replace(case, role=Role.LABELED, label=path)


def without_rejected(
    labels: Mapping[str, StoredPseudoLabel], rejected: Mapping[str, Sequence[str]], sha256: Callable[[Path], str]
) -> dict[str, StoredPseudoLabel]:
    """Return the pseudo-labels that no rater rejected; one that was made anew since is another one.

    Raises:
        OSError: a pseudo-label's file cannot be read.
    """
    return {
        case: label
        for case, label in labels.items()
        if case not in rejected or sha256(label.target.path) not in rejected[case]
    }
