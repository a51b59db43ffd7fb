"""Findings of a check: ok, warning or problem, each with what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


class Level(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """The result of one check. It is printed at the site and never sent.

    Attributes:
        level: its severity.
        subject: what was checked.
        sentence: what was found, and what to do about it.
    """

    level: Level
    subject: str
    sentence: str

    def as_json(self) -> dict[str, str]:
        """Return plain values."""
        return asdict(self)


def fine(subject: str, sentence: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(Level.OK, subject, sentence)


def warning(subject: str, sentence: str) -> Finding:
    """Return a finding that lets the site work, but perhaps not as intended."""
    return Finding(Level.WARNING, subject, sentence)


def problem(subject: str, sentence: str) -> Finding:
    """Return a finding that would make the site fail."""
    return Finding(Level.PROBLEM, subject, sentence)
