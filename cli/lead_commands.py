"""`semisam lead ...`: the lead's commands. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cli.errors import INTERRUPTED, readable_errors

if TYPE_CHECKING:
    from deployment.lead.study_folder import StudyFolder

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Lead a study across hospitals: certificates, invitations, the server, runs.",
)
console = Console()

StudyOption = Annotated[Path, typer.Option("--study", help="The study folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
MlflowOption = Annotated[
    Path | None, typer.Option(help="Also log the run to MLflow, in this local folder. Needs the extra `mlflow`.")
]
SiteArgument = Annotated[str, typer.Argument(help="The site's name: lowercase letters, digits, dashes.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The study folder to create.")],
    plan: Annotated[Path | None, typer.Option(help="The study plan; by default a commented one to edit.")] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or IP address at which sites reach this server, the one they are told first. Repeatable."
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="The port that sites connect to.", min=1, max=65535)] = 8443,
    sites: Annotated[int, typer.Option(help="How many sites a run waits for.", min=1)] = 2,
) -> None:
    """Create a study folder: settings, plan, certificates, the code that will run. Never overwrites.

    Example: semisam lead init atrium-study --plan plan.yaml --host lead.example.org --sites 3
    """
    from deployment.lead.study_folder import NewStudy

    with readable_errors():
        study = NewStudy(folder, plan, host or [], port, sites).write()
    _say(f"Created {study.folder}. Sites will connect to {study.settings.address}.")
    if not host:
        _say("Without --host only this machine can take part.")
    _say(f"Review plan.yaml, then: semisam lead invite <site> --study {folder}")


@app.command()
def invite(site: SiteArgument, study: StudyOption = Path(), as_json: JsonOption = False) -> None:
    """Write the invitation to send to a site. It holds no secret.

    Example: semisam lead invite north --study atrium-study
    """
    from deployment.invitation import sha256

    with readable_errors():
        opened = _open(study)
        path = opened.invite(site)
        hashes = {"plan_hash": opened.plan().hash, "code_hash": sha256(opened.code())}
        differs = opened.installed_code_differs()
    if as_json:
        _json({"site": site, "invitation": str(path), **hashes, "installed_code_differs": differs})
        return
    _say(str(path))
    _say("Tell the site these hashes by another channel than the file, for example by telephone:")
    _say(f"  plan hash {hashes['plan_hash']}\n  code hash {hashes['code_hash']}")
    _tell_of_code(differs)


@app.command()
def admit(
    site: SiteArgument,
    key: Annotated[Path, typer.Argument(help="The site's public key (.pub), EC, OpenSSH format.")],
    study: StudyOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Let a site connect: keep its public key and register it, now or when the SuperLink starts.

    Example: semisam lead admit north north.pub --study atrium-study
    """
    from deployment.lead import registration

    with readable_errors():
        opened = _open(study)
        registration.admit(opened, site, key)
        registered = _register(opened)
    if as_json:
        _json({"site": site, "admitted": True, "registered": registered})
        return
    _say(f"{site} is admitted{'' if registered else '; it will be registered when the SuperLink starts'}.")


@app.command()
def remove(site: SiteArgument, study: StudyOption = Path()) -> None:
    """Stop a site from connecting.

    Example: semisam lead remove north --study atrium-study
    """
    from deployment.lead import registration

    with readable_errors():
        opened = _open(study)
        registration.remove(opened, site)
        registered = _register(opened)
    _say(f"{site} is removed{'' if registered else '; it will be unregistered when the SuperLink starts'}.")


@app.command()
def code(
    study: StudyOption = Path(),
    update: Annotated[bool, typer.Option("--update", help="Make the code installed here the study's code.")] = False,
) -> None:
    """Show which code the study runs, or change it. Sites approve code by its hash.

    Example: semisam lead code --study atrium-study --update
    """
    from deployment.invitation import sha256

    with readable_errors():
        opened = _open(study)
        if update:
            opened.update_code()
        kept, differs = sha256(opened.code()), opened.installed_code_differs()
    _say(f"code hash {kept}")
    if update:
        _say("Invite every site again: each must approve this code.")
    _tell_of_code(differs)


