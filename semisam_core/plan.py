"""The study plan: everything that all sites of one study agree on. Typed, versioned, hashable."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from semisam_core.aggregation_plan import Admission, Rule, ServerOptimizer, least_updates
from semisam_core.configuration import Fraction, Name, Spacing, StrictModel, override, parse, read_yaml
from semisam_core.errors import ConfigError
from semisam_core.pseudo_label_plan import PseudoLabels
from semisam_core.regularizers import NONE, check_regularizer
from semisam_core.specialists import check_specialist, check_statistics
from semisam_core.target_class import TargetClass


class Task(StrictModel):
    """What is segmented on what kind of scan.

    A label value that marks no class quarantines the case, since it may be the wrong file; with `ignore_other_values`
    whole numbers from 1 on are background instead, for label files that hold more structures than the study's.
    """

    name: Name
    classes: tuple[TargetClass, ...] = Field(min_length=1, max_length=64)
    channels: tuple[Name, ...] = Field(min_length=1, max_length=8)
    ignore_other_values: bool = False

    @model_validator(mode="after")
    def _distinct(self) -> Task:
        for what, values in (
            ("name", [c.name for c in self.classes]),
            ("value", [value for c in self.classes for value in c.label_values]),
            ("channel", list(self.channels)),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"every class {what} must differ from the others, found {values}")
        return self


class Intensity(StrictModel):
    """How intensities are made comparable.

    `percentiles`: clip to the [lower, upper] percentiles of the scan, then zero mean and unit variance (MR).
    `window`: clip to [lower, upper] in the scan's own units, then scale to [0, 1] (CT in HU, PET in SUV).
    """

    kind: Literal["percentiles", "window"]
    lower: float
    upper: float

    @model_validator(mode="after")
    def _ordered(self) -> Intensity:
        if not self.lower < self.upper:
            raise ValueError(f"lower ({self.lower}) must be below upper ({self.upper})")
        if self.kind == "percentiles" and not (self.lower >= 0 and self.upper <= 100):
            raise ValueError("percentiles lie between 0 and 100")
        return self


class Data(StrictModel):
    """The grid on which the specialist sees scans: RAS orientation, this spacing, patches of this size."""

    spacing_mm: Spacing
    intensity: Intensity
    patch: tuple[int, int, int]
    foreground_share: Fraction = 0.7

    @field_validator("patch")
    @classmethod
    def _positive_patch(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if not all(8 <= side <= 512 for side in value):
            raise ValueError("each side of the patch is in voxels, between 8 and 512")
        return value


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


class Regularizer(StrictModel):
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


class Exclusion(StrictModel):
    """A site that fails `after_failures` rounds in a row is left out of the next `rounds` rounds, then asked again."""

    after_failures: int = Field(default=3, ge=1, le=1000)
    rounds: int = Field(default=2, ge=1, le=1000)


class Aggregation(StrictModel):
    """Which updates are admitted, how they are weighed and combined, and how long anybody is waited for.

    Rules: `weighted-mean` weighs by `weights`. `median` and `trimmed-mean` (without the trim_share at each end) go
    coordinate by coordinate and weigh all sites alike. `krum` takes the one update that lies closest to the others,
    `multi-krum` the weighted mean of all but the `malicious_sites` that lie furthest off.

    Weights: `samples`: scans used in training. `equal`: one site, one vote. `evidence`: labeled scans plus
    `unlabeled_share` of the accepted pseudo-labels, the latter ramped up over the study. `confidence`: likewise, but
    each accepted pseudo-label counts its mean confidence exp(-U) within the target.

    A round counts if `minimum_sites` contribute. Where fewer do, others are waited for, `wait_for_quorum_s` at most; a
    site that comes back within `rejoin_window_s` of a round's start still takes part in it.
    """

    rule: Rule = "weighted-mean"
    trim_share: float = Field(default=0.2, ge=0.001, lt=0.5)
    malicious_sites: int = Field(default=1, ge=1)
    weights: Literal["samples", "equal", "evidence", "confidence"] = "samples"
    unlabeled_share: Fraction = 0.2
    admission: Admission = Admission()
    server_optimizer: ServerOptimizer = ServerOptimizer()
    minimum_sites: int = Field(default=1, ge=1)
    join_deadline_s: float = Field(default=600, gt=0)
    round_deadline_s: float = Field(default=7200, gt=0)
    wait_for_quorum_s: float = Field(default=600, ge=0)
    rejoin_window_s: float = Field(default=120, ge=0)
    exclusion: Exclusion = Exclusion()

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
        """How many updates the rule needs for what it promises."""
        return least_updates(self.rule, self.trim_share, self.malicious_sites)

    @property
    def borne(self) -> int:
        """How many hostile sites the rule bears among the minimum of sites."""
        return {
            "weighted-mean": 0,
            "median": (self.minimum_sites - 1) // 2,
            "trimmed-mean": int(self.trim_share * self.minimum_sites),
            "krum": self.malicious_sites,
            "multi-krum": self.malicious_sites,
        }[self.rule]


class Evaluation(StrictModel):
    """Sliding-window evaluation of whole scans at the site, in the scan's own geometry."""

    every_rounds: int = Field(default=5, ge=1)
    overlap: float = Field(default=0.25, ge=0, lt=1)
    surface_tolerance_mm: float = Field(default=2.0, gt=0)


