"""The `semisam` command line. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.lead_commands import app as lead_app
from cli.site_commands import app as site_app
from semisam_core.errors import SemiSAMError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated, annotation-efficient 3D segmentation with frozen promptable foundation models.",
)
app.add_typer(lead_app, name="lead")
app.add_typer(site_app, name="site")
console = Console()
errors = Console(stderr=True)

PlanOption = Annotated[Path, typer.Option(help="The study plan (YAML).")]
SitesOption = Annotated[Path, typer.Option(help="Folder of site YAML files.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the plan: training.rounds=3. May be repeated.")
]


@app.command()
def simulate(
    plan: Annotated[Path | None, typer.Option(help="The study plan (YAML).")] = None,
    sites: Annotated[Path | None, typer.Option(help="Folder of site YAML files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; a new one under runs/ by default.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run folder after a kill.")] = None,
    assignments: SetOption = None,
    engine: Annotated[str, typer.Option(help="flower (flwr run, sites side by side) or in-process.")] = "flower",
    local_baseline: Annotated[
        bool, typer.Option(help="Also train each labeled site alone, supervised, for comparison.")
    ] = True,
) -> None:
    """Run a whole study on this machine: every site, the server, the rounds, the report.

    Example: semisam simulate --plan site_configs/phantom/plan.yaml --sites site_configs/phantom/sites
    """
    from experiments.simulate import Simulation

    try:
        simulation = Simulation.prepare(plan, sites, out, resume, assignments or [], engine, local_baseline, console)
        completed = simulation.execute()
    except SemiSAMError as error:
        errors.print(f"[red]{type(error).__name__}[/red]", highlight=False)
        errors.print(str(error), highlight=False, markup=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        errors.print("Interrupted. Finished rounds are kept; --resume goes on.", highlight=False)
        raise typer.Exit(130) from None
    if not completed:
        raise typer.Exit(1)


@app.command()
def compare(
    plan: PlanOption,
    sites: SitesOption,
    out: Annotated[Path, typer.Option(help="Folder of the comparison.")],
    definition: Annotated[
        Path | None, typer.Option(help="YAML with arms, baseline, seeds, labeled, oracles. Options replace its keys.")
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(help="<alone|federated|pooled>-<supervised|regularizer|semisam>, by commas. All by default."),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The arm that the others are compared with.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, by commas; the plan's own by default.")] = None,
    labeled: Annotated[
        list[str] | None,
        typer.Option(help="Labels a site: all, 4 (the first of its list), or one a site: 1,1,0. May be repeated."),
    ] = None,
    oracles: Annotated[
        bool | None, typer.Option("--oracles/--no-oracles", help="Also score generalists with true prompts.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison in this folder.")] = False,
    engine: Annotated[str, typer.Option(help="in-process: each arm in one child process.")] = "in-process",
    assignments: SetOption = None,
) -> None:
    """Train by one plan in several ways and say which is better, with intervals: alone, federated, pooled; each part.

    Example: semisam compare --plan plan.yaml --sites sites/ --out comparison --seeds 0,1,2 --labeled 1 --labeled all
    """
    from experiments.comparison.compare import Comparison, Request, definition_changes
    from experiments.comparison.runner import ChildRunner

    try:
        changes = definition_changes(arms, baseline, seeds, labeled, oracles, engine)
        request = Request(plan, sites, out, assignments or [], definition, changes, resume)
        completed = Comparison.prepare(request, console).execute(ChildRunner(console))
    except SemiSAMError as error:
        errors.print(str(error), highlight=False, markup=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        errors.print("Interrupted. Finished arms and rounds are kept; --resume goes on.", highlight=False)
        raise typer.Exit(130) from None
    if not completed:
        raise typer.Exit(1)


@app.command()
def check(plan: PlanOption, sites: SitesOption, assignments: SetOption = None) -> None:
    """Check a plan and its site files, and list what each site would use. Reads no scan.

    Example: semisam check --plan plan.yaml --sites sites/
    """
    from experiments.checks import check_study, study_table

    try:
        study = check_study(plan, sites, assignments or [])
    except SemiSAMError as error:
        errors.print(str(error), highlight=False, markup=False)
        raise typer.Exit(2) from None
    console.print(study_table(study))
    console.print(f"plan hash {study.plan.hash}", highlight=False)


@app.command("init-sites")
def init_sites(
    images: Annotated[Path, typer.Option(help="Folder of images.")],
    labels: Annotated[Path, typer.Option(help="Folder of labels.")],
    table: Annotated[Path, typer.Option(help="CSV with the columns case, site, split (train or val).")],
    out: Annotated[Path, typer.Option(help="Folder to write the site YAML files to.")],
    labeled: Annotated[
        str, typer.Option(help="Labeled train cases a site, in name order: one number, or one a site: 1,1,0,0.")
    ] = "1",
    storage: Annotated[Path, typer.Option(help="Folder under which each site keeps its state.")] = Path("site-storage"),
    generalist: Annotated[list[str] | None, typer.Option(help="Generalists available at every site.")] = None,
) -> None:
    """Write one commented site YAML for each site of a CSV.

    Example: semisam init-sites --images la/images --labels la/labels --table la/sites.csv --out la-sites --labeled 1
    """
    from cli.init_sites import write_site_files

    try:
        paths = write_site_files(images, labels, table, out, labeled, storage, generalist or ["lite-medsam"])
    except SemiSAMError as error:
        errors.print(str(error), highlight=False, markup=False)
        raise typer.Exit(2) from None
    for path in paths:
        console.print(str(path), highlight=False)


@app.command()
def generalists(
    site: Annotated[
        Path | None, typer.Option(help="A site's YAML: looks for the weights it names, on its device.")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Time one scan with each model whose weights are here.")] = True,
) -> None:
    """List the frozen models that may label scans: prompts, licence, training data, weights, seconds a scan here.

    Example: semisam generalists --site sites/north.yaml
    """
    from cli.generalists import show_generalists

    try:
        show_generalists(site, measure, console)
    except SemiSAMError as error:
        errors.print(str(error), highlight=False, markup=False)
        raise typer.Exit(2) from None


@app.command()
def phantom(
    out: Annotated[Path, typer.Option(help="Folder of the hospitals' data.")],
    cases: Annotated[int, typer.Option(help="Scans a hospital.", min=2, max=1000)] = 6,
    seed: Annotated[int, typer.Option(help="Seed of anatomy and noise.")] = 0,
) -> None:
    """Generate three phantom hospitals (north, south, east) as ordinary NIfTI files, every organ labeled.

    Example: semisam phantom --out demo/data --cases 6
    """
    from cli.phantom import write_hospitals

    write_hospitals(out, cases, seed, console)


@app.command("run-in-process", hidden=True)
def run_in_process(
    plan: PlanOption,
    sites: SitesOption,
    run_folder: Annotated[Path, typer.Option(help="Where the record goes.")],
    only: Annotated[str | None, typer.Option(help="One site's name.")] = None,
) -> None:
    """Run a study inside this process; `simulate` starts it as a child."""
    from engines.in_process import execute

    try:
        execute(plan, sites, run_folder, only)
    except SemiSAMError as error:
        errors.print(str(error), highlight=False, markup=False)
        raise typer.Exit(2) from None


@app.command("run-oracle", hidden=True)
def run_oracle(
    plan: PlanOption,
    sites: SitesOption,
    run_folder: Annotated[Path, typer.Option(help="Where the record goes.")],
    generalist: Annotated[str, typer.Option(help="Its name.")],
    clicks: Annotated[int | None, typer.Option(help="Clicks; boxes by default.", min=1)] = None,
) -> None:
    """Score a generalist with true prompts inside this process; `compare` starts it as a child."""
    from experiments.comparison.oracle import execute

    try:
        execute(plan, sites, run_folder, generalist, clicks)
    except SemiSAMError as error:
        errors.print(str(error), highlight=False, markup=False)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
