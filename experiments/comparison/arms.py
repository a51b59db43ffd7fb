"""The arms of a comparison: who trains on what, which plan each follows, and how its figures may be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from semisam_core.errors import ConfigError
from semisam_core.generalists import PromptKind, accepted_prompts
from semisam_core.plan import Plan
from semisam_core.plan_sections.pseudo_labels import PseudoLabelLoss, PseudoLabels
from semisam_core.plan_sections.sources import Sources
from semisam_core.regularizers import NONE

CLICKS = (1, 3, 5, 10)
_CLICKED = frozenset({PromptKind.POINTS_2D, PromptKind.POINTS_3D})


class Who(StrEnum):
    """Whose data train one model: each site its own, all sites by federation, or all data in one place."""

    ALONE = "alone"
    FEDERATED = "federated"
    POOLED = "pooled"


class What(StrEnum):
    """Which terms of the plan's loss are used: labels only, plus the regularizer, plus pseudo-labels.

    A plan with pseudo-labels by evidence has further arms: `paper`, with pseudo-labels and loss of SemiSAM+, one
    without each of its sources, and one without `sources.volume_tolerance`.
    """

    SUPERVISED = "supervised"
    REGULARIZER = "regularizer"
    PAPER = "paper"
    SEMISAM = "semisam"
    WITHOUT_SPECIALIST = "without-specialist"
    WITHOUT_GENERALISTS = "without-generalists"
    WITHOUT_FEATURE_HEAD = "without-feature-head"
    WITHOUT_REGISTRATION = "without-registration"
    WITHOUT_PROTOTYPES = "without-prototypes"
    WITHOUT_VOLUME_TOLERANCE = "without-volume-tolerance"

    @property
    def omitted_source(self) -> str | None:
        """The key of the source that it leaves out, None if it leaves out none."""
        _, separator, source = self.value.partition("without-")
        return source.replace("-", "_") if separator else None


ABLATIONS = tuple(what for what in What if what.omitted_source is not None)


class Standing(StrEnum):
    """How an arm's figures may be read."""

    RESULT = "result"
    REFERENCE = "reference"
    ORACLE = "oracle"


MEANING = {
    Standing.RESULT: "",
    Standing.REFERENCE: "reference only: all sites' data in one place",
    Standing.ORACLE: "oracle: prompted with the truth, an upper bound",
}


@dataclass(frozen=True)
class Arm:
    """One way of training, named `<who>-<what>`."""

    who: Who
    what: What

    @property
    def name(self) -> str:
        """The name in options, folders and tables."""
        return f"{self.who.value}-{self.what.value}"

    @property
    def standing(self) -> Standing:
        """How its figures may be read."""
        return Standing.REFERENCE if self.who is Who.POOLED else Standing.RESULT

    def plan(self, plan: Plan, seed: int) -> Plan:
        """Return the plan this arm follows: that of the study without some terms or sources, with as many steps."""
        changes: dict[str, object] = {"seed": seed}
        changes["pseudo_labels"] = self._pseudo_labels(plan)
        if self.what is What.SUPERVISED:
            changes["regularizer"] = plan.regularizer.model_copy(update={"name": NONE})
        followed = plan if self.who is Who.FEDERATED else plan.alone()
        return followed.model_copy(update=changes)

    def _pseudo_labels(self, plan: Plan) -> PseudoLabels | None:
        labels = plan.pseudo_labels
        if labels is None or self.what in (What.SUPERVISED, What.REGULARIZER):
            return None
        if self.what is What.PAPER:
            paper = {"method": "semisam+", "sources": Sources(), "loss": PseudoLabelLoss(), "schedule": "decay"}
            return labels.model_copy(update=paper)
        if (omitted := self.what.omitted_source) is not None:
            nothing = False if isinstance(getattr(labels.sources, omitted), bool) else None
            return labels.model_copy(update={"sources": labels.sources.model_copy(update={omitted: nothing})})
        return labels


