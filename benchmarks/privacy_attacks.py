"""Published attacks on what leaves a site, for `privacy_audit.py`; each takes plain arrays or a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta, rankdata
from torch import Tensor, nn

from semisam_core.losses import supervised_loss

Floats = NDArray[np.float64]
Members = NDArray[np.bool_]
SMOOTHNESS = 0.03  # weight of total variation; of 0.001 to 0.03 the best on one phantom


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % percentile interval."""

    value: float
    low: float
    high: float


def loss_scores(losses: Floats) -> Floats:
    """Return how much each patient looks like a member by the loss alone (Yeom et al., CSF 2018)."""
    return -losses


def likelihood_scores(losses: Floats, members: Members) -> Floats:
    """Return the scores of the offline likelihood-ratio attack (LiRA; Carlini et al., S&P 2022).

    Each model is attacked with the others as its shadow models. A patient's score is by how many deviations the logit
    of exp(-loss) lies above its mean over the shadow models that were trained without the patient; as the paper advises
    for few shadow models, all patients have one deviation in common. A patient whom every shadow model knows scores 0.

    Args:
        losses: (N, M), of each model on each patient; above 0.
        members: (N, M), whom each model was trained on.

    Returns:
        (N, M).
    """
    confidence = -np.log(np.expm1(np.maximum(losses, 1e-12)))
    scores = np.zeros_like(losses)
    for target in range(len(losses)):
        outside = ~members
        outside[target] = False
        count = outside.sum(0)
        mean = np.where(outside, confidence, 0).sum(0) / np.maximum(count, 1)
        residuals = np.where(outside, confidence - mean, 0)
        deviation = math.sqrt((residuals**2).sum() / max(1, int(np.maximum(count - 1, 0).sum())))
        scores[target] = np.where(count > 0, (confidence[target] - mean) / max(deviation, 1e-12), 0)
    return scores


def area_under_curve(scores: Floats, members: Members) -> float:
    """Return the probability that a member scores above another, half counting for equals."""
    ranks, inside = rankdata(scores, axis=None).reshape(scores.shape), int(members.sum())
    return float((ranks[members].sum() - inside * (inside + 1) / 2) / (inside * (members.size - inside)))


def detected(scores: Floats, members: Members, rate: float) -> float:
    """Return the share of members found at a threshold above which at most `rate` of the others score."""
    others = np.sort(scores[~members])[::-1]
    return float((scores[members] > others[int(rate * len(others))]).mean())


def advantage(losses: Floats, members: Members) -> float:
    """Return true minus false positive rate at Yeom's threshold, each model's mean loss on its members."""
    threshold = np.where(members, losses, 0).sum(1, keepdims=True) / np.maximum(members.sum(1, keepdims=True), 1)
    guessed = losses <= threshold
    return float(guessed[members].mean() - guessed[~members].mean())


def with_interval(
    measure: Callable[[Floats, Members], float], scores: Floats, members: Members, seed: int, draws: int = 1000
) -> Estimate:
    """Return a measure with an interval from resampling models, whose patients depend on each other."""
    random, found = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = random.integers(len(scores), size=len(scores))
        if 0 < members[drawn].sum() < members.size:
            found.append(measure(scores[drawn], members[drawn]))
    low, high = np.percentile(found, [2.5, 97.5])
    return Estimate(measure(scores, members), float(low), float(high))


def gradient_of(network: nn.Module, image: Tensor, label: Tensor, graph: bool = False) -> list[Tensor]:
    """Return the gradient of the supervised loss on (1, C, H, W, D) and (1, H, W, D)."""
    loss = supervised_loss(network(image), label)
    return list(torch.autograd.grad(loss, list(network.parameters()), create_graph=graph))


