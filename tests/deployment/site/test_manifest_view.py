"""`semisam site manifest`: a person reads before joining what would leave."""

from __future__ import annotations

import json
from pathlib import Path

from semisam_core.contract import JOIN_SCALARS, TRAIN_SCALARS, evaluation_scalars, update_spec
from semisam_core.plan import load_plan
from tests.deployment.site.places import change, invite, semisam


def _initialised(place: Path) -> Path:
    site = place / "site"
    assert semisam("site", "init", invite(place), "--folder", site).exit_code == 0
    return site


def test_everything_that_may_leave_is_printed_before_anything_is_approved(tmp_path: Path) -> None:
    site = _initialised(tmp_path)
    plan = load_plan(site / "plan.yaml")
    shown = semisam("site", "manifest", "--folder", site)
    assert shown.exit_code == 0, shown.output
    listed = json.loads(semisam("site", "manifest", "--folder", site, "--json").stdout)
    words = set(shown.output.split())
    assert {*JOIN_SCALARS, *TRAIN_SCALARS, *evaluation_scalars(plan)} <= words
    assert set(update_spec(plan)) <= words
    assert f"{listed['most_bytes']:,} bytes" in shown.output
    assert f"Manifest {listed['hash']}" in shown.output
    assert "train: 2 times" in shown.output


def test_an_update_over_the_sites_limit_is_said_not_to_leave(tmp_path: Path) -> None:
    site = _initialised(tmp_path)
    assert "would not leave" not in semisam("site", "manifest", "--folder", site).output
    change(site, "egress.maximum_update_mb=0.001")
    assert "would not leave" in semisam("site", "manifest", "--folder", site).output
