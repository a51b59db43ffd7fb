"""A hospital's YAML: paths, names, limits, and the errors when one is invalid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from client.site_config import annotated_classes, inventory, load_site_config, load_site_folder, usable_generalists
from semisam_core.errors import ConfigError
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
SHIPPED = sorted((Path(__file__).resolve().parents[2] / "site_configs").glob("*/sites/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_site_files_load_and_explain_their_keys(path: Path) -> None:
    config = load_site_config(path)
    assert config.site == path.stem
    assert path.read_text().count("#") > 10
    assert config.data.images.parts[-4:] == ("demo", "data", path.stem, "images")


def test_relative_paths_are_resolved_against_the_files_folder(make_site: MakeSite, tmp_path: Path) -> None:
    path = make_site(storage={"folder": "../state"}, data={"images": "images", "labels": "../labels"})
    config = load_site_config(path)
    assert config.storage.folder == tmp_path / "state"
    assert config.data.images == tmp_path / "sites" / "images"
    assert config.data.labels == tmp_path / "labels"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sites": "x"}, "sites: unknown key"),
        ({"data": {"imagez": "x"}}, "data.imagez: unknown key"),
        ({"threads": "two"}, "threads = 'two': .*integer"),
        ({"threads": 0}, "threads = 0"),
        ({"device": "gpu"}, "device = 'gpu'"),
        ({"generalists": {"sam-9": {}}}, "no generalist is named 'sam-9'; accepted are"),
        ({"generalists": {"fake": {"sha256": "abc"}}}, "generalists.fake.sha256 = 'abc'"),
        ({"generalists": {"fake": {"weights": "w.pth"}}}, "a weights file needs its sha256"),
        ({"data": {"labeled_classes": []}}, "data.labeled_classes"),
        ({"data": {"labeled_classes": ["blob", "blob"]}}, "a class is named twice"),
        ({"egress": {"validation_scores": ["volume"]}}, r"unknown scores \['volume'\]; accepted: dice"),
        ({"storage": {"memory_gb": 0}}, "storage.memory_gb = 0"),
        ({"version": 3}, "version = 3"),
    ],
)
def test_an_error_names_file_key_and_value(make_site: MakeSite, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"alpha\.yaml: (?s:.)*{says}"):
        load_site_config(make_site(**changes))


@pytest.mark.parametrize("name", ["Alpha", "../x", "", "a b", "x" * 64])
def test_a_site_name_has_lowercase_letters_digits_and_dashes_only(make_site: MakeSite, name: str) -> None:
    path = make_site()
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"site": name}))
    with pytest.raises(ConfigError, match=r"alpha\.yaml: site"):
        load_site_config(path)


def test_sites_share_neither_name_nor_storage_folder(make_site: MakeSite, tmp_path: Path) -> None:
    make_site("alpha")
    path = make_site("beta")
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | {"site": "alpha"}))
    with pytest.raises(ConfigError, match=r"beta\.yaml: site = 'alpha': .*alpha\.yaml has the same"):
        load_site_folder(tmp_path / "sites")
    path.write_text(yaml.safe_dump(content | {"storage": {"folder": str(tmp_path / "storage" / "alpha")}}))
    with pytest.raises(ConfigError, match=r"beta\.yaml: storage.folder"):
        load_site_folder(tmp_path / "sites")


def test_a_missing_or_empty_site_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no: the folder of site files does not exist"):
        load_site_folder(tmp_path / "no")
    with pytest.raises(ConfigError, match="no site file"):
        load_site_folder(tmp_path)


def test_a_gpu_named_in_the_file_must_exist(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device = 'cuda:1': this machine offers 0 GPUs; accepted: auto, cpu"):
        load_site_config(make_site(device="cuda:1")).torch_device()
    assert load_site_config(make_site(device="auto")).torch_device() == torch.device("cpu")


def test_auto_picks_a_gpu_if_there_is_one(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_site_config(make_site(device="auto")).torch_device() == torch.device("cuda")


def test_usable_generalists_are_the_plans_that_the_site_has(make_site: MakeSite) -> None:
    plan = tiny_plan("pseudo_labels.generalists=[lite-medsam, fake]")
    config = load_site_config(make_site(generalists={"fake": {}, "lite-medsam": {}}))
    assert usable_generalists(config, plan) == ("lite-medsam", "fake")
    assert usable_generalists(load_site_config(make_site()), plan) == ("fake",)
    assert usable_generalists(config, tiny_plan("pseudo_labels=null")) == ()


def test_annotated_classes_are_the_plans_that_the_site_labels(make_site: MakeSite) -> None:
    plan = tiny_plan("task.classes=[{name: a, value: 4}, {name: b, value: 9}, {name: c, value: 1}]")
    assert annotated_classes(load_site_config(make_site()), plan) == (1, 2, 3)
    for names, classes in ((["c", "a"], (1, 3)), (["b"], (2,)), ("all", (1, 2, 3))):
        config = load_site_config(make_site(data={"labeled_classes": names}))
        assert annotated_classes(config, plan) == classes


def test_a_class_that_the_plan_lacks_is_an_error_before_any_work(make_site: MakeSite) -> None:
    config = load_site_config(make_site(data={"labeled_classes": ["blob", "liver"]}))
    says = r"site alpha: data\.labeled_classes names liver; the plan's classes are blob\. Accepted: all, or a list"
    with pytest.raises(ConfigError, match=says):
        inventory(config, tiny_plan())
