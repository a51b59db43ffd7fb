"""Replies to a training message, as Flower hands them to the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from semisam_core.contract import specialist_spec, tensor_specs
from semisam_core.inference import new_specialist
from semisam_core.packing import pack
from semisam_core.plan import Plan
from server.admission import Admitted, NotAdmitted, admit
from server.arrays import vector_reader

SCALARS = {"labeled": 1, "unlabeled": 2, "accepted": 1, "gated": 1, "confidence": 0.5, "steps": 2}
DECLARED = {"labeled": 1.0, "unlabeled": 2.0, "validation": 1.0, "quarantined": 0.0}
NODE = 7


def initial(plan: Plan) -> dict[str, Tensor]:
    """Return the study's initial specialist."""
    return dict(new_specialist(plan).state_dict())


def trained(plan: Plan, seed: int = 0, size: float = 0.01) -> dict[str, Tensor]:
    """Return a specialist some way from the initial one."""
    generator = torch.Generator().manual_seed(seed)
    return {name: value + size * torch.randn(value.shape, generator=generator) for name, value in initial(plan).items()}


def arrays(weights: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors in the form in which a site sends them."""
    vectors = pack(weights, tensor_specs(weights))
    return ArrayRecord({name: Array(each.numpy()) for name, each in vectors.items()})


def train_records(plan: Plan) -> dict[str, Any]:
    """Return the records of an honest reply to round 1."""
    return {
        "metrics": MetricRecord(dict(SCALARS)),
        "site": ConfigRecord({"site": "alpha", "round": 1, "plan-hash": plan.hash}),
        "specialist": arrays(trained(plan)),
    }


def answer(
    plan: Plan,
    records: Mapping[str, Any],
    declared: Mapping[str, float] | None = None,
    split: str | None = None,
    bucketed: bool = False,
) -> Admitted | NotAdmitted:
    """Return what admission makes of these records from site alpha's node."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, NODE
    reply = Message(RecordDict(dict(records)), reply_to=Message(RecordDict(), NODE, MessageType.TRAIN))
    joined = {NODE: Admitted("alpha", dict(declared or DECLARED), None, split, bucketed=bucketed)}
    return admit(reply, MessageType.TRAIN, 1, plan, vector_reader(specialist_spec(plan)), joined)
