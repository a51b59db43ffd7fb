"""L_unsup by name: what the specialist learns from unlabeled scans without any label, true or pseudo."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from semisam_core.regularizers.mean_teacher import MeanTeacher


class Regularizer(Protocol):
    """One regularizer. One that needs a second network owns it and its place in the site's state."""

    def loss(self, student_logits: Tensor, teacher: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss.

        Args:
            student_logits: the student's answer to `batch`, (B, 1 + K, H, W, D).
            teacher: the EMA teacher.
            batch: unlabeled patches (B, C, H, W, D).
            generator: the only source of randomness, on the CPU.
        """


def build_regularizer(name: str) -> Regularizer | None:
    """Return the regularizer of this name, or None for `none`.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "none":
        return None
    if name == "mean-teacher":
        return MeanTeacher()
    raise ValueError(f"unknown regularizer {name!r}; accepted: mean-teacher, none")
