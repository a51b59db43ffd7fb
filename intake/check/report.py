"""One self-contained HTML page of what was found. It stays at the site, readable by its owner only."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from intake.check.charts import HEIGHT, WIDTH, Histogram, histogram
from intake.check.examine import DataCheck
from intake.check.facts import CaseFacts, ChannelFacts
from intake.check.findings import Finding, Severity
from intake.check.site_checks import along_patient, volumes_by_class
from intake.check.template import TEMPLATE
from semisam_core.data.nifti import by_axis
from semisam_core.files import write_atomically
from semisam_core.reporting.overview import COLOURS
from semisam_core.text import printable

REPORT = "data-check.html"
OWNER_ONLY = 0o600


def write_report(check: DataCheck, path: Path) -> None:
    """Write the page, atomically, with a mode that lets only its owner read it.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, render(check).encode(), OWNER_ONLY)


def render(check: DataCheck) -> str:
    """Return the page. The same findings give the same bytes: it holds no date."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_shown)
    environment.filters["number"] = _number
    volumes = volumes_by_class(check.cases)
    pictures = [_picture(case) for case in check.cases if case.picture is not None]
    page: str = environment.from_string(TEMPLATE).render(
        site=check.site,
        verdict=_verdict(check),
        counts=[(name.capitalize(), value) for name, value in check.counts().items()],
        basis=_basis(check),
        groups=_groups(check),
        done=check.done,
        not_done=list(check.reasons_not_done().items()),
        charts=_charts(check),
        width=WIDTH,
        height=HEIGHT,
        labels=sum(case.label is not None for case in check.cases),
        classes=[_class_row(name, list(found.values())) for name, found in volumes.items()],
        rows=[_row(number, case, check.findings) for number, case in enumerate(check.cases)],
        pictures=pictures,
        pictures_left_out=len(check.cases) - len(pictures),
        key=_key(check.cases),
    )
    return page


def _shown(value: Any) -> Any:
    """Escape characters that would reorder or hide text. Marked-up text is made by the template only."""
    return printable(value) if type(value) is str else value


def _number(value: float) -> str:
    return f"{value:.4g}"


def _verdict(check: DataCheck) -> dict[str, str]:
    problems, warnings = (len(check.of(severity)) for severity in (Severity.PROBLEM, Severity.WARNING))
    if problems:
        return {"kind": "problem", "sentence": f"Problems to solve before this site joins a study: {problems}."}
    if warnings:
        return {"kind": "warning", "sentence": f"No problem. Warnings that deserve a look: {warnings}."}
    return {"kind": "fine", "sentence": "No problem and no warning."}


def _basis(check: DataCheck) -> str:
    plan = check.terms.plan
    if plan is None:
        return "Checked without a plan: what only a plan can say is listed under Checks."
    return f"Checked against the plan {plan.task.name}, hash {plan.hash}."


def _groups(check: DataCheck) -> list[dict[str, Any]]:
    rows = {case.id: number for number, case in enumerate(check.cases)}
    groups: dict[tuple[Severity, str], dict[str, Any]] = {}
    for finding in check.findings:
        empty: dict[str, Any] = {
            "severity": finding.severity.value,
            "check": finding.check,
            "accepted": finding.accepted,
            "findings": [],
        }
        said = {"case": finding.case, "row": rows.get(finding.case or ""), "sentence": finding.sentence}
        groups.setdefault((finding.severity, finding.check), empty)["findings"].append(said)
    return list(groups.values())


def _charts(check: DataCheck) -> list[Histogram]:
    """Voxel sizes along the patient's axes, then the intensities of each channel."""
    axes = ("left to right", "back to front", "bottom to top")
    first = [along_patient(case.channels[0].geometry).spacing_mm for case in check.cases if case.channels]
    found = [histogram(f"Voxel size {name}", "mm", [each[k] for each in first]) for k, name in enumerate(axes)]
    measures: Mapping[str, Callable[[ChannelFacts], list[float]]] = {
        "median": lambda channel: [channel.intensities.percentiles[2]] if channel.intensities else [],
        "99.5th percentile": lambda channel: [channel.intensities.percentiles[4]] if channel.intensities else [],
    }
    for name in check.terms.channels:
        channels = [channel for case in check.cases for channel in case.channels if channel.name == name]
        for what, values in measures.items():
            found.append(histogram(f"{name}: {what}", "", [value for each in channels for value in values(each)]))
    return [each for each in found if each is not None]


def _class_row(name: str, volumes: Sequence[float]) -> dict[str, Any]:
    low, high = min(volumes), max(volumes)
    return {"name": name, "count": len(volumes), "median": statistics.median(volumes), "low": low, "high": high}


def _row(number: int, case: CaseFacts, findings: Sequence[Finding]) -> dict[str, Any]:
    geometry = case.channels[0].geometry if case.channels else None
    own = [finding for finding in findings if finding.case == case.id]
    intensities = [
        f"{channel.name}: " + " / ".join(_number(channel.intensities.percentiles[k]) for k in (0, 2, 4))
        for channel in case.channels
        if channel.intensities is not None
    ]
    return {
        "number": number,
        "case": case.id,
        "role": case.role.value,
        "shape": " x ".join(map(str, geometry.shape)) if geometry else "",
        "spacing": by_axis(geometry.spacing_mm) if geometry else "",
        "axes": geometry.axes if geometry else "",
        "intensities": intensities,
        "structures": [f"{each.name} {each.volume_ml:.3g}" for each in (case.label.classes if case.label else ())],
        "problems": sorted({each.check for each in own if each.severity is Severity.PROBLEM}),
        "warnings": sorted({each.check for each in own if each.severity is Severity.WARNING}),
    }


def _picture(case: CaseFacts) -> dict[str, str]:
    drawn = [each.name for each in case.label.classes] if case.label is not None and not case.label.off_grid else []
    centre = f"the label's centre, outlines of {', '.join(drawn)}" if drawn else "the volume's centre, no outline"
    return {
        "case": case.id,
        "role": case.role.value,
        "png": base64.b64encode(case.picture or b"").decode(),
        "alt": f"{case.id}: axial, coronal and sagittal plane through {centre}",
    }


def _key(cases: Sequence[CaseFacts]) -> list[tuple[str, str]]:
    names = {each.index: each.name for case in cases for each in (case.label.classes if case.label is not None else ())}
    return [(names[index], COLOURS[(index - 1) % len(COLOURS)]) for index in sorted(names)]
