"""Where a model computes."""

from __future__ import annotations

import re

import torch

from semisam_core.errors import ConfigError


def use(device: str, threads: int | None) -> torch.device:
    """Return the device of this name, `auto` being a GPU if there is one, and set the number of CPU threads.

    Raises:
        ConfigError: there is no such device here.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if gpus else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None or (device != "cpu" and int(match[1] or 0) >= gpus):
        raise ConfigError(
            f"--device {device}: this machine has {gpus} GPUs; accepted are auto, cpu, cuda, cuda:<number>."
        )
    return torch.device(device)
