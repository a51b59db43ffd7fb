"""Codecs: weights travel as their change since what the receiver holds, made smaller as the plan chooses.

Whatever a codec leaves out is added to the sender's next change (error feedback: Karimireddy et al., ICML 2019), so
that it is late, not lost. Sites code their updates; the server codes the global weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from semisam_core.contract import HEAD_PREFIX, MASKED_VECTOR, TensorSpec, update_spec
from semisam_core.plan import Plan
from semisam_core.plan_sections.aggregation import CodecSettings
from semisam_core.secure_aggregation.fixed_point import vector_spec

# Names of coded tensors; no specialist has such names. Tensors of whole numbers keep their own.
CHANGE, SCALES, VALUES, POSITIONS = "codec.change", "codec.scales", "codec.values", "codec.positions"
INT8_STEPS = 127


class Codec(ABC):
    """Codes changes of an update's floating-point tensors.

    Args:
        settings: the plan's.
        spec: the agreed tensors of an update; those of whole numbers are none of a codec's business.
    """

    name: ClassVar[str]

    def __init__(self, settings: CodecSettings, spec: Mapping[str, TensorSpec]) -> None:
        self._settings = settings
        self._sizes = {name: math.prod(each.shape) for name, each in spec.items() if each.dtype.is_floating_point}

    @property
    @abstractmethod
    def spec(self) -> dict[str, TensorSpec]:
        """Name -> shape and dtype of the coded tensors, the same for every update."""

    @abstractmethod
    def encode(self, changes: Tensor) -> dict[str, Tensor]:
        """Return changes coded.

        Args:
            changes: the values of all floating-point tensors in the order of the spec, one float32 vector.
        """

    @abstractmethod
    def decode(self, coded: Mapping[str, Tensor]) -> Tensor:
        """Return changes as `encode` took them, as far as the code holds them.

        Args:
            coded: tensors as `spec` says, of any values: they may come from a hostile site.

        Raises:
            ValueError: no encoder writes such values.
        """

    @property
    def _total(self) -> int:
        return sum(self._sizes.values())


class Float16(Codec):
    """Every change in half precision: 2 times smaller."""

    name = "float16"

    @property
    def spec(self) -> dict[str, TensorSpec]:
        """One vector of all changes."""
        return {CHANGE: TensorSpec((self._total,), torch.float16)}

    def encode(self, changes: Tensor) -> dict[str, Tensor]:
        """Round to the nearest; a change beyond 65,504 becomes infinite."""
        return {CHANGE: changes.half()}

    def decode(self, coded: Mapping[str, Tensor]) -> Tensor:
        """Return the changes in single precision."""
        return coded[CHANGE].float()


class Int8(Codec):
    """Every change as a whole number of steps, of which 127 are the tensor's largest change: 4 times smaller."""

    name = "int8"

    @property
    def spec(self) -> dict[str, TensorSpec]:
        """One vector of all changes in steps, one of each tensor's step."""
        return {
            CHANGE: TensorSpec((self._total,), torch.int8),
            SCALES: TensorSpec((len(self._sizes),), torch.float32),
        }

    def encode(self, changes: Tensor) -> dict[str, Tensor]:
        """Round to the nearest step."""
        parts = torch.split(changes, list(self._sizes.values()))
        scales = torch.stack([part.abs().max() / INT8_STEPS if part.numel() else part.new_zeros(()) for part in parts])
        # A step of zero, of a tensor without any change, would divide by zero.
        steps = changes / self._spread(torch.where(scales > 0, scales, torch.ones_like(scales)))
        return {CHANGE: steps.round().clamp(-INT8_STEPS, INT8_STEPS).to(torch.int8), SCALES: scales}

    def decode(self, coded: Mapping[str, Tensor]) -> Tensor:
        """Return steps times their size."""
        return coded[CHANGE].float() * self._spread(coded[SCALES])

    def _spread(self, scales: Tensor) -> Tensor:
        return scales.repeat_interleave(torch.tensor(list(self._sizes.values())))


