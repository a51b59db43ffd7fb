"""A program exits and says why if its SuperLink is gone, but not if it is busy, back, or was never there."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from semisam_core.errors import ConfigError
from server import superlink_watch as watch
from server.superlink_watch import EXIT_CODE, SuperLinkWatch, refuses

ROOT = Path(__file__).resolve().parents[2]
LONG_S = 60.0
# Like a ServerApp that sends tensors: the main thread waits for threads that retry forever.
PROGRAM = """
import sys, threading, time
from pathlib import Path
from flwr.supercore.exit import register_signal_handlers
from flwr.supercore.telemetry import EventType
from server.superlink_watch import SuperLinkWatch

def again():
    while True:
        time.sleep(0.05)

register_signal_handlers(EventType.FLWR_SERVERAPP_RUN_LEAVE)
with SuperLinkWatch(sys.argv[1], Path(sys.argv[2]).write_text, float(sys.argv[3]), 0.05):
    threading.Thread(target=again, daemon=sys.argv[4] == "daemon").start()
    print("ready", flush=True)
    threading.Event().wait()
"""


class Link:
    """A listening socket in place of a SuperLink; it can die and come back at the same address."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address: tuple[str, int] = self.socket.getsockname()
        self.text = f"{self.address[0]}:{self.address[1]}"

    def die(self) -> None:
        self.socket.close()

    def come_back(self) -> None:
        self.socket = socket.create_server(self.address, backlog=128)


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link()
    yield link
    link.die()


@contextlib.contextmanager
def program(link: Link, out: Path, gone_s: float, threads: str = "stay") -> Iterator[subprocess.Popen[str]]:
    """Start a program with a watch and yield it once it is ready; it never outlives the test."""
    command = [sys.executable, "-c", PROGRAM, link.text, str(out), str(gone_s), threads]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_a_program_exits_when_its_superlink_is_gone_although_its_threads_retry_forever(
    link: Link, tmp_path: Path
) -> None:
    with program(link, tmp_path / "why", gone_s=0.3) as process:
        link.die()
        assert process.wait(LONG_S) == EXIT_CODE != 0
    why = (tmp_path / "why").read_text()
    assert f"the SuperLink at {link.text} was gone" in why
    assert "`semisam lead start`, then `semisam lead run --resume`" in why


def test_the_reason_is_recorded_even_if_flower_ends_the_program_first(link: Link, tmp_path: Path) -> None:
    with program(link, tmp_path / "why", gone_s=3600) as process:
        link.die()
        process.send_signal(signal.SIGINT)
        assert process.wait(LONG_S) == EXIT_CODE
    assert "was gone" in (tmp_path / "why").read_text()


def test_a_program_that_flower_ends_while_the_superlink_listens_records_nothing(link: Link, tmp_path: Path) -> None:
    with program(link, tmp_path / "why", gone_s=3600, threads="daemon") as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(LONG_S) == 0
    assert not (tmp_path / "why").exists()


class Watched:
    """A watch in this process, with a clock of the test's and a queue in place of the exit."""

    def __init__(self, address: str) -> None:
        self.time, self.ends, self.looked = 0.0, queue.Queue[int](), threading.Semaphore(0)
        self.reasons: list[str] = []
        self.watch = SuperLinkWatch(address, self.reasons.append, 60, 0.01, self._now, self.ends.put)

    def _now(self) -> float:
        self.looked.release()
        return self.time

    def refusals(self, times: int) -> None:
        """Wait for this many further refused connections."""
        while self.looked.acquire(blocking=False):
            pass
        for _ in range(times + 1):  # the first may have been in progress
            assert self.looked.acquire(timeout=LONG_S)


def test_a_superlink_is_gone_only_after_the_full_time(link: Link) -> None:
    watched = Watched(link.text)
    with watched.watch:
        link.die()
        watched.refusals(3)
        watched.time = 59.9
        watched.refusals(3)
        assert watched.ends.empty()
        watched.time = 60.0
        assert watched.ends.get(timeout=LONG_S) == EXIT_CODE
    assert len(watched.reasons) == 1


def test_a_superlink_that_listens_again_is_not_gone(link: Link) -> None:
    watched = Watched(link.text)
    with watched.watch:
        link.die()
        watched.refusals(3)
        link.come_back()
        link.socket.settimeout(LONG_S)
        link.socket.accept()[0].close()
        watched.time = 59.9
        link.die()
        watched.refusals(3)
        watched.time = 119.8
        watched.refusals(3)
        assert watched.ends.empty()
        assert watched.reasons == []


def test_a_superlink_that_is_too_busy_to_answer_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PROBE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as busy, contextlib.ExitStack() as waiting:
        assert any(not _connected(busy, waiting) for _ in range(64))
        assert not refuses(busy.getsockname())


def test_nothing_is_recorded_once_the_study_is_over(link: Link) -> None:
    watched = Watched(link.text)
    with watched.watch:
        link.die()
        watched.refusals(1)
    watched.time = 3600.0
    assert _ended("superlink-watch")
    assert watched.ends.empty()
    assert watched.watch.gone


def test_in_a_simulation_there_is_nothing_to_watch() -> None:
    watched = Watched("")
    with watched.watch:
        assert "superlink-watch" not in [thread.name for thread in threading.enumerate()]
        assert not watched.watch.gone


def test_a_reason_that_cannot_be_recorded_does_not_keep_the_program_alive(link: Link) -> None:
    def record(reason: str) -> None:
        raise OSError("the disk is full")

    ends: queue.Queue[int] = queue.Queue()
    link.die()
    with SuperLinkWatch(link.text, record, 0, 0.01, end=ends.put):
        assert ends.get(timeout=LONG_S) == EXIT_CODE


@pytest.mark.parametrize("address", ["localhost", ":8444", "127.0.0.1:control"])
def test_an_invalid_address_is_an_error_that_names_the_variable(address: str) -> None:
    with pytest.raises(ConfigError, match="SEMISAM_SUPERLINK"):
        SuperLinkWatch(address, print)


def _connected(busy: socket.socket, waiting: contextlib.ExitStack) -> bool:
    try:
        waiting.enter_context(socket.create_connection(busy.getsockname(), 0.2))
    except TimeoutError:
        return False
    return True


def _ended(name: str) -> bool:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(LONG_S)
    return name not in [thread.name for thread in threading.enumerate()]
