"""Three hospitals and a lead, run by the commands of the deployment pages: the same weights as in one process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from semisam_core.files import read_json_lines
from semisam_core.privacy.accounting import Spending, epsilon_of
from tests.conftest import tiny_plan
from tests.deployment.deployment import HOSPITALS, SLOW_LINE, Deployment, Hospital, Run, begin, eventually, semisam
from tests.deployment.lead.conftest import processes_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

RUN_S = 400.0
TRICKLE = 20_000.0
ROUNDS = 16
WORKER = "worker.py"
PLAN = (
    "specialist.arguments.channels=[16, 32]",
    "training.rounds=3",
    "evaluation.every_rounds=100",
    "aggregation.minimum_sites=2",
    # Starting processes is slow on a busy machine.
    "aggregation.join_deadline_s=200",
    "aggregation.round_deadline_s=200",
)
# Without generalists, one round; the site without labels counts as much as the others.
SECURE = (
    "pseudo_labels=null",
    "training.rounds=1",
    "aggregation.minimum_sites=3",
    "aggregation.weights=equal",
    "aggregation.admission={norm_factor: null}",
    "aggregation.secure={stage_deadline_s: 200}",
)
# Secure sums of private updates; every round spends the same.
PRIVATE = (*SECURE, "training.rounds=2", "privacy={noise_multiplier: 2.0, sampling_rate: 0.5}")
# The real LiteMedSAM, in the last of three rounds, on every fourth slice; all weights travel coded.
WITH_GENERALIST = (
    "pseudo_labels.generalists=[lite-medsam]",
    "pseudo_labels.first_round=3",
    "pseudo_labels.prompting.slice_step_mm=8.0",
    "aggregation.codec={name: int8}",
)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path_factory.mktemp("deployed"), tiny_plan(*PLAN, *WITH_GENERALIST))
    try:
        deployment.set_up()
        yield deployment
    finally:
        deployment.end()


@pytest.fixture(scope="module")
def first(deployed: Deployment) -> Run:
    """Return the first run, undisturbed except for a slow line."""
    deployed.lead("run", seconds=RUN_S)
    return Run(deployed.run_folder)


@pytest.fixture(scope="module")
def simulated(deployed: Deployment, first: Run) -> Path:
    """Return the run folder of the same study run in one process, next to its sites' storage."""
    return _in_one_process(deployed, first, deployed.folder / "simulated")


