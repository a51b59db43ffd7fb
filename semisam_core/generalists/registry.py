"""The generalists that a plan may name, what each takes, and their loading once per process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from semisam_core.errors import ConfigError
from semisam_core.generalists.base import Generalist, PromptKind

Loader = Callable[[torch.device, Path | None, str | None], Generalist]


@dataclass(frozen=True)
class GeneralistSpec:
    """What can be known of a generalist before its weights are read.

    Attributes:
        name: as plans and site files call it.
        prompt_kinds: the prompts that it was trained for.
        loader: (device, weights file or None for the default, its SHA-256 or None) -> the model.
    """

    name: str
    prompt_kinds: frozenset[PromptKind]
    loader: Loader


def _load_lite_medsam(device: torch.device, weights: Path | None, sha256: str | None) -> Generalist:
    from semisam_core.generalists.lite_medsam import LiteMedSAM

    return LiteMedSAM.load(device, weights, sha256)


_SPECS: dict[str, GeneralistSpec] = {
    "lite-medsam": GeneralistSpec("lite-medsam", frozenset({PromptKind.BOX_2D}), _load_lite_medsam),
}
_loaded: dict[tuple[str, Path | None, str, str | None], Generalist] = {}
_lock = threading.Lock()


def register(spec: GeneralistSpec) -> None:
    """Make a further generalist known by name, in this process.

    Raises:
        ValueError: the name is taken by another one.
    """
    if _SPECS.setdefault(spec.name, spec) is not spec:
        raise ValueError(f"a generalist named {spec.name} is already registered; choose another name")


def generalist_names() -> tuple[str, ...]:
    """Return the names that are accepted, in alphabetical order."""
    return tuple(sorted(_SPECS))


def accepted_prompts(name: str) -> frozenset[PromptKind]:
    """Return the kinds of prompt that a generalist takes, without loading it.

    Raises:
        ConfigError: no generalist has this name.
    """
    return _spec(name).prompt_kinds


def load_generalist(
    name: str, device: torch.device, weights: Path | None = None, sha256: str | None = None
) -> Generalist:
    """Return a generalist, loaded at the first call and kept for the life of the process.

    Args:
        name: one of `generalist_names()`.
        device: where it runs.
        weights: its weights file; None takes the published default.
        sha256: the hash that the weights file must have, in hexadecimal.

    Raises:
        ConfigError: no generalist has this name.
        WeightsError: the weights are missing, altered or of another architecture.
    """
    spec = _spec(name)
    path = None if weights is None else weights.resolve()
    key = (name, path, str(device), None if sha256 is None else sha256.lower())
    with _lock:
        if key not in _loaded:
            _loaded[key] = spec.loader(device, path, sha256)
        return _loaded[key]


def _spec(name: str) -> GeneralistSpec:
    if name not in _SPECS:
        raise ConfigError(f"no generalist is named {name!r}; accepted are {', '.join(generalist_names())}")
    return _SPECS[name]
