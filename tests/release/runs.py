"""Run folders of studies that have ended, with a small specialist whose answers change from voxel to voxel."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from semisam_core.contract import travelling
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan, write_plan
from server.run_folder import RunFolder

TWO_CLASSES = "task.classes=[{name: left-atrium, value: 3}, {name: outer-shell, values: [5, 9]}]"


def sharp_weights(plan: Plan, gain: float = 2.0) -> dict[str, Tensor]:
    """Return weights under which mistakes of a voxel show, and every class is found."""
    specialist = new_specialist(plan)
    with torch.no_grad():
        for parameter in specialist.parameters():
            parameter.mul_(gain)
    return travelling(plan, specialist)


def write_run(folder: Path, plan: Plan, weights: dict[str, Tensor] | None = None, round_number: int = 2) -> Path:
    """Write what a study leaves: the plan and the selected specialist."""
    run = RunFolder(folder)
    write_plan(folder / "plan.yaml", plan)
    run.save_best(round_number, weights or sharp_weights(plan), plan, "last round")
    return folder


def write_hidden_mass(path: Path, size: int) -> Path:
    """Write a small .nii.gz whose header announces an extension of so many zeros, which readers load at once."""
    image = nib.Nifti1Image(np.ones((24, 24, 16), np.float32), np.eye(4))
    image.header["vox_offset"] = 352 + size
    extension = np.array([size, 6], "<i4").tobytes()  # its size, and the code of a comment
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(image.header.binaryblock + b"\1\0\0\0" + extension)
        for _ in range((size - 8) // 1_000_000):
            file.write(bytes(1_000_000))
        file.write(bytes((size - 8) % 1_000_000) + image.get_fdata(dtype=np.float32).tobytes(order="F"))
    return path
