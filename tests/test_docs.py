"""Commands on the pages exist with their options, links lead to files, and claims of privacy name tests that exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

from cli.main import app
from client.site_config import Egress, PrivacyLimits
from semisam_core.plan import load_plan

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SERVICES = sorted((ROOT / "docs" / "deploy").iterdir())
FENCED = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}.+", re.MULTILINE)
INLINE = re.compile(r"`(semisam [^`]+)`", re.DOTALL)
SERVICE = re.compile(r"bin/(semisam [^\n]+)")
ROW = re.compile(r"^\| (?!mechanism|---)([^|]+?) \| ([^|]+?) \|(?: ([^|]+?) \|)?$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def _commands(text: str) -> Iterator[str]:
    """Yield the commands on a page, continued lines joined."""
    blocks = [*FENCED.findall(text), "\n".join(INDENTED.findall(text))]
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            before, found, rest = line.partition("semisam ")
            if found and re.fullmatch(r"\s*((sudo|docker exec \S+)( -u \S+)?\s+)?", before):
                yield found + rest
    for command in INLINE.findall(text):
        yield " ".join(command.split())


def _mistake(command: str) -> str | None:
    """Return what is wrong with a command's sub-commands and options, or None."""
    words = [word for word in shlex.split(command.replace("...", ""), comments=True)[1:] if word]
    found: click.Command = typer.main.get_command(app)
    while isinstance(found, click.Group) and words:
        if words[0].startswith("-"):
            return f"the option {words[0]} comes before the command"
        name = words.pop(0)
        if name not in found.commands:
            return f"there is no command {name}"
        found = found.commands[name]
    known = {"--help"} | {
        option
        for each in found.params
        for option in (*each.opts, *each.secondary_opts)
        if each.param_type_name == "option"
    }
    wrong = [word for word in words if word.startswith("-") and word.split("=")[0] not in known]
    return f"it has no option {wrong[0]}" if wrong else None


def _cases(paths: list[Path]) -> list[tuple[str, str]]:
    found = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        commands = _commands(text) if path.suffix == ".md" else SERVICE.findall(text)
        found += [(str(path.relative_to(ROOT)), command) for command in commands]
    return found


@pytest.mark.parametrize("page", [*PAGES, *SERVICES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_on_a_page_exists_with_its_options(page: Path) -> None:
    mistakes = [(command, mistake) for _, command in _cases([page]) if (mistake := _mistake(command))]
    assert mistakes == []


def test_commands_are_found_on_the_main_pages_and_in_the_service_files() -> None:
    checked = [page for page, _ in _cases([*PAGES, *SERVICES])]
    for page in ("README.md", "docs/deploy.md", "docs/deploy-site.md", "docs/deploy/semisam-site.service"):
        assert page in checked


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        ("semisam lead launch", "no command launch"),
        ("semisam lead run --again --study x", "no option --again"),
        ("semisam --study x lead run", "before the command"),
    ],
)
def test_a_command_that_does_not_exist_is_caught(command: str, mistake: str) -> None:
    assert mistake in str(_mistake(command))


def test_code_that_is_indented_in_a_list_is_checked_too() -> None:
    text = "1. Upgrade:\n\n   ```\n   semisam lead code --update \\\n     --study x\n   ```\n"
    assert [" ".join(command.split()) for command in _commands(text)] == ["semisam lead code --update --study x"]


