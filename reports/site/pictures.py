"""Pictures of chosen scans in three planes: the scan, its label, the pseudo-label, the prediction, the uncertainty."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.progress import ProgressLog
from client.scans import SiteScans
from client.state import RunState
from intake.check.pictures import draw_planes, planes_through
from reports.site.record import SiteRun
from reports.site.viewer import Layer, layer
from semisam_core.data.cases import Case, Role
from semisam_core.data.geometry import Geometry
from semisam_core.data.scans import Scan
from semisam_core.errors import ConfigError
from semisam_core.inference import new_specialist, predict, segmentation
from semisam_core.pseudo_labels.fusion import PseudoLabel
from semisam_core.pseudo_labels.store import PseudoLabelStore

MOST_VALIDATION, MOST_UNLABELED = 3, 3
SIDE = 128  # pixels of a plane
PLANES = "axial, coronal and sagittal plane"


@dataclass(frozen=True)
class View:
    """One picture, or why there is none.

    Attributes:
        title: what is drawn on the scan.
        png: base64 of three planes next to each other; None if there is none.
        words: the picture in words, or why there is none.
    """

    title: str
    png: str | None
    words: str


@dataclass(frozen=True)
class CasePictures:
    """All pictures of one scan, and why it is shown; its volumes, if they are asked for."""

    case: str
    role: str
    why: str
    views: tuple[View, ...]
    layers: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class _Maps:
    """What there is of one scan, (H, W, D) each: intensity, classes of three kinds, uncertainty in [0, 1]."""

    image: NDArray[np.float32]
    truth: NDArray[np.uint8] | None
    taught: NDArray[np.uint8] | None
    predicted: NDArray[np.uint8] | None
    doubt: NDArray[np.float32] | None
    grid: Geometry


class _Silent(ProgressLog):
    """Says nothing: a report leaves no trace among a run's progress."""

    def __call__(self, phase: str, done: int, total: int, unit: str = "") -> None:
        """Do nothing."""


