"""Copies of a trained specialist that need none of this project's code, and the proof that they answer alike."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from release.model import ModelError
from semisam_core.files import save_tensors, write_atomically

OPSET = 18
TOLERANCE = 1e-4  # of probabilities
PROOF_BATCH = 2
PROOF_VALUES = 1 << 20

Answer = Callable[[Tensor], Tensor]


def write_script(specialist: nn.Module, path: Path, channels: int, patch: tuple[int, int, int]) -> int:
    """Write TorchScript, and return how many patches it takes at a time: 2, or 1 if the network fixes it.

    A network is compiled where TorchScript can (all but Swin UNETR): a traced one keeps the device of tensors that it
    makes itself.

    Raises:
        ModelError: the network can neither be compiled nor traced to one that answers alike.
    """
    for batch, make in ((PROOF_BATCH, _compiled), (PROOF_BATCH, _traced), (1, _traced)):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracing notes constants, and that it is deprecated; the proof decides
            script = make(specialist, _patches(batch, channels, patch))
            if script is None or not all(
                _fits(script, specialist, _patches(each, channels, patch, 7)) for each in range(1, batch + 1)
            ):
                continue
            buffer = io.BytesIO()
            torch.jit.save(script, buffer)
        write_atomically(path, buffer.getvalue())
        return batch
    raise ModelError("the network cannot be written as TorchScript: its copy answers differently.")


def _compiled(specialist: nn.Module, _: Tensor) -> Any:
    try:
        return torch.jit.script(specialist)
    except Exception:  # noqa: BLE001 - the compiler has many kinds, and tracing is next
        return None


def _traced(specialist: nn.Module, example: Tensor) -> Any:
    return torch.jit.trace(specialist, example, check_trace=False)  # type: ignore[no-untyped-call]


def write_onnx(specialist: nn.Module, path: Path, channels: int, patch: tuple[int, int, int]) -> None:
    """Write ONNX: input `image` (N, C, H, W, D) float32 of the patch's size, output `logits` (N, 1 + K, H, W, D).

    Raises:
        ModelError: the network cannot be exported.
    """
    example = _patches(PROOF_BATCH, channels, patch)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                specialist,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
                verbose=False,
            )
        if program is None:
            raise ValueError("nothing was exported")
        write_atomically(path, program.model_proto.SerializeToString())
    except Exception as error:  # noqa: BLE001 - the exporter has many kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(f"the network cannot be written as ONNX ({reason}); --without-onnx leaves it out.") from None


def write_proof(specialist: nn.Module, path: Path, channels: int, patch: tuple[int, int, int]) -> None:
    """Write two patches and the specialist's probabilities for them, for `differences` to compare with.

    One patch is noise, the other is smooth. Of the probabilities of large patches every second, third ... voxel along
    each axis is kept, so that the file stays at a few megabytes.
    """
    patches = _patches(PROOF_BATCH, channels, patch, 11)
    smooth = gaussian_filter(patches[1].numpy(), (0, 3, 3, 3))
    patches[1] = torch.from_numpy(smooth / max(float(smooth.std()), 1e-6))
    patches = patches.half()
    probability = _probability(specialist, patches.float())
    step = max(1, math.ceil((probability.numel() / PROOF_VALUES) ** (1 / 3)))
    kept = probability[:, :, ::step, ::step, ::step].contiguous()
    save_tensors(path, {"image": patches, "probability": kept, "step": torch.tensor(step)})


def differences(proof: Path, networks: dict[str, Answer]) -> dict[str, float]:
    """Return name -> largest difference of probabilities from those in the proof.

    Raises:
        ModelError: one is above `TOLERANCE`, or another class is the most probable somewhere it is not a tie.
    """
    try:
        known = load_file(proof)
        image, expected, step = known["image"].float(), known["probability"], int(known["step"])
        if expected.ndim != 5 or step < 1:
            raise ValueError
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"{proof}: it cannot be read ({type(error).__name__}).") from None
    found = {}
    for name, network in networks.items():
        try:
            probability = _probability(network, image)[:, :, ::step, ::step, ::step]
        except Exception as error:  # noqa: BLE001 - each runtime has its own kinds
            raise ModelError(f"{name} cannot answer ({type(error).__name__}).") from None
        if probability.shape != expected.shape:
            raise ModelError(f"{name} answers in the shape {tuple(probability.shape)}, not {tuple(expected.shape)}.")
        found[name] = float((probability - expected).abs().max())
        top = expected.topk(2, 1).values
        clear = (top[:, 0] - top[:, 1]) > TOLERANCE
        same = probability.argmax(1) == expected.argmax(1)
        if not found[name] <= TOLERANCE or not bool(same[clear].all()):
            raise ModelError(f"{name} answers differently from the trained specialist (by {found[name]:.2g}).")
    return found


def onnx_answer(path: Path) -> Answer:
    """Return a function that asks an ONNX file on the CPU."""
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - the runtime has its own kinds
        raise ModelError(f"{path}: it cannot be loaded ({type(error).__name__}).") from None
    return lambda patches: torch.from_numpy(session.run(None, {"image": patches.numpy()})[0])


def script_answer(path: Path, at_once: int = 1) -> Answer:
    """Return a function that asks a TorchScript file on the CPU, so many patches at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI bundles hold TorchScript, which torch calls deprecated
        try:
            network = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{path}: it cannot be loaded ({type(error).__name__}).") from None
    return lambda patches: torch.cat([network(part) for part in torch.split(patches, at_once)])


def _fits(traced: Answer, specialist: Answer, patches: Tensor) -> bool:
    try:
        return bool((_probability(traced, patches) - _probability(specialist, patches)).abs().max() <= TOLERANCE)
    except RuntimeError:  # a traced network that fixes the number of patches
        return False


def _probability(network: Answer, patches: Tensor) -> Tensor:
    with torch.no_grad():
        return network(patches).float().softmax(1)


def _patches(batch: int, channels: int, patch: tuple[int, int, int], seed: int = 0) -> Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.standard_normal((batch, channels, *patch), dtype=np.float32))
