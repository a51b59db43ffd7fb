"""`semisam lead`: what the collaboration's lead types. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from semisam_core.errors import SemiSAMError

if TYPE_CHECKING:
    from deployment.lead.study_folder import StudyFolder

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Lead a study across hospitals: certificates, invitations, the server, runs.",
)
console = Console()
errors = Console(stderr=True)

StudyOption = Annotated[Path, typer.Option("--study", help="The study folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
SiteArgument = Annotated[str, typer.Argument(help="The site's name: lowercase letters, digits, dashes.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The study folder to make.")],
    plan: Annotated[Path | None, typer.Option(help="The study plan; a commented one to edit by default.")] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or IP address by which sites reach this server, the one to tell them first. Repeat."),
    ] = None,
    port: Annotated[int, typer.Option(help="The port that sites connect to.", min=1, max=65535)] = 8443,
    sites: Annotated[int, typer.Option(help="How many sites a run waits for.", min=1)] = 2,
) -> None:
    """Make a study folder: settings, plan, certificates, the code that will run. Never overwrites.

    Example: semisam lead init atrium-study --plan plan.yaml --host lead.example.org --sites 3
    """
    from deployment.lead.study_folder import NewStudy

    with _plainly():
        study = NewStudy(folder, plan, host or [], port, sites).write()
    _say(f"Made {study.folder}. Sites will connect to {study.settings.address}.")
    if not host:
        _say("Without --host the study is for this machine only.")
    _say(f"Look through plan.yaml, then: semisam lead invite <site> --study {folder}")


@app.command()
def invite(site: SiteArgument, study: StudyOption = Path(), as_json: JsonOption = False) -> None:
    """Write a site's invitation, to be sent to it. It holds no secret.

    Example: semisam lead invite north --study atrium-study
    """
    from deployment.invitation import sha256

    with _plainly():
        opened = _open(study)
        path = opened.invite(site)
        hashes = {"plan_hash": opened.plan().hash, "code_hash": sha256(opened.code())}
        differs = opened.installed_code_differs()
    if as_json:
        _json({"site": site, "invitation": str(path), **hashes, "installed_code_differs": differs})
        return
    _say(str(path))
    _say("Tell the site these by another way than the file, by telephone for one:")
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

    with _plainly():
        opened = _open(study)
        registration.admit(opened, site, key)
        registered = _register(opened)
    if as_json:
        _json({"site": site, "admitted": True, "registered": registered})
        return
    _say(f"{site} is admitted{'' if registered else '; it will be registered when the SuperLink starts'}.")


@app.command()
def remove(site: SiteArgument, study: StudyOption = Path()) -> None:
    """Let a site connect no more.

    Example: semisam lead remove north --study atrium-study
    """
    from deployment.lead import registration

    with _plainly():
        opened = _open(study)
        registration.remove(opened, site)
        registered = _register(opened)
    _say(f"{site} is removed{'' if registered else '; it will be unregistered when the SuperLink starts'}.")


@app.command()
def code(
    study: StudyOption = Path(),
    update: Annotated[bool, typer.Option("--update", help="Make the code installed here the study's code.")] = False,
) -> None:
    """Show which code the study runs, or change it on purpose. Sites approve code by its hash.

    Example: semisam lead code --study atrium-study --update
    """
    from deployment.invitation import sha256

    with _plainly():
        opened = _open(study)
        if update:
            opened.update_code()
        kept, differs = sha256(opened.code()), opened.installed_code_differs()
    _say(f"code hash {kept}")
    if update:
        _say("Invite every site anew: each has to approve this code.")
    _tell_of_code(differs)


@app.command()
def start(
    study: StudyOption = Path(),
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, and log to the terminal; for systemd.")
    ] = False,
) -> None:
    """Start the server that sites connect to (Flower's SuperLink).

    Example: semisam lead start --study atrium-study
    """
    from deployment.lead import service

    with _plainly():
        opened = _open(study)
        if foreground:
            with contextlib.suppress(KeyboardInterrupt):  # to be told to end is how a service ends
                service.serve(opened, _announced(opened))
            return
        started = service.start(opened)
    _say(f"The SuperLink runs (process {started.pid}). Sites connect to {opened.settings.address}.")
    _say(f"Log: {service.log_file(opened)}")


@app.command()
def stop(
    study: StudyOption = Path(),
    run_only: Annotated[bool, typer.Option("--run", help="Stop the run in progress only.")] = False,
) -> None:
    """Stop the server and everything that it started. A run that is cut short goes on with `lead run --resume`.

    Example: semisam lead stop --study atrium-study
    """
    from deployment.lead import service

    with _plainly():
        opened = _open(study)
        if run_only:
            from deployment.lead.run import stop_runs

            stopped = stop_runs(opened)
            _say("\n".join(f"Stopped {folder}" for folder in stopped) or "No run was in progress.")
            return
        found = service.stop(opened)
    _say("The SuperLink has ended." if found else "The SuperLink did not run.")


@app.command()
def run(
    study: StudyOption = Path(),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that was cut short, or follow it.")
    ] = False,
    sites: Annotated[int | None, typer.Option(help="How many sites to wait for.", min=1)] = None,
) -> None:
    """Run the study and follow it to its end; exits with 0 only if it completed.

    Ctrl-C stops following, not the run.

    Example: semisam lead run --study atrium-study
    """
    from deployment.lead.run import new_run, resumed_run
    from deployment.lead.service import control_of
    from deployment.lead.status import stale_invitations

    with _plainly():
        opened = _open(study)
        with control_of(opened) as control:
            _tell_of_code(opened.installed_code_differs())
            if stale := stale_invitations(opened):
                _say(f"Invited to other plan, code or address than the study has now: {', '.join(stale)}.")
            begun = resumed_run(opened, control, sites, console) if resume else new_run(opened, control, sites)
            try:
                completed = begun.follow(control, console)
            except KeyboardInterrupt:
                _say(
                    "No longer following; the run goes on. `semisam lead run --resume` follows it again, "
                    "`semisam lead stop --run` stops it."
                )
                raise typer.Exit(130) from None
    if not completed:
        raise typer.Exit(1)


@app.command()
def status(study: StudyOption = Path(), as_json: JsonOption = False) -> None:
    """Show how the study stands: server, sites, run, what happened last.

    Example: semisam lead status --study atrium-study --json
    """
    from deployment.lead.status import status_of, status_view

    with _plainly():
        found = status_of(_open(study))
    if as_json:
        _json(found)
    else:
        console.print(status_view(found))


def _open(folder: Path) -> StudyFolder:
    from deployment.lead.study_folder import StudyFolder

    return StudyFolder.load(folder)


def _register(study: StudyFolder) -> bool:
    """Tell the SuperLink who is admitted now; return whether it runs."""
    from deployment.lead import registration, service

    if service.find(study) is None:
        return False
    with service.control_of(study) as control:
        registration.sync_registrations(study, control)
    return True


@contextlib.contextmanager
def _announced(study: StudyFolder) -> Iterator[None]:
    _say(f"The SuperLink runs. Sites connect to {study.settings.address}.")
    yield


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Turn an error that people are meant to read into one message and exit status 2."""
    try:
        yield
    except (SemiSAMError, OSError) as error:
        errors.print(str(error), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _tell_of_code(differs: bool) -> None:
    if differs:
        _say(
            "The code installed here is not the study's code, which is what runs. `semisam lead code --update` makes "
            "it the study's; every site has to approve it then."
        )


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2))
