"""A site's scans: roles and counts, the memory limit, quarantine during a round, labels of annotated classes only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client import scans as module
from client.progress import ProgressLog
from client.scans import SiteScans
from client.site_config import load_site_config
from semisam_core.data.cases import Case, Role
from semisam_core.data.scans import Scan, StoredVolume
from semisam_core.errors import CaseError
from semisam_core.files import read_json_lines
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.fusion import PseudoLabel
from semisam_core.pseudo_labels.store import PseudoLabelStore
from tests.conftest import tiny_plan, write_balls, write_site

MakeSite = Callable[..., Path]
THREE = "task.classes=[{name: a, value: 1}, {name: b, value: 2}, {name: c, value: 3}]"


def _scans(path: Path, plan: Plan) -> SiteScans:
    config = load_site_config(path)
    return SiteScans(config, plan, ProgressLog(config.storage.folder / "progress.jsonl", 1))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the ids of cases in the order in which they are read from disk."""
    ids: list[str] = []
    original = module.load_scan

    def load_scan(case: Case, *others: object, **more: object) -> Scan:
        ids.append(case.id)
        return original(case, *others, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "load_scan", load_scan)
    return ids


def test_cases_are_counted_by_role_and_checked_once(make_site: MakeSite, plan: Plan, reads: list[str]) -> None:
    scans = _scans(make_site(cases=5), plan)
    assert scans.counts() == {"labeled": 1, "unlabeled": 3, "validation": 1, "quarantined": 0}
    assert [case.id for case in scans.usable(Role.UNLABELED)] == ["case-1", "case-3", "case-4"]
    scans.check()
    assert sorted(reads) == [f"case-{k}" for k in range(5)]


@pytest.mark.parametrize(("fits", "read_again"), [(3, []), (2, ["case-0", "case-1", "case-2"])])
def test_scans_beyond_the_memory_limit_are_read_again_least_recently_used_first(
    make_site: MakeSite, reads: list[str], fits: int, read_again: list[str]
) -> None:
    size = 24 * 24 * 16 * 4  # bytes of one image, float32; a label takes a quarter of it
    scans = _scans(make_site(storage={"memory_gb": (fits + 0.75) * size / 1e9}), tiny_plan("pseudo_labels=null"))
    cases = scans.usable(*Role)
    reads.clear()
    loaded = [scans.load(case) for case in cases]
    assert [scan.id for scan in loaded if scan is not None] == ["case-0", "case-1", "case-2"]
    assert reads == read_again
    reads.clear()
    scans.load(cases[-1])
    assert reads == []


def test_a_scan_over_the_memory_limit_is_quarantined(make_site: MakeSite, plan: Plan) -> None:
    scans = _scans(make_site(storage={"memory_gb": 0.5 * 24 * 24 * 16 * 4 / 1e9}), plan)
    assert scans.counts() == {"labeled": 0, "unlabeled": 0, "validation": 0, "quarantined": 3}
    assert all("storage.memory_gb" in quarantined.reason for quarantined in scans.quarantined)


def test_a_recently_used_scan_outlives_one_that_was_loaded_after_it(make_site: MakeSite, reads: list[str]) -> None:
    plan = tiny_plan("pseudo_labels=null")
    scans = _scans(make_site(storage={"memory_gb": 2.75 * 24 * 24 * 16 * 4 / 1e9}), plan)
    zero, one, two = scans.usable(*Role)
    for case in (zero, one, zero, two):
        scans.load(case)
    reads.clear()
    scans.load(zero)
    assert reads == []
    scans.load(one)
    assert reads == ["case-1"]


def test_a_case_that_becomes_unusable_during_a_round_is_quarantined_by_name(
    make_site: MakeSite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = tiny_plan("pseudo_labels.spacing_mm=[1, 1, 1]")
    scans = _scans(make_site(), plan)
    (case,) = scans.usable(Role.UNLABELED)
    [(_, load_pair)] = scans.pair_loaders(Role.UNLABELED)
    load = scans.training_loader(case)
    (tmp_path / "data" / "alpha" / "images" / "case-1.nii.gz").write_bytes(b"torn")
    assert load_pair() is None
    assert [q.id for q in scans.quarantined] == ["case-1"]
    assert "A case is quarantined" in caplog.text
    assert scans.usable(Role.UNLABELED) == []
    with pytest.raises(CaseError, match="case-1: the case became unusable during the round"):
        load()


def test_labels_keep_annotated_classes_only(tmp_path: Path) -> None:
    write_balls(tmp_path / "data" / "alpha", 3)
    for names, values in (("all", {0, 1, 2, 3}), (["c", "a"], {0, 1, 3})):
        scans = _scans(write_site(tmp_path, "alpha", data={"labeled_classes": names}), tiny_plan(THREE))
        for role in (Role.LABELED, Role.VALIDATION):
            (case,) = scans.usable(role)
            scan = scans.load(case)
            assert scan is not None
            assert scan.label is not None
            assert set(scan.label.unique().tolist()) == values


def test_a_training_scan_has_its_own_label_or_the_pseudo_label_and_never_both(
    make_site: MakeSite, plan: Plan, tmp_path: Path
) -> None:
    scans = _scans(make_site(), plan)
    (labeled,), (unlabeled,) = scans.usable(Role.LABELED), scans.usable(Role.UNLABELED)
    scan = scans.training_loader(labeled)()
    assert scan.label is not None
    assert scan.target is None
    maps = torch.full((1, *scan.image.shape[1:]), 0.25)
    store = PseudoLabelStore(tmp_path)
    store.save("key", PseudoLabel(maps, 2 * maps, torch.tensor([False]), (None,), maps))
    pseudo_label = store.open("key")
    assert pseudo_label is not None
    for case in (labeled, unlabeled):
        scan = scans.training_loader(case, pseudo_label)()
        assert scan.label is None
        assert isinstance(scan.target, StoredVolume)
        assert isinstance(scan.uncertainty, StoredVolume)
        assert torch.equal(scan.target[(slice(None),)].float(), maps)
        assert torch.equal(scan.uncertainty[(slice(None),)].float(), 2 * maps)
        assert scan.valid is pseudo_label.valid
    scan = scans.training_loader(unlabeled)()
    assert (scan.label, scan.target, scan.uncertainty, scan.valid) == (None, None, None, None)


def test_checking_is_reported_scan_by_scan(make_site: MakeSite, plan: Plan) -> None:
    path = make_site()
    _scans(path, plan).check()
    lines = read_json_lines(load_site_config(path).storage.folder / "progress.jsonl")
    assert (lines[0]["phase"], lines[0]["done"], lines[-1]["done"], lines[-1]["total"]) == ("prepare", 0, 3, 3)
