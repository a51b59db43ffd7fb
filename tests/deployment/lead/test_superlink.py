"""A real SuperLink: who may call it, what idle and slow connections cost it, and what follows if a child dies."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from deployment.lead.doors import TwoDoors
from deployment.lead.pki import write_certificates
from deployment.lead.registration import admit
from deployment.lead.run import last_run, new_run
from deployment.lead.service import control_of, find, start, stop
from deployment.lead.study_folder import NewStudy, StudyFolder
from deployment.lead.superlink import LOG_BYTES, SuperLinkStore, gated, listening_socket, shorten, superlink
from deployment.lead.upload_gate import Caller
from engines.flower_control import FlowerControl, FlowerError
from engines.run_state import run_state
from tests.deployment.lead.conftest import processes_of, two_free_ports, wait_until

PER_ADDRESS = 240
BOUNDS = {"per_address": PER_ADDRESS, "handshake_s": 4, "headers_s": 5, "stall_s": 6, "request_s": 12}
SLACK_S = 8.0  # two cores, shared with other tests
EACH = 50
CONTROL_PORT = 8444


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


@pytest.fixture(scope="module")
def bounded(
    tmp_path_factory: pytest.TempPathFactory, supervised_plan: Path, key: ec.EllipticCurvePrivateKey
) -> Iterator[StudyFolder]:
    """Return a study that is served with short bounds, and has admitted `key`."""
    folder = tmp_path_factory.mktemp("bounded")
    study = NewStudy(folder / "atrium", supervised_plan, [], two_free_ports(), 2).write()
    path = study.folder / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"connections": BOUNDS, "bind": "0.0.0.0"}))
    public = folder / "key.pub"
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    study = StudyFolder.load(study.folder)
    admit(study, "north", public)
    try:
        start(study)
        yield study
    finally:
        stop(study)
    assert processes_of(folder) == []


@pytest.fixture(autouse=True, scope="module")
def _enough_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Site:
    """A site's SuperNode, reduced to its calls."""

    def __init__(self, study: StudyFolder, key: ec.EllipticCurvePrivateKey) -> None:
        interceptors = [NodeAuthHttpInterceptor(key, key.public_key())]
        self._client = FleetHttpClient.from_server_address(
            study.settings.address, False, study.ca.read_bytes(), interceptors
        )
        request = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30)
        self._node = self._client.ActivateNode(request).node_id

    def beat(self) -> bool:
        """Send a heartbeat; return whether the server took it."""
        request = SendNodeHeartbeatRequest(node=Node(node_id=self._node), heartbeat_interval=30)
        return bool(self._client.SendNodeHeartbeat(request).success)


class Attack:
    """Connections to the public port that do not do what they should.

    Args:
        study: whose port.
        kind: `half-open` never speaks TLS; `idle` never sends a request; `headers` sends one byte of them at a time;
            `stalled` stops within the body; `trickle` sends the body byte by byte.
        count: how many connections.
    """

    def __init__(self, study: StudyFolder, kind: str, count: int) -> None:
        self.kind = kind
        self._open: list[socket.socket] = []
        self.lasted: list[float] = []
        context = ssl.create_default_context(cafile=str(study.ca))
        self._began = time.monotonic()
        for _ in range(count):
            link = socket.create_connection(("127.0.0.1", study.settings.port), 20)
            if kind != "half-open":
                link = context.wrap_socket(link, server_hostname="127.0.0.1")
            if kind in ("stalled", "trickle"):
                link.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nx")
            link.setblocking(False)
            self._open.append(link)

    def go_on(self) -> int:
        """Send another byte where the attack does; return how many connections the server still holds."""
        for link in list(self._open):
            try:
                if self.kind == "headers":
                    link.send(b"P")
                elif self.kind == "trickle":
                    link.send(b"x")
                ended = link.recv(4096) == b""
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
                ended = False
            except OSError:
                ended = True
            if ended:
                link.close()
                self._open.remove(link)
                self.lasted.append(time.monotonic() - self._began)
        return len(self._open)

    def close(self) -> None:
        """End what is left."""
        for link in self._open:
            link.close()


