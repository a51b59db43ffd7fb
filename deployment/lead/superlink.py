"""Flower's SuperLink behind two doors (see doors.py), with Flower's SuperExec beside it.

This file runs as a program, with Python's `-P`, and imports nothing of this project but its siblings doors.py,
uploads.py and upload_gate.py: a SuperLink must not find our code next to the code that was submitted to it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import logging
import os
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import uvicorn

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:  # run as a program; last, so that it hides nothing
    sys.path.append(ROOT)
from deployment.lead.doors import LOOPBACK, Application, Bounds, PublicDoor, TwoDoors  # noqa: E402
from deployment.lead.uploads import SizeFile  # noqa: E402

if TYPE_CHECKING:
    from flwr.server.superlink.linkstate import LinkState

    from deployment.lead.upload_gate import Caller

GRACE_S = 3
SUPEREXEC = Path(__file__).with_name("superexec.py")
SUPEREXEC_RESTART_S = 2.0
LOG_BYTES = 20 * 2**20
LOG_EVERY_S = 10.0
OWN_FILES = 256  # descriptors kept free for the database, the log and the loopback port

logger = logging.getLogger("flwr")


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket; `host` may be an IPv6 address, with or without brackets.

    Raises:
        OSError: the port is taken, or this machine does not have the address.
    """
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    listening.listen(256)
    return listening


def superlink(control_port: int, database: Path, tls: Path) -> tuple[Application, LinkState]:
    """Return Flower's SuperLink, configured as if it served the loopback port only, and its database."""
    from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
    from flwr.superlink.main import create_app

    files = [tls / name for name in ("ca.crt", "server.crt", "server.key")]
    ca, certificate, key = (path.read_bytes() for path in files)
    config = SuperLinkLifespanConfig(
        control_address=f"{LOOPBACK}:{control_port}",
        health_server_address=None,
        host=LOOPBACK,
        port=control_port,
        insecure=False,
        certificates=(ca, certificate, key),
        superexec_auth_secret=None,
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(files[0]),
        ssl_certfile=str(files[1]),
        ssl_keyfile=str(files[2]),
        database=str(database),
        isolation=ISOLATION_MODE_PROCESS,  # `_Server` starts the SuperExec, and starts it again if it dies
        runtime_dependency_install=False,
    )
    app = create_app(config, SuperLinkLifespan)
    return app, app.state.linkstate_factory.state()


def shorten(log: Path) -> None:
    """Move what a log holds to `<log>.1` if that is much; whoever appends to it goes on. Sites cause most lines."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > LOG_BYTES:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)


class SuperLinkStore:
    """What a SuperLink knows of its callers and holds of their replies.

    Args:
        state: its database.
        folder: a folder on the same disk.
    """

    def __init__(self, state: LinkState, folder: Path) -> None:
        self._state, self._folder = state, folder

    def identify(self, headers: Mapping[bytes, bytes]) -> Caller | None:
        """Return whose signature these headers carry, or None if they carry none of a registered site.

        Flower checks it again, with its age, once it has the body.
        """
        from flwr.common.constant import TIMESTAMP_HEADER
        from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
        from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

        from deployment.lead.upload_gate import Caller

        names = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
        key, signature, signed = (headers.get(name.lower().encode(), b"") for name in names)
        try:
            key, signature = base64.b64decode(key, validate=True), base64.b64decode(signature, validate=True)
        except ValueError:
            return None
        node = self._state.get_node_id_by_public_key(key)
        if node is None or not verify_signature(bytes_to_public_key(key), signed, signature):
            return None
        known = self._state.get_node_info(node_ids=[node])
        return Caller(node, known[0].name if known else "")

    def missing(self, roots: set[str]) -> set[str]:
        """Return which of these objects are in the store no more."""
        return {root for root in roots if root not in self._state.object_store}

    def free_bytes(self) -> int:
        """Return how many bytes are free on the database's disk."""
        return shutil.disk_usage(self._folder).free


def gated(app: Application, state: LinkState, updates: Path, reserve_mb: float) -> Application:
    """Return a SuperLink as sites see it.

    Args:
        app: the SuperLink.
        state: its database, on the same disk as `updates`.
        updates: the file that says how large an update may be.
        reserve_mb: how much of the disk must stay free for replies to be accepted.
    """
    from deployment.lead.upload_gate import UploadGate

    store = SuperLinkStore(state, updates.parent)
    return UploadGate(app, store, SizeFile(updates).of, int(reserve_mb * 1e6))


