"""A real SuperLink, started as a lead starts it: what its two ports serve, and that nothing outlives it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from deployment.background import ProcessRecord
from deployment.lead.service import control_of, find, stop
from deployment.lead.study_folder import StudyFolder
from engines.bundle import stage_app
from engines.flower_control import FlowerControl, FlowerError, flower_environment, program
from engines.processes import birth
from semisam_core.files import write_json
from tests.deployment.lead.conftest import ROOT, call, processes_of, typed, wait_until

PROTOBUF = {"content-type": "application/protobuf"}


@pytest.fixture
def public(serving: StudyFolder) -> Iterator[httpx.Client]:
    """Return a client of the public port that trusts the study's authority."""
    verify = ssl.create_default_context(cafile=str(serving.ca))
    base = f"https://{serving.settings.address}"
    with httpx.Client(base_url=base, verify=verify, trust_env=False, timeout=20) as client:
        yield client


def _activate(study: StudyFolder, key: ec.EllipticCurvePrivateKey) -> int:
    """Connect as a SuperNode does; return the node id."""
    with FleetHttpClient.from_server_address(
        study.settings.address, False, study.ca.read_bytes(), [NodeAuthHttpInterceptor(key, key.public_key())]
    ) as client:
        request = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30)
        return int(client.ActivateNode(request).node_id)


def _activated_again(study: StudyFolder, key: ec.EllipticCurvePrivateKey) -> int | None:
    """Connect; None while the server still thinks the node is connected, up to two heartbeats after the last one."""
    try:
        return _activate(study, key)
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.PRECONDITION_FAILED:
            raise
        return None


def _public_half(key: ec.EllipticCurvePrivateKey, path: Path) -> Path:
    path.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return path


def _raw(study: StudyFolder, request: bytes) -> bytes:
    """Send raw bytes, which a well-behaved client would normalize; return the answer's first line."""
    context = ssl.create_default_context(cafile=str(study.ca))
    address = ("127.0.0.1", study.settings.port)
    with (
        socket.create_connection(address, 20) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as link,
    ):
        link.sendall(request)
        return link.recv(4096).split(b"\r\n")[0]


def test_the_control_api_is_not_served_at_the_public_port(serving: StudyFolder, public: httpx.Client) -> None:
    for path in ("start-run", "stop-run", "list-nodes", "register-node", "unregister-node", "list-runs"):
        assert public.post(f"/v1/control/{path}", headers=PROTOBUF).status_code == 404, path
    for path in ("/v1/runtime/get-nodes", "/v1/runtime/push-messages", "/docs", "/openapi.json"):
        assert public.post(path, headers=PROTOBUF).status_code == 404
        assert public.get(path).status_code == 404
    with FlowerControl(serving.settings.address, serving.ca) as control:
        with pytest.raises(FlowerError, match="refused to submit"):
            control.submit(serving.code(), {})
        with pytest.raises(FlowerError, match="refused to register"):
            control.register("intruder", b"key")


@pytest.mark.slow
def test_flwr_run_with_the_studys_certificate_submits_nothing(serving: StudyFolder, tmp_path: Path) -> None:
    connection = f'[superlink.lead]\naddress = "{serving.settings.address}"\nroot-certificates = "{serving.ca}"\n'
    (tmp_path / "config.toml").write_text(connection)
    command = [program("flwr"), "run", str(stage_app(tmp_path)), "lead", "--format", "json"]
    done = subprocess.run(
        command, env=flower_environment(tmp_path), capture_output=True, text=True, timeout=120, check=False
    )
    assert '"success": true' not in done.stdout
    with control_of(serving) as control:
        assert control.unfinished_runs() == []
        assert control.nodes() == control.nodes()


@pytest.mark.parametrize(
    "target",
    [
        b"//v1/control/list-nodes",
        b"/v1/fleet/../control/list-nodes",
        b"/v1/fleet/%2e%2e/control/list-nodes",
        b"/v1/fleet/..%2fcontrol/list-nodes",
        b"/%76%31/control/list-nodes",
        b"/v1/control%2flist-nodes",
        b"/V1/CONTROL/LIST-NODES",
        b"https://127.0.0.1/v1/control/list-nodes",
        b"/v1/control/list-nodes?/v1/fleet/pull-messages",
        b"/v1/control/list-nodes#/v1/fleet/pull-messages",
        b"/v1/fleet/pull-messages;/../../control/list-nodes",
        b"*",
    ],
)
def test_no_spelling_of_a_control_path_reaches_it(serving: StudyFolder, target: bytes) -> None:
    head = b"POST " + target + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/protobuf\r\n"
    status = _raw(serving, head + b"Content-Length: 0\r\n\r\n")
    assert status.split()[1] in (b"404", b"400"), status


def test_a_host_header_does_not_lead_past_the_check_of_keys(serving: StudyFolder) -> None:
    for host in (b"127.0.0.1", b"x/v1/control/list-nodes?", b"x#", b"x\\y"):
        head = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: " + host + b"\r\nContent-Length: 0\r\n"
        status = _raw(serving, head + b"Content-Type: application/protobuf\r\n\r\n")
        assert status.split()[1] in (b"401", b"400"), (host, status)


def test_a_websocket_to_the_public_port_is_refused(serving: StudyFolder) -> None:
    head = b"GET /v1/control/list-nodes HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    status = _raw(serving, head + b"Sec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
    assert status.split()[1] in (b"403", b"404"), status