class Illustrator:
    """Chooses scans of a run and draws them from what the site has stored.

    Args:
        site: the run.

    Raises:
        ConfigError: folders or lists in the YAML are invalid.
        SplitChangedError: the split is not the one that the run began with.
    """

    def __init__(self, site: SiteRun) -> None:
        self._site, self._device = site, site.config.torch_device()
        self._scans = SiteScans(site.config, site.plan, _Silent(Path(), 0), site.folder)
        self._stores = [PseudoLabelStore(site.folder / name) for name in ("pseudo_labels", "pseudo_labels_cold")]
        self._keys = {case: key for case, key, _ in self._scans.keyed_pair_loaders(Role.UNLABELED)}
        self._specialist, self.prediction_of = self._scored()

    def draw(self, wanted: Sequence[str] = (), layers: bool = False) -> Iterator[CasePictures]:
        """Yield the pictures of the wanted cases; by default of the worst scored and the least certain unlabeled ones.

        Args:
            wanted: names of cases.
            layers: whether their volumes are packed too, for the viewer.

        Raises:
            ConfigError: a wanted case cannot be used or is not there.
        """
        usable = {case.id: case for case in self._scans.usable(*Role)}
        if unknown := [name for name in wanted if name not in usable]:
            raise ConfigError(f"--case {unknown[0]}: this site has no usable case of that name.")
        chosen = [(name, "chosen by --case") for name in wanted] or [*self._worst(usable), *self._doubtful(usable)]
        for name, why in chosen:
            if (scan := self._scans.load(usable[name])) is not None:
                maps = self._maps(usable[name], scan)
                packed = tuple(_layers(maps)) if layers else ()
                yield CasePictures(name, usable[name].role.value, why, tuple(self._views(name, maps)), packed)

    def _worst(self, usable: dict[str, Case]) -> list[tuple[str, str]]:
        lowest: dict[str, str] = {}
        for score in self._site.final_scores:
            if score.case in usable:
                lowest.setdefault(score.case, f"Dice of {score.target} {score.dice:.3f}")
        return list(lowest.items())[:MOST_VALIDATION]

    def _doubtful(self, usable: dict[str, Case]) -> list[tuple[str, str]]:
        """Return unlabeled scans: refused ones first, then by confidence."""
        found: list[tuple[float, str, str]] = []
        for case, key in self._keys.items():
            label = None if key is None or case not in usable else self._open(key)
            if label is None:
                continue
            confidence = min(label.confidences(), default=0.0)
            refused = sorted({refusal.value for refusal in label.refusals if refusal is not None})
            why = f"pseudo-label refused: {', '.join(refused)}" if refused else f"confidence {confidence:.2f}"
            found.append((-1.0 if refused else confidence, case, why))
        return [(case, why) for _, case, why in sorted(found)][:MOST_UNLABELED]

    def _open(self, key: str) -> PseudoLabel | None:
        return next((label for store in self._stores if (label := store.load(key)) is not None), None)

    def _scored(self) -> tuple[nn.Module | None, str]:
        """Return the specialist that was scored last, and what it is in words."""
        kept = RunState(self._site.config.storage.folder, self._site.run).load_scored()
        if kept is None:
            return None, "none: no specialist of this run has been scored here yet"
        specialist = new_specialist(self._site.plan)
        try:
            specialist.load_state_dict(kept[1])
        except RuntimeError:
            raise ConfigError(
                f"--run {self._site.run}: its specialist is not of this plan. Give the plan that the run was started "
                "with."
            ) from None
        return specialist.to(self._device).eval(), f"the specialist after round {kept[0]}"

    def _maps(self, case: Case, scan: Scan) -> _Maps:
        key = self._keys.get(case.id)
        label = None if key is None else self._open(key)
        return _Maps(
            np.asarray(scan.image[0], np.float32),
            None if scan.label is None else np.asarray(scan.label, np.uint8),
            None if label is None else _classes(label.target, label.valid),
            self._predicted(scan),
            None if label is None else np.asarray((1 - torch.exp(-label.uncertainty)).amax(0), np.float32),
            scan.grid,
        )

    def _views(self, case: str, maps: _Maps) -> Iterator[View]:
        names = self._site.plan.class_names
        marked = [each for each in (maps.truth, maps.taught, maps.predicted) if each is not None and each.any()]
        window = (float(np.percentile(maps.image, 1)), float(np.percentile(maps.image, 99)))

        def drawn(title: str, structures: NDArray[np.uint8] | None, grey: NDArray[np.float32], words: str) -> View:
            planes = planes_through(grey, structures, maps.grid, marked[0] if marked else None)
            png = draw_planes(planes, window if grey is maps.image else (0.0, 1.0), SIDE)
            return View(title, base64.b64encode(png).decode(), f"{case}, {words}, {PLANES}")

        yield drawn("scan", None, maps.image, "the scan alone")
        for title, structures, absent in (
            ("label", maps.truth, "none at this site"),
            ("pseudo-label", maps.taught, "none: only unlabeled scans have one, once there was a round that made them"),
            ("prediction", maps.predicted, self.prediction_of),
        ):
            if structures is None:
                yield View(title, None, absent)
            else:
                seen = [name for k, name in enumerate(names, start=1) if (structures == k).any()]
                yield drawn(title, structures, maps.image, f"{title}, outlines of {', '.join(seen) or 'nothing'}")
        if maps.doubt is None:
            yield View("uncertainty", None, "none without a pseudo-label")
        else:
            yield drawn(
                "uncertainty", None, maps.doubt, "uncertainty of the pseudo-label, black certain, white uncertain"
            )

    def _predicted(self, scan: Scan) -> NDArray[np.uint8] | None:
        if self._specialist is None:
            return None
        found = segmentation(predict(self._specialist, scan.image, self._site.plan, self._device), self._site.plan)
        return np.asarray(found, np.uint8)


def _layers(maps: _Maps) -> Iterator[Layer]:
    low, high = np.percentile(maps.image, (0.5, 99.5))
    grey = np.clip((maps.image - low) / (high - low or 1.0), 0, 1)
    yield layer("scan", "scan", (255 * grey).astype(np.uint8), maps.grid, True)
    structures = [("label", maps.truth), ("pseudo-label", maps.taught), ("prediction", maps.predicted)]
    shown = next((name for name, each in reversed(structures) if each is not None), None)
    for name, each in structures:
        if each is not None:
            yield layer(name, "structures", each, maps.grid, name == shown)
    if maps.doubt is not None:
        yield layer("uncertainty", "uncertainty", (255 * maps.doubt).astype(np.uint8), maps.grid, False)


def _classes(target: Tensor, valid: Tensor) -> NDArray[np.uint8]:
    """Return the class (from 1) of each voxel of a pseudo-label, 0 for background and refused classes."""
    found = torch.zeros(target.shape[1:], dtype=torch.uint8)
    for k, foreground in enumerate(target, start=1):
        if bool(valid[k - 1]):
            found[foreground > 0.5] = k
    return found.numpy()
