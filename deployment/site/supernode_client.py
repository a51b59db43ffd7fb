"""Client of the SuperNode's Runtime API: take a task, fetch its message without opening it, send the answer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import httpx
from flwr.app import Message
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PullTaskInputResponse,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})
HEARTBEAT_S = 10.0  # Flower abandons a task after 60 s without one
MESSAGE_S = 20.0
STALLED_S = 120.0  # a chunk of a message has at most 5 MiB
TICK_S = 0.1


class UnansweredError(Exception):
    """A message cannot be answered through this SuperNode, which would wait for the answer forever."""


@dataclass(frozen=True)
class Arrived:
    """A task and its message, unopened.

    Attributes:
        kind: Flower's type of the task.
        given: run, node and the bundle that the server wants to run.
        message: the message's metadata, without its content.
        root: id of the root object of the message.
        objects: id -> content as received.
    """

    kind: str
    given: PullTaskInputResponse
    message: Message
    root: str
    objects: dict[str, bytes]


@dataclass(frozen=True)
class Outgoing:
    """A reply as the Runtime API takes it: its head, the tree of its objects, and their content."""

    head: ProtoMessage
    tree: ObjectTree
    objects: dict[str, bytes] = field(repr=False)


class Heartbeat:
    """Tells the SuperNode that its task is in progress, while in the `with`."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client, self._over = client, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(HEARTBEAT_S)

    def _beat(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(httpx.HTTPError, RuntimeError):
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            self._over.wait(HEARTBEAT_S)


class Runtime:
    """Takes tasks from one SuperNode on this machine.

    Args:
        address: host:port of its Runtime API.
        secret: shared by the SuperNode and this runner only; without it no process can take a task.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        self._address = address
        self._takes = self._client(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=ACQUIRE))

    def close(self) -> None:
        """Close the connection."""
        self._takes.close()

    def take(self) -> tuple[Task, str] | None:
        """Return the next task of any type and its token, or None.

        Every type is taken, since the SuperNode would wait forever for an answer to a task that is not.

        Raises:
            httpx.HTTPError: the SuperNode cannot be asked.
        """
        answer = self._takes.AcquireTask(AcquireTaskRequest(supported_task_types=[kind.value for kind in TaskType]))
        return (answer.task, answer.token) if answer.HasField("task") and answer.token else None

    def of_task(self, token: str) -> RuntimeHttpClient:
        """Return a client with the rights of one task."""
        return self._client(RuntimeTokenHttpInterceptor(token))

    def _client(self, *interceptors: RuntimeTokenHttpInterceptor | SuperExecAuthHttpInterceptor) -> RuntimeHttpClient:
        # No retry invoker: Flower's terminates its process when a token expires.
        return RuntimeHttpClient.from_server_address(
            server_address=self._address,
            insecure=True,
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), *interceptors],
        )


def fetch(client: RuntimeHttpClient, task: Task, seconds: float, tick: Callable[[], None]) -> Arrived:
    """Fetch a task's message and bundle as bytes.

    Args:
        client: of the task.
        task: the task.
        seconds: time limit for the message's objects, which the SuperNode may still be receiving.
        tick: called while waiting.

    Raises:
        UnansweredError: there is no message to answer, or it stopped arriving.
        httpx.HTTPError: the SuperNode cannot be asked.
    """
    given = client.PullTaskInput(PullTaskInputRequest())
    deadline = time.monotonic() + MESSAGE_S
    while not (pulled := client.PullMessages(PullAppMessagesRequest())).messages_list:
        if time.monotonic() > deadline:
            raise UnansweredError("the task has no message")
        _pause(tick)
    tree = pulled.message_object_trees[0]
    message = message_from_proto(pulled.messages_list[0])
    message.metadata.__dict__["_message_id"] = tree.object_id
    node, run = Node(node_id=given.context.node_id), given.run.run_id
    names = dict.fromkeys(part.object_id for part in iterate_object_tree(tree))
    objects = _objects(client, node, run, list(names), seconds, tick)
    client.ConfirmMessageReceived(
        ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=tree.object_id)
    )
    return Arrived(task.type, given, message, tree.object_id, objects)


def _objects(
    client: RuntimeHttpClient, node: Node, run: int, missing: list[str], seconds: float, tick: Callable[[], None]
) -> dict[str, bytes]:
    """Pull a message's objects in any order.

    A SuperNode silently drops a message if its run ends while it arrives, hence the limit on time without progress.
    """
    objects: dict[str, bytes] = {}
    now = time.monotonic()
    deadline, stalled = now + seconds, now + STALLED_S
    while missing:
        for name in list(missing):
            pulled = client.PullObject(PullObjectRequest(node=node, run_id=run, object_id=name))
            if pulled.object_available:
                objects[name] = pulled.object_content
                missing.remove(name)
                stalled = time.monotonic() + STALLED_S
        if missing:
            if time.monotonic() > min(deadline, stalled):
                raise UnansweredError("the message never arrived completely")
            _pause(tick)
    return objects


def answer(client: RuntimeHttpClient, arrived: Arrived, outgoing: Outgoing, outcome: str) -> None:
    """Send a reply and finish the task.

    Args:
        client: of the task.
        arrived: the message to answer.
        outgoing: the reply.
        outcome: Flower's word for how the task ended.

    Raises:
        httpx.HTTPError: the SuperNode cannot be asked.
    """
    node, run = Node(node_id=arrived.given.context.node_id), arrived.given.run.run_id
    pushed = client.PushMessages(
        PushAppMessagesRequest(messages_list=[outgoing.head], message_object_trees=[outgoing.tree])
    )
    for name in pushed.objects_to_push:
        client.PushObject(
            PushObjectRequest(
                node=node,
                run_id=run,
                object_id=name,
                object_content=outgoing.objects[name],
                session_id=pushed.session_id,
            )
        )
    # No context and no details: whatever approved code put there stays at the site.
    client.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome, details=""))


def _pause(tick: Callable[[], None]) -> None:
    tick()
    time.sleep(TICK_S)
