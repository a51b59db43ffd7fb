"""Scores and pseudo-labels have separate window overlaps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from client.scans import ScanPair
from client.site import Site
from client.site_config import load_site_config
from semisam_core.data.cases import Role
from tests.conftest import tiny_plan


class _Counting(torch.nn.Module):
    """A specialist that calls bright voxels foreground and counts the windows it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = 0

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        self.windows += len(patches)
        return torch.cat([torch.zeros_like(patches[:, :1]), patches[:, :1]], 1)


def _windows(site: Path, *changes: str) -> int:
    working = Site(load_site_config(site), tiny_plan(*changes), "run", 1)
    [(_, load)] = working.scans.pair_loaders(Role.UNLABELED)
    pair, network = load(), _Counting()
    assert isinstance(pair, ScanPair)
    working._labeler.ask("case-1", pair, network, [])
    return network.windows


def test_the_overlap_of_scores_does_not_change_pseudo_labels(make_site: Callable[..., Path]) -> None:
    site = make_site()  # 24 x 24 x 16 voxels, windows of 16 x 16 x 8
    usual = _windows(site)
    assert _windows(site, "evaluation.overlap=0.75") == usual == 2 * 2 * 3
    assert _windows(site, "pseudo_labels.window_overlap=0.75") > usual


def test_the_canonical_plan_has_the_key_only_if_it_is_not_the_default() -> None:
    assert tiny_plan("pseudo_labels.window_overlap=0.25").hash == tiny_plan().hash
    assert "window_overlap" not in tiny_plan().canonical_json()
    assert tiny_plan("pseudo_labels.window_overlap=0.5").hash != tiny_plan().hash