def invert(
    network: nn.Module,
    label: Tensor,
    gradient: Sequence[Tensor],
    iterations: int,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the image (1, 1, H, W, D) whose gradient points most nearly where a patient's does.

    Geiping et al., NeurIPS 2020: signed Adam steps on one minus the cosine similarity, plus total variation. The label
    is given to the attack, which is more than a server has.

    Args:
        network: with the weights at which the gradient was taken.
        label: (1, H, W, D), the patient's.
        gradient: a tensor for each parameter; its length does not matter.
        iterations: steps.
        seed: of the noise that it starts from.
        progress: called after each step.
    """
    image = torch.randn((1, *label.shape), generator=torch.Generator().manual_seed(seed)).requires_grad_()
    adam = torch.optim.Adam([image], lr=0.1)
    marks = [round(iterations * share) for share in (3 / 8, 5 / 8, 7 / 8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, marks, 0.1)
    length = torch.sqrt(sum((each.square().sum() for each in gradient), torch.zeros(())))
    for _ in range(iterations):
        found = gradient_of(network, image, label, graph=True)
        dot = sum(((a * b).sum() for a, b in zip(found, gradient, strict=True)), torch.zeros(()))
        own = torch.sqrt(sum((each.square().sum() for each in found), torch.zeros(())))
        variation = sum((image.diff(dim=axis).abs().mean() for axis in (2, 3, 4)), torch.zeros(()))
        (image.grad,) = torch.autograd.grad(1 - dot / (own * length + 1e-12) + SMOOTHNESS * variation, [image])
        image.grad.sign_()
        adam.step()
        schedule.step()
        progress()
    return image.detach()


def likeness(one: Tensor, other: Tensor) -> float:
    """Return the correlation of two images' voxels: networks with instance norm do not see gain and offset."""
    return float(np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1])


def own_likeness(one: Tensor, other: Tensor, known: Tensor) -> float:
    """Return the correlation of what is left of two images without what a third one says of them."""
    mean = known - known.mean()
    one, other = (x - x.mean() - (x * mean).sum() / mean.square().sum() * mean for x in (one, other))
    return likeness(one, other)


def epsilon_bound(planted: Floats, without: Floats, delta: float, confidence: float = 0.95) -> float:
    """Return a lower bound on epsilon from runs with and without a canary (Jagielski et al., NeurIPS 2020).

    A threshold is chosen on the first half of the runs. On the second half the rates of true and false positives get
    Clopper-Pearson bounds that hold together with the given confidence. Then both (eps, delta) inequalities of the
    hypothesis test (Kairouz et al., ICML 2015; Nasr et al., S&P 2021) bound epsilon from below.

    Args:
        planted: (R,), a statistic that is larger with the canary, of runs that trained on it.
        without: (R,), of runs that did not.
        delta: of the guarantee.
        confidence: with which the bound holds.
    """
    first, second = len(planted) // 2, len(without) // 2
    thresholds = np.unique(np.concatenate((planted[:first], without[:second])))
    guesses = _bounds_at(thresholds, planted[:first], without[:second], delta, confidence)
    best = thresholds[[int(guesses.argmax())]]
    return float(_bounds_at(best, planted[first:], without[second:], delta, confidence)[0])


def largest_bound(runs: int, delta: float, confidence: float = 0.95) -> float:
    """Return the bound that as many runs give if the canary is told every time."""
    return epsilon_bound(np.ones(runs), np.zeros(runs), delta, confidence)


def _bounds_at(thresholds: Floats, planted: Floats, without: Floats, delta: float, confidence: float) -> Floats:
    error = (1 - confidence) / 2  # for each of the two rates
    hits, alarms = ((each[None] >= thresholds[:, None]).sum(1) for each in (planted, without))
    found = np.where(hits > 0, beta.ppf(error, np.maximum(hits, 1), len(planted) - hits + 1), 0.0)
    silent = len(without) - alarms
    alarmed = np.where(silent > 0, beta.ppf(1 - error, alarms + 1, np.maximum(silent, 1)), 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        pairs = np.log((found - delta) / alarmed), np.log((1 - alarmed - delta) / (1 - found))
    return np.maximum(0.0, np.nan_to_num(pairs, nan=0.0, neginf=0.0).max(0))
