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
from semisam_core.generalists.base import Generalist
from semisam_core.generalists.embedding_store import EmbeddingStore
from semisam_core.generalists.slices import FeatureMaps
from semisam_core.plan_sections.sources import FeatureHeadSettings
from semisam_core.progress import ProgressCallback
from semisam_core.pseudo_labels.views import AXES, View, fill_between, smooth_over_slices
from semisam_core.sources.base import Evidence, SourceName, SourceScan
from semisam_core.sources.head_network import FeatureHead

INSIDE = 0.5  # a feature belongs to the scan, and not to the padding, if more than this share of its patch does
FOREGROUND_SHARE = 0.5  # of the slices of a batch, those drawn among slices that show foreground
WEIGHT_DECAY = 1e-4
_AT_ONCE = 8  # slices a forward pass


@dataclass(frozen=True, eq=False)
class PlaneFeatures:
    """One scan's features in one plane, every n-th slice.

    Attributes:
        view: the scan, turned so that slices lie along its last axis.
        units: the slices that were encoded.
        step: n.
        values: (N, C, S, S), each channel with zero mean and unit variance over the scan: what all features of a scan
            share tells which scanner it comes from, not what lies where.
        places: where in the scan each feature lies, from -1 to 1 between its borders, (N, 3, S, S).
        inside: which features are scan and not padding, (S, S) bool.
    """

    view: View
    units: tuple[int, ...]
    step: int
    values: Tensor
    places: Tensor
    inside: Tensor


@dataclass(frozen=True, eq=False)
class LabeledFeatures:
    """One labeled scan's features in one plane.

    Attributes:
        values: (N, C, S, S), half precision.
        places: (N, 3, S, S).
        targets: share of each class in a feature's patch, background first, (N, 1 + K, S, S).
        inside: (S, S) bool.
    """

    values: Tensor
    places: Tensor
    targets: Tensor
    inside: Tensor


