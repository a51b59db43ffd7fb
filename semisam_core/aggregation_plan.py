"""The parts of a plan's `aggregation` section: which updates are admitted, and what moves the global specialist."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from semisam_core.configuration import StrictModel

Rule = Literal["weighted-mean", "median", "trimmed-mean", "krum", "multi-krum"]


class Admission(StrictModel):
    """Which updates of a round are left out for their size.

    `norm_factor`: an update whose change has more than this many times the median norm of the round's changes is left
    out, where at least three sites took steps. None compares nothing.
    """

    norm_factor: float | None = Field(default=10.0, gt=1)


class ServerOptimizer(StrictModel):
    """What the server does with the combined specialist; its state is kept beside the checkpoints.

    `none`: takes it as it is. `momentum`: FedAvgM (Hsu et al., 2019). `adam`: FedAdam (Reddi et al., ICLR 2021).
    `momentum` is the decay of the first moment in both, `second_momentum` and `tau` are adam's beta_2 and tau.
    """

    name: Literal["none", "momentum", "adam"] = "none"
    learning_rate: float | None = Field(default=None, gt=0, le=10)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    second_momentum: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0)

    @model_validator(mode="after")
    def _has_rate(self) -> ServerOptimizer:
        if self.name != "none" and self.learning_rate is None:
            raise ValueError(
                f"the server optimizer {self.name} needs a learning_rate; 1.0 is usual for momentum, 0.01 for adam"
            )
        return self


def least_updates(rule: Rule, trim_share: float, malicious_sites: int) -> int:
    """Return how many updates a rule needs for what it promises.

    A median is none of fewer than 3; a trimmed mean cuts nothing off before trim_share * n reaches 1; Krum's proof
    asks for n >= 2 f + 3 (Blanchard et al., NeurIPS 2017).
    """
    if rule == "median":
        return 3
    if rule == "trimmed-mean":
        return next(n for n in range(3, 100_000) if int(trim_share * n) > 0)
    if rule in ("krum", "multi-krum"):
        return 2 * malicious_sites + 3
    return 1
