"""The feature head: a small trainable network on a frozen generalist's features, the specialist's second view.

The generalist's encoder has seen far more images than a study has labels, so a few labeled scans are enough to tell its
features of one class from those of another. The head is trained at sites with labels and averaged by the server like
the specialist. It never holds the generalist's weights or embeddings, and prediction does not need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semisam_core.errors import ConfigError
from semisam_core.generalists.base import Generalist, VolumeGrid
from semisam_core.generalists.crops import CubeFeatures
from semisam_core.generalists.embedding_store import EmbeddingStore
from semisam_core.generalists.slices import FeatureMaps
from semisam_core.plan_sections.sources import FeatureHeadSettings
from semisam_core.progress import ProgressCallback
from semisam_core.pseudo_labels.cold_start import channel_parts
from semisam_core.pseudo_labels.views import AXES
from semisam_core.scratch import Scratch
from semisam_core.sources.base import Evidence, SourceName, SourceScan
from semisam_core.sources.feature_space import CubeSpace, FeatureSpace, PlaneSpace
from semisam_core.sources.head_network import FeatureHead

INSIDE = 0.5  # a feature belongs to the scan, and not to the padding, if its patch does to more than this share
FOREGROUND_SHARE = 0.5  # of a batch's slices or cubes, those drawn among the ones that show foreground
WEIGHT_DECAY = 1e-4
_AT_ONCE = 8  # slices or cubes a forward pass


@dataclass(frozen=True, eq=False)
class ScanFeatures:
    """One scan's features in one view: N slices (*S is S, S) or cubes (*S is S, S, S).

    Attributes:
        space: where they lie.
        values: (N, C, *S), each channel with zero mean and unit variance over the scan: what all features of a scan
            share tells which scanner it comes from, not what lies where.
        places: where in the scan each feature lies, from -1 to 1 between its borders, (N, 3, *S).
        inside: which features are scan and not padding, (N, *S) bool.
    """

    space: FeatureSpace
    values: Tensor
    places: Tensor
    inside: Tensor


@dataclass(frozen=True, eq=False)
class LabeledFeatures:
    """One labeled scan's features in one view.

    Attributes:
        values: (N, C, *S), half precision.
        places: (N, 3, *S).
        targets: share of each class in a feature's patch, background first, (N, 1 + K, *S).
        inside: (N, *S) bool.
        shows: (N,) bool, which slices or cubes show any class.
    """

    values: Tensor
    places: Tensor
    targets: Tensor
    inside: Tensor
    shows: Tensor


class FeatureReader:
    """Reads a scan's features view by view from the embedding store; what is not there yet is encoded.

    Args:
        generalist: whose encoder.
        store: where embeddings are kept.
        step_mm: distance between the slices that are read; what is found on them is interpolated. Cubes have none.
        smooth_slices: sigma, in slices, of the Gaussian that then smooths across slices.
        progress: told how many slices or cubes of how many are there.

    Raises:
        ConfigError: the generalist's embeddings are not feature maps.
    """

    def __init__(
        self,
        generalist: Generalist,
        store: EmbeddingStore,
        step_mm: float,
        smooth_slices: float,
        progress: ProgressCallback | None = None,
    ) -> None:
        if not isinstance(generalist, FeatureMaps | CubeFeatures) or not generalist.card.feature_channels:
            raise ConfigError(f"the embeddings of the generalist {generalist.card.name} are not feature maps")
        self._generalist, self._store = generalist, store
        self._step_mm, self._smooth, self._progress = step_mm, smooth_slices, progress

    def read(
        self, image: Tensor, spacing_mm: tuple[float, float, float], view: str, scratch: Scratch | None = None
    ) -> ScanFeatures:
        """Return the features of a scan (C, H, W, D), of which the encoder sees the first channel, in scratch."""
        space, scratch = self._space(image[0], spacing_mm, view), scratch or Scratch()
        embeddings = self._store.fetch(
            self._generalist, space.key, space.volume, space.grid, space.units, self._progress, scratch
        )
        values = space.features(embeddings, scratch)
        side = int(values.shape[-1])
        shares = space.shares(torch.ones((), dtype=torch.bool).expand(image.shape[1:]), side)
        inside = shares > INSIDE * shares.max()  # a scan may be smaller than a cube's feature
        _standardise(values, inside, scratch)
        return ScanFeatures(space, values, space.places(side), inside)

    def labeled(
        self,
        image: Tensor,
        label: Tensor,
        spacing_mm: tuple[float, float, float],
        view: str,
        classes: int,
        scratch: Scratch | None = None,
    ) -> LabeledFeatures:
        """Return the features of a labeled scan.

        Args:
            image: (C, H, W, D).
            label: (H, W, D) of class indices.
            spacing_mm: voxel size.
            view: which.
            classes: K.
            scratch: where to keep them; None for memory.
        """
        scratch = scratch or Scratch()
        seen = self.read(image, spacing_mm, view, scratch)
        side = int(seen.values.shape[-1])
        targets = scratch.zeros((len(seen.values), 1 + classes, *seen.values.shape[2:]))
        shows = torch.zeros(len(targets), dtype=torch.bool)
        for k in range(1, 1 + classes):
            targets[:, k] = shares = seen.space.shares(label == k, side)
            shows |= (shares > 0).flatten(1).any(1)
        for each in targets:
            each[0] = (1 - each[1:].sum(0)).clamp_min(0)
            scratch.release()
        values = scratch.zeros(seen.values.shape, torch.float16)
        scratch.copy(values, seen.values)
        places, inside = scratch.keep(seen.places), scratch.keep(seen.inside)
        return LabeledFeatures(values, places, targets, inside, shows)

    def _space(self, volume: Tensor, spacing_mm: tuple[float, float, float], view: str) -> FeatureSpace:
        if isinstance(self._generalist, FeatureMaps):
            return PlaneSpace(volume, spacing_mm, AXES[view], self._step_mm, self._smooth, self._generalist)
        height, width, depth = (int(side) for side in volume.shape)
        return CubeSpace(volume, self._generalist.lattice(VolumeGrid((height, width, depth), spacing_mm)))


def train_head(
    head: FeatureHead,
    scans: Mapping[str, Sequence[LabeledFeatures]],
    settings: FeatureHeadSettings,
    seed: int,
    device: torch.device,
    scratch: Scratch | None = None,
) -> None:
    """Train each view of the head in place.

    Half of a batch is drawn among slices or cubes that show foreground, so that a small structure is seen at all.

    Args:
        head: the global head.
        scans: view -> the site's labeled scans in it, at least one.
        settings: steps, batch and learning rate.
        seed: of the slices or cubes that are drawn; the same seed trains the same head.
        device: where to compute.
        scratch: where the features are, if not in memory.

    Raises:
        FloatingPointError: a loss is not finite; the head must then not be used.
    """
    for number, (view, labeled) in enumerate(scans.items()):
        network = head.views[view].to(device).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
        generator = torch.Generator().manual_seed(seed + number)
        for _ in range(settings.steps_per_round):
            drawn = [_draw(labeled, generator) for _ in range(settings.batch)]
            values, places, targets, inside = (torch.stack(parts).to(device) for parts in zip(*drawn, strict=True))
            if scratch is not None:
                scratch.release()
            loss = head_loss(network(values.float(), places), targets, inside)
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"the loss of the feature head became {loss.item()} in the view {view}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def head_loss(logits: Tensor, targets: Tensor, inside: Tensor) -> Tensor:
    """Return 0.5 * (cross-entropy + Dice over the classes that a batch shows), over the features that are scan.

    Args:
        logits: (N, 1 + K, *S).
        targets: shares in [0, 1] that sum to one, same shape.
        inside: (N, *S) bool.
    """
    weight = inside[:, None].to(logits.dtype)
    entropy = -(targets * logits.log_softmax(1)).sum(1, keepdim=True)
    cross_entropy = (entropy * weight).sum() / weight.sum().clamp_min(1)
    probability, truth = ((each[:, 1:] * weight).flatten(2) for each in (logits.softmax(1), targets))
    overlap, size = (probability * truth).sum((0, 2)), (probability + truth).sum((0, 2))
    shown = truth.sum((0, 2)) > 0
    dice = (1 - (2 * overlap + 1) / (size + 1))[shown]
    return 0.5 * (cross_entropy + (dice.mean() if bool(shown.any()) else 0.0 * cross_entropy))


class FeatureHeadSource:
    """Says what the head finds in a scan's features: the mean over its views.

    Args:
        head: trained.
        reader: of features.
        device: where to compute.
    """

    name = SourceName.FEATURE_HEAD

    def __init__(self, head: FeatureHead, reader: FeatureReader, device: torch.device) -> None:
        self._head, self._reader, self._device = head.to(device).eval(), reader, device

    def look(self, scan: SourceScan) -> Evidence:
        """Return the mean of the views' probabilities."""
        views, mean = [self._view(scan, view) for view in self._head.views], scan.maps()
        for k in range(scan.classes):
            maps = [space.spread(found[:, k], scan.scratch) for space, found in views]
            for place, *each in scan.scratch.blocks(mean[k], *maps):
                place.copy_(torch.stack(each).mean(0))
        return Evidence.of(mean, scan.scratch)

    def without(self, key: str) -> None:
        """Return None: the head has learned from the labels of every site and cannot unlearn a scan."""
        return

    def _view(self, scan: SourceScan, view: str) -> tuple[FeatureSpace, Tensor]:
        """Return where a view's features lie, and the probability of each class at them, (N, K, *S)."""
        seen, network = self._reader.read(scan.image, scan.spacing_mm, view, scan.scratch), self._head.views[view]
        found = scan.scratch.zeros((len(seen.values), scan.classes, *seen.values.shape[2:]))
        with torch.inference_mode():
            for k in range(0, len(found), _AT_ONCE):
                values, places = (each[k : k + _AT_ONCE].to(self._device) for each in (seen.values, seen.places))
                found[k : k + _AT_ONCE] = network(values, places).softmax(1)[:, 1:].cpu()
                scan.scratch.release()
        return seen.space, found


def _draw(scans: Sequence[LabeledFeatures], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values, places, targets and inside of one slice or cube of one scan."""
    scan = scans[int(torch.randint(len(scans), (1,), generator=generator))]
    candidates = torch.arange(len(scan.values))
    if float(torch.rand((), generator=generator)) < FOREGROUND_SHARE:
        candidates = candidates[scan.shows] if bool(scan.shows.any()) else candidates
    unit = int(candidates[int(torch.randint(len(candidates), (1,), generator=generator))])
    return scan.values[unit], scan.places[unit], scan.targets[unit], scan.inside[unit]


def _standardise(values: Tensor, inside: Tensor, scratch: Scratch) -> None:
    """Bring each channel of features (N, C, *S) to zero mean and unit variance inside the scan, in place."""
    means, deviations = [], []
    for part in channel_parts(values.shape[1]):
        own = values[:, part].movedim(1, -1)[inside]  # (features, channels)
        means.append(own.mean(0))
        deviations.append(own.std(0, correction=0))
        del own
        scratch.release()
    mean, deviation = (torch.cat(each).view(-1, *(1,) * (values.ndim - 2)) for each in (means, deviations))
    for each in values:
        each.copy_((each - mean) / (deviation + 1e-6))
        scratch.release()
