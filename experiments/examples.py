"""The plans and site files that come with the package, for those who have no checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

import experiments
from semisam_core.paths import new_folder

EXAMPLES = Path(experiments.__file__).resolve().parents[1] / "site_configs"


def write_examples(out: Path) -> Path:
    """Copy the plans and site files into a new folder, and return it.

    Raises:
        ConfigError: the folder is there already or cannot be created.
    """
    out = new_folder(out, "--out", "choose another")
    shutil.copytree(EXAMPLES, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return out
