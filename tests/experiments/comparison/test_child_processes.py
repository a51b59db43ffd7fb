"""`semisam compare` as a person types it: child processes, the real LiteMedSAM, Ctrl-C and --resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from semisam_core.files import read_json_lines
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[3]
ARM = "federated-semisam"


@pytest.fixture
def study(make_site: MakeSite, tmp_path: Path) -> tuple[Path, Path]:
    """Return a plan with LiteMedSAM and a folder of two sites with shallow scans."""
    model = {"lite-medsam": {"weights": "packaged"}}
    for name, first in (("alpha", 0), ("beta", 10)):
        make_site(name, first_seed=first, shape=(24, 24, 8), generalists=model)
    plan = tiny_plan(
        "pseudo_labels.generalists=[lite-medsam]",
        "pseudo_labels.prompting.threshold=0.3",
        "pseudo_labels.gates.minimum_volume_ml=0.0",
    )
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    return path, tmp_path / "sites"


@pytest.fixture(autouse=True)
def _nothing_stays_running(tmp_path: Path) -> Iterator[None]:
    yield
    left = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and str(tmp_path) in " ".join(process.cmdline()):
                left.append(process.cmdline())
        except (psutil.Error, OSError):
            continue
    assert left == []


@pytest.mark.slow
def test_ctrl_c_keeps_finished_rounds_and_resume_ends_with_the_report(study: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cli.main", "compare", "--plan", str(study[0]), "--sites", str(study[1])]
    command += ["--out", str(out)]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([*command, "--arms", ARM, "--seeds", "3"], cwd=ROOT, stdout=quiet, stderr=quiet)
    metrics = out / "arms" / ARM / "labels-all" / "seed-3" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (metrics.exists() and '"aggregated"' in metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    done = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["round"] for line in read_json_lines(metrics) if line["event"] == "aggregated"] == [1, 2]
    assert "[1/2]" not in done.stdout  # the oracle had completed
    assert f"[2/2] {ARM}, labels all, seed 3" in done.stdout
    trained, oracle = json.loads((out / "results.json").read_text())["arms"]
    assert (trained["arm"], oracle["arm"]) == (ARM, "oracle-lite-medsam-boxes")
    assert oracle["classes"][0]["overall"]["dice"]["mean"] > 0.5
