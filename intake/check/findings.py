"""What a check is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from intake.check.facts import CaseFacts, Terms


class Severity(StrEnum):
    """How much a finding matters.

    A problem keeps a case out of training or makes a score worthless; a warning deserves a look and may be right.
    """

    PROBLEM = "problem"
    WARNING = "warning"


@dataclass(frozen=True)
class Finding:
    """One thing that a check found. It stays at the site.

    Attributes:
        check: the check's name.
        severity: how much it matters.
        case: the case's id; None if it concerns the site as a whole.
        sentence: what was found.
        accepted: what would have been accepted.
    """

    check: str
    severity: Severity
    case: str | None
    sentence: str
    accepted: str


@dataclass(frozen=True)
class Site:
    """What is known of all cases together.

    Attributes:
        cases: facts of every case, in order.
        patients: the patient of each case, as far as the import wrote it down.
    """

    cases: Sequence[CaseFacts]
    patients: Mapping[str, str]


@dataclass(frozen=True)
class CaseCheck:
    """A check of one case.

    Attributes:
        name: as it stands in findings.
        severity: of all its findings.
        accepted: what it accepts.
        look: returns a sentence for each thing it finds.
        needs_plan: whether it can be done only under a plan.
    """

    name: str
    severity: Severity
    accepted: str
    look: Callable[[CaseFacts, Terms], Iterable[str]]
    needs_plan: bool = False

    def findings(self, case: CaseFacts, terms: Terms) -> list[Finding]:
        """Return what the check finds in one case."""
        said = [each.removeprefix(f"{case.id}: ") for each in self.look(case, terms)]
        return [Finding(self.name, self.severity, case.id, each, self.accepted) for each in said]


@dataclass(frozen=True)
class SiteCheck:
    """A check across cases.

    Attributes:
        look: returns the case, or None for the whole site, and a sentence for each thing it finds.
        fewest: the cases below which it cannot be done.

    The others are as in `CaseCheck`.
    """

    name: str
    severity: Severity
    accepted: str
    look: Callable[[Site, Terms], Iterable[tuple[str | None, str]]]
    needs_plan: bool = False
    fewest: int = 0

    def findings(self, site: Site, terms: Terms) -> list[Finding]:
        """Return what the check finds across all cases."""
        return [Finding(self.name, self.severity, case, said, self.accepted) for case, said in self.look(site, terms)]
