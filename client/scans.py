"""A site's scans: loaded when needed, kept within a memory limit, quarantined one by one where they are bad."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from client.progress import ProgressLog
from client.site_config import SiteConfig, annotated_classes, inventory
from semisam_core.data.cases import Case, Inventory, Quarantined, Role
from semisam_core.data.patches import TrainingScan
from semisam_core.data.scans import Scan, keep_classes, load_scan
from semisam_core.errors import CaseError
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.fusion import PseudoLabel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScanPair:
    """One scan on two grids: the one on which the specialist learns, and the one on which generalists see it."""

    scan: Scan
    closer: Scan


class SiteScans:
    """The scans that one site contributes to one plan.

    Every case is read once before any is used. One that cannot be read is quarantined, and the others still count.

    Args:
        config: the site's YAML.
        plan: the study plan.
        progress: where preparing is reported.

    Raises:
        ConfigError: folders or lists of the YAML are wrong, or nothing could teach here.
    """

    def __init__(self, config: SiteConfig, plan: Plan, progress: ProgressLog) -> None:
        self._config, self._plan, self._progress = config, plan, progress
        self._found: Inventory = inventory(config, plan)
        self._checked = False
        self._quarantined: dict[str, Quarantined] = {q.id: q for q in self._found.quarantined}
        self._cache: OrderedDict[str, Scan] = OrderedDict()
        self.annotated = annotated_classes(config, plan)

    @property
    def quarantined(self) -> list[Quarantined]:
        """The cases that cannot be used, and why."""
        return list(self._quarantined.values())

    def check(self) -> None:
        """Read every case once, and quarantine those that cannot be used."""
        if self._checked:
            return
        for done, case in enumerate(self._found.cases):
            self._progress("prepare", done, len(self._found.cases), "scans")
            self.load(case)
        self._progress("prepare", len(self._found.cases), len(self._found.cases), "scans")
        self._checked = True

    def usable(self, *roles: Role) -> list[Case]:
        """Return the cases in these roles that are not quarantined."""
        self.check()
        return [c for c in self._found.cases if c.role in roles and c.id not in self._quarantined]

    def counts(self) -> dict[str, float | int]:
        """Return how many cases there are in each role, and in quarantine."""
        return {
            "labeled": len(self.usable(Role.LABELED)),
            "unlabeled": len(self.usable(Role.UNLABELED)),
            "validation": len(self.usable(Role.VALIDATION)),
            "quarantined": len(self._quarantined),
        }

    def load(self, case: Case) -> Scan | None:
        """Return a case on the plan's grid, labeled with the annotated classes only; None if it is quarantined."""
        if case.id in self._quarantined:
            return None
        if case.id in self._cache:
            self._cache.move_to_end(case.id)
            return self._cache[case.id]
        scan = self._read(case, self._plan)
        if scan is None:
            return None
        self._cache[case.id] = scan
        limit = self._config.storage.memory_gb * 1e9
        while len(self._cache) > 1 and sum(s.image.nbytes for s in self._cache.values()) > limit:
            self._cache.popitem(last=False)
        return scan

    def load_pair(self, case: Case) -> ScanPair | None:
        """Return a case on both grids; None if it is quarantined."""
        scan = self.load(case)
        seen_by_generalists = self._plan.as_generalists_see
        if scan is None or seen_by_generalists == self._plan:
            return None if scan is None else ScanPair(scan, scan)
        closer = self._read(case, seen_by_generalists)
        return None if closer is None else ScanPair(scan, closer)

    def pair_loaders(self, role: Role) -> list[tuple[str, Callable[[], ScanPair | None]]]:
        """Return (case id, loader of both grids) of every usable case in a role."""
        return [(case.id, partial(self.load_pair, case)) for case in self.usable(role)]

    def training_loader(self, case: Case, label: PseudoLabel | None = None) -> Callable[[], TrainingScan]:
        """Return a loader of a case for training, with its pseudo-label, or without one with its own label if any.

        The loader raises CaseError if the case became unusable since the round began.
        """

        def load() -> TrainingScan:
            scan = self.load(case)
            if scan is None:
                raise CaseError(f"{case.id}: the case became unusable during the round.")
            if label is None:
                return TrainingScan(scan.image, scan.label)
            return TrainingScan(scan.image, None, label.target, label.uncertainty, label.valid)

        return load

    def _read(self, case: Case, plan: Plan) -> Scan | None:
        try:
            scan = load_scan(case, plan, self._config.storage.folder / "prepared")
        except CaseError as error:
            logger.warning("A case is quarantined: %s", error)
            self._quarantined[case.id] = Quarantined(case.id, str(error))
            return None
        return scan if scan.label is None else replace(scan, label=keep_classes(scan.label, self.annotated))
