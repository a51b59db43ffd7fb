"""The state of the study: server, sites, run, latest events."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from deployment.certificates import expiry
from deployment.invitation import InvitationError, read_invitation, sha256
from deployment.lead.registration import admitted_keys
from deployment.lead.run import last_run
from deployment.lead.service import control_of, find
from deployment.lead.study_folder import StudyFolder, invitation_differs
from engines.flower_control import FlowerControl, FlowerError, FlowerNode
from engines.run_state import run_reason, run_state
from engines.tables import FittingTable
from semisam_core.files import read_json_lines
from server.events import Narrator

LAST_EVENTS = 10
RESUME = "`semisam lead run --resume`"
EXPIRES_SOON = datetime.timedelta(days=30)


def status_of(study: StudyFolder) -> dict[str, Any]:
    """Return the state of everything as plain values, for `--json`."""
    service = find(study)
    nodes: list[FlowerNode] | None = None
    active: list[Path] = []
    problem = ""
    if service is not None:
        try:
            with control_of(study) as control:
                nodes, active = control.nodes(), _active_folders(control)
        except FlowerError as error:
            problem = str(error)
    return {
        "study": study.settings.name,
        "plan_hash": study.plan().hash,
        "code_hash": sha256(study.code()),
        "installed_code_differs": study.installed_code_differs(),
        "certificate_ends": expiry(study.ca).isoformat(timespec="seconds"),
        "superlink": {
            "running": service is not None,
            "pid": service.pid if service else None,
            "address": study.settings.address,
            "control_address": study.settings.control_address,
            "problem": problem,
        },
        "sites": _sites(study, nodes),
        "run": _run(study, active, served=service is not None, known=service is None or nodes is not None),
    }


def status_view(status: dict[str, Any], with_run: bool = True) -> RenderableType:
    """Return a status as a terminal shows it.

    Args:
        status: what `status_of` returned.
        with_run: whether the run and its latest events are included.
    """
    link = status["superlink"]
    up = f"is running (process {link['pid']})" if link["running"] else "is not running; `semisam lead start` starts it"
    lines = [
        f"Study {status['study']}: the SuperLink {up}",
        f"Sites connect to {link['address']}, the lead's commands to {link['control_address']}",
        f"plan hash {status['plan_hash']}",
        f"code hash {status['code_hash']}",
    ]
    if link["problem"]:
        lines.append(f"The SuperLink does not answer: {link['problem']}")
    if status["installed_code_differs"]:
        lines.append("The installed code differs from the study's code, which is what runs; see `semisam lead code`.")
    ends = datetime.datetime.fromisoformat(status["certificate_ends"])
    if ends - datetime.datetime.now(datetime.UTC) < EXPIRES_SOON:
        lines.append(f"The certificates expire on {ends:%Y-%m-%d}; sites cannot connect afterwards.")
    run = status["run"] if with_run else None
    if run is not None:
        done = f", round {run['round']} of {run['rounds']}" if run["rounds"] else ""
        lines.append(f"Run {run['folder']}: {run['state']}{done}. {run['reason']}".rstrip())
    events = [Text(f"  {event}") for event in (run["events"] if run else [])]
    return Group(Text("\n".join(lines)), _sites_table(status["sites"]), *events)


def stale_invitations(study: StudyFolder) -> list[str]:
    """Return the sites whose invitation names another plan, code or address than the study has now."""
    stale = []
    for path in sorted(study.invitations.glob("*.invitation.zip")):
        try:
            invitation = read_invitation(path)
        except InvitationError:
            continue  # not written by this study
        if invitation_differs(study, invitation):
            stale.append(invitation.site)
    return stale


def _active_folders(control: FlowerControl) -> list[Path]:
    return [Path(str(run.config.get("run-folder", ""))) for run in control.unfinished_runs()]


def _sites(study: StudyFolder, nodes: Sequence[FlowerNode] | None) -> list[dict[str, Any]]:
    invited = {path.name.removesuffix(".invitation.zip") for path in study.invitations.glob("*.invitation.zip")}
    stale, keys = set(stale_invitations(study)), admitted_keys(study)
    known = {node.name: node.status for node in nodes or []}
    return [
        {
            "site": site,
            "invited": site in invited,
            "invitation_is_stale": site in stale,
            "admitted": site in keys,
            "connection": "unknown" if nodes is None else known.get(site, "not registered"),
        }
        for site in sorted({*invited, *keys, *known})
    ]


def _sites_table(sites: Sequence[dict[str, Any]]) -> FittingTable:
    table = FittingTable("site", "invited", "admitted", "connection")
    for site in sites:
        invited = "to another plan, code or address" if site["invitation_is_stale"] else _yes(site["invited"])
        table.add(site["site"], invited, _yes(site["admitted"]), site["connection"])
    return table


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _run(study: StudyFolder, active: Sequence[Path], served: bool, known: bool) -> dict[str, Any] | None:
    folder = active[-1] if active and active[-1].parent == study.runs else last_run(study)
    if folder is None:
        return None
    state, reason = run_state(folder), ""
    if folder in active:
        state = "starting" if state == "not started" else state
    elif state in ("running", "not started"):
        # No process works on the run any more, so what it last wrote no longer holds.
        state = "cut short" if known else "unknown"
        first = "" if served else "`semisam lead start`, then "
        reason = f"{first}{RESUME} continues it." if known else "The SuperLink does not answer."
    if state == "failed":
        reason = run_reason(folder)
    lines = read_json_lines(folder / "metrics.jsonl")
    rounds = [line for line in lines if line.get("event") == "aggregated"]
    narrator = Narrator()
    said = [text for line in lines if (text := narrator.describe(line)) is not None]
    return {
        "folder": str(folder),
        "state": state,
        "reason": reason,
        "round": rounds[-1]["round"] if rounds else 0,
        "rounds": rounds[-1]["rounds"] if rounds else None,
        "events": said[-LAST_EVENTS:],
    }
