"""Private rounds at a site: whose limits count, what is booked when, what leaves, and that the patient is the unit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Context, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import privacy as privacy_module
from client.app import SIMULATION, app, site_config_of
from client.egress import EgressError, EgressGate
from client.labeling import Labeler
from client.manifest import manifest_of
from client.privacy import NOT_COVERED, UNIT, PrivacyBudgetError, PrivacyLimitError, privacy_report
from client.privacy_ledger import LEDGER, LedgerError, PrivacyLedger
from client.site import Site, SiteReport
from client.site_config import load_site_config
from engines.in_process_grid import run_in_process
from semisam_core import privacy
from semisam_core.contract import PRIVATE_TRAIN_SCALARS, TRAIN_SCALARS, train_scalars
from semisam_core.data.cases import Role
from semisam_core.errors import ConfigError
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.privacy.accounting import Spending, epsilon_of
from semisam_core.privacy.training import Patient
from semisam_core.pseudo_labels import calibration
from server.app import app as server_app
from tests.client.test_app import _message, _rule
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
Weights = dict[str, torch.Tensor]
EAGER = ("pseudo_labels.prompting.threshold=0.01", "pseudo_labels.gates.minimum_volume_ml=0.0")
SEEDED = {"privacy": {"noise": "seeded"}}
A_ROUND = epsilon_of([Spending(1.0, 0.5, 2)], 1e-5).value


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0


def _private(noise: float = 1.0) -> Plan:
    settings = f"privacy={{noise_multiplier: {noise}, sampling_rate: 0.5}}"
    return tiny_plan(settings, "training.rounds=4", *EAGER)


def _start(plan: Plan) -> Weights:
    return dict(new_specialist(plan).state_dict())


def _site(path: Path, number: int = 1, plan: Plan | None = None, run: str = "run") -> Site:
    return Site(load_site_config(path), plan or _private(), run, number)


def _train(path: Path, number: int = 1, plan: Plan | None = None, run: str = "run", by: float = 0.0) -> SiteReport:
    weights = {name: value + by for name, value in _start(plan or _private()).items()}
    return _site(path, number, plan, run).train(weights)


def _booked(path: Path) -> list[tuple[str, int]]:
    config = load_site_config(path)
    groups = PrivacyLedger(config.ledger_folder, config.storage.folder).groups()
    return sorted((each.run, each.round) for group in groups for each in group)


def _same(first: SiteReport, second: SiteReport) -> bool:
    assert first.weights is not None
    assert second.weights is not None
    return all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def _send(path: Path, plan: Plan, kind: str, number: int) -> str:
    node = {"site-config": str(path), SIMULATION: 1}
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config={})
    return _rule(app(_message(plan, kind, number), context))


def test_a_private_round_trains_and_is_booked_with_what_it_spends(make_site: MakeSite) -> None:
    path = make_site()
    report = _train(path)
    assert report.weights is not None
    assert report.scalars["steps"] == 2
    assert any(not torch.equal(value, _start(_private())[name]) for name, value in report.weights.items())
    (entry,) = privacy_report(load_site_config(path)).rounds
    assert entry[0].spending == Spending(1.0, 0.5, 2)
    assert (entry[0].site, entry[0].run, entry[0].round, entry[0].plan) == ("alpha", "run", 1, _private().hash)


def test_rounds_and_runs_add_up_and_survive_a_new_storage(make_site: MakeSite, tmp_path: Path) -> None:
    outside = {"privacy": {"ledger": str(tmp_path / "hospital" / "privacy"), "maximum_epsilon": 100.0}}
    path = make_site(**outside)
    _train(path)
    _train(path, 2)
    shutil.rmtree(tmp_path / "storage")
    _train(path, run="another-study")
    assert _booked(path) == [("another-study", 1), ("run", 1), ("run", 2)]
    total = privacy_report(load_site_config(path)).total
    assert total.value == pytest.approx(epsilon_of([Spending(1.0, 0.5, 6)], 1e-5).value)
    assert total.value > A_ROUND


def test_a_round_is_booked_before_its_first_step(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_site()

    def killed(*_: object) -> None:
        assert _booked(path) == [("run", 1)]
        raise KeyboardInterrupt

    monkeypatch.setattr("semisam_core.privacy.training.train_private_round", killed)
    with pytest.raises(KeyboardInterrupt):
        _train(path)
    assert _booked(path) == [("run", 1)]


def test_the_same_round_asked_for_again_sends_the_same_and_spends_nothing(make_site: MakeSite) -> None:
    path = make_site()
    first, again = _train(path), _train(path)
    assert _same(first, again)
    assert first.scalars == again.scalars
    assert _booked(path) == [("run", 1)]


def test_other_weights_or_another_plan_are_another_question(make_site: MakeSite) -> None:
    path = make_site(privacy={"maximum_epsilon": 100.0})
    first, moved = _train(path), _train(path, by=0.01)
    assert not _same(first, moved)
    _train(path, plan=_private(noise=1.1))
    assert _booked(path) == [("run", 1)] * 3


def test_what_was_sent_and_cannot_be_read_is_computed_and_booked_again(make_site: MakeSite, tmp_path: Path) -> None:
    path = make_site(privacy={"maximum_epsilon": 100.0})
    _train(path)
    (kept,) = (tmp_path / "storage" / "alpha" / "runs" / "run").glob("update-*.safetensors")
    kept.write_bytes(kept.read_bytes()[:100])
    _train(path)
    assert _booked(path) == [("run", 1)] * 2


def test_secure_noise_cannot_be_repeated_and_seeded_noise_can(make_site: MakeSite) -> None:
    one, two = _train(make_site("alpha")), _train(make_site("alpha"), run="again")
    assert not _same(one, two)
    seeded = make_site("beta", privacy={"noise": "seeded", "maximum_epsilon": 100.0})
    assert _same(_train(seeded), _train(seeded, run="again"))
    assert not _same(_train(seeded), _train(seeded, 2))


@pytest.mark.parametrize(
    ("limits", "error", "rule", "says"),
    [
        ({"maximum_epsilon": 0.9 * A_ROUND}, PrivacyBudgetError, "privacy-budget", "privacy.maximum_epsilon allows"),
        ({"minimum_noise": 1.01}, PrivacyLimitError, "privacy-limits", "privacy.minimum_noise demands at least 1.01"),
        ({"maximum_delta": 1e-6}, PrivacyLimitError, "privacy-limits", "privacy.maximum_delta allows at most 1e-06"),
    ],
)
def test_the_sites_limits_prevail_over_the_plan(
    make_site: MakeSite,
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, float],
    error: type[Exception],
    rule: str,
    says: str,
) -> None:
    monkeypatch.setattr(Labeler, "labels", lambda *_: pytest.fail("the round began"))
    path = make_site(privacy=limits)
    with pytest.raises(error, match=says):
        _train(path)
    with pytest.raises(error, match=says):
        _site(path, 0).join()
    assert _booked(path) == []
    assert _send(path, _private(), MessageType.TRAIN, 1) == rule
    assert _send(path, _private(), MessageType.QUERY, 0) == rule


def test_the_round_that_would_overspend_is_refused_and_those_before_it_are_not(make_site: MakeSite) -> None:
    two = epsilon_of([Spending(1.0, 0.5, 4)], 1e-5).value
    path = make_site(privacy={"maximum_epsilon": two + 0.01})
    _site(path, 0).join()
    _train(path, 1)
    _train(path, 2)
    with pytest.raises(PrivacyBudgetError, match="would have spent epsilon"):
        _train(path, 3)
    assert _booked(path) == [("run", 1), ("run", 2)]
    with pytest.raises(PrivacyBudgetError):
        _site(path, 0, run="another").join()


def test_a_site_may_demand_privacy(make_site: MakeSite) -> None:
    path, plain = make_site(privacy={"required": True}), tiny_plan(*EAGER)
    for call in (lambda: _site(path, 0, plain).join(), lambda: _train(path, plan=plain)):
        with pytest.raises(PrivacyLimitError, match=r"this site's privacy\.required demands one"):
            call()
    assert _send(path, plain, MessageType.TRAIN, 1) == "privacy-limits"
    assert _train(path).scalars["steps"] == 2


def test_a_damaged_ledger_stops_private_rounds_and_no_others(make_site: MakeSite) -> None:
    path = make_site()
    _train(path)
    ledger = load_site_config(path).ledger_folder / LEDGER
    ledger.write_text(ledger.read_text().replace('"steps": 2', '"steps": 1'))
    with pytest.raises(LedgerError, match="line 2 of the privacy ledger is damaged"):
        _train(path, 2)
    assert _send(path, _private(), MessageType.TRAIN, 2) == "privacy-ledger"
    assert _send(path, _private(), MessageType.QUERY, 0) == "privacy-ledger"
    assert _train(path, plan=tiny_plan(*EAGER), run="plain").scalars["steps"] == 2


def test_nothing_computed_from_scans_without_noise_leaves_with_a_private_update(make_site: MakeSite) -> None:
    report = _train(make_site())
    assert set(report.scalars) == {"labeled", "unlabeled", "steps"}
    assert train_scalars(_private()) == PRIVATE_TRAIN_SCALARS
    assert train_scalars(tiny_plan()) == TRAIN_SCALARS


def test_the_gate_holds_back_a_loss_of_a_private_round(make_site: MakeSite, tmp_path: Path) -> None:
    config = load_site_config(make_site())
    gate = EgressGate("alpha", config.egress, tmp_path / "audit.jsonl")
    gate.agree(manifest_of(config, _private()))
    with pytest.raises(EgressError, match=r"loss\.supervised"):
        gate.reply("train", "run", 1, _private().hash, {"steps": 2, "loss.supervised": 0.1})


def test_what_does_not_leave_is_kept_at_the_site(make_site: MakeSite, tmp_path: Path) -> None:
    _train(make_site())
    (line,) = read_json_lines(tmp_path / "storage" / "alpha" / "runs" / "run" / "training.jsonl")
    assert {"accepted", "gated", "confidence", "seconds", "epsilon.round", "epsilon.total"} <= set(line)


def test_epsilon_leaves_only_if_the_site_allows(make_site: MakeSite) -> None:
    path = make_site("beta", egress={"epsilon": True}, privacy={"maximum_epsilon": 100.0})
    _train(path)
    sent = _train(path, 2).scalars
    assert sent["epsilon.round"] == pytest.approx(A_ROUND)
    assert sent["epsilon.total"] == pytest.approx(epsilon_of([Spending(1.0, 0.5, 4)], 1e-5).value)
    assert sent["epsilon.delta"] == 1e-5
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | {"egress": {"epsilon": False}}))
    again = _train(path, 2).scalars
    assert set(again) == {"labeled", "unlabeled", "steps"}


def test_labels_help_with_no_other_patients_pseudo_label(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = calibration.calibrate

    def noted(examples: Any, *rest: Any) -> calibration.Calibration:
        known = list(examples)
        asked.append(len(known))
        return real(known, *rest)

    monkeypatch.setattr("client.labeling.calibrate", noted)
    _train(make_site())
    _train(make_site("beta"), plan=tiny_plan(*EAGER))
    assert asked == [0, 1]


def _manifest(folder: Path, patients: Sequence[str]) -> None:
    cases = [{"case": f"case-{k}", "patient": patient} for k, patient in enumerate(patients)]
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "cases": cases}))


def _noted_patients(monkeypatch: pytest.MonkeyPatch) -> list[Patient]:
    seen: list[Patient] = []
    real = privacy.training.train_private_round  # type: ignore[attr-defined]

    def noted(local: Any, patients: Sequence[Patient], randomness: Any) -> Any:
        seen.extend(patients)
        return real(local, patients, randomness)

    monkeypatch.setattr("semisam_core.privacy.training.train_private_round", noted)
    return seen


def test_all_scans_of_a_patient_are_one_unit(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"labeled": ["case-0", "case-3"], "validation": ["case-2"]}
    path, seen = make_site(cases=5, data=data), _noted_patients(monkeypatch)
    _manifest(tmp_path / "data" / "alpha", ["anna", "anna", "vera", "berta", "anna"])
    _train(path)
    assert [(each.id, len(each.labeled), len(each.unlabeled)) for each in seen] == [("anna", 1, 2), ("berta", 1, 0)]


def test_without_a_manifest_each_scan_is_a_patient(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _noted_patients(monkeypatch)
    _train(make_site())
    assert [(each.id, len(each.labeled), len(each.unlabeled)) for each in seen] == [("case-0", 1, 0), ("case-1", 0, 1)]


def test_the_same_files_under_other_names_are_the_same_patients(make_site: MakeSite, tmp_path: Path) -> None:
    shared = {"privacy": {"ledger": str(tmp_path / "ledger"), "maximum_epsilon": 100.0}}
    _train(make_site("alpha", **shared))
    beta = make_site("beta", **shared, data={"labeled": ["other-0"], "validation": []}, first_seed=50)
    for kind in ("images", "labels"):
        folder = tmp_path / "data" / "beta" / kind
        shutil.rmtree(folder)
        folder.mkdir()
        shutil.copy(tmp_path / "data" / "alpha" / kind / "case-0.nii.gz", folder / "other-0.nii.gz")
    _train(beta)
    gamma = make_site("gamma", **shared, first_seed=80, data={"labeled": ["case-0"], "validation": []})
    _manifest(tmp_path / "data" / "gamma", ["x", "y", "z"])
    _train(gamma)
    config = load_site_config(beta)
    groups = PrivacyLedger(config.ledger_folder, config.storage.folder).groups()
    assert [[each.site for each in group] for group in groups] == [["alpha", "beta"], ["gamma"]]


def test_validation_patients_are_neither_trained_on_nor_booked(make_site: MakeSite) -> None:
    site = _site(make_site())
    assert set(site.scans.patients()) == {"case-0", "case-1"}
    assert len(site.scans.usable(Role.VALIDATION)) == 1
    assert not any("case-2" in each for each in site.scans.identities())


def test_a_site_with_nobody_to_train_on_books_nothing(make_site: MakeSite) -> None:
    path = make_site(data={"labeled": [], "validation": ["case-0", "case-1", "case-2"]})
    report = _train(path)
    assert report.scalars == {"labeled": 0, "unlabeled": 0, "steps": 0}
    assert _booked(path) == []


def test_a_deployed_site_refuses_noise_that_can_be_taken_away(make_site: MakeSite) -> None:
    node: dict[str, Any] = {"site-config": str(make_site(**SEEDED))}
    with pytest.raises(ConfigError, match=r"privacy\.noise = 'seeded' is for simulations"):
        site_config_of(Context(1, 1, node, RecordDict(), {}))
    assert site_config_of(Context(1, 1, node | {SIMULATION: 1}, RecordDict(), {})).privacy.noise == "seeded"


def test_the_report_says_what_is_meant_by_it(make_site: MakeSite) -> None:
    path = make_site(privacy={"maximum_epsilon": 20.0})
    _train(path)
    report = privacy_report(load_site_config(path), delta=1e-6).as_json()
    assert report["unit"] == UNIT
    assert report["not_covered"] == list(NOT_COVERED)
    assert report["delta"] == 1e-6
    assert report["maximum_epsilon"] == 20.0
    assert (
        report["rounds"][0]["epsilon"] == report["total"]["prv"] == report["total"]["epsilon"] < report["total"]["rdp"]
    )
    json.dumps(report)


def test_an_empty_report_is_of_nothing(make_site: MakeSite) -> None:
    report = privacy_report(load_site_config(make_site()))
    assert report.rounds == []
    assert report.total.value == 0
    assert report.delta == privacy_module.privacy_report(load_site_config(make_site())).delta == 1e-5


def test_a_private_study_runs_to_its_end_on_what_may_leave(make_site: MakeSite, tmp_path: Path) -> None:
    sites = [
        make_site("alpha", egress={"epsilon": True}, data={"validation": []}),
        make_site("gamma", first_seed=20, data={"labeled": [], "validation": []}),
    ]
    plan = tiny_plan("privacy={noise_multiplier: 1.0, sampling_rate: 0.5}", "training.rounds=1", *EAGER)
    path, folder = tmp_path / "plan.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    run: dict[str, str | int] = {"plan": str(path), "num-sites": 2, "run-folder": str(folder)}
    run_in_process(server_app, app, [{"site-config": str(site)} for site in sites], run)
    trained = {
        line["site"]: set(line) for line in read_json_lines(folder / "metrics.jsonl") if line["event"] == "trained"
    }
    assert trained["gamma"] >= {"labeled", "unlabeled", "steps"}
    assert trained["alpha"] - trained["gamma"] == {"epsilon.round", "epsilon.total", "epsilon.delta"}
    assert not trained["alpha"] & {"loss.supervised", "accepted", "confidence", "seconds"}
    assert (folder / "best.safetensors").exists()
