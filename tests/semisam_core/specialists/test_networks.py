"""Every specialist: logits of the patch's size, seeded weights, no hidden state, the right patch divisor."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from safetensors.torch import load_file
from torch import nn

from semisam_core.contract import specialist_spec
from semisam_core.files import save_tensors
from semisam_core.losses import supervised_loss
from semisam_core.specialists import build_specialist, check_specialist, outline_specialist, patch_divisor
from tests.conftest import tiny_plan
from tests.semisam_core.specialists.examples import (
    DYNUNET,
    EVERY_EXAMPLE,
    EVERY_GROUPED,
    EXAMPLES,
    FLAT,
    SEGRESNET,
    SWIN,
    Example,
    patches,
    same,
)

PER_SAMPLE = ("unet", "dynunet", "residual dynunet", "vnet with prelu", "segresnet")
ONE_OF_EACH = ("unet", "dynunet", "vnet", "segresnet", "swinunetr")


def _build(example: Example, channels: int = 1, classes: int = 1, seed: int = 0) -> nn.Module:
    return build_specialist(example.name, example.arguments, channels, classes, seed)


@EVERY_EXAMPLE
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_output_is_one_tensor_of_logits_of_the_patchs_size(example: Example, training: bool) -> None:
    network = _build(example, channels=2, classes=3).train(training)
    with torch.no_grad():
        answer = network(patches(example, batch=2, channels=2))
    assert isinstance(answer, torch.Tensor)
    assert tuple(answer.shape) == (2, 1 + 3, *example.patch)
    assert float(answer.min()) < 0  # logits, not probabilities


@EVERY_GROUPED
def test_group_normalisation_replaces_every_other_kind(example: Example) -> None:
    network = _build(example)
    assert any(isinstance(layer, nn.GroupNorm) for layer in network.modules())
    assert not any(isinstance(layer, nn.InstanceNorm3d | nn.BatchNorm3d) for layer in network.modules())
    assert tuple(network(patches(example)).shape) == (1, 2, *example.patch)


@EVERY_EXAMPLE
def test_initial_weights_depend_only_on_the_seed(example: Example) -> None:
    torch.manual_seed(1)
    first = _build(example)
    torch.manual_seed(2)
    assert same(_build(example), first)
    assert not same(_build(example, seed=1), first)


@EVERY_EXAMPLE
def test_training_leaves_the_global_random_state_alone(example: Example) -> None:
    network, before = _build(example).train(), torch.get_rng_state()
    network(patches(example)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@EVERY_EXAMPLE
def test_there_are_no_running_statistics_by_default(example: Example) -> None:
    network = _build(example)
    assert not any(getattr(layer, "track_running_stats", False) for layer in network.modules())
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}


@EVERY_EXAMPLE
def test_normalisation_has_a_learned_scale_and_shift(example: Example) -> None:
    layers = [layer for layer in _build(example).modules() if isinstance(layer, nn.InstanceNorm3d)]
    hard_coded = 2 * 4 if example.arguments.get("v2") else 0  # MONAI's stagewise convolutions have none
    assert len(layers) > 4
    assert sum(layer.weight is None for layer in layers) == hard_coded


@EVERY_EXAMPLE
def test_samples_of_a_batch_do_not_influence_each_other(example: Example) -> None:
    network, batch = _build(example).train(), patches(example, batch=2)
    with torch.no_grad():
        assert torch.allclose(network(batch)[1:], network(batch[1:]), atol=1e-4)


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_per_sample_gradients_are_those_of_single_samples(name: str) -> None:
    example = EXAMPLES[name]
    batch, label = patches(example, batch=2), torch.zeros(2, *example.patch)
    hooked, alone = GradSampleModule(_build(example)), _build(example)
    supervised_loss(hooked(batch), label).backward()
    supervised_loss(alone(batch[1:]), label[1:]).backward()
    expected = torch.cat([value.grad.reshape(-1) for value in alone.parameters() if value.grad is not None])
    found = torch.cat([value.grad_sample[1].reshape(-1) for value in hooked.parameters()])
    assert float((found - expected).norm()) < 1e-2 * float(expected.norm())


# Its second block keeps size and channels, so that its residual needs no projection.
EVEN = EXAMPLES["residual dynunet"]._replace(
    arguments=EXAMPLES["residual dynunet"].arguments | {"channels": [4, 4, 8], "strides": [1, 2], "kernels": [3, 3, 3]}
)


@pytest.mark.parametrize(
    "example",
    [EXAMPLES["segresnet"], EXAMPLES["residual dynunet"], EVEN],
    ids=["segresnet", "residual dynunet", "residual dynunet without projection"],
)
def test_out_of_place_blocks_compute_what_monais_do(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = _build(example)
    monkeypatch.setattr(f"semisam_core.specialists.{example.name}.replace_layers", lambda *_: None)
    monais = _build(example)
    assert same(ours, monais)
    with torch.no_grad():
        assert torch.allclose(ours(patches(example)), monais(patches(example)), atol=1e-5)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_loss_falls_in_a_few_steps(name: str) -> None:
    example = EXAMPLES[name]
    network = _build(example).train()
    image = patches(example)
    label = (torch.nn.functional.avg_pool3d(image, 5, 1, 2)[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    losses = []
    for _ in range(6):
        loss = supervised_loss(network(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@EVERY_EXAMPLE
def test_every_parameter_gets_a_gradient(example: Example) -> None:
    network = _build(example)
    network(patches(example)).square().sum().backward()
    assert [name for name, value in network.named_parameters() if value.grad is None] == []


@EVERY_EXAMPLE
def test_the_state_survives_a_file(example: Example, tmp_path: Path) -> None:
    network, other, image = _build(example).eval(), _build(example, seed=1).eval(), patches(example)
    save_tensors(tmp_path / "weights.safetensors", network.state_dict())
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
    with torch.no_grad():
        assert torch.equal(network(image), other(image))


@EVERY_EXAMPLE
def test_every_parameter_is_sent_once(example: Example) -> None:
    patch, arguments = json.dumps(list(example.patch)), json.dumps(example.arguments)
    plan = tiny_plan(f"specialist={{name: {example.name}, arguments: {arguments}}}", f"data.patch={patch}")
    spec, network = specialist_spec(plan), _build(example)
    assert sum(torch.Size(each.shape).numel() for each in spec.values()) == sum(p.numel() for p in network.parameters())
    assert {each.dtype for each in spec.values()} == {torch.float32}
    assert len({value.data_ptr() for value in network.state_dict().values()}) == len(spec)


@EVERY_EXAMPLE
def test_the_patch_divisor_is_the_product_of_strides(example: Example) -> None:
    assert patch_divisor(example.name, example.arguments) == example.divisor


@pytest.mark.parametrize("name", EXAMPLES)
@settings(deadline=None, max_examples=4)
@given(factors=st.tuples(*[st.integers(1, 2)] * 3).filter(lambda each: sum(each) > 3))
def test_an_accepted_patch_gives_an_output_of_its_size(name: str, factors: tuple[int, int, int]) -> None:
    example = EXAMPLES[name]
    height, width, depth = (factor * divisor for factor, divisor in zip(factors, example.divisor, strict=True))
    check_specialist(example.name, example.arguments, (height, width, depth), 1)
    with torch.no_grad():
        answer = _build(example).train()(torch.zeros(1, 1, height, width, depth))
    assert tuple(answer.shape[2:]) == (height, width, depth)


@pytest.mark.parametrize("name", EXAMPLES)
@settings(deadline=None, max_examples=50)
@given(axis=st.integers(0, 2), factor=st.integers(1, 8), rest=st.integers(1, 31))
def test_a_patch_that_does_not_fit_is_refused_with_sides_that_do(name: str, axis: int, factor: int, rest: int) -> None:
    example = EXAMPLES[name]
    divisor, patch = example.divisor[axis], [2 * side for side in example.divisor]
    patch[axis] = factor * divisor + rest % (divisor - 1) + 1 if divisor > 2 else 2 * factor + 1
    said = f"data.patch[{axis}] = {patch[axis]} does not fit the specialist {example.name}: it must be a multiple of "
    with pytest.raises(ValueError, match=re.escape(f"{said}{divisor}")) as caught:
        check_specialist(example.name, example.arguments, (patch[0], patch[1], patch[2]), 1)
    for side in re.findall(r"\d+", str(caught.value).partition("for example")[2]):
        patch[axis] = int(side)
        check_specialist(example.name, example.arguments, (patch[0], patch[1], patch[2]), 1)


@pytest.mark.parametrize("name", EXAMPLES)
def test_half_the_divisor_does_not_fit(name: str) -> None:
    example = EXAMPLES[name]
    network = _build(example)
    patch = (example.divisor[0] * 3 // 2, 2 * example.divisor[1], 2 * example.divisor[2])
    try:
        with torch.no_grad():
            answer = network(torch.zeros(1, 1, *patch))
    except (RuntimeError, ValueError):
        return
    assert tuple(answer.shape[2:]) != patch


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_patch_that_leaves_one_voxel_at_the_deepest_level_is_refused(name: str) -> None:
    example = EXAMPLES[name]
    with pytest.raises(ValueError, match="a single voxel at the deepest level") as caught:
        check_specialist(example.name, example.arguments, example.divisor, 1)
    assert f"data.patch = {list(example.divisor)}" in str(caught.value)
    assert str([2 * example.divisor[0], *example.divisor[1:]]) in str(caught.value)
    with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
        _build(example)(torch.zeros(1, 1, *example.divisor))


def test_a_vnet_takes_numbers_of_channels_that_divide_16() -> None:
    for channels in (1, 2, 4, 8):
        check_specialist("vnet", {}, (32, 32, 32), channels)
        build_specialist("vnet", {}, channels, 1, 0)
    with pytest.raises(ValueError, match=re.escape("task.channels has 3 entries; the specialist vnet accepts 1,")):
        check_specialist("vnet", {}, (32, 32, 32), 3)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("dynunet", DYNUNET | {"strides": [2]}, "found 3 channels, 1 strides, 3 kernels"),
        ("dynunet", {"channels": [4, 8], "strides": [2], "kernels": [3, 3]}, "at least three channels"),
        ("dynunet", DYNUNET | {"kernels": [3, 2, 3]}, "specialist.arguments.kernels.1"),
        ("dynunet", DYNUNET | {"strides": [2, 5]}, "specialist.arguments.strides.1"),
        ("dynunet", DYNUNET | {"kernels": [3, 1, 3], "strides": [3, 2]}, "the kernel 1 skips voxels at stride 3"),
        ("dynunet", FLAT | {"residual": True}, "residual: true accepts only strides of 1 and 2"),
        ("dynunet", DYNUNET | {"residual": "yes"}, "specialist.arguments.residual"),
        ("dynunet", DYNUNET | {"normalization": "group"}, "channels must be multiples of 8"),
        ("vnet", {"normalization": "group"}, "specialist.arguments.normalization"),
        ("vnet", {"activation": "relu"}, "specialist.arguments.activation"),
        ("vnet", {"dropout": 0.5}, "vnet takes activation, normalization"),
        ("segresnet", SEGRESNET | {"blocks_up": [1]}, "blocks_up must have one entry fewer than blocks_down"),
        ("segresnet", SEGRESNET | {"normalization": "group"}, "channels must be a multiple of 8"),
        ("segresnet", SEGRESNET | {"channels": 0}, "specialist.arguments.channels"),
        ("swinunetr", SWIN | {"features": 16}, "multiple of 12"),
        ("swinunetr", SWIN | {"blocks": [1, 1]}, "specialist.arguments.blocks"),
        ("swinunetr", SWIN | {"normalization": "batch"}, "swinunetr takes features, blocks, v2"),
    ],
)
def test_impossible_arguments_are_refused_by_name(name: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        check_specialist(name, arguments, (64, 64, 64), 1)
    assert str(caught.value).startswith("specialist.arguments.")
    assert f"; {name} takes " in str(caught.value)


def test_every_accepted_kernel_and_stride_of_a_dynunet_works() -> None:
    for stride in (1, 2, 3, 4):
        for kernel in (1, 3, 5, 7):
            if kernel >= stride - 1:
                arguments = {"channels": [2, 2, 2], "strides": [stride, 1], "kernels": [kernel] * 3}
                answer = build_specialist("dynunet", arguments, 1, 1, 0)(torch.zeros(1, 1, 2 * stride, stride, stride))
                assert tuple(answer.shape[2:]) == (2 * stride, stride, stride)


@EVERY_EXAMPLE
def test_an_outline_has_the_networks_tensors_without_content(example: Example) -> None:
    outline, network = outline_specialist(example.name, example.arguments, 2, 3), _build(example, channels=2, classes=3)
    assert all(value.is_meta for value in outline.state_dict().values())
    described = [{n: (v.shape, v.dtype) for n, v in each.state_dict().items()} for each in (outline, network)]
    assert described[0] == described[1]


def test_reading_a_plan_builds_no_network() -> None:
    enormous = json.dumps({"channels": [4096] * 10, "strides": [1] * 9, "kernels": [7] * 10})
    started = time.monotonic()
    tiny_plan(f"specialist={{name: dynunet, arguments: {enormous}}}")
    assert time.monotonic() - started < 2
