"""The run's record on the server's disk: plan, a checkpoint a round, metrics, state; enough to go on after a kill."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from semisam_core.agreement import disagreement, specialist_spec
from semisam_core.errors import ConfigError
from semisam_core.files import append_json_line, read_json_lines, save_tensors, write_json
from semisam_core.plan import Plan


class RunFolder:
    """One run's folder.

    `checkpoints/round-00000.safetensors` is the initial specialist; `best.safetensors` is the one the plan's
    selection picks; `metrics.jsonl` has one line for each thing that happened; `status.json` how the run stands.

    Args:
        path: the folder; made if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)

    def save_round(self, round_number: int, weights: Mapping[str, Tensor], plan: Plan) -> None:
        """Keep the global weights after this round, whole or not at all.

        Raises:
            OSError: the disk is full.
        """
        save_tensors(self._checkpoint(round_number), weights, {"plan": plan.hash, "round": str(round_number)})

    def load_round(self, round_number: int, plan: Plan) -> dict[str, Tensor]:
        """Return the weights after this round.

        Raises:
            ConfigError: they are missing, torn or not of this plan's specialist.
        """
        path = self._checkpoint(round_number)
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: this checkpoint cannot be read ({type(error).__name__}).") from None
        if mistake := disagreement(weights, specialist_spec(plan)):
            raise ConfigError(f"{path}: this checkpoint is not of this plan: {mistake}.")
        return weights

    def last_round(self) -> int | None:
        """Return the last round that has a checkpoint, or None."""
        stems = [path.stem.removeprefix("round-") for path in (self.path / "checkpoints").glob("round-*.safetensors")]
        return max((int(stem) for stem in stems if stem.isdecimal()), default=None)

    def save_best(self, round_number: int, weights: Mapping[str, Tensor], plan: Plan, chosen_by: str) -> None:
        """Keep the selected specialist; what it was selected by is written into the file."""
        metadata = {"plan": plan.hash, "round": str(round_number), "selected_by": chosen_by}
        save_tensors(self.path / "best.safetensors", weights, metadata)

    def record(self, event: str, **content: Any) -> None:
        """Append one line to the metrics."""
        append_json_line(self.metrics_path, {"event": event, "time": round(time.time(), 3), **content})

    def records(self, event: str) -> list[dict[str, Any]]:
        """Return all lines of one kind of event, in order."""
        return [line for line in read_json_lines(self.metrics_path) if line.get("event") == event]

    def set_status(self, state: str, reason: str = "", **content: Any) -> None:
        """Say how the run stands: running, completed or failed, with the reason."""
        write_json(self.path / "status.json", {"state": state, "reason": reason, **content})

    def _checkpoint(self, round_number: int) -> Path:
        return self.path / "checkpoints" / f"round-{round_number:05d}.safetensors"
