"""`semisam review ...`: what a radiologist at a site types. The command line registers these commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from review.reviewing import Reviewing

app = typer.Typer(no_args_is_help=True, help="A radiologist at a site: look at pseudo-labels, rate and correct them.")
console = Console()

SiteOption = Annotated[Path, typer.Option(help="The site's YAML.")]
PlanOption = Annotated[Path, typer.Option(help="The study plan.")]
RaterOption = Annotated[str, typer.Option(help="Your pseudonym: lowercase letters, digits and dashes.")]
RunOption = Annotated[str | None, typer.Option(help="The run; by default the one with the newest pseudo-labels.")]
SecondOption = Annotated[bool, typer.Option("--second", help="Look at what other raters have rated, not knowing how.")]
RatingOption = Annotated[list[str], typer.Option(help="1 to 4, or of several classes liver=2. Repeatable.")]
DicomOption = Annotated[Path | None, typer.Option(help="Folder of the series that the scan was imported from.")]
SITE, PLAN = Path("site.yaml"), Path("plan.yaml")


@app.command("open")
def open_page(
    rater: RaterOption,
    site: SiteOption = SITE,
    plan: PlanOption = PLAN,
    run: RunOption = None,
    second: SecondOption = False,
    most: Annotated[int, typer.Option(help="Scans to list, the most doubtful first.", min=1, max=10_000)] = 50,
    port: Annotated[int, typer.Option(help="Port on this machine; a free one by default.", min=0, max=65535)] = 0,
    idle_minutes: Annotated[float, typer.Option(help="End when nobody has used the page for so long.", min=0.1)] = 120,
    browser: Annotated[
        bool, typer.Option("--browser", help="Open it in a browser; others on this machine may see its address.")
    ] = False,
) -> None:
    """Open the worklist in a local page: rate each pseudo-label, correct it, keep it. Ends with the page or Ctrl-C.

    Example: semisam review open --rater r1
    """
    import webbrowser

    from review.desk import Desk
    from review.server import PageServer

    reviewing = _reviewing(site, plan, rater, run, second)
    with console.status("looking for scans"):
        desk = Desk(reviewing, most)
    server = PageServer(desk, port)
    console.print(f"{len(desk.worklist()['scans'])} scans of the run {reviewing.run}. Open this page here:")
    console.print(server.url, markup=False, highlight=False, soft_wrap=True)
    console.print("Whoever knows this address can see the scans while the command runs; do not pass it on.")
    if browser:
        webbrowser.open(server.url)
    server.serve_until_idle(60 * idle_minutes)
    console.print("Ended. What was kept is trained on from the next round on.")


@app.command("list")
def list_scans(
    rater: RaterOption,
    site: SiteOption = SITE,
    plan: PlanOption = PLAN,
    run: RunOption = None,
    second: SecondOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """List the scans to review, the most doubtful first, with what speaks against each pseudo-label.

    Example: semisam review list --rater r1
    """
    from dataclasses import asdict

    from rich.table import Table
    from rich.text import Text

    entries = _reviewing(site, plan, rater, run, second).worklist()
    if as_json:
        lines = [
            {
                "case": entry.case,
                "doubt": None if second else entry.doubt,
                "round": entry.round,
                "classes": [asdict(each) for each in entry.classes],
            }
            for entry in entries
        ]
        typer.echo(json.dumps(lines, indent=2))
        return
    table = Table("case", "doubt", "class", "disagreement", "volume (ml)", "volume doubt", "refused by")
    for entry in entries:
        for each in entry.classes:
            odd = "" if each.implausibility is None else f"{each.implausibility:.2f}"
            said = (entry.case, f"{entry.doubt:.2f}", each.name, f"{each.disagreement:.2f}")
            table.add_row(*(Text(cell) for cell in (*said, f"{each.volume_ml:.2f}", odd, each.refused or "")))
        if not entry.classes:
            table.add_row(Text(entry.case))
    console.print(table if entries else "There is nothing to review.")


@app.command("hand-over")
def hand_over(
    case: Annotated[str, typer.Argument(help="The scan, as `semisam review list` names it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")],
    rater: RaterOption,
    site: SiteOption = SITE,
    plan: PlanOption = PLAN,
    run: RunOption = None,
    second: SecondOption = False,
    dicom: DicomOption = None,
) -> None:
    """Write a scan and its pseudo-label for 3D Slicer or ITK-SNAP: NIfTI or, over the given series, DICOM SEG.

    Example: semisam review hand-over case-3 -o to-correct --rater r1
    """
    from review import hand_over as work
    from semisam_core.paths import absolute_path

    reviewing = _reviewing(site, plan, rater, run, second)
    opened, folder = reviewing.open(case), absolute_path(out, "--out")
    if dicom is None:
        files = work.hand_over(opened, folder, reviewing.plan)
    else:
        files = [folder / "mask.dcm"]
        series = work.series_of_scan(opened, absolute_path(dicom, "--dicom"), reviewing.plan)
        work.hand_over_seg(opened, series, files[0], reviewing.plan)
    for path in files:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


@app.command()
def take(
    case: Annotated[str, typer.Argument(help="The scan.")],
    mask: Annotated[Path, typer.Argument(help="The corrected mask: NIfTI, or DICOM SEG with --dicom.")],
    rating: RatingOption,
    minutes: Annotated[float, typer.Option(help="How long the correction took.", min=0)],
    rater: RaterOption,
    site: SiteOption = SITE,
    plan: PlanOption = PLAN,
    run: RunOption = None,
    second: SecondOption = False,
    dicom: DicomOption = None,
) -> None:
    """Take a corrected mask back, checked as every label is, and keep it with the rating.

    Example: semisam review take case-3 to-correct/mask.nii.gz --rating 2 --minutes 6 --rater r1
    """
    from review import hand_over as work
    from semisam_core.paths import absolute_path

    reviewing = _reviewing(site, plan, rater, run, second)
    opened, path = reviewing.open(case), absolute_path(mask, "the mask")
    if dicom is None:
        label = work.take_back(opened, path, reviewing.plan)
    else:
        series = work.series_of_scan(opened, absolute_path(dicom, "--dicom"), reviewing.plan)
        label = work.take_back_seg(opened, series, path, reviewing.plan)
    ratings = _ratings(rating, reviewing.plan.class_names)
    record = reviewing.keep(opened, ratings, minutes, label, "nifti" if dicom is None else "dicom-seg")
    console.print(f"{case}: {record.decision.value}. It is trained on from the next round on.", markup=False)


@app.command()
def agreement(
    raters: Annotated[tuple[str, str], typer.Argument(help="Two raters who looked at the same pseudo-labels.")],
    site: SiteOption = SITE,
    plan: PlanOption = PLAN,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for pictures; default: in the storage.")
    ] = None,
) -> None:
    """Say how far two raters agree (Cohen's kappa, Dice), and draw the distribution of all ratings.

    Example: semisam review agreement r1 r2
    """
    from client.reviews import ReviewStore
    from client.site_config import load_site_config
    from review.agreement import agreement as compare
    from review.distribution import draw_distribution, rating_counts
    from review.masks import stored_mask
    from semisam_core.paths import absolute_path
    from semisam_core.plan import load_plan

    config, study = load_site_config(site), load_plan(plan)
    store = ReviewStore(config.storage.folder)
    records = store.records()
    found = compare(
        records, raters, study.class_names, lambda each: stored_mask(store.mask(each.label or ""), study.task)
    )
    for each in found:
        said = [("kappa", each.kappa), ("weighted kappa", each.weighted_kappa), (f"Dice of {each.masks}", each.dice)]
        numbers = ", ".join(f"{name} {'none' if value is None else f'{value:.3f}'}" for name, value in said)
        console.print(f"{each.name}: {each.scans} rated by both, {numbers}", markup=False, highlight=False)
    folder = absolute_path(out, "--out") if out is not None else store.folder
    for path in draw_distribution(rating_counts(records), folder) if records else []:
        console.print(f"It stays at this site: {path}", markup=False, highlight=False, soft_wrap=True)


def _reviewing(site: Path, plan: Path, rater: str, run: str | None, second: bool) -> Reviewing:
    from client.site_config import load_site_config
    from review.reviewing import Reviewing
    from semisam_core.plan import load_plan

    return Reviewing(load_site_config(site), load_plan(plan), rater, run, second)


def _ratings(said: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
    from semisam_core.errors import ConfigError

    pairs = [each.rpartition("=") for each in said]
    if any(not value.isdecimal() for *_, value in pairs):
        raise ConfigError(f"--rating {' '.join(said)}: 1 to 4 is expected, or <class>=<1 to 4>.")
    if len(pairs) == 1 and not pairs[0][1]:
        return dict.fromkeys(classes, int(pairs[0][2]))
    return {name: int(value) for name, _, value in pairs}
