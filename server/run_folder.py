"""The run's record on the server's disk: plan, checkpoints, metrics and status; enough to resume after a kill."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from semisam_core.contract import disagreement, update_spec, weights_sha256
from semisam_core.errors import ConfigError, SemiSAMError
from semisam_core.files import append_json_line, read_json_lines, save_tensors, write_atomically, write_json
from semisam_core.plan import Plan
from server.metrics_log import counted

logger = logging.getLogger(__name__)
RESERVE_BYTES = 65_536
KEEP_MOMENTS = 3
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EFBIG: "the file is too large",
}


class RecordNotKeptError(SemiSAMError):
    """The run folder could not be written. What was there is unchanged."""


@dataclass(frozen=True)
class Checkpoint:
    """The global weights after one round.

    Attributes:
        round: the round.
        weights: the specialist's tensors that travel.
        record: the round's line in `metrics.jsonl`; empty for the initial specialist.
        moments: the server optimizer's state after the round; empty if it has none.
    """

    round: int
    weights: dict[str, Tensor]
    record: dict[str, Any]
    moments: dict[str, Tensor]


class RunFolder:
    """One run's folder.

    `checkpoints/round-00000.safetensors` is the initial specialist; each checkpoint carries the hash of its tensors.
    `best.safetensors` is the one that the plan's selection picks; `metrics.jsonl` has one line per event; `status.json`
    holds the run's status. `.reserve` reserves space, so that the status can be written even when the disk is full.

    Args:
        path: the folder; created if missing.

    Raises:
        RecordNotKeptError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []
        self._reserve = path / ".reserve"
        with self.writing("the run folder"):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            if not self._reserve.exists():
                write_atomically(self._reserve, os.urandom(RESERVE_BYTES))

    @property
    def incoming(self) -> Path:
        """The folder of the current round's updates."""
        return self.path / "incoming"

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn an OSError into a `RecordNotKeptError`.

        Raises:
            RecordNotKeptError: says what could not be written, where and why.
        """
        try:
            yield
        except OSError as error:
            why = FULL.get(error.errno or 0) or error.strerror or str(error)
            raise RecordNotKeptError(
                f"{self.path}: {what} could not be written: {why}. All finished rounds are kept; "
                "free some space, then resume."
            ) from error

    def save_round(
        self,
        round_number: int,
        weights: Mapping[str, Tensor],
        plan: Plan,
        record: Mapping[str, Any] | None = None,
        moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Save the global weights after a round, atomically.

        Args:
            round_number: the round.
            weights: the specialist's tensors that travel.
            plan: the study plan.
            record: the round's line for the metrics, saved with the weights so that it is never lost.
            moments: the server optimizer's state, if it has any; only the last few are kept.

        Raises:
            RecordNotKeptError: the disk is full.
        """
        metadata = {
            "plan": plan.hash,
            "round": str(round_number),
            "sha256": weights_sha256(weights),
            "moments": weights_sha256(moments or {}),
            "record": json.dumps(dict(record or {}), sort_keys=True),
        }
        with self.writing(f"the checkpoint of round {round_number}"):
            if moments:  # first, because a checkpoint marks its round as finished
                save_tensors(self._moments(round_number), moments)
            save_tensors(self._checkpoint(round_number), weights, metadata)
            if moments:
                self._moments(round_number - KEEP_MOMENTS).unlink(missing_ok=True)

    def load_round(self, round_number: int, plan: Plan) -> dict[str, Tensor]:
        """Return the weights after this round.

        Raises:
            ConfigError: they are missing, corrupt or not those of this plan's specialist.
        """
        return self._read(round_number, plan)[0]

    def newest(self, plan: Plan) -> Checkpoint | None:
        """Return the newest intact checkpoint of this plan, or None.

        Newer ones are renamed, and the metrics say so.

        Raises:
            RecordNotKeptError: the disk is full.
        """
        for number in self._rounds():
            try:
                weights, metadata = self._read(number, plan)
                moments = self._read_moments(number, metadata)
                return Checkpoint(number, weights, json.loads(metadata.get("record") or "{}"), moments)
            except ConfigError as error:
                path = self._checkpoint(number)
                aside = path.with_suffix(f".torn-{time.time_ns()}")
                with self.writing("the folder of checkpoints"):
                    path.rename(aside)
                logger.error("A checkpoint was renamed to %s. %s", aside.name, error)
                self.record("set-aside", checkpoint=number, file=aside.name, reason=str(error))
        return None

    def last_round(self) -> int | None:
        """Return the last round that has a checkpoint, or None."""
        return next(iter(self._rounds()), None)

    def save_best(self, round_number: int, weights: Mapping[str, Tensor], plan: Plan, chosen_by: str) -> None:
        """Save the selected specialist; the file says how it was selected."""
        metadata = {"plan": plan.hash, "round": str(round_number), "selected_by": chosen_by}
        with self.writing("the selected specialist"):
            save_tensors(self.path / "best.safetensors", weights, metadata | {"sha256": weights_sha256(weights)})

    def record(self, event: str, **content: Any) -> None:
        """Append one line to the metrics, then give it to the `listeners`.

        Raises:
            RecordNotKeptError: the disk is full.
        """
        line = {"event": event, "time": round(time.time(), 3), **content}
        with self.writing("a line of the metrics"):
            append_json_line(self.metrics_path, line)
        for each in self.listeners:
            each(line)

    def records(self, event: str) -> list[dict[str, Any]]:
        """Return all lines of one event that count, in order."""
        return [line for line in counted(read_json_lines(self.metrics_path)) if line.get("event") == event]

    def set_status(self, state: str, reason: str = "", **content: Any) -> None:
        """Write the run's status: running, completed or failed, and why.

        Only a final status may use the reserved space.

        Raises:
            RecordNotKeptError: it could not be written.
        """
        path, status = self.path / "status.json", {"state": state, "reason": reason, **content}
        try:
            write_json(path, status)
        except OSError as error:
            if state == "running" or error.errno not in FULL:
                with self.writing("status.json"):
                    raise
            self._reserve.unlink(missing_ok=True)
            with self.writing("status.json"):
                write_json(path, status)

    def _rounds(self) -> Sequence[int]:
        """Return the rounds that have a checkpoint, latest first."""
        stems = (path.stem.removeprefix("round-") for path in (self.path / "checkpoints").glob("round-*.safetensors"))
        return sorted((int(stem) for stem in stems if stem.isdecimal()), reverse=True)

    def _read(self, number: int, plan: Plan) -> tuple[dict[str, Tensor], dict[str, str]]:
        path = self._checkpoint(number)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: this checkpoint cannot be read ({type(error).__name__}).") from None
        if mistake := disagreement(weights, update_spec(plan)):
            raise ConfigError(f"{path}: this checkpoint does not belong to this plan: {mistake}.")
        if metadata.get("plan") != plan.hash:
            raise ConfigError(f"{path}: this checkpoint does not belong to this plan: it has another plan's hash.")
        if metadata.get("sha256") != weights_sha256(weights):
            raise ConfigError(f"{path}: this checkpoint is corrupt: its tensors do not match its hash.")
        return weights, metadata

    def _read_moments(self, number: int, metadata: Mapping[str, str]) -> dict[str, Tensor]:
        path, expected = self._moments(number), metadata.get("moments")
        if expected == weights_sha256({}):
            return {}
        try:
            moments = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{path}: the server optimizer's state cannot be read ({type(error).__name__})."
            ) from None
        if expected != weights_sha256(moments):
            raise ConfigError(f"{path}: the server optimizer's state does not match the hash in its checkpoint.")
        return moments

    def _moments(self, round_number: int) -> Path:
        return self.path / "checkpoints" / f"optimizer-{round_number:05d}.safetensors"

    def _checkpoint(self, round_number: int) -> Path:
        return self.path / "checkpoints" / f"round-{round_number:05d}.safetensors"
