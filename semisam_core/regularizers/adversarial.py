"""Deep adversarial network (Zhang et al., MICCAI 2017): unlabeled scans segmented as if they had been labeled."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from semisam_core.losses import merge_rest
from semisam_core.regularizers.base import Losses, RegularizerContext, Step
from semisam_core.regularizers.own_networks import OwnNetworks, initial_seed

FEATURES = (16, 32, 64, 128)
LEARNING_RATE = 1e-4
BETAS = (0.9, 0.99)


class Discriminator(nn.Module):
    """Score a scan with its segmentation: high if it looks as segmented labeled scans do.

    Strided convolutions and a mean over what is left, so any patch will do. No dropout: its randomness is global.

    Args:
        channels: of image and probabilities together.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((channels, *FEATURES[:-1]), FEATURES, strict=True):
            layers += [nn.Conv3d(inputs, outputs, kernel_size=3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers)
        self.score = nn.Linear(FEATURES[-1], 1)

    def forward(self, image: Tensor, probability: Tensor) -> Tensor:
        """Return one logit a patch, (B,); image (B, C, H, W, D), probability (B, 1 + K, H, W, D)."""
        features = self.features(torch.cat([image, probability], 1)).mean((2, 3, 4))  # (B, 128)
        score: Tensor = self.score(features)[:, 0]
        return score


class DeepAdversarial:
    """The discriminator E tells segmented labeled scans (1) from unlabeled ones (0); the student deceives it.

        student:        bce(E(u, p_u), 1)
        discriminator:  bce(E(x, p_x), 1) + bce(E(u, p_u), 0)

    The student maximises E's mistake in the form that keeps its gradient when E is sure (Goodfellow et al., 2014).
    Where the site's labels mark some of the classes only, E sees the others as background: of those, answers to labeled
    scans are no better than any. At a site without labeled scans E would know one kind only: it is not trained there,
    and the term does not apply.

    Args:
        context: channels, classes, seed and device.
    """

    def __init__(self, context: RegularizerContext) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(initial_seed(context.seed, "discriminator"))
            discriminator = Discriminator(context.channels + 1 + context.classes)
        self._discriminator = discriminator.to(context.device)
        self.own = OwnNetworks(
            {"discriminator": self._discriminator},
            lambda networks: torch.optim.Adam(networks.parameters(), lr=LEARNING_RATE, betas=BETAS),
            lambda _: LEARNING_RATE,
        )

    def losses(self, step: Step) -> Losses:
        """Return the losses of student and discriminator; see `Regularizer.losses`."""
        if step.labeled is None:
            return Losses(None)
        annotated = step.labeled.annotated
        image, probability = step.unlabeled.image, merge_rest(step.logits.softmax(1), annotated)
        known = merge_rest(step.labeled.logits.detach().softmax(1), annotated)
        # Parameters without gradient: the student's loss must not reach the discriminator.
        fixed = {name: value.detach() for name, value in self._discriminator.named_parameters()}
        deceived = functional_call(self._discriminator, fixed, (image, probability))
        labeled = self._discriminator(step.labeled.image, known)
        unlabeled = self._discriminator(image, probability.detach())
        return Losses(_against(deceived, 1.0), _against(labeled, 1.0) + _against(unlabeled, 0.0))


def _against(logits: Tensor, kind: float) -> Tensor:
    """Return the mean binary cross-entropy of logits (B,) against one kind, 1 for labeled and 0 for unlabeled."""
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, kind))
