"""What the person who imports has chosen on the command line, checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from intake.candidates import Listing, Wishes
from intake.importing import PARTIAL, Settings
from intake.layouts import layout_of
from intake.manifest import LONGEST_NAME
from semisam_core.configuration import is_name
from semisam_core.errors import ConfigError
from semisam_core.plan import Plan, load_plan

Pattern = re.Pattern[str]


@dataclass(frozen=True)
class Choices:
    """How to look for scans, and how to convert them."""

    wishes: Wishes
    settings: Settings

    @classmethod
    def of(
        cls,
        plan: Path | None,
        classes: str | None,
        channels: list[str],
        spacing: str | None,
        partial_labels: str,
        patient: str | None,
        labels: Path | None,
        key: Path | None,
    ) -> Choices:
        """Check the options.

        Raises:
            ConfigError: one is invalid, or two contradict each other.
        """
        if plan is not None and classes is not None:
            raise ConfigError("--plan and --classes both name classes; give one of them.")
        if partial_labels not in PARTIAL:
            raise ConfigError(f"--partial-labels {partial_labels}: accepted are {', '.join(PARTIAL)}.")
        read = None if plan is None else load_plan(plan)
        named = _classes_of(read) if read is not None else None if classes is None else _classes(classes)
        patterns = channel_patterns(channels)
        if read is not None and (wanted := len(read.task.channels)) != max(1, len(patterns)):
            names = " ".join(f"--channel {name}=<what its series is called>" for name in read.task.channels)
            raise ConfigError(f"the plan has {wanted} channels; say which series is which: {names}.")
        wishes = Wishes(
            labels,
            dict(patterns),
            None if patient is None else _pattern("--patient", patient),
            tuple(named or ()) or None,
        )
        return cls(wishes, Settings(named, spacing_of(spacing), partial_labels, key))

    def find(self, source: Path, layout: str, progress: Callable[[int, int], None] | None = None) -> Listing:
        """List the scans of a folder.

        Raises:
            IntakeError: the folder, or what describes it, cannot be read.
        """
        return layout_of(source, layout).find(source, self.wishes, progress)


def _classes_of(plan: Plan) -> dict[str, int]:
    return {each.name: each.label_values[0] for each in plan.task.classes}


def _classes(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in text.split(","):
        name, separator, value = (each.strip() for each in part.partition("="))
        if not name or not separator or not value.isdecimal() or len(value) > 5:
            raise ConfigError(f"--classes {part.strip()}: name=value is expected, such as liver=1.")
        if not 0 < int(value) < 65536 or name in found or len(name) > LONGEST_NAME:
            raise ConfigError(
                f"--classes {part.strip()}: values are from 1 to 65535, each name is there once, with at most "
                f"{LONGEST_NAME} letters."
            )
        found[name] = int(value)
    if len(set(found.values())) < len(found):
        raise ConfigError("--classes: two classes have one value.")
    return found


def _channel(text: str) -> tuple[str, Pattern]:
    name, separator, pattern = text.partition("=")
    if not separator or not is_name(name):
        raise ConfigError(f"--channel {text}: name=pattern is expected, such as flair=FLAIR.")
    return name, _pattern("--channel", pattern)


def _pattern(option: str, text: str) -> Pattern:
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise ConfigError(f"{option} {text}: no regular expression ({error}).") from None


def channel_patterns(texts: list[str]) -> dict[str, Pattern]:
    """Return channel name -> pattern, from `name=pattern`.

    Raises:
        ConfigError: one is not of that form.
    """
    return dict(_channel(each) for each in texts)


def spacing_of(text: str | None) -> tuple[float, float, float] | None:
    """Return three lengths in mm from `1,1,3`; None for None.

    Raises:
        ConfigError: it is not of that form.
    """
    if text is None:
        return None
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError:
        x = y = z = 0.0
    if not all(0.05 <= side <= 20 for side in (x, y, z)):
        raise ConfigError(f"--spacing {text}: three lengths in mm from 0.05 to 20 are expected, such as 1,1,3.")
    return x, y, z
