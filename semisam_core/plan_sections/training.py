"""The plan's settings for local training: specialist, optimizer, augmentation, regularizer, teacher."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from semisam_core.configuration import Fraction, StrictModel


class SpecialistSettings(StrictModel):
    """The trainable network: its name in the registry and its arguments.

    Attributes:
        name: the network.
        arguments: the network's own arguments; omitted ones have their defaults.
        statistics: required for a network with batch norm and not accepted otherwise. `shared`: running statistics,
            scales and shifts of batch-norm layers are averaged like all other tensors. `local`: they stay at each site
            (FedBN, Li et al., ICLR 2021); the published specialist then lacks them, and prediction needs those of a
            site.
    """

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    statistics: Literal["shared", "local"] | None = None


class OptimizerSettings(StrictModel):
    """The local optimizer.

    Attributes:
        name: AdamW, or SGD with momentum.
        learning_rate: learning rate of the first step.
        weight_decay: strength of weight decay.
        final_share: share of the learning rate that is left at the last step; it falls all the way.
        state: its moments at the start of a round. `reset`: none. `kept`: as the site's latest round left them, for
            studies of many short rounds, where moments that start over stay noisy. They never leave the site.
    """

    omitted_defaults = ("state",)

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=2e-3, gt=0, le=1)
    weight_decay: float = Field(default=1e-4, ge=0, le=1)
    final_share: Fraction = 0.1
    state: Literal["reset", "kept"] = "reset"


Axis = Literal["right-left", "anterior-posterior", "superior-inferior"]
AXES: tuple[Axis, ...] = ("right-left", "anterior-posterior", "superior-inferior")


class Augmentation(StrictModel):
    """Random changes to training patches: probabilities and strengths, each switched off by 0.

    Attributes:
        flip: the probability of a flip along each of `flip_axes`.
        flip_axes: axes that may be flipped. A flip must not turn one structure into another, as one from front to back
            does with structures that differ in little but where they are.
        rotation_degrees: largest rotation around each axis.
        scale: largest change of size, as a share.
        affine_probability: the probability that a patch is rotated and scaled.
        intensity: largest change of gain, offset and gamma.
        noise: largest standard deviation of added noise.
    """

    omitted_defaults = ("flip_axes",)

    flip: Fraction = 0.5
    flip_axes: tuple[Axis, ...] = AXES
    rotation_degrees: float = Field(default=15, ge=0, le=180)
    scale: float = Field(default=0.15, ge=0, lt=1)
    affine_probability: Fraction = 0.5
    intensity: float = Field(default=0.25, ge=0, lt=1)
    noise: float = Field(default=0.05, ge=0, le=1)

    @model_validator(mode="after")
    def _each_axis_once(self) -> Augmentation:
        if len(set(self.flip_axes)) < len(self.flip_axes):
            raise ValueError("flip_axes names an axis twice")
        return self


class TrainingSettings(StrictModel):
    """Local training at one site.

    Attributes:
        rounds: rounds of the study; each combines all sites' updates into a new global specialist.
        steps_per_round: optimizer steps per site and round.
        generations: the study's rounds are divided into so many equal parts. Each begins with a new specialist, which
            learns from the pseudo-labels that the one before left, and all schedules start over.
        labeled_batch: patches of labeled scans per step.
        unlabeled_batch: patches of unlabeled scans per step.
        proximal: FedProx's mu (Li et al., MLSys 2020): mu/2 times the squared distance to the global specialist at the
            start of the round is added to the loss; 0 switches it off.
    """

    omitted_defaults = ("generations",)

    rounds: int = Field(ge=1, le=10_000)
    steps_per_round: int = Field(ge=1, le=100_000)
    generations: int = Field(default=1, ge=1, le=100)
    labeled_batch: int = Field(default=1, ge=1, le=64)
    unlabeled_batch: int = Field(default=1, ge=1, le=64)
    optimizer: OptimizerSettings = OptimizerSettings()
    augmentation: Augmentation = Augmentation()
    proximal: float = Field(default=0.0, ge=0, le=100)

    @model_validator(mode="after")
    def _equal_parts(self) -> TrainingSettings:
        if self.rounds % self.generations:
            raise ValueError(f"rounds ({self.rounds}) cannot be divided into {self.generations} equal generations")
        return self

    @property
    def rounds_per_generation(self) -> int:
        """Rounds from a new specialist to the next one, or to the end."""
        return self.rounds // self.generations

    @property
    def total_steps(self) -> int:
        """T of the schedules: optimizer steps that one site takes in a generation, usually the whole study."""
        return self.rounds_per_generation * self.steps_per_round

    def local_round(self, number: int) -> int:
        """Return a round's number within its generation, from 1; rounds count from 1."""
        return (number - 1) % self.rounds_per_generation + 1


class RegularizerSettings(StrictModel):
    """L_unsup by its name in the registry; lambda_c(t) = weight * exp(-5 (1 - min(t, t_ramp) / t_ramp)^2).

    Attributes:
        name: what is learned from unlabeled scans alone.
        weight: lambda_c once the ramp is over.
        ramp_share: t_ramp as a share of the study's steps.
    """

    name: str = "mean-teacher"
    weight: float = Field(default=0.1, ge=0, le=100)
    ramp_share: Fraction = 0.4


class TeacherSettings(StrictModel):
    """The exponential moving average of the specialist; it never leaves the site.

    Attributes:
        decay: share of the teacher that a step keeps; smaller in the first steps.
        start: `global` starts each round from the global specialist; `site` resumes from the teacher that the site
            kept.
    """

    decay: float = Field(default=0.99, ge=0, lt=1)
    start: Literal["global", "site"] = "global"
