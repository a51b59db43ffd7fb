"""The researcher's notebook runs from beginning to end, is short, and is kept without what it printed."""

from __future__ import annotations

import ast
import base64
import os
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def test_it_is_ten_lines_besides_its_imports_and_is_kept_without_output() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    lines = [line for cell in cells for line in cell.source.splitlines() if line]
    assert sum(not line.startswith(("import ", "from ")) for line in lines) <= 10
    assert [cell.outputs for cell in cells] == [[]] * len(cells)


def test_it_makes_a_pseudo_label_trains_a_round_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    shutil.copytree(ROOT / "site_configs" / "phantom", tmp_path / "site_configs" / "phantom")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(folder)}}).execute()
    *_, label, report, picture = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert label[-1].data["text/plain"] == "(torch.Size([1, 65, 65, 32]), (None,))"  # accepted
    scalars = ast.literal_eval(report[-1].data["text/plain"])
    assert scalars["steps"] == 10
    assert scalars["accepted"] >= 1
    assert scalars["loss.generalist"] > 0
    assert 0 <= scalars["dice.liver"] <= 1
    assert base64.b64decode(picture[-1].data["image/png"]).startswith(b"\x89PNG")
    assert (tmp_path / "demo" / "storage" / "south" / "runs" / "notebook" / "overview.png").exists()
