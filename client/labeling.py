"""A site's pseudo-labels: its generalists, what it stores of them, and when they are asked again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from client.progress import Progress
from client.site_config import SiteConfig, annotated_classes, usable_generalists
from semisam_core.calibration import LabeledExample, learn
from semisam_core.data.scans import Scan
from semisam_core.errors import WeightsError
from semisam_core.generalists import EmbeddingStore, Generalist, load_generalist, scan_key
from semisam_core.inference import predict
from semisam_core.plan import Plan
from semisam_core.pseudo_labels import Experience, PseudoLabel, PseudoLabelStore, make_pseudo_label

logger = logging.getLogger(__name__)
CALIBRATION_SCANS = 8

Scans = Iterable[tuple[str, Callable[[], Scan | None]]]


class Labeler:
    """Labels a site's unlabeled scans with its own frozen generalists, prompted by the teacher.

    Args:
        config: the site's YAML.
        plan: the study plan.
        folder: the run's folder at this site.
        device: where to compute.
        progress: where to report.
    """

    def __init__(self, config: SiteConfig, plan: Plan, folder: Path, device: torch.device, progress: Progress) -> None:
        self._config, self._plan, self._device, self._progress = config, plan, device, progress
        self._kept = PseudoLabelStore(folder / "pseudo_labels")
        limit = int(config.storage.embeddings_gb * 1e9)
        self._embeddings = EmbeddingStore(config.storage.folder / "embeddings", limit)

    @cached_property
    def generalists(self) -> Sequence[Generalist]:
        """The plan's generalists that this site has and could load; one that cannot be does not stop the others.

        Raises:
            WeightsError: the site has some of the plan's generalists, and none of them could be loaded.
        """
        loaded: list[Generalist] = []
        failures: list[str] = []
        for name in usable_generalists(self._config, self._plan):
            entry = self._config.generalists[name]
            weights = None if entry.weights == "packaged" else Path(entry.weights)
            try:
                loaded.append(load_generalist(name, self._device, weights, entry.sha256))
            except WeightsError as error:
                failures.append(str(error))
        if failures and not loaded:
            raise WeightsError(" ".join(failures))
        for failure in failures:
            logger.error("A generalist is left out at this site: %s", failure)
        return loaded

    @property
    def active(self) -> bool:
        """Whether the plan wants pseudo-labels and this site has a generalist for them."""
        return bool(usable_generalists(self._config, self._plan))

    def labels(self, round_number: int, teacher: nn.Module, unlabeled: Scans, labeled: Scans) -> dict[str, PseudoLabel]:
        """Return each unlabeled case's pseudo-label, made anew where the plan says so, else as it was kept.

        Args:
            round_number: counts from 1.
            teacher: whose predictions become prompts.
            unlabeled: (case, loader) of what is to be labeled; a loader gives None for a case that became unusable.
            labeled: likewise, what generalists and volumes are judged by.
        """
        policy = self._plan.pseudo_labels
        if policy is None or not self.active or round_number < policy.first_round:
            return {}
        experience: Experience | None = None
        found: dict[str, PseudoLabel] = {}
        cases = list(unlabeled)
        for done, (case, load) in enumerate(cases):
            self._progress("pseudo-label", done, len(cases), "scans")
            scan = load()
            if scan is None:
                continue
            key = scan_key(scan.image)
            label = None if policy.due(round_number) else self._kept.load(key)
            if label is None:
                if experience is None:
                    experience = self._experience(teacher, labeled)
                label = self.ask(scan, teacher, experience)
                self._kept.save(key, label)
            found[case] = label
        self._progress("pseudo-label", len(cases), len(cases), "scans")
        return found

    def ask(self, scan: Scan, network: nn.Module, experience: Experience | None = None) -> PseudoLabel:
        """Ask this site's generalists about one scan, prompted by a network."""
        return make_pseudo_label(
            scan.image,
            self._predict(network, scan),
            self.generalists,
            self._embeddings,
            self._plan,
            experience,
            lambda done, total: self._progress("embed", done, total, "slices"),
        )

    def _experience(self, teacher: nn.Module, labeled: Scans) -> Experience:
        def examples() -> Iterator[LabeledExample]:
            for _, load in list(labeled)[:CALIBRATION_SCANS]:
                scan = load()
                if scan is not None and scan.label is not None:
                    yield LabeledExample(scan.image, scan.label, self._predict(teacher, scan))

        annotated = annotated_classes(self._config, self._plan)
        return learn(examples(), self.generalists, self._embeddings, self._plan, annotated)

    def _predict(self, network: nn.Module, scan: Scan) -> Tensor:
        return predict(network, scan.image, self._plan, self._device)
