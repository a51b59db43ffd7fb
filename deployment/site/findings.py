"""What a check found: fine, a warning, or a problem, always with what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. It is printed at the site and never sent.

    Attributes:
        level: how bad it is.
        subject: what was looked at.
        sentence: what was found, and what to do about it.
    """

    level: Level
    subject: str
    sentence: str

    def as_json(self) -> dict[str, str]:
        """Return plain values."""
        return asdict(self)


def fine(subject: str, sentence: str) -> Finding:
    """Return a finding that needs nothing done."""
    return Finding(Level.OK, subject, sentence)


def warning(subject: str, sentence: str) -> Finding:
    """Return a finding with which the site works, but perhaps not as meant."""
    return Finding(Level.WARNING, subject, sentence)


def problem(subject: str, sentence: str) -> Finding:
    """Return a finding with which the site would fail."""
    return Finding(Level.PROBLEM, subject, sentence)
