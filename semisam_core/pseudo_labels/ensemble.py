"""All generalists of a site prompted for one class of one scan: every model, plane and prompt set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semisam_core.generalists.base import SLICE_KINDS, Generalist, Prompts, Segmentation
from semisam_core.generalists.embedding_store import EmbeddingStore
from semisam_core.plan_sections.pseudo_labels import PseudoLabels
from semisam_core.progress import ProgressCallback
from semisam_core.prompting import PromptRequest, Region, Segment, prompt_generalist
from semisam_core.pseudo_labels.views import AXES, View, fill_between, smooth_over_slices

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneralistOutput:
    """What one generalist answered about one class.

    Attributes:
        maps: foreground probabilities (S, H, W, D), one per plane and prompt set.
        quality: mean of the model's own estimates of its overlap with the truth, in [0, 1].
    """

    maps: Tensor
    quality: float


class GeneralistEnsemble:
    """The generalists of a site, ready to be prompted about one scan. A model that fails does not stop the others."""

    def __init__(
        self,
        volume: Tensor,
        spacing_mm: tuple[float, float, float],
        generalists: Sequence[Generalist],
        store: EmbeddingStore,
        policy: PseudoLabels,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Prepare a scan.

        Args:
            volume: the scan's first channel (H, W, D) on the plan's grid, RAS.
            spacing_mm: voxel size.
            generalists: the models available at this site.
            store: cache of embeddings.
            policy: strategy, planes, smoothing.
            progress: called with (embedding units ready, units needed).
        """
        self._generalists, self._store, self._policy, self._progress = generalists, store, policy, progress
        self._views = {
            axis: View(volume, spacing_mm, axis) for axis in {AXES[plane] for plane in policy.prompting.planes} | {2}
        }

    def ask(self, region: Region, probability: Tensor) -> dict[str, GeneralistOutput]:
        """Prompt every generalist for one class.

        Args:
            region: what to prompt with.
            probability: the specialist's foreground probability (H, W, D).

        Returns:
            name -> output of each generalist that answered.
        """
        outputs = {}
        for generalist in self._generalists:
            try:
                outputs[generalist.card.name] = self._ask_one(generalist, region, probability)
            except (RuntimeError, ValueError) as error:
                logger.warning("The generalist %s failed on a scan: %s", generalist.card.name, error)
        return outputs

    def _ask_one(self, generalist: Generalist, region: Region, probability: Tensor) -> GeneralistOutput:
        kinds, prompting = generalist.card.prompt_kinds, self._policy.prompting
        slice_wise = bool(kinds & SLICE_KINDS)
        axes = [AXES[plane] for plane in prompting.planes] if slice_wise else [2]
        maps: list[Tensor] = []
        qualities: list[float] = []
        for axis in axes:
            view = self._views[axis]
            turned, prediction = view.turn_region(region), view.turn(probability)
            step = view.slice_step(prompting.slice_step_mm) if slice_wise else 1
            request = PromptRequest(turned, prediction, kinds, prompting, self._segment(generalist, view), step)
            for answer in prompt_generalist(request):
                answered = answer.probability
                if slice_wise:
                    answered = fill_between(answered, answer.quality.keys(), step)
                    answered = smooth_over_slices(answered, self._policy.smooth_sigma_slices)
                maps.append(view.turn_back(answered))
                qualities.extend(answer.quality.values())
        return GeneralistOutput(torch.stack(maps), sum(qualities) / len(qualities) if qualities else 0.0)

    def _segment(self, generalist: Generalist, view: View) -> Segment:
        embeddings: dict[int, Tensor] = {}  # prompt sets share them

        def segment(prompts: Prompts) -> Segmentation:
            units = generalist.units(prompts, view.grid)
            if missing := [unit for unit in units if unit not in embeddings]:
                fetched = self._store.fetch(generalist, view.key, view.volume, view.grid, missing, self._progress)
                embeddings.update(fetched)
            return generalist.segment(embeddings, prompts, view.grid)

        return segment


def weighted_moments(outputs: Mapping[str, GeneralistOutput], weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Return the weighted mean and variance over all maps of all models, (H, W, D) each.

    Args:
        outputs: name -> output, at least one. A model's weight is divided equally among its maps.
        weights: name -> weight > 0; a model that is not listed has weight 1.
    """
    maps = torch.cat([output.maps for output in outputs.values()])
    shares = torch.cat(
        [torch.full((len(each.maps),), weights.get(name, 1.0) / len(each.maps)) for name, each in outputs.items()]
    )
    shares = (shares / shares.sum())[:, None, None, None]
    mean = (shares * maps).sum(0)
    return mean, (shares * (maps - mean) ** 2).sum(0)
