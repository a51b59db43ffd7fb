"""Ends the ServerApp when its SuperLink is gone: Flower's client would retry forever."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

from flwr.supercore.exit import add_exit_handler

from semisam_core.errors import ConfigError

logger = logging.getLogger(__name__)
SUPERLINK = "SEMISAM_SUPERLINK"  # environment variable set by `semisam lead start`: host:port; unset in simulations
# A SuperLink that died has lost its run, so there is no point in waiting longer.
GONE_S = 60.0
LOOK_EVERY_S = 2.0
PROBE_S = 3.0  # less than the time that Flower gives a program to exit
EXIT_CODE = 1


def refuses(address: tuple[str, int]) -> bool:
    """Return whether connections to an address are refused; a listener too busy to answer in time does not refuse."""
    try:
        socket.create_connection(address, PROBE_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # timeout, no memory, no file descriptor: says nothing about the listener
        return False
    return False


class SuperLinkWatch:
    """Records why and exits this process when its SuperLink is gone.

    Flower signals a program whose SuperLink has died. The signal does not reach a main thread that waits for other
    threads, as it does while tensors are sent or fetched; it is not sent if nothing reaps the dead SuperLink; and it
    leaves no time to record the reason. So a thread probes the SuperLink's address, and Flower's exit handler is used
    as well.

    On-disk state is always consistent, so the process exits at once.

    Args:
        address: host:port of the SuperLink; empty if there is none to watch, as in simulations.
        record: records why the run ended.
        gone_s: how long connections must have been refused, in seconds.
        look_every_s: interval between probes, in seconds.
        now: seconds of a monotonic clock.
        end: exits this process at once with an exit code.

    Raises:
        ConfigError: the address is not host:port.
    """

    def __init__(
        self,
        address: str,
        record: Callable[[str], None],
        gone_s: float = GONE_S,
        look_every_s: float = LOOK_EVERY_S,
        now: Callable[[], float] = time.monotonic,
        end: Callable[[int], object] = os._exit,  # any other exit would wait for threads that retry forever
    ) -> None:
        self._address = _parsed(address) if address else None
        self._record, self._now, self._exit = record, now, end
        self._gone_s, self._look_every_s = gone_s, look_every_s
        self._over = threading.Event()
        self._ending = threading.RLock()  # Flower's exit may interrupt ours

    def __enter__(self) -> SuperLinkWatch:
        if self._address is not None:
            add_exit_handler(self._end_if_gone)
            threading.Thread(target=self._look, name="superlink-watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._ending:
            self._over.set()

    @property
    def gone(self) -> bool:
        """Whether there is a SuperLink to watch and its address refuses connections now."""
        return self._address is not None and refuses(self._address)

    @property
    def reason(self) -> str:
        """What to tell people when the SuperLink is gone."""
        host, port = self._address or ("", 0)
        return (
            f"the SuperLink at {host}:{port} was gone: nothing listened there any more. Finished rounds are kept; "
            "to resume, use `semisam lead start`, then `semisam lead run --resume`."
        )

    def _look(self) -> None:
        since: float | None = None
        while not self._over.wait(self._look_every_s):
            if not self.gone:
                since = None
                continue
            now = self._now()
            since = now if since is None else since
            if now - since >= self._gone_s:
                self._end()

    def _end_if_gone(self) -> None:
        if not self._over.is_set() and self.gone:
            self._end()

    def _end(self) -> None:
        with self._ending:
            if self._over.is_set():
                return
            self._over.set()
            try:
                logger.error("Exiting: %s", self.reason)
                self._record(self.reason)
            except Exception:  # a reason that cannot be recorded must not keep this process alive
                logger.exception("Why the run ended could not be recorded")
            finally:
                self._exit(EXIT_CODE)


def _parsed(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{SUPERLINK}={address} in the environment is not host:port.")
    return host.strip("[]"), int(port)
