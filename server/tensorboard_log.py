"""The scalars of a run for TensorBoard, in the run folder."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from server.scalars import RoundScalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
TICK_S = 0.05


class TensorBoardLogger:
    """Writes one event file each time that it begins.

    Args:
        run_folder: the run folder.
    """

    name = "TensorBoard"

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / FOLDER
        self._writer: SummaryWriter | None = None

    def begin(self) -> None:
        """Begin another event file; its first event makes TensorBoard forget all steps of those before it."""
        from torch.utils.tensorboard import SummaryWriter

        self.end("")
        self._folder.mkdir(parents=True, exist_ok=True)
        while any(self._folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(TICK_S)  # TensorBoard reads files in the order of their names, which begin with the second
        self._writer = SummaryWriter(str(self._folder), purge_step=0)

    def log(self, steps: Iterable[RoundScalars]) -> None:
        """Write scalars and flush them to the file."""
        assert self._writer is not None, "begin comes first"
        for step in steps:
            for name, value in step.values.items():
                self._writer.add_scalar(name, value, step.round, step.time)
        self._writer.flush()

    def end(self, state: str) -> None:
        """Close the event file; TensorBoard knows no state of a run."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
