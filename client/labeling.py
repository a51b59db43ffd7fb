"""A site's pseudo-labels: which generalists make them, how they are cached, and when they are refreshed."""

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
from semisam_core.pseudo_labels.calibration import Calibration, LabeledExample, calibrate
from semisam_core.pseudo_labels.cold_start import ColdStarter, Prototypes, background_only, cold_start_of
from semisam_core.pseudo_labels.fusion import PseudoLabel, make_pseudo_label
from semisam_core.pseudo_labels.policy import policy_of
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
        device: the device to compute on.
        progress: the site's progress log.
    """

    def __init__(
        self, config: SiteConfig, plan: Plan, folder: Path, device: torch.device, progress: ProgressLog
    ) -> None:
        self._config, self._plan, self._device, self._progress = config, plan, device, progress
        self._generalist_plan = plan.as_generalists_see
        self._store = PseudoLabelStore(folder / "pseudo_labels")
        self._cold_store = PseudoLabelStore(folder / "pseudo_labels_cold")
        limit = int(config.storage.embeddings_gb * 1e9)
        self._embeddings = EmbeddingStore(config.storage.folder / "embeddings", limit)

    @cached_property
    def generalists(self) -> Sequence[Generalist]:
        """The plan's generalists that this site has and could load. One that fails to load is logged and left out.

        Raises:
            WeightsError: the site has some of the plan's generalists, but none could be loaded.
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
        """Return each unlabeled case's pseudo-label: a fresh one in a refresh round, otherwise the stored one.

        At a site without labeled scans a cold start has no effect: before `first_round` every class of every scan is
        refused as empty; from then on the teacher prompts.

        Args:
            round_number: counts from 1.
            teacher: its predictions become prompts, except in a cold start, where prototypes do.
            unlabeled: (case, loader) of the scans to label. A loader returns None if the case became unusable.
            labeled: (case, loader) of the scans that generalists and volumes are calibrated on.
        """
        policy = self._plan.pseudo_labels
        if policy is None or not self.active:
            return {}
        scans = list(labeled)
        cold = policy.cold(round_number)
        if cold and (starter := self._starter(scans)) is not None:
            # Prototypes, and thus prompts, stay the same for the whole cold start: one refresh is enough.
            return self._label(
                unlabeled, scans, self._prompted_by_prototypes(starter, scans), self._cold_store, round_number == 1
            )
        if round_number >= policy.first_round:
            predict_by = partial(self._predict, teacher)
            return self._label(unlabeled, scans, predict_by, self._store, policy.due(round_number))
        return self._label(unlabeled, (), self._background_only, self._cold_store, True) if cold else {}

    def _label(
        self, unlabeled: Scans, labeled: Scans, predict_by: Predict, store: PseudoLabelStore, refresh: bool
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
            label = None if refresh else store.load(key)
            if label is None:
                if calibration is None:
                    calibration = self._calibration(predict_by, labeled)
                store.save(key, self._ask(pair, predict_by(pair), calibration))
                label = _stored(store, key)  # as later rounds read it: half precision
            found[case] = label
        self._progress("pseudo-label", len(cases), len(cases), "scans")
        return found

    def _starter(self, labeled: Scans) -> ColdStarter | None:
        """Return the site's cold starter; or None, with a log line, if it lacks labeled scans or the generalist."""
        name = cold_start_of(policy_of(self._plan)).generalist
        generalist = next((each for each in self.generalists if each.card.name == name), None)
        if generalist is None:
            logger.warning("Cold start has no effect at this site: the generalist %s is missing here.", name)
        elif not labeled:
            logger.warning("Cold start has no effect at this site: there is no labeled scan to take prototypes from.")
        else:
            return ColdStarter(generalist, self._embeddings, self._generalist_plan, self._report_embedding)
        return None

    def _prompted_by_prototypes(self, starter: ColdStarter, labeled: Scans) -> Predict:
        learned: list[Prototypes] = []  # learned on first use: in most rounds every pseudo-label is already stored

        def predict_by(pair: ScanPair) -> Tensor:
            try:
                if not learned:
                    learned.append(
                        starter.learn((each.for_generalists.image, label) for each, label in _labeled(labeled))
                    )
                return starter.rough(pair.for_generalists.image, learned[0])
            except (RuntimeError, ValueError) as error:  # as for prompts: one scan does not stop the others
                logger.warning("The cold start's generalist failed on a scan, which gets no pseudo-label: %s", error)
                return self._background_only(pair)

        return predict_by

    def _background_only(self, pair: ScanPair) -> Tensor:
        return background_only(pair.for_generalists.image, len(self._plan.task.classes))

    def _report_embedding(self, done: int, total: int) -> None:
        self._progress("embed", done, total, "slices")

    def ask(self, pair: ScanPair, network: nn.Module, calibration: Calibration | None = None) -> PseudoLabel:
        """Return a pseudo-label, on the specialist's grid, from this site's generalists prompted by a network."""
        return self._ask(pair, self._predict(network, pair), calibration)

    def _ask(self, pair: ScanPair, prediction: Tensor, calibration: Calibration | None) -> PseudoLabel:
        seen = pair.for_generalists
        label = make_pseudo_label(
            seen.image,
            prediction,
            self.generalists,
            self._embeddings,
            self._generalist_plan,
            calibration,
            self._report_embedding,
        )
        return label.moved(lambda maps: resample(maps, seen.grid, pair.scan.grid))

    def _calibration(self, predict_by: Predict, labeled: Scans) -> Calibration:
        examples = (
            LabeledExample(each.for_generalists.image, label, predict_by(each)) for each, label in _labeled(labeled)
        )
        annotated = annotated_classes(self._config, self._plan)
        return calibrate(examples, self.generalists, self._embeddings, self._generalist_plan, annotated)

    def _predict(self, network: nn.Module, pair: ScanPair) -> Tensor:
        overlap = None if self._plan.pseudo_labels is None else self._plan.pseudo_labels.window_overlap
        prediction = predict(network, pair.scan.image, self._plan, self._device, overlap)
        return resample(prediction, pair.scan.grid, pair.for_generalists.grid)


def _labeled(scans: Scans) -> Iterator[tuple[ScanPair, Tensor]]:
    """Yield the first CALIBRATION_SCANS labeled scans, with their labels on the generalists' grid."""
    for _, load in list(scans)[:CALIBRATION_SCANS]:
        pair = load()
        if pair is not None and pair.for_generalists.label is not None:
            yield pair, pair.for_generalists.label


def _stored(store: PseudoLabelStore, key: str) -> PseudoLabel:
    """Return a pseudo-label that was just saved.

    Raises:
        OSError: it cannot be read back.
    """
    label = store.load(key)
    if label is None:
        raise OSError(f"the pseudo-label {key} was saved but cannot be read back; check the disk of the site's storage")
    return label
