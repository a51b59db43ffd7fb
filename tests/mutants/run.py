"""Put known faults into the code, one at a time, and list those that no test notices (`make mutants`).

Each YAML file beside this one lists faults of one room: the line as it is, the line with the fault, and the tests that
must fail by it. Faults are put into a copy of the working tree, never into the tree itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
LISTS = sorted(Path(__file__).parent.glob("*.yaml"))
TIMEOUT_S = 600


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        fault: what it does, in words.
        file: the file it is in, relative to the repository.
        find: text that occurs once in that file.
        replace: what it becomes.
        tests: paths or node ids that must notice.
    """

    fault: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]


def read_mutants(path: Path) -> list[Mutant]:
    """Read a list of faults.

    Raises:
        ValueError: a fault's text occurs not once in its file, or changes nothing.
    """
    mutants = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        mutant = Mutant(**{**entry, "tests": tuple(entry["tests"])})
        count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.find)
        if count != 1 or mutant.find == mutant.replace:
            raise ValueError(f"{path.name}: {mutant.fault}: the text to find occurs {count} times in {mutant.file}")
        mutants.append(mutant)
    return mutants


def survives(mutant: Mutant, tree: Path) -> bool:
    """Return whether all of a mutant's tests pass with the fault in `tree`, which is left as it was.

    Raises:
        RuntimeError: pytest did not run the tests, so nothing is known.
    """
    path = tree / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(mutant.find, mutant.replace), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests]
        environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False  # a fault that makes its tests hang is noticed
    finally:
        path.write_text(original, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.fault}: pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr}")
    return done.returncode == 0


def main() -> int:
    """Run every listed fault and return 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="lists to run, by name: training; all by default")
    wanted = parser.parse_args().only
    console = Console()
    mutants = [mutant for path in LISTS if not wanted or path.stem in wanted for mutant in read_mutants(path)]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / ROOT.name
        skipped = shutil.ignore_patterns(".git", ".venv", "demo", "runs", "__pycache__", ".*_cache", "*.egg-info")
        shutil.copytree(ROOT, tree, ignore=skipped)
        (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        with Progress(console=console) as progress:
            task = progress.add_task("mutants", total=len(mutants))
            for mutant in mutants:
                if survives(mutant, tree):
                    survivors.append(mutant)
                    progress.console.print(f"survived: {mutant.file}: {mutant.fault}", highlight=False)
                progress.advance(task)
    console.print(f"{len(mutants)} mutants, {len(survivors)} survivors", highlight=False)
    return 1 if survivors or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
