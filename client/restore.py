"""What a round starts from: the specialist as sent, and the tensors that earlier rounds left at this site."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from client.state import RunState
from semisam_core.codecs import decode_update, leaving_spec, nothing_owed
from semisam_core.contract import TensorSpec, disagreement, specialist_spec, tensor_specs, travelling, update_spec
from semisam_core.errors import SemiSAMError
from semisam_core.inference import new_specialist
from semisam_core.optimizers import build_optimizer, load_moments, moments
from semisam_core.packing import packed_spec, unpack
from semisam_core.plan import Plan
from semisam_core.regularizers import Regularizer
from semisam_core.sources.head_network import FeatureHead, feature_head_of
from semisam_core.training import new_regularizer, new_teacher

logger = logging.getLogger(__name__)


class WeightsNotAgreedError(SemiSAMError):
    """The weights that arrived are not the plan's specialist."""


class BaseNotHeldError(SemiSAMError):
    """The server sent a change of weights that this site does not hold."""


class RoundStart:
    """Builds the networks that one round starts from.

    What this site kept comes from the latest of its earlier rounds, which need not be the round just before. If nothing
    was kept, or it does not fit the plan, the networks start fresh and the site's log says so.

    Args:
        plan: the study plan.
        state: the site's state of this run.
        round_number: the round, from 1; 0 while joining.
        device: the device to compute on.
    """

    def __init__(self, plan: Plan, state: RunState, round_number: int, device: torch.device) -> None:
        self._plan, self._state, self._round, self._device = plan, state, round_number, device
        local = plan.training.local_round(round_number)
        self._since = max(1, round_number - local + 1)  # what a generation before left does not fit a new specialist

    def specialist(self, weights: Mapping[str, Tensor], before: int) -> nn.Module:
        """Return the specialist with the weights that the server sent and this site's local layers.

        Args:
            weights: the tensors that arrived.
            before: local layers come from the site's latest round before this one.

        Raises:
            WeightsNotAgreedError: the weights are not the plan's specialist.
        """
        if mistake := disagreement(weights, specialist_spec(self._plan)):
            raise WeightsNotAgreedError(mistake)
        specialist = new_specialist(self._plan)
        layers: Mapping[str, Tensor] = {}
        if self._plan.specialist.statistics == "local":
            kept, fresh = self._state.load_layers(before, self._since), local_layers(self._plan, specialist)
            layers = _fitting("batch-norm layers", kept, fresh, before, self._since) or {}
        specialist.load_state_dict({**specialist.state_dict(), **layers, **weights})
        return specialist.to(self._device)

    def head(self, weights: Mapping[str, Tensor]) -> FeatureHead | None:
        """Return the plan's feature head with the weights that the server sent; None if the plan has none.

        Raises:
            WeightsNotAgreedError: the weights are not the plan's feature head.
        """
        head = feature_head_of(self._plan)
        if mistake := disagreement(weights, {} if head is None else tensor_specs(head.state_dict())):
            raise WeightsNotAgreedError(mistake)
        if head is not None:
            head.load_state_dict(dict(weights))
        return head

    def teacher(self, specialist: nn.Module) -> nn.Module:
        """Return the round's teacher: a copy of the specialist, or the kept teacher under `teacher.start: site`."""
        teacher = new_teacher(specialist)
        if self._plan.teacher.start == "site":
            kept = self._state.load_teacher(self._round, self._since)
            if fitting := _fitting("teacher", kept, teacher.state_dict(), self._round, self._since):
                teacher.load_state_dict(fitting)
        return teacher

    def regularizer(self) -> Regularizer | None:
        """Return the plan's regularizer, its own networks as this site kept them; None if the plan has none."""
        regularizer = new_regularizer(self._plan, self._device)
        if regularizer is not None and regularizer.auxiliary is not None:
            kept, fresh = self._state.load_networks(self._round, self._since), regularizer.auxiliary.state()
            if fitting := _fitting("regularizer networks", kept, fresh, self._round, self._since):
                regularizer.auxiliary.load(fitting)
        return regularizer

    def optimizer(self, specialist: nn.Module) -> torch.optim.Optimizer:
        """Return the round's optimizer; under `training.optimizer.state: kept`, with this site's moments."""
        settings = self._plan.training.optimizer
        optimizer = build_optimizer(specialist, settings)
        if settings.state == "kept":
            kept, fresh = self._state.load_moments(self._round, self._since), moments(optimizer, specialist, settings)
            if fitting := _fitting("optimizer moments", kept, fresh, self._round, self._since):
                load_moments(optimizer, specialist, settings, fitting)
        return optimizer

    def owed(self) -> dict[str, Tensor]:
        """Return what the codec left out of this site's updates so far, in a study whose plan has one."""
        kept, fresh = self._state.load_owed(self._round, self._since), nothing_owed(self._plan)
        return _fitting("rest of earlier updates", kept, fresh, self._round, self._since) or fresh


def local_layers(plan: Plan, specialist: nn.Module) -> dict[str, Tensor]:
    """Return the specialist's tensors that stay at the site."""
    sent = travelling(plan, specialist)
    return {name: value for name, value in specialist.state_dict().items() if name not in sent}


def _fitting(
    what: str, kept: dict[str, Tensor] | None, fresh: Mapping[str, Tensor], before: int, since: int
) -> dict[str, Tensor] | None:
    """Return what was kept if it has the names, shapes and dtypes of `fresh`; otherwise None, with a log line."""
    if kept is None:
        if before > since:  # nothing precedes a generation's first round
            logger.warning("No %s kept from before round %d: starting fresh", what, before)
        return None
    if mistake := disagreement(kept, tensor_specs(fresh)):
        logger.warning("The kept %s cannot be used; starting fresh: %s", what, mistake)
        return None
    return kept


def arriving_weights(record: ArrayRecord, plan: Plan, base: object, state: RunState) -> dict[str, Tensor]:
    """Return the global weights that the server sent, or sent the change of.

    Args:
        record: the weights, or their change coded by the plan's codec.
        plan: the study plan.
        base: None if the record holds the weights; otherwise the hash of those that the change starts from.
        state: the site's state of this run.

    Raises:
        WeightsNotAgreedError: the record holds something else.
        BaseNotHeldError: this site does not hold the weights that the change starts from.
    """
    if base is None:
        return arriving_tensors(record, update_spec(plan))
    if plan.aggregation.codec is None:
        raise WeightsNotAgreedError("a change of weights was sent, and the plan has no codec")
    change = arriving_tensors(record, leaving_spec(plan))
    if (held := state.load_received(str(base))) is None:
        raise BaseNotHeldError("a change was sent of weights that are not kept here")
    try:
        return decode_update(change, held, plan)
    except ValueError as error:
        raise WeightsNotAgreedError(str(error)) from None


def arriving_tensors(record: ArrayRecord, spec: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    """Return tensors that the server sent.

    Args:
        record: their vectors, see `packing.pack`.
        spec: the agreed tensors.

    Raises:
        WeightsNotAgreedError: the record holds something else.
    """
    vectors = {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
    if mistake := disagreement(vectors, packed_spec(spec)):
        raise WeightsNotAgreedError(mistake)
    return unpack(vectors, spec)
