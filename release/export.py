"""Export a study's specialist as a package that others can run, check and trust; and check such a package."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from release import bundle
from release.card import as_markdown, check_run, facts
from release.model import PACKAGED_PLAN, PACKAGED_WEIGHTS, ModelError, load_model
from release.networks import Answer, differences, onnx_answer, script_answer, write_onnx, write_proof, write_script
from release.package import Signed, check, seal
from semisam_core.contract import travelling
from semisam_core.files import save_tensors, write_atomically, write_json

ONNX, PROOF, CARD = "models/model.onnx", "extra/proof.safetensors", "extra/model-card.json"
VERSION = "1.0.0"
LICENCE = """\
The weights in this package are those of the study's sites. Its lead decides how they may be used, and names that
licence with `semisam export --licence`. Until then: research use by the study's sites only.
"""

Say = Callable[[str], None]


def export(
    run: Path, out: Path, key: Ed25519PrivateKey | None, onnx: bool, say: Say, licence: Path | None = None
) -> dict[str, Any]:
    """Write a package, complete or not at all.

    Args:
        run: a completed study's run folder.
        out: the package's folder; must not exist.
        key: the lead's, to sign with; None leaves the package unsigned.
        onnx: whether to write ONNX too.
        say: told what is being done.
        licence: a file with the licence of the weights.

    Returns:
        The model card, and under `differences` how far the copies' probabilities are from the specialist's.

    Raises:
        ModelError: the study has no model, the model lacks layers that stayed at the sites, or a copy of the network
            answers differently.
        ConfigError: the run has not ended.
    """
    check_run(run)
    if out.exists():
        raise ModelError(f"{out}: it exists already; name a new folder.")
    model = load_model(run)
    plan, patch = model.plan, model.plan.data.patch
    channels = len(plan.task.channels)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        folder = Path(name) / out.name
        save_tensors(folder / PACKAGED_WEIGHTS, travelling(plan, model.specialist), _metadata(model.round, plan.hash))
        content = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False)
        write_atomically(folder / PACKAGED_PLAN, content.encode())
        write_proof(model.specialist, folder / PROOF, channels, patch)
        say("TorchScript")
        at_once = write_script(model.specialist, folder / bundle.SCRIPT, channels, patch)
        copies = {bundle.SCRIPT: script_answer(folder / bundle.SCRIPT, at_once)}
        if onnx:
            say("ONNX")
            write_onnx(model.specialist, folder / ONNX, channels, patch)
            copies[ONNX] = onnx_answer(folder / ONNX)
        say("comparing the copies with the specialist")
        card = facts(run, model) | {"differences": differences(folder / PROOF, copies)}
        write_json(folder / CARD, card)
        write_atomically(folder / "docs/README.md", as_markdown(card).encode())
        description = f"Trained by federated learning at {len(card['sites'])} sites; see docs/README.md."
        write_json(folder / "configs/metadata.json", bundle.metadata(plan, plan.task.name, description, VERSION))
        write_json(folder / "configs/inference.json", bundle.inference(plan, at_once))
        text = LICENCE if licence is None else licence.read_text(encoding="utf-8")
        write_atomically(folder / "LICENSE", text.encode())
        seal(folder, model.sha256, plan.hash, key)
        shutil.move(folder, out)
    return card


def verify(package: Path, expected: str | None) -> dict[str, Any]:
    """Check a package: files, signature, weights, and that every copy of the network answers alike.

    Nothing is loaded before files and signature are found right.

    Args:
        package: its folder.
        expected: fingerprint of the lead's key, from another source than the package.

    Returns:
        `signer`, `weights_sha256`, `plan_hash`, `files` (how many) and `differences`.

    Raises:
        ModelError: anything is wrong; the message says what.
    """
    manifest, signed = check(package)
    _check_signer(package, signed, expected)
    model = load_model(package)
    if (model.sha256, model.plan.hash) != (manifest.weights_sha256, manifest.plan_hash):
        raise ModelError(f"{package}: weights or plan are not those that the manifest names.")
    windows = json.loads((package / "configs/inference.json").read_text(encoding="utf-8"))["inferer"]["sw_batch_size"]
    copies: dict[str, Answer] = {
        PACKAGED_WEIGHTS: model.specialist,
        bundle.SCRIPT: script_answer(package / bundle.SCRIPT, int(windows)),
    }
    if ONNX in manifest.files:
        copies[ONNX] = onnx_answer(package / ONNX)
    return {
        "signer": signed.fingerprint,
        "weights_sha256": manifest.weights_sha256,
        "plan_hash": manifest.plan_hash,
        "files": len(manifest.files),
        "differences": differences(package / PROOF, copies),
    }


def _check_signer(package: Path, signed: Signed, expected: str | None) -> None:
    if expected is None:
        return
    if signed.fingerprint is None:
        raise ModelError(f"{package}: the package is not signed.")
    if signed.fingerprint != expected.lower():
        raise ModelError(f"{package}: it was signed by {signed.fingerprint}, not by {expected}. Do not use it.")


def _metadata(number: int | None, plan_hash: str) -> dict[str, str]:
    return {"plan": plan_hash} | ({} if number is None else {"round": str(number)})
