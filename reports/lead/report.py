"""Writes the lead's report on a run into its folder."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from reports.lead import conduct, teaching, worth
from reports.lead.intervals import FEWEST_CASES
from reports.lead.record import Missing, RunRecord
from reports.lead.template import TEMPLATE
from reports.page import render, write_page
from semisam_core.errors import SemiSAMError
from server.mlflow_log import keep_report

REPORT = "report.html"
SECTIONS = (
    ("worth", "Was it worth it"),
    ("worst", "Worst first"),
    ("learning", "Learning curves"),
    ("pseudo-labels", "Pseudo-labels"),
    ("loss", "Loss terms"),
    ("labels", "Labels used"),
    ("left", "What left"),
    ("privacy", "Privacy"),
    ("generalists", "Generalists"),
    ("faults", "Faults"),
    ("repeat", "How to repeat it"),
)


def write_report(run: Path) -> Path:
    """Write the report on a run, finished or not, and return its path; also into MLflow, if the run is logged there.

    Raises:
        ConfigError: the folder is no run's, or a file in it is damaged.
        OSError: the folder is not writable.
    """
    path = write_page(run / REPORT, page(RunRecord.of(run)), 0o644)
    keep_report(run, path)
    return path


def tell_of_report(run: Path, console: Console) -> None:
    """Write the report at the end of a run and print where it is, or why there is none: the run's end stays its own."""
    try:
        said = f"Report: {write_report(run)}"
    except (SemiSAMError, OSError) as error:
        said = f"The report could not be written: {error} `semisam report {run}` tries again."
    console.print(said, highlight=False, markup=False, soft_wrap=True)


def page(record: RunRecord) -> str:
    """Return the page. The same run folder gives the same bytes."""
    plan = record.plan
    found, state = worth.worth(record), record.state
    intervals = [row for row in record.intervals.rows if row.federated is not None and row.federated.low is not None]
    return render(
        TEMPLATE,
        task=plan.task.name,
        run=str(record.about.get("run", record.folder.name)),
        state=state,
        reason=record.reason if state == "failed" else "",
        counts=_counts(record),
        period=conduct.period(record),
        scores_of=_scores_of(record),
        sections=SECTIONS,
        worth=found,
        worth_columns=worth.COLUMNS,
        fewest=FEWEST_CASES,
        has_intervals=bool(intervals),
        has_alone=bool(record.alone),
        learning=worth.learning(record),
        pseudo=teaching.pseudo_labels(record) if plan.pseudo_labels is not None else None,
        buckets=any(site.coarse for site in record.sites),
        hidden=teaching.unlabeled_scores(record),
        hidden_columns=teaching.HIDDEN_COLUMNS,
        loss=teaching.loss_terms(record),
        labels=teaching.labels_used(record),
        label_columns=teaching.LABEL_COLUMNS,
        update_size=conduct.update_size(record),
        left=conduct.what_left(record),
        left_columns=conduct.LEFT_COLUMNS,
        number_names=conduct.names_of_numbers(record),
        epsilons=conduct.epsilons(record),
        epsilon_columns=conduct.EPSILON_COLUMNS,
        privacy_terms=conduct.privacy_terms(record),
        generalists=conduct.generalists(record),
        faults=conduct.faults(record),
        fault_columns=conduct.FAULT_COLUMNS,
        repeat=conduct.repeat(record),
        plan_text=conduct.plan_text(record),
    )


def _counts(record: RunRecord) -> list[tuple[str, str]]:
    scores = [site.mean_dice(site.scored, record.plan.class_names) for site in record.sites]
    known = [value for value in scores if not isinstance(value, Missing)]
    mean = f"{sum(known) / len(known):.3f}" if known else "none sent"
    lowest = f"{min(known):.3f}" if known else "none sent"
    return [
        ("Sites", str(len(record.sites))),
        ("Rounds", f"{len(record.rounds)} of {record.plan.training.rounds}"),
        ("Structures", str(len(record.plan.class_names))),
        ("Mean Dice over sites", mean),
        ("Lowest site", lowest),
        ("Sites withholding scores", str(sum(value is Missing.WITHHELD for value in scores))),
    ]


def _scores_of(record: RunRecord) -> str:
    if record.selected is not None:
        return f"round {record.selected['round']}, chosen by: {record.selected['by']}"
    return "none yet" if record.scored_round is None else f"round {record.scored_round}, the last that was scored"
