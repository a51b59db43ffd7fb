"""Rough masks before the specialist has learned anything: prototypes of each class in a generalist's embeddings.

The idea is that of SemiSAM-O1 (arXiv 2604.24109). Averages of a frozen encoder's features inside the masks of labeled
scans describe what a class looks like, and unlabeled scans are searched for similar features. Prototypes never leave
the site: they are neither stored nor sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from semisam_core.errors import ConfigError
from semisam_core.generalists.base import Generalist
from semisam_core.generalists.embedding_store import EmbeddingStore
from semisam_core.generalists.slices import FeatureMaps
from semisam_core.plan import Plan
from semisam_core.plan_sections.pseudo_labels import ColdStart, PseudoLabels
from semisam_core.plan_sections.sources import Prototypes as PrototypeSettings
from semisam_core.progress import ProgressCallback
from semisam_core.pseudo_labels.policy import policy_of
from semisam_core.pseudo_labels.views import AXES, View
from semisam_core.scratch import Scratch

POSITIONS = 4096  # features per class and scan that are clustered: bounds memory and time, and gives scans equal weight
ITERATIONS = 20
CHANNELS = 32  # of feature maps that are averaged at once
_INSIDE = 0.5  # a feature belongs to a class, or to the scan, if more than this share of its patch does
_PURE = 0.99  # to background only if all of its patch does: at a border it looks like the class, and would be clustered


@dataclass(frozen=True)
class Prototypes:
    """What each class looks like in one generalist's embeddings.

    Attributes:
        classes: for each class, background first, unit vectors (P, C); P = 0 if no labeled scan shows the class.
    """

    classes: tuple[Tensor, ...]


class ColdStarter:
    """Learns prototypes from labeled scans and uses them to find rough masks on others."""

    def __init__(
        self,
        generalist: Generalist,
        store: EmbeddingStore,
        plan: Plan,
        settings: PrototypeSettings,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Prepare to find prototypes.

        Args:
            generalist: the one that the settings name.
            store: cache of embeddings.
            plan: must have `pseudo_labels`.
            settings: the plan's cold start or its source of prototypes.
            progress: called with (slices of a scan encoded, slices needed).

        Raises:
            ConfigError: the generalist's embeddings are not feature maps.
        """
        if not isinstance(generalist, FeatureMaps):
            raise ConfigError(
                f"the embeddings of the generalist {generalist.card.name} are not feature maps; choose one "
                "whose card says feature_maps"
            )
        self._generalist, self._maps, self._store, self._progress = generalist, generalist, store, progress
        self._plan, self._policy, self._settings = plan, policy_of(plan), settings

    def learn(self, examples: Iterable[tuple[Tensor, Tensor]], scratch: Scratch | None = None) -> Prototypes:
        """Cluster the features inside each class by k-means; deterministic.

        Args:
            examples: (image (C, H, W, D), label (H, W, D) of class indices) of this site's labeled scans.
            scratch: where to keep the features of all classes; None for memory.
        """
        scratch, count = scratch or Scratch(), 1 + len(self._plan.task.classes)
        generator = torch.Generator().manual_seed(self._plan.seed)
        found: list[list[Tensor]] = [[] for _ in range(count)]
        for image, label in examples:
            view = self._view(image)
            seen, turned = self._features(view, scratch), view.turn(label)
            for k in range(count):
                slices = ((turned[:, :, unit] == k).float()[None] for unit in seen.units)
                shares = torch.cat([self._maps.framing.shares(each, seen.side) for each in slices])
                places = _sample((shares > (_INSIDE if k else _PURE)).nonzero(), POSITIONS, generator)
                found[k].append(scratch.keep(seen.vectors[tuple(places.T)]))
                scratch.release()
        wanted = [self._settings.background_prototypes] + [self._settings.foreground_prototypes] * (count - 1)
        centres = []
        for each, k in zip(found, wanted, strict=True):
            centres.append(spherical_k_means(torch.cat(each), k, generator) if each else torch.zeros(0, 1))
            scratch.release()
        return Prototypes(tuple(centres))

    def rough(self, image: Tensor, prototypes: Prototypes, scratch: Scratch | None = None) -> Tensor:
        """Predict rough class probabilities of a scan, to prompt with instead of the teacher's.

        At each feature they are the softmax over classes of (cosine similarity to the class's nearest prototype) /
        temperature; 0 everywhere for a class without prototypes.

        Args:
            image: (C, H, W, D) on the plan's grid; generalists see the first channel.
            prototypes: learned from this site's labeled scans.
            scratch: where to make them; None for memory.

        Returns:
            (1 + K, H, W, D), background first.
        """
        scratch = scratch or Scratch()
        if not any(len(each) for each in prototypes.classes[1:]):
            return background_only(image, len(prototypes.classes) - 1, scratch)
        view = self._view(image)
        seen = self._features(view, scratch)
        shares = scratch.zeros((len(prototypes.classes), *seen.vectors.shape[:-1]))  # (1 + K, N, S, S)
        for k, each in enumerate(prototypes.classes):
            for place, vectors in zip(shares[k], seen.vectors, strict=True):
                place.copy_((vectors[None] @ each.T)[0].amax(-1) if len(each) else torch.tensor(-torch.inf))
                scratch.release()
        for n in range(len(seen.units)):
            shares[:, n] = torch.softmax(shares[:, n] / self._settings.temperature, 0)
            scratch.release()
        step, sigma = view.slice_step(self._policy.prompting.slice_step_mm), self._policy.smooth_sigma_slices
        found = scratch.zeros((len(shares), *image.shape[1:]))
        for k in range(1, len(shares)):
            spread = partial(self._spread, shares[k], view.grid.shape[:2])
            scratch.copy(found[k], view.of_slices(spread, seen.units, step, sigma, scratch))
        for rest, *classes in scratch.blocks(*found):
            for each in classes:
                rest += each
            rest.copy_((1 - rest).clamp_min(0))
        return found

    def _spread(self, shares: Tensor, plane: tuple[int, int], n: int) -> Tensor:
        return self._maps.framing.spread(shares[n : n + 1], plane)[0]

    def _view(self, image: Tensor) -> View:
        return View(image[0], self._plan.data.spacing_mm, AXES[self._settings.plane])

    def _features(self, view: View, scratch: Scratch) -> _Features:
        units = range(0, view.grid.shape[2], view.slice_step(self._policy.prompting.slice_step_mm))
        embeddings = self._store.fetch(
            self._generalist, view.key, view.volume, view.grid, units, self._progress, scratch
        )
        first = self._maps.feature_map(embeddings[0])
        channels, side = len(first), int(first.shape[-1])
        maps = scratch.zeros((len(units), *first.shape))  # (N, C, S, S)
        for each, unit in zip(maps, units, strict=True):
            each.copy_(self._maps.feature_map(embeddings[unit]))
            scratch.release()
        height, width, depth = view.grid.shape
        inside = self._maps.framing.shares(torch.ones(1, height, width), side)[0] > _INSIDE  # (S, S)
        means = []
        for part in channel_parts(channels):
            means.append(maps[:, part].permute(0, 2, 3, 1)[:, inside].mean((0, 1)))
            scratch.release()
        weight, extent = self._settings.position_weight, self._maps.framing.size((height, width))
        rows, columns = (pixels * side / self._maps.framing.side for pixels in extent)
        places = _places(units, side, (rows, columns, depth))
        vectors = scratch.zeros((len(units), side, side, channels + (places.shape[-1] if weight > 0 else 0)))
        for n in range(len(units)):
            # The mean feature tells scanners apart rather than structures.
            unit_vectors = F.normalize(maps[n : n + 1].permute(0, 2, 3, 1) - torch.cat(means), dim=-1)
            if weight > 0:
                placed = torch.cat([unit_vectors, weight * places[n : n + 1]], -1)
                unit_vectors = F.normalize(placed, dim=-1)
            vectors[n : n + 1] = unit_vectors
            scratch.release()
        return _Features(tuple(units), vectors)


