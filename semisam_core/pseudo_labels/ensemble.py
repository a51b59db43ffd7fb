"""All generalists of a site prompted for one class of one scan: every model, plane and prompt set."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semisam_core.generalists.base import SLICE_KINDS, Generalist, Prompts, Segmentation
from semisam_core.generalists.embedding_store import EmbeddingStore
from semisam_core.plan_sections.pseudo_labels import PseudoLabels
from semisam_core.progress import ProgressCallback
from semisam_core.prompting import PromptRequest, Region, Segment, answers_of
from semisam_core.pseudo_labels.views import AXES, View
from semisam_core.scratch import Scratch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneralistOutput:
    """What one generalist answered about one class.

    Attributes:
        maps: foreground probabilities (H, W, D), one per plane and prompt set.
        quality: mean of the model's own estimates of its overlap with the truth, in [0, 1].
    """

    maps: Sequence[Tensor]
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
        scratch: Scratch | None = None,
    ) -> None:
        """Prepare a scan.

        Args:
            volume: the scan's first channel (H, W, D) on the plan's grid, RAS.
            spacing_mm: voxel size.
            generalists: the models available at this site.
            store: cache of embeddings.
            policy: strategy, planes, smoothing.
            progress: called with (embedding units ready, units needed).
            scratch: where to keep answers and embeddings; None for memory.
        """
        self._generalists, self._store, self._policy, self._progress = generalists, store, policy, progress
        self._scratch = scratch or Scratch()
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
            sigma = self._policy.smooth_sigma_slices if slice_wise else 0.0
            segment = self._segment(generalist, view)
            request = PromptRequest(turned, prediction, kinds, prompting, segment, step, self._scratch)
            for answer in answers_of(request):
                maps.append(view.complete(answer.probability, answer.quality, step, sigma, self._scratch))
                qualities.extend(answer.quality.values())
                del answer  # before the next one is made
        return GeneralistOutput(maps, sum(qualities) / len(qualities) if qualities else 0.0)

    def _segment(self, generalist: Generalist, view: View) -> Segment:
        embeddings: ChainMap[int, Tensor] = ChainMap()  # prompt sets share them

        def segment(prompts: Prompts) -> Segmentation:
            self._scratch.release()
            units = generalist.units(prompts, view.grid)
            if missing := [unit for unit in units if unit not in embeddings]:
                grid = view.grid
                more = self._store.fetch(
                    generalist, view.key, view.volume, grid, missing, self._progress, self._scratch
                )
                embeddings.maps.append(more)  # type: ignore[arg-type]  # only the first is ever written to
            return generalist.segment(embeddings, prompts, view.grid)

        return segment


def weighted_moments(
    outputs: Mapping[str, GeneralistOutput], weights: Mapping[str, float], scratch: Scratch | None = None
) -> tuple[Tensor, Tensor]:
    """Return the weighted mean and variance over all maps of all models, (H, W, D) each.

    Args:
        outputs: name -> output, at least one. A model's weight is divided equally among its maps.
        weights: name -> weight > 0; a model that is not listed has weight 1.
        scratch: where the maps are and the moments will be; None for memory.
    """
    scratch = scratch or Scratch()
    maps = [each for output in outputs.values() for each in output.maps]
    shares = torch.cat(
        [torch.full((len(each.maps),), weights.get(name, 1.0) / len(each.maps)) for name, each in outputs.items()]
    )
    shares = (shares / shares.sum())[:, None]
    mean, variance = (scratch.zeros(maps[0].shape) for _ in range(2))
    for own, spread, *each in scratch.blocks(mean, variance, *maps):
        stacked = torch.stack(each)
        own.copy_((shares * stacked).sum(0))
        spread.copy_((shares * (stacked - own) ** 2).sum(0))
    return mean, variance