class _Server(uvicorn.Server):
    """uvicorn, with a guarded public port and Flower's SuperExec beside it."""

    def __init__(
        self, config: uvicorn.Config, public: socket.socket, bounds: Bounds, superexec: list[str], log: Path
    ) -> None:
        super().__init__(config)
        self._public, self._bounds, self._superexec, self._log = public, bounds, superexec, log
        self._work: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve the loopback port as uvicorn does, then the public one."""

        def protocol() -> asyncio.Protocol:
            make = cast(Callable[..., asyncio.Protocol], config.http_protocol_class)
            return make(config=config, server_state=self.server_state, app_state=self.lifespan.state)

        config = self.config
        assert config.ssl is not None
        door = PublicDoor(self._public, self._bounds, config.ssl, protocol)
        config.loaded_app = door.watched(config.loaded_app)
        await super().startup(sockets)
        if not self.should_exit:
            works = (door.accept(), self._keep_superexec(), self._keep_log_short())
            self._work = [asyncio.create_task(work) for work in works]
            for task in self._work:
                task.add_done_callback(self._ended)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, end the SuperExec, then shut down as uvicorn does."""
        for task in self._work:
            task.cancel()
        await asyncio.wait(self._work, timeout=2 * GRACE_S)
        self._public.close()
        await super().shutdown(sockets)

    async def _keep_superexec(self) -> None:
        """Keep a SuperExec running, which starts the runs' programs; a dead one is reaped and replaced."""
        while True:
            process = await asyncio.create_subprocess_exec(*self._superexec, stdin=asyncio.subprocess.DEVNULL)
            try:
                status = await process.wait()
            except asyncio.CancelledError:
                with contextlib.suppress(ProcessLookupError, asyncio.TimeoutError):
                    process.terminate()
                    await asyncio.wait_for(process.wait(), GRACE_S)
                raise
            logger.error("The SuperExec ended with status %s; starting another.", status)
            await asyncio.sleep(SUPEREXEC_RESTART_S)

    async def _keep_log_short(self) -> None:
        while True:
            await asyncio.sleep(LOG_EVERY_S)
            await asyncio.to_thread(shorten, self._log)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            logger.error("The SuperLink stops: it can accept no sites or start no runs.", exc_info=task.exception())
            self.should_exit = True


def main() -> None:
    """Serve until told to stop."""
    from flwr.supercore.http_logging import get_uvicorn_log_config

    given = _arguments()
    seen: set[str] = set()

    def on_refused(client: str, asked: str) -> None:
        if client not in seen and len(seen) < 1000:  # a stranger must not be able to fill the disk with lines
            seen.add(client)
            logger.warning("%s asked at the public port for what is not served there: %.200s", client, asked)

    # Bound before anything else: a taken port must not touch the database of the SuperLink that has it.
    public, control = listening_socket(given.host, given.port), listening_socket(LOOPBACK, given.control_port)
    flower, state = superlink(given.control_port, given.database, given.tls)
    public_app = gated(flower, state, given.update_size, given.free_disk_mb)
    app = TwoDoors(flower, given.control_port, on_refused, public_app)
    config = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",  # Flower serves no WebSockets
        proxy_headers=False,  # who calls, and on which port, is what the connection says
        access_log=False,
        log_config=get_uvicorn_log_config(logging.INFO),
        ssl_certfile=str(given.tls / "server.crt"),
        ssl_keyfile=str(given.tls / "server.key"),
        timeout_graceful_shutdown=GRACE_S,
    )
    superexec = [sys.executable, "-P", str(SUPEREXEC), "--root-certificates", str(given.tls / "ca.crt")]
    superexec += ["--runtime-api-address", f"{LOOPBACK}:{given.control_port}", "--parent-pid", str(os.getpid())]
    bounds = Bounds(**{bound.name: getattr(given, bound.name) for bound in fields(Bounds)})
    log = given.database.with_suffix(".log")
    _Server(config, public, _within_descriptors(bounds), superexec, log).run(sockets=[control])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A SuperLink whose control API is not public.")
    parser.add_argument("--host", required=True, help="address that sites reach")
    parser.add_argument("--port", type=int, required=True, help="port that sites reach")
    parser.add_argument("--control-port", type=int, required=True, help="loopback port of everything else")
    parser.add_argument("--database", type=Path, required=True)
    parser.add_argument("--tls", type=Path, required=True, help="folder of ca.crt, server.crt, server.key")
    parser.add_argument("--update-size", type=Path, required=True, help="file: how large an update may be")
    parser.add_argument("--free-disk-mb", type=float, required=True, help="accept no replies if less is free")
    for bound in fields(Bounds):
        parser.add_argument(f"--{bound.name.replace('_', '-')}", type=type(bound.default), default=bound.default)
    return parser.parse_args()


def _within_descriptors(bounds: Bounds) -> Bounds:
    """Raise this process's limit on open files as far as allowed, and keep the connections below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = bounds.total + OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        wanted = soft
    return replace(bounds, total=min(bounds.total, max(1, wanted - OWN_FILES)))


if __name__ == "__main__":
    main()
