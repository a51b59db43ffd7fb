"""What a site may upload, without a network: replies it was asked for, within the size of an update."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata as MetadataProto
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from hypothesis import given
from hypothesis import strategies as st

from deployment.lead.update_size import update_size, write_update_size
from deployment.lead.upload_gate import (
    ANNOUNCEMENT_FRAME,
    AT_ONCE,
    ID_BYTES,
    OTHER_BODY,
    Caller,
    UploadGate,
)
from deployment.lead.uploads import (
    ASKED,
    CONFLICT,
    HELD,
    LATER,
    MALFORMED,
    NO_SPACE,
    SMALL,
    TOO_LARGE,
    UNKNOWN,
    Ledger,
    Pace,
    RefusedError,
    Size,
    SizeFile,
)
from semisam_core.codecs import leaving_spec
from semisam_core.contract import METRICS_RECORD, SITE_RECORD, SPECIALIST_RECORD, TRAIN_SCALARS, TensorSpec
from semisam_core.packing import packed_spec
from semisam_core.plan import Plan, load_plan
from tests.conftest import tiny_plan

SIZE = Size(objects=6, total_bytes=100, object_bytes=60)
PLANS = sorted((Path(__file__).parents[3] / "site_configs").glob("*/plan.yaml"))
SECURE = ("aggregation.minimum_sites=3", "aggregation.admission={norm_factor: null}", "aggregation.secure={}")


@contextlib.contextmanager
def _refused(status: int) -> Any:
    with pytest.raises(RefusedError) as refused:
        yield
    assert refused.value.status == status


def _asked(*messages: str, size: Size = SIZE) -> Ledger:
    ledger = Ledger()
    for message in messages:
        ledger.ask(1, message, size)
    return ledger


def test_a_reply_that_was_not_asked_for_is_refused() -> None:
    with _refused(CONFLICT):
        _asked("other").announce("m", "r", ["r"])
    with _refused(CONFLICT):
        Ledger().book("r", 1)


def test_a_reply_may_have_as_many_objects_as_agreed_and_no_more_by_a_second_announcement() -> None:
    ledger = _asked("m")
    ledger.announce("m", "r", [str(k) for k in range(6)])
    ledger.announce("m", "r", [str(k) for k in range(6)])  # the answer was lost
    with _refused(TOO_LARGE):
        ledger.announce("m", "r", ["another"])
    with _refused(TOO_LARGE):
        _asked("m").announce("m", "r", ["same"] * 7)


def test_an_object_may_be_as_large_as_agreed() -> None:
    ledger = _asked("m")
    ledger.announce("m", "a", ["a"])
    with _refused(TOO_LARGE):
        ledger.book("a", 61)
    ledger.book("a", 60)
    with _refused(CONFLICT):
        ledger.book("b", 1)


def test_a_reply_may_be_as_large_as_agreed_however_it_is_sent() -> None:
    ledger = _asked("m")
    ledger.announce("m", "a", ["a", "b"])
    ledger.book("a", 1)
    ledger.book("a", 60)
    ledger.book("a", 60)  # a retry costs nothing
    with _refused(TOO_LARGE):
        ledger.book("b", 41)
    ledger.book("b", 40)


def test_replies_that_are_not_collected_use_up_a_sites_share_until_they_are() -> None:
    ledger = _asked(*"abcde")
    for message in "abcd":
        ledger.announce(message, message, [message, message + "'"])
        ledger.book(message, 60)
        ledger.book(message + "'", 40)
    with _refused(NO_SPACE):
        ledger.announce("e", "e", ["e"])
    ledger.announce("d", "d", ["d", "d'"])  # one in its place may be announced again
    ledger.release({"a"})
    ledger.announce("e", "e", ["e"])
    assert ledger.roots == set("bcde")


def test_what_was_asked_in_an_earlier_run_is_void() -> None:
    ledger = _asked("m")
    ledger.ask(2, "n", SIZE)
    with _refused(CONFLICT):
        ledger.announce("m", "r", ["r"])
    ledger.announce("n", "r", ["r"])


def test_only_so_many_unanswered_messages_are_remembered_and_none_that_was_answered_is_forgotten() -> None:
    ledger = _asked("first")
    ledger.announce("first", "r", ["r"])
    for k in range(2 * ASKED):
        ledger.ask(1, str(k), SIZE)
    ledger.book("r", 1)
    ledger.announce(str(2 * ASKED - 1), "s", ["s"])
    with _refused(CONFLICT):
        ledger.announce("0", "t", ["t"])


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("uvwxyz"), st.integers(0, 80), st.booleans()), max_size=60
    )
)
def test_no_order_of_calls_brings_a_site_over_its_share(calls: list[tuple[str, str, int, bool]]) -> None:
    ledger, stored = _asked("a", "b", "c"), dict[tuple[str, str], int]()
    for message, name, size, announces in calls:
        identifier = f"{message}{name}"
        with contextlib.suppress(RefusedError):
            if announces:
                ledger.announce(message, f"{message}u", [identifier])
            else:
                ledger.book(identifier, size)
                stored[message, name] = max(size, stored.get((message, name), 0))
    for message in "abc":
        mine = [size for (of, _), size in stored.items() if of == message]
        assert sum(mine) <= SIZE.total_bytes
        assert len(mine) <= SIZE.objects
        assert max(mine, default=0) <= SIZE.object_bytes


def test_who_asks_faster_than_allowed_waits_and_a_pause_makes_up_for_it() -> None:
    time = [0.0]
    pace = Pace(10.0, lambda: time[0])
    assert [pace.wait_s(1, 3) for _ in range(5)] == pytest.approx([0, 0, 0, 0.1, 0.2])
    time[0] = 0.2
    assert pace.wait_s(1, 3) == pytest.approx(0.1)
    time[0] = 100.0
    assert pace.wait_s(3, 3) == 0
    assert pace.wait_s(1, 3) == pytest.approx(0.1)


def _reply(plan: Plan, spec: Mapping[str, TensorSpec]) -> Message:
    """Return the reply of a site that sends these tensors."""
    values = {name: (2**30 * torch.rand(each.shape)).to(each.dtype) for name, each in packed_spec(spec).items()}
    arrays = {name: Array(value.numpy()) for name, value in values.items()}
    texts = {"site": "north", "round": 1, "plan-hash": plan.hash, "split-hash": "0" * 64}
    metrics, about = MetricRecord(dict.fromkeys(TRAIN_SCALARS, 1.5)), ConfigRecord(texts)  # type: ignore[arg-type]
    records = RecordDict({METRICS_RECORD: metrics, SITE_RECORD: about, SPECIALIST_RECORD: ArrayRecord(arrays)})
    return make_message(Metadata(1, "", 2, 1, "0" * 64, "1", 1.8e9, 100.0, "train"), content=records)


def _fits(reply: Message, size: Size) -> dict[str, int]:
    objects = {name: len(each.deflate()) for name, each in get_all_nested_objects(reply).items()}
    assert len(objects) <= size.objects
    assert sum(objects.values()) <= size.total_bytes
    assert max(objects.values()) <= size.object_bytes
    assert get_object_tree(reply).ByteSize() <= size.objects * ID_BYTES
    return objects


@pytest.mark.parametrize("path", [None, *PLANS], ids=lambda path: path.parent.name if path else "tiny")
def test_an_honest_update_fits_its_bounds_and_they_are_not_much_larger(path: Path | None) -> None:
    plan = tiny_plan("pseudo_labels=null") if path is None else load_plan(path)
    objects = _fits(_reply(plan, leaving_spec(plan)), update_size(plan, 1.0))
    usual = update_size(plan, 2.0)
    assert usual.objects <= 2.5 * len(objects)
    assert usual.total_bytes <= 2.2 * sum(objects.values()) + SMALL.total_bytes + 2**14


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.parent.name)
def test_a_masked_vector_fits_the_bounds_of_its_plan(path: Path) -> None:
    plan = load_plan(path, list(SECURE))
    tightest = update_size(plan, 1.0)
    objects = _fits(_reply(plan, leaving_spec(plan)), tightest)
    assert tightest.total_bytes <= sum(objects.values()) + 2 * SMALL.total_bytes


def test_the_size_of_an_update_follows_the_plan_of_the_present_run(tmp_path: Path) -> None:
    path = tmp_path / "update-size.json"
    sizes = SizeFile(path)
    assert sizes.of("train") == SMALL
    for channels in ("[8, 16]", "[16, 32]"):
        plan = tiny_plan("pseudo_labels=null", f"specialist.arguments.channels={channels}")
        write_update_size(path, plan, 2.0)
        assert sizes.of("train") == sizes.of("train.again") == update_size(plan, 2.0)
        assert sizes.of("evaluate") == sizes.of("query.join") == SMALL
    path.write_text("{}")
    assert sizes.of("train") == SMALL


class Store:
    """Stands in for the SuperLink's database: knows two sites by a header, and holds everything."""

    def __init__(self) -> None:
        self.free, self.gone, self.broken = 10**12, set[str](), False

    def identify(self, headers: Mapping[bytes, bytes]) -> Caller | None:
        if self.broken:
            raise OSError("database is locked")
        name = headers.get(b"site", b"").decode()
        return {"north": Caller(1, "north"), "south": Caller(2, "south")}.get(name)

    def missing(self, roots: set[str]) -> set[str]:
        return roots & self.gone

    def free_bytes(self) -> int:
        return self.free


