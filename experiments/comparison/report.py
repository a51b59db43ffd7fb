"""The report of a comparison: tables in the terminal, the same as Markdown and JSON, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from engines.tables import FittingTable
from experiments.comparison.arms import MEANING, Standing
from experiments.comparison.curve import draw_curve
from experiments.comparison.definition import Definition
from experiments.comparison.results import ArmResult, Figures, as_json
from semisam_core.files import write_atomically, write_json
from semisam_core.plan import Plan
from semisam_core.reporting.bootstrap import DRAWS, Estimate

COLUMNS = ("arm", "labels", "class", "site", "cases", "Dice", "HD95 mm", "Dice - baseline", "HD95 mm - baseline")
FIRST_NUMBER = 4
UNLABELED_COLUMNS = ("arm", "labels", "class", "scans", "Dice", "Dice - baseline", "pseudo-labels", "gain")
UNLABELED_FIRST_NUMBER = 3
STEPS = (
    "Optimizer steps: a federated arm takes the plan's steps per round at every site, an `alone` arm as many at its "
    "one site, and a pooled arm as many in total: as many as one site, not as all sites together."
)
INTERVALS = (
    f"Figures: mean [95% interval] over cases and seeds, by a bootstrap of {DRAWS} draws that resamples cases and, "
    "within each case, seeds. With fewer than about ten cases the intervals are too narrow. Differences are paired by "
    "case and seed, over the cases that both arm and baseline scored. Distances: means over the scores that have one; "
    "the others are counted as missing. An `alone` arm is scored only at sites with a labeled case, each site's model "
    "on its own cases; all other arms are scored at every site."
)
UNLABELED = (
    "Unlabeled scans: those that were trained on without their labels, which this machine has; for analysis only. "
    "Dice: the last round's specialist. Pseudo-labels: those accepted in the last refresh. Gain: pseudo-label minus "
    "the specialist that prompted it, on the same scans."
)
ORACLES = (
    "Oracles: a generalist alone, prompted with the true masks of the cases that are scored (clicks in the volume for "
    "3D models, on each slice for slice-wise models; tight boxes for models that take no clicks)."
)


@dataclass(frozen=True)
class Report:
    """The report of one comparison.

    Attributes:
        plan: the study plan.
        definition: what is compared.
        results: figures of every arm and label count.
        omissions: why generalists have no oracle.
    """

    plan: Plan
    definition: Definition
    results: Sequence[ArmResult]
    omissions: Sequence[str] = ()

    def write(self, folder: Path) -> None:
        """Write report.md, results.json and, for several label counts, dice-by-labels.png."""
        write_json(
            folder / "results.json",
            {
                "plan_hash": self.plan.hash,
                "definition": self.definition.model_dump(mode="json"),
                "draws": DRAWS,
                "arms": as_json(self.results),
            },
        )
        write_atomically(folder / "report.md", self.markdown().encode())
        if len(self.definition.labeled) > 1:
            draw_curve(self.results, self.plan, self.definition, folder / "dice-by-labels.png")

    def show(self, console: Console) -> None:
        """Print the table and the notes."""
        title = f"{self.plan.task.name}: compared with {self.definition.baseline}, plan {self.plan.hash[:12]}"
        caption = "Mean [95% interval] over cases and seeds. Sites: worst first."
        table = FittingTable(*COLUMNS, title=title, caption=caption, numbers_from=FIRST_NUMBER)
        for result in self.results:
            for row in _rows(result, self.definition.baseline):
                table.add(*row)
            table.add_section()
        console.print(table)
        if rows := self._unlabeled_rows():
            title = f"{self.plan.task.name}: scans that were trained on without their labels"
            table = FittingTable(*UNLABELED_COLUMNS, title=title, numbers_from=UNLABELED_FIRST_NUMBER)
            for row in rows:
                table.add(*row)
            console.print(table)
        for note in self._notes():
            console.print(note, markup=False, highlight=False)

    def markdown(self) -> str:
        """Return the whole report as Markdown."""
        plan = self.plan
        lines = [f"# Comparison: {plan.task.name}", ""]
        lines += [f"Plan hash: `{plan.hash}`. Baseline: {self.definition.baseline}. "]
        lines[-1] += f"Seeds: {', '.join(str(seed) for seed in self.definition.seeds)}."
        rows = [row for result in self.results for row in _rows(result, self.definition.baseline)]
        lines += ["", *_markdown_table(COLUMNS, rows, FIRST_NUMBER)]
        if rows := self._unlabeled_rows():
            lines += ["", "## Unlabeled scans", "", *_markdown_table(UNLABELED_COLUMNS, rows, UNLABELED_FIRST_NUMBER)]
        for note in self._notes():
            lines += ["", note]
        lines += ["", "## Labels used", ""]
        lines += [f"- {_name(result)}: {_labels_used(result)}" for result in self.results]
        if len(self.definition.labeled) > 1:
            lines += ["", "![Dice by number of labeled scans](dice-by-labels.png)"]
        return "\n".join(lines) + "\n"

    def _unlabeled_rows(self) -> list[tuple[str, ...]]:
        return [
            (
                _name(result),
                result.labeled or "none",
                each.target,
                str(each.final.cases),
                _interval(each.final, 3),
                _signed(each.final_difference, 3),
                _interval(each.pseudo_label, 3),
                _signed(each.gain, 3),
            )
            for result in self.results
            for each in result.unlabeled
        ]

    def _notes(self) -> list[str]:
        notes = [INTERVALS, STEPS]
        if any(result.unlabeled for result in self.results):
            notes.append(UNLABELED)
        standings = {result.standing for result in self.results}
        if Standing.REFERENCE in standings:
            notes.append(f"Pooled arms are a {MEANING[Standing.REFERENCE]}.")
        if Standing.ORACLE in standings:
            notes.append(ORACLES)
        notes += self.omissions
        if unfinished := [title for result in self.results for title in result.unfinished]:
            notes.append(f"Left out, since they have no scores: {'; '.join(unfinished)}.")
        return notes


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> list[str]:
    sides = ("---:" if k >= numbers_from else "---" for k in range(len(columns)))
    return [f"| {' | '.join(line)} |" for line in (columns, tuple(sides), *rows)]


def _rows(result: ArmResult, baseline: str) -> list[tuple[str, ...]]:
    """Return for each class one row over all sites, then one per site, the worst first."""
    rows: list[tuple[str, ...]] = []
    for each in result.classes:
        name = _name(result) + (" (baseline)" if result.arm == baseline else "")
        head = (name, result.labeled or "none", each.target)
        rows.append(
            (*head, "all", *_cells(each.overall), _signed(each.dice_difference, 3), _signed(each.hd95_difference_mm, 1))
        )
        for number, (site, figures) in enumerate(each.sites):
            worst = " (worst)" if number == 0 and len(each.sites) > 1 else ""
            rows.append(("", "", "", f"{site}{worst}", *_cells(figures), "", ""))
    return rows or [(_name(result), result.labeled or "none", "-", "no scores", "0", "-", "-", "-", "-")]


def _name(result: ArmResult) -> str:
    meaning = MEANING[result.standing]
    return f"{result.arm} ({meaning})" if meaning else result.arm


def _cells(figures: Figures) -> tuple[str, str, str]:
    missing = f" ({figures.missing_distances} missing)" if figures.missing_distances else ""
    return str(figures.dice.cases), _interval(figures.dice, 3), _interval(figures.hd95_mm, 1) + missing


def _interval(value: Estimate | None, digits: int) -> str:
    if value is None:
        return "-"
    if value.low is None or value.high is None:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _signed(value: Estimate | None, digits: int) -> str:
    if value is None:
        return "-"
    if value.low is None or value.high is None:
        return f"{value.mean:+.{digits}f}"
    return f"{value.mean:+.{digits}f} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"


def _labels_used(result: ArmResult) -> str:
    if result.standing is Standing.ORACLE:
        return f"{result.selected_by or 'not finished'}."
    parts = [f"{site}: {', '.join(cases) or 'none'}" for site, cases in sorted(result.training_labels.items())]
    selected = result.selected_by or "not finished"
    return f"labels {result.labeled}; trained on {'; '.join(parts)}. Selected by: {selected}."
