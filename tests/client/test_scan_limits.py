"""The site's memory limit applies to every scan that a site loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from client.site import NoUsableCaseError, Site
from client.site_config import load_site_config
from tests.conftest import tiny_plan

IMAGE_GB = 24 * 24 * 16 * 4 / 1e9


def test_scans_that_do_not_fit_the_sites_memory_are_quarantined(make_site: Callable[..., Path]) -> None:
    site = Site(load_site_config(make_site(storage={"memory_gb": 0.9 * IMAGE_GB})), tiny_plan(), "run", 1)
    with pytest.raises(NoUsableCaseError):
        site.join()
    reasons = [entry["reason"] for entry in json.loads((site.state.folder / "quarantine.json").read_text())]
    assert len(reasons) == 3
    assert all("raise storage.memory_gb" in reason for reason in reasons)


def test_scans_that_just_fit_are_used(make_site: Callable[..., Path]) -> None:
    site = Site(load_site_config(make_site(storage={"memory_gb": IMAGE_GB})), tiny_plan("pseudo_labels=null"), "run", 1)
    assert site.join().scalars["quarantined"] == 0
