"""The arms of a comparison: who trains on what, which plan each follows, and which are references only."""

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
    """Whose data train one model: each site's for itself, all sites' by federation, all sites' in one place."""

    ALONE = "alone"
    FEDERATED = "federated"
    POOLED = "pooled"


class What(StrEnum):
    """Which terms of the plan's loss are used: labels only, with the regularizer, with generalists as well."""

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
    Standing.ORACLE: "oracle: uses the truth, not a result one can have",
}


@dataclass(frozen=True)
class Arm:
    """One way of training, named `<who>-<what>`."""

    who: Who
    what: What

    @property
    def name(self) -> str:
        """As options, folders and tables call it."""
        return f"{self.who.value}-{self.what.value}"

    @property
    def standing(self) -> Standing:
        """How its figures may be read."""
        return Standing.REFERENCE if self.who is Who.POOLED else Standing.RESULT

    def plan(self, plan: Plan, seed: int) -> Plan:
        """Return the plan that this arm follows: the study's with terms left out, steps and rounds as they are."""
        changes: dict[str, object] = {"seed": seed}
        if self.what is not What.SEMISAM:
            changes["pseudo_labels"] = None
        if self.what is What.SUPERVISED:
            changes["regularizer"] = plan.regularizer.model_copy(update={"name": NONE})
        followed = plan if self.who is Who.FEDERATED else plan.alone()
        return followed.model_copy(update=changes)


@dataclass(frozen=True)
class OracleArm:
    """A generalist by itself, prompted with the truth of the very cases it is scored on.

    Attributes:
        generalist: its name.
        clicks: how many clicks, in the volume or on each slice that is asked about; None prompts with boxes.
    """

    generalist: str
    clicks: int | None

    @property
    def name(self) -> str:
        """As folders and tables call it."""
        prompts = "boxes" if self.clicks is None else f"{self.clicks}-point{'s' if self.clicks > 1 else ''}"
        return f"oracle-{self.generalist}-{prompts}"

    @property
    def standing(self) -> Standing:
        """How its figures may be read."""
        return Standing.ORACLE


AnyArm = Arm | OracleArm


def arm_names(plan: Plan) -> tuple[str, ...]:
    """Return the names of all arms that a plan allows, federated first, pooled last."""
    everyone = (Who.FEDERATED, Who.ALONE, Who.POOLED)
    return tuple(Arm(who, what).name for who in everyone for what in What if _reason_against(what, plan) is None)


def arm_of(name: str, plan: Plan) -> Arm:
    """Return the arm of this name.

    Raises:
        ConfigError: no arm is called so, or the plan lacks what it would train with.
    """
    known = {Arm(who, what).name: Arm(who, what) for who in Who for what in What}
    if name not in known:
        raise ConfigError(f"arms: {name!r}: no arm is called so; accepted: {', '.join(arm_names(plan))}.")
    if reason := _reason_against(known[name].what, plan):
        raise ConfigError(f"arms: {name!r}: {reason}; accepted: {', '.join(arm_names(plan))}.")
    return known[name]


def oracle_arms(plan: Plan, available: frozenset[str]) -> tuple[OracleArm, ...]:
    """Return the oracle arms of the plan's generalists that are available: clicks, or boxes where none are taken.

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
    """Return a sentence for each generalist of the plan that is not clicked on, saying why.

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
            reasons.append(f"{name} has no oracle with {clicks}, since it takes no points; it is given boxes.")
        elif not kinds & _CLICKED:
            reasons.append(f"{name} has no oracle, since it takes neither points nor boxes.")
    return tuple(reasons)


def _reason_against(what: What, plan: Plan) -> str | None:
    if what is What.SEMISAM and plan.pseudo_labels is None:
        return "the plan has no pseudo_labels section"
    if what is What.REGULARIZER and plan.regularizer.name == NONE:
        return "the plan's regularizer is none"
    return None