@dataclass(frozen=True)
class _Features:
    """Unit vectors (N, S, S, C) at each patch of the frames of N slices."""

    units: tuple[int, ...]
    vectors: Tensor

    @property
    def side(self) -> int:
        return int(self.vectors.shape[1])


def channel_parts(channels: int) -> list[slice]:
    """Return parts of a feature map's channels of which means are equal, bit by bit, to those of all at once.

    Torch computes 32 at once and what remains at the end one by one, so the last part has the end and 32 before it.
    """
    last = max(0, channels // CHANNELS - 1) * CHANNELS
    return [*(slice(begin, begin + CHANNELS) for begin in range(0, last, CHANNELS)), slice(last, channels)]


def cold_start_of(policy: PseudoLabels) -> ColdStart:
    """Return the cold-start section.

    Raises:
        ValueError: the policy has none.
    """
    if policy.cold_start is None:
        raise ValueError("the plan has no pseudo_labels.cold_start section")
    return policy.cold_start


def background_only(image: Tensor, classes: int, scratch: Scratch | None = None) -> Tensor:
    """Return probabilities (1 + K, H, W, D) that call every voxel of a scan (C, H, W, D) background."""
    scratch = scratch or Scratch()
    probability = scratch.zeros((1 + classes, *image.shape[1:]))
    for (each,) in scratch.blocks(probability[0]):
        each.fill_(1)
    return probability


def spherical_k_means(vectors: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Cluster unit vectors (N, C) by cosine similarity; return at most k centres (P, C), all vectors if N <= k.

    Initial centres are chosen by greedy k-means++ (Arthur and Vassilvitskii, SODA 2007): of a few candidates, the one
    that leaves the vectors closest to their centres. With a single candidate, two initial centres may share a cluster
    and leave another without one.
    """
    if len(vectors) <= k:
        return vectors
    centres = vectors[torch.randint(len(vectors), (1,), generator=generator)]
    while len(centres) < k:
        distances = (1 - (vectors @ centres.T).amax(1)).clamp_min(0)
        if float(distances.sum()) <= 1e-6 * len(vectors):  # every vector is a centre already
            break
        drawn = torch.multinomial(distances, 2 + int(math.log(k)), replacement=True, generator=generator)
        left = torch.minimum(distances[:, None], 1 - vectors @ vectors[drawn].T).sum(0)
        centres = torch.cat([centres, vectors[drawn[left.argmin()]][None]])
    for _ in range(ITERATIONS):
        members = F.one_hot((vectors @ centres.T).argmax(1), len(centres)).to(vectors.dtype)  # (N, P)
        sums = members.T @ vectors
        centres = F.normalize(torch.where(members.sum(0)[:, None] > 0, sums, centres), dim=-1)
    return centres


def _sample(places: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    if len(places) <= limit:
        return places
    return places[torch.randperm(len(places), generator=generator)[:limit].sort().values]


def _places(units: Sequence[int], side: int, extent: tuple[float, float, int]) -> Tensor:
    """Return the position of each feature in the scan, from -1 to 1 along each axis: (N, S, S, 3)."""
    rows, columns, depth = extent
    centres = torch.arange(side) + 0.5
    axes = (torch.tensor(list(units)) + 0.5) / depth, centres / rows, centres / columns
    return 2 * torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).clamp(0, 1) - 1
