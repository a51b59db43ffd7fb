"""What sites are sent: the global weights or, if they hold those of the round before, how these changed, coded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from flwr.app import Array
from torch import Tensor

from semisam_core.codecs import decode_update, encode_update, leaving_spec, nothing_owed
from semisam_core.contract import TensorSpec, update_spec, weights_sha256
from semisam_core.packing import pack
from semisam_core.plan import Plan

OWED = "owed."  # of what was left out, among the tensors that are saved with a checkpoint


@dataclass(frozen=True)
class Download:
    """What one site is sent.

    Attributes:
        arrays: the weights, or their coded change, as they travel.
        base: hash of the weights that the change starts from; None if `arrays` are the weights.
    """

    arrays: Mapping[str, Array]
    base: str | None = None


@dataclass(frozen=True)
class _Change:
    arrays: Mapping[str, Array]
    base: str
    holders: frozenset[str]


class Downloads:
    """Keeps what the codec left out of the global weights, and which sites hold the weights before the last change.

    A change is coded against what sites were sent, never against what it should have been: all sites have the same
    weights, bit for bit, whether they were sent them or a change. Without a codec, or with `codec.downloads: false`,
    every site is sent the weights.

    Args:
        plan: the study plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._spec = plan, update_spec(plan)
        codec = plan.aggregation.codec
        self._owed = nothing_owed(plan) if codec is not None and codec.downloads else {}
        self._change: _Change | None = None

    def advance(
        self, weights: Mapping[str, Tensor], combined: dict[str, Tensor], holders: Collection[str]
    ) -> dict[str, Tensor]:
        """Return the new global weights: `combined`, as far as the codec holds its change.

        Args:
            weights: the global weights that the round began with.
            combined: what the round made of them.
            holders: the sites that were sent `weights`.

        Raises:
            FloatingPointError: the change is too large for the codec.
        """
        if not self._owed:
            return combined
        coded, self._owed = encode_update(combined, weights, self._owed, self._plan)
        arrays = _arrays(coded, leaving_spec(self._plan))
        self._change = _Change(arrays, weights_sha256(weights), frozenset(holders))
        return decode_update(coded, weights, self._plan)

    def restart(self) -> None:
        """Begin anew: sites are sent the weights, and nothing is owed."""
        self._owed = nothing_owed(self._plan) if self._owed else {}
        self._change = None

    def of(self, weights: Mapping[str, Tensor]) -> Callable[[str], Download]:
        """Return what makes the downloads of one phase, by site. A site that is asked again is sent the weights.

        Args:
            weights: the global weights, as `advance` returned them.
        """
        whole, change = Download(_arrays(weights, self._spec)), self._change
        asked: set[str] = set()

        def download(site: str) -> Download:
            first = site not in asked
            asked.add(site)
            if change is None or site not in change.holders or not first:
                return whole
            return Download(change.arrays, change.base)

        return download

    def state(self) -> dict[str, Tensor]:
        """Return what was left out so far, to save with the checkpoint."""
        return {OWED + name: value for name, value in self._owed.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what was left out, as `state` returned it. Which sites hold what is not known any more."""
        if self._owed:
            self._owed = {name: state[OWED + name] for name in self._owed}


def _arrays(tensors: Mapping[str, Tensor], spec: Mapping[str, TensorSpec]) -> dict[str, Array]:
    return {name: Array(vector.numpy()) for name, vector in pack(tensors, spec).items()}
