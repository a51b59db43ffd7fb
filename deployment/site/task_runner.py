"""Decides whether a task's code may run here before any of it is unpacked, and answers every message.

It replaces Flower's SuperExec, which would unpack and import whatever bundle the server names.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.runtime import RuntimeHttpClient
from google.protobuf.message import DecodeError

from client.egress import EgressGate
from deployment.invitation import sha256
from deployment.site.code_store import Approval, CodeAlteredError, CodeStore
from deployment.site.supernode_client import Arrived, Heartbeat, Outgoing, Runtime, UnansweredError, answer, fetch
from deployment.site.worker_pool import OutOfTimeError, Workers
from semisam_core.contract import RefusalRule

logger = logging.getLogger(__name__)

KINDS = {"query": "join", "train": "train", "evaluate": "evaluate"}
OBJECT_NAME = re.compile(r"[0-9a-f]{64}")
BESIDES_TENSORS_BYTES = 16 * 2**20
WORDS = frozenset(rule.value for rule in RefusalRule)


class _RefusedError(Exception):
    def __init__(self, rule: RefusalRule, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule


class Runner:
    """Handles the SuperNode's tasks one at a time.

    Args:
        runtime: the SuperNode.
        code: the code approved here.
        gate: builds and logs refusals.
        site_file: the site's YAML, whose path is passed to approved code.
        workers: processes for approved code.
        scratch: folder for messages to and from such a process.
        seconds: time limit of a task.
        maximum_reply: size limit of a reply's tensors, in bytes.
        tick: called several times a second; raising abandons the task.
    """

    def __init__(
        self,
        runtime: Runtime,
        code: CodeStore,
        gate: EgressGate,
        site_file: Path,
        workers: Workers,
        scratch: Path,
        seconds: float,
        maximum_reply: float,
        tick: Callable[[], None],
    ) -> None:
        self._runtime, self._code, self._gate, self._site_file = runtime, code, gate, site_file
        self._workers, self._scratch, self._seconds, self._tick = workers, scratch, seconds, tick
        self._maximum_reply = maximum_reply + BESIDES_TENSORS_BYTES

    def work(self) -> bool:
        """Take one task and answer it; return whether there was one.

        Raises:
            UnansweredError: the SuperNode holds a message that can no longer be answered; it must be restarted.
        """
        try:
            taken = self._runtime.take()
        except httpx.HTTPError as error:
            logger.warning("The SuperNode cannot be asked for tasks: %s", error)
            return False
        if taken is None:
            self._workers.warm()
            return False
        task, token = taken
        client = self._runtime.of_task(token)
        try:
            with Heartbeat(client):
                self._answer(client, task)
        except (httpx.HTTPError, DecodeError) as error:
            raise UnansweredError(f"the SuperNode does not accept the answer ({type(error).__name__})") from error
        finally:
            client.close()
        return True

    def _answer(self, client: RuntimeHttpClient, task: Task) -> None:
        arrived = fetch(client, task, self._seconds, self._tick)
        content = arrived.given.fab.content
        offered = sha256(content)
        try:
            approval = self._check(arrived, offered)
            outgoing = self._run(arrived, approval)
            outcome = SubStatus.COMPLETED
        except _RefusedError as refused:
            logger.warning("Refused by rule %s: %s", refused.rule.value, refused)
            outgoing = self._refusal(arrived, refused.rule, str(refused), offered)
            outcome = SubStatus.FAILED
        answer(client, arrived, outgoing, outcome)

    def _check(self, arrived: Arrived, offered: str) -> Approval:
        """Check the hash of the bundle's content, not the hash that came with it; nothing is unpacked."""
        if arrived.kind != TaskType.CLIENT_APP.value:
            raise _RefusedError(RefusalRule.CODE_NOT_APPROVED, "the task is not for a ClientApp")
        return self._check_approved(offered, "the server wants to run code that is not approved here")

    def _check_approved(self, code_hash: str, otherwise: str) -> Approval:
        try:
            approved = {entry.hash: entry for entry in self._code.approved()}
        except CodeAlteredError as error:
            raise _RefusedError(RefusalRule.CODE_ALTERED, str(error)) from None
        if code_hash not in approved:
            raise _RefusedError(RefusalRule.CODE_NOT_APPROVED, otherwise)
        return approved[code_hash]

    def _run(self, arrived: Arrived, approval: Approval) -> Outgoing:
        try:
            bundle, code = self._code.verified(approval.hash)
        except CodeAlteredError as error:
            raise _RefusedError(RefusalRule.CODE_ALTERED, str(error)) from None
        try:
            task = Path(tempfile.mkdtemp(dir=self._scratch, prefix="task-"))
        except OSError as error:
            raise _RefusedError(RefusalRule.STORAGE, str(error)) from None
        try:
            _lay_out(arrived, task)
            job = {
                "task": str(task),
                "code": str(code),
                "packages": list(bundle.packages),
                "component": bundle.component,
                "site_file": str(self._site_file),
                "manifest": approval.manifest,
                "run_id": arrived.given.run.run_id,
                "node_id": arrived.given.context.node_id,
                "series_id": arrived.given.context.series_id,
            }
            tick = partial(self._tick_while_approved, approval)
            ended_well = self._workers.run(job, self._seconds, tick)
            tick()
            if not ended_well or not (task / "reply").is_dir():
                raise _RefusedError(RefusalRule.PROCESS_ENDED, "the process ended without an answer; see worker.log")
            return _take_up(arrived, task / "reply", self._maximum_reply)
        except OutOfTimeError:
            reason = f"the process took longer than {self._seconds:g} s"
            raise _RefusedError(RefusalRule.OUT_OF_TIME, reason) from None
        except OSError as error:
            raise _RefusedError(RefusalRule.STORAGE, str(error)) from None
        finally:
            shutil.rmtree(task, ignore_errors=True)

    def _tick_while_approved(self, approval: Approval) -> None:
        self._tick()
        now = self._check_approved(approval.hash, "the approval of this code was revoked while it ran")
        if now.manifest != approval.manifest:
            reason = "another manifest was approved while it ran"
            raise _RefusedError(RefusalRule.MANIFEST_NOT_APPROVED, reason)

    def _refusal(self, arrived: Arrived, rule: RefusalRule, reason: str, offered: str) -> Outgoing:
        meta = arrived.message.metadata
        kind = KINDS.get(meta.message_type.partition(".")[0], "?")
        number = int(meta.group_id) if re.fullmatch(r"[0-9]{1,6}", meta.group_id) else -1
        try:
            content: RecordDict | Error = self._gate.refuse(kind, "?", number, rule, reason, offered)
        except Exception as error:
            logger.error("This site cannot write its audit log, so nothing leaves it", exc_info=error)
            content = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, RefusalRule.AUDIT_LOG.value)
        return _outgoing(Message(content, reply_to=arrived.message))


