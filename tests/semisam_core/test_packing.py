"""Tensors as they travel: one vector for all of one dtype."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.contract import TensorSpec, tensor_specs, update_spec
from semisam_core.packing import pack, packed_spec, unpack
from tests.conftest import tiny_plan

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.int64])


def _tensors(specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
    return {name: (100 * torch.randn(each.shape)).to(each.dtype) for name, each in specs.items()}


@given(shapes=SHAPES, data=st.data())
def test_what_is_packed_is_unpacked_bit_for_bit(shapes: list[tuple[int, ...]], data: st.DataObject) -> None:
    spec = {f"layer.{k}": TensorSpec(shape, data.draw(DTYPES)) for k, shape in enumerate(shapes)}
    tensors = _tensors(spec)
    vectors = pack(tensors, spec)
    assert tensor_specs(vectors) == packed_spec(spec)
    back = unpack(vectors, spec)
    assert list(back) == list(spec)
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in spec)


@given(shapes=SHAPES)
def test_values_follow_the_agreed_order_whatever_the_order_and_layout_of_the_tensors(
    shapes: list[tuple[int, ...]],
) -> None:
    spec = {f"layer.{k}": TensorSpec(shape, torch.float32) for k, shape in enumerate(shapes)}
    tensors = _tensors(spec)
    reversed_layout = {name: value.T.contiguous().T if value.ndim == 2 else value for name, value in tensors.items()}
    shuffled = dict(reversed(reversed_layout.items()))
    one, other = pack(tensors, spec), pack(shuffled, spec)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_update_is_one_vector() -> None:
    spec = update_spec(tiny_plan())
    count = sum(each.numel() for each in _tensors(spec).values())
    assert packed_spec(spec) == {"float32": TensorSpec((count,), torch.float32)}


def test_unpacked_tensors_share_no_memory() -> None:
    spec = {name: TensorSpec((3,), torch.float32) for name in "ab"}
    back = unpack(pack(_tensors(spec), spec), spec)
    before = back["b"].clone()
    back["a"].fill_(7.0)
    assert torch.equal(back["b"], before)
    assert len({each.untyped_storage().data_ptr() for each in back.values()}) == 2


def test_a_single_tensor_travels_as_it_is() -> None:
    spec = {"masked-vector": TensorSpec((5,), torch.int64)}
    tensors = _tensors(spec)
    assert packed_spec(spec) == spec
    assert torch.equal(pack(tensors, spec)["masked-vector"], tensors["masked-vector"])
    assert torch.equal(unpack(tensors, spec)["masked-vector"], tensors["masked-vector"])