def _in_one_process(deployed: Deployment, run: Run, place: Path) -> Path:
    """Repeat a run in one process, with sites of its own; return its run folder."""
    for name, site in deployed.hospitals.items():
        content = yaml.safe_load((site.folder / "site.yaml").read_text())
        content["storage"]["folder"] = str(place / "storage" / name)
        (place / "sites").mkdir(parents=True, exist_ok=True)
        (place / "sites" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    arguments = ("--plan", run.folder / "plan.yaml", "--sites", place / "sites", "--out", place / "run")
    semisam("simulate", *arguments, "--engine", "in-process", "--no-local-baseline", seconds=RUN_S)
    return place / "run"


def test_a_deployed_study_completes_and_its_status_says_so(deployed: Deployment, first: Run) -> None:
    assert first.state == "completed"
    status = json.loads(deployed.lead("status", "--json"))
    assert (status["run"]["state"], status["run"]["round"]) == ("completed", 3)
    assert {site["site"]: site["connection"] for site in status["sites"]} == dict.fromkeys(HOSPITALS, "online")


def test_a_deployed_study_publishes_the_weights_of_the_same_study_in_one_process(first: Run, simulated: Path) -> None:
    one, other = load_file(first.folder / "best.safetensors"), load_file(simulated / "best.safetensors")
    assert one.keys() == other.keys()
    assert all(bool((one[name] == other[name]).all()) for name in one)
    expected = [(line["round"], line["sha256"]) for line in Run(simulated).events("aggregated")]
    assert [(line["round"], line["sha256"]) for line in first.events("aggregated")] == expected


def test_a_deployed_site_trains_on_pseudo_labels_of_its_unlabeled_scans(deployed: Deployment, first: Run) -> None:
    judged = {line["site"]: line["accepted"] + line["gated"] for line in first.events("trained", round=3)}
    assert judged == {"north": 1, "south": 0, "east": 3}  # one class, so as many as unlabeled scans
    for name in ("north", "east"):
        assert any((deployed.hospitals[name].folder / "storage" / "embeddings").rglob("*.safetensors"))


def test_a_deployed_run_leaves_a_report_of_aggregates_and_each_site_can_write_its_own(
    deployed: Deployment, first: Run
) -> None:
    page = (first.folder / "report.html").read_text()
    assert "trained no site alone" in page
    assert "<img" not in page
    north = deployed.hospitals["north"]
    said = north.semisam("report", "--plan", first.folder / "plan.yaml", "--run", first.name)
    path = north.folder / "storage" / "runs" / first.name / "report.html"
    assert str(path) in said
    assert "data:image/png" in path.read_text()


def test_a_sites_audit_log_is_the_same_as_in_one_process(deployed: Deployment, first: Run, simulated: Path) -> None:
    for name, site in deployed.hospitals.items():
        alone = read_json_lines(simulated.parent / "storage" / name / "audit.jsonl")
        booked = [_booked(line) for line in site.audit if line.get("run") == first.name]
        assert booked == [_booked(line) for line in alone]
        assert [(line["round"], line["bytes"] > 0) for line in booked if line["kind"] == "train"] == [
            (1, True),
            (2, True),
            (3, True),
        ]


def _booked(line: dict[str, Any]) -> dict[str, Any]:
    """Return what a line of an audit log says left, without times, the run's name, the chain and the split's hash."""
    scalars = {name: value for name, value in line["scalars"].items() if name != "seconds"}
    own = ("time", "run", "split", "number", "previous")
    return {key: value for key, value in line.items() if key not in own} | {"scalars": scalars}


def test_a_sites_status_counts_what_left_it(deployed: Deployment, first: Run) -> None:
    for site in deployed.hospitals.values():
        status = json.loads(site.semisam("status", "--json"))
        assert status["running"]
        assert status["connected"]
        assert status["refused"] == {}
        sent = [line["bytes"] for line in site.audit if line["kind"] == "train"]
        assert (status["answered"]["train"], status["updates_bytes"]) == (len(sent), sum(sent))


def test_a_deployed_secure_study_gives_the_weights_of_the_same_study_in_one_process(deployed: Deployment) -> None:
    deployed.agree(tiny_plan(*PLAN, *SECURE))
    deployed.lead("run", seconds=RUN_S)
    run = Run(deployed.run_folder)
    alone = _in_one_process(deployed, run, deployed.folder / "secure")
    assert run.state == "completed"
    expected = [(line["sha256"], line["weights"]) for line in Run(alone).events("aggregated")]
    assert [(line["sha256"], line["weights"]) for line in run.events("aggregated")] == expected
    assert set(expected[0][1]) == set(HOSPITALS)
    assert run.events("sum-given-up") == []
    for site in deployed.hospitals.values():
        booked = {line["kind"]: line for line in site.audit if line.get("run") == run.name}
        assert {"train.keys", "train.shares", "train.masked", "train.unmask"} <= set(booked)
        assert "bytes" not in booked["train"]
        assert booked["train.masked"]["bytes"] > 0
        assert not list((site.folder / "storage").rglob("secure"))
    assert len({line["keys_sha256"] for site in deployed.hospitals.values() for line in _keys_of(site, run)}) == 1


def test_deployed_sites_book_what_a_private_study_spends_and_say_what_they_cannot_afford(deployed: Deployment) -> None:
    deployed.agree(tiny_plan(*PLAN, *PRIVATE))
    deployed.lead("run", seconds=RUN_S)
    run = Run(deployed.run_folder)
    assert run.state == "completed"
    assert [set(line["weights"]) for line in run.events("aggregated")] == [set(HOSPITALS)] * 2
    steps = tiny_plan(*PLAN, *PRIVATE).training.steps_per_round
    expected = epsilon_of([Spending(2.0, 0.5, steps)] * 2, 1e-5).value
    for site in deployed.hospitals.values():
        report = json.loads(site.semisam("privacy", "--json"))
        assert [(each["run"], each["round"]) for each in report["rounds"]] == [(run.name, 1), (run.name, 2)]
        assert report["total"]["epsilon"] == pytest.approx(expected)
        booked = [line for line in site.audit if line.get("run") == run.name and line["kind"] == "train"]
        assert len(booked) == 2
        assert not any("epsilon" in name or "loss" in name for line in booked for name in line["scalars"])
    south = deployed.hospitals["south"]
    south.set(f"privacy.maximum_epsilon={1.2 * expected}")
    found = south.semisam("doctor")
    south.set("privacy.maximum_epsilon=10.0")
    assert f"{expected:.2f} was spent before, privacy.maximum_epsilon is {1.2 * expected:g}" in " ".join(found.split())


def _keys_of(site: Hospital, run: Run) -> list[dict[str, Any]]:
    return [line for line in site.audit if line.get("run") == run.name and line["kind"] == "secure-keys"]


@dataclass(frozen=True)
class Survived:
    """A run that was disturbed in every way, and what was observed.

    Attributes:
        run: the run.
        uploading_in: the round in which the site east was killed during its upload.
        cut_in: the round in which the line of the site east was cut.
        killed_in: the round in which the server was killed.
        codes: exit codes of `lead run`: server killed; run stopped; a site killed during evaluation.
        stopped: the output of `lead stop --run`.
        stopped_status: `lead status` afterwards.
    """

    run: Run
    uploading_in: int
    cut_in: int
    killed_in: int
    codes: tuple[int, int, int]
    stopped: str
    stopped_status: dict[str, Any]


@pytest.fixture(scope="module")
def survived(deployed: Deployment, first: Run) -> Survived:
    north, south, east = deployed.hospitals.values()
    before = deployed.run_folder
    changed = ("pseudo_labels=null", f"training.rounds={ROUNDS}", "training.steps_per_round=20")
    deployed.agree(tiny_plan(*PLAN, *changed))
    following = begin("lead", "run", "--study", deployed.study, out=deployed.folder / "second.log")
    run = Run(eventually("another run", lambda: {deployed.run_folder} - {before}).pop())

    eventually("north trains", lambda: run.training == 1 and north.works)
    north.kill()
    _starts_again(run, north)
    refused_in = _worker_is_killed(run, south)
    uploading_in = _killed_while_uploading(deployed, run, east, refused_in)
    _starts_again(run, east)
    cut_in = _cut_until_the_round_has_ended(deployed, run, east)

    killed_in = eventually("the next round", lambda: run.training > cut_in and south.works and run.training)
    deployed.kill_server()
    codes = [following.wait(60)]
    deployed.lead("start")
    following = begin("lead", "run", "--resume", "--study", deployed.study, out=deployed.folder / "third.log")
    eventually("it resumes", lambda: run.events("resumed") and run.training and south.works)
    stopped = deployed.lead("stop", "--run")
    codes.append(following.wait(60))
    status = json.loads(deployed.lead("status", "--json"))

    following = begin("lead", "run", "--resume", "--study", deployed.study, out=deployed.folder / "fourth.log")
    eventually("south scores", lambda: run.evaluating == ROUNDS and south.works, RUN_S)
    south.kill()
    codes.append(following.wait(RUN_S))
    south.semisam("start")
    return Survived(run, uploading_in, cut_in, killed_in, (codes[0], codes[1], codes[2]), stopped, status)


def _starts_again(run: Run, site: Hospital) -> None:
    """Wait until the server notices that a site left, start the site, and wait until it has rejoined."""
    eventually("the server notices", lambda: run.events("left", site=site.name))
    site.semisam("start")
    eventually("it is back", lambda: run.events("rejoined", site=site.name))


def _worker_is_killed(run: Run, site: Hospital) -> int:
    """Kill a site's training process as soon as the next round has started there; return that round."""
    number = run.training
    eventually("the next round begins", lambda: run.training > number and site.works and site.processes(WORKER))
    site.kill(WORKER)
    refused = eventually("the server is told", lambda: run.events("refused", site=site.name))
    return int(refused[0]["round"])


def _killed_while_uploading(deployed: Deployment, run: Run, site: Hospital, after: int) -> int:
    """Kill a site in a later round, when its update is booked but has not arrived; return the round."""
    number = eventually("the next round", lambda: run.training > after and site.works and run.training)
    deployed.line.bytes_per_s = TRICKLE
    booked = {"kind": "train", "round": number, "run": run.name}
    eventually("it is sending", lambda: any(booked.items() <= line.items() for line in site.audit))
    site.kill()
    deployed.line.bytes_per_s = SLOW_LINE
    return number


def _cut_until_the_round_has_ended(deployed: Deployment, run: Run, site: Hospital) -> int:
    """Cut a rejoined site's line while it trains, until that round has ended; return the round."""
    joined = run.events("rejoined", site=site.name)[-1]["round"]
    number = eventually("a round in which it trains", lambda: run.training > joined and site.works and run.training)
    deployed.line.cut()
    eventually("the round ends", lambda: run.events("aggregated", round=number))
    deployed.line.restore()
    eventually("it is back", lambda: run.events("late", "rejoined", site=site.name)[1:])
    return number


def test_a_killed_site_does_not_stop_the_round(survived: Survived) -> None:
    first_round = survived.run.events("aggregated", round=1)[0]
    assert set(first_round["weights"]) == {"south", "east"}
    assert first_round["seconds"] < 200


def test_a_killed_site_contributes_again_once_restarted(survived: Survived) -> None:
    left, back = (survived.run.events(kind, site="north")[0] for kind in ("left", "rejoined"))
    assert left["time"] < back["time"]
    later = [line for line in survived.run.events("aggregated") if line["round"] in (back["round"], back["round"] + 1)]
    assert any("north" in line["weights"] for line in later)


def test_a_killed_worker_is_reported_by_rule_and_costs_its_site_one_round(survived: Survived) -> None:
    refused = survived.run.events("refused", site="south")[0]
    assert "process-ended" in refused["reason"]
    rounds = {line["round"]: line["weights"] for line in survived.run.events("aggregated")}
    assert len(rounds[refused["round"]]) >= 2
    assert "south" in rounds[refused["round"] + 1]


def test_a_site_killed_during_its_upload_does_not_stop_the_round(survived: Survived) -> None:
    rounds = {line["round"]: line["weights"] for line in survived.run.events("aggregated")}
    assert set(rounds[survived.uploading_in]) == {"north", "south"}
    assert survived.run.events("rejoined", site="east")[0]["round"] > survived.uploading_in


def test_a_cut_line_stops_no_round_and_the_site_rejoins(survived: Survived) -> None:
    rounds = {line["round"]: line["weights"] for line in survived.run.events("aggregated")}
    assert set(rounds[survived.cut_in]) == {"north", "south"}
    assert "east" in rounds[ROUNDS]


def test_a_run_resumes_after_its_last_finished_round_when_the_server_was_killed(survived: Survived) -> None:
    assert survived.codes[0] == 2
    assert survived.run.events("resumed")[0]["round"] == survived.killed_in - 1
    assert [line["round"] for line in survived.run.events("aggregated")] == [*range(1, ROUNDS + 1)]
    assert survived.run.state == "completed"


def test_a_stopped_run_says_so_and_can_be_resumed(survived: Survived) -> None:
    assert str(survived.run.folder) in survived.stopped
    assert survived.codes[1] == 1
    assert survived.stopped_status["superlink"]["running"]
    assert survived.stopped_status["run"]["state"] == "failed"
    assert "stop --run" in survived.stopped_status["run"]["reason"]


def test_a_site_killed_during_evaluation_does_not_stop_the_study(survived: Survived) -> None:
    assert survived.codes[2] == 0
    assert {line["site"] for line in survived.run.events("evaluated", round=ROUNDS)} == {"north", "east"}
    assert survived.run.events("left", site="south", round=ROUNDS)


def test_every_update_the_server_received_was_first_booked_at_the_site(
    deployed: Deployment, survived: Survived
) -> None:
    for name, site in deployed.hospitals.items():
        sent = [line for line in site.audit if line.get("run") == survived.run.name and "refused" not in line]
        booked = Counter(line["round"] for line in sent if line["kind"] == "train")
        taken = Counter(line["round"] for line in survived.run.events("trained", site=name))
        assert not taken - booked
        assert all(line["bytes"] > 0 and len(line["sha256"]) == 64 for line in sent if line["kind"] == "train")


def test_no_process_is_left_after_the_last_command(deployed: Deployment, survived: Survived) -> None:
    for site in deployed.hospitals.values():
        assert "has stopped" in site.semisam("stop")
    assert "has ended" in deployed.lead("stop")
    assert processes_of(deployed.folder) == []
