"""A site's scans: loaded on demand, cached within a memory limit, and quarantined if they cannot be used."""

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
    """One scan on two grids: the one the specialist trains on, and the one generalists see; often the same."""

    scan: Scan
    for_generalists: Scan


class SiteScans:
    """One site's scans as one plan uses them.

    Every case is read once before any is used. Those that cannot be read are quarantined, and the site works with the
    rest.

    Args:
        config: the site's YAML.
        plan: the study plan.
        progress: the site's progress log.

    Attributes:
        annotated: the plan's classes (from 1) that the site's labels mark.

    Raises:
        ConfigError: folders or lists in the YAML are invalid, or the site has nothing to learn from.
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
        """The cases that cannot be used, with the reasons."""
        return list(self._quarantined.values())

    def check(self) -> None:
        """Read every case, on the first call only, and quarantine those that cannot be used."""
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
        """Return the numbers of usable cases by role, and of quarantined cases."""
        return {
            "labeled": len(self.usable(Role.LABELED)),
            "unlabeled": len(self.usable(Role.UNLABELED)),
            "validation": len(self.usable(Role.VALIDATION)),
            "quarantined": len(self._quarantined),
        }

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
        limit = self._config.storage.memory_gb * 1e9
        while len(self._cache) > 1 and sum(s.image.nbytes for s in self._cache.values()) > limit:
            self._cache.popitem(last=False)
        return scan

    def load_pair(self, case: Case) -> ScanPair | None:
        """Return a case on both grids; None if it is quarantined."""
        scan = self.load(case)
        plan = self._plan.as_generalists_see
        if scan is None or plan == self._plan:
            return None if scan is None else ScanPair(scan, scan)
        for_generalists = self._read(case, plan)
        return None if for_generalists is None else ScanPair(scan, for_generalists)

    def pair_loaders(self, role: Role) -> list[tuple[str, Callable[[], ScanPair | None]]]:
        """Return (case id, loader of the scan pair) for every usable case in a role."""
        return [(case.id, partial(self.load_pair, case)) for case in self.usable(role)]

    def training_loader(self, case: Case, label: PseudoLabel | None = None) -> Callable[[], TrainingScan]:
        """Return a loader of a training scan, with the given pseudo-label or else the case's own label, if it has one.

        The loader raises CaseError if the case has become unusable during the round.
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
            scan = load_scan(case, plan, self._config.storage.folder / "prepared", self._config.storage.memory_gb)
        except CaseError as error:
            logger.warning("A case is quarantined: %s", error)
            self._quarantined[case.id] = Quarantined(case.id, str(error))
            return None
        return scan if scan.label is None else replace(scan, label=keep_classes(scan.label, self.annotated))
