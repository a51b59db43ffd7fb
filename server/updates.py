"""One round's admitted updates, kept on disk so that memory does not grow with the number of sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from semisam_core.aggregation.norms import change_norm
from semisam_core.contract import HEAD_PREFIX
from semisam_core.files import save_tensors


@dataclass(frozen=True)
class MemoryUpdate:
    """An update with its tensors in memory."""

    site: str
    weights: Mapping[str, Tensor]
    scalars: Mapping[str, float]

    @property
    def names(self) -> Sequence[str]:
        """Names of the tensors."""
        return tuple(self.weights)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor."""
        return self.weights[name]


@dataclass(frozen=True)
class ShelvedUpdate:
    """An update with its tensors in a file.

    Attributes:
        path: the safetensors file.
        size_bytes: size of the file.
        change_norm: Euclidean norm of the specialist's change from the weights at the start of the round.
        head_norm: the same of the feature head; 0 in a study without one.
    """

    site: str
    scalars: Mapping[str, float]
    names: Sequence[str]
    path: Path
    size_bytes: int
    change_norm: float
    head_norm: float

    def tensor(self, name: str) -> Tensor:
        """Return one tensor; the rest of the file is not read.

        Raises:
            OSError: the file is gone.
        """
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


class UpdateShelf:
    """The updates of one round, one file per site. Only names, scalars, sizes and norms stay in memory.

    Args:
        folder: created if missing; updates left there by a killed server are removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._updates: dict[str, ShelvedUpdate] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.clear()

    @property
    def updates(self) -> list[ShelvedUpdate]:
        """The updates in the order of site names, not of arrival."""
        return [self._updates[site] for site in sorted(self._updates)]

    def add(
        self, site: str, weights: Mapping[str, Tensor], scalars: Mapping[str, float], reference: Mapping[str, Tensor]
    ) -> ShelvedUpdate:
        """Save an admitted update.

        Args:
            site: the site's name, as admitted.
            weights: the site's tensors, with the names of `reference`.
            scalars: the agreed scalars.
            reference: the weights at the start of the round.

        Raises:
            ValueError: there is already an update from this site.
            OSError: the disk is full.
        """
        if site in self._updates:
            raise ValueError(f"there is already an update from site {site} in this round")
        path = self.folder / f"{site}.safetensors"
        head = {name: value for name, value in reference.items() if name.startswith(HEAD_PREFIX)}
        specialist = {name: value for name, value in reference.items() if name not in head}
        norms = change_norm(weights, specialist), change_norm(weights, head)
        save_tensors(path, weights)
        update = ShelvedUpdate(site, dict(scalars), tuple(reference), path, path.stat().st_size, *norms)
        self._updates[site] = update
        return update

    def drop(self, site: str) -> None:
        """Remove one site's update, if there is one."""
        if (update := self._updates.pop(site, None)) is not None:
            update.path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all updates, including partial files left by a killed server."""
        self._updates.clear()
        for path in self.folder.glob("*.safetensors*"):
            path.unlink(missing_ok=True)
