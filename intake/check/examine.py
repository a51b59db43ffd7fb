"""Check a site's data: read every case once, then judge each alone and all together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from client.site_config import SiteConfig, annotated_classes, inventory, site_cases
from intake.check.case_checks import CASE_CHECKS
from intake.check.facts import CaseFacts, Terms
from intake.check.findings import CaseCheck, Finding, Severity, Site, SiteCheck
from intake.check.patients import MANIFEST, read_patients
from intake.check.read import examine_case
from intake.check.site_checks import SITE_CHECKS
from semisam_core.data.cases import Inventory, Role
from semisam_core.data.names import case_name, nifti_suffix
from semisam_core.errors import ConfigError
from semisam_core.plan import Plan
from semisam_core.progress import ProgressCallback

MOST_CHANNELS = 8
MOST_PICTURES = 300
LISTED = "images and labels under one name, and a label for each case that is listed with one"


@dataclass(frozen=True)
class NotDone:
    """A check that was not done, and why."""

    check: str
    reason: str


@dataclass(frozen=True)
class DataCheck:
    """What was found at a site. It stays there.

    Attributes:
        site: the site's name.
        terms: what its data was judged against.
        cases: facts of every case.
        findings: what was found, problems first.
        done: names of the checks that were done.
        not_done: checks that were not, and why.
        patients: number of patients, as far as the import wrote them down.
    """

    site: str
    terms: Terms
    cases: tuple[CaseFacts, ...]
    findings: tuple[Finding, ...]
    done: tuple[str, ...]
    not_done: tuple[NotDone, ...]
    patients: int

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of one severity."""
        return tuple(finding for finding in self.findings if finding.severity is severity)

    def count(self, role: Role) -> int:
        """Return the number of cases in a role."""
        return sum(case.role is role for case in self.cases)

    @property
    def sound(self) -> bool:
        """Whether there is no problem."""
        return not self.of(Severity.PROBLEM)

    def counts(self) -> dict[str, int]:
        """Return numbers of problems, warnings and cases by role, and of patients where they are known."""
        counts = {"problems": len(self.of(Severity.PROBLEM)), "warnings": len(self.of(Severity.WARNING))}
        counts |= {"cases": len(self.cases)} | {role.value: self.count(role) for role in Role}
        return counts | ({"patients": self.patients} if self.patients else {})

    def reasons_not_done(self) -> dict[str, list[str]]:
        """Return the names of checks that were not done, by reason."""
        reasons: dict[str, list[str]] = {}
        for each in self.not_done:
            reasons.setdefault(each.reason, []).append(each.check)
        return reasons

    def as_json(self) -> dict[str, Any]:
        """Return plain values: counts, findings, and the checks that were not done."""
        return {
            "site": self.site,
            "plan": self.terms.plan.hash if self.terms.plan is not None else None,
            "counts": self.counts(),
            "findings": [asdict(finding) for finding in self.findings],
            "done": list(self.done),
            "not_done": [asdict(each) for each in self.not_done],
        }