def _lay_out(arrived: Arrived, task: Path) -> None:
    folder = task / "objects"
    folder.mkdir()
    for name, content in arrived.objects.items():
        if not OBJECT_NAME.fullmatch(name):
            raise _RefusedError(RefusalRule.INTERNAL, "an object of the message is not named by a hash")
        (folder / name).write_bytes(content)
    (task / "root").write_text(arrived.root, encoding="ascii")


def _take_up(arrived: Arrived, reply: Path, maximum: float) -> Outgoing:
    """Read a process's reply.

    It must answer this message of this run and be within the size limit; an error in it may name a rule only.
    """
    head, tree = ProtoMessage(), ObjectTree()
    contents: dict[Path, bytes] = {}
    for path in (reply / "message.pb", reply / "tree.pb", *(reply / "objects").iterdir()):
        contents[path] = _read(path, maximum)
        maximum -= len(contents[path])
    objects = {path.name: content for path, content in contents.items() if path.parent.name == "objects"}
    try:
        head.ParseFromString(contents[reply / "message.pb"])
        tree.ParseFromString(contents[reply / "tree.pb"])
    except DecodeError:
        raise _RefusedError(RefusalRule.INTERNAL, "the process left no readable reply") from None
    asked, meta = arrived.message.metadata, head.metadata
    if (meta.run_id, meta.reply_to_message_id, meta.dst_node_id) != (
        asked.run_id,
        asked.message_id,
        asked.src_node_id,
    ):
        raise _RefusedError(RefusalRule.INTERNAL, "the process answered another message")
    if head.HasField("error") and head.error.reason not in WORDS:
        raise _RefusedError(RefusalRule.INTERNAL, "the process answered with text that may not leave")
    names = {part.object_id for part in iterate_object_tree(tree)}
    if names != set(objects) or tree.object_id != meta.message_id:
        raise _RefusedError(RefusalRule.INTERNAL, "the process left an incomplete reply")
    return Outgoing(head, tree, objects)


def _read(path: Path, maximum: float) -> bytes:
    """Read a regular file that a process left. Links and pipes are refused: they may lead out or never end."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise _RefusedError(RefusalRule.INTERNAL, "the process left something other than a file")
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        content = file.read(int(maximum) + 1)
    if len(content) > maximum:
        raise _RefusedError(RefusalRule.EGRESS, "the reply is larger than egress.maximum_update_mb allows")
    return content


def _outgoing(reply: Message) -> Outgoing:
    reply.metadata.__dict__["_message_id"] = reply.object_id
    head = message_to_proto(remove_content_from_message(reply))
    with no_object_id_recompute():
        tree = get_object_tree(reply)
        objects = {name: nested.deflate() for name, nested in get_all_nested_objects(reply).items()}
    return Outgoing(head, tree, objects)
