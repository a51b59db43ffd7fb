"""A site's pseudo-labels: which generalists make them, how they are cached, and when they are refreshed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from client.evidence import SiteEvidence
from client.progress import ProgressLog
from client.scans import ScanPair
from client.site_config import SiteConfig, annotated_classes, makes_pseudo_labels, usable_generalists
from semisam_core.data.patients import read_patients
from semisam_core.data.scans import resample
from semisam_core.errors import WeightsError
from semisam_core.files import append_json_line
from semisam_core.generalists import EmbeddingStore, Generalist, load_generalist
from semisam_core.inference import predict
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.calibration import Calibration, LabeledExample, calibrate
from semisam_core.pseudo_labels.cold_start import ColdStarter, Prototypes, background_only, cold_start_of
from semisam_core.pseudo_labels.fusion import PseudoLabel, make_pseudo_label
from semisam_core.pseudo_labels.policy import policy_of
from semisam_core.pseudo_labels.store import PseudoLabelStore, StoredPseudoLabel
from semisam_core.scratch import Scratch
from semisam_core.small_numbers import Rounding
from semisam_core.sources.feature_head import FeatureHeadSource, FeatureReader, train_head
from semisam_core.sources.head_network import FeatureHead
from semisam_core.sources.labeling import LabelRecord

logger = logging.getLogger(__name__)
CALIBRATION_SCANS = 8


Scans = Iterable[tuple[str, Callable[[], ScanPair | None]]]
KeyedScans = Iterable[tuple[str, str | None, Callable[[], ScanPair | None]]]
Predict = Callable[[ScanPair, Scratch], Tensor]
Make = Callable[[str, ScanPair, Scratch], PseudoLabel]


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
        self._evidence_log = folder / "evidence.jsonl"
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
        """Whether the plan wants pseudo-labels and this site can make them, with generalists or from other sources."""
        return makes_pseudo_labels(self._config, self._plan)

    def labels(
        self,
        round_number: int,
        teacher: nn.Module,
        unlabeled: KeyedScans,
        labeled: Scans,
        head: FeatureHead | None = None,
    ) -> dict[str, StoredPseudoLabel]:
        """Return each unlabeled case's pseudo-label: a fresh one in a refresh round, otherwise the stored one.

        At a site without labeled scans a cold start has no effect: before `first_round` every class of every scan is
        refused as empty; from then on the teacher prompts. A scan whose pseudo-label is stored is not read.

        Args:
            round_number: counts from 1.
            teacher: its predictions become prompts, except in a cold start, where prototypes do.
            unlabeled: (case, key of its content, loader) of the scans to label. A loader returns None if the case
                became unusable.
            labeled: (case, loader) of the scans that generalists and volumes are calibrated on.
            head: the global feature head, if the plan has one.
        """
        policy = self._plan.pseudo_labels
        if policy is None or not self.active:
            return {}
        scans = list(labeled)
        cold = policy.cold(round_number)
        if cold and (starter := self._starter(scans)) is not None:
            # Prototypes, and thus prompts, stay the same for the whole cold start: one refresh is enough.
            predict_by = self._prompted_by_prototypes(starter, scans)
            return self._label(round_number, unlabeled, scans, predict_by, self._cold_store, round_number == 1)
        if round_number >= policy.first_round:
            predict_by = partial(self._predict, teacher)
            due = self._plan.refreshes(round_number)
            return self._label(round_number, unlabeled, scans, predict_by, self._store, due, head)
        if not cold:
            return {}
        return self._label(round_number, unlabeled, (), self._background_only, self._cold_store, True)

    def _label(
        self,
        round_number: int,
        unlabeled: KeyedScans,
        labeled: Scans,
        predict_by: Predict,
        store: PseudoLabelStore,
        refresh: bool,
        head: FeatureHead | None = None,
    ) -> dict[str, StoredPseudoLabel]:
        make: Make | None = None
        found: dict[str, StoredPseudoLabel] = {}
        cases = list(unlabeled)
        for done, (case, key, load) in enumerate(cases):
            self._progress("pseudo-label", done, len(cases), "scans")
            label = None if refresh or key is None else store.open(key)
            if label is None:
                if make is None:  # before the scan is loaded, since it loads labeled ones
                    make = self._maker(predict_by, labeled, head, round_number)
                pair = load()
                if pair is None or key is None:
                    continue
                store.save(key, make(case, pair, self._config.storage.scratch()), round_number)
                del pair  # before the next one is loaded
                label = _stored(store, key)
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
            settings = cold_start_of(policy_of(self._plan))
            return ColdStarter(generalist, self._embeddings, self._generalist_plan, settings, self._report_embedding)
        return None

    def _prompted_by_prototypes(self, starter: ColdStarter, labeled: Scans) -> Predict:
        learned: list[Prototypes] = []  # learned on first use: in most rounds every pseudo-label is already stored

        def predict_by(pair: ScanPair, scratch: Scratch) -> Tensor:
            try:
                if not learned:
                    examples = ((each.for_generalists.image, label) for each, label in _labeled(labeled))
                    learned.append(starter.learn(examples, self._config.storage.scratch()))
                return starter.rough(pair.for_generalists.image, learned[0], scratch)
            except (RuntimeError, ValueError) as error:  # as for prompts: one scan does not stop the others
                logger.warning("The cold start's generalist failed on a scan, which gets no pseudo-label: %s", error)
                return self._background_only(pair, scratch)

        return predict_by

    def _background_only(self, pair: ScanPair, scratch: Scratch) -> Tensor:
        return background_only(pair.for_generalists.image, len(self._plan.task.classes), scratch)

    def _report_embedding(self, done: int, total: int) -> None:
        self._progress("embed", done, total, "slices")

    def ask(
        self, case: str, pair: ScanPair, network: nn.Module, labeled: Scans, head: FeatureHead | None = None
    ) -> PseudoLabel:
        """Return a pseudo-label, on the specialist's grid, with a network in the teacher's place."""
        return self._maker(partial(self._predict, network), labeled, head)(case, pair, self._config.storage.scratch())

    def train_head(self, head: FeatureHead, labeled: Scans, round_number: int, seed: int) -> int:
        """Train the feature head in place on this site's labels, and return the steps it took in each view.

        It stays as it was sent, and 0 is returned, after the plan's rounds for it; where the site has no labels or
        labels of some classes only, lacks the generalist, or does not let it be trained on its labels
        (`egress.feature_head`); or where training fails.
        """
        reader, policy = self._feature_reader(), policy_of(self._plan)
        settings = policy.sources.feature_head
        if not self._config.egress.feature_head or reader is None or settings is None:
            return 0
        if settings.rounds is not None and round_number > settings.rounds:
            return 0
        spacing, classes = self._generalist_plan.data.spacing_mm, len(self._plan.task.classes)
        known = list(_labeled(labeled))
        if not known or len(annotated_classes(self._config, self._plan)) < classes:
            return 0
        scratch = self._config.storage.scratch()
        sent = {name: value.clone() for name, value in head.state_dict().items()}
        try:
            scans = {
                view: [
                    reader.labeled(pair.for_generalists.image, label, spacing, view, classes, scratch)
                    for pair, label in known
                ]
                for view in head.views
            }
            train_head(head, scans, settings, seed, self._device, scratch)
            head.log_volumes.copy_(self._log_volumes(labeled, spacing, head.log_volumes))
        except (RuntimeError, ValueError, FloatingPointError) as error:
            logger.warning("The feature head was not trained in this round: %s", error)
            head.load_state_dict(sent)
            return 0
        return settings.steps_per_round

    def _log_volumes(self, labeled: Scans, spacing_mm: tuple[float, float, float], otherwise: Tensor) -> Tensor:
        """Return `FeatureHead.log_volumes` over the labels that show each class, (K,); `otherwise` where none does.

        Unless the site sends exact numbers, the mean is rounded, and `otherwise` also where it would be of too few
        patients.
        """
        egress, voxel_ml, found = self._config.egress, math.prod(spacing_mm) / 1000, otherwise.clone()
        exact = egress.numbers == "exact"
        patients = read_patients(self._config.data.images) or {}
        first = list(labeled)[:CALIBRATION_SCANS]
        known = [(patients.get(case, case), label) for case, load in first for _, label in _labeled([(case, load)])]
        for k in range(len(found)):
            seen = [(who, voxels) for who, label in known if (voxels := int((label == k + 1).sum()))]
            if len({who for who, _ in seen}) >= (1 if exact else egress.minimum_patients):
                mean_ml = voxel_ml * sum(voxels for _, voxels in seen) / len(seen)
                found[k] = math.log1p(mean_ml if exact else Rounding("digits", egress.significant_digits)(mean_ml))
        return found

    def _feature_reader(self) -> FeatureReader | None:
        """Return what reads features for the plan's head; None without a head, or at a site without its generalist."""
        policy = policy_of(self._plan)
        settings = policy.sources.feature_head
        name = None if settings is None else settings.generalist
        generalist = next((each for each in self.generalists if each.card.name == name), None)
        if generalist is None:
            return None
        step, smooth = policy.prompting.slice_step_mm, policy.smooth_sigma_slices
        return FeatureReader(generalist, self._embeddings, step, smooth, self._report_embedding)

    def _maker(
        self, predict_by: Predict, labeled: Scans, head: FeatureHead | None = None, round_number: int | None = None
    ) -> Make:
        """Return a function that makes the pseudo-label of one scan by the plan's method.

        It logs how much each source counted; without a round, for a pseudo-label that teaches nothing.
        """
        scans = list(labeled)
        calibration = self._calibration(predict_by, scans)
        if policy_of(self._plan).method == "semisam+":
            return partial(self._prompted, round_number, predict_by, calibration)
        site = SiteEvidence(
            self._generalist_plan,
            self.generalists,
            self._embeddings,
            self._config.storage.folder / "transforms",
            annotated_classes(self._config, self._plan),
            self._report_embedding,
            self._config.storage.scratch,
        )
        reader = self._feature_reader()
        more = [] if head is None or reader is None else [FeatureHeadSource(head, reader, self._device)]
        volumes = _expected_volumes(head, calibration, len(self._plan.task.classes))
        label_by = site.labeler(predict_by, lambda: _labeled(scans), calibration, more, volumes)

        def make(case: str, pair: ScanPair, scratch: Scratch) -> PseudoLabel:
            record = label_by(pair, scratch)
            self._log_sources(round_number, case, record.label, _evidence(record))
            return _on_the_specialists_grid(record.label, pair)

        return make

    def _prompted(
        self,
        round_number: int | None,
        predict_by: Predict,
        calibration: Calibration,
        case: str,
        pair: ScanPair,
        scratch: Scratch,
    ) -> PseudoLabel:
        label = make_pseudo_label(
            pair.for_generalists.image,
            predict_by(pair, scratch),
            self.generalists,
            self._embeddings,
            self._generalist_plan,
            calibration,
            self._report_embedding,
            scratch,
        )
        trust = {each.card.name: calibration.trust.get(each.card.name, 1.0) for each in self.generalists}
        shares = {name: round(value / sum(trust.values()), 4) for name, value in trust.items()}
        self._log_sources(round_number, case, label, [{"weights": shares}] * len(label.refusals))
        return _on_the_specialists_grid(label, pair)

    def _log_sources(
        self, round_number: int | None, case: str, label: PseudoLabel, about: Sequence[Mapping[str, object]]
    ) -> None:
        """Log which source counted how much, class by class. The log stays at the site."""
        for name, refusal, each in zip(self._plan.class_names, label.refusals, about, strict=True):
            refused = None if refusal is None else refusal.value
            line = {"round": round_number, "case": case, "class": name, "refused": refused}
            append_json_line(self._evidence_log, line | dict(each))

    def _calibration(self, predict_by: Predict, labeled: Scans) -> Calibration:
        def example(pair: ScanPair, label: Tensor) -> LabeledExample:
            scratch = self._config.storage.scratch()
            return LabeledExample(pair.for_generalists.image, label, lambda: predict_by(pair, scratch), scratch)

        examples = (example(pair, label) for pair, label in _labeled(labeled))
        annotated = annotated_classes(self._config, self._plan)
        return calibrate(examples, self.generalists, self._embeddings, self._generalist_plan, annotated)

    def _predict(self, network: nn.Module, pair: ScanPair, scratch: Scratch) -> Tensor:
        overlap = None if self._plan.pseudo_labels is None else self._plan.pseudo_labels.window_overlap
        prediction = predict(network, pair.scan.image, self._plan, self._device, overlap, scratch)
        return resample(prediction, pair.scan.grid, pair.for_generalists.grid, scratch)


