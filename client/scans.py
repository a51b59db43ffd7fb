"""A site's scans: loaded on demand, cached within a memory limit, and quarantined if they cannot be used."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import semisam_core
from client.file_index import FileIndex, Verdict
from client.progress import ProgressLog
from client.reviews import InForce, ReviewStore, in_force, reviews_of_round, with_reviewed_labels, without_rejected
from client.site_config import SiteConfig, annotated_classes, inventory, makes_pseudo_labels
from client.split import run_split
from semisam_core.data.cases import Case, Inventory, Quarantined, Role
from semisam_core.data.geometry import Geometry
from semisam_core.data.nifti import planned_shape
from semisam_core.data.patches import TrainingScan
from semisam_core.data.patients import read_patients
from semisam_core.data.scans import Scan, StoredVolume, keep_classes, load_scan, prepared_key, stored_image
from semisam_core.errors import CaseError
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.memory import check_pseudo_label_memory, pseudo_label_bytes
from semisam_core.pseudo_labels.store import StoredPseudoLabel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScanPair:
    """One scan on two grids: the one the specialist trains on, and the one generalists see; often the same."""

    scan: Scan
    for_generalists: Scan


class SiteScans:
    """One site's scans as one plan uses them.

    Every case is read once before any is used: in the site's whole life, not in each process. The verdict on it is kept
    in the site's index of files and holds until its content, the plan's grid or the memory limit changes; whether a
    file has changed is asked of the file system, at every message. Cases that cannot be used are quarantined, and the
    site works with the rest.

    Args:
        config: the site's YAML.
        plan: the study plan.
        progress: the site's progress log.
        run_folder: the run's folder at this site, whose split is followed; None for the split of now.
        round_number: the round, whose reviewed labels are taken up; 0, while joining, for those of now.

    Attributes:
        annotated: the plan's classes (from 1) that the site's labels mark.
        split_sha256: hash of the run's split; None without a run.

    Raises:
        ConfigError: folders or lists in the YAML are invalid, or the site has nothing to learn from.
        SplitChangedError: the split is not the one that the run began with.
        OSError: the run's folder cannot be written.
    """

    def __init__(
        self,
        config: SiteConfig,
        plan: Plan,
        progress: ProgressLog,
        run_folder: Path | None = None,
        round_number: int = 0,
    ) -> None:
        self._config, self._plan, self._progress = config, plan, progress
        self._found: Inventory = inventory(config, plan)
        self.split_sha256: str | None = None
        self._patients = read_patients(config.data.images) or {}
        self._index = FileIndex(config.storage.folder / "files.jsonl")
        self._reviews = InForce(round=round_number, labels={}, rejected={})
        if run_folder is not None:
            split = run_split(run_folder, config.storage.folder, self._found, self._patients)
            kept = tuple(case for case in self._found.cases if case.id in split.roles)
            self._found, self.split_sha256 = replace(self._found, cases=kept), split.sha256
            if config.data.reviewed and plan.privacy is None:
                self._reviews = reviews_of_round(run_folder, round_number, lambda: self._reviews_now(round_number))
                store = ReviewStore(config.storage.folder)
                self._found = with_reviewed_labels(self._found, self._reviews.labels, store, self._index.sha256)
        self._checked = False
        self._quarantined: dict[str, Quarantined] = {q.id: q for q in self._found.quarantined}
        self._cache: OrderedDict[str, Scan] = OrderedDict()
        self._limit = config.storage.memory_gb * 1e9
        self.annotated = annotated_classes(config, plan)

    @property
    def quarantined(self) -> list[Quarantined]:
        """The cases that cannot be used, with the reasons."""
        return list(self._quarantined.values())

    def check(self, again: bool = False) -> None:
        """Quarantine the cases that cannot be used; on the first call only.

        Args:
            again: read those again that could not be used before: the disk or the memory may have been at fault.
        """
        if self._checked:
            return
        for done, case in enumerate(self._found.cases):
            self._progress("prepare", done, len(self._found.cases), "scans")
            self._check(case, again)
        self._progress("prepare", len(self._found.cases), len(self._found.cases), "scans")
        self._checked = True

    def _check(self, case: Case, again: bool) -> None:
        key = self._verdict_key(case)
        verdict = None if key is None else self._index.verdict(key)
        if verdict is None or (again and verdict.reason is not None):
            self.load(case)
        elif verdict.reason is not None:
            self._quarantine(case, verdict.reason)

    def usable(self, *roles: Role) -> list[Case]:
        """Return the cases in these roles that are not quarantined."""
        self.check()
        return [c for c in self._found.cases if c.role in roles and c.id not in self._quarantined]

    def patients(self) -> dict[str, list[Case]]:
        """Return patient -> the usable cases of theirs that are trained on, with or without a label."""
        found: dict[str, list[Case]] = {}
        for case in self.usable(Role.LABELED, Role.UNLABELED):
            found.setdefault(self.patient(case), []).append(case)
        return found

    def identities(self) -> set[str]:
        """Return everything by which the patients that are trained on may be recognised: pseudonyms and file contents.

        Raises:
            OSError: a file cannot be read any more.
        """
        found = set()
        for patient, cases in self.patients().items():
            files = (path for case in cases for path in case.images)
            found |= {f"patient|{patient}", *(f"file|{self._index.sha256(path)}" for path in files)}
        return found

    def counts(self) -> dict[str, float | int]:
        """Return the numbers of usable cases by role, and of quarantined cases."""
        return {
            "labeled": len(self.usable(Role.LABELED)),
            "unlabeled": len(self.usable(Role.UNLABELED)),
            "validation": len(self.usable(Role.VALIDATION)),
            "quarantined": len(self._quarantined),
        }

    def image_hashes(self, case: Case) -> tuple[str, ...] | None:
        """Return the SHA-256 of a case's image files, by channel; None if one cannot be read."""
        try:
            return tuple(self._index.sha256(path) for path in case.images)
        except OSError:
            return None

    def taught_from(self, labels: Mapping[str, StoredPseudoLabel]) -> dict[str, StoredPseudoLabel]:
        """Return the pseudo-labels that this round may learn from: those that no rater rejected.

        Raises:
            OSError: a pseudo-label's file cannot be read.
        """
        return without_rejected(labels, self._reviews.rejected, self._index.sha256)

    def _reviews_now(self, round_number: int) -> InForce:
        cases = {case.id: case for case in self._found.of(Role.UNLABELED)}
        labels, rejected = in_force(
            ReviewStore(self._config.storage.folder).records(),
            self._plan.task,
            lambda name: self.image_hashes(cases[name]) if name in cases else None,
        )
        return InForce(round=round_number, labels=labels, rejected=rejected)

    def patient(self, case: Case) -> str:
        """Return whose scan a case is; one that the manifest does not name counts as a patient of its own."""
        return self._patients.get(case.id, case.id)

    def patient_count(self, cases: Iterable[Case]) -> int:
        """Return of how many patients cases are."""
        return len({self.patient(case) for case in cases})

    def load(self, case: Case) -> Scan | None:
        """Return a case on the plan's grid, its label reduced to the annotated classes; None if it is quarantined."""
        if case.id in self._quarantined:
            return None
        if case.id in self._cache:
            self._cache.move_to_end(case.id)
            return self._cache[case.id]
        scan = self._read(case, self._plan)
        if scan is None:
            return None
        self._cache[case.id] = scan
        self._forget_beyond(self._limit)
        return scan

    def _forget_beyond(self, limit: float) -> None:
        """Forget the least recently used scans until what is cached takes no more than a limit; keep the last one."""
        while len(self._cache) > 1 and sum(_bytes(each) for each in self._cache.values()) > limit:
            self._cache.popitem(last=False)

    def load_pair(self, case: Case) -> ScanPair | None:
        """Return a case on both grids; None if it is quarantined, or too large for the work of generalists on it.

        Other scans that are cached leave room for that work.
        """
        scan = self.load(case)
        if scan is None or not self._fits(scan):
            return None
        plan = self._plan.as_generalists_see
        if plan == self._plan:
            return ScanPair(scan, scan)
        for_generalists = self._read(case, plan)
        return None if for_generalists is None else ScanPair(scan, for_generalists)

    def _fits(self, scan: Scan) -> bool:
        if self._plan.pseudo_labels is None:
            return True
        try:
            check_pseudo_label_memory(scan.id, scan.original, self._plan, self._config.storage.memory_gb)
        except CaseError as error:
            logger.warning("A labeled case is not shown to generalists: %s", error)
            return False
        needed = pseudo_label_bytes(
            planned_shape(scan.original, self._plan.as_generalists_see.data.spacing_mm), scan.grid.shape, self._plan
        )
        self._forget_beyond(self._limit - needed + scan.image.nbytes)
        return True

    def pair_loaders(self, role: Role) -> list[tuple[str, Callable[[], ScanPair | None]]]:
        """Return (case id, loader of the scan pair) for every usable case in a role."""
        return [(case.id, partial(self.load_pair, case)) for case in self.usable(role)]

    def keyed_pair_loaders(self, role: Role) -> list[tuple[str, str | None, Callable[[], ScanPair | None]]]:
        """Return (case id, key, loader of the scan pair) for every usable case in a role.

        The key is that of the scan's content on the plan's grid; None if a file of the case cannot be read.
        """
        return [(case.id, self._content_key(case), partial(self.load_pair, case)) for case in self.usable(role)]

    def training_loader(self, case: Case, label: StoredPseudoLabel | None = None) -> Callable[[], TrainingScan]:
        """Return a loader of a training scan, with the given pseudo-label or else the case's own label, if it has one.

        The loader raises CaseError if the case has become unusable during the round.
        """

        def load() -> TrainingScan:
            image = self._stored(case) if case.label is None or label is not None else None
            scan = self.load(case) if image is None else None
            seen = image if scan is None else scan.image
            if seen is None:
                raise CaseError(f"{case.id}: the case became unusable during the round.")
            if label is None:
                return TrainingScan(seen, None if scan is None else scan.label)
            return TrainingScan(seen, None, label.target, label.uncertainty, label.valid, label)

        return load

    def _read(self, case: Case, plan: Plan) -> Scan | None:
        key, storage = self._verdict_key(case), self._config.storage
        try:
            scan = load_scan(
                case, plan, storage.folder / "prepared", storage.memory_gb, self._index.sha256, self._checker(case)
            )
        except CaseError as error:
            self._judge(case, plan, key, str(error))
            self._quarantine(case, str(error))
            return None
        self._judge(case, plan, key, None)
        return scan if scan.label is None else replace(scan, label=keep_classes(scan.label, self.annotated))

    def _checker(self, case: Case) -> Callable[[Geometry], None]:
        """Return what checks by a header whether the pseudo-label of a case fits, if it gets one."""
        if not self._labels_by_generalists(case):
            return lambda _: None
        return lambda grid: check_pseudo_label_memory(case.id, grid, self._plan, self._config.storage.memory_gb)

    def _labels_by_generalists(self, case: Case) -> bool:
        return case.role is Role.UNLABELED and makes_pseudo_labels(self._config, self._plan)

    def _stored(self, case: Case) -> StoredVolume | None:
        """Return a case's image on disk, for reading patches; None if it is in memory, not prepared or quarantined."""
        if case.id in self._cache or case.id in self._quarantined:
            return None
        try:
            return stored_image(case, self._plan, self._config.storage.folder / "prepared", self._index.sha256)
        except CaseError:
            return None  # loading it says why

    def _judge(self, case: Case, plan: Plan, key: str | None, reason: str | None) -> None:
        """Keep the verdict on a case, unless a file of it changed while it was read."""
        if key is not None and plan == self._plan and key == self._verdict_key(case):
            self._index.judge(key, Verdict(reason))

    def _quarantine(self, case: Case, reason: str) -> None:
        logger.warning("A case is quarantined: %s", reason)
        self._quarantined[case.id] = Quarantined(case.id, reason)

    def _verdict_key(self, case: Case) -> str | None:
        """Return a hash of what the verdict on a case depends on; None if a file cannot be read."""
        content = self._content_key(case)
        if content is None:
            return None
        code, limit = semisam_core.__version__, self._config.storage.memory_gb
        policy = self._plan.pseudo_labels if self._labels_by_generalists(case) else None
        made = "" if policy is None else policy.model_dump_json()
        return hashlib.sha256(f"{content}|{case.id}|{limit}|{made}|{code}".encode()).hexdigest()

    def _content_key(self, case: Case) -> str | None:
        try:
            return prepared_key(case, self._plan, self._index.sha256)
        except CaseError:
            return None


def _bytes(scan: Scan) -> int:
    return scan.image.nbytes + (0 if scan.label is None else scan.label.nbytes)
