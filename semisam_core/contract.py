"""What server and sites agree may travel: names of records, scalars and refusals, and the specialist's tensors.

Both sides check against these lists; whatever is not in them does not leave a site.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from semisam_core.plan import Plan
from semisam_core.prompting import Refusal
from semisam_core.specialists import batch_norm_tensors, outline_specialist

SPECIALIST_RECORD = "specialist"
STUDY_RECORD = "study"
SITE_RECORD = "site"
METRICS_RECORD = "metrics"
REFUSAL_RECORD = "refusal"
# In the study record, where the server left this site's last answer out: the word of a RejectionRule, and the round.
REJECTED, REJECTED_ROUND = "rejected", "rejected-round"

JOIN_SCALARS = ("labeled", "unlabeled", "validation", "quarantined", "generalists")
TRAIN_SCALARS = (
    "labeled",
    "unlabeled",
    "accepted",
    "gated",
    *(f"gated.{refusal.value}" for refusal in Refusal),
    "confidence",
    "steps",
    "loss.supervised",
    "loss.consistency",
    "loss.generalist",
    "seconds",
)
CLASS_SCORES = ("dice", "jaccard", "hd95_mm", "asd_mm", "surface_dice", "cases", "missing_distances")
# What values a scalar may have, by its name up to the first dot. Others are any number that is not negative.
COUNTS = frozenset({*JOIN_SCALARS, "accepted", "gated", "steps", "cases", "missing_distances"})
SHARES = frozenset({"confidence", "dice", "jaccard", "surface_dice"})
ANY_SIGN = frozenset({"loss"})


class RefusalRule(StrEnum):
    """The rules by which a site refuses. The word of the rule is all that leaves; the rest is in the site's log."""

    PLAN_INVALID = "plan-invalid"
    PLAN_HASH = "plan-hash"
    VERSION = "version"
    RUN_NAME = "run-name"
    NOTHING_TO_LEARN = "nothing-to-learn-from"
    NO_USABLE_CASE = "no-usable-case"
    WEIGHTS = "weights-not-as-agreed"
    GENERALIST = "generalist-not-usable"
    EGRESS = "egress"
    DIVERGED = "training-diverged"
    STORAGE = "storage"
    INTERNAL = "internal-error"
    SITE_CONFIG = "site-config"
    AUDIT_LOG = "audit-log"
    CODE_NOT_APPROVED = "code-not-approved"
    CODE_ALTERED = "code-altered"
    PROCESS_ENDED = "process-ended"
    OUT_OF_TIME = "out-of-time"


class RejectionRule(StrEnum):
    """The rules by which the server leaves a site's answer out. The site is told the word with the next message."""

    ANOTHER_ROUND = "another-round-or-plan"
    ANOTHER_SITE = "not-the-site-that-joined"
    RECORDS = "records-not-as-agreed"
    SCALARS = "scalars-not-as-agreed"
    COUNTS = "counts-not-as-declared"
    TENSORS = "tensors-not-as-agreed"
    TOO_LARGE = "too-large"
    UNREADABLE = "unreadable"
    NOT_FINITE = "not-finite"
    CHANGE_TOO_LARGE = "change-too-large"
    STEPS = "steps-and-change-disagree"


def same_version(theirs: object, ours: str) -> bool:
    """Return whether two versions of this project may work together: the first two numbers are the same."""
    return isinstance(theirs, str) and theirs.split(".")[:2] == ours.split(".")[:2]


def evaluation_scalars(plan: Plan) -> tuple[str, ...]:
    """Return the names of the scalars of an evaluation: ``dice.<class>`` and so on, and ``validation``."""
    return ("validation", *(f"{score}.{name}" for name in plan.class_names for score in CLASS_SCORES))


def scalar_mistake(name: str, value: object) -> str | None:
    """Return a sentence on a scalar whose value is none that its name allows, or None."""
    kind = name.partition(".")[0]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return f"the scalar {name} is not a finite number"
    if value < 0 and kind not in ANY_SIGN:
        return f"the scalar {name} is negative"
    if kind in COUNTS and not isinstance(value, int):
        return f"the scalar {name} is a count and not a whole number"
    if kind in SHARES and value > 1:
        return f"the scalar {name} is a share and above 1"
    return None


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor that travels."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def specialist_spec(plan: Plan) -> dict[str, TensorSpec]:
    """Return name -> shape and dtype of every tensor of the plan's specialist that travels."""
    chosen, task = plan.specialist, plan.task
    outline = outline_specialist(chosen.name, chosen.arguments, len(task.channels), len(task.classes))
    return tensor_specs(travelling(plan, outline))


def travelling(plan: Plan, specialist: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a specialist that travel; the others stay at the site.

    With `specialist.statistics: local`, batch-norm layers stay, running statistics, scales and shifts alike (FedBN, Li
    et al., ICLR 2021). Their counters of batches never travel: they are whole numbers, and nothing depends on them.

    Args:
        plan: the study plan.
        specialist: the plan's specialist; the tensors that are returned are its own, not copies.
    """
    normalising = batch_norm_tensors(specialist)
    local = plan.specialist.statistics == "local"
    staying = {name for name in normalising if local or name.endswith("num_batches_tracked")}
    return {name: value for name, value in specialist.state_dict().items() if name not in staying}


def tensor_specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return name -> shape and dtype."""
    return {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in tensors.items()}


def disagreement(tensors: Mapping[str, Tensor], spec: Mapping[str, TensorSpec]) -> str | None:
    """Return a sentence on the first tensor that is not as agreed or not finite, or None."""
    missing, foreign = sorted(set(spec) - set(tensors)), sorted(set(tensors) - set(spec))
    if missing or foreign:
        return f"{len(missing)} agreed tensors are missing ({missing[:3]}), {len(foreign)} are foreign ({foreign[:3]})"
    for name, agreed in spec.items():
        found = tensors[name]
        if tuple(found.shape) != agreed.shape or found.dtype != agreed.dtype:
            return f"tensor {name} is {tuple(found.shape)} {found.dtype}, agreed is {agreed.shape} {agreed.dtype}"
        if not bool(torch.isfinite(found).all()):
            return f"tensor {name} has values that are not finite"
    return None


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over names, shapes, dtypes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