class FeatureReader:
    """Reads a scan's features plane by plane from the embedding store; what is not there yet is encoded.

    Args:
        generalist: whose encoder.
        store: where embeddings are kept.
        step_mm: distance between the slices that are read; what is found on them is interpolated.
        smooth_slices: sigma, in slices, of the Gaussian that then smooths across slices.
        progress: told how many slices of how many are there.

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
        if not isinstance(generalist, FeatureMaps):
            raise ConfigError(f"the embeddings of the generalist {generalist.card.name} are not feature maps")
        self._generalist, self._maps, self._store = generalist, generalist, store
        self._step_mm, self._smooth, self._progress = step_mm, smooth_slices, progress

    def read(self, image: Tensor, spacing_mm: tuple[float, float, float], plane: str) -> PlaneFeatures:
        """Return the features of a scan (C, H, W, D), of which the encoder sees the first channel."""
        view = View(image[0], spacing_mm, AXES[plane])
        step = view.slice_step(self._step_mm)
        units = tuple(range(0, view.grid.shape[2], step))
        embeddings = self._store.fetch(self._generalist, view.key, view.volume, view.grid, units, self._progress)
        values = torch.stack([self._maps.feature_map(embeddings[unit]).float() for unit in units])
        height, width, depth = view.grid.shape
        framing, side = self._maps.framing, int(values.shape[-1])
        inside = framing.shares(torch.ones(1, height, width), side)[0] > INSIDE
        rows, columns = (pixels * side / framing.side for pixels in framing.size((height, width)))
        centres = torch.arange(side) + 0.5
        along = [(torch.tensor(units) + 0.5) / depth, centres / rows, centres / columns]
        places = 2 * torch.stack(torch.meshgrid(*along, indexing="ij"), 1).clamp(0, 1) - 1
        return PlaneFeatures(view, units, step, _standardised(values, inside), places, inside)

    def labeled(
        self, image: Tensor, label: Tensor, spacing_mm: tuple[float, float, float], plane: str, classes: int
    ) -> LabeledFeatures:
        """Return the features of a labeled scan; `label` is (H, W, D) of class indices, K is `classes`."""
        seen = self.read(image, spacing_mm, plane)
        side = int(seen.values.shape[-1])
        turned = seen.view.turn(label.long())[:, :, list(seen.units)].permute(2, 0, 1)  # (N, H, W)
        shares = torch.stack([self._maps.framing.shares((turned == k).float(), side) for k in range(1, 1 + classes)], 1)
        background = (1 - shares.sum(1, keepdim=True)).clamp_min(0)
        return LabeledFeatures(seen.values.half(), seen.places, torch.cat([background, shares], 1), seen.inside)

    def spread(self, maps: Tensor, seen: PlaneFeatures) -> Tensor:
        """Bring maps of features (N, K, S, S) back to the scan, (K, H, W, D)."""
        height, width, depth = seen.view.grid.shape
        volume = torch.zeros(maps.shape[1], height, width, depth)
        for k in range(maps.shape[1]):
            on_slices = self._maps.framing.spread(maps[:, k], (height, width))  # (N, H, W)
            volume[k, :, :, list(seen.units)] = on_slices.permute(1, 2, 0)
        volume = smooth_over_slices(fill_between(volume, seen.units, seen.step), self._smooth)
        return torch.stack([seen.view.turn_back(each) for each in volume])


def train_head(
    head: FeatureHead,
    scans: Mapping[str, Sequence[LabeledFeatures]],
    settings: FeatureHeadSettings,
    seed: int,
    device: torch.device,
) -> None:
    """Train each plane of the head in place.

    Half of a batch is drawn among slices that show foreground, so that a small structure is seen at all.

    Args:
        head: the global head.
        scans: plane -> the site's labeled scans in it, at least one.
        settings: steps, batch and learning rate.
        seed: of the slices that are drawn; the same seed trains the same head.
        device: where to compute.

    Raises:
        FloatingPointError: a loss is not finite; the head must then not be used.
    """
    for number, (plane, labeled) in enumerate(scans.items()):
        network = head.planes[plane].to(device).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
        generator = torch.Generator().manual_seed(seed + number)
        for _ in range(settings.steps_per_round):
            drawn = [_draw(labeled, generator) for _ in range(settings.batch)]
            values, places, targets, inside = (torch.stack(parts).to(device) for parts in zip(*drawn, strict=True))
            loss = head_loss(network(values.float(), places), targets, inside)
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"the loss of the feature head became {loss.item()} in the plane {plane}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def head_loss(logits: Tensor, targets: Tensor, inside: Tensor) -> Tensor:
    """Return 0.5 * (cross-entropy + Dice over the classes that a batch shows), over the features that are scan.

    Args:
        logits: (N, 1 + K, S, S).
        targets: shares in [0, 1] that sum to one, same shape.
        inside: (N, S, S) bool.
    """
    weight = inside[:, None].to(logits.dtype)
    entropy = -(targets * logits.log_softmax(1)).sum(1, keepdim=True)
    cross_entropy = (entropy * weight).sum() / weight.sum().clamp_min(1)
    probability, truth = logits.softmax(1)[:, 1:] * weight, targets[:, 1:] * weight
    overlap, size = (probability * truth).sum((0, 2, 3)), (probability + truth).sum((0, 2, 3))
    shown = truth.sum((0, 2, 3)) > 0
    dice = (1 - (2 * overlap + 1) / (size + 1))[shown]
    return 0.5 * (cross_entropy + (dice.mean() if bool(shown.any()) else 0.0 * cross_entropy))


class FeatureHeadSource:
    """Says what the head finds in a scan's features: the mean over its planes.

    Args:
        head: trained.
        reader: of features.
        device: where to compute.
    """

    name = SourceName.FEATURE_HEAD

    def __init__(self, head: FeatureHead, reader: FeatureReader, device: torch.device) -> None:
        self._head, self._reader, self._device = head.to(device).eval(), reader, device

    def look(self, scan: SourceScan) -> Evidence:
        """Return the mean of the planes' probabilities; their variance is the spread."""
        maps = torch.stack([self._plane(scan, plane) for plane in self._head.planes])  # (planes, K, H, W, D)
        mean = maps.mean(0)
        return Evidence(mean, Evidence.of(mean).answered, maps.var(0, correction=0))

    def without(self, key: str) -> None:
        """Return None: the head has learned from the labels of every site and cannot unlearn a scan."""
        return

    def _plane(self, scan: SourceScan, plane: str) -> Tensor:
        seen, network = self._reader.read(scan.image, scan.spacing_mm, plane), self._head.planes[plane]
        with torch.inference_mode():
            parts = [
                network(seen.values[k : k + _AT_ONCE].to(self._device), seen.places[k : k + _AT_ONCE].to(self._device))
                for k in range(0, len(seen.values), _AT_ONCE)
            ]
            found = torch.cat([part.softmax(1)[:, 1:].cpu() for part in parts])
        return self._reader.spread(found.clone(), seen)


def _draw(scans: Sequence[LabeledFeatures], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values, places, targets and inside of one slice of one scan."""
    scan = scans[int(torch.randint(len(scans), (1,), generator=generator))]
    candidates = torch.arange(len(scan.values))
    if float(torch.rand((), generator=generator)) < FOREGROUND_SHARE:
        shows = (scan.targets[:, 1:].flatten(1) > 0).any(1)
        candidates = candidates[shows] if bool(shows.any()) else candidates
    unit = int(candidates[int(torch.randint(len(candidates), (1,), generator=generator))])
    return scan.values[unit], scan.places[unit], scan.targets[unit], scan.inside


def _standardised(values: Tensor, inside: Tensor) -> Tensor:
    own = values[:, :, inside]  # (N, C, features)
    mean, deviation = own.mean((0, 2)), own.std((0, 2), correction=0)
    return (values - mean[:, None, None]) / (deviation[:, None, None] + 1e-6)