def check_site_data(config: SiteConfig, plan: Plan | None, progress: ProgressCallback) -> DataCheck:
    """Read every case of a site, one at a time, and check it.

    Args:
        config: the site's YAML.
        plan: the study plan; without one, the checks that need it are listed as not done.
        progress: called with (cases read, cases).

    Raises:
        ConfigError: folders, lists or class names in the YAML are invalid, so that no case can be found.
    """
    annotated = annotated_classes(config, plan) if plan is not None else ()
    names = plan.task.channels if plan is not None else channel_names(config)
    found = site_cases(config, len(names))
    terms = Terms(plan, annotated, names, config.storage.memory_gb)
    facts: list[CaseFacts] = []
    for done, case in enumerate(found.cases):
        progress(done, len(found.cases))
        facts.append(_keep(examine_case(case, terms), done))
    progress(len(found.cases), len(found.cases))
    patients, manifest_problem = read_patients(config.data.images)
    site = Site(facts, {case.id: patients[case.id] for case in facts if case.id in patients})
    findings = [*_listing(config, plan, found)]
    if manifest_problem is not None:
        sentence = f"{manifest_problem}, so patients are not known."
        findings.append(Finding("manifest", Severity.WARNING, None, sentence, "a list of cases, each with its patient"))
    not_done = [*_not_done(site, terms)]
    skipped = {each.check for each in not_done}
    for check in CASE_CHECKS:
        if check.name not in skipped:
            findings += [finding for case in facts for finding in check.findings(case, terms)]
    for across in SITE_CHECKS:
        if across.name not in skipped:
            findings += across.findings(site, terms)
    everything = ("listed", *(check.name for check in (*CASE_CHECKS, *SITE_CHECKS)))
    return DataCheck(
        config.site,
        terms,
        tuple(facts),
        tuple(sorted(findings, key=lambda finding: finding.severity is Severity.WARNING)),
        tuple(name for name in everything if name not in skipped),
        tuple(not_done),
        len(set(site.patients.values())),
    )


def channel_names(config: SiteConfig) -> tuple[str, ...]:
    """Return names for the channels that image names suggest, for a check without a plan.

    Several channels are assumed where every image is named `<case>_0000`, `<case>_0001`, ..., with the same numbers for
    each of several cases and no label or list that uses the name with its number; otherwise there is one.
    """
    stems = _stems(config)
    numbered: dict[str, set[int]] = {}
    for stem in stems:
        match = re.fullmatch(r"(.+)_([0-9]{4})", stem)
        if match is None:
            return ("image",)
        numbered.setdefault(match[1], set()).add(int(match[2]))
    lists = (config.data.labeled if config.data.labeled != "all" else (), config.data.validation, config.data.excluded)
    used = {name for each in lists for name in each} | set(_stems(config, labels=True))
    sets = {frozenset(each) for each in numbered.values()}
    if len(sets) != 1 or used & set(stems):
        return ("image",)
    count = len(next(iter(sets)))
    if sets != {frozenset(range(count))} or not 1 < count <= MOST_CHANNELS:
        return ("image",)
    return tuple(f"channel {number}" for number in range(count))


def _keep(case: CaseFacts, number: int) -> CaseFacts:
    """Drop the pictures after the first `MOST_PICTURES`: each takes some 15 KB in memory and in the report."""
    return case if number < MOST_PICTURES else replace(case, picture=None)


def _stems(config: SiteConfig, labels: bool = False) -> list[str]:
    folder = config.data.labels if labels else config.data.images
    if folder is None or not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return [case_name(name[: -len(suffix)]) for name in names if (suffix := nifti_suffix(name)) is not None]


def _listing(config: SiteConfig, plan: Plan | None, found: Inventory) -> list[Finding]:
    """Return what names alone say: files left out, and whether there is anything to learn from."""
    listed = {*(config.data.labeled if config.data.labeled != "all" else ()), *config.data.validation}
    findings = []
    for each in found.quarantined:
        severity = Severity.PROBLEM if each.id in listed else Severity.WARNING
        findings.append(Finding("listed", severity, each.id, f"{each.reason}. It is left out.", LISTED))
    if plan is not None:
        try:
            inventory(config, plan)
        except ConfigError as error:
            findings.append(Finding("listed", Severity.PROBLEM, None, str(error), LISTED))
    return findings


def _not_done(site: Site, terms: Terms) -> list[NotDone]:
    checks: Sequence[CaseCheck | SiteCheck] = (*CASE_CHECKS, *SITE_CHECKS)
    skipped = [NotDone(check.name, "no plan was given") for check in checks if check.needs_plan and terms.plan is None]
    for check in SITE_CHECKS:
        if len(site.cases) < check.fewest:
            skipped.append(NotDone(check.name, f"it needs at least {check.fewest} cases"))
    if not site.patients:
        skipped.append(NotDone("leak-patient", f"no {MANIFEST} beside the images says which patient a case is of"))
    return skipped
