"""No child process outlives us, however it hides and however we end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from engines.processes import ProcessTree

HIDING = """
import os, subprocess, sys, time
# A grandchild in its own session whose parent has ended: only its environment tells where it came from.
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
middle = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
subprocess.run([sys.executable, "-c", middle])
time.sleep(600)
"""


def _wait_until(done: object, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if callable(done) and done():
            return True
        time.sleep(0.05)
    return False


def test_detached_orphans_that_ignore_sigterm_are_ended_too(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, ProcessTree() as tree:
        tree.start([sys.executable, "-c", HIDING], stdout=log, stderr=log)
        assert _wait_until(lambda: b"up" in (tmp_path / "log").read_bytes())
        assert len(tree.alive()) >= 2
    assert tree.alive() == []


def test_processes_of_another_tree_are_left_alone(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, ProcessTree() as outer:
        process = outer.start([sys.executable, "-c", "import time; time.sleep(600)"], stdout=log, stderr=log)
        with ProcessTree():
            pass
        assert process.poll() is None


def test_an_exception_ends_the_tree(tmp_path: Path) -> None:
    tree = ProcessTree()

    def fail() -> None:
        with (tmp_path / "log").open("wb") as log, tree:
            tree.start([sys.executable, "-c", "import time; time.sleep(600)"], stdout=log, stderr=log)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert tree.alive() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_us_ends_the_tree(tmp_path: Path, number: signal.Signals) -> None:
    program = textwrap.dedent(
        f"""
        import sys, time
        from engines.processes import ProcessTree
        with open({str(tmp_path / "log")!r}, "wb") as log, ProcessTree() as tree:
            p = tree.start([sys.executable, "-c", "import time; time.sleep(600)"], stdout=log, stderr=log)
            print(p.pid, flush=True)
            time.sleep(600)
        """
    )
    root = Path(__file__).resolve().parents[2]
    ours = subprocess.Popen(
        [sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert ours.stdout is not None
    pid = int(ours.stdout.readline())
    assert psutil.pid_exists(pid)
    os.kill(ours.pid, number)
    assert ours.wait(timeout=30) != 0
    assert _wait_until(lambda: not psutil.pid_exists(pid))
