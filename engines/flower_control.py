"""Client of a SuperLink's control API: submit, list and stop runs; register and list SuperNodes.

It speaks the protocol of Flower's own command. That command rebuilds the bundle at every submission; here the bytes
that were approved are the bytes that are submitted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx
from flwr.common.serde import fab_to_proto, user_config_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.federation_config_pb2 import SimulationConfig
from flwr.proto.run_pb2 import Run
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError as ApiError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from semisam_core.errors import SemiSAMError

RunConfig = Mapping[str, str | int]

TICK_S = 0.4
START_DEADLINE_S = 120.0
ASK_TIMEOUT_S = 5.0
MANY_RUNS = 1000
FINISHED, UNREGISTERED = "finished", "unregistered"


class FlowerError(SemiSAMError):
    """Flower could not be started or reached; the message says where its log is."""


@dataclass(frozen=True)
class FlowerRun:
    """One run, as Flower reports it.

    Attributes:
        run_id: Flower's number for it.
        state: pending, starting, running or finished.
        end: completed, failed or stopped; empty until it is finished.
        details: Flower's explanation, if any.
        config: the run config it was submitted with.
    """

    run_id: int
    state: str
    end: str
    details: str
    config: Mapping[str, object]

    @property
    def finished(self) -> bool:
        """Whether the run has ended, for whatever reason."""
        return self.state == FINISHED


@dataclass(frozen=True)
class FlowerNode:
    """One registered SuperNode.

    Attributes:
        node_id: Flower's number for it.
        name: the name it was registered under.
        status: registered (never seen), online or offline.
        public_key: the registered key, PEM.
    """

    node_id: int
    name: str
    status: str
    public_key: bytes


class FlowerControl:
    """A connection to one SuperLink's control API.

    Args:
        address: host:port.
        ca: certificate of the authority that signed the server's; None means no TLS.
    """

    def __init__(self, address: str, ca: Path | None) -> None:
        self._address = address
        with _without_proxies():
            self._client = ControlHttpClient.from_server_address(
                address,
                insecure=ca is None,
                root_certificates=None if ca is None else ca.read_bytes(),
                interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            )

    def __enter__(self) -> FlowerControl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def submit(self, bundle: bytes, run_config: RunConfig, simulation: SimulationConfig | None = None) -> int:
        """Submit exactly these bytes as a run; return its number.

        Raises:
            FlowerError: the SuperLink cannot be reached or did not accept it.
        """
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = StartRunRequest(
            fab=fab_to_proto(fab),
            override_config=user_config_to_proto(dict(run_config)),
            override_federation_config=simulation,
        )
        with self._asking("submit the run"):
            answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise FlowerError("the SuperLink did not accept the run.")
        return int(answer.run_id)

    def run(self, run_id: int) -> FlowerRun:
        """Return the state of a run.

        Raises:
            FlowerError: the SuperLink cannot be reached or does not know the run.
        """
        with self._asking("look up the run"):
            answer = self._client.ListRuns(ListRunsRequest(run_id=run_id))
        if run_id not in answer.run_dict:
            raise FlowerError(f"the SuperLink at {self._address} does not know run {run_id}.")
        return _run(answer.run_dict[run_id])

    def unfinished_runs(self) -> list[FlowerRun]:
        """Return all runs that have not ended, oldest first."""
        with self._asking("list the runs"):
            answer = self._client.ListRuns(ListRunsRequest(limit=MANY_RUNS))
        runs = sorted(answer.run_dict.values(), key=lambda run: run.pending_at)
        return [run for run in map(_run, runs) if not run.finished]

    def stop(self, run_id: int) -> None:
        """Stop a run, unless it has ended already."""
        with self._asking("stop the run"):
            try:
                self._client.StopRun(StopRunRequest(run_id=run_id))
            except httpx.HTTPStatusError:
                if not self.run(run_id).finished:
                    raise

    def nodes(self) -> list[FlowerNode]:
        """Return all registered SuperNodes, by name."""
        with self._asking("list the SuperNodes"):
            answer = self._client.ListNodes(ListNodesRequest())
        nodes = [FlowerNode(n.node_id, n.name, n.status, n.public_key) for n in answer.nodes_info]
        return sorted((node for node in nodes if node.status != UNREGISTERED), key=lambda node: node.name)

    def register(self, name: str, public_key: bytes) -> None:
        """Allow the SuperNode that holds the private half of this key (PEM) to connect."""
        with self._asking(f"register {name}"):
            self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))

    def unregister(self, node_id: int) -> None:
        """Refuse further connections of a SuperNode."""
        with self._asking("unregister a SuperNode"):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            known = ApiError.from_json(error.response.text)
            said = f"{known.message} {known.public_details or ''}" if known else str(error)
            raise FlowerError(f"Flower refused to {what}: {said.strip()}") from None
        except (httpx.HTTPError, OSError) as error:
            raise FlowerError(f"could not {what}: Flower is not reachable at {self._address} ({error}).") from None


def flower_environment(home: Path) -> dict[str, str]:
    """Return an environment in which Flower writes only to `home`, installs nothing and contacts no other host."""
    here = "127.0.0.1,localhost"
    others = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    exempt = f"{here},{others}" if others else here
    # Flower's internal switches among these would open further ports, with the control API.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_INTERNAL_")}
    return inherited | {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": exempt,
        "no_proxy": exempt,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def wait_until_healthy(
    address: str, ca: Path | None, alive: Callable[[], bool], on_tick: Callable[[], None], log: Path
) -> None:
    """Wait until a SuperLink serves.

    Args:
        address: host:port.
        ca: see `FlowerControl`.
        alive: whether its process is running.
        on_tick: called about twice a second.
        log: its log file, for messages.

    Raises:
        FlowerError: its process ended, or it was not ready within two minutes.
    """
    scheme, verify = ("http", False) if ca is None else ("https", ssl.create_default_context(cafile=str(ca)))
    deadline = time.monotonic() + START_DEADLINE_S
    with httpx.Client(verify=verify, trust_env=False, timeout=ASK_TIMEOUT_S) as asking:
        while time.monotonic() < deadline:
            if not alive():
                raise FlowerError(f"flower-superlink ended before it was ready; its log is {log}.")
            try:
                if asking.get(f"{scheme}://{address}/health").is_success:
                    return
            except httpx.HTTPError:
                pass
            on_tick()
            time.sleep(TICK_S)
    raise FlowerError(f"flower-superlink was not ready within {START_DEADLINE_S:g} s; its log is {log}.")


def program(name: str) -> str:
    """Return the path of a program installed beside this Python, so that another environment's Flower is never used.

    Raises:
        FlowerError: it is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FlowerError(f"the program {name} is not installed beside {sys.executable}; install flwr[simulation].")
    return found


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(run: Run) -> FlowerRun:
    status, config = run.status, user_config_from_proto(run.override_config)
    return FlowerRun(int(run.run_id), status.status, status.sub_status, status.details, config)


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Keep web proxies out of the connection to the local SuperLink; clients read these variables when created."""
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
