"""Scripted sites that really mask: what the server gets from them is what it gets from hospitals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from client.restore import arriving_tensors
from client.secure import SecureAggregationError, SecureRound
from semisam_core.contract import (
    ACTIVE,
    ATTEMPT,
    DROPPED,
    MASKED_VECTOR,
    METRICS_RECORD,
    REFUSAL_RECORD,
    SEALED_BY,
    SECURE_RECORD,
    SITE_KEYS,
    SITE_RECORD,
    SPECIALIST_RECORD,
    STUDY_RECORD,
    RefusalRule,
    Stage,
    update_spec,
)
from semisam_core.plan import Plan
from semisam_core.secure_aggregation.weights import whole_weights
from tests.server.scripted import TRAIN, Script, ScriptedGrid, grid_of, study_plan

SECURE = "aggregation.secure={stage_deadline_s: 60}"


def secure_plan(*assignments: str, rounds: int = 2, minimum: int = 3) -> Plan:
    """Return the tiny plan with a secure sum."""
    fixed = ("aggregation.admission={norm_factor: null}", "aggregation.weights=equal")
    return study_plan(*fixed, *assignments, SECURE, rounds=rounds, minimum=minimum)


class SecureGrid:
    """A scripted grid whose sites keep an update each round and take part in its sum.

    Attributes:
        grid: the grid.
        seen: (site, round) -> the masked vectors that the server was sent.
        steps: site -> the steps that it reports.
    """

    def __init__(self, folder: Path, plan: Plan, *names: str) -> None:
        self.folder, self.plan, self.grid = folder, plan, grid_of(*names)
        self.seen: dict[tuple[str, int], list[NDArray[np.uint64]]] = {}
        self.steps: dict[str, int] = {}
        for name in names:
            for kind in (MessageType.TRAIN, *(stage.value for stage in Stage)):
                self.grid.always[name, kind] = functools.partial(self._answer, name)

    def update(self, name: str, weights: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """Return what a site makes of the global weights in a round."""
        generator = torch.Generator().manual_seed(1000 * number + ord(name[0]))
        changes = {key: 0.01 * torch.randn(weights[key].shape, generator=generator) for key in sorted(weights)}
        return {key: value + changes[key] for key, value in weights.items()}

    def altered(self, name: str, change: Callable[[Message], None]) -> Script:
        """Return a script that answers as a good site would, with something changed."""

        def script(grid: ScriptedGrid, sent: Message) -> Message:
            reply = self._answer(name, grid, sent)
            change(reply)
            return reply

        return script

    def _answer(self, name: str, grid: ScriptedGrid, sent: Message) -> Message:
        kind, study = sent.metadata.message_type, sent.content.config_records[STUDY_RECORD]
        number = int(str(study["round"]))
        about = {"site": name, "round": number, "plan-hash": str(study["plan-hash"])}
        records = RecordDict({SITE_RECORD: ConfigRecord({**about}), METRICS_RECORD: MetricRecord({})})
        secure = SecureRound(self.folder / name, name, self.plan, number)
        try:
            if kind == MessageType.TRAIN:
                weights = arriving_tensors(sent.content.array_records[SPECIALIST_RECORD], update_spec(self.plan))
                report = TRAIN | {"steps": self.steps.get(name, 2)}
                secure.keep(self.update(name, weights, number), weights, whole_weights(report, self.plan, number))
                records[METRICS_RECORD] = MetricRecord(report)
            else:
                self._stage(name, number, secure, Stage(kind), sent, records)
        except SecureAggregationError:
            records[REFUSAL_RECORD] = ConfigRecord({"rule": RefusalRule.SECURE.value})
        return Message(records, reply_to=sent)

    def _stage(
        self, name: str, number: int, secure: SecureRound, stage: Stage, sent: Message, records: RecordDict
    ) -> None:
        asked = dict(sent.content.config_records[SECURE_RECORD])
        attempt = asked[ATTEMPT]
        material: dict[str, bytes] = {}
        if stage is Stage.KEYS:
            material = secure.keys(attempt)
        elif stage is Stage.SHARES:
            material = secure.shares(attempt, _of(SITE_KEYS, asked))
        elif stage is Stage.UNMASK:
            material = secure.unmask(attempt, asked[ACTIVE], asked[DROPPED])
        else:
            vector = secure.masked(attempt, _of(SEALED_BY, asked))[MASKED_VECTOR].numpy()
            self.seen.setdefault((name, number), []).append(vector.view(np.uint64))
            records[SPECIALIST_RECORD] = ArrayRecord({MASKED_VECTOR: Array(vector)})
            return
        records[SECURE_RECORD] = ConfigRecord({**material})


def _of(prefix: str, asked: dict[str, object]) -> dict[str, object]:
    return {name.removeprefix(prefix): value for name, value in asked.items() if name.startswith(prefix)}
