"""The accounting that the wire test relies on notices bytes that mean nothing, wherever they are hidden."""

from __future__ import annotations

import base64
import hashlib

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from google.protobuf.message import Message as Protobuf

from semisam_core.contract import TRAIN_SCALARS
from tests.deployment.wire import FIXED, Request, check_heads, replies_of

HIDDEN = b"\x7a\x06hidden"  # field 15 of any message, which Flower does not know
ADDRESS = "127.0.0.1:8443"
KEY = ec.generate_private_key(ec.SECP384R1())


def _upload(hidden_in: str = "", also: bytes = b"") -> list[Request]:
    """Return the requests of one reply to `train`; bytes may be hidden in its objects of one type."""
    tensors = {"a": torch.rand(3, 4), "b": torch.zeros(5), "c": torch.zeros(5)}
    metrics, about = MetricRecord(dict.fromkeys(TRAIN_SCALARS, 0.5)), ConfigRecord({"site": "north", "round": 1})
    arrays = ArrayRecord({name: Array(value.numpy()) for name, value in tensors.items()})
    records = RecordDict({"metrics": metrics, "site": about, "specialist": arrays})
    reply = make_message(Metadata(1, "", 2, 1, "2" * 64, "1", 1.8e9, 100.0, "train"), content=records)
    tree = get_object_tree(reply)
    objects = {name: each.deflate() for name, each in get_all_nested_objects(reply).items()}
    for name in [each for each, content in objects.items() if hidden_in and content.startswith(hidden_in.encode())]:
        first, _, body = objects[name].partition(b"\0")
        kind, children, length = first.decode().split(" ")
        longer = f"{kind} {children} {int(length) + len(HIDDEN)}".encode() + b"\0" + body + HIDDEN
        objects, tree = _replaced(objects, tree, name, longer)
    head = message_to_proto(remove_content_from_message(reply))
    head.metadata.message_id = tree.object_id
    announced = PushMessagesRequest(messages_list=[head], message_object_trees=[tree])
    pushed = [PushObjectRequest(object_id=name, object_content=each) for name, each in objects.items()]
    pushed += [PushObjectRequest(object_id=hashlib.sha256(also).hexdigest(), object_content=also)] * bool(also)
    bodies: list[tuple[str, Protobuf]] = [("push-messages", announced), *(("push-object", each) for each in pushed)]
    return [Request(call, b"", bytes(each.SerializeToString(deterministic=True)), b"") for call, each in bodies]


def _replaced(
    objects: dict[str, bytes], tree: ObjectTree, name: str, content: bytes
) -> tuple[dict[str, bytes], ObjectTree]:
    """Put other content in place of an object, and its new identifier into all that refer to it."""
    new = hashlib.sha256(content).hexdigest()
    objects = {new if each == name else each: content if each == name else was for each, was in objects.items()}
    tree = ObjectTree.FromString(tree.SerializeToString().replace(name.encode(), new.encode()))
    while parent := next((each for each, was in objects.items() if name.encode() in was), None):
        objects, tree = _replaced(objects, tree, parent, objects[parent].replace(name.encode(), new.encode()))
    return objects, tree


def test_an_honest_reply_is_accounted_for() -> None:
    (reply,) = replies_of(_upload())
    assert set(reply.arrays) == {"a", "b", "c"}
    assert reply.tensor_bytes == 4 * (12 + 5 + 5)
    assert len(reply.scalars) == len(TRAIN_SCALARS)
    assert reply.framing == sum(map(len, reply.objects.values())) - 4 * (12 + 5) - 8 * len(TRAIN_SCALARS)


@pytest.mark.parametrize("kind", ["Message", "RecordDict", "ArrayRecord", "MetricRecord", "ConfigRecord", "ArrayChunk"])
def test_bytes_hidden_in_an_object_show(kind: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        replies_of(_upload(hidden_in=f"{kind} "))


def test_an_object_that_belongs_to_no_reply_shows() -> None:
    with pytest.raises(AssertionError, match="belong to no reply"):
        replies_of(_upload(also=b"ArrayChunk  6\0hidden"))


@pytest.mark.parametrize("which", [0, -1])
def test_bytes_hidden_in_a_request_show(which: int) -> None:
    requests = _upload()
    changed = requests[which]
    requests[which] = Request(changed.call, changed.head, changed.body + HIDDEN, b"")
    with pytest.raises(AssertionError, match="bytes that mean nothing"):
        replies_of(requests)


def _headed(**changes: str) -> Request:
    time = "2026-01-02T03:04:05.678901+00:00"
    given = (
        FIXED
        | {
            "host": ADDRESS,
            "content-length": "4",
            "flwr-public-key": base64.b64encode(public_key_to_bytes(KEY.public_key())).decode(),
            "flwr-timestamp": time,
            "flwr-signature": base64.b64encode(sign_message(KEY, time.encode())).decode(),
        }
        | changes
    )
    lines = "\r\n".join(f"{name}: {value}" for name, value in given.items())
    return Request("get-run", f"POST /v1/fleet/get-run HTTP/1.1\r\n{lines}".encode(), b"body", b"")


def test_heads_that_are_all_alike_pass() -> None:
    public = public_key_to_bytes(KEY.public_key())
    assert check_heads([_headed(), _headed()], ADDRESS, public) > 500


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "y"},
        {"x-note": "hidden"},
        {"accept": "application/protobuf, hidden"},
        {"content-length": "5"},
        {"flwr-timestamp": "2026-01-02T03:04:05.678902+00:00"},
        {"flwr-timestamp": "hidden"},
        {"flwr-signature": base64.b64encode(bytes(100)).decode()},
        {"flwr-public-key": base64.b64encode(b"another").decode()},
    ],
    ids=str,
)
def test_a_head_that_differs_shows(changes: dict[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_heads([_headed(), _headed(**changes)], ADDRESS, public_key_to_bytes(KEY.public_key()))
