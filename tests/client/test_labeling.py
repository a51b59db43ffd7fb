"""A site's pseudo-labels: generalists that fail to load, the refresh schedule, and the grid that generalists see."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.labeling import Labeler
from client.progress import ProgressLog
from client.scans import ScanPair
from client.site import Site
from client.site_config import load_site_config
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.training import new_teacher
from tests.conftest import tiny_plan
from tests.semisam_core.generalists.fake import FakeGeneralist

MakeSite = Callable[..., Path]
BOTH = {"fake": {"weights": "packaged"}, "lite-medsam": {"weights": "packaged", "sha256": "a" * 64}}
EAGER = ("pseudo_labels.prompting.threshold=0.01", "pseudo_labels.gates.minimum_volume_ml=0.0")


def _weights(plan: Plan) -> dict[str, torch.Tensor]:
    return dict(new_specialist(plan).state_dict())


def test_a_generalist_that_fails_to_load_is_left_out_and_logged(
    make_site: MakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    plan = tiny_plan("pseudo_labels.generalists=[lite-medsam, fake]", *EAGER)
    site = Site(load_site_config(make_site(generalists=BOTH)), plan, "run", 0)
    with caplog.at_level(logging.ERROR):
        assert site.join().scalars["generalists"] == 1
    assert sum("left out" in line and f"expected {'a' * 64}" in line for line in caplog.messages) == 1
    again = Site(load_site_config(make_site(generalists=BOTH)), plan, "run", 1)
    assert again.train(_weights(plan)).scalars["accepted"] == 1


def test_a_generalist_that_the_site_lacks_is_left_out(make_site: MakeSite) -> None:
    plan = tiny_plan("pseudo_labels.generalists=[fake, lite-medsam]")
    assert Site(load_site_config(make_site()), plan, "run", 0).join().scalars["generalists"] == 1


def test_labeled_scans_are_read_in_refresh_rounds_only(make_site: MakeSite, tmp_path: Path) -> None:
    plan = tiny_plan("training.rounds=4", "pseudo_labels.refresh_every=2", *EAGER)
    config = load_site_config(make_site())
    site = Site(config, plan, "run", 1)
    teacher = new_teacher(new_specialist(plan))
    looked: list[int] = []

    def labels(round_number: int) -> dict[str, object]:
        labeler = Labeler(
            config, plan, tmp_path / "run", torch.device("cpu"), ProgressLog(tmp_path / "p", round_number)
        )
        return dict(
            labeler.labels(round_number, teacher, _cases(site), [("case-0", lambda: looked.append(round_number))])
        )

    assert set(labels(1)) == set(labels(2)) == set(labels(3)) == {"case-1"}
    assert looked == [1, 3]


def test_a_scan_whose_pseudo_label_is_stored_is_not_read(make_site: MakeSite) -> None:
    plan = tiny_plan("training.rounds=4", "pseudo_labels.refresh_every=2", *EAGER)
    site = Site(load_site_config(make_site()), plan, "run", 1)
    teacher, read = new_teacher(new_specialist(plan)), []
    [(case, key, load)] = _cases(site)

    def reading() -> object:
        read.append(case)
        return load()

    for number in (1, 2, 3):
        assert set(site._labeler.labels(number, teacher, [(case, key, reading)], [])) == {case}
    assert read == [case, case]  # in rounds 1 and 3, which refresh it


def _cases(site: Site) -> list[tuple[str, str | None, Callable[[], object]]]:
    from semisam_core.data.cases import Role

    return site.scans.keyed_pair_loaders(Role.UNLABELED)


def test_generalists_and_specialist_each_use_their_own_grid(make_site: MakeSite) -> None:
    plan = tiny_plan("data.spacing_mm=[4, 4, 4]", "data.patch=[8, 8, 8]", "pseudo_labels.spacing_mm=[2, 2, 2]", *EAGER)
    site = Site(load_site_config(make_site()), plan, "run", 1)
    [(_, _, load)] = _cases(site)
    pair = load()
    assert isinstance(pair, ScanPair)
    assert pair.scan.image.shape[1:] == (12, 12, 8)
    assert pair.for_generalists.image.shape[1:] == (24, 24, 16)
    label = site._labeler.ask("case-1", pair, new_specialist(plan), [])
    assert label.target.shape == label.uncertainty.shape == (1, 12, 12, 8)
    [fake] = site._labeler.generalists
    assert isinstance(fake, FakeGeneralist)
    assert {box.index for prompts in fake.prompts for box in prompts.boxes} > set(range(8, 12))
    assert site.train(_weights(plan)).scalars["accepted"] == 1


def test_a_pseudo_label_keeps_its_place_between_grids(make_site: MakeSite) -> None:
    plan = tiny_plan("data.spacing_mm=[4, 4, 4]", "data.patch=[8, 8, 8]", "pseudo_labels.spacing_mm=[2, 2, 2]")
    site = Site(load_site_config(make_site()), plan, "run", 1)
    [(_, _, load)] = _cases(site)
    pair = load()
    assert isinstance(pair, ScanPair)
    label = site._labeler.ask("case-1", pair, _BrightVoxels(), [])
    found, truth = (
        torch.nonzero(mask).double().mean(0) for mask in (label.generalist[0] > 0.5, pair.scan.image[0] > 1)
    )
    assert bool(((found - truth).abs() < 0.5).all())


class _BrightVoxels(torch.nn.Module):
    """A specialist that calls bright voxels foreground."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        foreground = (patches[:, 0] > 0.5).float().clamp(1e-3, 1 - 1e-3)
        return torch.stack([(1 - foreground).log(), foreground.log()], 1)


def test_an_empty_phase_is_not_reported(tmp_path: Path) -> None:
    progress = ProgressLog(tmp_path / "progress.jsonl", 1)
    progress("pseudo-label", 0, 0, "scans")
    assert not (tmp_path / "progress.jsonl").exists()
    progress("pseudo-label", 0, 1, "scans")
    assert len(read_json_lines(tmp_path / "progress.jsonl")) == 1
