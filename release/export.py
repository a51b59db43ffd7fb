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
from release.model import PACKAGED_PLAN, PACKAGED_WEIGHTS, PLAN, ModelError, lacking, load_model
from release.networks import Answer, differences, onnx_answer, script_answer, write_onnx, write_proof, write_script
from release.package import Signed, check, expected_signer, seal
from semisam_core.contract import travelling
from semisam_core.files import save_tensors, write_atomically, write_json
from semisam_core.plan import load_plan

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
    terms = _terms(licence)
    if lack := lacking(load_plan(run / PLAN)):
        raise ModelError(
            f"{run}: there is no whole model to export: {lack}. A site uses the run folder with its own layers: "
            "semisam predict --layers."
        )
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
        if onnx:
            say("ONNX")
            write_onnx(model.specialist, folder / ONNX, channels, patch)
        say("comparing the copies with the specialist")
        copies = _copies(folder, onnx, at_once)
        card = facts(run, model) | {"differences": differences(folder / PROOF, copies)}
        write_json(folder / CARD, card)
        write_atomically(folder / "docs/README.md", as_markdown(card).encode())
        description = f"Trained by federated learning at {len(card['sites'])} sites; see docs/README.md."
        write_json(folder / "configs/metadata.json", bundle.metadata(plan, plan.task.name, description, VERSION))
        write_json(folder / "configs/inference.json", bundle.inference(plan, at_once))
        write_atomically(folder / "LICENSE", terms.encode())
        seal(folder, model.sha256, plan.hash, key)
        shutil.move(folder, out)
    return card


def verify(package: Path, signer: str | None, parity: bool = False) -> dict[str, Any]:
    """Check a package: files, signature, weights, and that every copy of the network answers alike.

    Nothing is loaded before files and signature are found right. TorchScript and ONNX are programs: those of an unknown
    signer are run only if asked for.

    Args:
        package: its folder.
        signer: fingerprint of the lead's key, or a file with the public key, from another source than the package.
        parity: whether to run the copies even if no signer is named.

    Returns:
        `signer`, `expected` (whether a signer was named, and it is this one), `weights_sha256`, `plan_hash`, `files`
        (how many) and `differences`: for each copy how far its probabilities are from the specialist's.

    Raises:
        ModelError: anything is wrong; the message says what.
    """
    expected = None if signer is None else expected_signer(signer)
    manifest, signed = check(package)
    _check_signer(package, signed, expected)
    model = load_model(package)
    if (model.sha256, model.plan.hash) != (manifest.weights_sha256, manifest.plan_hash):
        raise ModelError(f"{package}: weights or plan are not those that the manifest names.")
    copies: dict[str, Answer] = {PACKAGED_WEIGHTS: model.specialist}
    if parity or expected is not None:
        copies |= _copies(package, ONNX in manifest.files, _windows(package))
    return {
        "signer": signed.fingerprint,
        "expected": expected is not None,
        "weights_sha256": manifest.weights_sha256,
        "plan_hash": manifest.plan_hash,
        "files": len(manifest.files),
        "differences": differences(package / PROOF, copies),
    }


def _copies(folder: Path, onnx: bool, at_once: int) -> dict[str, Answer]:
    copies = {bundle.SCRIPT: script_answer(folder / bundle.SCRIPT, at_once)}
    return copies | ({ONNX: onnx_answer(folder / ONNX)} if onnx else {})


def _windows(package: Path) -> int:
    """Return how many patches the bundle's TorchScript takes at a time."""
    path = package / "configs/inference.json"
    try:
        windows = int(json.loads(path.read_text(encoding="utf-8"))["inferer"]["sw_batch_size"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        windows = 0
    if windows < 1:
        raise ModelError(f"{path}: inferer.sw_batch_size is missing.")
    return windows


def _check_signer(package: Path, signed: Signed, expected: str | None) -> None:
    if expected is None:
        return
    if signed.fingerprint is None:
        raise ModelError(f"{package}: the package is not signed.")
    if signed.fingerprint != expected:
        raise ModelError(f"{package}: it was signed by {signed.fingerprint}, not by {expected}. Do not use it.")


def _terms(licence: Path | None) -> str:
    if licence is None:
        return LICENCE
    try:
        return licence.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{licence}: no licence can be read there ({type(error).__name__}).") from None


def _metadata(number: int | None, plan_hash: str) -> dict[str, str]:
    return {"plan": plan_hash} | ({} if number is None else {"round": str(number)})
