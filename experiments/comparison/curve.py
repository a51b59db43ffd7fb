"""Plot Dice against the number of labeled scans: one panel per class, one line per arm."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.comparison.arms import Standing
from experiments.comparison.definition import Definition
from experiments.comparison.results import ArmResult
from semisam_core.files import write_atomically
from semisam_core.plan import Plan
from semisam_core.reporting.bootstrap import Estimate

STYLES = {Standing.RESULT: "-", Standing.REFERENCE: "--", Standing.ORACLE: ":"}
SUFFIX = {Standing.RESULT: "", Standing.REFERENCE: " (reference)", Standing.ORACLE: " (oracle, upper bound)"}


def draw_curve(results: Sequence[ArmResult], plan: Plan, definition: Definition, path: Path) -> None:
    """Draw mean Dice with 95% intervals against the number of labeled scans at all sites; oracles are level lines.

    Args:
        results: figures of every arm and label count.
        plan: for the names of the task and its classes.
        definition: for the order of the arms.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(6.4 * len(plan.class_names), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(plan.class_names), squeeze=False)[0]
    for panel, target in zip(panels, plan.class_names, strict=True):
        for name in definition.arms:
            _draw_arm(panel, [result for result in results if result.arm == name], target)
        for result in results:
            if result.standing is Standing.ORACLE and (found := _dice(result, target)):
                label = result.arm + SUFFIX[result.standing]
                panel.axhline(found.mean, linestyle=STYLES[result.standing], color="grey", linewidth=1, label=label)
        panel.set(title=f"{plan.task.name}: {target}", xlabel="labeled scans, all sites together", ylabel="Dice")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.supxlabel(f"mean and 95% interval over cases and seeds; plan {plan.hash[:12]}", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def _draw_arm(panel: Axes, results: Sequence[ArmResult], target: str) -> None:
    points = [(result.label_total, found) for result in results if (found := _dice(result, target))]
    points.sort(key=lambda point: point[0])
    if not points:
        return
    standing = results[0].standing
    low = [found.mean - (found.mean if found.low is None else found.low) for _, found in points]
    high = [(found.mean if found.high is None else found.high) - found.mean for _, found in points]
    panel.errorbar(
        [total for total, _ in points],
        [found.mean for _, found in points],
        yerr=[low, high],
        marker="o",
        capsize=3,
        linestyle=STYLES[standing],
        label=results[0].arm + SUFFIX[standing],
    )


def _dice(result: ArmResult, target: str) -> Estimate | None:
    return next((each.overall.dice for each in result.classes if each.target == target), None)
