"""Site files of a comparison: the first labels of each site, and one pooled site that links to all files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import pytest

from client.site_config import inventory, load_site_folder
from experiments.checks import check_study
from experiments.comparison.cohorts import Cohort, fingerprint, lend_storage, narrowed, write_cohort
from semisam_core.data.cases import Role
from semisam_core.errors import ConfigError
from tests.conftest import tiny_plan, write_site
from tests.experiments.comparison.studies import write_study

MakeSite = Callable[..., Path]
Study = tuple[Path, Path]


@pytest.fixture
def study(make_site: MakeSite, tmp_path: Path) -> Study:
    return write_study(make_site, tmp_path)


def _cohort(study: Study, out: Path, setting: str, pooled: bool = True) -> Cohort:
    checked = check_study(*study, [])
    return write_cohort(out, setting, narrowed(checked.sites, setting, checked.plan), pooled)


def _ids(folder: Path, role: Role) -> dict[str, list[str]]:
    found = {config.site: inventory(config, tiny_plan()) for config in load_site_folder(folder)}
    return {site: [case.id for case in each.of(role)] for site, each in found.items()}


def test_labeled_cases_beyond_the_count_become_unlabeled(study: Study, tmp_path: Path) -> None:
    cohort = _cohort(study, tmp_path / "out", "1,0")
    assert _ids(cohort.sites, Role.LABELED) == {"alpha": ["case-1"], "beta": []}
    assert _ids(cohort.sites, Role.UNLABELED) == {"alpha": ["case-0", "case-2"], "beta": ["case-0", "case-1", "case-2"]}
    assert _ids(cohort.sites, Role.VALIDATION) == {site: ["case-3", "case-4"] for site in ("alpha", "beta")}


@pytest.mark.parametrize("setting", ["1", "all"])
def test_what_a_review_labeled_is_unlabeled_in_a_comparison(study: Study, tmp_path: Path, setting: str) -> None:
    cohort = _cohort(study, tmp_path / "out", setting)
    configs = [*load_site_folder(cohort.sites), *load_site_folder(cohort.pooled_sites)]
    assert [config.data.reviewed for config in configs] == [False, False, False]


def test_sites_keep_their_storage(study: Study, tmp_path: Path) -> None:
    cohort = _cohort(study, tmp_path / "out", "1")
    kept = {config.site: config.storage.folder for config in load_site_folder(cohort.sites)}
    assert kept == {config.site: config.storage.folder for config in load_site_folder(study[1])} == cohort.storages


def test_the_pooled_site_has_every_case_in_its_role_and_named_after_its_site(study: Study, tmp_path: Path) -> None:
    cohort = _cohort(study, tmp_path / "out", "1")
    assert _ids(cohort.pooled_sites, Role.LABELED)["pooled"] == ["alpha--case-1", "beta--case-0"]
    assert _ids(cohort.pooled_sites, Role.VALIDATION)["pooled"] == [
        "alpha--case-3",
        "alpha--case-4",
        "beta--case-3",
        "beta--case-4",
    ]
    assert _ids(cohort.pooled_sites, Role.UNLABELED)["pooled"] == [
        "alpha--case-0",
        "alpha--case-2",
        "beta--case-1",
        "beta--case-2",
    ]
    assert cohort.origin["beta--case-3"] == ("beta", "case-3")
    one = nib.load(cohort.pooled_sites / "images" / "beta--case-3.nii.gz")
    assert (one.get_fdata() == nib.load(tmp_path / "data/beta/images/case-3.nii.gz").get_fdata()).all()


def test_the_pooled_site_has_no_labels_of_unlabeled_cases(study: Study, tmp_path: Path) -> None:
    cohort = _cohort(study, tmp_path / "out", "1,0")
    labels = {path.name for path in (cohort.pooled_sites / "labels").iterdir()}
    assert labels == {f"{name}.nii.gz" for name in _ids(cohort.pooled_sites, Role.VALIDATION)["pooled"]} | {
        "alpha--case-1.nii.gz"
    }


def test_channels_keep_their_numbers_at_the_pooled_site(make_site: MakeSite, tmp_path: Path) -> None:
    make_site("alpha", data={"validation": []}, cases=1)
    images = tmp_path / "data" / "alpha" / "images"
    (images / "case-0.nii.gz").rename(images / "case-0_0000.nii.gz")
    (images / "case-0_0001.nii.gz").write_bytes((images / "case-0_0000.nii.gz").read_bytes())
    plan = tiny_plan("task.channels=[t1, t2]")
    sites = [(config, inventory(config, plan)) for config in load_site_folder(tmp_path / "sites")]
    cohort = write_cohort(tmp_path / "out", "all", sites, pooled=True)
    (config,) = load_site_folder(cohort.pooled_sites)
    (case,) = inventory(config, plan).cases
    assert [path.name for path in case.images] == ["alpha--case-0_0000.nii.gz", "alpha--case-0_0001.nii.gz"]


def test_without_a_pooled_arm_nothing_is_linked(study: Study, tmp_path: Path) -> None:
    cohort = _cohort(study, tmp_path / "out", "1", pooled=False)
    assert not cohort.pooled_sites.exists()


def test_sites_with_labels_of_different_classes_cannot_be_pooled(study: Study, tmp_path: Path) -> None:
    write_site(tmp_path, "beta", data={"labeled_classes": ["blob"]})
    with pytest.raises(ConfigError, match="site beta has labels of other classes than site alpha"):
        _cohort(study, tmp_path / "out", "1", pooled=True)


def test_sites_with_different_weights_of_a_generalist_cannot_be_pooled(study: Study, tmp_path: Path) -> None:
    weights = tmp_path / "fake.pth"
    weights.touch()
    other = {"weights": str(weights), "sha256": "0" * 64}
    write_site(tmp_path, "beta", generalists={"fake": other})
    with pytest.raises(ConfigError, match="site beta has other weights than another site"):
        _cohort(study, tmp_path / "out", "1")
    assert not (tmp_path / "out").exists()
    _cohort(study, tmp_path / "out", "1", pooled=False)


def test_a_label_count_without_any_label_is_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="labeled: 0: no site would have a labeled case"):
        _cohort(study, tmp_path / "out", "0")


def test_lent_files_are_links_that_survive_eviction_on_either_side(study: Study, tmp_path: Path) -> None:
    cohort = _cohort(study, tmp_path / "out", "1")
    kept = cohort.storages["alpha"] / "embeddings" / "a.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"one")
    lend_storage(cohort)
    lent = cohort.pooled_storage / "embeddings" / "a.safetensors"
    assert lent.read_bytes() == b"one"
    kept.unlink()
    assert not lent.exists()
    kept.write_bytes(b"two")
    lend_storage(cohort)
    lent.unlink()
    assert kept.read_bytes() == b"two"


def _fingerprint(study: Study) -> str:
    return fingerprint(check_study(*study, []).sites)


def test_the_fingerprint_changes_with_files_and_settings_and_with_nothing_else(study: Study, tmp_path: Path) -> None:
    before = _fingerprint(study)
    image = tmp_path / "data" / "alpha" / "images" / "case-2.nii.gz"
    content = image.read_bytes()
    image.write_bytes(content)
    assert _fingerprint(study) == before
    image.write_bytes(content + b"x")
    assert _fingerprint(study) != before
    image.write_bytes(content)
    site = study[1] / "beta.yaml"
    site.write_text(site.read_text().replace("threads: 1", "threads: 2"))
    assert _fingerprint(study) != before
