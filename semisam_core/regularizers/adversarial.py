"""Deep adversarial network (Zhang et al., MICCAI 2017): segment unlabeled scans as well as labeled ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from semisam_core.losses import merge_rest
from semisam_core.regularizers.auxiliary_networks import AuxiliaryNetworks, initial_seed
from semisam_core.regularizers.base import RegularizerContext, RegularizerLosses, TrainingStep

FEATURES = (16, 32, 64, 128)
LEARNING_RATE = 1e-4
BETAS = (0.9, 0.99)


class Discriminator(nn.Module):
    """Score a scan with its segmentation: high if the pair looks like a labeled scan.

    Strided convolutions and global average pooling, so patches of any size fit. No dropout: it draws from the global
    random state.

    Args:
        channels: number of channels of image and probabilities together.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((channels, *FEATURES[:-1]), FEATURES, strict=True):
            layers += [nn.Conv3d(inputs, outputs, kernel_size=3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers)
        self.score = nn.Linear(FEATURES[-1], 1)

    def forward(self, image: Tensor, probability: Tensor) -> Tensor:
        """Return one logit per patch, (B,); image (B, C, H, W, D), probability (B, 1 + K, H, W, D)."""
        features = self.features(torch.cat([image, probability], 1)).mean((2, 3, 4))  # (B, 128)
        score: Tensor = self.score(features)[:, 0]
        return score


class DeepAdversarial:
    """Discriminator E tells segmented labeled scans (1) from segmented unlabeled ones (0); the student fools it.

        student:        bce(E(u, p_u), 1)
        discriminator:  bce(E(x, p_x), 1) + bce(E(u, p_u), 0)

    The student maximises E's error in the non-saturating form, which keeps its gradient when E is confident
    (Goodfellow et al., 2014). Where only some classes are annotated, E sees the others as background: their
    segmentation is no better on labeled scans than on unlabeled ones. At a site without labeled scans E would see only
    one kind of scan, so it is not trained there and the term does not apply.
    """

    def __init__(self, context: RegularizerContext) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(initial_seed(context.seed, "discriminator"))
            discriminator = Discriminator(context.channels + 1 + context.classes)
        self._discriminator = discriminator.to(context.device)
        self.auxiliary = AuxiliaryNetworks(
            {"discriminator": self._discriminator},
            lambda networks: torch.optim.Adam(networks.parameters(), lr=LEARNING_RATE, betas=BETAS),
            lambda _: LEARNING_RATE,
        )

    def losses(self, step: TrainingStep) -> RegularizerLosses:
        """Return the losses of student and discriminator."""
        if step.labeled is None:
            return RegularizerLosses(None)
        annotated = step.labeled.annotated
        image, probability = step.unlabeled.image, merge_rest(step.logits.softmax(1), annotated)
        known = merge_rest(step.labeled.logits.detach().softmax(1), annotated)
        # Detached parameters: the student's loss must not reach the discriminator.
        frozen = {name: value.detach() for name, value in self._discriminator.named_parameters()}
        fooled = functional_call(self._discriminator, frozen, (image, probability))
        labeled = self._discriminator(step.labeled.image, known)
        unlabeled = self._discriminator(image, probability.detach())
        return RegularizerLosses(_bce(fooled, 1.0), _bce(labeled, 1.0) + _bce(unlabeled, 0.0))


def _bce(logits: Tensor, target: float) -> Tensor:
    """Return the mean binary cross-entropy of logits (B,) with one target: 1 for labeled, 0 for unlabeled."""
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))
