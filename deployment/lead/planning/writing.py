"""Write a derived plan as YAML, each decided key with its reason above it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

from deployment.lead.planning.derive import Proposal
from semisam_core.files import write_atomically

WIDTH = 110


def write_proposal(path: Path, proposal: Proposal, remarks: Sequence[str]) -> None:
    """Write the plan; the same proposal gives the same bytes.

    Args:
        path: the file.
        proposal: plan and reasons.
        remarks: sentences for the head of the file.
    """
    text = yaml.safe_dump(proposal.plan.model_dump(mode="json"), sort_keys=False, width=WIDTH, default_flow_style=None)
    head = ["Derived from the sites' fingerprints. Review it before the study begins.", *remarks]
    lines = [line for each in head for line in _comment(each, 0)]
    path_of: list[str] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.lstrip().startswith("-") and ":" in line and indent % 2 == 0:
            path_of = [*path_of[: indent // 2], line.strip().partition(":")[0]]
            if (reason := proposal.reasons.get(tuple(path_of))) is not None:
                lines += _comment(reason, indent)
        lines.append(line)
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _comment(text: str, indent: int) -> list[str]:
    prefix = " " * indent + "# "
    return textwrap.wrap(text, WIDTH, initial_indent=prefix, subsequent_indent=prefix)
