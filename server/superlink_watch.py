"""Whether the SuperLink that this program works for is still there; Flower's client tries again without an end."""

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
SUPERLINK = "SEMISAM_SUPERLINK"  # in the environment of what `semisam lead start` starts: host:port; not in simulations
# A SuperLink that died has lost its run, so nothing is won by waiting longer.
GONE_S = 60.0
LOOK_EVERY_S = 2.0
PROBE_S = 3.0  # below the time that Flower gives a program to end itself
EXIT_CODE = 1


def refuses(address: tuple[str, int]) -> bool:
    """Return whether nobody listens at an address; one that is too busy to answer in time does listen."""
    try:
        socket.create_connection(address, PROBE_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # no time, no memory, no free number for a file: says nothing of the other side
        return False
    return False


class SuperLinkWatch:
    """Ends this process, with the reason on record, where its SuperLink is gone.

    Flower ends a program whose SuperLink has died by a signal, which reaches no program that waits for its threads, as
    one does that sends or fetches tensors; nor does it where nobody reaps the dead SuperLink. And then it gives no time
    to write down what happened. So a thread looks whether anybody listens, and Flower's own end is made use of.

    What is on disk is good at any moment, so the process ends at once, whatever it is at.

    Args:
        address: host:port of the SuperLink; empty where there is none to watch, as in simulations.
        record: writes down why the run ended.
        gone_s: how long connections must have been refused, in seconds.
        look_every_s: pause between looks, in seconds.
        now: seconds of a clock that never goes back.
        end: ends this process with an exit code, at once.

    Raises:
        ConfigError: the address is none.
    """

    def __init__(
        self,
        address: str,
        record: Callable[[str], None],
        gone_s: float = GONE_S,
        look_every_s: float = LOOK_EVERY_S,
        now: Callable[[], float] = time.monotonic,
        end: Callable[[int], object] = os._exit,  # threads that try again for ever hold up any other end
    ) -> None:
        self._address = _parsed(address) if address else None
        self._record, self._now, self._exit = record, now, end
        self._gone_s, self._look_every_s = gone_s, look_every_s
        self._over = threading.Event()
        self._ending = threading.RLock()  # the end that Flower makes may come in the middle of ours

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
        """Whether there is a SuperLink to watch and nobody listens at its address now."""
        return self._address is not None and refuses(self._address)

    @property
    def reason(self) -> str:
        """What to tell people of a SuperLink that is gone."""
        host, port = self._address or ("", 0)
        return (
            f"the SuperLink at {host}:{port} was gone: nothing listened there any more. Finished rounds are kept: "
            "`semisam lead start`, then `semisam lead run --resume` go on."
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
                logger.error("This program ends: %s", self.reason)
                self._record(self.reason)
            except Exception:  # whatever keeps it from being written must not keep this process
                logger.exception("Why the run ended could not be written down")
            finally:
                self._exit(EXIT_CODE)


def _parsed(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{SUPERLINK}={address} in the environment is no host:port.")
    return host.strip("[]"), int(port)
