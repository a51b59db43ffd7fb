"""A grid whose sites follow a script, with a clock that only sleeping advances: hours of a study in a second."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import NodeInfo

from engines.in_process_grid import InProcessGrid
from semisam_core.contract import METRICS_RECORD, REFUSAL_RECORD, SITE_RECORD, SPECIALIST_RECORD, STUDY_RECORD
from semisam_core.plan import Plan
from server.messages import Clock
from server.run_folder import RunFolder
from server.study import Study
from tests.conftest import tiny_plan

JOIN = {"labeled": 1, "unlabeled": 0, "validation": 1, "quarantined": 0, "generalists": 0}
HOUR = 3600.0
TRAIN = {"labeled": 1, "unlabeled": 0, "accepted": 0, "confidence": 0.0, "steps": 2}


class Time:
    """A clock that sleeping advances; events happen at their times."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []
        self._events: list[tuple[float, Callable[[], None]]] = []

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now_s, self._sleep)

    def at(self, seconds: float, what: Callable[[], None]) -> None:
        self._events.append((seconds, what))

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        assert len(self.slept) < 100_000, "the server waits forever"
        self.now_s += seconds
        for event in [each for each in self._events if each[0] <= self.now_s]:
            self._events.remove(event)
            event[1]()


Script = Callable[["ScriptedGrid", Message], Message | None]


class ScriptedGrid(InProcessGrid):
    """Nodes with one site name each that reply correctly and at once unless a script says otherwise.

    As in Flower, a message to a node that is gone gets an error whose source is Flower's own node; a message lives for
    its ttl; each reply is handed over once.
    """

    def __init__(self, time: Time, *sites: str) -> None:
        super().__init__(ClientApp(), [{} for _ in sites], {})
        self.time = time
        self.names = dict(enumerate(sites, start=1))
        self.online = set(self.names)
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)  # (site, kind): how long the work takes
        self.scripts: dict[tuple[str, str, int], list[Script]] = defaultdict(list)  # (site, kind, round): used in turn
        self.always: dict[tuple[str, str], Script] = {}
        self.asked: list[tuple[str, str, int]] = []
        self._sent_at: dict[str, float] = {}
        self._lost: set[str] = set()
        self._activations: dict[int, int] = defaultdict(int)
        self.registered: dict[int, str] = {}  # the name under which Flower knows a node's key

    def get_node_ids(self) -> list[int]:
        return sorted(self.online)

    def get_nodes(self) -> list[NodeInfo]:
        return [
            NodeInfo(node_id=node, last_activated_at=str(self._activations[node]), name=self.registered.get(node))
            for node in self.get_node_ids()
        ]

    def kill(self, node: int) -> None:
        """Let a SuperNode die: its current work is lost."""
        self.online.discard(node)
        self._lost |= {key for key, sent in self._pending.items() if sent.metadata.dst_node_id == node}

    def start(self, site: str, node: int) -> None:
        """Let a SuperNode start."""
        self.names[node] = site
        self._activations[node] += 1
        self.online.add(node)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identifiers = super().push_messages(messages)
        for each in identifiers:
            sent = self._pending[each]
            self._sent_at[each] = self.time.now_s
            number = int(str(sent.content.config_records[STUDY_RECORD]["round"]))
            self.asked.append((self.names[sent.metadata.dst_node_id], sent.metadata.message_type, number))
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [reply for each in message_ids if (reply := self._pull(each)) is not None]

    def _pull(self, identifier: str) -> Message | None:
        sent = self._pending.get(identifier)
        age = self.time.now_s - self._sent_at[identifier]
        if sent is None or age > sent.metadata.ttl:
            return self._system_error(identifier, ErrorCode.MESSAGE_UNAVAILABLE)
        node = sent.metadata.dst_node_id
        if node not in self.online:
            return self._system_error(identifier, ErrorCode.NODE_UNAVAILABLE)
        if identifier in self._lost or age < self.seconds[self.names[node], sent.metadata.message_type]:
            return None
        reply = self._answer(sent)
        if reply is not None:
            del self._pending[identifier]
        return reply

    def _answer(self, sent: Message) -> Message | None:
        name, kind = self.names[sent.metadata.dst_node_id], sent.metadata.message_type
        scripts = self.scripts[name, kind, int(str(sent.content.config_records[STUDY_RECORD]["round"]))]
        script = scripts.pop(0) if scripts else self.always.get((name, kind), answer_well)
        return script(self, sent)

    def _system_error(self, identifier: str, code: int) -> Message:
        self._pending.pop(identifier, None)
        sent = Message(RecordDict(), SUPERLINK_NODE_ID, "system", group_id="")
        sent.metadata.__dict__["_message_id"] = identifier
        error = Message(Error(code, "Error"), reply_to=sent)
        assert error.metadata.src_node_id == SUPERLINK_NODE_ID
        return error


