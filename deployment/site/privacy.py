"""What a site's privacy ledger says, printed for its data-protection officer, and whether the plan can be afforded."""

from __future__ import annotations

import os
from collections import defaultdict

from rich.console import Console

from client.privacy import MECHANISM, NOT_COVERED, UNIT, PrivacyReport, SitePrivacy, privacy_report, round_spending
from client.privacy_ledger import Booking
from client.site_config import SiteConfig
from deployment.site.findings import Finding, fine, problem, warning
from engines.tables import FittingTable
from semisam_core.errors import SemiSAMError
from semisam_core.plan import Plan
from semisam_core.privacy.accounting import Epsilon, epsilon_of
from semisam_core.text import printable


def site_privacy(config: SiteConfig, plan: Plan) -> PrivacyReport:
    """Return what was spent at this site, at the plan's delta if it has one.

    Raises:
        LedgerError: the ledger cannot be trusted.
        OSError: it cannot be read.
    """
    return privacy_report(config, None if plan.privacy is None else plan.privacy.delta)


def print_privacy(report: PrivacyReport, console: Console) -> None:
    """Print epsilon of each round and in total, and what it means."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if not report.rounds:
        say("No private round has been trained here.")
    else:
        table = FittingTable("site", "run", "rounds", "noise", "sampling", "steps", "epsilon a round", numbers_from=3)
        for (booking, cost), numbers in _alike(report.rounds).items():
            setting = (f"{booking.noise_multiplier:g}", f"{booking.sampling_rate:g}", str(booking.steps))
            cells = (booking.site, booking.run, _ranges(numbers), *setting, _words(cost))
            table.add(*(printable(cell) for cell in cells))
        console.print(table)
    say(f"spent in total: epsilon {_words(report.total)} at delta {report.delta:g} (Renyi: {report.total.rdp:.2f})")
    say(f"this site's own limit: epsilon {report.maximum_epsilon:g}, noise at least {report.minimum_noise:g}")
    say(f"unit: {UNIT}")
    say(f"mechanism: {MECHANISM}")
    for each in NOT_COVERED:
        say(f"not covered: {each}")


def check_privacy(config: SiteConfig, plan: Plan) -> list[Finding]:
    """Check the plan against the site's limits, and that the ledger is intact and can be written."""
    try:
        SitePrivacy(config, plan).check_limits()
        if plan.privacy is None:
            return [] if config.privacy.noise == "secure" else [_seeded()]
        spent = privacy_report(config, plan.privacy.delta)
    except (SemiSAMError, OSError) as error:
        return [problem("privacy", str(error))]
    findings = [_seeded()] if config.privacy.noise != "secure" else []
    folder, limit = config.ledger_folder, config.privacy.maximum_epsilon
    if not os.access(next(each for each in (folder, *folder.parents) if each.exists()), os.W_OK):
        findings.append(problem("privacy", f"the ledger in {folder} cannot be written; make the folder writable."))
    each = round_spending(plan)
    whole = epsilon_of([each] * plan.training.rounds, plan.privacy.delta)
    said = (
        f"the plan's {plan.training.rounds} rounds cost epsilon {_words(whole)} at delta {plan.privacy.delta:g}, "
        f"{_words(spent.total)} was spent before, privacy.maximum_epsilon is {limit:g}"
    )
    if whole.value + spent.total.value > limit:
        findings.append(warning("privacy", f"{said}. This site may leave the study early: rounds beyond are refused."))
    else:
        findings.append(fine("privacy", f"{said}."))
    return findings


def _seeded() -> Finding:
    return problem("privacy", "privacy.noise is seeded, which is for simulations; set it to secure.")


def _alike(rounds: list[tuple[Booking, Epsilon]]) -> dict[tuple[Booking, Epsilon], list[int]]:
    """Return the numbers of the rounds that differ in nothing else, by the first of them."""
    first: dict[tuple[object, ...], tuple[Booking, Epsilon]] = {}
    numbers: dict[tuple[Booking, Epsilon], list[int]] = defaultdict(list)
    for booking, cost in rounds:
        setting = (booking.site, booking.run, booking.plan, booking.group, booking.spending)
        numbers[first.setdefault(setting, (booking, cost))].append(booking.round)
    return numbers


def _ranges(numbers: list[int]) -> str:
    """Return round numbers in words: `1-3, 3, 7`; a round that was booked twice is there twice."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _words(epsilon: Epsilon) -> str:
    return f"{epsilon.value:.2f}" if epsilon.accountant == "prv" else f"{epsilon.value:.2f} (Renyi)"
