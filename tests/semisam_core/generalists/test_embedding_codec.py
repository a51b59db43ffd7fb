"""An embedding takes a third of its size in half precision, and the generalist answers the same."""

from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from semisam_core.data.phantom import Scanner, make_phantom
from semisam_core.generalists import Prompts, SliceBox, VolumeGrid, load_generalist
from semisam_core.generalists.embedding_codec import BLOCK, NARROW, STEP, Coded, decoded, encoded

HALF_PRECISION = 2  # bytes a value


def _there_and_back(embedding: torch.Tensor) -> torch.Tensor:
    coded = encoded(embedding)
    assert coded is not None
    return decoded(coded)


@settings(deadline=None, max_examples=60)
@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=0, max_dims=4, max_side=40),
        elements=st.floats(-60000, 60000, width=32) | st.just(0.0),
    )
)
def test_each_value_is_within_half_a_step_of_its_channel(values: np.ndarray) -> None:
    """Where a coarser step than the one asserted here could be taken, it is 16 bits that allow a finer one."""
    found = _there_and_back(torch.from_numpy(values)).numpy()
    assert found.shape == values.shape
    flat, back = values.reshape(-1).astype(float), found.reshape(-1)
    channel = values[0].size if values.ndim > 1 else BLOCK
    length = channel if channel <= BLOCK else BLOCK
    for start in range(0, flat.size, length):
        block = np.zeros(length)
        part = flat[start : start + length]
        block[: part.size] = part
        step = max(STEP * block.std(), np.abs(block).max() / NARROW)
        assert np.abs(back[start : start + length] - part).max() <= 0.5 * step * (1 + 1e-4) + 1e-30


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0.01, 0.99), strength=st.floats(10, 1000), seed=st.integers(0, 2**31))
def test_a_few_or_many_extremes_in_a_channel_leave_the_rest_its_shape(share: float, strength: float, seed: int) -> None:
    values = torch.randn(1, BLOCK, generator=torch.Generator().manual_seed(seed))
    extreme = int(share * BLOCK)
    values[0, :extreme] = strength  # as an encoder's features in the padding beside a scan
    found = _there_and_back(values)
    rest = (found - values)[0, extreme:]
    assert float(rest.norm() / values[0, extreme:].norm()) < 0.45  # by 8-bit codes alone, up to 1


def test_a_quiet_channel_beside_a_loud_one_keeps_its_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    quiet, loud = torch.randn(2, BLOCK, generator=generator)
    found = _there_and_back(torch.stack([1e-3 * quiet, 1e3 * loud]))
    assert float((found[0] - 1e-3 * quiet).norm() / (1e-3 * quiet).norm()) < 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_cannot_be_coded(value: float) -> None:
    assert encoded(torch.tensor([1.0, value])) is None


def test_parts_that_do_not_fit_are_refused() -> None:
    coded = encoded(torch.arange(5000.0))
    assert coded is not None
    bomb = torch.tensor([10**6], dtype=torch.int64)
    for broken in (
        Coded(coded.codes, coded.steps, bomb),
        Coded(coded.codes, coded.steps[:1], coded.shape),
        Coded(coded.codes[:-20], coded.steps, coded.shape),
        Coded(coded.codes.flip(0), coded.steps, coded.shape),
    ):
        with pytest.raises(ValueError, match=r"fit|inflated"):
            decoded(broken)


@pytest.mark.parametrize("shape", [[0], [64, 64]])
def test_codes_are_inflated_no_further_than_their_shape_allows(shape: list[int]) -> None:
    codes = torch.frombuffer(bytearray(zlib.compress(bytes(100_000_000))), dtype=torch.uint8)
    tracemalloc.start()
    with pytest.raises(ValueError, match="fit"):
        decoded(Coded(codes, torch.ones(7), torch.tensor(shape, dtype=torch.int64)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_lite_medsam_answers_the_same_from_a_third_of_the_bytes() -> None:
    scan, label = make_phantom(Scanner((1.5, 1.5, 3.0), "RAS", 1.0, 0.0, 1.0, 0.1, 0.02), seed=0)
    image, target = torch.from_numpy(np.asarray(scan)).float(), torch.from_numpy(label) == 1
    shown = target.flatten(0, 1).sum(0).topk(3).indices.tolist()
    boxes = tuple(SliceBox(k, _bounds(target[:, :, k])) for k in sorted(shown))
    grid = VolumeGrid((image.shape[0], image.shape[1], image.shape[2]), (1.5, 1.5, 3.0))
    model = load_generalist("lite-medsam", torch.device("cpu"), None, None)
    embeddings = model.embed((image - image.mean()) / image.std(), grid, sorted(shown))
    coded = {unit: encoded(each) for unit, each in embeddings.items()}
    size = sum(each.codes.numel() + each.steps.nbytes for each in coded.values() if each is not None)
    assert size < sum(each.numel() * HALF_PRECISION for each in embeddings.values()) / 3
    plain = model.segment(embeddings, Prompts(boxes=boxes), grid).probability > 0.5
    stored = {unit: decoded(each) for unit, each in coded.items() if each is not None}
    found = model.segment(stored, Prompts(boxes=boxes), grid).probability > 0.5
    truth = torch.zeros_like(target)
    truth[:, :, shown] = target[:, :, shown]
    assert _dice(found, plain) > 0.995
    assert abs(_dice(found, truth) - _dice(plain, truth)) < 0.005


def _bounds(mask: torch.Tensor) -> tuple[float, float, float, float]:
    places = mask.nonzero()
    (top, left), (bottom, right) = places.min(0).values.tolist(), places.max(0).values.tolist()
    return float(top), float(left), float(bottom), float(right)


def _dice(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))
