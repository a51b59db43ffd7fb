"""How a command ends when something goes wrong: one sentence on standard error, and an exit status."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console

from semisam_core.errors import SemiSAMError

MISTAKE, INTERRUPTED = 2, 130

errors = Console(stderr=True)


@contextlib.contextmanager
def readable_errors(when_interrupted: str = "") -> Iterator[None]:
    """Turn errors that are meant for people, and Ctrl-C, into one message and an exit status.

    Args:
        when_interrupted: what a person should know after Ctrl-C, such as how to resume.

    Raises:
        typer.Exit: with 2 after a SemiSAMError or an OSError, with 130 after Ctrl-C.
    """
    try:
        yield
    except SemiSAMError as error:
        _say(str(error))
        raise typer.Exit(MISTAKE) from None
    except OSError as error:
        reason = error.strerror or str(error)
        _say(f"{error.filename}: {reason}." if error.filename else reason)
        raise typer.Exit(MISTAKE) from None
    except KeyboardInterrupt:
        _say(f"Interrupted. {when_interrupted}".rstrip())
        raise typer.Exit(INTERRUPTED) from None


def _say(text: str) -> None:
    """Print a message; what it quotes from a file may not steer the terminal."""
    text = "".join(each if each.isprintable() or each == "\n" else f"\\x{ord(each):02x}" for each in text)
    errors.print(text, highlight=False, markup=False, soft_wrap=True)