@app.command()
def start(
    study: StudyOption = Path(),
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay in the foreground and log to the terminal; for systemd.")
    ] = False,
) -> None:
    """Start the server that sites connect to (Flower's SuperLink).

    Example: semisam lead start --study atrium-study
    """
    from deployment.lead import service

    with readable_errors():
        opened = _open(study)
        if foreground:
            with contextlib.suppress(KeyboardInterrupt):  # how a service is stopped
                service.serve(opened, _announced(opened))
            return
        started = service.start(opened)
    _say(f"The SuperLink is running (process {started.pid}). Sites connect to {opened.settings.address}.")
    _say(f"Log: {service.log_file(opened)}")


@app.command()
def stop(
    study: StudyOption = Path(),
    run_only: Annotated[bool, typer.Option("--run", help="Stop only the run in progress.")] = False,
) -> None:
    """Stop the server and everything it started. Resume an interrupted run with `lead run --resume`.

    Example: semisam lead stop --study atrium-study
    """
    from deployment.lead import service

    with readable_errors():
        opened = _open(study)
        if run_only:
            from deployment.lead.run import stop_runs

            stopped = stop_runs(opened)
            _say("\n".join(f"Stopped {folder}" for folder in stopped) or "No run was in progress.")
            return
        found = service.stop(opened)
    _say("The SuperLink has ended." if found else "The SuperLink was not running.")


@app.command()
def run(
    study: StudyOption = Path(),
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the interrupted run, or follow the one in progress.")
    ] = False,
    sites: Annotated[int | None, typer.Option(help="How many sites to wait for.", min=1)] = None,
    mlflow: MlflowOption = None,
) -> None:
    """Run the study and follow it to the end; the exit status is 0 only if it completed.

    Ctrl-C stops following, not the run.

    Example: semisam lead run --study atrium-study
    """
    from deployment.lead.run import submitted_run
    from deployment.lead.service import control_of
    from deployment.lead.status import stale_invitations

    with readable_errors():
        opened = _open(study)
        with control_of(opened) as control:
            _tell_of_code(opened.installed_code_differs())
            if stale := stale_invitations(opened):
                _say(f"Invited to an earlier plan, code or address of this study: {', '.join(stale)}.")
            started = submitted_run(opened, control, resume, sites, console, mlflow)
            completed = started.follow(control, console)
    if not completed:
        raise typer.Exit(1 if completed is False else INTERRUPTED)


@app.command()
def status(
    study: StudyOption = Path(),
    as_json: JsonOption = False,
    live: Annotated[bool, typer.Option("--watch", help="Follow the run to its end; Ctrl-C leaves it alone.")] = False,
) -> None:
    """Show the state of the study: server, sites, run, latest events.

    Example: semisam lead status --study atrium-study --watch
    """
    from deployment.lead.status import status_of, status_view
    from deployment.lead.watch import watch

    with readable_errors("The run is left alone."):
        if live:
            return watch(_open(study), console, as_json)
        found = status_of(_open(study))
    if as_json:
        _json(found)
    else:
        console.print(status_view(found))


def _open(folder: Path) -> StudyFolder:
    from deployment.lead.study_folder import StudyFolder

    return StudyFolder.load(folder)


def _register(study: StudyFolder) -> bool:
    """Register the admitted sites at the SuperLink if it is running; return whether it is."""
    from deployment.lead import registration, service

    if service.find(study) is None:
        return False
    with service.control_of(study) as control:
        registration.sync_registrations(study, control)
    return True


@contextlib.contextmanager
def _announced(study: StudyFolder) -> Iterator[None]:
    _say(f"The SuperLink is running. Sites connect to {study.settings.address}.")
    yield


def _tell_of_code(differs: bool) -> None:
    if differs:
        _say(
            "The code installed here differs from the study's code, and the study's code is what runs. `semisam lead "
            "code --update` makes the installed code the study's; then every site must approve it."
        )


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2))
