"""`semisam site fingerprint` and `semisam lead plan`: from the sites' data to one plan for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from cli.errors import errors, readable_errors

console = Console()


def fingerprint(
    site: Annotated[Path, typer.Argument(help="The site's YAML.")],
    plan: Annotated[Path, typer.Option(help="A draft of the plan: its classes and channels matter.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file for the lead.")],
) -> None:
    """Write rounded aggregates over this site's patients, from which the lead derives a plan. Read it before sending.

    Nothing of fewer patients than egress.minimum_patients is in it; it is logged in audit.jsonl like all that leaves.

    Example: semisam site fingerprint site.yaml --plan draft.yaml -o north.fingerprint.json
    """
    with readable_errors(), Progress(console=errors, transient=True) as bar:
        from client.fingerprint import said_of_patients, write_fingerprint
        from client.site_config import load_site_config
        from semisam_core.data.patients import read_patients
        from semisam_core.plan import load_plan

        task = bar.add_task("reading scans", total=None)
        config = load_site_config(site)
        patients = read_patients(config.data.images)
        if patients is None:
            errors.print(said_of_patients(config), highlight=False, markup=False, soft_wrap=True)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        content: Any = write_fingerprint(config, load_plan(plan), out, patients or {}, show)
    console.print_json(json.dumps(content["fingerprint"]))
    if not content["fingerprint"]["patients"]:
        console.print(
            f"Fewer than {config.egress.minimum_patients} patients (egress.minimum_patients) could be read, apart from "
            "those for validation; so nothing is said about them.",
            soft_wrap=True,
        )
    console.print(f"{out}: this is all that it says.", highlight=False, markup=False, soft_wrap=True)


def derive_plan(
    fingerprints: Annotated[list[Path], typer.Argument(help="The sites' files.")],
    draft: Annotated[Path, typer.Option(help="A plan; what the data does not decide is kept.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan to write.")],
    memory_gb: Annotated[float, typer.Option(help="Memory that a training step may take.", min=0.1)] = 8.0,
) -> None:
    """Derive one plan for all sites from their fingerprints, with reasons, and say whose scans are unlike the others'.

    Example: semisam lead plan *.fingerprint.json --draft draft.yaml -o plan.yaml
    """
    with readable_errors():
        from deployment.lead.planning.derive import derive
        from deployment.lead.planning.fingerprints import outliers, read_fingerprints
        from deployment.lead.planning.writing import write_proposal
        from semisam_core.plan import load_plan

        read = load_plan(draft)
        sites = read_fingerprints(fingerprints, read.task)
        with errors.status("measuring networks"):
            proposal, unlike = derive(read, sites, memory_gb), outliers(sites, read.task)
        write_proposal(out, proposal, unlike)
    for keys, reason in proposal.reasons.items():
        console.print(f"{'.'.join(keys)}: {reason}", highlight=False, markup=False, soft_wrap=True)
    for sentence in unlike:
        console.print(f"Unlike the others: {sentence}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{out}: review it, then give it to `semisam lead init --plan`.", highlight=False, soft_wrap=True)