def _evidence(record: LabelRecord) -> list[dict[str, object]]:
    """Return for each class how much its sources agreed, their shares, and their scores on labeled scans."""
    combined = record.combined
    return [
        {
            "agreement": round(float(agreement), 4),
            "weights": {source: round(float(weight[k]), 4) for source, weight in combined.weights.items()},
            "reliability": {source: round(float(score[k]), 4) for source, score in record.reliability.items()},
        }
        for k, agreement in enumerate(combined.agreement)
    ]


def _labeled(scans: Scans) -> Iterator[tuple[ScanPair, Tensor]]:
    """Yield the first CALIBRATION_SCANS labeled scans, with their labels on the generalists' grid."""
    for _, load in list(scans)[:CALIBRATION_SCANS]:
        pair = load()
        if pair is not None and pair.for_generalists.label is not None:
            yield pair, pair.for_generalists.label


def _expected_volumes(head: FeatureHead | None, calibration: Calibration, classes: int) -> list[float | None]:
    """Return each class's mean volume in ml over the labels of all sites, else over this site's, else None."""
    everywhere = [0.0] * classes if head is None else head.log_volumes.expm1().tolist()
    here = [sum(seen) / len(seen) if seen else None for seen in calibration.volumes_ml] or [None] * classes
    return [volume if volume > 0 else own for volume, own in zip(everywhere, here, strict=True)]


def _on_the_specialists_grid(label: PseudoLabel, pair: ScanPair) -> PseudoLabel:
    return label.moved(lambda maps: resample(maps, pair.for_generalists.grid, pair.scan.grid, label.scratch))


def _stored(store: PseudoLabelStore, key: str) -> StoredPseudoLabel:
    """Return a pseudo-label that was just saved.

    Raises:
        OSError: it cannot be read back.
    """
    label = store.open(key)
    if label is None:
        raise OSError(f"the pseudo-label {key} was saved but cannot be read back; check the disk of the site's storage")
    return label
