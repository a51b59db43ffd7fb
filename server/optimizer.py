"""How the combined specialist becomes the global one: as it is, with momentum or with Adam."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from semisam_core.plan import Plan
from semisam_core.plan_sections.aggregation import ServerOptimizerSettings
from semisam_core.specialists import outline_specialist

FIRST, SECOND = "first.", "second."


class ServerOptimizer:
    """Moves the global specialist along Delta = combined - current, with moments over rounds.

    momentum: m <- beta_1 m + Delta; theta <- theta + eta m (FedAvgM, Hsu et al., 2019).
    adam: m <- beta_1 m + (1 - beta_1) Delta; v <- beta_2 v + (1 - beta_2) Delta^2; theta <- theta + eta m / (sqrt(v) +
    tau), with v = tau^2 at the start (FedAdam, algorithm 2 of Reddi et al., ICLR 2021).

    Only parameters move this way; running statistics are not descent directions and take the combined value. Flower's
    FedAvgM and FedAdam are not used: their moments cannot be saved, and they apply a bias correction to Adam's rate
    that the paper does not have. Tests compare these formulas with theirs.

    Args:
        plan: the study plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._settings: ServerOptimizerSettings = plan.aggregation.server_optimizer
        chosen, task = plan.specialist, plan.task
        outline = outline_specialist(chosen.name, chosen.arguments, len(task.channels), len(task.classes))
        self._parameters = {name for name, _ in outline.named_parameters()}
        self._moments: dict[str, Tensor] = {}

    def step(self, current: Mapping[str, Tensor], combined: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the new global specialist, and update the moments.

        Args:
            current: the global specialist at the start of the round.
            combined: the updates combined by the plan's rule.
        """
        if self._settings.name == "none":
            return dict(combined)
        return {
            name: self._moved(name, current[name], value) if name in self._parameters else value
            for name, value in combined.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return copies of the moments, float64, to save beside the round's checkpoint; empty for `none`."""
        return {name: value.clone() for name, value in self._moments.items()}

    def load(self, state: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
        """Restore saved moments.

        Args:
            state: what `state` returned.
            current: the weights of the checkpoint that they belong to.

        Raises:
            ValueError: they are not the moments of this plan's optimizer and specialist.
        """
        kinds = {"none": [], "momentum": [FIRST], "adam": [FIRST, SECOND]}[self._settings.name]
        shapes = {kind + name: current[name].shape for kind in kinds for name in current if name in self._parameters}
        if {name: value.shape for name, value in state.items()} != shapes:
            raise ValueError(f"the saved state is not that of the server optimizer {self._settings.name}")
        if not all(value.dtype == torch.float64 and bool(value.isfinite().all()) for value in state.values()):
            raise ValueError("the saved state of the server optimizer has values that are not finite float64 numbers")
        self._moments = {name: value.clone() for name, value in state.items()}

    def _moved(self, name: str, current: Tensor, combined: Tensor) -> Tensor:
        start, change = current.double(), combined.double() - current.double()
        settings, first = self._settings, self._moments.get(FIRST + name, torch.zeros_like(change))
        rate = settings.learning_rate
        if rate is None:
            raise ValueError(f"the server optimizer {settings.name} has no learning rate")
        if settings.name == "momentum":
            self._moments[FIRST + name] = first = settings.momentum * first + change
            return (start + rate * first).to(current.dtype)
        second = self._moments.get(SECOND + name, torch.full_like(change, settings.tau**2))
        self._moments[FIRST + name] = first = settings.momentum * first + (1 - settings.momentum) * change
        self._moments[SECOND + name] = second = (
            settings.second_momentum * second + (1 - settings.second_momentum) * change.square()
        )
        return (start + rate * first / (second.sqrt() + settings.tau)).to(current.dtype)
