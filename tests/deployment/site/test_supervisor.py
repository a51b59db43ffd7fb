"""Which process a site's supervisor accepts as its SuperNode, and what ends with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deployment.site import worker
from deployment.site.supervisor import SUPERNODE, serves
from deployment.site.worker_pool import WORKER

# What approved code may do, beside the watch that every worker keeps over its supervisor.
STARTS_ANOTHER = f"""
import subprocess, sys
sys.path.insert(0, {str(Path(worker.__file__).parent)!r})
import worker
print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
worker._end_with(int(sys.argv[1]))
"""
STARTS_A_WORKER = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], start_new_session=True).wait()
"""


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_another_program_on_the_port_is_not_mistaken_for_the_supernode() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, subprocess.Popen([sys.executable, "-c", "input()"]) as other:
        try:
            port = taken.getsockname()[1]
            assert serves(os.getpid(), port)
            assert not serves(other.pid, port)
        finally:
            other.kill()
    assert not serves(other.pid, port)


def test_processes_started_by_approved_code_end_with_the_supervisor() -> None:
    command = [sys.executable, "-c", STARTS_A_WORKER, STARTS_ANOTHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        started = int(supervisor.stdout.readline())
        supervisor.kill()
        deadline = time.monotonic() + 20
        while _alive(started) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = _alive(started)
        if left:
            psutil.Process(started).kill()
    assert not left


@pytest.mark.parametrize("program", [SUPERNODE, WORKER])
def test_a_program_ends_if_its_supervisor_died_before_it_started(program: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    command = [sys.executable, "-I", str(program), str(gone.pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as left:
        try:
            assert left.wait(30) != 0
        finally:
            left.kill()
