"""The audit log for a data-protection officer: what left and when, without what was written for this site's staff."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from client.audit_check import AuditCheck, check_log, read_entries
from client.audit_log import AuditLog
from semisam_core.errors import ConfigError
from semisam_core.files import utc_stamp, write_atomically
from semisam_core.text import printable

KEPT_HERE = "reason_kept_here"  # may name files, cases and paths
COLUMNS = ("number", "time", "kind", "run", "round", "plan", "refused", "tensors", "bytes", "sha256", "scalars")
OF_STAFF = ("approve", "revoke", "withdraw", "withdraw-undone")


def export_log(log: AuditLog, site: str, out: Path, seal: str | None = None) -> AuditCheck:
    """Check a log and write it to a new folder: `audit.json`, `audit.csv`, and `summary.txt` to read.

    Reasons for refusals, which may name files and cases, are left out.

    Args:
        log: the log.
        site: the site's name.
        out: the folder.
        seal: of an earlier check, which the log must continue.

    Raises:
        ConfigError: the folder has files already, or the seal is none.
        OSError: the log cannot be read, or the folder cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists already and was not changed. Give another --out.")
    check = check_log(log, seal)
    entries = [{key: value for key, value in each.items() if key != KEPT_HERE} for each in read_entries(log)]
    checked = {"problems": check.problems, "notes": check.notes, "seal": check.seal}
    content = {"site": site, "exported": utc_stamp(), "check": checked, "entries": entries}
    write_atomically(out / "audit.json", (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    write_atomically(out / "audit.csv", _table(entries).encode())
    write_atomically(out / "summary.txt", _summary(site, entries, check).encode())
    return check


def said_of(check: AuditCheck) -> list[str]:
    """Return a check's outcome in sentences."""
    outcome = "The log is not as it was written." if check.problems else "The log is whole."
    return [
        f"{outcome} {check.entries} entries in {check.files} files.",
        *(f"Problem: {printable(each)}" for each in check.problems),
        *(f"Note: {printable(each)}" for each in check.notes),
        f"Seal: {check.seal}",
        "Keep the seal where nobody who can write to this machine can change it. `semisam site audit verify --seal` "
        "then shows whether the log up to here was replaced.",
    ]


def _table(entries: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in entries:
        writer.writerow([_cell(entry.get(key, "")) for key in COLUMNS])
    return buffer.getvalue()


def _cell(value: object) -> str:
    """Return a value for a spreadsheet, which must not take it for a formula."""
    text = " ".join(f"{name}={each}" for name, each in value.items()) if isinstance(value, Mapping) else str(value)
    text = printable(text)
    return f"'{text}" if text[:1] in tuple("=+-@") and not isinstance(value, int | float) else text


def _summary(site: str, entries: Sequence[Mapping[str, Any]], check: AuditCheck) -> str:
    lines = [f"Audit log of site {site}, exported {utc_stamp()}", "", *said_of(check), ""]
    replies = [each for each in entries if "scalars" in each]
    refused = [each for each in entries if "refused" in each]
    size = sum(int(each.get("bytes", 0)) for each in replies)
    lines += [
        f"Left this site: {len(replies)} replies with {size} bytes of tensors, and {len(refused)} refusals of one "
        "word. Beside numbers and tensors, a reply has the site's name, the round, the plan's hash and, if there is "
        "one, the keyed hash of the split.",
        "",
    ]
    for run in dict.fromkeys(str(each.get("run", "")) for each in [*replies, *refused]):
        lines += [f"Run {printable(run)}" if run else "Outside of runs", ""]
        for each in entries:
            if str(each.get("run", "")) == run and ("scalars" in each or "refused" in each):
                lines += _message(each)
        lines.append("")
    decisions = [each for each in entries if each.get("kind") in OF_STAFF]
    lines += ["Decisions of this site's staff", "", *(_decision(each) for each in decisions)]
    return "\n".join(lines) + "\n"


def _message(entry: Mapping[str, Any]) -> list[str]:
    head = f"  {entry.get('time')} {entry.get('kind')}, round {entry.get('round')}: "
    if "refused" in entry:
        return [printable(f"{head}refused, {entry['refused']}")]
    scalars = entry["scalars"] if isinstance(entry["scalars"], Mapping) else {}
    lines = [
        printable(f"{head}{len(scalars)} numbers, {entry.get('bytes', 0)} bytes in {entry.get('tensors', 0)} tensors")
    ]
    if "sha256" in entry:
        lines.append(printable(f"    SHA-256 of the tensors {entry['sha256']}"))
    if scalars:
        lines.append(printable("    " + ", ".join(f"{name} {value}" for name, value in sorted(scalars.items()))))
    return lines


def _decision(entry: Mapping[str, Any]) -> str:
    about = ", ".join(f"{key} {entry[key]}" for key in ("code", "plan", "manifest") if entry.get(key))
    return printable(f"  {entry.get('time')} {entry.get('kind')} {about}".rstrip())
