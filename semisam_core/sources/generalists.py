"""The frozen generalists as a source: what they answer when prompted by what the other sources say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from semisam_core.generalists.base import Generalist
from semisam_core.generalists.embedding_store import EmbeddingStore
from semisam_core.plan import Plan
from semisam_core.progress import ProgressCallback
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.ensemble import GeneralistEnsemble, weighted_moments
from semisam_core.pseudo_labels.fusion import without_islands
from semisam_core.pseudo_labels.policy import claims_of, policy_of, region_of_class
from semisam_core.sources.base import Evidence, SourceScan, nothing


class PromptedGeneralists:
    """Asks every generalist of the site about each class of a scan.

    Args:
        generalists: the models at this site; may be none.
        store: where embeddings are kept.
        plan: spacing and prompting; must have `pseudo_labels`.
        progress: told how many embedding units of how many are there.
    """

    def __init__(
        self,
        generalists: Sequence[Generalist],
        store: EmbeddingStore,
        plan: Plan,
        progress: ProgressCallback | None = None,
    ) -> None:
        self._generalists, self._store, self._plan, self._progress = generalists, store, plan, progress

    def ask(
        self, scan: SourceScan, foreground: Tensor, trust: Mapping[str, float] | None = None
    ) -> tuple[Evidence, tuple[Refusal | None, ...]]:
        """Return the generalists' evidence, and for each class why they could not be prompted, or None.

        Args:
            scan: what they look at.
            foreground: probability of each class (K, H, W, D) that becomes prompts.
            trust: generalist -> weight in the mean over models; one without counts 1.
        """
        if not self._generalists:
            return nothing(scan), (None,) * scan.classes
        policy = policy_of(self._plan)
        ensemble = GeneralistEnsemble(
            scan.image[0], scan.spacing_mm, self._generalists, self._store, policy, self._progress, scan.scratch
        )
        claims = claims_of(foreground, self._plan, scan.scratch)
        found, answered = scan.maps(), torch.zeros(scan.classes, dtype=torch.bool)
        refusals: list[Refusal | None] = []
        for k, probability in enumerate(foreground):
            region = region_of_class(probability, 1 + k, self._plan, claims, scan.scratch)
            outputs = {} if isinstance(region, Refusal) else ensemble.ask(region, probability)
            refusals.append(region if isinstance(region, Refusal) else None if outputs else Refusal.FAILED)
            if outputs:
                mean, _ = weighted_moments(outputs, trust or {}, scan.scratch)
                answered[k] = bool(without_islands(mean, policy.prompting.component_share, scan.scratch).any())
                scan.scratch.copy(found[k], mean)
                del mean
            del outputs, region
        return Evidence(found, answered), tuple(refusals)
