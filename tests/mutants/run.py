"""Mutation testing with a fixed list of faults (`make mutants`): prints the faults that no test catches.

Each YAML file beside this one lists faults of one room: a line as it is, the line with the fault, and the tests that
must fail because of it. Faults are put into a copy of the working tree, one at a time, never into the tree itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
LISTS = Path(__file__).parent
TIMEOUT_S = 600
PASSED, FAILED = 0, 1  # pytest's exit statuses; all others mean that it did not run the tests
NOT_COPIED = (".git", ".venv", "demo", "runs", "__pycache__", ".*_cache", "*.egg-info")


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        fault: what is wrong, in words.
        file: the file to change, relative to the repository.
        find: text that occurs exactly once in that file.
        replace: the text to replace it with.
        tests: paths or node ids of the tests that must catch the fault.
    """

    fault: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]


def read_mutants(path: Path, root: Path) -> list[Mutant]:
    """Read a list of faults.

    Args:
        path: the YAML file.
        root: the repository.

    Raises:
        ValueError: a fault's text does not occur exactly once in its file, changes nothing, or has no tests.
    """
    mutants = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        mutant = Mutant(**{**entry, "tests": tuple(entry["tests"])})
        count = (root / mutant.file).read_text(encoding="utf-8").count(mutant.find)
        if count != 1:
            raise ValueError(f"{path.name}: {mutant.fault}: the text to find occurs {count} times in {mutant.file}")
        if mutant.find == mutant.replace:
            raise ValueError(f"{path.name}: {mutant.fault}: the replacement is the same text")
        if not mutant.tests:
            raise ValueError(f"{path.name}: {mutant.fault}: no tests are named, and all would run")
        mutants.append(mutant)
    return mutants


def passes(tree: Path, tests: Sequence[str]) -> bool:
    """Run tests in a copy of the repository and return whether all of them pass; a hang counts as a failure.

    Raises:
        RuntimeError: pytest could not run the tests, so nothing is known.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (PASSED, FAILED):
        raise RuntimeError(f"pytest exited with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == PASSED


def survives(mutant: Mutant, tree: Path) -> bool:
    """Return whether all of a mutant's tests pass with the fault in `tree`; the tree is restored afterwards.

    Raises:
        RuntimeError: pytest could not run the tests, for example because the fault breaks an import.
    """
    path = tree / mutant.file
    original = path.read_bytes()
    path.write_text(original.decode().replace(mutant.find, mutant.replace), encoding="utf-8")
    try:
        return passes(tree, mutant.tests)
    except RuntimeError as error:
        raise RuntimeError(f"{mutant.fault}: {error}") from None
    finally:
        path.write_bytes(original)


def survivors(mutants: Sequence[Mutant], root: Path, console: Console) -> list[Mutant]:
    """Try every fault in a copy of the repository and return those that no test catches, printing each at once.

    Raises:
        RuntimeError: the tests already fail without any fault, or pytest could not run them.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, Progress(console=console) as progress:
        tree = Path(folder) / root.name
        shutil.copytree(root, tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
        (Path(folder) / "shared").symlink_to(root.parent / "shared")  # scans that some tests use if they are there
        task = progress.add_task("mutants", total=len(mutants))
        if mutants and not passes(tree, sorted({test for mutant in mutants for test in mutant.tests})):
            raise RuntimeError("the tests fail without any fault, so they would seem to catch every one")
        for mutant in mutants:
            if survives(mutant, tree):
                found.append(mutant)
                progress.console.print(f"survived: {mutant.file}: {mutant.fault}", highlight=False, markup=False)
            progress.advance(task)
    return found


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, lists: Path = LISTS) -> int:
    """Try all listed faults; return 0 if every one is caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = {path.stem: path for path in sorted(lists.glob("*.yaml"))}
    parser.add_argument("only", nargs="*", help=f"names of lists to run: {', '.join(known)}; all by default")
    wanted = parser.parse_args(arguments).only or list(known)
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"no such list: {', '.join(unknown)}; there are: {', '.join(known)}")
    console = Console()
    mutants = [mutant for name in wanted for mutant in read_mutants(known[name], root)]
    found = survivors(mutants, root, console)
    console.print(f"{len(mutants)} mutants, {len(found)} survivors", highlight=False)
    return 1 if found or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
