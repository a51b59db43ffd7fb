"""Every message on the troubleshooting page is one that the code has, and every word that parties send is explained."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from semisam_core.contract import RefusalRule, RejectionRule
from semisam_core.prompting import Refusal

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("semisam_core", "client", "server", "engines", "deployment", "experiments", "intake", "release", "cli")
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
LEFT_OUT = "…"
LEAST_FIXED = 12  # letters of a quoted message that must be in the code


def _sections() -> dict[str, str]:
    return {part.partition("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}


def _first_cells(section: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", _sections()[section], re.MULTILINE)


MESSAGES = [
    message for section in _sections() if "| message |" in _sections()[section] for message in _first_cells(section)
]


@cache
def _texts() -> tuple[str, ...]:
    """Return every text in the code, what is filled in replaced by an ellipsis."""
    return tuple(
        text
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        for text in _texts_of(ast.parse(path.read_text(encoding="utf-8")))
    )


def _texts_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(each.value) if isinstance(each, ast.Constant) else LEFT_OUT for each in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _in_the_code(message: str) -> bool:
    parts = [part for part in message.split(LEFT_OUT) if part]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return sum(map(len, parts)) >= LEAST_FIXED and any(pattern.search(text) for text in _texts())


def test_there_are_messages_of_every_kind() -> None:
    assert len(MESSAGES) > 45


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_in_the_code(message: str) -> None:
    assert _in_the_code(message)


@pytest.mark.parametrize("message", ["…: the scan is upside down.", "… (…) …", "this key is required and lacking."])
def test_a_message_that_the_code_does_not_have_is_caught(message: str) -> None:
    assert not _in_the_code(message)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("Words that a site sends", RefusalRule),
        ("Words that the server sends", RejectionRule),
        ("Why there is no pseudo-label", Refusal),
    ],
)
def test_every_word_is_explained_and_no_other(section: str, words: type[RefusalRule | RejectionRule | Refusal]) -> None:
    assert _first_cells(section) == [word.value for word in words]