@dataclass(frozen=True)
class OracleArm:
    """A generalist alone, prompted with the true masks of the cases it is scored on.

    Attributes:
        generalist: its name.
        clicks: number of clicks per volume, or per slice for slice-wise models; None prompts with boxes.
    """

    generalist: str
    clicks: int | None

    @property
    def name(self) -> str:
        """The name in folders and tables."""
        prompts = "boxes" if self.clicks is None else f"{self.clicks}-point{'s' if self.clicks > 1 else ''}"
        return f"oracle-{self.generalist}-{prompts}"

    @property
    def standing(self) -> Standing:
        """How its figures may be read."""
        return Standing.ORACLE


AnyArm = Arm | OracleArm


def arm_names(plan: Plan) -> tuple[str, ...]:
    """Return the names of all arms that the plan allows, federated first, pooled last, without a source at the end."""
    return default_arm_names(plan) + _names(plan, ABLATIONS)


def default_arm_names(plan: Plan) -> tuple[str, ...]:
    """Return the names of the arms of a comparison that names none: all but those without a source."""
    return _names(plan, [what for what in What if what not in ABLATIONS])


def _names(plan: Plan, whats: Sequence[What]) -> tuple[str, ...]:
    everyone = (Who.FEDERATED, Who.ALONE, Who.POOLED)
    return tuple(Arm(who, what).name for who in everyone for what in whats if _reason_against(what, plan) is None)


def arm_of(name: str, plan: Plan) -> Arm:
    """Return the arm of this name.

    Raises:
        ConfigError: there is no such arm, or the plan lacks what it would train with.
    """
    known = {Arm(who, what).name: Arm(who, what) for who in Who for what in What}
    if name not in known:
        raise ConfigError(f"arms: {name!r}: there is no such arm; accepted: {', '.join(arm_names(plan))}.")
    if reason := _reason_against(known[name].what, plan):
        raise ConfigError(f"arms: {name!r}: {reason}; accepted: {', '.join(arm_names(plan))}.")
    return known[name]


def oracle_arms(plan: Plan, available: frozenset[str]) -> tuple[OracleArm, ...]:
    """Return the oracle arms of the plan's available generalists: clicks, or boxes for models that take no clicks.

    Args:
        plan: the study plan.
        available: the generalists of sites with validation cases.
    """
    arms: list[OracleArm] = []
    for name in plan.pseudo_labels.generalists if plan.pseudo_labels is not None else ():
        kinds = accepted_prompts(name)
        if name not in available:
            continue
        if kinds & _CLICKED:
            arms += [OracleArm(name, clicks) for clicks in CLICKS]
        elif PromptKind.BOX_2D in kinds:
            arms.append(OracleArm(name, None))
    return tuple(arms)


def oracle_omissions(plan: Plan, available: frozenset[str]) -> tuple[str, ...]:
    """Return, for each generalist of the plan without a click oracle, a sentence that says why.

    Args:
        plan: the study plan.
        available: the generalists of sites with validation cases.
    """
    reasons: list[str] = []
    clicks = f"{', '.join(map(str, CLICKS[:-1]))} and {CLICKS[-1]} points"
    for name in plan.pseudo_labels.generalists if plan.pseudo_labels is not None else ():
        kinds = accepted_prompts(name)
        if name not in available:
            reasons.append(f"{name} has no oracle: no site with validation cases has it.")
        elif PromptKind.BOX_2D in kinds and not kinds & _CLICKED:
            reasons.append(f"{name} has no oracle with {clicks}, since it takes no points; it gets boxes.")
        elif not kinds & _CLICKED:
            reasons.append(f"{name} has no oracle, since it takes neither points nor boxes.")
    return tuple(reasons)


def _reason_against(what: What, plan: Plan) -> str | None:
    labels = plan.pseudo_labels
    if what not in (What.SUPERVISED, What.REGULARIZER) and labels is None:
        return "the plan has no pseudo_labels section"
    if labels is not None and (what is What.PAPER or what in ABLATIONS) and labels.method != "evidence":
        return f"the plan's pseudo-labels are not by evidence, but by {labels.method}"
    if labels is not None and (omitted := what.omitted_source) and not getattr(labels.sources, omitted):
        return f"the plan's sources have no {omitted}"
    if what is What.REGULARIZER and plan.regularizer.name == NONE:
        return "the plan's regularizer is none"
    return None
