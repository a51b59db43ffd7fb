"""The private step: patients' gradients one at a time, clipped, summed, noised, by Opacus's optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from semisam_core.plan_sections.privacy import Privacy
from semisam_core.privacy.randomness import Randomness


def patient_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
    """Return the gradient of one patient's loss, a tensor for each parameter; None if a value of it is not finite.

    One backward pass for each patient is exact for every network and every loss, needs the memory of a single patient,
    and on a CPU takes no longer than Opacus's per-sample hooks, which know patches but not patients.

    Args:
        loss: a scalar that depends on one patient's patches only.
        parameters: of the specialist.
    """
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    finite = all(bool(torch.isfinite(each).all()) for each in gradient)
    return gradient if finite else None


class PatientOptimizer:
    """Opacus's optimizer with noise from our own source and patients in the place of samples.

    A step is `add` for each patient that was drawn, if any, and one `step`.

    Args:
        optimizer: the specialist's.
        settings: clipping norm, noise and sampling rate.
        patients: of the site; their number by the sampling rate divides the noised sum.
        randomness: source of the noise.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, settings: Privacy, patients: int, randomness: Randomness
    ) -> None:
        self._inner = _WithNoiseFrom(randomness, optimizer, settings, patients)
        self.parameters: list[nn.Parameter] = self._inner.params

    def add(self, gradient: Sequence[Tensor]) -> None:
        """Clip one patient's gradient and add it to the sum."""
        self._hand_over([each[None] for each in gradient])
        self._inner.signal_skip_step(True)
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)

    def step(self, rate: float, more: Callable[[], None] | None = None) -> None:
        """Add the noise, divide, and let the optimizer take its step. Without patients there is only noise.

        Args:
            rate: the learning rate.
            more: called when the noised gradient is in place, to add what depends on no patient.
        """
        for group in self._inner.param_groups:
            group["lr"] = rate
        self._hand_over([torch.zeros((0, *p.shape), device=p.device) for p in self.parameters])
        self._inner.attach_step_hook(lambda _: None if more is None else more())
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)

    def _hand_over(self, gradients: Sequence[Tensor]) -> None:
        parameters: list[Any] = self.parameters  # Opacus looks for per-sample gradients at this attribute
        for p, each in zip(parameters, gradients, strict=True):
            p.grad_sample = each


class _WithNoiseFrom(DPOptimizer):  # type: ignore[misc]
    def __init__(
        self, randomness: Randomness, optimizer: torch.optim.Optimizer, settings: Privacy, patients: int
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=settings.noise_multiplier,
            max_grad_norm=settings.clipping_norm,
            expected_batch_size=settings.sampling_rate * patients,
        )
        self._randomness = randomness

    def add_noise(self) -> None:
        for p in self.params:
            noise = self._randomness.normal(p.shape, self.noise_multiplier * self.max_grad_norm)
            p.grad = p.summed_grad + noise.to(p.device, p.dtype)