class Flower:
    """Stands in for Flower's app: keeps the calls that reach it, answers pulls with one message, waits when told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bytes]] = []
        self.hands_over = PullMessagesResponse()
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        self.calls.append((scope["path"].rpartition("/")[2], body))
        await self.open.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        answer = self.hands_over.SerializeToString() if scope["path"].endswith("pull-messages") else b""
        half = len(answer) // 2
        await send({"type": "http.response.body", "body": answer[:half], "more_body": True})
        await send({"type": "http.response.body", "body": answer[half:]})


class Gate:
    """An upload gate before a Flower, with one message waiting for whoever asks.

    Attributes:
        read: how many bytes of a body were read in the last call.
    """

    def __init__(self, kind: str = "train", message: str = "m") -> None:
        self.store, self.flower, self.read = Store(), Flower(), 0
        self.gate = UploadGate(self.flower, self.store, lambda kind: SIZE if kind == "train" else SMALL, 1000)
        self.waiting(message, kind)

    def waiting(self, message: str, kind: str = "train") -> None:
        """Have Flower hand over another message from now on."""
        about = MetadataProto(run_id=7, message_id=message, message_type=kind)
        self.flower.hands_over = PullMessagesResponse(messages_list=[MessageProto(metadata=about)])

    async def ask(self, call: str, body: bytes = b"", site: str = "north", **headers: str) -> int:
        """Make a call as a site; return the HTTP status."""
        pieces = [body[at : at + 50] for at in range(0, len(body), 50)] or [b""]
        sent: list[Any] = []
        self.read = 0

        async def receive() -> dict[str, Any]:
            piece = pieces.pop(0)
            self.read += len(piece)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

        async def send(message: Any) -> None:
            sent.append(message)

        given = {"site": site} | headers
        listed = [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()]
        await self.gate({"type": "http", "path": f"/v1/fleet/{call}", "headers": listed}, receive, send)
        return int(sent[0]["status"])


def _announcement(objects: list[str], message: str = "m") -> bytes:
    tree = ObjectTree(object_id=objects[0], children=[ObjectTree(object_id=each) for each in objects[1:]])
    about = MetadataProto(message_id=objects[0], reply_to_message_id=message)
    request = PushMessagesRequest(messages_list=[MessageProto(metadata=about)], message_object_trees=[tree])
    return bytes(request.SerializeToString())


def _pushed(identifier: str, size: int) -> bytes:
    return bytes(PushObjectRequest(object_id=identifier, object_content=bytes(size)).SerializeToString())


def _played(play: Callable[[Gate], Awaitable[None]], kind: str = "train") -> Gate:
    async def playing() -> Gate:
        gate = Gate(kind)
        await play(gate)
        return gate

    return asyncio.run(playing())


def test_a_reply_that_was_asked_for_passes_whole() -> None:
    async def play(gate: Gate) -> None:
        assert await gate.ask("pull-messages") == 200
        assert await gate.ask("push-messages", _announcement(["r", "s"])) == 200
        assert await gate.ask("push-object", _pushed("s", 60)) == 200

    gate = _played(play)
    assert [call for call, _ in gate.flower.calls] == ["pull-messages", "push-messages", "push-object"]
    assert gate.flower.calls[2][1] == _pushed("s", 60)


def test_nothing_of_a_strangers_body_is_read() -> None:
    async def play(gate: Gate) -> None:
        for call in ("push-object", "activate-node"):
            assert await gate.ask(call, bytes(1000), site="stranger") == UNKNOWN
            assert gate.read == 0

    assert _played(play).flower.calls == []


def test_a_site_is_not_sent_away_as_a_stranger_while_the_database_is_busy() -> None:
    async def play(gate: Gate) -> None:
        gate.store.broken = True
        assert await gate.ask("send-node-heartbeat") == LATER

    _played(play)


def test_nothing_is_read_of_what_was_not_asked_for() -> None:
    async def play(gate: Gate) -> None:
        for call in ("push-messages", "push-object"):
            assert await gate.ask(call, _pushed("r", 10)) == CONFLICT
            assert gate.read == 0
        await gate.ask("pull-messages", site="south")
        assert await gate.ask("push-messages", _announcement(["r"])) == CONFLICT  # south was asked, not north
        assert await gate.ask("push-messages", _announcement(["r"]), site="south") == 200

    assert [call for call, _ in _played(play).flower.calls] == ["pull-messages", "push-messages"]


@pytest.mark.parametrize("call", ["push-messages", "push-object", "get-run"])
def test_no_more_than_a_calls_largest_body_is_read(call: str) -> None:
    most = {"push-messages": 6 * ID_BYTES + ANNOUNCEMENT_FRAME, "push-object": 60 + 4096, "get-run": OTHER_BODY}[call]

    async def play(gate: Gate) -> None:
        await gate.ask("pull-messages")
        assert await gate.ask(call, bytes(10 * most)) == TOO_LARGE
        assert most < gate.read <= most + 50
        for declared in (str(most + 1), "-1", "many"):
            assert await gate.ask(call, bytes(10), content_length=declared) == TOO_LARGE
            assert gate.read == 0

    assert len(_played(play).flower.calls) == 1


def test_a_reply_without_tensors_may_be_small_only() -> None:
    async def play(gate: Gate) -> None:
        await gate.ask("pull-messages")
        assert await gate.ask("push-messages", _announcement(["r"])) == 200
        assert await gate.ask("push-object", _pushed("r", SMALL.object_bytes + 1)) == TOO_LARGE

    _played(play, kind="evaluate")


def test_an_announcement_must_be_of_one_reply_and_its_own_objects() -> None:
    foreign = PushMessagesRequest.FromString(_announcement(["r", "s"]))
    foreign.messages_list[0].metadata.message_id = "another"
    double = PushMessagesRequest.FromString(_announcement(["r"]) + _announcement(["s"]))

    async def play(gate: Gate) -> None:
        await gate.ask("pull-messages")
        for body in (foreign.SerializeToString(), double.SerializeToString(), b"", b"\xff\xff"):
            assert await gate.ask("push-messages", body) == MALFORMED
        assert await gate.ask("push-messages", _announcement([str(k) for k in range(7)])) == TOO_LARGE

    assert len(_played(play).flower.calls) == 1


def test_a_site_has_few_requests_at_once_and_others_none_the_fewer() -> None:
    async def play(gate: Gate) -> None:
        await gate.ask("pull-messages", site="south")
        await gate.ask("pull-messages")
        gate.flower.open.clear()
        busy = [asyncio.create_task(gate.ask("get-run")) for _ in range(AT_ONCE)]
        while len(gate.flower.calls) < 2 + AT_ONCE:
            await asyncio.sleep(0.01)
        assert await gate.ask("get-run") == LATER
        other = asyncio.create_task(gate.ask("push-messages", _announcement(["r"]), site="south"))
        while len(gate.flower.calls) < 3 + AT_ONCE:
            await asyncio.sleep(0.01)
        assert await gate.ask("push-messages", _announcement(["r"]), site="south") == LATER  # one at a time
        gate.flower.open.set()
        assert [await each for each in (*busy, other)] == [200] * (AT_ONCE + 1)
        assert await gate.ask("get-run") == 200
        assert await gate.ask("push-messages", _announcement(["r"]), site="south") == 200

    asyncio.run(asyncio.wait_for(_playing(play), 30))


async def _playing(play: Callable[[Gate], Awaitable[None]]) -> None:
    await play(Gate())


def test_an_announcement_counts_as_many_requests_as_it_has_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    costs: list[float] = []

    def noted(pace: Pace, cost: float, burst: float) -> float:
        costs.append(cost)
        return 0.0

    monkeypatch.setattr(Pace, "wait_s", noted)

    async def play(gate: Gate) -> None:
        await gate.ask("pull-messages")
        await gate.ask("push-messages", _announcement(["r", "s", "t"]))
        await gate.ask("push-object", _pushed("s", 60))

    _played(play)
    assert costs == [1, 3, 1]


def test_no_reply_is_accepted_while_the_disk_is_nearly_full() -> None:
    async def play(gate: Gate) -> None:
        await gate.ask("pull-messages")
        gate.store.free = 999
        assert await gate.ask("push-messages", _announcement(["r"])) == NO_SPACE
        gate.store.free = 1000
        assert await gate.ask("push-messages", _announcement(["r"])) == 200

    _played(play)


def test_replies_count_against_a_site_until_they_are_collected() -> None:
    async def play(gate: Gate) -> None:
        for k in range(HELD + 1):
            gate.waiting(f"m{k}")
            await gate.ask("pull-messages")
        for k in range(HELD):
            assert await gate.ask("push-messages", _announcement([f"r{k}", f"s{k}"], f"m{k}")) == 200
            assert await gate.ask("push-object", _pushed(f"r{k}", 50)) == 200
            assert await gate.ask("push-object", _pushed(f"s{k}", 50)) == 200
        assert await gate.ask("push-messages", _announcement(["r"], f"m{HELD}")) == NO_SPACE
        gate.store.gone = {"r2"}
        assert await gate.ask("push-messages", _announcement(["r"], f"m{HELD}")) == 200

    _played(play)


def test_what_is_refused_is_logged_once_by_the_sites_name(caplog: pytest.LogCaptureFixture) -> None:
    async def play(gate: Gate) -> None:
        for _ in range(3):
            await gate.ask("push-object", b"secret")
            await gate.ask("push-object", b"secret", site="south")
        await gate.ask("push-object", b"secret", site="stranger")

    with caplog.at_level("WARNING", "flwr"):
        _played(play)
    assert [line.partition(":")[0] for line in caplog.messages] == ["north", "south"]
    assert "secret" not in caplog.text
