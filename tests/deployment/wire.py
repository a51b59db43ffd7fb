"""Reads what a site sent over a captured connection, and accounts for every byte of it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import verify_signature
from google.protobuf.message import Message as Protobuf
from numpy.typing import NDArray

from tests.deployment.capture import Exchange

CALLS: Mapping[str, type[Protobuf]] = {
    "activate-node": ActivateNodeRequest,
    "deactivate-node": DeactivateNodeRequest,
    "send-node-heartbeat": SendNodeHeartbeatRequest,
    "pull-messages": PullMessagesRequest,
    "push-messages": PushMessagesRequest,
    "get-run": GetRunRequest,
    "get-fab": GetFabRequest,
    "push-object": PushObjectRequest,
    "pull-object": PullObjectRequest,
    "confirm-message-received": ConfirmMessageReceivedRequest,
}
# All headers of a request, but for those that sign it: what httpx and Flower say of themselves.
FIXED = {
    "accept-encoding": "gzip, deflate",
    "connection": "keep-alive",
    "user-agent": f"python-httpx/{version('httpx')}",
    "content-type": "application/protobuf",
    "accept": "application/protobuf",
    "flwr-package-name": "flwr",
    "flwr-package-version": version("flwr"),
    "flwr-component-name": "SuperNode",
}
SIGNED = ("host", "content-length", "flwr-public-key", "flwr-timestamp", "flwr-signature")
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?\+00:00")
SIGNATURE_BYTES = 104  # of a P-384 key


@dataclass(frozen=True)
class Request:
    """One HTTP request of a site, and the body of its answer."""

    call: str
    head: bytes
    body: bytes
    answer: bytes

    @property
    def headers(self) -> dict[str, str]:
        """Names (lower case) and values."""
        lines = self.head.decode("ascii").split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}

    @property
    def message(self) -> Protobuf:
        """The body, read; an assertion fails if it holds anything that Flower does not know."""
        message = CALLS[self.call]()
        message.ParseFromString(self.body)
        known = CALLS[self.call]()
        known.CopyFrom(message)
        known.DiscardUnknownFields()
        assert known.SerializeToString(deterministic=True) == self.body, f"{self.call}: bytes that mean nothing"
        return message


@dataclass
class Reply:
    """A reply of a site, read from its objects.

    Attributes:
        kind: the message type.
        message: the reply.
        objects: its objects by identifier.
    """

    kind: str
    message: Message
    objects: dict[str, bytes]
    arrays: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    scalars: dict[str, float | int] = field(default_factory=dict)
    texts: dict[str, object] = field(default_factory=dict)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def framing(self) -> int:
        """Bytes of all objects beside tensors and scalars; equal arrays are sent once."""
        distinct = {
            hashlib.sha256(array.tobytes() + str(array.shape).encode()).digest(): array.nbytes
            for array in self.arrays.values()
        }
        return sum(map(len, self.objects.values())) - sum(distinct.values()) - 8 * len(self.scalars)


def requests_of(exchange: Exchange) -> list[Request]:
    """Return the complete requests of a connection; at most its last one may be incomplete."""
    answers = [body for _, body in _messages(bytes(exchange.received))]
    found = []
    for k, (head, body) in enumerate(_messages(bytes(exchange.sent))):
        path = head.split(b" ", 2)[1].decode("ascii")
        found.append(Request(path.rpartition("/")[2], head, body, answers[k] if k < len(answers) else b""))
    return found


def _messages(stream: bytes) -> list[tuple[bytes, bytes]]:
    """Return head and body of the HTTP messages in one direction of a connection."""
    found, at = [], 0
    while (end := stream.find(b"\r\n\r\n", at)) >= 0:
        head = stream[at:end]
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        begin = end + 4
        at = begin + (int(length[1]) if length else 0)
        if at > len(stream):
            break
        found.append((head, stream[begin:at]))
    return found


def replies_of(requests: Sequence[Request]) -> list[Reply]:
    """Return the replies that a site sent, each read from its objects and written again: to the same bytes.

    Whatever is in an object beside what its type means would be lost by reading it, and show.
    """
    pushed = [request.message for request in requests if request.call == "push-object"]
    contents = {each.object_id: each.object_content for each in pushed if isinstance(each, PushObjectRequest)}
    assert all(hashlib.sha256(content).hexdigest() == name for name, content in contents.items())
    found, claimed = [], set[str]()
    for request in requests:
        if request.call != "push-messages":
            continue
        announced = request.message
        assert isinstance(announced, PushMessagesRequest)
        assert len(announced.messages_list) == len(announced.message_object_trees) == 1
        tree: ObjectTree = announced.message_object_trees[0]
        ids = {each.object_id for each in iterate_object_tree(tree)}
        claimed |= ids
        found.append(_read(tree.object_id, {each: contents[each] for each in ids}))
    assert claimed == contents.keys(), "objects that belong to no reply"
    return found


def _read(root: str, objects: dict[str, bytes]) -> Reply:
    message = inflate_object_from_contents(root, dict(objects), keep_object_contents=True)
    assert isinstance(message, Message)
    reply = Reply(message.metadata.message_type, message, objects)
    assert message.deflate() == objects[root], "a message holds more than it means"
    if message.has_error():
        return reply
    again = RecordDict()
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord):
            reply.arrays |= {key: array.numpy() for key, array in record.items()}
            again[name] = ArrayRecord({key: Array(array.numpy()) for key, array in record.items()})
        elif isinstance(record, MetricRecord):
            reply.scalars |= dict(record)  # type: ignore[arg-type]
            again[name] = MetricRecord(dict(record))
        else:
            assert isinstance(record, ConfigRecord)
            reply.texts |= dict(record)
            again[name] = ConfigRecord(dict(record))
    written = {each: item.deflate() for each, item in get_all_nested_objects(again).items()}
    assert {**written, root: objects[root]} == objects, "objects hold more than they mean"
    return reply


def check_heads(requests: Sequence[Request], address: str, public_key: bytes) -> int:
    """Check that heads hold nothing that a site could choose but a time and its signature.

    Args:
        requests: what a site sent.
        address: the server's, as the site knows it.
        public_key: the site's, PEM.

    Returns:
        The bytes of the longest head.
    """
    key = load_pem_public_key(public_key)
    for request in requests:
        given = request.headers
        assert request.head.count(b"\r\n") == len(given) == len(FIXED) + len(SIGNED)
        assert {name: given.get(name) for name in FIXED} == FIXED
        assert (given["host"], given["content-length"]) == (address, str(len(request.body)))
        assert base64.b64decode(given["flwr-public-key"]) == public_key
        signature = base64.b64decode(given["flwr-signature"], validate=True)
        assert TIMESTAMP.fullmatch(given["flwr-timestamp"]), given["flwr-timestamp"]
        assert len(signature) <= SIGNATURE_BYTES
        assert verify_signature(key, given["flwr-timestamp"].encode(), signature)  # type: ignore[arg-type]
        assert request.head.startswith(f"POST /v1/fleet/{request.call} HTTP/1.1\r\n".encode())
    return max(len(request.head) for request in requests)


def sessions_of(requests: Sequence[Request]) -> set[str]:
    """Return the identifiers that the server gave to announcements."""
    found = set()
    for request in requests:
        if request.call == "push-messages":
            answer = PushMessagesResponse()
            answer.ParseFromString(request.answer)
            found.add(answer.session_id)
    return found