@pytest.mark.parametrize("media_type", ["application/protobuf", "text/plain"])
def test_an_endless_body_does_not_fill_the_memory(serving: StudyFolder, public: httpx.Client, media_type: str) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(256):
            yield bytes(2**20)

    before = _memory(serving)
    with contextlib.suppress(httpx.TransportError):  # cut off while sending
        headers = {"content-type": media_type}
        assert public.post("/v1/fleet/push-object", headers=headers, content=pieces()).status_code >= 400
    assert _memory(serving) - before < 150 * 2**20
    assert public.get("/health").status_code == 200


def _memory(study: StudyFolder) -> int:
    service = find(study)
    assert service is not None
    return int(psutil.Process(service.pid).memory_info().rss)


def test_the_control_api_is_served_at_the_loopback_port(serving: StudyFolder) -> None:
    with control_of(serving) as control:
        assert control.unfinished_runs() == []
        with pytest.raises(FlowerError):
            control.run(1)


def test_nothing_listens_for_control_beyond_the_loopback(serving: StudyFolder) -> None:
    service = find(serving)
    assert service is not None
    listening = {c.laddr for c in psutil.Process(service.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening == {("127.0.0.1", serving.settings.port), ("127.0.0.1", serving.settings.control_port)}


def test_only_an_admitted_site_connects(serving: StudyFolder, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(httpx.HTTPStatusError):
        _activate(serving, key)
    code, output = call("admit", "north", _public_half(key, tmp_path / "key.pub"), "--study", serving.folder, "--json")
    assert code == 0, output
    assert json.loads(output)["registered"]
    assert _activate(serving, key) > 0
    assert _connections(serving) == {"north": "online"}
    assert call("remove", "north", "--study", serving.folder)[0] == 0
    with pytest.raises(httpx.HTTPStatusError):
        _activate(serving, key)
    assert _connections(serving) == {}


def _connections(study: StudyFolder) -> dict[str, str]:
    code, output = call("status", "--study", study.folder, "--json")
    assert code == 0, output
    status = json.loads(output)
    assert status["superlink"]["running"]
    assert status["run"] is None
    return {site["site"]: site["connection"] for site in status["sites"]}


def test_a_running_server_is_not_started_twice(serving: StudyFolder) -> None:
    before = find(serving)
    code, output = call("start", "--study", serving.folder)
    assert code == 2
    assert "already running" in output
    assert find(serving) == before


def test_a_process_with_the_pid_of_a_dead_server_is_not_mistaken_for_it(study: StudyFolder) -> None:
    write_json(study.server / "superlink.json", {"pid": os.getpid(), "birth": "another boot 1.00", "mark": "gone"})
    assert find(study) is None
    assert not stop(study)
    assert ProcessRecord(os.getpid(), birth(psutil.Process()), "x").alive


def test_without_a_server_runs_are_refused_and_status_says_so(study: StudyFolder) -> None:
    for arguments in (("run",), ("run", "--resume"), ("stop", "--run")):
        code, output = call(*arguments, "--study", study.folder)
        assert code == 2
        assert "`semisam lead start` starts it" in output
    code, output = call("status", "--study", study.folder)
    assert code == 0
    assert "is not running" in output


@pytest.mark.slow
def test_a_killed_server_restarts_with_its_registrations_and_stop_leaves_no_process(
    study: StudyFolder, tmp_path: Path
) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    call("admit", "north", _public_half(key, tmp_path / "key.pub"), "--study", study.folder)
    try:
        assert typed("start", "--study", str(study.folder)).returncode == 0
        first, node = find(study), _activate(study, key)
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        assert wait_until(lambda: find(study) is None)
        code, output = call("status", "--study", study.folder, "--json")
        assert code == 0
        assert not json.loads(output)["superlink"]["running"]
        again = typed("start", "--study", str(study.folder))
        assert again.returncode == 0, again.stderr
        assert wait_until(lambda: _activated_again(study, key) == node, 120)
    finally:
        stopped = typed("stop", "--study", str(study.folder))
    assert "has ended" in stopped.stdout
    assert processes_of(study.folder) == []
    assert "was not running" in typed("stop", "--study", str(study.folder)).stdout


@pytest.mark.slow
def test_in_the_foreground_the_server_ends_with_its_command(study: StudyFolder) -> None:
    command = [sys.executable, "-m", "cli.main", "lead", "start", "--foreground", "--study", str(study.folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert wait_until(lambda: find(study) is not None, 120)
        with httpx.Client(
            verify=ssl.create_default_context(cafile=str(study.ca)), trust_env=False, timeout=5
        ) as client:
            assert wait_until(lambda: _healthy(client, study), 120)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        stop(study)
    assert process.returncode == 0, output
    assert find(study) is None
    assert processes_of(study.folder) == []


def _healthy(client: httpx.Client, study: StudyFolder) -> bool:
    try:
        return client.get(f"https://{study.settings.address}/health").is_success
    except httpx.TransportError:
        return False


def test_a_taken_port_is_reported_and_no_process_is_left(study: StudyFolder) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", study.settings.port))
        taken.listen()
        done = typed("start", "--study", str(study.folder))
    assert done.returncode == 2
    assert "its log is" in done.stderr
    assert "Address already in use" in (study.server / "superlink.log").read_text()
    assert processes_of(study.folder) == []
    assert find(study) is None
