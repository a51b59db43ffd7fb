"""Writes a site's own report on a run into the site's storage, readable by its owner only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import semisam_core
from client.privacy import PrivacyReport, privacy_report
from client.site_config import SiteConfig
from reports.page import render, write_page
from reports.site import sections
from reports.site.pictures import SIDE, CasePictures, Illustrator
from reports.site.record import SiteRun
from reports.site.template import TEMPLATE
from reports.site.viewer import viewer_page
from semisam_core.plan import Plan
from semisam_core.reporting.overview import COLOURS

REPORT = "report.html"
VIEWER = "viewer.html"
OWNER_ONLY = 0o600
SECTIONS = (
    ("scores", "Scores"),
    ("pictures", "Pictures"),
    ("learning", "Learning curves"),
    ("pseudo-labels", "Pseudo-labels"),
    ("sources", "Sources"),
    ("quarantine", "Not usable"),
    ("left", "What left"),
    ("privacy", "Privacy"),
    ("repeat", "Which run"),
)


def write_site_report(
    config: SiteConfig, plan: Plan, run: str | None = None, cases: Sequence[str] = (), viewer: bool = False
) -> Path:
    """Write the report and return its path, in the run's folder of the site's storage.

    Args:
        config: the site's YAML.
        plan: the plan that the run was started with.
        run: the run's name; by default the last under this plan.
        cases: scans to show; by default the worst scored and the least certain unlabeled ones.
        viewer: whether those scans can also be seen in three dimensions, in a page beside the report.

    Raises:
        ConfigError: there is no such run or case here.
        SplitChangedError: the site's split is not the one that the run began with.
        LedgerError: the privacy ledger cannot be trusted.
        OSError: a file cannot be read or the report not be written.
    """
    site = SiteRun.of(config, plan, run)
    illustrator = Illustrator(site)
    pictures = list(illustrator.draw(cases, viewer))
    if viewer:
        shown = [(f"{each.case} ({each.role})", each.layers) for each in pictures]
        write_page(site.folder / VIEWER, viewer_page(config.site, site.run, plan.class_names, shown), OWNER_ONLY)
    ledger = None if plan.privacy is None else privacy_report(config, plan.privacy.delta)
    page = page_of(site, pictures, illustrator.prediction_of, ledger, VIEWER if viewer else None)
    return write_page(site.folder / REPORT, page, OWNER_ONLY)


def page_of(
    site: SiteRun,
    pictures: Sequence[CasePictures],
    prediction_of: str,
    ledger: PrivacyReport | None,
    viewer: str | None = None,
) -> str:
    """Return the page; `viewer` is the file beside it that shows the scans in three dimensions."""
    names = site.plan.class_names
    return render(
        TEMPLATE,
        site=site.config.site,
        run=site.run,
        counts=_counts(site),
        sections=SECTIONS,
        scored_round=site.scored_rounds[-1] if site.scored_rounds else None,
        fewest=sections.FEWEST_CASES,
        means=sections.means(site),
        mean_columns=sections.MEAN_COLUMNS,
        cases=sections.worst_cases(site),
        case_columns=sections.CASE_COLUMNS,
        pictures=pictures,
        prediction_of=prediction_of,
        viewer=viewer,
        side=SIDE,
        colours=[(name, COLOURS[k % len(COLOURS)]) for k, name in enumerate(names)],
        learning=sections.learning(site),
        learning_columns=("round", *(f"Dice {name}" for name in names)),
        gates=sections.gates(site),
        gate_columns=sections.GATE_COLUMNS,
        sources=sections.sources(site),
        source_columns=sections.SOURCE_COLUMNS,
        quarantine=[(str(each.get("case")), str(each.get("reason"))) for each in site.quarantine],
        left=sections.what_left(site),
        left_columns=sections.LEFT_COLUMNS,
        left_in_total=sections.left_in_total(site),
        privacy=None if ledger is None else _privacy(ledger),
        epsilons=sections.epsilons(site, ledger),
        epsilon_columns=sections.EPSILON_COLUMNS,
        plan_hash=site.plan.hash,
        seed=site.plan.seed,
        version=semisam_core.__version__,
    )


def _counts(site: SiteRun) -> list[tuple[str, str]]:
    answered = Counter(str(entry.get("kind")) for entry in site.audit if "scalars" in entry)
    return [
        ("Rounds trained", str(answered["train"])),
        ("Rounds scored", str(len(site.scored_rounds))),
        ("Validation cases", str(len({score.case for score in site.final_scores}))),
        ("Not usable", str(len(site.quarantine))),
        ("Refusals", str(sum("refused" in entry for entry in site.audit))),
    ]


def _privacy(ledger: PrivacyReport) -> dict[str, str]:
    return {"total": f"{ledger.total.value:.2f}", "delta": f"{ledger.delta:g}", "limit": f"{ledger.maximum_epsilon:g}"}
