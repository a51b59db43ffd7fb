"""A site's sources of evidence: which it has, and what its labeled scans teach about them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from monai.data.meta_tensor import MetaTensor
from torch import Tensor

from client.scans import ScanPair
from semisam_core.generalists import EmbeddingStore, Generalist, scan_key
from semisam_core.plan import Plan
from semisam_core.progress import ProgressCallback
from semisam_core.pseudo_labels.calibration import Calibration
from semisam_core.pseudo_labels.cold_start import ColdStarter
from semisam_core.pseudo_labels.policy import policy_of
from semisam_core.scratch import Scratch
from semisam_core.sources.base import LabeledScan, Source, SourceScan
from semisam_core.sources.generalists import PromptedGeneralists
from semisam_core.sources.labeling import EvidenceLabeler, LabelRecord, reliability_of
from semisam_core.sources.prototypes import PrototypeSource
from semisam_core.sources.registration import Atlas, RegistrationSource, TransformStore
from semisam_core.sources.registry import source_builder
from semisam_core.sources.specialist import SpecialistSource

logger = logging.getLogger(__name__)

Examples = Callable[[], Iterator[tuple[ScanPair, Tensor]]]
"""Returns the site's labeled scans and their labels (H, W, D) of class indices, on the generalists' grid."""


def _plain(image: Tensor) -> Tensor:
    """Return a tensor without MONAI's metadata."""
    return image.as_tensor() if isinstance(image, MetaTensor) else image


class SiteEvidence:
    """Labels scans from all of a site's sources.

    Args:
        plan: the study plan as generalists see it.
        generalists: those that this site has; may be none.
        embeddings: the site's embedding store.
        transforms: folder of stored transforms.
        annotated: the classes (from 1) that the site's labels mark.
        progress: told how many embedding units of how many are there.
        new_scratch: returns room for the maps of one labeled scan.
    """

    def __init__(
        self,
        plan: Plan,
        generalists: Sequence[Generalist],
        embeddings: EmbeddingStore,
        transforms: Path,
        annotated: Sequence[int],
        progress: ProgressCallback,
        new_scratch: Callable[[], Scratch] = Scratch,
    ) -> None:
        self._new_scratch = new_scratch
        self._plan, self._generalists, self._embeddings = plan, generalists, embeddings
        self._transforms, self._annotated, self._progress = transforms, annotated, progress

    def labeler(
        self,
        predict: Callable[[ScanPair, Scratch], Tensor],
        examples: Examples,
        calibration: Calibration,
        more: Sequence[Source] = (),
        volumes_ml: Sequence[float | None] = (),
    ) -> Callable[[ScanPair, Scratch], LabelRecord]:
        """Return a function that labels one scan, with sources scored on the site's labeled scans.

        Args:
            predict: the teacher's probabilities (1 + K, H, W, D) on the generalists' grid.
            examples: the labeled scans.
            calibration: trust in each generalist and plausible volumes.
            more: sources beside the specialist and those that are built here.
            volumes_ml: the expected volume of each class, None where unknown.
        """
        sources = [*self._sources(examples), *more]

        def scan_of(pair: ScanPair, scratch: Scratch, teacher: Tensor | None) -> SourceScan:
            image, classes = _plain(pair.for_generalists.image), len(self._plan.task.classes)
            return SourceScan(image, self._plan.data.spacing_mm, classes, teacher, scratch)

        labeled = ((scan_of(pair, self._new_scratch(), None), label) for pair, label in examples())
        asked = policy_of(self._plan).sources.generalists
        labeler = EvidenceLabeler(
            sources,
            PromptedGeneralists(self._generalists, self._embeddings, self._plan, self._progress) if asked else None,
            self._plan,
            reliability_of(sources, labeled, self._annotated),
            calibration,
            volumes_ml,
        )
        return lambda pair, scratch: labeler.label(scan_of(pair, scratch, _plain(predict(pair, scratch))))

    def _sources(self, examples: Examples) -> list[Source]:
        settings = policy_of(self._plan).sources
        sources: list[Source] = [SpecialistSource()] if settings.specialist else []
        if settings.registration is not None:
            spacing = self._plan.data.spacing_mm
            atlases = [Atlas(each.key, each.image, each.label, spacing, each.scratch) for each in self._known(examples)]
            iterations = settings.registration.iterations
            stored = TransformStore(self._transforms, iterations)
            sources.append(RegistrationSource(atlases, iterations, settings.registration.atlases, stored))
        if settings.prototypes is not None:
            name = settings.prototypes.generalist
            generalist = next((each for each in self._generalists if each.card.name == name), None)
            if generalist is None:
                logger.warning("There are no prototypes at this site: the generalist %s is missing here.", name)
            else:
                starter = ColdStarter(generalist, self._embeddings, self._plan, settings.prototypes, self._progress)
                sources.append(PrototypeSource(starter, self._known(examples)))
        sources += [source_builder(name)(self._known(examples)) for name in settings.more]
        return sources

    def _known(self, examples: Examples) -> list[LabeledScan]:
        """Return the labeled scans, each in scratch of its own."""
        found = []
        for pair, label in examples():
            scratch, image = self._new_scratch(), _plain(pair.for_generalists.image)
            found.append(LabeledScan(scan_key(image), scratch.keep(image), scratch.keep(_plain(label)), scratch))
        return found
