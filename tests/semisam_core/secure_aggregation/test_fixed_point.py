"""Updates as vectors of whole numbers: what is summed is what would have been averaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.aggregation.weighted_mean import weighted_mean
from semisam_core.contract import HEAD_PREFIX, TensorSpec
from semisam_core.plan_sections.aggregation import MOST_SUMMED, SecureAggregation
from semisam_core.secure_aggregation.fixed_point import decode, encode, vector_spec, without_head
from semisam_core.secure_aggregation.weights import WholeWeights
from server.updates import MemoryUpdate

HEAD = HEAD_PREFIX + "w"
SPEC = {
    "w": TensorSpec((3, 2), torch.float32),
    "b": TensorSpec((), torch.float32),
    HEAD: TensorSpec((4,), torch.float32),
}
BOUND = SecureAggregation()


def _tensors(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(agreed.shape, generator=generator) for name, agreed in SPEC.items()}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 1024), st.integers(0, 1024)), min_size=3, max_size=6), st.integers(0, 1000))
def test_the_sum_is_the_weighted_mean(weights: list[tuple[int, int]], seed: int) -> None:
    reference, updates = _tensors(seed), [_tensors(seed + k + 1) for k in range(len(weights))]
    total = np.zeros(vector_spec(SPEC).shape, np.uint64)
    for update, pair in zip(updates, weights, strict=True):
        total += encode(update, reference, SPEC, WholeWeights(*pair))
    mean = decode(total, reference, SPEC, len(weights), BOUND)
    assert (mean.weights.specialist, mean.weights.head) == tuple(np.sum(weights, 0))
    for k, names in enumerate((("w", "b"), (HEAD,))):
        whole = sum(pair[k] for pair in weights)
        if whole == 0:
            assert torch.equal(mean.tensors[HEAD], reference[HEAD])
            continue
        shelf = [MemoryUpdate(f"s{i}", {n: update[n] for n in names}, {}) for i, update in enumerate(updates)]
        expected = weighted_mean(shelf, [pair[k] / whole for pair in weights])
        for name in names:
            assert torch.allclose(mean.tensors[name], expected[name], rtol=0, atol=2e-7)


def test_the_largest_updates_of_the_most_sites_do_not_overflow() -> None:
    bound = SecureAggregation(maximum_norm=10_000, maximum_weight=1024)
    reference = {name: torch.zeros(agreed.shape) for name, agreed in SPEC.items()}
    for sign in (1, -1):
        update = {name: torch.full(agreed.shape, sign * 10_000.0) for name, agreed in SPEC.items()}
        vector = encode(update, reference, SPEC, WholeWeights(1024, 1024))
        total = (vector * np.uint64(MOST_SUMMED)).astype(np.uint64)
        mean = decode(total, reference, SPEC, MOST_SUMMED, bound)
        assert all(torch.equal(mean.tensors[name], update[name]) for name in SPEC)


def test_a_sum_that_no_updates_can_have_is_found() -> None:
    reference = _tensors(0)
    total = sum((encode(_tensors(k), reference, SPEC, WholeWeights(4, 0)) for k in (1, 2, 3)), np.uint64(0))
    decode(total, reference, SPEC, 3, BOUND)
    for at, value in ((0, 2), (0, 3 * 1024 + 1), (0, 2**63), (1, 2**64 - 1), (1, 2**20), (2, 2**62), (5, 2**63 + 5)):
        wrong = total.copy()
        wrong[at] = value
        with pytest.raises(ValueError, match="cannot be the sum"):
            decode(wrong, reference, SPEC, 3, BOUND)


def test_a_vector_without_its_head_counts_the_specialist_alone() -> None:
    reference, update = _tensors(0), _tensors(1)
    whole = encode(update, reference, SPEC, WholeWeights(4, 2))
    assert np.array_equal(without_head(whole, SPEC), encode(update, reference, SPEC, WholeWeights(4, 0)))
    assert int(whole[1]) == 2
    assert whole[-4:].all()


def test_whole_tensors_stay_whole() -> None:
    spec = {"n": TensorSpec((2,), torch.int64)}
    reference = {"n": torch.tensor([5, -3])}
    vectors = [encode({"n": torch.tensor(v)}, reference, spec, WholeWeights(1, 0)) for v in ([6, -3], [7, -4], [8, -3])]
    mean = decode(sum(vectors, np.uint64(0)), reference, spec, 3, BOUND)
    assert torch.equal(mean.tensors["n"], torch.tensor([7, -3]))
