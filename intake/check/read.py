"""Read one case and measure it. Whatever is wrong with it is written down, and never stops the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from intake.check import measure
from intake.check.facts import CaseFacts, ChannelFacts, LabelFacts, Terms
from intake.check.pictures import draw_planes, grey_window, planes_through
from intake.check.plausibility import has_orientation, modality_of
from semisam_core.data.cases import Case
from semisam_core.data.geometry import Geometry, axis_change, check_same_grid
from semisam_core.data.labels import ROUNDING_TOLERANCE, class_indices
from semisam_core.data.nifti import NiftiVolume, check_memory, open_nifti
from semisam_core.errors import CaseError

CLIPPED_AT = 255
"""The largest label value that a plan may name."""


def examine_case(case: Case, terms: Terms) -> CaseFacts:
    """Read a case's files, one after another, and return what was measured.

    An unlabeled case has no path to a label, so its label is never read.

    Args:
        case: which files.
        terms: the plan, if there is one, and the site's memory limit.
    """
    facts = CaseFacts(case.id, case.role, has_label=case.label is not None)
    try:
        return _Examination(case, terms).facts()
    except MemoryError:
        return replace(facts, too_large=f"{case.id}: this machine ran out of memory while the case was read.")
    except Exception as error:  # noqa: BLE001 - one bad study must not stop the others
        return replace(facts, unreadable=(f"{case.id}: it could not be examined ({type(error).__name__}: {error}).",))


@dataclass
class _Label:
    """A label in memory.

    Attributes:
        facts: what is known of it so far.
        structures: (X, Y, Z) class indices, along the image's axes if it lies on the image; None if it is no label.
        geometry: of `structures`.
    """

    facts: LabelFacts
    structures: NDArray[np.uint8] | None
    geometry: Geometry

    def on(self, file: NiftiVolume) -> NDArray[np.uint8] | None:
        """Return the class indices along a channel's axes; None if they do not lie on it."""
        if self.structures is None or self.facts.off_grid is not None:
            return None
        change = axis_change(self.geometry, file.geometry)
        same = change.geometry(self.geometry).shape == file.geometry.shape
        return change.array(self.structures) if same else None


@dataclass
class _Examination:
    case: Case
    terms: Terms
    unreadable: list[str] = field(default_factory=list)
    off_grid: list[str] = field(default_factory=list)

    def facts(self) -> CaseFacts:
        files = [self._open(path, "image") for path in self.case.images]
        label_file = self._open(self.case.label, "label") if self.case.label is not None else None
        if too_large := self._too_large(files, label_file):
            return self._result(too_large=too_large)
        image = files[0].geometry if files[0] is not None else None
        label = self._label(label_file, image) if label_file is not None else None
        channels, picture, body = [], None, None
        for number, file in enumerate(files):
            voxels = self._voxels(file)
            if file is None or voxels is None:
                continue
            if image is not None:
                self._compare(image, file)
            structures = label.on(file) if label is not None else None
            channels.append(self._channel(self.terms.channels[number], file, voxels, structures))
            if number == 0:
                picture = self._picture(voxels, file.geometry, structures, channels[0])
                body = None
                if structures is not None:
                    body = measure.find_body(voxels, modality_of(self.terms.channels[0]))
        done = self._finish(label, body) if label is not None else None
        return self._result(channels=tuple(channels), label=done, picture=picture)

    def _result(self, **more: object) -> CaseFacts:
        basis = CaseFacts(
            self.case.id, self.case.role, tuple(self.unreadable), tuple(self.off_grid), has_label=bool(self.case.label)
        )
        return replace(basis, **more)  # type: ignore[arg-type]

    def _open(self, path: Path, what: str) -> NiftiVolume | None:
        try:
            return open_nifti(path, self.case.id, what)
        except CaseError as error:
            self.unreadable.append(str(error))
            return None

    def _voxels(self, file: NiftiVolume | None) -> measure.Volume | None:
        try:
            return file.voxels() if file is not None else None
        except CaseError as error:
            self.unreadable.append(str(error))
            return None

    def _too_large(self, files: Sequence[NiftiVolume | None], label: NiftiVolume | None) -> str | None:
        plan = self.terms.plan
        images = [file for file in files if file is not None]
        try:
            if images:
                check_memory(
                    self.case.id,
                    [image.geometry for image in images],
                    plan.data.spacing_mm if plan else None,
                    self.terms.memory_gb,
                )
            if label is not None:
                check_memory(self.case.id, [label.geometry], None, self.terms.memory_gb, "label")
        except CaseError as error:
            return str(error)
        return None

    def _compare(self, image: Geometry, file: NiftiVolume) -> None:
        try:
            check_same_grid(self.case.id, "channel", image, axis_change(file.geometry, image).geometry(file.geometry))
        except CaseError as error:
            self.off_grid.append(str(error))

    def _channel(
        self, name: str, file: NiftiVolume, voxels: measure.Volume, structures: NDArray[np.uint8] | None
    ) -> ChannelFacts:
        return ChannelFacts(
            name,
            file.geometry,
            has_orientation(file.file.header),
            file.notes,
            measure.measure_intensities(voxels, structures),
            measure.content_hashes(voxels, file.geometry),
            measure.miniature(voxels, file.geometry),
        )

    def _label(self, file: NiftiVolume, image: Geometry | None) -> _Label | None:
        voxels = self._voxels(file)
        if voxels is None:
            return None
        values, more = measure.label_values(voxels)
        with np.errstate(invalid="ignore"):
            whole = (np.abs(values - np.rint(values)) <= ROUNDING_TOLERANCE) & (np.rint(values) >= 0)
        foreign, rounded = self._judged(values[whole])
        facts = LabelFacts(
            file.geometry,
            (*file.notes, *rounded),
            None,
            tuple(float(value) for value in values),
            foreign,
            tuple(float(value) for value in values[~whole]),
            min(measure.content_hashes(voxels, file.geometry)),
            (),
        )
        structures = None if more else self._structures(voxels, values[whole])
        if image is None:
            return _Label(facts, structures, file.geometry)
        change = axis_change(file.geometry, image)
        try:
            check_same_grid(self.case.id, "label", image, change.geometry(file.geometry))
        except CaseError as error:
            return _Label(replace(facts, off_grid=str(error)), structures, file.geometry)
        turned = change.array(structures) if structures is not None else None
        return _Label(facts, turned, change.geometry(file.geometry))

    def _judged(self, whole: NDArray[np.float32]) -> tuple[str | None, tuple[str, ...]]:
        """Ask the plan about whole values just as a round does; return its sentence, or its notes on rounding."""
        if self.terms.plan is None:
            return None, ()
        try:
            return None, class_indices(whole, self.terms.plan.task, self.case.id)[1]
        except CaseError as error:
            return str(error), ()

    def _structures(self, voxels: measure.Volume, whole: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the plan's classes, or without a plan the values themselves; anything else is background."""
        structures = np.zeros_like(voxels, np.uint8)
        plan = self.terms.plan
        known = {int(value): int(value) for value in np.rint(whole) if 0 < value <= CLIPPED_AT}
        if plan is not None:
            classes = enumerate(plan.task.classes, start=1)
            known = {value: index for index, target in classes for value in target.label_values}
        for value, index in known.items():
            structures[np.abs(voxels - value) <= ROUNDING_TOLERANCE] = index
        return structures

    def _picture(
        self, voxels: measure.Volume, geometry: Geometry, structures: NDArray[np.uint8] | None, facts: ChannelFacts
    ) -> bytes | None:
        if facts.intensities is None:
            return None
        window = grey_window(self.terms.plan, facts.intensities)
        return draw_planes(planes_through(voxels, structures, geometry), window)

    def _finish(self, label: _Label, body: NDArray[np.bool_] | None) -> LabelFacts:
        if label.structures is None:
            return label.facts
        names = dict(enumerate(self.terms.plan.class_names, start=1)) if self.terms.plan is not None else {}
        return replace(label.facts, classes=measure.measure_classes(label.structures, label.geometry, names, body))
