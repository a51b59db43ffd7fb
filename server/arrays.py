"""Reads a reply's tensors. What they claim to be is checked before any of their bytes is read or copied."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from semisam_core.codecs import decode_update, leaving_spec
from semisam_core.contract import RejectionRule, TensorSpec
from semisam_core.errors import SemiSAMError
from semisam_core.packing import packed_spec, unpack
from semisam_core.plan import Plan

# Returns the agreed tensors of a reply's record, or raises NotAdmittedError.
Reader = Callable[[ArrayRecord], dict[str, Tensor]]
HEADER_BYTES = 1024
SERIALIZED_AS = "numpy.ndarray"


class NotAdmittedError(SemiSAMError):
    """A reply breaks the contract; the rule says which part of it."""

    def __init__(self, rule: RejectionRule, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule


def vector_reader(spec: Mapping[str, TensorSpec]) -> Reader:
    """Return what reads tensors that travel as the vectors of `packing.packed_spec`."""
    return lambda record: unpack(read_tensors(record, packed_spec(spec)), spec)


def update_reader(plan: Plan, reference: Mapping[str, Tensor]) -> Reader:
    """Return what reads a site's update, coded or not.

    Args:
        plan: the study plan.
        reference: the tensors that the round began with, as they were sent.
    """
    arriving = vector_reader(leaving_spec(plan))
    if plan.aggregation.codec is None:
        return arriving

    def read(record: ArrayRecord) -> dict[str, Tensor]:
        try:
            tensors = decode_update(arriving(record), reference, plan)
        except ValueError as error:
            raise NotAdmittedError(RejectionRule.TENSORS, str(error)) from None
        _check_finite(tensors)
        return tensors

    return read


def read_tensors(record: ArrayRecord, spec: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    """Return the tensors of an array record in the agreed order.

    Names, shapes, dtypes and sizes are checked first. `Array.numpy` is not used: it allocates whatever the header
    asks for before it looks how many bytes there are.

    Raises:
        NotAdmittedError: a tensor is not as agreed, cannot be read or is not finite.
    """
    _check_names(record, spec)
    for name, agreed in spec.items():
        _check_claims(name, record[name], agreed)
    tensors = {}
    for name, agreed in spec.items():
        tensors[name] = _read(name, record[name], agreed)
        _check_finite({name: tensors[name]})
    return tensors


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NotAdmittedError(RejectionRule.NOT_FINITE, f"tensor {name} has values that are not finite")


def _check_names(record: ArrayRecord, spec: Mapping[str, TensorSpec]) -> None:
    missing, foreign = sorted(set(spec) - set(record)), sorted(set(record) - set(spec))
    if missing or foreign:
        shown = [name[:60] for name in foreign[:3]]
        raise NotAdmittedError(
            RejectionRule.TENSORS,
            f"{len(missing)} agreed tensors are missing ({missing[:3]}), {len(foreign)} are not agreed ({shown})",
        )


def _check_claims(name: str, array: Array, agreed: TensorSpec) -> None:
    dtype = _numpy_dtype(agreed)
    if array.stype != SERIALIZED_AS:
        raise NotAdmittedError(RejectionRule.UNREADABLE, f"tensor {name} is not serialized as {SERIALIZED_AS}")
    if tuple(array.shape) != agreed.shape or array.dtype != str(dtype):
        found = f"{tuple(array.shape)} {array.dtype}"[:100]
        raise NotAdmittedError(
            RejectionRule.TENSORS, f"tensor {name} is {found}, expected {agreed.shape} {agreed.dtype}"
        )
    most = int(np.prod(agreed.shape, dtype=np.int64)) * dtype.itemsize + HEADER_BYTES
    if len(array.data) > most:
        raise NotAdmittedError(
            RejectionRule.TOO_LARGE, f"tensor {name} has {len(array.data)} bytes, at most {most} are expected"
        )


def _read(name: str, array: Array, agreed: TensorSpec) -> Tensor:
    dtype = _numpy_dtype(agreed)
    file = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError("another version of the NPY format")
        header = np.lib.format.read_array_header_1_0(file, max_header_size=HEADER_BYTES)
        if header != (agreed.shape, False, dtype):
            raise ValueError("the header describes another tensor")
        values = np.frombuffer(array.data, dtype, offset=file.tell()).reshape(agreed.shape)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise NotAdmittedError(
            RejectionRule.UNREADABLE, f"tensor {name} cannot be read from its bytes ({type(error).__name__})"
        ) from None
    return torch.from_numpy(values.copy())


def _numpy_dtype(agreed: TensorSpec) -> np.dtype[np.generic]:
    dtype: np.dtype[np.generic] = torch.empty(0, dtype=agreed.dtype).numpy().dtype
    return dtype
