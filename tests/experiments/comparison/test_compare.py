"""A whole comparison of tiny arms on real files: which runs, which results, which report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from semisam_core.errors import ConfigError
from semisam_core.files import read_json_lines
from tests.experiments.comparison.studies import Recorder, prepare, shown, write_study

MakeSite = Callable[..., Path]
Study = tuple[Path, Path]


@pytest.fixture
def study(make_site: MakeSite, tmp_path: Path) -> Study:
    return write_study(make_site, tmp_path)


def _results(out: Path) -> dict[str, Any]:
    content = json.loads((out / "results.json").read_text())
    assert isinstance(content, dict)
    return content


def test_every_arm_runs_with_every_seed_and_ends_in_one_report(study: Study, tmp_path: Path) -> None:
    runner = Recorder()
    arms = ["federated-supervised", "alone-supervised", "federated-semisam", "pooled-regularizer"]
    comparison, console = prepare(study, tmp_path / "out", arms=arms, seeds=[0, 1])
    assert comparison.execute(runner)
    assert runner.titles == [
        "oracle-fake-boxes",
        "federated-supervised, labels all, seed 0",
        "federated-supervised, labels all, seed 1",
        "alone-supervised, labels all, seed 0, alpha",
        "alone-supervised, labels all, seed 0, beta",
        "alone-supervised, labels all, seed 1, alpha",
        "alone-supervised, labels all, seed 1, beta",
        "federated-semisam, labels all, seed 0",
        "federated-semisam, labels all, seed 1",
        "pooled-regularizer, labels all, seed 0",
        "pooled-regularizer, labels all, seed 1",
    ]
    results = _results(tmp_path / "out")
    assert results["plan_hash"] == comparison.study.plan.hash
    assert [each["arm"] for each in results["arms"]] == [*arms, "oracle-fake-boxes"]
    for each in results["arms"]:
        figures = each["classes"][0]["overall"]["dice"]
        assert (figures["cases"], figures["values"]) == ((4, 4) if each["standing"] == "oracle" else (4, 8))
        assert figures["low"] <= figures["mean"] <= figures["high"]
    baseline, alone = (each["classes"][0]["dice_difference"] for each in results["arms"][:2])
    assert baseline is None
    assert (alone["cases"], alone["values"]) == (4, 8)
    report = (tmp_path / "out" / "report.md").read_text()
    assert comparison.study.plan.hash in report
    assert "as many as one site" in report
    assert "federated-supervised (baseline)" in shown(console)


def test_every_arm_takes_the_same_number_of_steps_at_each_site(study: Study, tmp_path: Path) -> None:
    runner = Recorder()
    arms = ["federated-supervised", "alone-semisam", "pooled-regularizer"]
    prepare(study, tmp_path / "out", arms=arms, oracles=False)[0].execute(runner)
    for job in runner.ran:
        trained = [line for line in read_json_lines(job.folder / "metrics.jsonl") if line["event"] == "trained"]
        assert {line["site"]: line["steps"] for line in trained} == dict.fromkeys(job.storages, 2)


def test_arms_differ_in_the_loss_terms_that_their_names_say(study: Study, tmp_path: Path) -> None:
    runner = Recorder()
    arms = ["federated-supervised", "federated-regularizer", "federated-semisam"]
    prepare(study, tmp_path / "out", arms=arms, oracles=False)[0].execute(runner)
    terms = []
    for job in runner.ran:
        lines = [line for line in read_json_lines(job.folder / "metrics.jsonl") if line["event"] == "trained"]
        terms.append({key for line in lines for key in line if key.startswith("loss.")})
    assert terms == [
        {"loss.supervised"},
        {"loss.supervised", "loss.consistency"},
        {"loss.supervised", "loss.consistency", "loss.generalist"},
    ]


def test_federated_arms_are_scored_on_the_scans_they_used_without_labels(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arms = ["federated-supervised", "federated-semisam", "alone-supervised", "pooled-supervised"]
    options: dict[str, Any] = {"arms": arms, "oracles": False, "labeled": ["1"]}
    prepare(study, out, **options)[0].execute(Recorder())
    found = {each["arm"]: each["unlabeled"] for each in _results(out)["arms"]}
    # Of five cases a site, two are for validation and one is labeled.
    for arm in arms[:2]:
        assert found[arm][0]["final"]["cases"] == 4
    assert found["alone-supervised"] == found["pooled-supervised"] == []
    assert "## Unlabeled scans" in (out / "report.md").read_text()
    kept = next(out.glob("arms/federated-supervised/*/*/unlabeled.json"))
    scores = json.loads(kept.read_text())
    kept.write_text(json.dumps([{**each, "final": 0.25} for each in scores]))
    prepare(study, out, resume=True)[0].execute(Recorder())
    (again,) = (each for each in _results(out)["arms"] if each["arm"] == "federated-supervised")
    assert again["unlabeled"][0]["final"]["mean"] == 0.25  # read, not computed once more


def test_seeds_of_the_definition_give_different_initial_weights(study: Study, tmp_path: Path) -> None:
    runner = Recorder()
    prepare(study, tmp_path / "out", arms=["federated-supervised"], seeds=[0, 5], oracles=False)[0].execute(runner)
    starts = [load_file(job.folder / "checkpoints" / "round-00000.safetensors") for job in runner.ran]
    assert any(bool((starts[0][name] != starts[1][name]).any()) for name in starts[0])


def test_a_pooled_arm_trains_on_all_labels_and_is_scored_by_original_site(study: Study, tmp_path: Path) -> None:
    runner = Recorder()
    prepare(study, tmp_path / "out", arms=["pooled-supervised"], oracles=False)[0].execute(runner)
    joined = [line for line in read_json_lines(runner.ran[0].folder / "metrics.jsonl") if line["event"] == "joined"]
    assert [(line["site"], line["labeled"], line["unlabeled"], line["validation"]) for line in joined] == [
        ("pooled", 3, 3, 4)
    ]
    arm = _results(tmp_path / "out")["arms"][0]
    assert arm["training_labels"] == {"alpha": ["case-0", "case-1"], "beta": ["case-0"]}
    assert arm["standing"] == "reference"
    assert {site for site, _ in arm["classes"][0]["sites"]} == {"alpha", "beta"}
    assert "pooled-supervised (reference only" in (tmp_path / "out" / "report.md").read_text()


def test_an_oracle_is_marked_and_better_than_an_untrained_specialist(study: Study, tmp_path: Path) -> None:
    comparison, console = prepare(study, tmp_path / "out", arms=["federated-supervised"])
    comparison.execute(Recorder())
    trained, oracle = _results(tmp_path / "out")["arms"]
    assert oracle["standing"] == "oracle"
    assert oracle["classes"][0]["dice_difference"] is None
    assert oracle["classes"][0]["overall"]["dice"]["mean"] > 0.85
    assert oracle["classes"][0]["overall"]["dice"]["mean"] > trained["classes"][0]["overall"]["dice"]["mean"]
    for text in (shown(console), (tmp_path / "out" / "report.md").read_text()):
        assert "oracle-fake-boxes (oracle: prompted with the truth, an upper bound)" in text


def test_the_report_says_which_labels_trained_and_how_the_round_was_selected(study: Study, tmp_path: Path) -> None:
    for selection, says in (("last", "no label was used to select"), ("validation", "validation labels were used")):
        out = tmp_path / selection
        changes = {"arms": ["federated-supervised"], "oracles": False, "assignments": [f"selection={selection}"]}
        prepare(study, out, **changes)[0].execute(Recorder())
        report = (out / "report.md").read_text()
        assert "trained on alpha: case-0, case-1; beta: case-0" in report
        assert says in report


def test_label_counts_take_the_first_of_each_sites_list_and_are_plotted(study: Study, tmp_path: Path) -> None:
    runner = Recorder()
    changes = {"arms": ["federated-supervised", "alone-supervised"], "labeled": ["1,0", "1", "all"]}
    prepare(study, tmp_path / "out", **changes)[0].execute(runner)
    arms = {(each["arm"], each["labeled"]): each["training_labels"] for each in _results(tmp_path / "out")["arms"]}
    assert arms["federated-supervised", "1,0"] == {"alpha": ["case-1"], "beta": []}
    assert arms["federated-supervised", "1"] == {"alpha": ["case-1"], "beta": ["case-0"]}
    assert arms["federated-supervised", "all"] == {"alpha": ["case-0", "case-1"], "beta": ["case-0"]}
    assert arms["alone-supervised", "1,0"] == {"alpha": ["case-1"]}
    assert (tmp_path / "out" / "dice-by-labels.png").read_bytes().startswith(b"\x89PNG")
    assert runner.titles.count("oracle-fake-boxes") == 1


def test_an_interrupted_comparison_resumes_and_runs_nothing_twice(study: Study, tmp_path: Path) -> None:
    out, arms = tmp_path / "out", ["federated-supervised", "alone-supervised"]
    with pytest.raises(KeyboardInterrupt):
        prepare(study, out, arms=arms)[0].execute(Recorder(interrupt_at=2))
    again = Recorder()
    assert prepare(study, out, resume=True)[0].execute(again)
    assert again.titles == ["alone-supervised, labels all, seed 0, alpha", "alone-supervised, labels all, seed 0, beta"]
    nothing = Recorder()
    before = (out / "results.json").read_bytes()
    assert prepare(study, out, resume=True)[0].execute(nothing)
    assert nothing.ran == []
    assert (out / "results.json").read_bytes() == before


def test_a_resumed_comparison_can_take_more_seeds(study: Study, tmp_path: Path) -> None:
    prepare(study, tmp_path / "out", arms=["federated-supervised"], oracles=False)[0].execute(Recorder())
    again = Recorder()
    prepare(study, tmp_path / "out", resume=True, seeds=[0, 1])[0].execute(again)
    assert again.titles == ["federated-supervised, labels all, seed 1"]
    assert _results(tmp_path / "out")["arms"][0]["classes"][0]["overall"]["dice"]["values"] == 8


def test_a_changed_plan_is_refused(study: Study, tmp_path: Path) -> None:
    prepare(study, tmp_path / "out", arms=["federated-supervised"])
    with pytest.raises(ConfigError, match="compares with another plan"):
        prepare(study, tmp_path / "out", resume=True, assignments=["training.steps_per_round=3"])


def test_changed_sites_are_refused(study: Study, tmp_path: Path) -> None:
    prepare(study, tmp_path / "out", arms=["federated-supervised"])
    path = study[1] / "alpha.yaml"
    path.write_text(path.read_text().replace("- case-4", "- case-2"))
    with pytest.raises(ConfigError, match="the cases they find have changed"):
        prepare(study, tmp_path / "out", resume=True)


def test_a_new_case_is_refused(study: Study, tmp_path: Path) -> None:
    prepare(study, tmp_path / "out", arms=["federated-supervised"])
    images = tmp_path / "data" / "beta" / "images"
    (images / "case-9.nii.gz").write_bytes((images / "case-0.nii.gz").read_bytes())
    with pytest.raises(ConfigError, match="the cases they find have changed"):
        prepare(study, tmp_path / "out", resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_left_alone(study: Study, tmp_path: Path, resume: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ConfigError, match="not a folder of `semisam compare`" if resume else "the folder is not empty"):
        prepare(study, tmp_path / "out", resume=resume)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_failed_run_is_reported_and_the_others_still_run(study: Study, tmp_path: Path) -> None:
    for image in (tmp_path / "data" / "beta" / "images").iterdir():
        image.write_bytes(b"torn")
    arms = ["alone-supervised", "federated-supervised"]
    comparison, console = prepare(study, tmp_path / "out", arms=arms, oracles=False)
    assert not comparison.execute(Recorder())
    assert "alone-supervised, labels all, seed 0, beta did not complete (failed)" in shown(console)
    alone, federated = _results(tmp_path / "out")["arms"]
    assert alone["unfinished"] == ["alone-supervised, labels all, seed 0, beta"]
    assert federated["classes"][0]["overall"]["dice"]["cases"] == 2


def test_time_left_is_estimated_from_finished_runs(study: Study, tmp_path: Path) -> None:
    comparison, console = prepare(study, tmp_path / "out", arms=["federated-supervised"], seeds=[0, 1], oracles=False)
    comparison.execute(Recorder())
    text = shown(console)
    assert "[1/2] federated-supervised, labels all, seed 0; time left not known yet" in text
    assert "[2/2] federated-supervised, labels all, seed 1; about 0." in text


def test_pooled_arms_reuse_what_the_sites_prepared(study: Study, tmp_path: Path) -> None:
    arms = ["federated-semisam", "pooled-semisam"]
    runner = Recorder()
    prepare(study, tmp_path / "out", arms=arms, oracles=False)[0].execute(runner)
    pooled = runner.ran[-1].cohort.pooled_storage / "prepared"
    assert len(list(pooled.iterdir())) == 10
    assert all(path.is_symlink() for path in pooled.iterdir())
    lent = [path for path in (pooled.parent / "embeddings").iterdir() if path.is_symlink()]
    assert lent
    assert all(path.exists() for path in lent)
