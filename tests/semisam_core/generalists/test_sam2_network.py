"""What SAM 2 and MedSAM2 declare, how a weights file is recognised and loaded, and what loading leaves unchanged."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sam2", reason="needs the extra fedsemisam[sam2]; the Makefile installs it")

from semisam_core.errors import WeightsError
from semisam_core.generalists import PromptKind, load_generalist, registry
from semisam_core.generalists.cards import MEDSAM2, SAM2
from semisam_core.generalists.sam2_network import build_network, published_config
from semisam_core.generalists.sam2_video import SIDES, Sam2
from tests.semisam_core.generalists.tiny_sam2 import SIDE, save, tiny_sam2, write_config

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("sam2") / "tiny.yaml")


@pytest.fixture(scope="module")
def weights(config: Path) -> Path:
    return save(tiny_sam2(config), config.with_name("tiny.pt"))


@pytest.fixture(scope="module")
def model(config: Path, weights: Path) -> Sam2:
    return Sam2.load(SAM2, CPU, weights, config=config, side=SIDE)


def test_sam_2_takes_prompts_on_slices_and_propagates_them() -> None:
    kinds = {PromptKind.BOX_2D, PromptKind.POINTS_2D, PromptKind.MASK_2D, PromptKind.PROPAGATED}
    assert SAM2.prompt_kinds == kinds
    assert (SAM2.name, SAM2.licence) == ("sam2", "Apache-2.0")


def test_medsam2_takes_boxes_and_propagates_them() -> None:
    assert MEDSAM2.prompt_kinds == {PromptKind.BOX_2D, PromptKind.PROPAGATED}
    assert "research and education only" in MEDSAM2.licence


def test_the_network_has_the_saved_weights(model: Sam2, weights: Path) -> None:
    saved, held = torch.load(weights, weights_only=True)["model"], model.network.state_dict()
    assert saved.keys() == held.keys()
    assert all(torch.equal(saved[name], held[name]) for name in saved)
    assert model.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert model.card is SAM2


def test_weights_of_another_hash_are_refused(config: Path, weights: Path) -> None:
    with pytest.raises(WeightsError, match=rf"tiny.pt: .* expected {'0' * 64}; accepted is sam2.1_hiera_tiny.pt"):
        Sam2.load(SAM2, CPU, weights, "0" * 64, config=config, side=SIDE)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, config: Path, weights: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
    for path, chosen in ((tmp_path / "other.pth", None), (tmp_path / "other.pth", config), (weights, None)):
        with pytest.raises(WeightsError, match=rf"{path.name}: these weights do not fit SAM"):
            Sam2.load(MEDSAM2, CPU, path, config=chosen)


def test_there_are_no_packaged_weights() -> None:
    with pytest.raises(WeightsError, match=r"ships the weights of medsam2; accepted is MedSAM2_latest.pt"):
        Sam2.load(MEDSAM2, CPU, None)


@pytest.mark.parametrize("generation", ["sam2", "sam2.1"])
@pytest.mark.parametrize(("size", "width", "blocks"), [("t", 96, 12), ("s", 96, 16), ("b+", 112, 24), ("l", 144, 48)])
def test_the_configuration_is_inferred_from_the_tensors(generation: str, size: str, width: int, blocks: int) -> None:
    names = [f"image_encoder.trunk.blocks.{block}.norm1.weight" for block in range(blocks)]
    state = {name: torch.empty(width, device="meta") for name in names}
    state["image_encoder.trunk.patch_embed.proj.weight"] = torch.empty(width, 3, 7, 7, device="meta")
    if generation == "sam2.1":
        state["no_obj_embed_spatial"] = torch.empty(1, 64, device="meta")
    assert published_config(state) == f"{generation}/{generation}_hiera_{size}.yaml"


@pytest.mark.parametrize("name", ["sam2/sam2_hiera_t.yaml", "sam2.1/sam2.1_hiera_s.yaml"])
def test_the_network_of_a_published_configuration_is_recognised(name: str) -> None:
    assert published_config(build_network(name, 64).state_dict()) == name


def test_a_published_size_is_loaded_by_name_at_the_side_used_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_loaded", {})
    state = build_network("sam2.1/sam2.1_hiera_t.yaml", 64).state_dict()
    torch.save({"model": {name: tensor.half() for name, tensor in state.items()}}, tmp_path / "full.pt")
    for card, side in ((SAM2, 1024), (MEDSAM2, 512)):
        loaded = load_generalist(card.name, CPU, tmp_path / "full.pt")
        assert isinstance(loaded, Sam2)
        assert loaded.card is card
        assert loaded.network.image_size == loaded.framing.side == SIDES[card.name] == side
        # Positions in each attention to memory: one row per token of the coarsest level.
        layers = loaded.network.memory_attention.layers
        assert {len(each.freqs_cis) for layer in layers for each in (layer.self_attn, layer.cross_attn_image)} == {
            (side // 16) ** 2
        }


def test_the_settings_are_those_of_the_packages_builder_except_hole_filling() -> None:
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from sam2.build_sam import build_sam2_video_predictor

    GlobalHydra.instance().clear()
    with initialize_config_module("sam2", version_base="1.2"):
        published = _settings(build_sam2_video_predictor("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu"))
    ours = _settings(build_network("sam2.1/sam2.1_hiera_t.yaml", 1024).eval())
    assert published.keys() == ours.keys()
    different = {name: value for name, value in ours.items() if value != published[name]}
    assert different == {"fill_hole_area": 0}


def _settings(network: Any) -> dict[str, object]:
    """Return all settings of all modules of a network that are plain values."""
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, module in network.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
    }


@pytest.mark.parametrize("name", ["sam2", "medsam2"])
def test_without_its_package_the_error_names_the_extra_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(WeightsError, match=rf"{name} needs the Python package sam2; install fedsemisam\[sam2\]"):
        load_generalist(name, CPU, Path("weights.pt"))


def test_loading_changes_neither_hydra_nor_the_random_state(config: Path, weights: Path) -> None:
    script = """
import json, sys, torch
from pathlib import Path
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from omegaconf.basecontainer import BaseContainer
from semisam_core.generalists.cards import SAM2
from semisam_core.generalists.sam2_video import Sam2
weights, config = map(Path, sys.argv[1:])
load = lambda: Sam2.load(SAM2, torch.device("cpu"), weights, config=config, side=64)
assert "sam2" not in sys.modules
state, resolvers, base = torch.get_rng_state(), set(BaseContainer._resolvers), type(VersionBase.instance().getbase())
load()
assert "sam2" in sys.modules
same = [
    not GlobalHydra.instance().is_initialized(),
    set(BaseContainer._resolvers) == resolvers,
    type(VersionBase.instance().getbase()) is base,
    torch.equal(state, torch.get_rng_state()),
]
initialize_config_dir(str(config.parent), version_base="1.3")
load()
paths = GlobalHydra.instance().config_loader().get_search_path().get_path()
same.append(str(config.parent) in [each.path.removeprefix("file://") for each in paths])
print(json.dumps(same))
"""
    command = [sys.executable, "-c", script, str(weights), str(config)]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert json.loads(ended.stdout.splitlines()[-1]) == [True] * 5
