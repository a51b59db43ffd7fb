"""Copies of each specialist on offer, as TorchScript and ONNX, answer as the specialist does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from release.model import ModelError
from release.networks import (
    OPSET,
    PROOF_VALUES,
    TOLERANCE,
    differences,
    onnx_answer,
    script_answer,
    write_onnx,
    write_proof,
    write_script,
)
from semisam_core.specialists import SPECIALISTS, build_specialist
from tests.conftest import balls

CLASSES = 2
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, int, int], int]] = {
    "dynunet": (
        {"channels": [8, 8, 8], "strides": [2, [2, 2, 1]], "kernels": [3, 3, 3], "residual": True},
        (16, 16, 8),
        2,
    ),
    "segresnet": ({"channels": 8, "blocks_down": [1, 1], "blocks_up": [1], "normalization": "group"}, (16, 16, 8), 2),
    "swinunetr": ({"features": 12, "blocks": [1, 1, 1, 1]}, (64, 32, 32), 1),
    "unet": ({"channels": [4, 8], "strides": [2], "residual_units": 1, "normalization": "batch"}, (16, 16, 8), 2),
    "vnet": ({}, (32, 32, 16), 1),
}


def test_every_specialist_on_offer_is_tried() -> None:
    assert set(NETWORKS) == set(SPECIALISTS)


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow if each == "swinunetr" else ()) for each in sorted(NETWORKS)]
)
def test_torchscript_and_onnx_answer_as_the_specialist(tmp_path: Path, name: str) -> None:
    _, patch, channels = NETWORKS[name]
    specialist = _network(name)
    at_once = write_script(specialist, tmp_path / "model.ts", channels, patch)
    write_onnx(specialist, tmp_path / "model.onnx", channels, patch)
    write_proof(specialist, tmp_path / "proof", channels, patch)
    copies = {
        "script": script_answer(tmp_path / "model.ts", at_once),
        "onnx": onnx_answer(tmp_path / "model.onnx"),
    }

    assert max(differences(tmp_path / "proof", copies).values()) <= TOLERANCE
    for patches in (_random(1, channels, patch), _random(3, channels, patch), _scan(channels, patch)):
        for copy in copies.values():
            _expect_alike(copy(patches), specialist, patches)
    model = onnx.load(tmp_path / "model.onnx")
    assert [each.version for each in model.opset_import if not each.domain] == [OPSET]
    assert [each.name for each in (*model.graph.input, *model.graph.output)] == ["image", "logits"]
    if name != "swinunetr":  # a compiled network makes its tensors where its input is, a traced one where it was traced
        assert "cpu" not in str(torch.jit.load(tmp_path / "model.ts").inlined_graph)


def test_a_copy_that_answers_differently_is_found(tmp_path: Path) -> None:
    _, patch, channels = NETWORKS["unet"]
    specialist, other = _network("unet"), _network("unet")
    write_proof(specialist, tmp_path / "proof", channels, patch)
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)

    assert differences(tmp_path / "proof", {"same": _network("unet")}) == {"same": 0.0}
    with pytest.raises(ModelError, match="other answers differently from the trained specialist"):
        differences(tmp_path / "proof", {"other": other})
    with pytest.raises(ModelError, match="nan answers differently"):
        differences(tmp_path / "proof", {"nan": lambda patches: specialist(patches) * float("nan")})
    with pytest.raises(ModelError, match=r"small answers in the shape \(2, 3, 8, 8, 4\)"):
        differences(tmp_path / "proof", {"small": lambda patches: specialist(patches)[..., ::2, ::2, ::2]})
    with pytest.raises(ModelError, match="broken cannot answer"):
        differences(tmp_path / "proof", {"broken": lambda patches: specialist(patches[:, :1])})


def test_the_proof_of_a_large_patch_stays_small_and_still_finds_a_difference(tmp_path: Path) -> None:
    patch = (112, 112, 80)
    network, other = nn.Conv3d(1, 4, 1), nn.Conv3d(1, 4, 1)
    write_proof(network, tmp_path / "proof", 1, patch)
    proof = load_file(tmp_path / "proof")

    assert proof["probability"].numel() <= PROOF_VALUES * 1.1
    assert tuple(proof["image"].shape) == (2, 1, *patch)
    assert differences(tmp_path / "proof", {"same": network}) == {"same": 0.0}
    with pytest.raises(ModelError, match="answers differently"):
        differences(tmp_path / "proof", {"other": other})


def test_a_file_that_is_no_proof_or_no_network_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"nothing")

    with pytest.raises(ModelError, match="cannot be read"):
        differences(tmp_path / "file", {})
    with pytest.raises(ModelError, match="cannot be loaded"):
        script_answer(tmp_path / "file")
    with pytest.raises(ModelError, match="cannot be loaded"):
        onnx_answer(tmp_path / "file")


def test_a_network_that_onnx_cannot_hold_is_refused_with_a_way_out(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(ModelError, match=r"cannot be written as ONNX .* --without-onnx leaves it out"):
        write_onnx(Branching(), tmp_path / "model.onnx", 1, (8, 8, 8))
    assert not (tmp_path / "model.onnx").exists()


def _network(name: str) -> nn.Module:
    """Return a network whose answers differ from voxel to voxel, with running statistics that were learned."""
    arguments, patch, channels = NETWORKS[name]
    network = build_specialist(name, arguments, channels, CLASSES, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
        if any(isinstance(each, nn.BatchNorm3d) for each in network.modules()):
            network.train()(_random(2, channels, patch) * 2 + 1)
    return network.eval()


def _random(batch: int, channels: int, patch: tuple[int, int, int]) -> Tensor:
    return torch.from_numpy(np.random.default_rng(batch).standard_normal((batch, channels, *patch), dtype=np.float32))


def _scan(channels: int, patch: tuple[int, int, int]) -> Tensor:
    image = torch.from_numpy(balls(shape=patch)[0])
    return ((image - image.mean()) / image.std()).expand(2, channels, *patch).contiguous()


def _expect_alike(logits: Tensor, specialist: nn.Module, patches: Tensor) -> None:
    with torch.no_grad():
        expected = specialist(patches)
    assert logits.shape == expected.shape
    assert float((logits.softmax(1) - expected.softmax(1)).abs().max()) <= TOLERANCE
    assert bool((logits.argmax(1) == expected.argmax(1)).all())
    assert len(expected.argmax(1).unique()) > 1  # an answer of one class everywhere would show nothing
