"""The mutation runner itself, on a project of two files: it reports survivors and leaves the project as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.mutants.run import LISTS, ROOT, Mutant, main, read_mutants, survives

CODE = "def double(x: int) -> int:\n    y = 2 * x\n    return y\n"
TEST = "from thing import double\n\n\ndef test_double() -> None:\n    assert double(2) == 4\n"
CAUGHT = {"fault": "triples", "find": "2 * x", "replace": "3 * x"}
UNNOTICED = {"fault": "adds", "find": "2 * x", "replace": "2 + x"}  # the same for 2
COSMETIC = {"fault": "renames nothing that matters", "find": "return y", "replace": "return y  # the same"}
HANGS = {"fault": "never returns", "find": "    return y", "replace": "    while True:\n        pass"}
BREAKS = {"fault": "cannot be imported", "find": "return y", "replace": "return y)"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "lists").mkdir(parents=True)
    (root / "thing.py").write_text(CODE)
    (root / "test_thing.py").write_text(TEST)
    return root


def _run(root: Path, *mutants: dict[str, str], tests: tuple[str, ...] = ("test_thing.py",)) -> int:
    entries = [{**mutant, "file": "thing.py", "tests": list(tests)} for mutant in mutants]
    (root / "lists" / "things.yaml").write_text(yaml.safe_dump(entries))
    return main([], root, root / "lists")


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_faults_that_no_test_catches_are_printed_and_fail_the_run(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(project, CAUGHT, UNNOTICED, COSMETIC) == 1
    output = capsys.readouterr().out
    assert "survived: thing.py: adds" in output
    assert "survived: thing.py: renames nothing that matters" in output
    assert "triples" not in output
    assert "3 mutants, 2 survivors" in output


def test_a_run_without_survivors_succeeds_and_leaves_the_project_as_it_was(project: Path) -> None:
    _run(project, CAUGHT)
    before = _files(project)
    assert main([], project, project / "lists") == 0
    assert _files(project) == before


def test_a_fault_that_makes_the_tests_hang_is_caught(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.mutants.run.TIMEOUT_S", 10)
    mutant = Mutant(**HANGS, file="thing.py", tests=("test_thing.py",))
    assert not survives(mutant, project)
    assert (project / "thing.py").read_text() == CODE


def test_a_fault_that_only_breaks_an_import_proves_nothing(project: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be imported: pytest exited with 2"):
        _run(project, BREAKS)


def test_tests_that_fail_without_a_fault_prove_nothing(project: Path) -> None:
    (project / "test_thing.py").write_text(TEST.replace("== 4", "== 5"))
    with pytest.raises(RuntimeError, match="fail without any fault"):
        _run(project, CAUGHT)


@pytest.mark.parametrize(
    ("mutant", "tests", "says"),
    [
        ({**CAUGHT, "find": "y"}, ("test_thing.py",), "occurs 2 times"),
        ({**CAUGHT, "find": "absent"}, ("test_thing.py",), "occurs 0 times"),
        ({**CAUGHT, "replace": "2 * x"}, ("test_thing.py",), "the same text"),
        (CAUGHT, (), "no tests are named"),
    ],
)
def test_an_entry_that_could_prove_nothing_is_refused(
    project: Path, mutant: dict[str, str], tests: tuple[str, ...], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        _run(project, mutant, tests=tests)


def test_a_list_that_does_not_exist_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "lists" / "things.yaml").write_text("[]")
    with pytest.raises(SystemExit):
        main(["absent"], project, project / "lists")
    assert "no such list: absent; there are: things" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(LISTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_listed_fault_still_fits_the_code_and_names_tests_that_exist(path: Path) -> None:
    for mutant in read_mutants(path, ROOT):
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert (ROOT / file).exists(), f"{mutant.fault}: {test}"
            function = name.rpartition("::")[2].partition("[")[0]
            assert not name or f"def {function}(" in (ROOT / file).read_text(), f"{mutant.fault}: {test}"


def test_pytest_collects_nothing_from_the_lists() -> None:
    """The runner's own folder holds no test modules, whatever the names of its lists."""
    assert [path.name for path in LISTS.iterdir() if path.name.startswith("test") or path.stem.endswith("_test")] == []
