"""One plan for all sites: nnU-Net's heuristics on what sites said, with reasons, and hostile files refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from deployment.lead.planning.derive import derive
from deployment.lead.planning.fingerprints import SiteFingerprint, outliers, read_fingerprints
from semisam_core.data.fingerprint import AXES
from semisam_core.errors import ConfigError
from semisam_core.plan import Plan, load_plan
from semisam_core.specialists import memory_estimate
from tests.conftest import tiny_plan

DRAFT = tiny_plan("pseudo_labels.generalists=[lite-medsam]")


def site(
    name: str,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    extent: tuple[float, float, float] = (160.0, 160.0, 120.0),
    volume: tuple[float, float, float] = (40.0, 60.0, 90.0),
    patients: int = 20,
    plan: Plan = DRAFT,
    p10: tuple[float, float, float] | None = None,
) -> dict[str, Any]:
    channel, target = plan.task.channels[0], plan.class_names[0]
    scalars: dict[str, float] = {"patients": patients}
    for axis, step, fine, length in zip(AXES, spacing, p10 or spacing, extent, strict=True):
        scalars |= {f"spacing_mm.{axis}.{w}": step for w in ("median", "p90")} | {f"spacing_mm.{axis}.p10": fine}
        scalars |= {f"extent_mm.{axis}.{w}": length for w in ("median", "p90")}
    scalars |= {f"intensity.{channel}.{w}": v for w, v in (("p0_5", -80.0), ("median", 90.0), ("p99_5", 220.0))}
    scalars |= {f"volume_ml.{target}.{w}": v for w, v in zip(("p10", "median", "p90"), volume, strict=True)}
    task = plan.task.model_dump(mode="json")
    return {"version": 1, "site": name, "task": task, "fingerprint": scalars}


def sites(*contents: dict[str, Any]) -> list[SiteFingerprint]:
    return [SiteFingerprint.model_validate(each, strict=False) for each in contents]


def test_spacing_is_the_median_over_patients_not_over_sites() -> None:
    found = sites(
        site("a", (1.0, 1.0, 2.0), patients=200),
        site("b", (1.5, 1.5, 2.5), patients=10),
        site("c", (1.5, 1.5, 2.5), patients=10),
    )
    assert derive(DRAFT, found, 64).plan.data.spacing_mm == (1.0, 1.0, 2.0)


def test_an_axis_of_long_voxels_takes_the_10th_percentile_and_is_halved_less() -> None:
    """As nnU-Net does for prostate MR, whose slices are 3.6 mm apart at 0.6 mm within them."""
    found = sites(site("a", (0.6, 0.6, 3.6), (190.0, 190.0, 70.0), p10=(0.6, 0.6, 3.0)))
    proposal = derive(DRAFT, found, 64)
    assert proposal.plan.data.spacing_mm == (0.6, 0.6, 3.0)
    arguments = proposal.plan.specialist.arguments
    assert arguments["strides"][0] == [2, 2, 1]
    assert arguments["kernels"][0] == [3, 3, 1]
    assert "10th percentile" in proposal.reasons["data", "spacing_mm"]


def test_the_training_step_fits_the_memory_and_more_memory_gives_a_larger_patch() -> None:
    budget = 2.0
    plan = derive(DRAFT, sites(site("a", extent=(300.0, 300.0, 300.0))), budget).plan
    batch = plan.training.labeled_batch + plan.training.unlabeled_batch
    needed = memory_estimate("dynunet", plan.specialist.arguments, 1, 1, plan.data.patch, batch)
    assert needed <= budget * 1e9
    smaller = derive(DRAFT, sites(site("a", extent=(300.0, 300.0, 300.0))), budget / 4).plan
    assert sum(smaller.data.patch) < sum(plan.data.patch)


def test_a_patch_is_no_larger_than_the_scans_need() -> None:
    patch = derive(DRAFT, sites(site("a", extent=(35.0, 50.0, 35.0))), 64).plan.data.patch
    assert all(side <= length + 16 for side, length in zip(patch, (35, 50, 35), strict=True))


def test_ct_gets_a_window_and_mr_each_scans_own_percentiles() -> None:
    ct = tiny_plan("pseudo_labels.generalists=[lite-medsam]", "task.channels=[ct]")
    window = derive(ct, sites(site("a", plan=ct)), 64).plan.data.intensity
    assert (window.kind, window.lower, window.upper) == ("window", -80.0, 220.0)
    assert derive(DRAFT, sites(site("a")), 64).plan.data.intensity.kind == "percentiles"


def test_gates_leave_room_around_the_volumes_of_all_sites() -> None:
    plan = derive(DRAFT, sites(site("a", volume=(30, 60, 90)), site("b", volume=(60, 90, 120))), 64).plan
    assert plan.pseudo_labels is not None
    gates = plan.pseudo_labels.gates
    assert (gates.minimum_volume_ml, gates.maximum_volume_ml) == (10.0, 360.0)


def test_the_site_that_is_unlike_the_others_is_named() -> None:
    found = sites(site("a"), site("b"), site("odd", (1.0, 1.0, 5.0), volume=(10, 15, 20)))
    sentences = outliers(found, DRAFT.task)
    assert [each.split(":")[0] for each in sentences] == ["odd", "odd"]
    assert "inferior-superior (mm) is 5, over all sites 1" in sentences[0]


def test_what_data_does_not_decide_is_kept_from_the_draft() -> None:
    plan = derive(DRAFT, sites(site("a")), 64).plan
    assert plan.training == DRAFT.training
    assert plan.aggregation == DRAFT.aggregation
    assert plan.seed == DRAFT.seed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fingerprint": {"patients": 20, "name.of.patient": 1.0}}, "not on the list"),
        ({"fingerprint": {"patients": 1e12}}, "not on the list"),
        ({"fingerprint": {"patients": float("nan")}}, "valid number"),
        ({"site": "../../etc"}, "no fingerprint"),
        ({"extra": 1}, "extra"),
        ({"version": 2}, "version 1"),
        ({"fingerprint": {"patients": 0}}, "fewer patients"),
    ],
)
def test_a_file_that_is_no_fingerprint_is_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps(site("a") | change))
    with pytest.raises(ConfigError, match=sentence):
        read_fingerprints([tmp_path / "x.json"], DRAFT.task)


def test_the_command_writes_a_valid_plan_with_its_reasons_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "draft.yaml").write_text(yaml.safe_dump(DRAFT.model_dump(mode="json")))
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(site(name)))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    outs = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    for out, given in zip(outs, (files, files[::-1]), strict=True):
        done = CliRunner().invoke(
            app, ["lead", "plan", *given, "--draft", str(tmp_path / "draft.yaml"), "-o", str(out)]
        )
        assert done.exit_code == 0, done.output
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert load_plan(outs[0]).data.spacing_mm == (1.0, 1.0, 1.0)
    lines = outs[0].read_text().splitlines()
    place = next(k for k, line in enumerate(lines) if line.strip().startswith("spacing_mm"))
    assert lines[place - 1].strip().startswith("#")
