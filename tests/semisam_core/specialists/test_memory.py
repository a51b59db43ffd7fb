"""The memory estimate of a training step, against PyTorch's allocator and autograd in a real one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from semisam_core.losses import supervised_loss
from semisam_core.specialists import (
    SPECIALISTS,
    build_specialist,
    check_specialist,
    memory_estimate,
    parameter_count,
    patch_divisor,
)
from semisam_core.specialists.memory import MemoryTracker, StepMemory, training_step_memory
from tests.semisam_core.specialists.examples import BATCHED, EVERY_EXAMPLE, EXAMPLES, Example

BATCH = 2
TOLERANCE = 0.05
TABLE = Path(__file__).resolve().parents[3] / "docs" / "specialists.md"
COLUMNS = ((64, 64, 40), (96, 96, 96))
AFTER_AN_OPERATION = "after an operation"

EVERY_NETWORK = pytest.mark.parametrize(
    "example",
    [*EXAMPLES.values(), *BATCHED.values()],
    ids=[*EXAMPLES, *(f"{name} with batch norm" for name in BATCHED)],
)


class _Marks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leaves a mark in the profile after each operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with record_function(AFTER_AN_OPERATION):
            pass
        return result


def _allocated(run: Callable[[], None]) -> tuple[int, int]:
    """Return the most bytes that PyTorch's allocator had handed out after any operation of `run`, and at any time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, _Marks():
        run()
    now = between = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda each: each.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
        elif event.name() == AFTER_AN_OPERATION:
            between = max(between, now)
    return between, peak


def _patches(example: Example) -> tuple[Tensor, Tensor]:
    patch = tuple(4 * side for side in example.patch) if example.divisor[0] < 16 else example.patch
    return torch.randn(BATCH, 1, *patch), torch.zeros(BATCH, *patch)


def _build(example: Example) -> nn.Module:
    return build_specialist(example.name, example.arguments, 1, 1, 0)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def _estimate(example: Example, image: Tensor) -> StepMemory:
    height, width, depth = image.shape[2:]
    return training_step_memory(lambda: _build(example), 1, (height, width, depth), BATCH)


@EVERY_NETWORK
def test_between_operations_a_real_step_has_allocated_what_the_estimate_says(example: Example) -> None:
    """Within an operation the convolution library of each processor allocates as it likes; see the tests below."""
    image, label = _patches(example)
    network = _build(example)
    teacher = copy.deepcopy(network)
    held = _bytes([*network.state_dict().values(), *teacher.state_dict().values(), image, label])
    optimizer = torch.optim.AdamW(network.parameters())

    def step() -> None:
        supervised_loss(network(image), label).backward()
        optimizer.step()

    assert held + _allocated(step)[0] == pytest.approx(_estimate(example, image).tensors, rel=TOLERANCE)


