"""A study's specialist as a package: whole, checked, usable by MONAI alone, and refused where it would be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cli.main import app
from release.export import CARD, ONNX, PROOF, export, verify
from release.model import PACKAGED_WEIGHTS, ModelError, load_model
from release.package import MANIFEST, SIGNATURE, SIGNER, fingerprint, seal
from release.prediction import Predictor
from semisam_core.contract import travelling
from semisam_core.data.nifti import open_nifti
from semisam_core.errors import ConfigError
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan, write_plan
from server.run_folder import RunFolder
from tests.conftest import balls, tiny_plan

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
WHO = fingerprint(KEY.public_key())
OBLIQUE = [[-0.6, 0.5, 0.0, 30.0], [0.5, 0.6, 0.1, -20.0], [0.0, 0.1, -2.5, 5.0], [0, 0, 0, 1]]
TASK = (
    "task.classes=[{name: large, value: 3, connected: true}, {name: small, values: [5, 9]}]",
    "task.channels=[t1, t2]",
    "data.spacing_mm=[1.5, 1.0, 2.0]",
    "data.nan=zero",
)


def _plan(*assignments: str) -> Plan:
    return tiny_plan(*TASK, *assignments)


def _run(folder: Path, plan: Plan, state: str = "completed") -> Path:
    """Write what a study leaves, with a specialist whose answers differ from voxel to voxel."""
    specialist = new_specialist(plan)
    with torch.no_grad():
        for parameter in specialist.parameters():
            parameter.mul_(2)
    run = RunFolder(folder)
    write_plan(folder / "plan.yaml", plan)
    run.save_best(2, travelling(plan, specialist), plan, "last round")
    (folder / "status.json").write_text(json.dumps({"state": state}), encoding="utf-8")
    lines = [
        {"event": "joined", "site": "south", "labeled": 0, "unlabeled": 7, "validation": 2},
        {"event": "joined", "site": "north", "labeled": 3, "unlabeled": 4, "validation": 2},
        {"event": "evaluated", "site": "north", "round": 1, "dice.large": 0.1},
        {"event": "evaluated", "site": "north", "round": 2, "dice.large": 0.8, "hd95_mm.large": 3.0},
        {"event": "evaluated", "site": "south", "round": 2, "dice.large": 0.6},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a package that is exported once, for tests that only read it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("export")
    export(_run(folder / "run", _plan()), folder / "package", KEY, True, lambda _: None)
    return folder / "package"


@pytest.fixture
def package(made: Path, tmp_path: Path) -> Path:
    """Return a copy of it, for tests that alter it."""
    return Path(shutil.copytree(made, tmp_path / "package"))


def test_an_exported_package_is_verified(made: Path) -> None:
    found = verify(made, WHO)

    assert (found["signer"], found["expected"]) == (WHO, True)
    assert set(found["differences"]) == {PACKAGED_WEIGHTS, "models/model.ts", ONNX}
    assert max(found["differences"].values()) <= 1e-4


def test_a_package_is_a_model_that_predict_accepts(made: Path) -> None:
    model, original = load_model(made), load_model(made.parent / "run")

    assert (model.sha256, model.plan.hash, model.round) == (original.sha256, original.plan.hash, 2)


def test_an_altered_package_is_not_predicted_with(package: Path) -> None:
    with (package / "extra/plan.yaml").open("a", encoding="utf-8") as plan:
        plan.write("\n")

    with pytest.raises(ModelError, match=r"extra/plan.yaml was altered"):
        load_model(package)


def test_programs_of_an_unknown_signer_are_run_only_if_asked_for(package: Path) -> None:
    (package / "models/model.ts").write_bytes(b"a hostile program")
    seal(package, *_named(package), Ed25519PrivateKey.generate())

    found = verify(package, None)
    assert (found["expected"], set(found["differences"])) == (False, {PACKAGED_WEIGHTS})
    with pytest.raises(ModelError, match=r"model.ts: it cannot be loaded"):
        verify(package, None, parity=True)
    with pytest.raises(ModelError, match=r"it was signed by .*, not by"):
        verify(package, WHO)


def test_a_package_whose_signature_was_taken_off_is_not_what_the_lead_signed(package: Path) -> None:
    (package / SIGNATURE).unlink()
    (package / SIGNER).unlink()

    assert verify(package, None)["signer"] is None
    with pytest.raises(ModelError, match="the package is not signed"):
        verify(package, WHO)


def test_a_copy_with_other_weights_is_found_though_signed(package: Path) -> None:
    tensors = load_file(package / PACKAGED_WEIGHTS)
    save_file({name: value * 1.05 for name, value in tensors.items()}, package / PACKAGED_WEIGHTS)
    weights, plan_hash = _named(package)
    seal(package, weights, plan_hash, KEY)
    with pytest.raises(ModelError, match="weights or plan are not those that the manifest names"):
        verify(package, WHO)

    seal(package, load_model(package).sha256, plan_hash, KEY)
    with pytest.raises(ModelError, match=r"model.safetensors answers differently"):
        verify(package, WHO)


@pytest.mark.parametrize("content", ["{}", "[1]", '{"inferer": {"sw_batch_size": 0}}', "no json"])
def test_a_bundle_without_its_settings_is_refused_in_a_sentence(package: Path, content: str) -> None:
    (package / "configs/inference.json").write_text(content, encoding="utf-8")
    seal(package, *_named(package), KEY)

    with pytest.raises(ModelError, match="sw_batch_size is missing"):
        verify(package, WHO)


def _named(package: Path) -> tuple[str, str]:
    manifest = json.loads((package / MANIFEST).read_text(encoding="utf-8"))
    return manifest["weights_sha256"], manifest["plan_hash"]


def test_onnx_alone_gives_the_probabilities_in_the_proof(made: Path) -> None:
    proof = load_file(made / PROOF)
    session = onnxruntime.InferenceSession(made / ONNX, providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(["logits"], {"image": proof["image"].float().numpy()})[0])

    assert float((logits.softmax(1) - proof["probability"]).abs().max()) <= 1e-4


def test_the_card_says_what_it_was_trained_on_and_how_good_it_is(made: Path) -> None:
    card = json.loads((made / CARD).read_text(encoding="utf-8"))
    text = (made / "docs/README.md").read_text(encoding="utf-8")

    assert card["sites"] == [
        {"site": "north", "labeled": 3, "unlabeled": 4, "validation": 2},
        {"site": "south", "labeled": 0, "unlabeled": 7, "validation": 2},
    ]
    dice = card["scores"][0]
    assert (dice["class"], dice["score"], dice["by_site"]) == ("large", "dice", {"north": 0.8, "south": 0.6})
    assert dice["mean"] == pytest.approx(0.7)
    assert card["weights_sha256"] == load_model(made).sha256
    for said in ("| north | 3 | 4 | 2 |", "large (3), small (5+9)", "Not a medical device", card["weights_sha256"]):
        assert said in text
    assert not any("chosen by these same scores" in each for each in card["limits"])


def test_the_card_says_that_scores_which_chose_the_round_are_too_good(tmp_path: Path) -> None:
    card = export(
        _run(tmp_path / "run", _plan("selection=validation")), tmp_path / "package", None, False, lambda _: None
    )

    assert any("chosen by these same scores" in each for each in card["limits"])
    assert not (tmp_path / "package" / ONNX).exists()
    assert set(verify(tmp_path / "package", None, parity=True)["differences"]) == {PACKAGED_WEIGHTS, "models/model.ts"}


LOCAL = ("specialist.arguments.normalization=batch", "specialist.statistics=local")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "status.json").write_text('{"state": "running"}'), "the study is running"),
        (lambda run: (run / "best.safetensors").unlink(), "it has no best.safetensors yet"),
        (lambda run: write_plan(run / "plan.yaml", _plan("seed=1")), "trained with another plan"),
        (lambda run: (run / "status.json").unlink(), "no run folder of a study"),
        (
            lambda run: _run(run, _plan(*LOCAL)),
            "no whole model to export: its batch-norm layers .*predict --layers",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path: Path, change: Any, message: str) -> None:
    run = _run(tmp_path / "run", _plan())
    change(run)

    with pytest.raises((ModelError, ConfigError), match=message):
        export(run, tmp_path / "package", KEY, True, lambda _: None)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run"]


def test_an_export_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def fail(step: str) -> None:
        if step.startswith("comparing"):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export(_run(tmp_path / "run", _plan()), tmp_path / "package", KEY, False, fail)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run"]


def test_the_commands_say_what_is_missing_and_how_a_package_fares(made: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    run = str(made.parent / "run")
    unclear = runner.invoke(app, ["export", run, "-o", str(tmp_path / "p")])
    assert (unclear.exit_code, "--unsigned" in unclear.output) == (2, True)
    taken = runner.invoke(app, ["export", run, "-o", str(made), "--unsigned"])
    assert (taken.exit_code, "it exists already" in " ".join(taken.output.split())) == (2, True)

    found = runner.invoke(app, ["verify", str(made), "--signer", str(made / SIGNER), "--json"])
    assert (found.exit_code, json.loads(found.stdout)["signer"]) == (0, WHO)
    other = runner.invoke(app, ["verify", str(made), "--signer", "0" * 64])
    assert (other.exit_code, "Do not use it" in " ".join(other.output.split())) == (2, True)


WITHOUT_US = """
import importlib.abc, json, runpy, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ROOMS:
            raise ModuleNotFoundError(name)
