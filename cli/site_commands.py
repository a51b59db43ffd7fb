"""`semisam site ...`: a hospital's commands, from the invitation to leaving the study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.errors import errors, readable_errors

app = typer.Typer(no_args_is_help=True, help="A hospital's side: join a study, check, approve code, work, leave.")
console = Console()

FolderOption = Annotated[Path, typer.Option("--folder", help="The site's folder, created by `semisam site init`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
HERE = Path()


@app.command()
def init(
    invitation: Annotated[Path, typer.Argument(help="The invitation that the lead sent.")],
    folder: Annotated[Path | None, typer.Option(help="Folder to create; <study>-<site> by default.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of this site's images.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Folder of this site's labels.")] = None,
) -> None:
    """Create this site's folder: its key pair, a YAML to fill in, the plan, the server's certificate.

    Example: semisam site init north.invitation.zip --images /data/ct --labels /data/masks
    """
    with readable_errors():
        from deployment.invitation import read_invitation
        from deployment.site.join import join

        read = read_invitation(invitation)
        joined = join(read, folder or Path(f"{read.study}-{read.site}"), images, labels)
        place = joined.folder
        say = f"cd {place.path}"
        console.print(f"Site {read.site} of study {read.study}: {place.path}", highlight=False, soft_wrap=True)
        console.print("\nSend this public key to the lead, in a way that proves it is yours:", highlight=False)
        console.print(joined.public_key, markup=False, highlight=False, soft_wrap=True)
        console.print(f"It is also in {place.public_key}. The private key stays here.", highlight=False, soft_wrap=True)
        for name in joined.lacking:
            console.print(
                f"\nThe plan uses {name}, whose weights are not here; `semisam generalists` says where they are"
            )
            console.print(
                "published. The study works without it; to use it, name the file and its sha256 in site.yaml."
            )
        console.print(f"\nNext:\n  {say}", highlight=False, soft_wrap=True)
        console.print("  edit site.yaml: folders of images and labels, which cases are labeled", highlight=False)
        console.print("  semisam site manifest: what would leave", highlight=False)
        console.print(f"  semisam site approve {invitation.resolve()}", highlight=False, soft_wrap=True)
        console.print("  semisam site doctor\n  semisam site start", highlight=False)


@app.command()
def approve(
    code: Annotated[Path | None, typer.Argument(help="An invitation (.zip) or code alone (.fab).")] = None,
    folder: FolderOption = HERE,
    yes: YesOption = False,
    diff: Annotated[bool, typer.Option("--diff", help="Print every changed line.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="List approved code.")] = False,
    revoke: Annotated[str | None, typer.Option(help="Revoke the approval of this hash.")] = None,
) -> None:
    """Show the code that would run here and how it differs from what was approved last; keep it if you agree.

    Example: semisam site approve north.invitation.zip --diff
    """
    with readable_errors():
        from deployment.site.code_review import approve as keep
        from deployment.site.code_review import read_offer, show_offer
        from deployment.site.site_folder import SiteFolder, book

        site = SiteFolder.at(folder)
        config = site.config()
        store = site.code(config)
        if show_list:
            for entry in store.approvals():
                state = f"revoked {entry.revoked}" if entry.revoked else "approved"
                console.print(f"{entry.hash}  {entry.approved}  {state}", highlight=False, soft_wrap=True)
            return
        if revoke is not None:
            revoked = store.revoke(revoke)
            book(config, "revoke", code=revoked.hash)
            console.print(f"Code {revoked.hash} will no longer run here.", highlight=False, soft_wrap=True)
            return
        if code is None:
            raise typer.BadParameter("name an invitation or a .fab file, or use --list or --revoke.")
        offer = read_offer(code)
        show_offer(offer, site, store, console, diff)
        if not yes and not typer.confirm("May this code work on this site's scans and labels?"):
            console.print("Nothing was approved.")
            raise typer.Exit(1)
        keep(offer, site, config, store)
        console.print("Approved. A running site takes up a new plan when it is restarted.")


@app.command()
def manifest(folder: FolderOption = HERE, as_json: JsonOption = False) -> None:
    """Print all that would leave this site, per round and over the whole study. `approve` covers its hash.

    Example: semisam site manifest --folder atrium-north
    """
    with readable_errors():
        from client.manifest import manifest_of
        from deployment.site.manifest_view import show_manifest
        from deployment.site.site_folder import SiteFolder

        site = SiteFolder.at(folder)
        listed = manifest_of(site.config(), site.plan())
        if as_json:
            typer.echo(json.dumps(listed.as_json() | {"hash": listed.hash}, indent=2, ensure_ascii=False))
        else:
            show_manifest(listed, console)


@app.command()
def doctor(
    folder: FolderOption = HERE,
    as_json: JsonOption = False,
    data: Annotated[bool, typer.Option(help="Read every scan and label.")] = True,
    server: Annotated[bool, typer.Option(help="Connect to the server.")] = True,
) -> None:
    """Check everything that could fail before it does. The exit status is 1 if something would.

    Example: semisam site doctor --folder atrium-north
    """
    with readable_errors():
        from deployment.site.doctor import examine, print_findings, worst
        from deployment.site.site_folder import SiteFolder

        findings = examine(SiteFolder.at(folder), errors, data, server)
        if as_json:
            typer.echo(json.dumps([finding.as_json() for finding in findings], indent=2, ensure_ascii=False))
        else:
            print_findings(findings, console)
    if worst(findings):
        raise typer.Exit(1)


@app.command()
def start(
    folder: FolderOption = HERE,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay in the foreground, as for systemd.")] = False,
) -> None:
    """Connect to the server and work, in the background, until `semisam site stop`.

    Example: semisam site start --folder atrium-north
    """
    with readable_errors():
        from deployment.site.lifecycle import check_startable
        from deployment.site.lifecycle import start as start_site
        from deployment.site.site_folder import SiteFolder

        site = SiteFolder.at(folder)
        if foreground:
            from deployment.site.supervisor import work_here

            check_startable(site)
            work_here(site)
            return
        found = start_site(site)
        connected = "connected to the server" if found.connected else "not connected to the server yet"
        console.print(f"The site is running (process {found.process.pid}), {connected}.", highlight=False)
        if not found.connected:
            log = site.running / "supernode.log"
            console.print(f"`semisam site doctor` and {log} say why.", highlight=False, soft_wrap=True)


@app.command()
def stop(folder: FolderOption = HERE) -> None:
    """Stop the site and all its processes. Its work on the current round is lost; it can take part in the next.

    Example: semisam site stop --folder atrium-north
    """
    with readable_errors():
        from deployment.site.lifecycle import stop as stop_site
        from deployment.site.site_folder import SiteFolder

        stopped = stop_site(SiteFolder.at(folder))
        console.print("The site has stopped." if stopped else "The site was not running.")


@app.command()
def status(folder: FolderOption = HERE, as_json: JsonOption = False) -> None:
    """Show whether the site runs and is connected, what it answered, what left it, which code is approved.

    Example: semisam site status --folder atrium-north --json
    """
    with readable_errors():
        from deployment.site.site_folder import SiteFolder
        from deployment.site.status import print_status, site_status

        found = site_status(SiteFolder.at(folder))
        if as_json:
            typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
        else:
            print_status(found, console)


@app.command()
def privacy(folder: FolderOption = HERE, as_json: JsonOption = False) -> None:
    """Show what was spent of the patients' privacy, per round and in total over all studies, and what that means.

    Example: semisam site privacy --folder atrium-north
    """
    with readable_errors():
        from deployment.site.privacy import print_privacy, site_privacy
        from deployment.site.site_folder import SiteFolder

        site = SiteFolder.at(folder)
        report = site_privacy(site.config(), site.plan())
        if as_json:
            typer.echo(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
        else:
            print_privacy(report, console)


@app.command()
def report(
    folder: FolderOption = HERE,
    site: Annotated[Path | None, typer.Option(help="The site's YAML; by default site.yaml of the folder.")] = None,
    plan: Annotated[Path | None, typer.Option(help="The run's plan; by default plan.yaml of the folder.")] = None,
    run: Annotated[str | None, typer.Option(help="The run's name; by default the plan's last.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Show this scan, not the worst ones. Repeatable.")] = None,
    viewer: Annotated[bool, typer.Option("--viewer", help="Also write a page with these scans in 3D.")] = False,
) -> None:
    """Write a report with pictures of single scans, the worst first. It stays at this site.

    Example: semisam site report --folder atrium-north
    """
    with readable_errors():
        from client.site_config import load_site_config
        from reports.site.report import write_site_report
        from semisam_core.plan import load_plan

        config, study = load_site_config(site or folder / "site.yaml"), load_plan(plan or folder / "plan.yaml")
        path = write_site_report(config, study, run, case or [], viewer)
    console.print(f"The report stays at this site: {path}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def withdraw(
    folder: FolderOption = HERE,
    yes: YesOption = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take part again.")] = False,
) -> None:
    """Leave the study: stop, and refuse to start again until undone. Earlier contributions remain in the models.

    Example: semisam site withdraw --folder atrium-north
    """
    with readable_errors():
        from deployment.site.lifecycle import withdraw as leave
        from deployment.site.site_folder import SiteFolder, book

        site = SiteFolder.at(folder)
        if undo:
            if not site.withdrawn_file.exists():
                console.print("This site has not withdrawn.")
                return
            book(site.config(), "withdraw-undone")
            site.withdrawn_file.unlink()
            console.print("This site can take part again: `semisam site start`.")
            return
        if not yes and not typer.confirm("Leave the study and stop this site?"):
            raise typer.Exit(1)
        leave(site)  # first: a broken YAML or a full disk must not keep a site from leaving
        config = site.config()
        book(config, "withdraw")
        console.print("This site has withdrawn and has stopped. Tell the lead, who can remove its key.")
        console.print(
            "What it contributed to earlier rounds is in the study's models and records and cannot be removed."
        )
        console.print(f"Still on this machine: {site.path} (key, plan, logs) and", soft_wrap=True)
        console.print(f"{config.storage.folder} (audit log, teachers, pseudo-labels, embeddings, prepared scans,")
        console.print("approved code). Keep audit.jsonl and the other audit files; the rest can be deleted.")
