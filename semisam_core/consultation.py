"""A site's generalists, asked about one class of one scan: every model, plane and prompt set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy import ndimage
from torch import Tensor

from semisam_core.generalists.base import SLICE_KINDS, Generalist, Prompts, Segmentation, VolumeGrid
from semisam_core.generalists.embedding_store import EmbeddingStore, scan_key
from semisam_core.prompting import Question, Region, consult
from semisam_core.pseudo_label_plan import PseudoLabels

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]

AXES = {"axial": 2, "coronal": 1, "sagittal": 0}  # scans are in RAS orientation


@dataclass(frozen=True)
class Opinion:
    """What one generalist answered about one class.

    Attributes:
        maps: foreground probabilities (S, H, W, D), one a prompt set and plane.
        quality: its own mean estimate of its overlap with the truth, in [0, 1].
    """

    maps: Tensor
    quality: float


class Consultation:
    """Puts questions about one scan to the generalists of a site. A model that fails does not stop the others.

    Args:
        volume: the scan's first channel (H, W, D) on the plan's grid, RAS.
        spacing_mm: voxel size.
        generalists: the models available at this site.
        store: where embeddings are kept.
        policy: strategy, planes, smoothing.
        progress: told how many embedding units of how many are there.
    """

    def __init__(
        self,
        volume: Tensor,
        spacing_mm: tuple[float, float, float],
        generalists: Sequence[Generalist],
        store: EmbeddingStore,
        policy: PseudoLabels,
        progress: Progress | None = None,
    ) -> None:
        self._generalists, self._store, self._policy, self._progress = generalists, store, policy, progress
        self._views = {
            axis: View(volume, spacing_mm, axis) for axis in {AXES[plane] for plane in policy.prompting.planes} | {2}
        }

    def ask(self, region: Region, probability: Tensor) -> dict[str, Opinion]:
        """Ask every generalist about one class; name -> opinion of those that could answer.

        Args:
            region: what to prompt with.
            probability: the specialist's foreground probability (H, W, D).
        """
        opinions = {}
        for generalist in self._generalists:
            try:
                opinions[generalist.card.name] = self._ask_one(generalist, region, probability)
            except (RuntimeError, ValueError) as error:
                logger.warning("The generalist %s failed on a scan: %s", generalist.card.name, error)
        return opinions

    def _ask_one(self, generalist: Generalist, region: Region, probability: Tensor) -> Opinion:
        slice_wise = bool(generalist.card.prompt_kinds & SLICE_KINDS)
        axes = [AXES[plane] for plane in self._policy.prompting.planes] if slice_wise else [2]
        maps: list[Tensor] = []
        qualities: list[float] = []
        for axis in axes:
            view = self._views[axis]
            turned, seen = view.turn_region(region), view.turn(probability)
            step = view.step(self._policy.prompting.slice_step_mm) if slice_wise else 1
            question = Question(
                turned, seen, generalist.card.prompt_kinds, self._policy.prompting, self._asker(generalist, view), step
            )
            for answer in consult(question):
                answered = answer.probability
                if slice_wise:
                    answered = fill_between(answered, answer.quality.keys(), step)
                    answered = smooth_over_slices(answered, self._policy.smooth_sigma_slices)
                maps.append(view.turn_back(answered))
                qualities.extend(answer.quality.values())
        return Opinion(torch.stack(maps), sum(qualities) / len(qualities) if qualities else 0.0)

    def _asker(self, generalist: Generalist, view: View) -> Callable[[Prompts], Segmentation]:
        held: dict[int, Tensor] = {}  # several prompt sets need the same embeddings

        def ask(prompts: Prompts) -> Segmentation:
            units = generalist.units(prompts, view.grid)
            if missing := [unit for unit in units if unit not in held]:
                held.update(self._store.fetch(generalist, view.key, view.volume, view.grid, missing, self._progress))
            return generalist.segment(held, prompts, view.grid)

        return ask


class View:
    """A scan with one of its axes turned to the last place, along which slice-wise models cut it.

    Args:
        volume: the scan's first channel (H, W, D), RAS.
        spacing_mm: voxel size.
        axis: the axis that becomes the last one; see `AXES`.
    """

    def __init__(self, volume: Tensor, spacing_mm: tuple[float, float, float], axis: int) -> None:
        self._axis = axis
        self.volume = self.turn(volume)
        height, width, depth = self.volume.shape
        kept = [spacing_mm[other] for other in range(3) if other != axis]
        self.grid = VolumeGrid((int(height), int(width), int(depth)), (kept[0], kept[1], spacing_mm[axis]))

    @cached_property
    def key(self) -> str:
        """The scan's key in the embedding store."""
        return scan_key(self.volume)

    def step(self, step_mm: float) -> int:
        """Return every how many slices are this far apart, at least every one."""
        return max(1, round(step_mm / self.grid.spacing_mm[2]))

    def turn(self, volume: Tensor) -> Tensor:
        """Turn a volume (H, W, D) as the scan is turned."""
        return volume.movedim(self._axis, -1).contiguous()

    def turn_back(self, volume: Tensor) -> Tensor:
        """Undo `turn`."""
        return volume.movedim(-1, self._axis).contiguous()

    def turn_region(self, region: Region) -> Region:
        """Turn what generalists are prompted with as the scan is turned."""
        mask, others = (self.turn(torch.from_numpy(each)).numpy() for each in (region.mask, region.others))
        return Region(mask, others, self.grid.spacing_mm)


def fill_between(probability: Tensor, answered: Iterable[int], step: int) -> Tensor:
    """Interpolate along the last axis between slices that were answered and lie `step` apart.

    A slice between an answered and an unanswered neighbour of the lattice fades towards 0.
    """
    if step == 1:
        return probability
    filled = probability.clone()
    known = set(answered)
    for index in range(probability.shape[-1]):
        before = index - index % step
        if index in known or not {before, before + step} & known:
            continue
        share = (index - before) / step
        after = probability[..., before + step] if before + step in known else 0.0
        filled[..., index] = (1 - share) * (probability[..., before] if before in known else 0.0) + share * after
    return filled


def smooth_over_slices(probability: Tensor, sigma: float) -> Tensor:
    """Smooth along the last axis with a Gaussian of this many slices."""
    if sigma <= 0:
        return probability
    return torch.from_numpy(ndimage.gaussian_filter1d(probability.numpy(), sigma, axis=-1, mode="nearest"))


def weighted_moments(opinions: Mapping[str, Opinion], weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Return mean and variance over all maps of all models, (H, W, D) each; a model's maps share its weight equally.

    Args:
        opinions: name -> opinion, at least one.
        weights: name -> weight > 0; a name without one counts 1.
    """
    maps = torch.cat([opinion.maps for opinion in opinions.values()])
    shares = torch.cat(
        [torch.full((len(each.maps),), weights.get(name, 1.0) / len(each.maps)) for name, each in opinions.items()]
    )
    shares = (shares / shares.sum())[:, None, None, None]
    mean = (shares * maps).sum(0)
    return mean, (shares * (maps - mean) ** 2).sum(0)
