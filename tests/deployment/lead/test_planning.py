"""One plan for all sites: nnU-Net's heuristics on what sites said, with reasons, and hostile files refused."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.main import app
from deployment.lead.planning.derive import derive, network_levels
from deployment.lead.planning.fingerprints import SiteFingerprint, outliers, read_fingerprints
from deployment.lead.planning.writing import WIDTH, write_proposal
from semisam_core.data.fingerprint import AXES, INTENSITIES, CaseFacts, fingerprint
from semisam_core.errors import ConfigError
from semisam_core.plan import Plan, load_plan
from semisam_core.specialists import memory_estimate
from tests.conftest import tiny_plan

DRAFT = tiny_plan("pseudo_labels.generalists=[lite-medsam]")
CT = tiny_plan("pseudo_labels.generalists=[lite-medsam]", "task.channels=[ct]")
EVIDENCE = tiny_plan("pseudo_labels.generalists=[lite-medsam]", "pseudo_labels.method=evidence")
ENOUGH = 64.0  # GB


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
    assert derive(DRAFT, found, ENOUGH).plan.data.spacing_mm == (1.0, 1.0, 2.0)


def test_an_axis_of_long_voxels_takes_the_10th_percentile_and_is_halved_less() -> None:
    """As nnU-Net does for prostate MR, whose slices are 3.6 mm apart at 0.6 mm within them."""
    found = sites(site("a", (0.6, 0.6, 3.6), (190.0, 190.0, 70.0), p10=(0.6, 0.6, 3.0)))
    proposal = derive(DRAFT, found, ENOUGH)
    assert proposal.plan.data.spacing_mm == (0.6, 0.6, 3.0)
    arguments = proposal.plan.specialist.arguments
    assert arguments["strides"][0] == [2, 2, 1]
    assert arguments["kernels"][0] == [3, 3, 1]
    assert "10th percentile" in proposal.reasons["data", "spacing_mm"]


def test_the_training_step_fits_the_memory_and_more_memory_gives_a_larger_patch() -> None:
    budget = 0.4
    plan = derive(DRAFT, sites(site("a", extent=(80.0, 80.0, 80.0))), budget).plan
    batch = plan.training.labeled_batch + plan.training.unlabeled_batch
    needed = memory_estimate("dynunet", plan.specialist.arguments, 1, 1, plan.data.patch, batch)
    assert needed <= budget * 1e9
    smaller = derive(DRAFT, sites(site("a", extent=(80.0, 80.0, 80.0))), budget / 4).plan
    assert sum(smaller.data.patch) < sum(plan.data.patch)


def test_a_patch_is_no_larger_than_the_scans_need() -> None:
    patch = derive(DRAFT, sites(site("a", extent=(35.0, 50.0, 35.0))), ENOUGH).plan.data.patch
    assert all(side <= length + 16 for side, length in zip(patch, (35, 50, 35), strict=True))


def test_ct_gets_the_window_of_what_is_labeled_and_mr_each_scans_own_percentiles() -> None:
    unlabeled, labeled = site("a", plan=CT), site("b", plan=CT)
    labeled["fingerprint"] |= {f"foreground.ct.{w}": v for w, v in zip(INTENSITIES, (-20.0, 60.0, 180.0), strict=True)}
    window = derive(CT, sites(unlabeled, labeled), ENOUGH).plan.data.intensity
    assert (window.kind, window.lower, window.upper) == ("window", -20.0, 180.0)
    proposal = derive(CT, sites(unlabeled), ENOUGH)
    assert (proposal.plan.data.intensity.lower, proposal.plan.data.intensity.upper) == (-80.0, 220.0)
    assert "no site has enough labels" in proposal.reasons["data", "intensity"]
    assert derive(DRAFT, sites(site("a")), ENOUGH).plan.data.intensity.kind == "percentiles"


def test_gates_leave_room_around_the_volumes_of_all_sites() -> None:
    plan = derive(DRAFT, sites(site("a", volume=(30, 60, 90)), site("b", volume=(60, 90, 120))), ENOUGH).plan
    assert plan.pseudo_labels is not None
    gates = plan.pseudo_labels.gates
    assert (gates.minimum_volume_ml, gates.maximum_volume_ml) == (10.0, 360.0)


def test_the_site_that_is_unlike_the_others_is_named() -> None:
    found = sites(site("a"), site("b"), site("odd", (1.0, 1.0, 5.0), volume=(10, 15, 20)))
    sentences = outliers(found, DRAFT.task)
    assert [each.split(":")[0] for each in sentences] == ["odd", "odd"]
    assert "inferior-superior (mm) is 5, over all sites 1" in sentences[0]


def test_what_data_does_not_decide_is_kept_from_the_draft() -> None:
    plan = derive(DRAFT, sites(site("a")), ENOUGH).plan
    assert plan.training == DRAFT.training
    assert plan.aggregation == DRAFT.aggregation
    assert plan.seed == DRAFT.seed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fingerprint": {"patients": 20, "name.of.patient": 1.0}}, "not on the list"),
        ({"fingerprint": {"patients": 1e12}}, "none of 0, 1, 5"),
        ({"fingerprint": {"patients": float("nan")}}, "finite number"),
        ({"site": "../../etc"}, "no fingerprint"),
        ({"extra": 1}, "extra"),
        ({"version": 2}, "version 1"),
        ({"fingerprint": {"patients": 0}}, "fewer patients"),
        ({"fingerprint": {"patients": 20}}, "at least one is missing"),
        ({"fingerprint": {"patients": 0, "volume_ml.blob.median": 3.0}}, "too few patients, yet"),
        ({"fingerprint": {"patients": 20, "\x1b[2Jgone": 1.0}}, r"'\\x1b\[2Jgone' is not on the list"),
        ({"fingerprint": site("a")["fingerprint"] | {"spacing_mm.right-left.median": 0.0}}, "between 0.05 and 50"),
        ({"fingerprint": site("a")["fingerprint"] | {"spacing_mm.right-left.p10": 3.0}}, "expected to rise"),
        ({"fingerprint": site("a")["fingerprint"] | {"extent_mm.right-left.p90": 1e8}}, "between 1 and 3000"),
        ({"fingerprint": site("a")["fingerprint"] | {"volume_ml.blob.p10": -1.0}}, "between 0 and 1e"),
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
    for out, order in zip(outs, (files, files[::-1]), strict=True):
        done = CliRunner().invoke(
            app, ["lead", "plan", *order, "--draft", str(tmp_path / "draft.yaml"), "-o", str(out)]
        )
        assert done.exit_code == 0, done.output
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert load_plan(outs[0]).data.spacing_mm == (1.0, 1.0, 1.0)
    lines = outs[0].read_text().splitlines()
    place = next(k for k, line in enumerate(lines) if line.strip().startswith("spacing_mm"))
    assert lines[place - 1].strip().startswith("#")


@pytest.mark.parametrize(
    ("patch", "spacing", "strides", "kernels"),
    [
        pytest.param((40, 56, 40), (1, 1, 1), ["222"] * 3, ["333"] * 4, id="hippocampus"),
        pytest.param((128, 128, 128), (0.77, 0.77, 1.0), ["222"] * 5, ["333"] * 6, id="liver"),
        pytest.param((192, 160, 64), (0.79, 0.79, 1.6), ["221", *["222"] * 4], ["331", *["333"] * 5], id="spleen"),
        pytest.param((160, 192, 80), (1.25, 1.25, 1.37), [*["222"] * 4, "221"], ["333"] * 6, id="heart"),
        pytest.param(
            (256, 320, 20),
            (0.62, 0.62, 3.6),
            ["221", "221", "222", "222", "221"],
            ["331", "331", *["333"] * 4],
            id="prostate",
        ),
        # The thin axis cannot be halved any more, which must not keep the others from it.
        pytest.param((128, 128, 16), (1, 1, 1), ["222", "222", "221", "221", "221"], ["333"] * 6, id="thin"),
    ],
)
def test_axes_are_halved_and_kernels_chosen_as_nnunet_does(
    patch: tuple[int, ...], spacing: tuple[float, ...], strides: list[str], kernels: list[str]
) -> None:
    """Patches and spacings of nnU-Net's 3D full-resolution plans; expected is what its `get_pool_and_conv_props` gives.

    That function sets no bound on the number of levels; here there are at most six.
    """
    arguments, divisor = network_levels(patch, spacing)
    assert ["".join(map(str, each)) for each in arguments["strides"]] == strides
    assert ["".join(map(str, each)) for each in arguments["kernels"]] == kernels
    assert divisor == tuple(2 ** sum(each[axis] == "2" for each in strides) for axis in range(3))


def test_too_little_memory_is_said_and_not_exceeded() -> None:
    with pytest.raises(ConfigError, match=r"--memory-gb 0\.001 is too little.*takes"):
        derive(DRAFT, sites(site("a", extent=(30.0, 30.0, 30.0))), 0.001)


def test_a_structure_that_some_patients_lack_has_no_smallest_volume() -> None:
    """A tumour is 0 ml in a tenth of the patients; the gate of a liver must not refuse all small tumours."""
    plan = derive(EVIDENCE, sites(site("a", volume=(0, 2, 40)), site("b", volume=(900, 1500, 2000))), ENOUGH).plan
    assert plan.pseudo_labels is not None
    assert (plan.pseudo_labels.gates.minimum_volume_ml, plan.pseudo_labels.gates.maximum_volume_ml) == (0.0, 6000.0)
    assert plan.pseudo_labels.sources.volume_tolerance is None


def test_the_tolerance_is_about_one_standard_deviation_of_the_log_volume() -> None:
    low, high = (60 * np.exp(sign * 1.2816 * 0.3) for sign in (-1, 1))  # a tenth of a normal lies beyond each
    plan = derive(EVIDENCE, sites(site("a", volume=(low, 60, high))), ENOUGH).plan
    assert plan.pseudo_labels is not None
    assert plan.pseudo_labels.sources.volume_tolerance == pytest.approx(np.exp(0.3), abs=0.01)


def test_no_label_anywhere_leaves_the_drafts_gates_and_names_no_outlier() -> None:
    bare = site("a")
    bare["fingerprint"] = {name: v for name, v in bare["fingerprint"].items() if not name.startswith("volume_ml")}
    plan = derive(DRAFT, sites(bare), ENOUGH).plan
    assert plan.pseudo_labels is not None
    assert DRAFT.pseudo_labels is not None
    assert plan.pseudo_labels.gates == DRAFT.pseudo_labels.gates
    assert outliers(sites(bare, site("b", volume=(0, 0, 0)), site("c", volume=(0, 0, 0))), DRAFT.task) == []


def test_ct_that_is_not_in_hounsfield_units_is_named_even_without_labels() -> None:
    shifted = site("pacs", plan=CT)
    for which in INTENSITIES:
        shifted["fingerprint"][f"intensity.ct.{which}"] += 1024
    found = outliers(sites(site("a", plan=CT), site("b", plan=CT), shifted), CT.task)
    assert len(found) == 1
    assert found[0].startswith("pacs:")
    assert "not Hounsfield units" in found[0]


@settings(max_examples=25, deadline=None)
@given(data=st.data(), patients=st.integers(1, 12), minimum=st.integers(1, 6))
def test_whatever_an_honest_site_writes_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, patients: int, minimum: int
) -> None:
    side, value, volume = st.floats(0.001, 50), st.floats(-1e6, 1e6), st.floats(0, 5000)
    cases = [
        CaseFacts(
            patient=str(k),
            spacing_mm=(data.draw(side), data.draw(side), data.draw(side)),
            extent_mm=(data.draw(st.floats(1, 3000)), 100.0, 100.0),
            intensities=np.array([sorted(data.draw(st.tuples(value, value, value)))]),
            volumes_ml=data.draw(st.just({}) | st.fixed_dictionaries({"blob": volume})),
            foreground=data.draw(st.none() | st.just(np.array([[-1.0, 0.0, 1.0]]))),
        )
        for k in range(patients)
    ]
    content = site("a") | {"fingerprint": fingerprint(cases, DRAFT.task, minimum)}
    path = tmp_path_factory.mktemp("honest") / "a.json"
    path.write_text(json.dumps(content))
    if patients < minimum:
        with pytest.raises(ConfigError, match="fewer patients"):
            read_fingerprints([path], DRAFT.task)
    else:
        assert read_fingerprints([path], DRAFT.task)[0].fingerprint == content["fingerprint"]


def test_each_reason_stands_right_above_its_key_in_a_plan_with_every_section(tmp_path: Path) -> None:
    draft = load_plan(Path(__file__).parents[3] / "site_configs" / "left-atrium" / "plan.yaml")
    proposal = derive(draft, sites(site("a", plan=draft)), ENOUGH)
    write_proposal(tmp_path / "plan.yaml", proposal, ["a: unlike the others."])
    assert load_plan(tmp_path / "plan.yaml") == proposal.plan
    lines = (tmp_path / "plan.yaml").read_text().splitlines()
    assert "# a: unlike the others." in lines
    for keys, reason in proposal.reasons.items():
        first = textwrap.wrap(reason, WIDTH, initial_indent="  " * (len(keys) - 1) + "# ")[0][:60]
        (place,) = [k for k, line in enumerate(lines) if line.startswith(first)]
        below = next(line for line in lines[place:] if not line.lstrip().startswith("#"))
        assert below == "  " * (len(keys) - 1) + below.strip()
        assert below.strip().startswith(f"{keys[-1]}:")


def test_a_hostile_file_cannot_steer_the_leads_terminal(tmp_path: Path) -> None:
    (tmp_path / "draft.yaml").write_text(yaml.safe_dump(DRAFT.model_dump(mode="json")))
    (tmp_path / "x.json").write_text(json.dumps(site("a") | {"\x1b]0;owned\x07": 1}))
    files = [str(tmp_path / "x.json"), "--draft", str(tmp_path / "draft.yaml")]
    done = CliRunner().invoke(app, ["lead", "plan", *files, "-o", str(tmp_path / "plan.yaml")])
    assert done.exit_code == 2
    assert "unknown key" in done.output
    assert not {"\x1b", "\x07"} & set(done.output)
    assert not (tmp_path / "plan.yaml").exists()


@pytest.mark.parametrize("text", ["", "[1]", "version: 1", "[" * 5000, "\xff"])
def test_what_is_not_json_is_refused_with_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="which is JSON"):
        read_fingerprints([tmp_path / "x.json"], DRAFT.task)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(ConfigError, match="larger than 1 MB"):
        read_fingerprints([tmp_path / "x.json"], DRAFT.task)
