"""The memory of a training step, against what PyTorch's own allocator and autograd say of a real one."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from semisam_core.losses import supervised_loss
from semisam_core.specialists import (
    SPECIALISTS,
    build_specialist,
    check_specialist,
    memory,
    memory_estimate,
    parameter_count,
    patch_divisor,
)
from semisam_core.specialists.memory import PeakBook, training_step_bytes
from tests.semisam_core.specialists.examples import EVERY_BATCHED, EVERY_EXAMPLE, EXAMPLES, Example

BATCH = 2  # a single tiny patch makes CPU libraries unfold the input of every convolution
FACTOR = 1.6  # a real step's peak is at most this many times the estimate, and the estimate that many times the peak
TABLE = Path(__file__).resolve().parents[3] / "docs" / "specialists.md"
COLUMNS = ((64, 64, 40), (96, 96, 96))


def _step(network: nn.Module, image: Tensor, label: Tensor) -> None:
    optimizer = torch.optim.AdamW(network.parameters())
    supervised_loss(network(image), label).backward()
    optimizer.step()


def _patches(example: Example) -> tuple[Tensor, Tensor]:
    patch = tuple(4 * side for side in example.patch) if example.divisor[0] < 16 else example.patch
    return torch.randn(BATCH, 1, *patch), torch.zeros(BATCH, *patch)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def _estimate(example: Example, image: Tensor) -> int:
    height, width, depth = image.shape[2:]
    return memory_estimate(example.name, example.arguments, 1, 1, (height, width, depth), BATCH)


def _estimate_without_unfolding(example: Example, image: Tensor) -> int:
    """Return the estimate for a library that convolves without an unfolded copy of the input, as oneDNN often does."""
    height, width, depth = image.shape[2:]

    def build() -> nn.Module:
        return build_specialist(example.name, example.arguments, 1, 1, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_unfolded_bytes", lambda func, args: 0)
        return training_step_bytes(build, 1, (height, width, depth), BATCH)


def _check_against_the_allocator(example: Example) -> None:
    image, label = _patches(example)
    network = build_specialist(example.name, example.arguments, 1, 1, 0)
    teacher = copy.deepcopy(network)
    held = _bytes([*network.state_dict().values(), *teacher.state_dict().values(), image, label])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _step(network, image, label)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    # Whether a convolution unfolds its input depends on the processor that the library was tuned for.
    assert _estimate_without_unfolding(example, image) / FACTOR < held + peak < _estimate(example, image) * FACTOR


@EVERY_EXAMPLE
def test_the_estimate_is_near_the_peak_of_the_allocator(example: Example) -> None:
    _check_against_the_allocator(example)


@EVERY_BATCHED
def test_the_estimate_is_near_the_peak_with_batch_norm_too(example: Example) -> None:
    _check_against_the_allocator(example)


@EVERY_EXAMPLE
def test_the_estimate_has_room_for_all_that_autograd_keeps(example: Example) -> None:
    image, label = _patches(example)
    network = build_specialist(example.name, example.arguments, 1, 1, 0)
    weights = {each.data_ptr() for each in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        supervised_loss(network(image), label)
    saved = sum(each.untyped_storage().nbytes() for each in kept.values())
    weighing = 2 * _bytes(list(network.parameters()))  # specialist and teacher; gradients come when activations go
    assert saved + weighing < _estimate(example, image)


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


def test_what_would_fill_any_machine_is_estimated_in_a_moment_and_changes_no_random_state() -> None:
    began, before = time.monotonic(), torch.get_rng_state()
    wide = {"channels": [4096, 4096, 4096], "strides": [2, 2]}
    assert memory_estimate("unet", wide, 1, 1, (512, 512, 512), 64) > 10**13
    assert time.monotonic() - began < 60
    assert torch.equal(torch.get_rng_state(), before)


def test_a_patch_that_the_network_does_not_take_has_no_estimate() -> None:
    with pytest.raises(ValueError, match=r"data\.patch\[2\] = 40 cannot be divided by the specialist vnet"):
        memory_estimate("vnet", {}, 1, 1, (64, 64, 40), 1)


def test_memory_is_booked_once_a_storage_and_until_it_is_freed() -> None:
    thousand = torch.ones(1000)
    book = PeakBook()
    book.enter([thousand, thousand.view(10, 100)])
    assert book.peak == 4000
    with book:
        view = thousand[:500]
        assert book.peak == 4000
        doubled = thousand * 2
        assert book.peak == 8000
        del doubled, view
        assert float((thousand + 1).sum()) == 2000
        assert book.peak == 8004


def test_a_transposed_convolution_and_one_of_few_channels_unfold_their_input() -> None:
    for layer, unfolded in (
        (nn.Conv3d(2, 3, 3, padding=1, bias=False), 2 * 27 * 8**3),
        (nn.Conv3d(5, 3, 3, padding=1, bias=False), 0),
        (nn.Conv3d(2, 3, 1, bias=False), 0),
        (nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), 3 * 8 * 8**3),
    ):
        image, book = torch.zeros(1, layer.in_channels, 8, 8, 8), PeakBook()
        with book, torch.no_grad():
            answer = layer(image)
        assert book.peak == 4 * (answer.numel() + unfolded)


def test_the_documented_table_is_what_the_functions_say() -> None:
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


def test_every_example_is_of_a_registered_specialist_and_none_is_left_out() -> None:
    assert {example.name for example in EXAMPLES.values()} == set(SPECIALISTS)
