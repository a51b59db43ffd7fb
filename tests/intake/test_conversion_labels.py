"""What is wrong with a label costs the label, never its scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from intake import conversion
from tests.conftest import blob, write_nifti


def test_an_error_that_nobody_foresaw_costs_the_label_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OverflowError("odd")

    monkeypatch.setattr(conversion, "_label", broken)
    source = {"kind": "file", "paths": [str(write_nifti(tmp_path / "a.nii.gz", blob()[0]))], "series": "a"}
    request = {
        **{"channels": [source], "label": source, "images": [str(tmp_path / "out" / "a.nii.gz")]},
        **{"label_file": str(tmp_path / "l.nii.gz"), "classes": None, "spacing_mm": None, "partial_labels": "refuse"},
    }
    answer = conversion.convert(request)
    assert answer["label"] is None
    assert "OverflowError: odd" in answer["without_label"]
    assert (tmp_path / "out" / "a.nii.gz").exists()