def test_every_file_that_the_architecture_page_names_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = "semisam_core|client|server|engines|deployment|experiments|intake|release|reports|review|cli|benchmarks"
    named = set(re.findall(rf"`((?:{rooms})/[\w/.]+\.py)`", text))
    assert len(named) > 50
    missing = {path for path in named if not (ROOT / path).exists()}
    moved_tests = {path for path in missing if (ROOT / "tests" / path).exists()}
    assert missing == moved_tests


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_on_a_page_leads_to_a_file(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link[0]]
    assert [target for target, _ in links if not (page.parent / target).exists()] == []
    anchors = [(page.parent / target if target else page, anchor) for target, anchor in links if anchor]
    assert [(path.name, anchor) for path, anchor in anchors if anchor not in _anchors(path)] == []


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = HEADING.findall(FENCED.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_an_anchor_that_does_not_exist_is_caught() -> None:
    assert {"noise", "claims-and-their-tests"} <= _anchors(ROOT / "docs" / "privacy.md")
    assert "no-such-heading" not in _anchors(ROOT / "docs" / "privacy.md")


def test_the_two_deployment_pages_link_to_each_other() -> None:
    for page, other in (("deploy.md", "deploy-site.md"), ("deploy-site.md", "deploy.md")):
        assert f"({other})" in (ROOT / "docs" / page).read_text(encoding="utf-8")


def _section(page: str, heading: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.split(r"^#+ ", text.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def _is_a_test(named: str) -> bool:
    """Return whether `<file below tests>::<function>` is a test that pytest collects."""
    path, _, function = named.partition("::")
    file = ROOT / "tests" / path
    if not function.startswith("test_") or not file.name.startswith("test_") or not file.exists():
        return False
    return function in {each.name for each in ast.parse(file.read_text()).body if isinstance(each, ast.FunctionDef)}


def test_every_claim_of_privacy_names_tests_that_exist() -> None:
    claims = ROW.findall(_section("privacy.md", "Claims and their tests"))
    assert len(claims) > 20
    for _, claim, tests in claims:
        named = re.findall(r"`([^`]+)`", tests)
        assert named, claim
        assert [each for each in named if not _is_a_test(each)] == [], claim


def test_every_mechanism_of_the_threat_model_has_claims_that_are_tested() -> None:
    mechanisms = {name for name, *_ in ROW.findall(_section("privacy.md", "Who could learn what"))}
    claimed = {name for name, *_ in ROW.findall(_section("privacy.md", "Claims and their tests"))}
    assert mechanisms == claimed
    assert len(mechanisms) == 8


@pytest.mark.parametrize(
    "named",
    [
        "client/test_secure.py::test_nothing",
        "client/test_secure.py",
        "client/secure.py::test_a",
        "test_docs.py::_mistake",
    ],
)
def test_a_claim_whose_test_is_gone_is_caught(named: str) -> None:
    assert not _is_a_test(named)


def _officers_rows() -> list[str]:
    return [
        line
        for line in _section("data-protection.md", "What leaves, and how to forbid it").splitlines()
        if "::" in line
    ]


def test_all_that_leaves_is_said_to_the_officer_with_tests_that_exist() -> None:
    text = _section("data-protection.md", "What leaves, and how to forbid it")
    assert len(_officers_rows()) >= 9
    assert [each for each in re.findall(r"`([^`]+::[^`]+)`", text) if not _is_a_test(each)] == []


def test_the_officers_keys_are_those_of_a_site_file_and_every_limit_on_egress_is_among_them() -> None:
    text = (ROOT / "docs" / "data-protection.md").read_text(encoding="utf-8")
    sections = {"egress": Egress.model_fields, "privacy": PrivacyLimits.model_fields}
    named = re.findall(r"`(egress|privacy)\.(\w+)(?:: [^`]+)?`", text)
    assert [key for section, key in named if key not in sections[section]] == []
    assert set(Egress.model_fields) - {key for _, key in named} == {"significant_digits"}  # how, not whether


def test_overrides_that_the_researchers_page_offers_are_accepted() -> None:
    text = _section("researcher.md", "Change one thing")
    rows = [re.findall(r"`([^`]+)`", line.split(" | ", 1)[1]) for line in text.splitlines() if line.startswith("| ")][
        2:
    ]
    assert len(rows) > 5
    plan = ROOT / "site_configs" / "left-atrium" / "plan.yaml"
    assert len({load_plan(plan, assignments).hash for assignments in rows} - {load_plan(plan).hash}) == len(rows)
