"""A site's status: running, connected, what it answered and what left it, read from files on its own disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from client.audit_check import read_entries
from deployment.site.lifecycle import running
from deployment.site.site_folder import SiteFolder, audit_log
from engines.tables import FittingTable
from semisam_core.contract import Stage
from semisam_core.text import printable

ANSWERS = ("join", "train", "evaluate", *(stage.value for stage in Stage))
SHOWN = 8


@dataclass(frozen=True)
class SiteStatus:
    """A snapshot of a site.

    Attributes:
        running: whether its supervisor is alive.
        connected: whether its SuperNode is connected to the server.
        supernode_starts: number of SuperNode starts since `semisam site start`.
        withdrawn: whether it has withdrawn from the study.
        approved: hashes of approved code.
        answered: kind -> number of answers that left.
        refused: rule -> number of messages refused.
        updates_bytes: total bytes of the specialist's tensors that left.
        last: the last entries of the audit log.
    """

    site: str
    study: str
    server: str
    running: bool
    connected: bool
    supernode_starts: int
    withdrawn: bool
    approved: list[str]
    answered: dict[str, int]
    refused: dict[str, int]
    updates_bytes: int
    last: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)


def site_status(folder: SiteFolder) -> SiteStatus:
    """Return the site's status.

    Raises:
        ConfigError: a file of the site is wrong.
    """
    config, deployment = folder.config(), folder.deployment()
    entries = list(read_entries(audit_log(config)))
    sent = [entry for entry in entries if entry.get("kind") in ANSWERS and "refused" not in entry]
    found = running(folder)
    return SiteStatus(
        site=deployment.site,
        study=deployment.study,
        server=deployment.address,
        running=found is not None,
        connected=found is not None and found.connected,
        supernode_starts=int(found.status.get("supernode_starts", 0)) if found is not None else 0,
        withdrawn=folder.withdrawn_file.exists(),
        approved=[entry.hash for entry in folder.code(config).approved()],
        answered=dict(Counter(str(entry["kind"]) for entry in sent)),
        refused=dict(Counter(str(entry["refused"]) for entry in entries if "refused" in entry)),
        updates_bytes=sum(int(entry.get("bytes", 0)) for entry in sent),
        last=entries[-SHOWN:],
    )


def print_status(status: SiteStatus, console: Console) -> None:
    """Print a site's status."""
    state = "running" if status.running else "not running"
    if status.running:
        state += (
            ", connected"
            if status.connected
            else ", not connected; see `semisam site doctor` and running/supernode.log"
        )
    if status.withdrawn:
        state += ", withdrawn from the study"
    console.print(f"{status.site} of {status.study} at {status.server}: {state}", markup=False, highlight=False)
    if status.supernode_starts > 1:
        console.print(f"The SuperNode was started {status.supernode_starts} times.", highlight=False)
    console.print(f"approved code: {', '.join(h[:12] for h in status.approved) or 'none'}", highlight=False)
    counts = ", ".join(f"{kind} {number}" for kind, number in status.answered.items()) or "nothing yet"
    console.print(f"left this site: {counts}; {status.updates_bytes / 1e6:.1f} MB of updates", highlight=False)
    if status.refused:
        refused = ", ".join(f"{rule} {number}" for rule, number in status.refused.items())
        console.print(f"refused: {refused}", markup=False, highlight=False)
    if status.last:
        table = FittingTable("time", "kind", "run", "round", "what")
        for entry in status.last:
            what = _what(entry)
            cells = [str(entry.get(key, "")) for key in ("time", "kind", "run", "round")]
            table.add(*(printable(cell) for cell in (*cells, what)))
        console.print(table)


def _what(entry: dict[str, Any]) -> str:
    if "refused" in entry:
        return f"refused: {entry['refused']}"
    if "code" in entry:
        return f"code {str(entry['code'])[:12]}"
    if "bytes" in entry:
        return f"{int(entry['bytes']) / 1e6:.1f} MB, {len(entry.get('scalars', {}))} numbers"
    return f"{len(entry['scalars'])} numbers" if "scalars" in entry else ""
