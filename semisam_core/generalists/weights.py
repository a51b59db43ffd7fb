"""Verified model weights: the file must have the expected hash, and only tensors are read from it."""

from __future__ import annotations

import hashlib
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from semisam_core.errors import WeightsError

_WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys under which training scripts nest the tensors


def verified_sha256(path: Path, expected: str | None, published: str) -> str:
    """Check the SHA-256 of a weights file and return it.

    Args:
        path: the weights file.
        expected: the SHA-256 that it must have, in hexadecimal; None accepts any.
        published: what is accepted, for error messages: name, source and licence.

    Raises:
        WeightsError: the file is missing, cannot be read, or has another hash.
    """
    with _opened(path, published) as file:
        return _verify(file, path, expected, published)


def load_verified_state(
    path: Path, expected: str | None, published: str, device: torch.device
) -> tuple[dict[str, Tensor], str]:
    """Read the tensors and the SHA-256 of a weights file.

    The file is opened once, so it cannot be swapped between hashing and reading. Only tensors are read
    (`weights_only=True`); other objects are never unpickled, unless the model's loader allows a class that holds values
    and no code.

    Args:
        path: the weights file: a state dict, bare or under "model", "state_dict" or "model_state_dict".
        expected: as `verified_sha256`.
        published: as `verified_sha256`.
        device: where to put the tensors.

    Returns:
        (name -> tensor, SHA-256 of the file).

    Raises:
        WeightsError: as `verified_sha256`, or the file contains anything but tensors.
    """
    with _opened(path, published) as file:
        sha256 = _verify(file, path, expected, published)
        file.seek(0)
        try:
            content = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # a damaged file may raise anything
            raise WeightsError(
                f"{path}: not a file of PyTorch tensors that can be read safely "
                f"({type(error).__name__}); accepted is {published}"
            ) from error
    return _state_of(content, path, published), sha256


def load_into(network: torch.nn.Module, state: dict[str, Tensor], path: Path, published: str) -> None:
    """Load tensors into a network; none may be missing or left over.

    Raises:
        WeightsError: the tensors do not fit the network.
    """
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise WeightsError(
            f"{path}: these weights do not fit {type(network).__name__} "
            f"({len(state)} tensors found, {len(network.state_dict())} needed); accepted is {published}"
        ) from error


def _opened(path: Path, published: str) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise WeightsError(
            f"{path}: the weights file cannot be read ({error.strerror}); accepted is {published}"
        ) from error


def _verify(file: BufferedReader, path: Path, expected: str | None, published: str) -> str:
    try:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path}: the weights file cannot be read ({error.strerror})") from error
    if expected is not None and found != expected.lower():
        raise WeightsError(
            f"{path}: the weights file has SHA-256 {found}, expected {expected.lower()}; accepted is {published}"
        )
    return found


def _state_of(content: object, path: Path, published: str) -> dict[str, Tensor]:
    state: object = content
    if isinstance(content, dict):
        state = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), content)
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path}: the file contains no named tensors; accepted is {published}")
    if not all(isinstance(each, Tensor) for each in state.values()):
        raise WeightsError(f"{path}: the file contains more than named tensors; accepted is {published}")
    return {str(name): tensor for name, tensor in state.items()}
