"""A SuperLink that is killed during a run and not restarted: its children end, and the status says why."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployment.lead.run import last_run, new_run
from deployment.lead.service import control_of, start, stop
from deployment.lead.study_folder import NewStudy, StudyFolder
from server.superlink_watch import GONE_S
from tests.conftest import tiny_plan
from tests.deployment.lead.conftest import call, processes_of, two_free_ports, wait_until

START_S = 120.0
END_S = 30.0


@pytest.fixture
def patient(tmp_path: Path) -> StudyFolder:
    """Return a study whose run waits for sites longer than any test lasts."""
    plan = tmp_path / "plan.yaml"
    content = tiny_plan("pseudo_labels=null", "aggregation.join_deadline_s=3600").model_dump(mode="json")
    plan.write_text(yaml.safe_dump(content))
    return NewStudy(tmp_path / "atrium", plan, [], two_free_ports(), 2).write()


def _status(study: StudyFolder) -> dict[str, Any]:
    folder = last_run(study)
    path = None if folder is None else folder / "status.json"
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


@pytest.mark.slow
def test_a_killed_server_leaves_no_process_and_a_status_that_says_how_to_resume(patient: StudyFolder) -> None:
    try:
        service = start(patient)
        with control_of(patient) as control:
            new_run(patient, control, 2)
        assert wait_until(lambda: _status(patient).get("phase") == "joining", START_S)
        os.kill(service.pid, signal.SIGKILL)
        os.waitpid(service.pid, 0)  # as init would; not every container has one
        assert wait_until(lambda: processes_of(patient.folder) == [], GONE_S + END_S)
    finally:
        stop(patient)
    status = _status(patient)
    assert status["state"] == "failed"
    assert f"the SuperLink at {patient.settings.control_address} was gone" in status["reason"]
    code, output = call("status", "--study", patient.folder)
    assert code == 0
    assert "failed" in output
    assert "`semisam lead start`, then `semisam lead run --resume`" in output