class TopK(Codec):
    """The largest changes only, `kept_share` of the specialist's and of the feature head's, with their positions."""

    name = "top-k"

    @property
    def spec(self) -> dict[str, TensorSpec]:
        """One vector of the changes that are kept, one of their positions."""
        kept = sum(self._kept(size) for size in self._networks)
        return {VALUES: TensorSpec((kept,), torch.float32), POSITIONS: TensorSpec((kept,), torch.int32)}

    def encode(self, changes: Tensor) -> dict[str, Tensor]:
        """Keep the largest changes; of equal ones the first."""
        found, start = [], 0
        for size in self._networks:
            order = changes[start : start + size].abs().sort(descending=True, stable=True).indices
            found.append(start + order[: self._kept(size)].sort().values)
            start += size
        positions = torch.cat(found)
        return {VALUES: changes[positions], POSITIONS: positions.int()}

    def decode(self, coded: Mapping[str, Tensor]) -> Tensor:
        """Return the changes at their positions, zero elsewhere."""
        positions = coded[POSITIONS].long()
        within = positions.numel() == 0 or (positions[0] >= 0 and positions[-1] < self._total)
        if not within or not bool((positions.diff() > 0).all()):
            raise ValueError("the positions of the changes are not in order, or beyond the update")
        changes = torch.zeros(self._total)
        changes[positions] = coded[VALUES]
        return changes

    @property
    def _networks(self) -> list[int]:
        """How many values the specialist has, and the feature head, which follows it."""
        head = sum(size for name, size in self._sizes.items() if name.startswith(HEAD_PREFIX))
        return [self._total - head, head]

    def _kept(self, size: int) -> int:
        return math.ceil(self._settings.kept_share * size)


CODECS: Mapping[str, type[Codec]] = {codec.name: codec for codec in (Float16, Int8, TopK)}


def leaving_spec(plan: Plan) -> dict[str, TensorSpec]:
    """Return the tensors of a site's largest reply: its update, its coded update, or a secure sum's masked vector."""
    spec = update_spec(plan)
    if plan.aggregation.secure is not None:
        return {MASKED_VECTOR: vector_spec(spec)}
    if plan.aggregation.codec is None:
        return spec
    return _codec(plan.aggregation.codec, spec).spec | _whole_numbers(spec)


def leaving_bytes(plan: Plan) -> int:
    """Return the size of `leaving_spec` in bytes."""
    return sum(math.prod(each.shape) * each.dtype.itemsize for each in leaving_spec(plan).values())


def encode_update(
    update: Mapping[str, Tensor], reference: Mapping[str, Tensor], owed: Mapping[str, Tensor], plan: Plan
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return an update coded, as `leaving_spec` says, and what the code leaves out and the sender owes from now on.

    A tensor that did not change is sent as unchanged, whatever is owed of it: the server takes an update that changed
    without a step for a forgery.

    Args:
        update: the new tensors, on the CPU.
        reference: the tensors that the receiver holds.
        owed: what earlier updates left out, by the names of the floating-point tensors.
        plan: a study plan with a codec.

    Raises:
        FloatingPointError: the change is not finite, or too large for the codec.
    """
    spec, settings = update_spec(plan), _settings(plan)
    codec, names = _codec(settings, spec), _coded_names(spec)
    wanted, waiting = [], {}
    for name in names:
        change = update[name].float() - reference[name].float()
        moved = bool((change != 0).any())
        wanted.append((change + owed[name] if moved else torch.zeros_like(change)).flatten())
        if not moved:
            waiting[name] = owed[name]
    changes = torch.cat(wanted)
    coded = codec.encode(changes)
    left_out = changes - codec.decode(coded)
    if not bool(left_out.isfinite().all()):
        raise FloatingPointError(f"the change of the weights is not finite, or too large for the codec {codec.name}")
    rest = _split(left_out, names, spec)
    return coded | {name: update[name] for name in _whole_numbers(spec)}, rest | waiting


def decode_update(coded: Mapping[str, Tensor], reference: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Return the update that coded tensors stand for.

    Args:
        coded: tensors as `leaving_spec` says.
        reference: the tensors that its change starts from.
        plan: a study plan with a codec.

    Raises:
        ValueError: no sender encodes such values.
    """
    spec = update_spec(plan)
    names = _coded_names(spec)
    changes = _split(_codec(_settings(plan), spec).decode(coded), names, spec)
    return {
        name: (reference[name].float() + changes[name]).to(each.dtype) if name in changes else coded[name].clone()
        for name, each in spec.items()
    }


def nothing_owed(plan: Plan) -> dict[str, Tensor]:
    """Return zeros in the place of what earlier rounds left out."""
    spec = update_spec(plan)
    return {name: torch.zeros(spec[name].shape) for name in _coded_names(spec)}


def _codec(settings: CodecSettings, spec: Mapping[str, TensorSpec]) -> Codec:
    return CODECS[settings.name](settings, spec)


def _settings(plan: Plan) -> CodecSettings:
    if plan.aggregation.codec is None:
        raise ValueError("the plan has no codec")
    return plan.aggregation.codec


def _coded_names(spec: Mapping[str, TensorSpec]) -> list[str]:
    return [name for name, each in spec.items() if each.dtype.is_floating_point]


def _whole_numbers(spec: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {name: each for name, each in spec.items() if not each.dtype.is_floating_point}


def _split(values: Tensor, names: list[str], spec: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    parts = torch.split(values, [math.prod(spec[name].shape) for name in names])
    return {name: part.reshape(spec[name].shape).clone() for name, part in zip(names, parts, strict=True)}
