"""What a round starts from: the specialist as sent, and what earlier rounds left at this site."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from client.state import RunState
from semisam_core.contract import disagreement, specialist_spec, tensor_specs, travelling
from semisam_core.errors import SemiSAMError
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.regularizers import Regularizer
from semisam_core.training import new_regularizer, new_teacher

logger = logging.getLogger(__name__)


class WeightsNotAgreedError(SemiSAMError):
    """The weights that arrived are not the plan's specialist."""


class RoundStart:
    """Builds what one round starts from.

    Whatever was kept but no longer fits the plan is replaced by a fresh start, and the site's log says so.

    Args:
        plan: the study plan.
        state: the site's state of this run.
        round_number: the round, from 1; 0 while joining.
        device: where to compute.
    """

    def __init__(self, plan: Plan, state: RunState, round_number: int, device: torch.device) -> None:
        self._plan, self._state, self._round, self._device = plan, state, round_number, device

    def specialist(self, weights: Mapping[str, Tensor], before: int) -> nn.Module:
        """Return the specialist that the server sent, with this site's own layers.

        Args:
            weights: as they arrived.
            before: own layers come from the site's last round before this one.

        Raises:
            WeightsNotAgreedError: the weights are not the plan's specialist.
        """
        if mistake := disagreement(weights, specialist_spec(self._plan)):
            raise WeightsNotAgreedError(mistake)
        specialist = new_specialist(self._plan)
        own = self._layers(specialist, before) if self._plan.specialist.statistics == "local" else {}
        specialist.load_state_dict({**specialist.state_dict(), **own, **weights})
        return specialist.to(self._device)

    def teacher(self, specialist: nn.Module) -> nn.Module:
        """Return the teacher: a copy of the specialist, or the one this site kept if the plan says so."""
        teacher = new_teacher(specialist)
        if self._plan.teacher.start == "site" and self._round > 1:
            kept = self._state.load_teacher(self._round)
            if kept is None:
                logger.warning("No teacher of an earlier round is kept here; it starts from the global specialist.")
            elif mistake := disagreement(kept, tensor_specs(teacher.state_dict())):
                logger.warning("The kept teacher does not fit and starts from the global specialist: %s", mistake)
            else:
                teacher.load_state_dict(kept)
        return teacher

    def regularizer(self) -> Regularizer | None:
        """Return the plan's regularizer with its own networks as this site kept them."""
        regularizer = new_regularizer(self._plan, self._device)
        if regularizer is not None and regularizer.auxiliary is not None:
            kept, fresh = self._state.load_networks(self._round), regularizer.auxiliary.state()
            if kept is not None and (mistake := disagreement(kept, tensor_specs(fresh))):
                logger.warning("The regularizer's kept networks do not fit and start afresh: %s", mistake)
            elif kept is not None:
                regularizer.auxiliary.load(kept)
        return regularizer

    def _layers(self, specialist: nn.Module, before: int) -> dict[str, Tensor]:
        kept = self._state.load_layers(before)
        if kept is None:
            return {}
        if mistake := disagreement(kept, tensor_specs(local_layers(self._plan, specialist))):
            logger.warning("The kept batch-norm layers do not fit and start afresh: %s", mistake)
            return {}
        return kept


def local_layers(plan: Plan, specialist: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a specialist that stay at the site."""
    sent = travelling(plan, specialist)
    return {name: value for name, value in specialist.state_dict().items() if name not in sent}
