"""The plan's section on aggregation: admission of updates, their weights, the rule that combines them, deadlines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from semisam_core.aggregation import aggregation_rule
from semisam_core.configuration import Fraction, StrictModel


class Admission(StrictModel):
    """Which updates of a round are rejected for their size.

    `norm_factor`: an update is rejected if the norm of its change exceeds this multiple of the round's median, provided
    that at least three sites took steps. None turns the comparison off.
    """

    norm_factor: float | None = Field(default=10.0, gt=1)


class ServerOptimizerSettings(StrictModel):
    """What the server does with the combined specialist; its state is saved beside the checkpoints.

    `none`: uses it as it is. `momentum`: FedAvgM (Hsu et al., 2019). `adam`: FedAdam (Reddi et al., ICLR 2021).
    `momentum` is the decay of the first moment in both, `second_momentum` and `tau` are adam's beta_2 and tau.
    """

    name: Literal["none", "momentum", "adam"] = "none"
    learning_rate: float | None = Field(default=None, gt=0, le=10)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    second_momentum: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0)

    @model_validator(mode="after")
    def _has_rate(self) -> ServerOptimizerSettings:
        if self.name != "none" and self.learning_rate is None:
            raise ValueError(
                f"the server optimizer {self.name} needs a learning_rate; 1.0 is usual for momentum, 0.01 for adam"
            )
        return self


class Exclusion(StrictModel):
    """A site that fails `after_failures` rounds in a row sits out the next `rounds` rounds and is then asked again."""

    after_failures: int = Field(default=3, ge=1, le=1000)
    rounds: int = Field(default=2, ge=1, le=1000)


class Aggregation(StrictModel):
    """Which updates are admitted, how they are weighted and combined, and how long the server waits for sites.

    Rules: `weighted-mean` uses `weights`. `median` and `trimmed-mean` (without `trim_share` of the values at each end)
    work coordinate by coordinate and give all sites the same weight. `krum` takes the one update closest to the others,
    `multi-krum` the weighted mean of all but the `malicious_sites` farthest from the others.

    Weights: `samples`: scans used in training. `equal`: one site, one vote. `evidence`: labeled scans plus
    `unlabeled_share` of the accepted pseudo-labels, ramped up over the study. `confidence`: the same, but each accepted
    pseudo-label counts as its mean confidence exp(-U) within the target.

    A round counts if `minimum_sites` contribute. If fewer do, the server waits for others, `wait_for_quorum_s` at most;
    a site that returns within `rejoin_window_s` of a round's start still takes part in it.
    """

    rule: str = "weighted-mean"
    trim_share: float = Field(default=0.2, ge=0.001, lt=0.5)
    malicious_sites: int = Field(default=1, ge=1)
    weights: Literal["samples", "equal", "evidence", "confidence"] = "samples"
    unlabeled_share: Fraction = 0.2
    admission: Admission = Admission()
    server_optimizer: ServerOptimizerSettings = ServerOptimizerSettings()
    minimum_sites: int = Field(default=1, ge=1)
    join_deadline_s: float = Field(default=600, gt=0)
    round_deadline_s: float = Field(default=7200, gt=0)
    wait_for_quorum_s: float = Field(default=600, ge=0)
    rejoin_window_s: float = Field(default=120, ge=0)
    exclusion: Exclusion = Exclusion()

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, value: str) -> str:
        return aggregation_rule(value).name

    @model_validator(mode="after")
    def _enough_sites(self) -> Aggregation:
        if self.minimum_sites < self.least_updates:
            raise ValueError(
                f"the rule {self.rule} needs the updates of {self.least_updates} sites "
                f"(trim_share {self.trim_share:g}, malicious_sites {self.malicious_sites}), "
                f"and minimum_sites is {self.minimum_sites}"
            )
        return self

    @property
    def least_updates(self) -> int:
        """How many updates the rule needs to keep its promise."""
        return aggregation_rule(self.rule).least_updates(self)

    @property
    def tolerated_sites(self) -> int:
        """How many hostile sites the rule tolerates among `minimum_sites`."""
        return aggregation_rule(self.rule).tolerates(self, self.minimum_sites)
