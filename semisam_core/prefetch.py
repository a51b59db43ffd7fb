"""Doing the next pieces of work in the background while the current one is used."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import torch

Piece = TypeVar("Piece")
AHEAD = 2  # pieces


class Prefetch(Generic[Piece]):
    """Makes a known number of pieces in one background thread, in order, a few ahead of their use.

    One thread makes all of them one after another, so pieces are those that would be made without it. Use it as a
    context; at its end the thread has ended, whatever happened.

    Args:
        make: makes the next piece. What it raises is raised by `next`.
        count: how many pieces; none is made in vain.

    Attributes:
        waited_s: how long `next` has waited so far.
    """

    def __init__(self, make: Callable[[], Piece], count: int) -> None:
        self._make, self._left = make, count
        self._threads = torch.get_num_threads()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._coming: deque[Future[Piece]] = deque()
        self.waited_s = 0.0

    def __enter__(self) -> Prefetch[Piece]:
        self._executor.submit(torch.set_num_threads, self._threads)  # the setting is each thread's own
        for _ in range(AHEAD):
            self._ask()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def next(self) -> Piece:
        """Return the next piece; waits until it is made.

        Raises:
            IndexError: all pieces have been returned.
        """
        began = time.perf_counter()
        piece = self._coming.popleft().result()
        self.waited_s += time.perf_counter() - began
        self._ask()
        return piece

    def _ask(self) -> None:
        if self._left > 0:
            self._left -= 1
            self._coming.append(self._executor.submit(self._make))