ROOMS = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Absent())
for command in json.loads(sys.argv[2]):
    sys.argv = ["monai.bundle", *command]
    runpy.run_module("monai.bundle", run_name="__main__")
from monai.bundle import ConfigWorkflow
workflow = ConfigWorkflow("configs/inference.json", "configs/metadata.json", workflow_type="inference")
workflow.initialize()
print("LACKS", workflow.check_properties())
"""


# What MONAI's schema of 2024-07-25 demands of a bundle's metadata.
TENSOR = {
    "type": "object",
    "properties": {
        **{key: {"type": "string"} for key in ("type", "format", "dtype")},
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
}
TENSORS = {"type": "object", "minProperties": 1, "additionalProperties": TENSOR}
TEXTS = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors")
SCHEMA = {
    "type": "object",
    "properties": {
        **{key: {"type": "string"} for key in (*TEXTS, "copyright", "intended_use")},
        **{key: {"type": "object"} for key in ("changelog", "required_packages_version")},
        "network_data_format": {
            "type": "object",
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
            "required": ["inputs", "outputs"],
        },
    },
    "required": [*TEXTS, "copyright", "required_packages_version", "network_data_format"],
}


@pytest.mark.timeout(900)
def test_monai_alone_segments_as_this_project_does(made: Path, tmp_path: Path) -> None:
    """Two channels, an oblique grid unlike the plan's, NaN, and label values unlike the classes' numbers."""
    truth = _write_scan(tmp_path / "scans")
    model = load_model(made)
    files = sorted((tmp_path / "scans").iterdir())
    volumes = [open_nifti(each, "case", "image") for each in files]
    stack = np.stack([each.voxels() for each in volumes])
    expected = Predictor([model], torch.device("cpu")).segment(stack, volumes[0].geometry, "case").labels

    configs = ["--config_file", "configs/inference.json", "--meta_file", "configs/metadata.json"]
    folders = ["--dataset_dir", str(tmp_path / "scans"), "--output_dir", str(tmp_path / "out")]
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")  # instead of downloading MONAI's
    metadata = ["verify_metadata", "--meta_file", "configs/metadata.json", "--filepath", str(tmp_path / "schema.json")]
    output = _monai(made, [metadata, ["verify_net_in_out", "network_def", *configs], ["run", *configs, *folders]])
    image = nib.load(tmp_path / "out" / "case_0000_segmentation.nii.gz")
    segmented = np.asarray(image.dataobj)

    assert "LACKS []" in output or "LACKS None" in output
    assert set(np.unique(expected)) == {0, 3, 5}
    assert segmented.shape == truth.shape
    np.testing.assert_allclose(image.affine, np.array(OBLIQUE), atol=1e-5)
    assert (segmented != expected).sum() <= 1e-4 * expected.size  # ties, as MONAI undoes resampling and axes in turn


def _write_scan(folder: Path) -> np.ndarray[Any, Any]:
    folder.mkdir()
    image, label = balls(shape=(40, 36, 20))
    image[:3] = np.nan
    for k, each in enumerate((image, 300 - image)):
        nib.save(nib.Nifti1Image(each.astype(np.float32), np.array(OBLIQUE)), folder / f"case_000{k}.nii.gz")
    return label


def _monai(bundle: Path, commands: list[list[str]]) -> str:
    rooms = ["semisam_core", "client", "server", "engines", "deployment", "experiments", "intake", "release", "cli"]
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, json.dumps(rooms), json.dumps(commands)],
        cwd=bundle,
        env=variables | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout
