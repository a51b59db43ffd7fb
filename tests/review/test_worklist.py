"""The order of the worklist: what contradicts itself or has an odd volume comes first."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from review.worklist import ClassDoubt, mean_volumes_ml, ranked
from semisam_core.data.cases import Case, Role
from semisam_core.data.scans import load_scan
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.fusion import PseudoLabel
from semisam_core.pseudo_labels.store import PseudoLabelStore, StoredPseudoLabel
from tests.conftest import tiny_plan, write_balls

PLAN = tiny_plan("task.classes=[{name: one, value: 1}, {name: two, value: 2}]", "pseudo_labels=null")
VOXEL_ML = 0.008


def _label(
    folder: Path, name: str, voxels: tuple[int, int], uncertainty: float = 0.0, refused: Refusal | None = None
) -> tuple[str, StoredPseudoLabel]:
    """Return a stored pseudo-label with so many voxels of both classes, of which the second may be refused."""
    target = torch.zeros(2, 10, 10, 10)
    for k, count in enumerate(voxels):
        target[k].view(-1)[500 * k : 500 * k + count] = 0.9
    label = PseudoLabel(
        target, torch.full_like(target, uncertainty), torch.tensor([True, refused is None]), (None, refused), target
    )
    store = PseudoLabelStore(folder)
    store.save(name, label, 1)
    stored = store.open(name)
    assert stored is not None
    return name, stored


def _order(labels: list[tuple[str, StoredPseudoLabel]], means: list[float | None]) -> list[str]:
    return [entry.case for entry in ranked(labels, means, PLAN)]


def test_the_more_its_sources_disagree_the_earlier_a_scan_comes(tmp_path: Path) -> None:
    labels = [_label(tmp_path, name, (100, 100), u) for name, u in (("sure", 0.01), ("torn", 2.0), ("so-so", 0.5))]
    assert _order(labels, [0.8, 0.8]) == ["torn", "so-so", "sure"]
    (first, *_) = ranked(labels, [0.8, 0.8], PLAN)
    assert first.classes[0].disagreement == pytest.approx(1 - math.exp(-2), abs=1e-3)


def test_the_odder_its_volume_the_earlier_a_scan_comes_whether_large_or_small(tmp_path: Path) -> None:
    labels = [_label(tmp_path, f"{count}", (count, 100)) for count in (100, 150, 40, 400, 0)]
    assert _order(labels, [100 * VOXEL_ML, 100 * VOXEL_ML]) == ["0", "400", "40", "150", "100"]
    doubts = {entry.case: entry.classes[0].implausibility for entry in ranked(labels, [0.8, 0.8], PLAN)}
    assert (doubts["100"], doubts["400"], doubts["0"]) == (0.0, pytest.approx(1.0), 1.0)


def test_a_refused_class_is_in_full_doubt_and_confidences_stay_with_their_classes(tmp_path: Path) -> None:
    labels = [_label(tmp_path, "refused", (100, 0), 0.1, Refusal.EMPTY), _label(tmp_path, "torn", (100, 100), 0.6)]
    first, second = ranked(labels, [None, None], PLAN)
    assert (first.case, second.case) == ("refused", "torn")
    one, two = first.classes
    assert (one.refused, two.refused, two.doubt) == (None, "empty", 1.0)
    assert one.doubt == pytest.approx(1 - math.exp(-0.1), abs=1e-3)


def test_without_labels_disagreement_alone_decides_and_equal_doubts_go_by_name(tmp_path: Path) -> None:
    labels = [_label(tmp_path, name, (count, 100), 0.3) for name, count in (("b", 500), ("c", 1), ("a", 100))]
    assert _order(labels, [None, None]) == ["a", "b", "c"]


@given(
    disagreement=st.floats(0, 1),
    implausibility=st.none() | st.floats(0, 1),
    refused=st.none() | st.just("empty"),
)
def test_doubts_lie_between_0_and_1(disagreement: float, implausibility: float | None, refused: str | None) -> None:
    assert 0 <= ClassDoubt("one", disagreement, implausibility, 1.0, refused).doubt <= 1


def test_mean_volumes_are_of_the_labels_that_show_a_class(tmp_path: Path) -> None:
    write_balls(tmp_path, 2, marked=(1,))
    cases = [
        Case(
            f"case-{k}",
            (tmp_path / "images" / f"case-{k}.nii.gz",),
            tmp_path / "labels" / f"case-{k}.nii.gz",
            Role.LABELED,
        )
        for k in range(2)
    ]
    scans = [load_scan(case, PLAN) for case in cases]
    sizes = [int((scan.label == 1).sum()) for scan in scans if scan.label is not None]
    means = mean_volumes_ml([lambda: scans[0], lambda: scans[1], lambda: None], PLAN)
    assert means == [pytest.approx(VOXEL_ML * sum(sizes) / 2), None]
