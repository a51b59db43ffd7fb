"""The plan's sections on local training: specialist, optimizer, augmentation, regularizer, teacher."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from semisam_core.configuration import Fraction, StrictModel


class Specialist(StrictModel):
    """The trainable network, by its name in the registry, with its own arguments.

    `statistics` is due where the network has batch norm, and only there. `shared`: running statistics, scales and
    shifts of batch-norm layers are averaged like all else. `local`: all of them stay at each site (FedBN, Li et al.,
    ICLR 2021), so that what the study publishes lacks them, and prediction elsewhere needs a site's own.
    """

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    statistics: Literal["shared", "local"] | None = None


class Optimizer(StrictModel):
    """The local optimizer. Its state starts afresh every round and never leaves the site."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=2e-3, gt=0, le=1)
    weight_decay: float = Field(default=1e-4, ge=0, le=1)
    final_share: Fraction = 0.1


class Augmentation(StrictModel):
    """Random changes to training patches; each number is a probability or a strength, 0 switches it off."""

    flip: Fraction = 0.5
    rotation_degrees: float = Field(default=15, ge=0, le=180)
    scale: float = Field(default=0.15, ge=0, lt=1)
    affine_probability: Fraction = 0.5
    intensity: float = Field(default=0.25, ge=0, lt=1)
    noise: float = Field(default=0.05, ge=0, le=1)


class Training(StrictModel):
    """The local training of one round at one site.

    `proximal` is FedProx's mu (Li et al., MLSys 2020): the loss grows by mu/2 times the squared distance to the
    global specialist that the round began with; 0 switches it off.
    """

    rounds: int = Field(ge=1, le=10_000)
    steps_per_round: int = Field(ge=1, le=100_000)
    labeled_batch: int = Field(default=1, ge=1, le=64)
    unlabeled_batch: int = Field(default=1, ge=1, le=64)
    optimizer: Optimizer = Optimizer()
    augmentation: Augmentation = Augmentation()
    proximal: float = Field(default=0.0, ge=0, le=100)

    @property
    def total_steps(self) -> int:
        """T of the schedules: optimizer steps of one site over the whole study."""
        return self.rounds * self.steps_per_round


class RegularizerSettings(StrictModel):
    """L_unsup, by its name in `regularizers`; lambda_c(t) = weight * exp(-5 (1 - min(t, t_ramp) / t_ramp)^2)."""

    name: str = "mean-teacher"
    weight: float = Field(default=0.1, ge=0, le=100)
    ramp_share: Fraction = 0.4


class Teacher(StrictModel):
    """The exponential moving average of the specialist; it never leaves the site.

    `start: global` begins each round from the specialist that the server sent; `start: site` goes on with the
    teacher that this site kept.
    """

    decay: float = Field(default=0.99, ge=0, lt=1)
    start: Literal["global", "site"] = "global"