def test_weights_teacher_gradients_and_both_moments_are_counted() -> None:
    """Where a patch is tiny, they are nearly all there is."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv3d(1, 256, 1), nn.Conv3d(256, 256, 1), nn.Conv3d(256, 2, 1))

    weights = _bytes(list(build().parameters()))
    assert training_step_memory(build, 1, (2, 2, 2), 1).tensors > 5 * weights


@EVERY_EXAMPLE
def test_the_estimate_has_room_for_all_that_autograd_keeps(example: Example) -> None:
    image, label = _patches(example)
    network = _build(example)
    weights = {each.data_ptr() for each in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        supervised_loss(network(image), label)
    saved = sum(each.untyped_storage().nbytes() for each in kept.values())
    networks = 2 * _bytes(list(network.parameters()))  # specialist and teacher; gradients replace activations
    assert saved + networks < _estimate(example, image).tensors


@pytest.mark.parametrize("name", SPECIALISTS)
def test_the_estimate_grows_with_patches_and_batches(name: str) -> None:
    side = patch_divisor(name, {})[0]
    smallest, large = (2 * side, side, side), (6 * side, 4 * side, 4 * side)
    weights = 4 * parameter_count(build_specialist(name, {}, 1, 1, 0))
    # Weights, gradients, two moments of AdamW, the teacher.
    assert memory_estimate(name, {}, 1, 1, smallest, 1) >= 5 * weights
    one, two, three, four = (memory_estimate(name, {}, 1, 1, large, batch) for batch in (1, 2, 3, 4))
    assert 5 * weights < one < two < three
    # Each further patch costs the same.
    assert four - three == pytest.approx(three - two, rel=0.01)


def test_an_enormous_step_is_estimated_quickly_and_without_touching_the_random_state() -> None:
    started, before = time.monotonic(), torch.get_rng_state()
    wide = {"channels": [4096, 4096, 4096], "strides": [2, 2]}
    assert memory_estimate("unet", wide, 1, 1, (512, 512, 512), 64) > 10**13
    assert time.monotonic() - started < 60
    assert torch.equal(torch.get_rng_state(), before)


def test_a_patch_that_does_not_fit_the_network_has_no_estimate() -> None:
    with pytest.raises(ValueError, match=r"data\.patch\[2\] = 40 does not fit the specialist vnet"):
        memory_estimate("vnet", {}, 1, 1, (64, 64, 40), 1)


def test_a_storage_is_counted_once_and_until_it_is_freed() -> None:
    thousand = torch.ones(1000)
    tracker = MemoryTracker()
    tracker.track([thousand, thousand.view(10, 100)])
    assert tracker.peak == 4000
    with tracker:
        view = thousand[:500]
        assert tracker.peak == 4000
        doubled = thousand * 2
        assert tracker.peak == 8000
        del doubled, view
        assert float((thousand + 1).sum()) == 2000
        assert tracker.peak == tracker.tensors == 8004


UNFOLDED = {  # layer, values that its unfolded input has
    "few channels": (nn.Conv3d(2, 3, 3, padding=1, bias=False), 2 * 27 * 8**3),
    "stride": (nn.Conv3d(2, 3, 3, stride=2, padding=1, bias=False), 2 * 27 * 4**3),
    "kernel of one": (nn.Conv3d(2, 3, 1, bias=False), 0),
    "transposed": (nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), 3 * 8 * 8**3),
}
MANY_CHANNELS = nn.Conv3d(5, 3, 3, padding=1, bias=False)


@pytest.mark.parametrize(
    ("layer", "unfolded"), [*UNFOLDED.values(), (MANY_CHANNELS, 0)], ids=[*UNFOLDED, "many channels"]
)
def test_transposed_convolutions_and_those_of_few_channels_count_their_unfolded_input(
    layer: nn.Module, unfolded: int
) -> None:
    image, tracker = torch.zeros(1, layer.in_channels, 8, 8, 8), MemoryTracker()
    with tracker, torch.no_grad():
        result = layer(image)
    assert tracker.tensors == _bytes([result])
    assert tracker.peak == _bytes([result]) + 4 * unfolded


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize(("layer", "unfolded"), UNFOLDED.values(), ids=UNFOLDED)
def test_pytorchs_own_convolutions_unfold_as_much_as_is_counted(layer: nn.Module, unfolded: int) -> None:
    image = torch.zeros(1, layer.in_channels, 8, 8, 8)
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        between, peak = _allocated(lambda: layer(image))
    assert peak - between == pytest.approx(4 * unfolded, rel=TOLERANCE)


def test_the_documented_table_matches_the_code() -> None:
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == sorted(SPECIALISTS)
    for row in rows:
        name = row.split("`")[1]
        divisor = patch_divisor(name, {})[0]
        network = build_specialist(name, {}, 1, 1, 0)
        sizes = []
        for patch in COLUMNS:
            try:
                check_specialist(name, {}, patch, 1)
            except ValueError:
                sizes.append("not taken")
                continue
            sizes.append(f"{memory_estimate(name, {}, 1, 1, patch, 1) / 2**30:.2f} GiB")
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2:] == [str(divisor), f"{parameter_count(network):,}", *sizes]
        for argument, field in SPECIALISTS[name].arguments.model_fields.items():
            default = field.default
            shown = str(list(default) if isinstance(default, tuple) else default).lower()
            assert f"{argument}: {shown}" in cells[1], name


def test_there_is_an_example_of_every_registered_specialist() -> None:
    assert {example.name for example in EXAMPLES.values()} == set(SPECIALISTS)
