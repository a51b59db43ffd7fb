"""A study folder, and commands as they are typed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner

from cli.main import app
from deployment.lead.service import stop
from deployment.lead.study_folder import NewStudy, StudyFolder
from engines.processes import free_port
from tests.conftest import tiny_plan

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def supervised_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    content = tiny_plan("pseudo_labels=null").model_dump(mode="json")
    path.write_text("# agreed in spring\n" + yaml.safe_dump(content))
    return path


@pytest.fixture
def study(tmp_path: Path, supervised_plan: Path) -> StudyFolder:
    return NewStudy(tmp_path / "atrium", supervised_plan, [], two_free_ports(), 2).write()


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, supervised_plan: Path) -> Iterator[StudyFolder]:
    """Return a study whose SuperLink was started by `semisam lead start`; nothing of it stays running."""
    folder = tmp_path_factory.mktemp("served")
    study = NewStudy(folder / "atrium", supervised_plan, [], two_free_ports(), 2).write()
    try:
        done = typed("start", "--study", str(study.folder))
        assert done.returncode == 0, done.stdout + done.stderr
        yield study
    finally:
        stop(study)
    assert processes_of(folder) == []


def two_free_ports() -> int:
    """Return a port that is free, as is the next one."""
    while True:
        port = free_port()
        with socket.socket() as next_one:
            try:
                next_one.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def call(*arguments: str | Path) -> tuple[int, str]:
    """Call `semisam lead` in this process; return exit code and output, its white space made single."""
    result = CliRunner().invoke(app, ["lead", *(str(each) for each in arguments)])
    return result.exit_code, " ".join(result.output.split())


def typed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `semisam lead` as a process of its own."""
    command = [sys.executable, "-m", "cli.main", "lead", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)


def write_key(path: Path, kind: str = "ec") -> Path:
    """Write a new public key in OpenSSH format."""
    key = ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b" site\n")
    return path


def processes_of(folder: Path) -> list[list[str]]:
    """Return the command lines of processes that name this folder in their command or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
            if process.pid != os.getpid() and any(str(folder) in word for word in words):
                found.append(process.cmdline())
        except (psutil.Error, OSError):
            continue
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Wait for a condition, at most so long; return whether it came true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return condition()
