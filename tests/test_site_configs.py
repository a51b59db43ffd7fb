"""The shipped plans: each explains every key and trains one round on tiny files of its kind."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel

from client.site import Site
from client.site_config import load_site_config
from semisam_core.configuration import read_yaml
from semisam_core.contract import TRAIN_SCALARS, evaluation_scalars, initial_head, scalar_mistake
from semisam_core.data.cases import Case, Role
from semisam_core.data.scans import load_scan
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan, load_plan, plan_from_json
from semisam_core.plan_sections.task import TargetClass
from tests.conftest import write_nifti, write_site

FOLDER = Path(__file__).resolve().parents[1] / "site_configs"
PLANS = {path.parent.name: path for path in sorted(FOLDER.glob("*/plan.yaml"))}
KEY = re.compile(r"^ *([a-z_]+): *\S")


@dataclass(frozen=True)
class Form:
    """What a task's files look like.

    Attributes:
        shape: voxels (X, Y, Z).
        voxel_mm: voxel size, anisotropic where the modality is.
        values: values in label files, one slab per value inside a box.
        outside: intensity outside the box, in the modality's units.
        inside: intensity of the first and the last structure; the others lie between.
        noise: standard deviation.
    """

    shape: tuple[int, int, int]
    voxel_mm: tuple[float, float, float]
    values: tuple[int, ...]
    outside: float
    inside: tuple[float, float]
    noise: float


FORMS = {
    "left-atrium": Form((32, 32, 20), (1.0, 1.0, 2.0), (1,), 120, (300, 300), 15),
    "hippocampus": Form((36, 36, 32), (1.0, 1.0, 1.0), (1, 2), 120, (250, 300), 15),
    "phantom": Form((32, 32, 20), (3.2, 3.2, 4.0), (1,), 120, (300, 300), 15),
    "whole-tumour": Form((36, 36, 24), (1.0, 1.0, 1.0), (1, 2, 4), 0, (400, 900), 20),
    "pet-heart": Form((32, 32, 24), (4.07, 4.07, 3.0), (1,), 0.8, (4.0, 4.0), 0.2),
    "abdominal-organs": Form((44, 32, 24), (3.1, 3.1, 5.0), tuple(range(1, 20)), -1000, (-20, 180), 12),
}
SMALL = (
    "data.patch=[32, 32, 16]",
    "training.rounds=1",
    "training.steps_per_round=2",
    "specialist={name: unet, arguments: {channels: [4, 8], strides: [2], residual_units: 0}}",
    "pseudo_labels.generalists=[fake]",
    "pseudo_labels.first_round=1",
    "pseudo_labels.prompting.planes=[axial]",
    "pseudo_labels.prompting.threshold=0.01",
    "pseudo_labels.gates={minimum_volume_ml: 0.0, maximum_volume_ml: 10000.0, minimum_agreement: 0.0}",
)


def _small(path: Path) -> Plan:
    """Return a shipped plan that trains in seconds, with the fake model wherever it names a generalist."""
    sources = read_yaml(path)["pseudo_labels"]["sources"]
    named = [key for key in ("feature_head", "prototypes") if sources[key]]
    return load_plan(path, [*SMALL, *(f"pseudo_labels.sources.{key}={{generalist: fake}}" for key in named)])


def _volume(form: Form, seed: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return a scan and its label: slabs along the first axis, one per value, inside a box."""
    label = np.zeros(form.shape, np.uint8)
    width = (form.shape[0] - 6) // len(form.values)
    image = np.full(form.shape, form.outside)
    for k, value in enumerate(form.values):
        slab = (slice(3 + k * width, 3 + (k + 1) * width), slice(6, -6), slice(4, -4))
        label[slab] = value
        image[slab] = np.linspace(*form.inside, len(form.values))[k]
    return (image + np.random.default_rng(seed).normal(0, form.noise, form.shape)).astype(np.float32), label


