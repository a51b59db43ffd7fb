"""The study plan: everything that all sites of one study agree on. Typed, versioned, hashable."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from semisam_core.configuration import StrictModel, override, parse, read_yaml
from semisam_core.errors import ConfigError
from semisam_core.files import write_atomically
from semisam_core.plan_sections.aggregation import Aggregation, ServerOptimizerSettings
from semisam_core.plan_sections.privacy import Privacy, privacy_conflicts
from semisam_core.plan_sections.pseudo_labels import PseudoLabels
from semisam_core.plan_sections.task import Data, Task
from semisam_core.plan_sections.training import (
    RegularizerSettings,
    SpecialistSettings,
    TeacherSettings,
    TrainingSettings,
)
from semisam_core.regularizers import NONE, check_regularizer
from semisam_core.specialists import check_specialist, check_statistics


class Evaluation(StrictModel):
    """Sliding-window evaluation of whole scans at the site, in the scan's own geometry.

    Attributes:
        every_rounds: rounds between scorings of the global specialist on the sites' validation cases; the last round is
            scored too.
        overlap: overlap of the sliding window, as a share of the patch.
        surface_tolerance_mm: distance up to which surfaces count as one in the surface Dice.
    """

    every_rounds: int = Field(default=5, ge=1)
    overlap: float = Field(default=0.25, ge=0, lt=1)
    surface_tolerance_mm: float = Field(default=2.0, gt=0)


class Plan(StrictModel):
    """One study. The shipped plans in `site_configs/` explain every key.

    Attributes:
        version: version of this format.
        selection: which specialist is published as `best.safetensors`: that of the `last` round, which uses no label,
            or the one with the best mean Dice on `validation` cases.
        seed: seed of initial weights, patches and augmentation.
    """

    omitted_defaults = ("privacy",)

    version: Literal[1]
    task: Task
    data: Data
    specialist: SpecialistSettings
    training: TrainingSettings
    regularizer: RegularizerSettings = RegularizerSettings()
    teacher: TeacherSettings = TeacherSettings()
    pseudo_labels: PseudoLabels | None = None
    privacy: Privacy | None = None
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

    @model_validator(mode="after")
    def _privacy_holds(self) -> Plan:
        if self.privacy is None:
            return self
        conflicts = privacy_conflicts(self.specialist, self.regularizer, self.pseudo_labels, self.aggregation)
        if conflicts:
            raise ValueError("privacy does not hold with these keys: " + ". ".join(conflicts))
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the foreground classes, in channel order (channel 0 is background)."""
        return tuple(c.name for c in self.task.classes)

    @property
    def as_generalists_see(self) -> Plan:
        """This plan with `data.spacing_mm` set to the spacing at which generalists see scans."""
        if self.pseudo_labels is None or self.pseudo_labels.spacing_mm is None:
            return self
        data = self.data.model_copy(update={"spacing_mm": self.pseudo_labels.spacing_mm})
        return self.model_copy(update={"data": data})

    def refreshes(self, number: int) -> bool:
        """Whether pseudo-labels are made anew in this round (rounds count from 1), except in a cold start.

        A generation after the first begins with those of the one before.
        """
        local = self.training.local_round(number)
        return self.pseudo_labels is not None and self.pseudo_labels.due(local) and (local == number or local > 1)

    @property
    def uses_unlabeled(self) -> bool:
        """Whether any term of the loss reads unlabeled scans."""
        return self.regularizer.name != NONE or self.pseudo_labels is not None

    def alone(self) -> Plan:
        """Return this plan for a site that trains alone: no rule, secure sum, server optimizer or proximal term."""
        aggregation = {
            "rule": "weighted-mean",
            "minimum_sites": 1,
            "server_optimizer": ServerOptimizerSettings(),
            "secure": None,
        }
        return self.model_copy(
            update={
                "training": self.training.model_copy(update={"proximal": 0.0}),
                "aggregation": self.aggregation.model_copy(update=aggregation),
            }
        )

    def canonical_json(self) -> str:
        """Return the plan as JSON with defaults filled in and keys sorted: equal plans give the same text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON: equal for equal plans, whatever the layout of their YAML."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


def load_plan(path: Path, assignments: list[str] | None = None) -> Plan:
    """Read a plan file and apply dotted overrides (``training.rounds=3``).

    Raises:
        ConfigError: the plan is invalid; the message names file, key, value and what is accepted.
    """
    return parse(Plan, override(read_yaml(path), assignments or []), str(path))


def plan_from_json(text: str) -> Plan:
    """Read a plan received as canonical JSON.

    Raises:
        ConfigError: it is not a JSON mapping or not a valid plan.
    """
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ConfigError("the plan from the server: not a JSON mapping.")
    return parse(Plan, content, "the plan from the server")


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan as YAML with every default spelled out."""
    content = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False)
    write_atomically(path, content.encode())
