"""A site's pseudo-labels: its generalists, what it stores of them, and when they are asked again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from client.progress import ProgressLog
from client.scans import ScanPair
from client.site_config import SiteConfig, annotated_classes, usable_generalists
from semisam_core.data.scans import resample
from semisam_core.errors import WeightsError
from semisam_core.generalists import EmbeddingStore, Generalist, load_generalist, scan_key
from semisam_core.inference import predict
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.calibration import LabeledExample, calibrate
from semisam_core.pseudo_labels.cold_start import ColdStarter, Prototypes, background_only, cold_start_of
from semisam_core.pseudo_labels.fusion import Calibration, PseudoLabel, make_pseudo_label, policy_of
from semisam_core.pseudo_labels.store import PseudoLabelStore

logger = logging.getLogger(__name__)
CALIBRATION_SCANS = 8


Scans = Iterable[tuple[str, Callable[[], ScanPair | None]]]
Predict = Callable[[ScanPair], Tensor]


class Labeler:
    """Labels a site's unlabeled scans with its own frozen generalists, prompted by the teacher.

    Args:
        config: the site's YAML.
        plan: the study plan.
        folder: the run's folder at this site.
        device: where to compute.
        progress: where to report.
    """

    def __init__(
        self, config: SiteConfig, plan: Plan, folder: Path, device: torch.device, progress: ProgressLog
    ) -> None:
        self._config, self._plan, self._device, self._progress = config, plan, device, progress
        self._closer = plan.as_generalists_see
        self._kept = PseudoLabelStore(folder / "pseudo_labels")
        self._kept_cold = PseudoLabelStore(folder / "pseudo_labels_cold")
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

        Where nothing is labeled, a cold start does nothing: before `first_round` every class of every scan is refused
        as empty, afterwards the teacher prompts as ever.

        Args:
            round_number: counts from 1.
            teacher: whose predictions become prompts, unless prototypes do in a cold start.
            unlabeled: (case, loader) of what is to be labeled; a loader gives None for a case that became unusable.
            labeled: likewise, what generalists and volumes are judged by.
        """
        policy = self._plan.pseudo_labels
        if policy is None or not self.active:
            return {}
        scans = list(labeled)
        cold = policy.cold(round_number)
        if cold and (starter := self._starter(scans)) is not None:
            # Neither prototypes nor prompts change while the start is cold.
            return self._label(
                unlabeled, scans, self._by_prototypes(starter, scans), self._kept_cold, round_number == 1
            )
        if round_number >= policy.first_round:
            predict_by = partial(self._predict, teacher)
            return self._label(unlabeled, scans, predict_by, self._kept, policy.due(round_number))
        return self._label(unlabeled, (), self._nothing, self._kept_cold, True) if cold else {}

    def _label(
        self, unlabeled: Scans, labeled: Scans, predict_by: Predict, kept: PseudoLabelStore, anew: bool
    ) -> dict[str, PseudoLabel]:
        calibration: Calibration | None = None
        found: dict[str, PseudoLabel] = {}
        cases = list(unlabeled)
        for done, (case, load) in enumerate(cases):
            self._progress("pseudo-label", done, len(cases), "scans")
            pair = load()
            if pair is None:
                continue
            key = scan_key(pair.scan.image)
            label = None if anew else kept.load(key)
            if label is None:
                if calibration is None:
                    calibration = self._calibration(predict_by, labeled)
                label = self._ask(pair, predict_by(pair), calibration)
                kept.save(key, label)
            found[case] = label
        self._progress("pseudo-label", len(cases), len(cases), "scans")
        return found

    def _starter(self, labeled: Scans) -> ColdStarter | None:
        """Return what starts cold here, or None, and say so, where no scan is labeled or the generalist is missing."""
        name = cold_start_of(policy_of(self._plan)).generalist
        generalist = next((each for each in self.generalists if each.card.name == name), None)
        if generalist is None:
            logger.warning("Cold start does nothing at this site: it does not have the generalist %s.", name)
        elif not labeled:
            logger.warning("Cold start does nothing at this site: it has no labeled scan to take prototypes from.")
        else:
            return ColdStarter(generalist, self._embeddings, self._closer, self._embedded)
        return None

    def _by_prototypes(self, starter: ColdStarter, labeled: Scans) -> Predict:
        learned: list[Prototypes] = []  # when the first scan needs them: mostly pseudo-labels are there already

        def predict_by(pair: ScanPair) -> Tensor:
            try:
                if not learned:
                    learned.append(starter.learn((each.closer.image, label) for each, label in _labeled(labeled)))
                return starter.rough(pair.closer.image, learned[0])
            except (RuntimeError, ValueError) as error:  # as when it is asked: one scan does not stop the others
                logger.warning("The generalist failed on a scan in a cold start: %s", error)
                return self._nothing(pair)

        return predict_by

    def _nothing(self, pair: ScanPair) -> Tensor:
        return background_only(pair.closer.image, len(self._plan.task.classes))

    def _embedded(self, done: int, total: int) -> None:
        self._progress("embed", done, total, "slices")

    def ask(self, pair: ScanPair, network: nn.Module, calibration: Calibration | None = None) -> PseudoLabel:
        """Ask this site's generalists about one scan, prompted by a network; the answer is on the specialist's grid."""
        return self._ask(pair, self._predict(network, pair), calibration)

    def _ask(self, pair: ScanPair, prediction: Tensor, calibration: Calibration | None) -> PseudoLabel:
        closer = pair.closer
        label = make_pseudo_label(
            closer.image, prediction, self.generalists, self._embeddings, self._closer, calibration, self._embedded
        )
        return label.moved(lambda maps: resample(maps, closer.grid, pair.scan.grid))

    def _calibration(self, predict_by: Predict, labeled: Scans) -> Calibration:
        examples = (LabeledExample(each.closer.image, label, predict_by(each)) for each, label in _labeled(labeled))
        annotated = annotated_classes(self._config, self._plan)
        return calibrate(examples, self.generalists, self._embeddings, self._closer, annotated)

    def _predict(self, network: nn.Module, pair: ScanPair) -> Tensor:
        prediction = predict(network, pair.scan.image, self._plan, self._device)
        return resample(prediction, pair.scan.grid, pair.closer.grid)


def _labeled(scans: Scans) -> Iterator[tuple[ScanPair, Tensor]]:
    """Yield the first labeled scans with their labels on the generalists' grid."""
    for _, load in list(scans)[:CALIBRATION_SCANS]:
        pair = load()
        if pair is not None and pair.closer.label is not None:
            yield pair, pair.closer.label
