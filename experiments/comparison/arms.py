"""The arms of a comparison: who trains on what, which plan each follows, and how its figures may be read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from semisam_core.errors import ConfigError
from semisam_core.generalists import PromptKind, accepted_prompts
from semisam_core.plan import Plan
from semisam_core.regularizers import NONE

CLICKS = (1, 3, 5, 10)
_CLICKED = frozenset({PromptKind.POINTS_2D, PromptKind.POINTS_3D})


class Who(StrEnum):
    """Whose data train one model: each site its own, all sites by federation, or all data in one place."""

    ALONE = "alone"
    FEDERATED = "federated"
    POOLED = "pooled"


class What(StrEnum):
    """Which terms of the plan's loss are used: labels only, plus the regularizer, plus the generalists."""

    SUPERVISED = "supervised"
    REGULARIZER = "regularizer"
    SEMISAM = "semisam"


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
        """Return the plan this arm follows: the study's without some terms, with the same steps and rounds."""
        changes: dict[str, object] = {"seed": seed}
        if self.what is not What.SEMISAM:
            changes["pseudo_labels"] = None
        if self.what is What.SUPERVISED:
            changes["regularizer"] = plan.regularizer.model_copy(update={"name": NONE})
        followed = plan if self.who is Who.FEDERATED else plan.alone()
        return followed.model_copy(update=changes)


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
    """Return the names of all arms that the plan allows, federated first, pooled last."""
    everyone = (Who.FEDERATED, Who.ALONE, Who.POOLED)
    return tuple(Arm(who, what).name for who in everyone for what in What if _reason_against(what, plan) is None)


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
    if what is What.SEMISAM and plan.pseudo_labels is None:
        return "the plan has no pseudo_labels section"
    if what is What.REGULARIZER and plan.regularizer.name == NONE:
        return "the plan's regularizer is none"
    return None
