"""A site's state of one run on its own disk: the tensors that each round left behind."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from semisam_core.configuration import NAME_ACCEPTED, is_name
from semisam_core.contract import weights_sha256
from semisam_core.files import save_tensors

logger = logging.getLogger(__name__)

KEEP_ROUNDS = 3
TEACHER, NETWORKS, LAYERS, MOMENTS, UPDATE = "teacher", "networks", "layers", "moments", "update"
OWED, RECEIVED = "owed", "received"
SCORED = "scored"


class RunState:
    """The folder of one run at one site.

    The teacher, the regularizer's own networks, the specialist's local layers, the optimizer's moments, and with a
    codec what it left out of the update and the weights that the site received are kept for the last three rounds that
    the site took part in, and so are the specialists that were scored. Each `load_*` that names a round returns what
    the latest of the site's rounds before it left, which need not be the round just before: the site may have sat out
    some. A round that is asked for again, because the server died after the site had answered, thus starts from the
    same tensors as the first time.

    Args:
        storage: the site's storage folder.
        run: the run's name; checked, since it comes over the wire and names a folder.

    Raises:
        ValueError: the name is not lowercase letters, digits and dashes.
    """

    def __init__(self, storage: Path, run: str) -> None:
        if not is_name(run):
            raise ValueError(f"a run's name has {NAME_ACCEPTED}")
        self.folder = storage / "runs" / run
        self.folder.mkdir(parents=True, exist_ok=True)

    def save_teacher(self, round_number: int, teacher: dict[str, Tensor]) -> None:
        """Keep the teacher as this round left it.

        Raises:
            OSError: the disk is full.
        """
        self._save(TEACHER, round_number, teacher)

    def load_teacher(self, before: int, since: int = 1) -> dict[str, Tensor] | None:
        """Return the latest teacher of a round before this one and not before `since`, or None."""
        return self._latest(TEACHER, before, since)

    def save_networks(self, round_number: int, networks: dict[str, Tensor]) -> None:
        """Keep the regularizer's own networks as this round left them.

        Raises:
            OSError: the disk is full.
        """
        self._save(NETWORKS, round_number, networks)

    def load_networks(self, before: int, since: int = 1) -> dict[str, Tensor] | None:
        """Return the latest networks of the regularizer of a round before this one and not before `since`, or None."""
        return self._latest(NETWORKS, before, since)

    def save_layers(self, round_number: int, layers: dict[str, Tensor]) -> None:
        """Keep the specialist's local layers as this round left them.

        Raises:
            OSError: the disk is full.
        """
        self._save(LAYERS, round_number, layers)

    def load_layers(self, before: int, since: int = 1) -> dict[str, Tensor] | None:
        """Return the latest local layers of a round before this one and not before `since`, or None."""
        return self._latest(LAYERS, before, since)

    def save_moments(self, round_number: int, moments: dict[str, Tensor]) -> None:
        """Keep the optimizer's moments as this round left them.

        Raises:
            OSError: the disk is full.
        """
        self._save(MOMENTS, round_number, moments)

    def load_moments(self, before: int, since: int = 1) -> dict[str, Tensor] | None:
        """Return the latest moments of the optimizer of a round before this one and not before `since`, or None."""
        return self._latest(MOMENTS, before, since)

    def save_owed(self, round_number: int, owed: dict[str, Tensor]) -> None:
        """Keep what the codec left out of this round's update.

        Raises:
            OSError: the disk is full.
        """
        self._save(OWED, round_number, owed)

    def load_owed(self, before: int, since: int = 1) -> dict[str, Tensor] | None:
        """Return what was left out in the latest round before this one and not before `since`, or None."""
        return self._latest(OWED, before, since)

    def save_received(self, round_number: int, weights: dict[str, Tensor]) -> None:
        """Keep the global weights that this round began with.

        Raises:
            OSError: the disk is full.
        """
        self._save(RECEIVED, round_number, weights)

    def load_received(self, sha256: str) -> dict[str, Tensor] | None:
        """Return the kept global weights with this hash, or None."""
        kept = (_read(self._file(RECEIVED, number)) for number in self._rounds(RECEIVED))
        return next((each for each in kept if each is not None and weights_sha256(each) == sha256), None)

    def save_scored(self, round_number: int, specialist: dict[str, Tensor]) -> None:
        """Keep the specialist that was scored after this round, with the site's own layers, for the site's report.

        Raises:
            OSError: the disk is full.
        """
        self._save(SCORED, round_number, specialist)

    def load_scored(self) -> tuple[int, dict[str, Tensor]] | None:
        """Return the round whose specialist was scored last, and that specialist; None before the first."""
        kept = ((number, _read(self._file(SCORED, number))) for number in self._rounds(SCORED))
        return next(((number, tensors) for number, tensors in kept if tensors is not None), None)

    def save_update(
        self, round_number: int, asked: str, tensors: dict[str, Tensor], scalars: dict[str, float | int]
    ) -> None:
        """Keep what this round sends, so that to send it again costs nothing.

        Args:
            round_number: counts from 1.
            asked: hash of what the site was asked.
            tensors: the update.
            scalars: those that go with it.

        Raises:
            OSError: the disk is full.
        """
        self._save(UPDATE, round_number, tensors, {"asked": asked, "scalars": json.dumps(scalars)})

    def load_update(self, round_number: int, asked: str) -> tuple[dict[str, Tensor], dict[str, float | int]] | None:
        """Return what this round sent when it was asked the same, or None."""
        path = self._file(UPDATE, round_number)
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("asked") != asked:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(json.loads(about["scalars"]))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read and is ignored: %s", path, error)
            return None

    def _latest(self, kind: str, before: int, since: int) -> dict[str, Tensor] | None:
        earlier = (number for number in self._rounds(kind) if since <= number < before)
        kept = (_read(self._file(kind, number)) for number in earlier)
        return next((tensors for tensors in kept if tensors is not None), None)

    def _save(
        self, kind: str, round_number: int, tensors: dict[str, Tensor], about: dict[str, str] | None = None
    ) -> None:
        save_tensors(self._file(kind, round_number), tensors, about)
        # Files of later rounds do not count: a resumed server may ask for a round again that precedes them.
        until_now = [number for number in self._rounds(kind) if number <= round_number]
        for number in until_now[KEEP_ROUNDS:]:
            self._file(kind, number).unlink(missing_ok=True)

    def _rounds(self, kind: str) -> list[int]:
        """Return the rounds whose tensors of this kind are kept, latest first."""
        numbers = (path.stem.removeprefix(f"{kind}-") for path in self.folder.glob(f"{kind}-*.safetensors"))
        return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)

    def _file(self, kind: str, round_number: int) -> Path:
        return self.folder / f"{kind}-{round_number:05d}.safetensors"


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be read and is ignored: %s", path, error)
        return None
