"""What a hospital's staff see of the privacy that was spent, and what the doctor says of a private plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from client.privacy import NOT_COVERED
from client.privacy_ledger import LEDGER, PrivacyLedger, Round
from deployment.site.privacy import check_privacy
from deployment.site.site_folder import SiteFolder
from semisam_core.plan import Plan
from semisam_core.privacy.accounting import Spending, epsilon_of
from tests.conftest import tiny_plan
from tests.deployment.site.places import joined, semisam

STEP = Spending(1.0, 0.25, 10)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return a site that has joined, with a ledger beside it."""
    folder = joined(tmp_path)
    text = (folder / "site.yaml").read_text()
    assert "  ledger: ~/.local/share/semisam/privacy\n" in text
    (folder / "site.yaml").write_text(text.replace("~/.local/share/semisam/privacy", str(tmp_path / "hospital")))
    return folder


def _book(site: Path, run: str, *rounds: int, who: str = "a", spending: Spending = STEP) -> None:
    config = SiteFolder.at(site).config()
    for number in rounds:
        ledger = PrivacyLedger(config.ledger_folder, config.storage.folder)
        ledger.book({who}, Round("alpha", run, number, "0" * 64), spending, lambda _: None)


def _set(site: Path, **limits: object) -> None:
    content = yaml.safe_load((site / "site.yaml").read_text())
    content["privacy"] |= limits
    (site / "site.yaml").write_text(yaml.safe_dump(content))


def _findings(site: Path, plan: Plan) -> list[tuple[str, str]]:
    return [(each.level.value, each.sentence) for each in check_privacy(SiteFolder.at(site).config(), plan)]


def _private(rounds: int = 2) -> Plan:
    return tiny_plan("privacy={noise_multiplier: 1.0, sampling_rate: 0.5}", f"training.rounds={rounds}")


def test_a_new_site_has_spent_nothing(site: Path) -> None:
    shown = semisam("site", "privacy", "--folder", site)
    assert shown.exit_code == 0
    assert "No private round has been trained here." in shown.output
    assert "spent in total: epsilon 0.00 at delta 1e-05" in shown.output


def test_rounds_are_shown_with_their_epsilon_and_the_total_of_the_patients_who_spent_most(site: Path) -> None:
    _book(site, "spring", 1, 2, 3, 3, 5)
    _book(site, "autumn", 1, who="b", spending=Spending(2.0, 0.25, 10))
    shown = semisam("site", "privacy", "--folder", site).output
    total, each = epsilon_of([STEP] * 5, 1e-5), epsilon_of([STEP], 1e-5)
    (line,) = [line for line in shown.splitlines() if "spring" in line]
    assert line.split("spring")[1].split() == ["1-3,", "3,", "5", "1", "0.25", "10", f"{each.value:.2f}"]
    assert f"spent in total: epsilon {total.value:.2f} at delta 1e-05 (Renyi: {total.rdp:.2f})" in shown
    assert "autumn" in shown
    for said in NOT_COVERED:
        assert f"not covered: {said}" in shown


def test_programs_get_the_same_as_json(site: Path) -> None:
    _book(site, "spring", 1)
    content = json.loads(semisam("site", "privacy", "--folder", site, "--json").stdout)
    assert [each["run"] for each in content["rounds"]] == ["spring"]
    assert content["total"]["epsilon"] == pytest.approx(epsilon_of([STEP], 1e-5).value)


def test_a_damaged_ledger_is_one_sentence_and_a_failure(site: Path, tmp_path: Path) -> None:
    _book(site, "spring", 1)
    (tmp_path / "hospital" / LEDGER).write_text("nonsense\n")
    shown = semisam("site", "privacy", "--folder", site)
    assert shown.exit_code == 2
    assert "line 1 of the privacy ledger is damaged" in shown.output
    assert _findings(site, _private())[0][0] == "problem"


def test_the_doctor_says_what_the_plan_will_cost(site: Path) -> None:
    ((level, sentence),) = _findings(site, _private())
    whole = epsilon_of([Spending(1.0, 0.5, 2)] * 2, 1e-5).value
    assert level == "ok"
    assert f"the plan's 2 rounds cost epsilon {whole:.2f} at delta 1e-05, 0.00 was spent before" in sentence


def test_the_doctor_warns_of_a_plan_that_the_site_will_leave_early(site: Path) -> None:
    _set(site, maximum_epsilon=5.0)
    assert _findings(site, _private(rounds=40))[0][0] == "warning"
    _book(site, "spring", 1, 2, 3)
    assert _findings(site, _private())[0][0] == "warning"


def test_the_doctor_finds_what_would_be_refused(site: Path) -> None:
    _set(site, minimum_noise=2.0)
    assert "privacy.minimum_noise demands at least 2" in _findings(site, _private())[0][1]
    _set(site, minimum_noise=0.0, required=True)
    assert "privacy.required demands one" in _findings(site, tiny_plan())[0][1]
    _set(site, required=False)
    assert _findings(site, tiny_plan()) == []


def test_the_doctor_finds_noise_that_protects_nobody(site: Path) -> None:
    _set(site, noise="seeded")
    for plan in (_private(), tiny_plan()):
        assert ("problem", "privacy.noise is seeded, which is for simulations; set it to secure.") in _findings(
            site, plan
        )


def test_the_doctor_shows_it_with_everything_else(site: Path) -> None:
    _set(site, required=True)
    shown = semisam("site", "doctor", "--folder", site, "--no-data", "--no-server")
    assert shown.exit_code == 1
    assert "this site's privacy.required demands one" in shown.output
