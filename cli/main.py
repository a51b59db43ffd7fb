"""The `semisam` command line. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.audit_commands import app as audit_app
from cli.data_commands import app as data_app
from cli.errors import readable_errors
from cli.import_command import import_scans
from cli.lead_commands import MlflowOption
from cli.lead_commands import app as lead_app
from cli.planning_commands import derive_plan, fingerprint
from cli.predict_command import predict
from cli.release_commands import export, verify
from cli.review_commands import app as review_app
from cli.site_commands import app as site_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated, annotation-efficient 3D segmentation with frozen promptable foundation models.",
)
app.add_typer(data_app, name="data")
app.add_typer(lead_app, name="lead")
app.add_typer(review_app, name="review")
app.add_typer(site_app, name="site")
lead_app.command("plan")(derive_plan)
site_app.command()(fingerprint)
site_app.add_typer(audit_app, name="audit")
app.command("import")(import_scans)
app.command()(predict)
app.command()(export)
app.command()(verify)
console = Console()

PlanOption = Annotated[Path, typer.Option(help="The study plan (YAML).")]
SitesOption = Annotated[Path, typer.Option(help="Folder of site YAML files.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the plan: training.rounds=3. Repeatable.")
]


@app.command()
def simulate(
    plan: Annotated[Path | None, typer.Option(help="The study plan (YAML).")] = None,
    sites: Annotated[Path | None, typer.Option(help="Folder of site YAML files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; a new one under runs/ by default.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume the run in this folder.")] = None,
    assignments: SetOption = None,
    engine: Annotated[str, typer.Option(help="flower (sites run in parallel) or in-process.")] = "flower",
    local_baseline: Annotated[
        bool, typer.Option(help="Also train each labeled site alone, supervised, for comparison.")
    ] = True,
    mlflow: MlflowOption = None,
) -> None:
    """Run a whole study on this machine: every site, the server, the rounds, the report.

    Example: semisam simulate --plan site_configs/phantom/plan.yaml --sites site_configs/phantom/sites
    """
    with readable_errors("Finished rounds are kept; resume with --resume."):
        from experiments.simulate import Simulation

        simulation = Simulation.prepare(plan, sites, out, resume, assignments, engine, local_baseline, console, mlflow)
        completed = simulation.execute()
    if not completed:
        raise typer.Exit(1)


@app.command()
def compare(
    plan: PlanOption,
    sites: SitesOption,
    out: Annotated[Path, typer.Option(help="Folder of the comparison.")],
    definition: Annotated[
        Path | None, typer.Option(help="YAML with arms, baseline, seeds, labeled, oracles. Options override its keys.")
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="<alone|federated|pooled>-<supervised|regularizer|semisam>, separated by commas. All by default."
        ),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The arm that the others are compared with.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, separated by commas; the plan's own by default.")] = None,
    labeled: Annotated[
        list[str] | None,
        typer.Option(help="Labels per site: all, 4 (the first of its list), or one per site: 1,1,0. Repeatable."),
    ] = None,
    oracles: Annotated[
        bool | None, typer.Option("--oracles/--no-oracles", help="Also score generalists with true prompts.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the comparison in this folder.")] = False,
    engine: Annotated[str, typer.Option(help="in-process: each arm in one child process.")] = "in-process",
    assignments: SetOption = None,
) -> None:
    """Train with one plan in several ways (alone, federated, pooled; each part) and compare them with intervals.

    Example: semisam compare --plan plan.yaml --sites sites/ --out comparison --seeds 0,1,2 --labeled 1 --labeled all
    """
    with readable_errors("Finished arms and rounds are kept; resume with --resume."):
        from experiments.comparison.compare import Comparison, Request, definition_changes
        from experiments.comparison.runner import ChildRunner

        changes = definition_changes(arms, baseline, seeds, labeled, oracles, engine)
        request = Request(plan, sites, out, assignments or [], definition, changes, resume)
        completed = Comparison.prepare(request, console).execute(ChildRunner(console))
    if not completed:
        raise typer.Exit(1)


@app.command()
def check(plan: PlanOption, sites: SitesOption, assignments: SetOption = None) -> None:
    """Check a plan and its site files, and list what each site would use. Reads no scan.

    Example: semisam check --plan plan.yaml --sites sites/
    """
    with readable_errors():
        from experiments.checks import check_study, study_table

        study = check_study(plan, sites, assignments or [])
        console.print(study_table(study))
    console.print(f"plan hash {study.plan.hash}", highlight=False, soft_wrap=True)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="The run folder.")]) -> None:
    """Write the report on a run, finished or not: one HTML file of aggregates, report.html in the run folder.

    Example: semisam report runs/atrium-20260301-093000
    """
    with readable_errors():
        from reports.lead.report import write_report

        path = write_report(run)
    console.print(str(path), highlight=False, markup=False, soft_wrap=True)


@app.command("init-sites")
def init_sites(
    images: Annotated[Path, typer.Option(help="Folder of images.")],
    labels: Annotated[Path, typer.Option(help="Folder of labels.")],
    table: Annotated[Path, typer.Option(help="CSV with the columns case, site, split (train or val).")],
    out: Annotated[Path, typer.Option(help="Folder to write the site YAML files to.")],
    labeled: Annotated[
        str, typer.Option(help="Labeled train cases per site, in name order: one number, or one per site: 1,1,0,0.")
    ] = "1",
    storage: Annotated[Path, typer.Option(help="Folder under which each site keeps its state.")] = Path("site-storage"),
    generalist: Annotated[list[str] | None, typer.Option(help="Generalists available at every site.")] = None,
) -> None:
    """Write one commented site YAML for each site of a CSV.

    Example: semisam init-sites --images la/images --labels la/labels --table la/sites.csv --out la-sites --labeled 1
    """
    with readable_errors():
        from experiments.site_files import write_site_files

        paths = write_site_files(images, labels, table, out, labeled, storage, generalist or ["lite-medsam"])
    for path in paths:
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)


@app.command()
def generalists(
    site: Annotated[
        Path | None, typer.Option(help="A site's YAML: looks for the weights it names, on its device.")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Time one scan with each model whose weights are here.")] = True,
) -> None:
    """List the frozen models that can label scans: prompts, licence, training data, weights, seconds a scan here.

    Example: semisam generalists --site sites/north.yaml
    """
    with readable_errors():
        from experiments.generalists import survey

        with console.status("") as status:
            found = survey(site, measure, lambda name: status.update(f"{name} ..."))
    console.print(found.table())
    console.print("\n".join(found.details()), markup=False, highlight=False)


@app.command()
def examples(out: Annotated[Path, typer.Option(help="A new folder.")] = Path("site_configs")) -> None:
    """Write the plans and site files that come with the package, every key explained."""
    with readable_errors():
        from experiments.examples import write_examples

        console.print(f"Plans and site files are in {write_examples(out)}", highlight=False, soft_wrap=True)


@app.command()
def phantom(
    out: Annotated[Path, typer.Option(help="Folder of the hospitals' data.")],
    cases: Annotated[int, typer.Option(help="Scans per hospital.", min=2, max=1000)] = 6,
    seed: Annotated[int, typer.Option(help="Seed of anatomy and noise.")] = 0,
) -> None:
    """Generate three phantom hospitals (north, south, east) as ordinary NIfTI files, every organ labeled.

    Example: semisam phantom --out demo/data --cases 6
    """
    with readable_errors():
        from experiments.phantom import write_hospitals

        written = write_hospitals(out, cases, seed, console)
    if not written:
        console.print(f"The phantom hospitals are already in {out}.", highlight=False, markup=False, soft_wrap=True)


@app.command("run-in-process", hidden=True)
def run_in_process(
    plan: PlanOption,
    sites: SitesOption,
    run_folder: Annotated[Path, typer.Option(help="Folder of the run's record.")],
    only: Annotated[str | None, typer.Option(help="Name of the only site that takes part.")] = None,
) -> None:
    """Run a study inside this process; `simulate` starts it as a child."""
    with readable_errors():
        from engines.in_process import execute

        execute(plan, sites, run_folder, only)


@app.command("run-oracle", hidden=True)
def run_oracle(
    plan: PlanOption,
    sites: SitesOption,
    run_folder: Annotated[Path, typer.Option(help="Folder of the run's record.")],
    generalist: Annotated[str, typer.Option(help="The generalist's name.")],
    clicks: Annotated[int | None, typer.Option(help="Number of clicks; boxes by default.", min=1)] = None,
) -> None:
    """Score a generalist with true prompts inside this process; `compare` starts it as a child."""
    with readable_errors():
        from experiments.comparison.oracle import execute

        execute(plan, sites, run_folder, generalist, clicks)


if __name__ == "__main__":
    app()
