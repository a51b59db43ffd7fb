"""SuperNodes in this process: Flower's calls as a site makes them, with an honest site's work or none behind them."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest, PushMessagesResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.app import app
from deployment.lead.registration import admit
from deployment.lead.study_folder import StudyFolder
from deployment.lead.uploads import Size

AGREED = 8  # objects of agreed size in one reply of a flood


class SuperNode:
    """An admitted site's connection to the server.

    Args:
        study: a study, not served yet.
        name: the site's name, under which its new key is admitted.
    """

    def __init__(self, study: StudyFolder, name: str) -> None:
        self.study, self.name = study, name
        self.key = ec.generate_private_key(ec.SECP384R1())
        public = study.folder.parent / f"{name}.pub"
        public.write_bytes(self.key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
        admit(study, name, public)

    def connect(self) -> None:
        """Connect to the server."""
        signs = NodeAuthHttpInterceptor(self.key, self.key.public_key())
        address, ca = self.study.settings.address, self.study.ca.read_bytes()
        self.client = FleetHttpClient.from_server_address(address, False, ca, [signs])
        request = ActivateNodeRequest(public_key=public_key_to_bytes(self.key.public_key()), heartbeat_interval=30)
        self.node = Node(node_id=self.client.ActivateNode(request).node_id)

    def beat(self) -> None:
        """Say that this site is still there."""
        self.client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=30))

    def asked(self) -> tuple[MessageProto, ObjectTree] | None:
        """Return the next message, if there is one."""
        answer = self.client.PullMessages(PullMessagesRequest(node=self.node))
        return (answer.messages_list[0], answer.message_object_trees[0]) if answer.messages_list else None

    def received(self, message: MessageProto, tree: ObjectTree) -> Message:
        """Return a message with its content."""
        run = message.metadata.run_id
        pull = make_pull_object_fn_protobuf(self.client.PullObject, self.node, run)
        confirm = make_confirm_message_received_fn_protobuf(self.client.ConfirmMessageReceived, self.node, run)
        whole = pull_and_inflate_object_from_tree(tree, pull, confirm, return_type=Message)
        whole.metadata.__dict__["_message_id"] = tree.object_id
        return whole

    def announce(self, reply: Message, tree: ObjectTree) -> PushMessagesResponse:
        """Announce a reply's objects."""
        proto = message_to_proto(remove_content_from_message(reply) if reply.has_content() else reply)
        request = PushMessagesRequest(
            node=self.node, messages_list=[proto], message_object_trees=[tree], clientapp_runtime_list=[0.0]
        )
        return self.client.PushMessages(request)

    def push(self, run: int, session: str, identifier: str, content: bytes) -> bool:
        """Send an object; return whether it was stored."""
        request = PushObjectRequest(
            node=self.node, run_id=run, session_id=session, object_id=identifier, object_content=content
        )
        return bool(self.client.PushObject(request).stored)

    def half_sent(self, length: int, given: bytes) -> ssl.SSLSocket:
        """Return a connection on which a signed upload of `length` bytes has begun with `given`."""
        request = httpx.Request("POST", "https://x/v1/fleet/push-object")
        call: ProtobufCall = lambda context: httpx.Response(200)  # noqa: E731
        signs = NodeAuthHttpInterceptor(self.key, self.key.public_key())
        signs.intercept(ProtobufRequestContext("", PushObjectRequest(), request), call)
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items() if name != "content-length")
        context = ssl.create_default_context(cafile=str(self.study.ca))
        plain = socket.create_connection(("127.0.0.1", self.study.settings.port), 20)
        link = context.wrap_socket(plain, server_hostname="127.0.0.1")
        link.sendall(f"POST /v1/fleet/push-object HTTP/1.1\r\n{head}Content-Length: {length}\r\n\r\n".encode() + given)
        return link


