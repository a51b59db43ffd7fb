"""One rater at work on the pseudo-labels of one run: what to look at, opening a scan, keeping what was said."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from client.progress import ProgressLog
from client.reviews import FOLDER, ReviewRecord, ReviewStore, decision_on
from client.scans import SiteScans
from client.site_config import SiteConfig
from review.masks import Mask, check_mask, label_bytes, mask_of, read_mask
from review.worklist import WorklistEntry, mean_volumes_ml, ranked
from semisam_core.configuration import NAME_ACCEPTED, is_name
from semisam_core.data.cases import Case, Role
from semisam_core.data.geometry import Geometry
from semisam_core.data.scans import file_sha256
from semisam_core.errors import ConfigError, SemiSAMError
from semisam_core.files import utc_stamp
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.store import PseudoLabelStore, StoredPseudoLabel

logger = logging.getLogger(__name__)
Tool = Literal["page", "nifti", "dicom-seg", "simulated"]
STORES = ("pseudo_labels", "pseudo_labels_cold")


class ReviewError(SemiSAMError):
    """A review that cannot be kept, or a scan that cannot be reviewed."""


@dataclass(frozen=True)
class Opened:
    """A scan under review.

    Attributes:
        case: its files.
        grid: of its image file.
        mask: the pseudo-label as it is shown.
        sha256: of that mask's file.
        source: SHA-256 of the pseudo-label's file; None if there is none.
        run: the run that made it.
        round: the round that made it.
        refused: class -> the gate that refused it.
        images: SHA-256 of the image files.
    """

    case: Case
    grid: Geometry
    mask: Mask
    sha256: str
    source: str | None
    run: str
    round: int | None
    refused: Mapping[str, str]
    images: tuple[str, ...]


class Reviewing:
    """The reviews of one site.

    Args:
        config: the site's YAML.
        plan: the plan of the run.
        rater: a pseudonym.
        run: the run's name; None for the one whose pseudo-labels are newest.
        second: look again at what other raters were shown, in place of the worklist; to see how far raters agree.

    Raises:
        ConfigError: the rater's name is not accepted, the plan is private, or the site has no such run.
        SplitChangedError: the split is not the one that the run began with.
        OSError: the storage cannot be written.
    """

    def __init__(
        self, config: SiteConfig, plan: Plan, rater: str, run: str | None = None, second: bool = False
    ) -> None:
        if not is_name(rater):
            raise ConfigError(f"--rater {rater!a}: a pseudonym is expected: {NAME_ACCEPTED}.")
        if plan.privacy is not None:
            raise ConfigError(
                "this plan protects patients by differential privacy. Which scans are reviewed depends on the others', "
                "which its accounting does not cover; so reviewed labels are not trained on under it."
            )
        self.plan, self.rater, self.second = plan, rater, second
        self.store = ReviewStore(config.storage.folder)
        self.run = run or _newest_run(config)
        self._folder = config.storage.folder / "runs" / self.run
        if not is_name(self.run) or not self._folder.is_dir():
            raise ConfigError(f"--run {self.run!a}: this site has no run of this name in {config.storage.folder}/runs.")
        self.store.prepare()
        progress = ProgressLog(config.storage.folder / FOLDER / "progress.jsonl", 0)
        self._scans = SiteScans(config, plan, progress, self._folder)

    def worklist(self) -> list[WorklistEntry]:
        """Return the scans to look at: the unlabeled ones whose pseudo-label this rater has not rated, by doubt.

        On a second look, the scans that other raters rated and this one has not, by id.
        """
        if self.second:
            return [WorklistEntry(case, (), first.round) for case, first in sorted(self._to_read_again().items())]
        rated: dict[str, set[str | None]] = {}
        for record in self.store.records():
            if record.rater == self.rater:
                rated.setdefault(record.case, set()).add(record.source)
        cases = [(case, self._pseudo_label(key)) for case, key, _ in self._scans.keyed_pair_loaders(Role.UNLABELED)]
        found = [(case, label) for case, label in cases if label is not None]
        labeled = [lambda case=case: self._scans.load(case) for case in self._scans.usable(Role.LABELED)]
        new = [
            (case, label)
            for case, label in found
            if case not in rated or file_sha256(label.target.path) not in rated[case]
        ]
        return ranked(new, mean_volumes_ml(labeled, self.plan), self.plan)

    def open(self, name: str) -> Opened:
        """Open a scan with its pseudo-label; on a second look, with the mask that the first rater was shown.

        Raises:
            ReviewError: there is no such scan, it has no pseudo-label, or it changed since the first look.
            CaseError: a file cannot be read.
        """
        first = self._to_read_again().get(name) if self.second else None
        if self.second and first is None:
            raise ReviewError(f"{name}: no other rater has rated it, or this one has already.")
        roles = (Role.UNLABELED, Role.LABELED) if self.second else (Role.UNLABELED,)
        keys = {case: key for case, key, _ in self._scans.keyed_pair_loaders(Role.UNLABELED)}
        case = next((each for each in self._scans.usable(*roles) if each.id == name), None)
        if case is None:
            raise ReviewError(f"{name}: there is no unlabeled scan of this name that can be used.")
        images = self._scans.image_hashes(case)
        if images is None:
            raise ReviewError(f"{name}: its image cannot be read any more.")
        if first is not None:
            if first.images != images:
                raise ReviewError(f"{name}: its image is another one than the first rater saw.")
            mask, grid = read_mask(self.store.mask(first.pseudo_label), case, self.plan)
            return Opened(case, grid, mask, first.pseudo_label, first.source, first.run, first.round, {}, images)
        label, scan = self._pseudo_label(keys.get(name)), self._scans.load(case)
        if label is None or scan is None:
            raise ReviewError(f"{name}: the run {self.run} has no pseudo-label of it (yet).")
        source = file_sha256(label.target.path)
        mask = mask_of(label, scan)
        shown = self.store.keep(label_bytes(mask, scan.original, self.plan.task, case.images[0]))
        named = zip(self.plan.class_names, label.refusals, strict=True)
        refused = {each: refusal.value for each, refusal in named if refusal is not None}
        return Opened(case, scan.original, mask, shown, source, self.run, label.round, refused, images)

    def keep(
        self, opened: Opened, ratings: Mapping[str, int], minutes: float, label: Mask | None, tool: Tool
    ) -> ReviewRecord:
        """Keep what the rater said, and the label if there is one. The next round trains on it.

        Args:
            opened: what was looked at.
            ratings: class -> 1 to 4.
            minutes: how long it took.
            label: the mask as accepted or corrected; None to keep the ratings alone.
            tool: with what it was drawn.

        Raises:
            ReviewError: ratings and label contradict each other, or a value is not accepted.
            CaseError: the mask does not fit the scan.
            OSError: the storage cannot be written.
        """
        if label is None and all(rating == 1 for rating in ratings.values()):
            label = opened.mask  # no revision needed: it is the label
        unchanged, kept = False, None
        if label is not None:
            check_mask(label, opened.grid, self.plan.task, opened.case.id)
            unchanged = bool(np.array_equal(label, opened.mask))
        try:
            decision = decision_on(ratings, label is not None, unchanged)
            if label is not None:
                content = label_bytes(label, opened.grid, self.plan.task, opened.case.images[0])
                kept = opened.sha256 if unchanged else self.store.keep(content)
            record = ReviewRecord(
                time=utc_stamp(),
                case=opened.case.id,
                rater=self.rater,
                ratings=dict(ratings),
                minutes=round(float(minutes), 2),
                decision=decision,
                pseudo_label=opened.sha256,
                source=opened.source,
                label=kept,
                run=opened.run,
                round=opened.round,
                images=opened.images,
                classes=self._classes,
                tool=tool,
            )
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ReviewError(f"{opened.case.id}: {where + ': ' if where else ''}{first['msg']}.") from None
        except ValueError as error:
            raise ReviewError(f"{opened.case.id}: {error}.") from None
        self.store.append(record)
        return record

    @property
    def _classes(self) -> dict[str, tuple[int, ...]]:
        return {each.name: tuple(each.label_values) for each in self.plan.task.classes}

    def _pseudo_label(self, key: str | None) -> StoredPseudoLabel | None:
        """Return the newest pseudo-label of a scan in this run."""
        if key is None:
            return None
        found = [PseudoLabelStore(self._folder / name).open(key) for name in STORES]
        return max((each for each in found if each is not None), key=lambda each: each.round or 0, default=None)

    def _to_read_again(self) -> dict[str, ReviewRecord]:
        """Return case -> another rater's last word on it, where this one has not rated what was shown."""
        records = self.store.records()
        mine = {(record.case, record.pseudo_label) for record in records if record.rater == self.rater}
        classes = self._classes
        others = {each.case: each for each in records if each.rater != self.rater and each.classes == classes}
        return {case: record for case, record in others.items() if (case, record.pseudo_label) not in mine}


def _newest_run(config: SiteConfig) -> str:
    def age(folder: Path) -> float:
        return max((file.stat().st_mtime for name in STORES for file in (folder / name).glob("*")), default=0.0)

    runs = config.storage.folder / "runs"
    found = {folder: age(folder) for folder in (sorted(runs.iterdir()) if runs.is_dir() else ()) if folder.is_dir()}
    with_labels = {folder: when for folder, when in found.items() if when}
    if not with_labels:
        raise ConfigError(
            f"site {config.site}: no run in {runs} has pseudo-labels. A study makes them from "
            "pseudo_labels.first_round on, of scans without a label."
        )
    return max(with_labels, key=lambda folder: with_labels[folder]).name
