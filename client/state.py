"""A site's state of one run on its own disk: the teacher of each round, and what was learned of each case."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from semisam_core.files import save_tensors

RUN_NAME = re.compile(r"^[a-z0-9][a-z0-9-]{0,62}$")
KEEP_TEACHERS = 3


class RunState:
    """The folder of one run at one site.

    The teacher is kept for each of the last rounds, so that a round which is asked for again, because the server died
    after the site had answered, starts from the same teacher as the first time.

    Args:
        storage: the site's storage folder.
        run: the run's name; checked, since it comes over the wire and names a folder.

    Raises:
        ValueError: the name is not lowercase letters, digits and dashes.
    """

    def __init__(self, storage: Path, run: str) -> None:
        if not RUN_NAME.fullmatch(run):
            raise ValueError("a run's name has lowercase letters, digits and dashes, at most 63")
        self.folder = storage / "runs" / run
        self.folder.mkdir(parents=True, exist_ok=True)

    def save_teacher(self, round_number: int, teacher: dict[str, Tensor]) -> None:
        """Keep the teacher as it is after this round, and drop those of long ago.

        Raises:
            OSError: the disk is full.
        """
        save_tensors(self._teacher(round_number), teacher)
        for path in self.folder.glob("teacher-*.safetensors"):
            number = path.stem.removeprefix("teacher-")
            if number.isdigit() and int(number) <= round_number - KEEP_TEACHERS:
                path.unlink(missing_ok=True)

    def load_teacher(self, round_number: int) -> dict[str, Tensor] | None:
        """Return the teacher as it was after this round, or None where it was not kept."""
        try:
            return load_file(self._teacher(round_number))
        except (OSError, SafetensorError):
            return None

    def _teacher(self, round_number: int) -> Path:
        return self.folder / f"teacher-{round_number:05d}.safetensors"
