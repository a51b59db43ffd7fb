"""The reference of the `semisam` command, from its own help."""

from __future__ import annotations

import html
from collections.abc import Iterator

import click
import typer.main

from cli.main import app


def command_reference() -> str:
    """Return every command with its options, as Markdown."""
    return "\n".join(line for name, command in commands() for line in _section(name, command))


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its whole name, as `semisam lead init`; groups and hidden ones are left out."""
    yield from _below("semisam", typer.main.get_command(app))


def _below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for each in sorted(command.commands):
        if not command.commands[each].hidden:
            yield from _below(f"{name} {each}", command.commands[each])


def _section(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    usage = command.get_usage(context).removeprefix("Usage: ")
    yield from (f"## {name}", "", command.help or "", "", f"```\n{usage}\n```", "")
    parameters = [each for each in command.get_params(context) if each.name != "help"]
    rows = [record for each in parameters if (record := each.get_help_record(context)) is not None]
    if rows:
        yield from ("| option | |", "| --- | --- |")
        for option, text in rows:
            yield f"| `{_cell(option)}` | {_cell(text)} |"
        yield ""


def _cell(text: str) -> str:
    return html.escape(" ".join(text.split()).replace("\\[", "["), quote=False).replace("|", "\\|")