def _write_data(folder: Path, form: Form) -> None:
    affine = np.diag([*form.voxel_mm, 1.0])
    for k in range(3):
        image, label = _volume(form, k)
        write_nifti(folder / "images" / f"case-{k}.nii.gz", image, affine)
        write_nifti(folder / "labels" / f"case-{k}.nii.gz", label, affine)


def _required_keys(model: type[BaseModel]) -> dict[str, Any]:
    """Return key -> the model of its section, or None for a single value."""
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        models = [each for each in (field.annotation, *get_args(field.annotation)) if _is_model(each)]
        keys[name] = models[0] if models else None
    return keys


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation is not TargetClass


def _absent(model: type[BaseModel], content: dict[str, Any], where: str = "") -> list[str]:
    absent = []
    for key, below in _required_keys(model).items():
        if key not in content:
            absent.append(where + key)
        elif below is not None and content[key] is not None:
            absent += _absent(below, content[key], f"{where}{key}.")
    return absent


def _unexplained(text: str) -> list[str]:
    """Return the keys whose block of lines has no comment above them."""
    lines, found = text.splitlines(), []
    for number, line in enumerate(lines):
        key = KEY.match(line)
        above = itertools.takewhile(str.strip, reversed(lines[:number]))
        if key is not None and not any(each.lstrip().startswith("#") for each in above):
            found.append(f"{number + 1}: {key[1]}")
    return found


def test_the_tasks_of_the_paper_the_hippocampus_and_the_demo_have_plans() -> None:
    assert set(PLANS) == set(FORMS)


@pytest.mark.parametrize("name", PLANS)
def test_every_key_of_a_plan_is_there_and_explained(name: str) -> None:
    text = PLANS[name].read_text(encoding="utf-8")
    assert _absent(Plan, read_yaml(PLANS[name])) == []
    assert _unexplained(text) == []


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("*/plan*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_the_key_connected_is_explained_above_the_classes(path: Path) -> None:
    above = path.read_text(encoding="utf-8").partition("  classes:")[0]
    assert re.search(r"# connected: true if .*only the largest connected\n *# component is scored", above)


def test_only_structures_in_one_piece_are_connected() -> None:
    connected = {
        name: {target.name for target in load_plan(path).task.classes if target.connected}
        for name, path in PLANS.items()
    }
    of_several = {"seminal-vesicles", "colon", "intestine"}
    organs = connected.pop("abdominal-organs")
    assert {"liver", "spleen", "left-kidney", "right-kidney"} <= organs
    assert not organs & of_several
    assert connected == {
        "hippocampus": {"anterior", "posterior"},
        "left-atrium": {"left-atrium"},
        "pet-heart": {"whole-heart"},
        "phantom": {"liver"},
        "whole-tumour": set(),
    }


def test_a_key_without_explanation_is_caught() -> None:
    assert _unexplained("a:\n  # Why.\n  b: 1\n  c: 2\n\nd: 3\n") == ["6: d"]
    assert _unexplained("a:\n  b: 1\n") == ["2: b"]
    assert _absent(Plan, {"version": 1})[:3] == ["task", "data", "specialist"]


@pytest.mark.parametrize("name", PLANS)
def test_a_plans_hash_does_not_depend_on_the_order_of_keys(name: str, tmp_path: Path) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turned(each) for key, each in reversed(value.items())}
        return [turned(each) for each in value] if isinstance(value, list) else value

    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(turned(read_yaml(PLANS[name])), sort_keys=False), encoding="utf-8")
    plan = load_plan(PLANS[name])
    assert load_plan(path).hash == plan.hash == plan_from_json(plan.canonical_json()).hash


