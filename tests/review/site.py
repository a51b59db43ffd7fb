"""A site whose run has pseudo-labels, to review."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from client.site import Site
from client.site_config import load_site_config
from review.masks import Mask
from review.reviewing import Opened, Reviewing
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from tests.conftest import tiny_plan
from tests.semisam_core.generalists.fake import register_fake

MakeSite = Callable[..., Path]
EAGER = ("pseudo_labels.prompting.threshold=0.01", "pseudo_labels.gates.minimum_volume_ml=0.0")
register_fake()
PLAN = tiny_plan(*EAGER)


def weights(plan: Plan = PLAN) -> dict[str, torch.Tensor]:
    """Return a new specialist's."""
    return dict(new_specialist(plan).state_dict())


def site_in(path: Path, round_number: int, plan: Plan = PLAN, run: str = "run") -> Site:
    """Return the site in a round."""
    return Site(load_site_config(path), plan, run, round_number)


def trained(path: Path, plan: Plan = PLAN) -> Path:
    """Train round 1, which makes pseudo-labels; return the site's YAML."""
    site_in(path, 1, plan).train(weights(plan))
    return path


def reviewing(path: Path, rater: str = "r1", plan: Plan = PLAN, second: bool = False) -> Reviewing:
    """Return a rater at work on the run."""
    return Reviewing(load_site_config(path), plan, rater, second=second)


def corrected(opened: Opened) -> Mask:
    """Return a mask that differs from the pseudo-label in one cube."""
    mask = opened.mask.copy()
    mask[2:6, 2:6, 2:6] = np.where(mask[2:6, 2:6, 2:6] == 1, 0, 1)
    return mask
