"""The plan's section on aggregation: admission of updates, their weights, the rule that combines them, deadlines."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from semisam_core.aggregation import aggregation_rule
from semisam_core.configuration import Fraction, StrictModel

SUMMABLE = "weighted-mean"  # the one rule that needs nothing but a sum
LEAST_SUMMED, MOST_SUMMED = 3, 64  # sites in a secure sum


class Admission(StrictModel):
    """Which updates of a round are rejected for their size.

    Attributes:
        norm_factor: an update is rejected if the norm of its change exceeds this multiple of the round's median,
            provided that at least three sites took steps; null turns the comparison off.
    """

    norm_factor: float | None = Field(default=10.0, gt=1)


class ServerOptimizerSettings(StrictModel):
    """What the server does with the combined specialist; its state is saved beside the checkpoints.

    Attributes:
        name: `none`: uses it as it is. `momentum`: FedAvgM (Hsu et al., 2019). `adam`: FedAdam (Reddi et al., ICLR
            2021).
        learning_rate: step towards the combined specialist; required unless the name is `none`. Usual are 1.0 for
            momentum and 0.01 for adam.
        momentum: decay of the first moment, in both.
        second_momentum: adam's beta_2.
        tau: adam's tau.
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
    """A site that fails `after_failures` rounds in a row sits out the next `rounds` rounds and is then asked again.

    Attributes:
        after_failures: failed rounds in a row after which a site sits out.
        rounds: rounds that it sits out.
    """

    after_failures: int = Field(default=3, ge=1, le=1000)
    rounds: int = Field(default=2, ge=1, le=1000)


class SecureAggregation(StrictModel):
    """The server learns the sum of the sites' updates, and no update (SecAgg; Bonawitz et al., CCS 2017).

    Attributes:
        threshold: share of a sum's sites that can complete it, more than half.
        maximum_norm: a site whose specialist or feature head changed by a larger norm refuses to add it.
        maximum_weight: a site's largest weight, in quarters of a scan.
        stage_deadline_s: how long a site may take for one of the four stages.
    """

    threshold: float = Field(default=0.66, gt=0.5, le=1)
    maximum_norm: float = Field(default=1000.0, gt=0, le=10_000)
    maximum_weight: int = Field(default=1024, ge=1, le=1024)
    stage_deadline_s: float = Field(default=600, gt=0)

    def shares_needed(self, sites: int) -> int:
        """Return how many of so many sites can complete a sum: always more than half."""
        return math.ceil(self.threshold * sites)


class CodecSettings(StrictModel):
    """How less is sent: not weights but their change since what the receiver holds, coded.

    What the code leaves out is added to the sender's next change.

    Attributes:
        name: `float16`: half precision, 2 times smaller. `int8`: 8 bits, a scale for each tensor, 4 times smaller.
            `top-k`: the largest changes only, 1 / (2 * kept_share) times smaller.
        kept_share: share of the changes that `top-k` sends.
        downloads: whether the server codes what it sends too. A site that does not hold the weights of the round before
            is sent them as they are.
    """

    name: Literal["float16", "int8", "top-k"]
    kept_share: float = Field(default=0.05, gt=0, le=0.5)
    downloads: bool = True


class Aggregation(StrictModel):
    """Which updates are admitted, how they are weighted and combined, and how long the server waits for sites.

    With `secure` the server sees no single update, so it can neither compare updates nor reject one.

    Attributes:
        rule: `weighted-mean` uses `weights`. `median` and `trimmed-mean` work coordinate by coordinate and give all
            sites the same weight. `krum` takes the one update closest to the others, `multi-krum` the weighted mean of
            all but the `malicious_sites` farthest from the others.
        trim_share: share of the values that `trimmed-mean` drops at each end.
        malicious_sites: hostile sites that `krum` and `multi-krum` assume.
        weights: `samples`: scans used in training. `equal`: one site, one vote. `evidence`: labeled scans plus
            `unlabeled_share` of the accepted pseudo-labels, ramped up over the study. `confidence`: the same, but each
            accepted pseudo-label counts as its mean confidence exp(-U) within the target.
        unlabeled_share: what an accepted pseudo-label counts against a labeled scan.
        minimum_sites: sites that must contribute for a round to count.
        join_deadline_s: how long the server waits for sites at the start.
        round_deadline_s: how long a site may take for a round.
        wait_for_quorum_s: if fewer than `minimum_sites` contribute, how long a round waits for others before the run
            ends.
        rejoin_window_s: a site that returns within this time of a round's start still takes part in it.
        codec: how less is sent; null: weights are sent as they are.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ("secure", "codec")

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
    secure: SecureAggregation | None = None
    codec: CodecSettings | None = None

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

    @model_validator(mode="after")
    def _fits_a_secure_sum(self) -> Aggregation:
        if self.secure is None:
            return self
        if self.codec is not None:
            raise ValueError(
                f"secure sums whole numbers of one size that hide behind masks, and the codec {self.codec.name} sends "
                "others; set codec to null, or secure to null"
            )
        if self.rule != SUMMABLE:
            raise ValueError(
                f"the rule {self.rule} compares single updates, and with secure the server sees only their sum; "
                f"use the rule {SUMMABLE}, or secure: null"
            )
        if self.admission.norm_factor is not None:
            raise ValueError(
                "admission.norm_factor compares the norms of single updates, and with secure the server sees only "
                "their sum; set it to null (each site then checks its own norm against secure.maximum_norm), or secure "
                "to null"
            )
        if not LEAST_SUMMED <= self.minimum_sites <= MOST_SUMMED:
            raise ValueError(
                f"secure needs a minimum_sites from {LEAST_SUMMED} to {MOST_SUMMED}, and it is {self.minimum_sites}: "
                "from a sum of two updates each of the two sites can tell the other's"
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