@pytest.mark.parametrize("name", PLANS)
def test_label_values_become_the_plans_classes(name: str, tmp_path: Path) -> None:
    plan, form = load_plan(PLANS[name]), FORMS[name]
    _write_data(tmp_path, form)
    paths = [tmp_path / kind / "case-0.nii.gz" for kind in ("images", "labels")]
    scan = load_scan(Case("case-0", (paths[0],), paths[1], Role.LABELED), plan)
    assert scan.grid.spacing_mm == pytest.approx(plan.data.spacing_mm, abs=1e-4)
    assert scan.label is not None
    assert set(scan.label.unique().tolist()) == set(range(len(plan.task.classes) + 1))
    millilitres = float((scan.label > 0).sum()) * np.prod(plan.data.spacing_mm)
    written = (_volume(form, 0)[1] > 0).sum() * np.prod(form.voxel_mm)
    assert millilitres == pytest.approx(written, rel=0.15)


def test_the_parts_of_the_tumour_become_one_class(tmp_path: Path) -> None:
    plan = load_plan(PLANS["whole-tumour"])
    _write_data(tmp_path, FORMS["whole-tumour"])
    paths = [tmp_path / kind / "case-0.nii.gz" for kind in ("images", "labels")]
    scan = load_scan(Case("case-0", (paths[0],), paths[1], Role.LABELED), plan)
    assert scan.label is not None
    assert np.array_equal(scan.label.numpy(), (_volume(FORMS["whole-tumour"], 0)[1] > 0).astype(np.uint8))


@pytest.mark.parametrize(("name", "lower", "upper"), [("pet-heart", 0, 20), ("abdominal-organs", -175, 250)])
def test_intensities_are_windowed_in_the_modalitys_units(name: str, lower: float, upper: float, tmp_path: Path) -> None:
    plan, form = load_plan(PLANS[name]), FORMS[name]
    _write_data(tmp_path, form)
    scan = load_scan(Case("case-0", (tmp_path / "images" / "case-0.nii.gz",), None, Role.UNLABELED), plan)
    assert float(scan.image.min()) >= 0
    assert float(scan.image.max()) <= 1
    expected = (max(form.outside, lower) - lower) / (upper - lower)
    assert float(scan.image.median()) == pytest.approx(expected, abs=0.03)


def test_paired_organs_are_not_flipped_into_each_other() -> None:
    plan = load_plan(PLANS["abdominal-organs"])
    sides = {name.partition("-")[2] for name in plan.class_names if name.startswith(("left-", "right-"))}
    assert sides == {"kidney", "adrenal", "femoral-head"}
    assert plan.training.augmentation.flip == 0
    assert [c.label_values for c in plan.task.classes] == [(value,) for value in range(1, 20)]


@pytest.mark.parametrize("name", PLANS)
def test_a_site_joins_trains_a_round_and_is_scored(name: str, tmp_path: Path) -> None:
    plan, form = _small(PLANS[name]), FORMS[name]
    _write_data(tmp_path / "data" / "alpha", form)
    config = load_site_config(write_site(tmp_path, "alpha"))
    counts = Site(config, plan, "run", 0).join().scalars
    assert counts == {"labeled": 1, "unlabeled": 1, "validation": 1, "quarantined": 0, "generalists": 1}
    before = dict(new_specialist(plan).state_dict()) | initial_head(plan)
    report = Site(config, plan, "run", 1).train(before)
    assert report.weights is not None
    assert any(not torch.equal(report.weights[key], before[key]) for key in before)
    assert set(report.scalars) <= set(TRAIN_SCALARS)
    assert report.scalars["steps"] == 2
    assert report.scalars["accepted"] + report.scalars["gated"] == len(plan.task.classes)
    assert report.scalars["accepted"] > 0
    scores = Site(config, plan, "run", 1).evaluate(report.weights, final=False).scalars
    assert set(scores) <= set(evaluation_scalars(plan))
    assert all(scores[f"cases.{structure}"] == 1 for structure in plan.class_names)
    assert not [
        mistake for each in (report.scalars, scores) for mistake in map(scalar_mistake, each, each.values()) if mistake
    ]