class Plan(StrictModel):
    """One study. See the shipped plans in `site_configs/` for every key explained."""

    version: Literal[1]
    task: Task
    data: Data
    specialist: Specialist
    training: Training
    regularizer: Regularizer = Regularizer()
    teacher: Teacher = Teacher()
    pseudo_labels: PseudoLabels | None = None
    aggregation: Aggregation = Aggregation()
    evaluation: Evaluation = Evaluation()
    selection: Literal["last", "validation"] = "last"
    seed: int = Field(ge=0, lt=2**31)

    @model_validator(mode="after")
    def _specialist_fits(self) -> Plan:
        chosen = self.specialist
        check_specialist(chosen.name, chosen.arguments, self.data.patch, len(self.task.channels))
        check_statistics(chosen.name, chosen.arguments, chosen.statistics)
        return self

    @model_validator(mode="after")
    def _regularizer_fits(self) -> Plan:
        check_regularizer(self.regularizer.name, self.training.unlabeled_batch)
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the foreground classes, in channel order (channel 0 is background)."""
        return tuple(c.name for c in self.task.classes)

    @property
    def as_generalists_see(self) -> Plan:
        """This plan with the grid on which generalists see scans."""
        if self.pseudo_labels is None or self.pseudo_labels.spacing_mm is None:
            return self
        closer = self.data.model_copy(update={"spacing_mm": self.pseudo_labels.spacing_mm})
        return self.model_copy(update={"data": closer})

    @property
    def uses_unlabeled(self) -> bool:
        """Whether any term of the loss reads unlabeled scans."""
        return self.regularizer.name != NONE or self.pseudo_labels is not None

    def alone(self) -> Plan:
        """Return what is left of the plan for one site by itself: nobody to combine with, nothing to stay close to."""
        combining = {"rule": "weighted-mean", "minimum_sites": 1, "server_optimizer": ServerOptimizer()}
        return self.model_copy(
            update={
                "training": self.training.model_copy(update={"proximal": 0.0}),
                "aggregation": self.aggregation.model_copy(update=combining),
            }
        )

    def canonical_json(self) -> str:
        """Return the plan as JSON whose text depends on content alone, defaults filled in."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON: equal plans have equal hashes, however their YAML is laid out."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


def load_plan(path: Path, assignments: list[str] | None = None) -> Plan:
    """Read a plan file, with optional dotted overrides (``training.rounds=3``).

    Raises:
        ConfigError: file, key, value and what is accepted.
    """
    return parse(Plan, override(read_yaml(path), assignments or []), str(path))


def plan_from_json(text: str) -> Plan:
    """Read a plan that came over the wire as canonical JSON.

    Raises:
        ConfigError: it is no JSON mapping or no valid plan.
    """
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ConfigError("the plan that the server sent: not a JSON mapping.")
    return parse(Plan, content, "the plan that the server sent")