class Working(threading.Thread):
    """A site that does what it is asked for, on a thread of its own, until it is told to stop.

    Args:
        site: its connection.
        site_file: its YAML.
        instead: does the work of a message in its place; returns whether it did.
    """

    def __init__(
        self, site: SuperNode, site_file: Path, instead: Callable[[SuperNode, Message], bool] = lambda *given: False
    ) -> None:
        super().__init__(name=site.name, daemon=True)
        self._site, self._file, self._instead = site, site_file, instead
        self.stop = threading.Event()
        self.failures: list[Exception] = []

    def run(self) -> None:
        """Work until told to stop; failures are kept, and the next message is waited for."""
        beats = time.monotonic()
        while not self.stop.wait(0.2):
            try:
                if time.monotonic() > beats:
                    self._site.beat()
                    beats = time.monotonic() + 5
                if (asked := self._site.asked()) is not None:
                    self._work(self._site.received(*asked))
            except Exception as error:  # noqa: BLE001 (shown by the test)
                self.failures.append(error)

    def _work(self, message: Message) -> None:
        if self._instead(self._site, message):
            return
        run, node = message.metadata.run_id, self._site.node.node_id
        context = Context(run, node, {"site-config": str(self._file)}, RecordDict(), {})
        reply = app(message, context)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = get_all_nested_objects(reply)
        answer = self._site.announce(reply, get_object_tree(reply))
        for identifier in answer.objects_to_push:
            content = objects[identifier].deflate()
            # An upload that breaks off, and is tried again.
            self._site.half_sent(len(content) + 200, content[: len(content) // 2]).close()
            assert self._site.push(message.metadata.run_id, answer.session_id, identifier, content)


class Flood:
    """What a hostile site sends instead of a reply, and how it was answered.

    Attributes:
        statuses: how many calls got each HTTP status; 0 where the connection was ended.
        stored: bytes that the server says it has stored.
        sent: bytes of all requests.
    """

    def __init__(self, size: Size, seconds: float) -> None:
        self._size, self._seconds = size, seconds
        self._huge = [_id(_huge(k)) for k in range(size.objects - AGREED - 1)]  # with the root, all that may be
        self.statuses: Counter[int] = Counter()
        self.stored = self.sent = 0
        self._lock = threading.Lock()

    def __call__(self, site: SuperNode, message: Message) -> bool:
        """Flood the server if it asks for training; answer honestly otherwise."""
        if message.metadata.message_type != "train":
            return False
        until = time.monotonic() + self._seconds
        slow = [site.half_sent(self._size.object_bytes, b"x") for _ in range(3)]
        works = [partial(self._flood, site, message, until, k) for k in range(5)]
        works.append(partial(self._trickle, slow, until))
        threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return True

    def _flood(self, site: SuperNode, message: Message, until: float, k: int) -> None:
        """Announce and send ever new objects: as large as agreed but too many bytes of them, too large, too many."""
        number = 0
        while time.monotonic() < until:
            number += 1
            root = _id(f"{k}-{number}".encode())
            agreed = [_object(f"{root}{j}".encode() + bytes(self._size.object_bytes - 1000)) for j in range(AGREED)]
            ids = [*(_id(each) for each in agreed), *self._huge]
            session = self._announce(site, message, root, ids)
            self._announce(site, message, root[::-1], [_id(f"{root}{j}".encode()) for j in range(20 * len(ids))])
            for identifier in ids[: len(agreed) + 1] if number > 1 else ids:
                content = agreed.pop(0) if agreed else _huge(self._huge.index(identifier))
                with self._noting(len(content)):
                    if site.push(message.metadata.run_id, session, identifier, content):
                        with self._lock:
                            self.stored += len(content)

    def _announce(self, site: SuperNode, message: Message, root: str, ids: list[str]) -> str:
        reply = Message(RecordDict(), reply_to=message)
        reply.metadata.__dict__["_message_id"] = root
        tree = ObjectTree(object_id=root, children=[ObjectTree(object_id=each) for each in ids])
        with self._noting(tree.ByteSize()):
            return str(site.announce(reply, tree).session_id)
        return ""

    def _trickle(self, slow: list[ssl.SSLSocket], until: float) -> None:
        while time.monotonic() < until:
            for link in slow:
                with contextlib.suppress(OSError):
                    link.sendall(b"x")
            time.sleep(0.2)
        for link in slow:
            link.close()

    @contextlib.contextmanager
    def _noting(self, size: int) -> Iterator[None]:
        status = 200
        try:
            yield
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
        except httpx.TransportError:
            status = 0
        with self._lock:
            self.statuses[status] += 1
            self.sent += size


def _huge(number: int) -> bytes:
    return _object(f"{number:04}".encode() * 5_000_000)


def _object(body: bytes) -> bytes:
    return f"ArrayChunk  {len(body)}".encode() + b"\x00" + body


def _id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
