"""What an import found and did, for the terminal. It names scans as the hospital knows them, and stays there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from intake.candidates import Candidate, Listing
from intake.guards import shown
from intake.importing import Outcome

_LONGEST = 60


def content(listing: Listing, outcomes: Sequence[Outcome] | None) -> dict[str, Any]:
    """Return everything as JSON; `outcomes` is None after a dry run."""
    return {
        "candidates": [each.model_dump(mode="json") for each in listing.candidates],
        "left_out": [{"what": shown(what, 4096), "reason": reason} for what, reason in listing.left_out],
        "outcomes": None if outcomes is None else [vars(each) | {"remarks": list(each.remarks)} for each in outcomes],
    }


def as_table(listing: Listing, outcomes: Sequence[Outcome] | None) -> Table:
    """Return one row for each scan, and one for each reason for leaving something out."""
    table = Table(box=None, header_style="bold", show_edge=False)
    for column in ("scan", "files", "label", "state", "remarks"):
        table.add_column(column, overflow="fold")
    for k, candidate in enumerate(listing.candidates):
        outcome = outcomes[k] if outcomes is not None else None
        labeled = candidate.label is not None if outcome is None else outcome.labeled
        remarks = candidate.notes if outcome is None else outcome.remarks
        name = outcome.case if outcome is not None else ""
        row = (
            f"{name} {_shown_scan(candidate)}".strip(),
            str(sum(len(each.paths) for each in candidate.channels)),
            "yes" if labeled else "no",
            "would be taken" if outcome is None else outcome.state,
            " ".join(shown(each) for each in remarks),
        )
        table.add_row(*map(Text, row))  # names may hold what rich takes for markup
    for reason, names in _by_reason(listing).items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        which = ", ".join(shown(name, _LONGEST) for name in names[:3]) + more
        table.add_row(*map(Text, (which, "", "", "left out", reason)))
    return table


def next_step(listing: Listing, outcomes: Sequence[Outcome] | None, out: Path) -> str:
    """Return what has been done, in sentences."""
    if not listing.candidates:
        return "\nNothing here can be taken."
    if outcomes is None:
        count = len(listing.candidates)
        return f"\n{count} scans would be taken. Nothing was written; leave out --dry-run to import them."
    done = [each for each in outcomes if each.state != "failed"]
    folder, labeled = out.resolve(), sum(each.labeled for each in done)
    return (
        f"\n{len(done)} scans are in {folder}, {labeled} of them with a label; "
        f"{len(outcomes) - len(done)} failed. {folder / 'private'} says whose they are and must stay here."
    )


def _shown_scan(candidate: Candidate) -> str:
    first = candidate.channels[0]
    return shown(candidate.scan if first.kind != "dicom" else Path(first.paths[0]).parent.name, _LONGEST)


def _by_reason(listing: Listing) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for what, reason in listing.left_out:
        found.setdefault(shown(reason), []).append(what)
    return found
