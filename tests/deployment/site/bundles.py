"""Bundles, Runtime APIs and folders for the tests of a site."""

from __future__ import annotations

import hashlib
import io
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from client.egress import EgressGate
from client.manifest import Manifest
from client.site_config import Egress
from deployment.site.bundle import read_bundle
from deployment.site.code_store import CodeStore
from deployment.site.supernode_client import Runtime
from deployment.site.task_runner import Runner
from deployment.site.worker_pool import Workers
from engines.processes import ProcessTree

MANIFEST = Manifest("north", 1, {})
PYPROJECT = """\
[project]
name = "fedsemisam"
version = "0.1.0"

[tool.flwr.app]
publisher = "fedsemisam"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"
"""
SERVER = """\
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    pass
"""
ECHO = """\
import os, signal, sys, time
from pathlib import Path
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()

@app.query()
def answer(message, context):
    wish = message.content.config_records["wish"]["say"]
    if wish == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if wish == "sleep":
        time.sleep(600)
    if wish == "raise":
        raise ValueError("the name of a patient")
    if wish == "large":
        return Message(RecordDict({"said": ConfigRecord({"much": b"x" * 20_000_000})}), reply_to=message)
    if wish in ("pipe", "large-head"):
        (task,) = Path.cwd().glob("task-*")
        (task / "reply" / "objects").mkdir(parents=True)
        if wish == "pipe":
            os.mkfifo(task / "reply" / "message.pb")
        else:
            (task / "reply" / "message.pb").write_bytes(b"x" * 20_000_000)
        os._exit(0)
    if wish.startswith("error:"):
        return Message(Error(2, wish.removeprefix("error:")), reply_to=message)
    if wish == "astray":
        answer = Message(RecordDict({"said": ConfigRecord({"say": wish})}), reply_to=message)
        answer.metadata.__dict__["_reply_to_message_id"] = "0" * 64
        return answer
    said = {"say": wish, "site-config": str(context.node_config["site-config"]), "file": __file__,
            "manifest": str(context.node_config["approved-manifest"]),
            "run-config": len(context.run_config), "cli": "cli" in sys.modules}
    return Message(RecordDict({"said": ConfigRecord(said)}), reply_to=message)
"""


def fab(files: Mapping[str, str | bytes]) -> bytes:
    """Return a bundle of these files, in Flower's format."""
    buffer = io.BytesIO()
    lines = []
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            archive.writestr(zipfile.ZipInfo(path), data)
            lines.append(f"{path},{hashlib.sha256(data).hexdigest()},{len(data) * 8}")
        archive.writestr(zipfile.ZipInfo(".info/CONTENT"), "\n".join(lines))
    return buffer.getvalue()


def echo_fab(app: str = ECHO, **more: str) -> bytes:
    """Return a bundle whose ClientApp echoes what it received."""
    files = {"pyproject.toml": PYPROJECT, "client/__init__.py": "", "client/app.py": app}
    return fab(files | {"server/__init__.py": "", "server/app.py": SERVER} | more)


class FakeLink:
    """A SuperNode's own state and Runtime API without the server behind it: messages come from the test.

    Args:
        state: what the Runtime API serves.
        address: where.
    """

    def __init__(self, state: NodeState, address: str) -> None:
        self.state, self.address = state, address
        self._count = 0

    def send(
        self,
        content: bytes,
        wish: str,
        kind: str = TaskType.CLIENT_APP.value,
        claimed: str | None = None,
        lost: bool = False,
    ) -> str:
        """Put a message for a run of this bundle where the SuperNode would; return the message's id.

        Of a lost one, all but the whole itself has arrived.
        """
        self._count += 1
        run_id = 1000 + self._count
        true = hashlib.sha256(content).hexdigest()
        run = Run.create_empty(run_id)
        run.fab_hash, run.fab_id, run.fab_version, run.series_id = claimed or true, "fedsemisam/x", "0.1.0", run_id
        self.state.store_run(run)
        context = Context(run_id, 7, {"site-config": "/wire"}, RecordDict(), {"sites": "/wire"}, run_id)
        self.state.set_run_series_context(run_id, context)
        # As a SuperNode would hold it whose claimed hash is believed.
        self.state.fab_store[claimed or true] = Fab(claimed or true, content, {})  # type: ignore[attr-defined]
        assert self.state.create_task(task_type=kind, run_id=run_id, fab_hash=run.fab_hash) is not None
        metadata = Metadata(run_id, "", 1, 7, "", "3", time.time(), 3600.0, "query")
        message = make_message(metadata, RecordDict({"wish": ConfigRecord({"say": wish})}))
        message.metadata.__dict__["_message_id"] = message.object_id
        self.state.object_store.preregister(run_id, get_object_tree(message))
        for name, nested in get_all_nested_objects(message).items():
            if not (lost and name == message.object_id):
                self.state.object_store.put(name, nested.deflate())
        self.state.store_message(message)
        return message.object_id

    def reply(self, message_id: str) -> Message:
        """Return the reply that the SuperNode would send on."""
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        for head in self.state.get_messages_legacy(is_reply=True):
            if head.metadata.reply_to_message_id == message_id:
                tree = self.state.object_store.get_object_tree(head.metadata.message_id)
                from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

                names = [part.object_id for part in iterate_object_tree(tree)]
                contents = {name: self.state.object_store.get(name) or b"" for name in names}
                found: Any = inflate_object_from_contents(tree.object_id, contents)
                return found  # type: ignore[no-any-return]
        raise AssertionError("no reply")


@contextmanager
def fake_link(secret: bytes) -> Iterator[FakeLink]:
    """Serve Flower's own SuperNode Runtime API on a free port of this machine."""
    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    state = factory.state()
    state.set_node_id(7)
    config = uvicorn.Config(create_app(factory, secret), host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield FakeLink(state, f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def runner_of(link: FakeLink, secret: bytes, folder: Path, *approved: bytes, seconds: float = 60.0) -> Iterator[Runner]:
    """Return a site's task runner that takes its tasks from this link; its processes end with the context."""
    folder.mkdir(parents=True, exist_ok=True)
    store = CodeStore(folder / "storage" / "code")
    for content in approved:
        store.approve(read_bundle(content, "test"), MANIFEST)
    with ProcessTree() as tree:
        workers = Workers(tree, folder / "worker.log")
        runtime = Runtime(link.address, secret)
        gate = EgressGate("north", Egress(), folder / "storage" / "audit.jsonl")
        yield Runner(runtime, store, gate, folder / "site.yaml", workers, folder, seconds, 1e6, lambda: None)
        workers.close()
        runtime.close()