def _held(study: StudyFolder) -> int:
    """Return how many connections the server holds on its public port."""
    service = find(study)
    assert service is not None
    connections = psutil.Process(service.pid).net_connections("tcp")
    port = study.settings.port
    return sum(each.laddr.port == port and each.status != psutil.CONN_LISTEN for each in connections)


def test_only_the_public_port_listens_beyond_the_loopback(bounded: StudyFolder) -> None:
    service = find(bounded)
    assert service is not None
    listening = {c.laddr for c in psutil.Process(service.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening == {("0.0.0.0", bounded.settings.port), ("127.0.0.1", bounded.settings.control_port)}


@pytest.mark.slow
def test_connections_that_send_no_request_end_within_the_bounds_while_a_site_is_served(
    bounded: StudyFolder, key: ec.EllipticCurvePrivateKey
) -> None:
    limits = {"half-open": 4, "idle": 5, "headers": 5, "stalled": 6, "trickle": 12}
    site = Site(bounded, key)
    attacks = [Attack(bounded, kind, EACH if kind != "trickle" else 20) for kind in limits]
    assert _held(bounded) > 100
    deadline = time.monotonic() + max(limits.values()) + 2 * SLACK_S
    try:
        while sum([attack.go_on() for attack in attacks]) and time.monotonic() < deadline:
            assert site.beat()
            time.sleep(0.3)
        for attack in attacks:
            assert attack.go_on() == 0, f"{attack.kind}: still open"
            assert max(attack.lasted) < limits[attack.kind] + SLACK_S, attack.kind
    finally:
        for attack in attacks:
            attack.close()
    assert site.beat()


@pytest.mark.slow
def test_one_address_holds_no_more_than_its_share_and_still_reaches_the_server(
    bounded: StudyFolder, key: ec.EllipticCurvePrivateKey
) -> None:
    attacks = [Attack(bounded, "half-open", 300), Attack(bounded, "idle", 60)]
    try:
        assert _held(bounded) <= PER_ADDRESS + 5  # some are on their way out
        assert sum([attack.go_on() for attack in attacks]) <= PER_ADDRESS
        verify = ssl.create_default_context(cafile=str(bounded.ca))
        with httpx.Client(verify=verify, trust_env=False, timeout=20) as client:
            assert client.get(f"https://{bounded.settings.address}/health").status_code == 200
    finally:
        for attack in attacks:
            attack.close()


def test_a_log_that_has_grown_long_is_shortened_and_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "superlink.log"
    with log.open("ab", buffering=0) as file:
        file.write(bytes(LOG_BYTES))
        shorten(log)
        assert log.stat().st_size == LOG_BYTES
        file.write(b"x")
        shorten(log)
        file.write(b"next")
    assert log.read_bytes() == b"next"
    assert log.with_name("superlink.log.1").stat().st_size == LOG_BYTES + 1


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Serve the SuperLink's app without TLS, in this process; return its address as the public and the control port."""
    write_certificates(tmp_path / "tls", "atrium", [], 30)
    sockets = [listening_socket("127.0.0.1", 0), listening_socket("127.0.0.1", 0)]
    public, control = (each.getsockname()[1] for each in sockets)
    flower, state = superlink(control, tmp_path / "superlink.db", tmp_path / "tls")
    as_sites_see_it = gated(flower, state, tmp_path / "update-size.json", 0)
    app = TwoDoors(flower, control, lambda *refused: None, as_sites_see_it)
    server = uvicorn.Server(uvicorn.Config(app, ws="none", log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    try:
        assert wait_until(lambda: server.started)
        yield f"127.0.0.1:{public}", f"127.0.0.1:{control}"
    finally:
        server.should_exit = True
        thread.join(20)


def _activate(address: str, public: ec.EllipticCurvePublicKey, signed_by: ec.EllipticCurvePrivateKey | None) -> int:
    signs = [] if signed_by is None else [NodeAuthHttpInterceptor(signed_by, public)]
    with FleetHttpClient.from_server_address(
        address, True, None, [RuntimeVersionHttpInterceptor(component_name="SuperNode"), *signs]
    ) as client:
        request = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=30)
        return int(client.ActivateNode(request).node_id)


def test_a_key_connects_once_it_is_registered_and_only_with_its_private_half(
    plain: tuple[str, str], key: ec.EllipticCurvePrivateKey
) -> None:
    public, control = plain
    with pytest.raises(httpx.HTTPStatusError):
        _activate(public, key.public_key(), key)
    with FlowerControl(control, None) as commands:
        commands.register("north", key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for signed_by in (None, ec.generate_private_key(ec.SECP384R1())):  # a public key is no secret
        with pytest.raises(httpx.HTTPStatusError):
            _activate(public, key.public_key(), signed_by)
    assert _activate(public, key.public_key(), key) > 0
    stranger = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(httpx.HTTPStatusError):
        _activate(public, stranger.public_key(), stranger)


def _signed(public: ec.EllipticCurvePublicKey, by: ec.EllipticCurvePrivateKey) -> dict[bytes, bytes]:
    request = httpx.Request("POST", "https://x/v1/fleet/push-object")
    context = ProtobufRequestContext("", ActivateNodeRequest(), request)
    NodeAuthHttpInterceptor(by, public).intercept(context, lambda asked: httpx.Response(200))
    return dict(request.headers.raw)


def test_a_caller_is_recognised_by_its_signature(tmp_path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    write_certificates(tmp_path / "tls", "atrium", [], 30)
    _, state = superlink(CONTROL_PORT, tmp_path / "superlink.db", tmp_path / "tls")
    store = SuperLinkStore(state, tmp_path)
    public, other = key.public_key(), ec.generate_private_key(ec.SECP384R1())
    headers = {name.lower(): value for name, value in _signed(public, key).items()}
    assert store.identify(headers) is None
    node = state.create_node("lead", "lead", public_key_to_bytes(public), 30, name="north")
    assert store.identify(headers) == Caller(node, "north")
    for mistaken in (
        _signed(public, other),
        _signed(other.public_key(), key),
        _signed(other.public_key(), other),
        dict.fromkeys(headers, b""),
        dict.fromkeys(headers, b"?"),
        {},
    ):
        assert store.identify({name.lower(): value for name, value in mistaken.items()}) is None


def test_a_supernode_cannot_register_itself(plain: tuple[str, str], key: ec.EllipticCurvePrivateKey) -> None:
    signs = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
    request = RegisterNodeFleetRequest(public_key=public_key_to_bytes(key.public_key()))
    for address in plain:
        with (
            FleetHttpClient.from_server_address(address, True, None, signs) as client,
            pytest.raises(httpx.HTTPStatusError),
        ):
            client.RegisterNode(request)
    with FlowerControl(plain[1], None) as commands:
        assert commands.nodes() == []


def test_the_control_api_is_served_at_the_control_port_only(plain: tuple[str, str]) -> None:
    public, control = plain
    with FlowerControl(control, None) as commands:
        assert commands.nodes() == []
    with FlowerControl(public, None) as commands, pytest.raises(FlowerError):
        commands.nodes()


def _children(study: StudyFolder, name: str) -> list[psutil.Process]:
    service = find(study)
    assert service is not None
    found = []
    for child in psutil.Process(service.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


def _zombies(study: StudyFolder) -> list[psutil.Process]:
    service = find(study)
    assert service is not None
    found = []
    for child in psutil.Process(service.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.status() == psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


@pytest.mark.slow
def test_a_child_of_the_server_that_dies_is_reaped_and_runs_still_start(bounded: StudyFolder) -> None:
    with control_of(bounded) as control:
        for victim in ("flwr-serverapp", "superexec.py"):
            new_run(bounded, control, 2)
            folder = last_run(bounded)
            assert folder is not None
            assert wait_until(lambda folder=folder: run_state(folder) == "running", 120), victim
            (process,) = _children(bounded, victim)
            os.kill(process.pid, signal.SIGKILL)
            assert wait_until(lambda pid=process.pid: not psutil.pid_exists(pid), 10), victim
            assert wait_until(lambda: not _zombies(bounded), 10)
            for run in control.unfinished_runs():
                control.stop(run.run_id)
            assert wait_until(lambda: not _children(bounded, "flwr-serverapp"), 60)
            assert wait_until(lambda: len(_children(bounded, "superexec.py")) == 1, 20)
        new_run(bounded, control, 2)
        folder = last_run(bounded)
        assert folder is not None
        assert wait_until(lambda: run_state(folder) == "running", 120)