def answer_well(grid: ScriptedGrid, sent: Message, **changes: Any) -> Message:
    """Reply as a good site does; `changes` replace records."""
    study = sent.content.config_records[STUDY_RECORD]
    name, kind = grid.names[sent.metadata.dst_node_id], sent.metadata.message_type
    about = {"site": name, "round": study["round"], "plan-hash": study["plan-hash"]}
    records: dict[str, Any] = {SITE_RECORD: ConfigRecord(about)}
    if kind == MessageType.QUERY:
        records[METRICS_RECORD] = MetricRecord(dict(JOIN))
    elif kind == MessageType.TRAIN:
        records[METRICS_RECORD] = MetricRecord(dict(TRAIN))
        shift = (ord(name[0]) - 96) / 100
        arrays = sent.content.array_records[SPECIALIST_RECORD]
        records[SPECIALIST_RECORD] = ArrayRecord(
            {key: Array(value.numpy() + value.numpy().dtype.type(shift)) for key, value in arrays.items()}
        )
    else:
        records[METRICS_RECORD] = MetricRecord({"validation": 1, "dice.blob": 0.5})
    return Message(RecordDict(records | changes), reply_to=sent)


def silent(grid: ScriptedGrid, sent: Message) -> None:
    """Never reply to this message."""
    grid._lost.add(sent.metadata.message_id)


def refuse(rule: str) -> Script:
    """Refuse by a rule."""

    def script(grid: ScriptedGrid, sent: Message) -> Message:
        return answer_well(grid, sent, **{REFUSAL_RECORD: ConfigRecord({"rule": rule})})

    return script


def fail(code: int) -> Script:
    """Reply with an error from Flower, as if the ClientApp had died."""

    def script(grid: ScriptedGrid, sent: Message) -> Message:
        return Message(Error(code, "secret text"), reply_to=sent)

    return script


def garbage(grid: ScriptedGrid, sent: Message) -> Message:
    """Reply with meaningless records."""
    return Message(RecordDict({SITE_RECORD: MetricRecord({"x": 1})}), reply_to=sent)


def run(grid: ScriptedGrid, plan: Plan, folder: Path, sites: int) -> RunFolder:
    """Execute a study over scripted sites."""
    record = RunFolder(folder)
    Study(plan, grid, record, "run", sites, grid.time.clock).execute()
    return record


def weights_of(record: RunFolder, number: int, plan: Plan) -> dict[str, torch.Tensor]:
    """Return the global weights after a round."""
    return record.load_round(number, plan)


def study_plan(*assignments: str, rounds: int = 3, minimum: int = 1) -> Plan:
    """Return the tiny plan with the deadlines that these tests use."""
    fixed = (
        f"training.rounds={rounds}",
        f"aggregation.minimum_sites={minimum}",
        "aggregation.join_deadline_s=60",
        f"aggregation.round_deadline_s={HOUR}",
        "aggregation.wait_for_quorum_s=600",
        "aggregation.rejoin_window_s=120",
        "evaluation.every_rounds=100",
    )
    return tiny_plan(*fixed, *assignments)


def grid_of(*sites: str, train_s: float = 0.0) -> ScriptedGrid:
    """Return a grid of these sites, each of which trains for `train_s` seconds."""
    grid = ScriptedGrid(Time(), *sites)
    for site in sites:
        grid.seconds[site, MessageType.TRAIN] = train_s
    return grid


def contributors(record: RunFolder) -> list[str]:
    """Return the names of the contributing sites, one string per round."""
    return [" ".join(sorted(line["weights"])) for line in record.records("aggregated")]


def events(record: RunFolder, kind: str, *keys: str) -> list[tuple[Any, ...]]:
    """Return these values of each line of an event."""
    return [tuple(line[key] for key in keys) for line in record.records(kind)]
