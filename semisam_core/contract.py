"""The contract between server and sites: names of records, scalars and refusals, and the specialist's tensors.

Both sides check against these lists; nothing else leaves a site.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from semisam_core.configuration import is_name
from semisam_core.plan import Plan
from semisam_core.prompting import Refusal
from semisam_core.sources.head_network import FeatureHead, feature_head_of
from semisam_core.specialists import batch_norm_tensors, outline_specialist

SPECIALIST_RECORD = "specialist"
STUDY_RECORD = "study"
SITE_RECORD = "site"
METRICS_RECORD = "metrics"
REFUSAL_RECORD = "refusal"
SECURE_RECORD = "secure-aggregation"  # keys and shares, in messages and replies of a secure sum's stages
HEAD_PREFIX = (
    "feature-head."  # of the head's tensors, which travel beside the specialist's; no specialist has such names
)
# In the site record of a reply to join, train and evaluate: the keyed hash of the site's split by patient, the same in
# every round of a run. 64 hexadecimal digits.
SPLIT_HASH = "split-hash"
# In the site record of a reply to join: whether the site's counts of scans are EXACT_COUNTS or the lowest of a bucket
# (`small_numbers.BUCKETS`). Without the word they are exact.
COUNTS_WORD, EXACT_COUNTS, BUCKETED_COUNTS = "counts", "exact", "buckets"
# In the study record, if the server rejected this site's last reply: the RejectionRule and the round.
REJECTED, REJECTED_ROUND = "rejected", "rejected-round"
# In the study record, if the tensors beside it are the coded change of the weights that the site was sent in an earlier
# round: the `weights_sha256` of those.
BASE = "base"

JOIN_SCALARS = ("labeled", "unlabeled", "validation", "quarantined", "generalists")
TRAIN_SCALARS = (
    "labeled",
    "unlabeled",
    "accepted",
    "gated",
    *(f"gated.{refusal.value}" for refusal in Refusal),
    "confidence",
    "steps",
    "head_steps",
    "loss.supervised",
    "loss.consistency",
    "loss.generalist",
    # Norm of each weighted term's gradient: one whose share is tiny teaches nothing, whatever its loss.
    "gradient.supervised",
    "gradient.consistency",
    "gradient.generalist",
    "seconds",
)
# What a private round may send besides its tensors: nothing that was computed from scans or labels without noise. The
# site's own epsilon.* say what the round and everything before it has cost; the site decides whether they leave.
PRIVATE_TRAIN_SCALARS = ("labeled", "unlabeled", "steps", "epsilon.round", "epsilon.total", "epsilon.delta")
CLASS_SCORES = ("dice", "jaccard", "hd95_mm", "asd_mm", "surface_dice", "cases", "missing_distances")
# Which values a scalar may take, by its name up to the first dot. All others may be any non-negative number.
COUNTS = frozenset({*JOIN_SCALARS, "accepted", "gated", "steps", "head_steps", "cases", "missing_distances"})
# Numbers that say nothing of single patients, whatever their number: of models, of the plan, and a duration.
PATIENTLESS = frozenset({"generalists", "steps", "head_steps", "seconds", "epsilon"})
SHARES = frozenset({"confidence", "dice", "jaccard", "surface_dice"})
ANY_SIGN = frozenset({"loss"})


class Stage(StrEnum):
    """The stages of a secure sum, as message types. A stage's reply carries no scalars."""

    KEYS = "train.keys"
    SHARES = "train.shares"
    MASKED = "train.masked"
    UNMASK = "train.unmask"


# In the secure record. To sites: the attempt, 32 hexadecimal digits; then by stage each site's public keys and whether
# it trained its feature head (a list of MASK_KEY, SHARE_KEY, HEAD), the shares that each other site sealed for this
# one, or the names of the sites whose masked vectors arrived and of those whose did not. From sites: see MATERIAL.
ATTEMPT, ACTIVE, DROPPED = "attempt", "active", "dropped"
SITE_KEYS, SEALED_BY = "keys-of.", "sealed-by."
MASK_KEY, SHARE_KEY, HEAD = "mask-key", "share-key", "head"
SEALED_FOR, SEED_SHARE, KEY_SHARE = "sealed-for.", "seed-share-of.", "key-share-of."
MASKED_VECTOR = "masked-vector"
# Stage -> what a reply's secure record holds; a name that ends with a dot is followed by a site's.
MATERIAL = {
    Stage.KEYS: (MASK_KEY, SHARE_KEY, HEAD),
    Stage.SHARES: (SEALED_FOR,),
    Stage.MASKED: (),
    Stage.UNMASK: (SEED_SHARE, KEY_SHARE),
}
MATERIAL_BYTES = 2048  # of one item, at most


class RefusalRule(StrEnum):
    """Why a site refuses a message. Only this word leaves the site; the details are in the site's own log."""

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
    SPLIT_CHANGED = "split-changed"
    UPDATE_TOO_LARGE = "update-too-large"
    SECURE = "secure-aggregation"
    AUDIT_LOG = "audit-log"
    CODE_NOT_APPROVED = "code-not-approved"
    MANIFEST_NOT_APPROVED = "manifest-not-approved"
    CODE_ALTERED = "code-altered"
    PROCESS_ENDED = "process-ended"
    OUT_OF_TIME = "out-of-time"
    BASE_NOT_HELD = "base-not-held"
    PRIVACY_LIMITS = "privacy-limits"
    PRIVACY_BUDGET = "privacy-budget"
    PRIVACY_LEDGER = "privacy-ledger"


# Refusals that may be gone a minute later: the same message is worth sending again. All others take a person (another
# plan, another configuration, an approval) or would repeat themselves (training that diverges).
TRANSIENT_REFUSALS = frozenset(
    {
        RefusalRule.STORAGE,
        RefusalRule.INTERNAL,
        RefusalRule.AUDIT_LOG,
        RefusalRule.PROCESS_ENDED,
        RefusalRule.OUT_OF_TIME,
        RefusalRule.BASE_NOT_HELD,  # asked again, the site is sent the weights themselves
    }
)


class RejectionRule(StrEnum):
    """Why the server rejects a site's reply. The site gets this word with its next message."""

    ANOTHER_ROUND = "another-round-or-plan"
    ANOTHER_SITE = "not-the-site-that-joined"
    RECORDS = "records-not-as-agreed"
    SCALARS = "scalars-not-as-agreed"
    COUNTS = "counts-not-as-declared"
    SPLIT_CHANGED = "split-changed"
    TENSORS = "tensors-not-as-agreed"
    TOO_LARGE = "too-large"
    UNREADABLE = "unreadable"
    NOT_FINITE = "not-finite"
    CHANGE_TOO_LARGE = "change-too-large"
    STEPS = "steps-and-change-disagree"
    SECURE = "secure-aggregation"


def material_mistake(stage: Stage, material: Mapping[str, object]) -> str | None:
    """Return why the secure record of a stage's reply is not as agreed, or None."""
    agreed = MATERIAL[stage]
    for name, value in material.items():
        prefix, dot, site = name.partition(".")
        known = prefix + dot in agreed and (not dot or is_name(site))
        if not known or not isinstance(value, bytes) or len(value) > MATERIAL_BYTES:
            return f"the item {name[:90]!r} is not agreed in this stage"
    if missing := [name for name in agreed if not name.endswith(".") and name not in material]:
        return f"the items {missing} are missing"
    return None


def is_sha256(value: object) -> bool:
    """Return whether a value is a SHA-256 in lowercase hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def same_version(theirs: object, ours: str) -> bool:
    """Return whether two versions of this project are compatible, that is, share their first two numbers."""
    return isinstance(theirs, str) and theirs.split(".")[:2] == ours.split(".")[:2]


def train_scalars(plan: Plan) -> tuple[str, ...]:
    """Return the names of the scalars that may leave with an update."""
    return TRAIN_SCALARS if plan.privacy is None else PRIVATE_TRAIN_SCALARS


def evaluation_scalars(plan: Plan) -> tuple[str, ...]:
    """Return the names of an evaluation's scalars: ``validation``, ``dice.<class>`` and so on."""
    return ("validation", *(f"{score}.{name}" for name in plan.class_names for score in CLASS_SCORES))


def scalar_range(name: str) -> tuple[float, float]:
    """Return the lowest and the highest value that a scalar may have."""
    kind = name.partition(".")[0]
    return -math.inf if kind in ANY_SIGN else 0.0, 1.0 if kind in SHARES else math.inf


def is_count(name: str) -> bool:
    """Return whether a scalar is a whole number."""
    return name.partition(".")[0] in COUNTS


def counts_patients(name: str) -> bool:
    """Return whether a scalar is a count that depends on how many scans or patients a site has."""
    return is_count(name) and name.partition(".")[0] not in PATIENTLESS


def scalar_mistake(name: str, value: object) -> str | None:
    """Return why a scalar's value is invalid, or None."""
    lowest, highest = scalar_range(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return f"the scalar {name} is not a finite number"
    if value < lowest:
        return f"the scalar {name} is negative"
    if is_count(name) and not isinstance(value, int):
        return f"the scalar {name} is a count but not a whole number"
    if value > highest:
        return f"the scalar {name} is a share but exceeds 1"
    return None


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor that travels."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def update_spec(plan: Plan) -> dict[str, TensorSpec]:
    """Return name -> shape and dtype of every tensor of an update: the specialist's and the feature head's."""
    return specialist_spec(plan) | tensor_specs(initial_head(plan))


def initial_head(plan: Plan) -> dict[str, Tensor]:
    """Return the tensors of the plan's feature head before the first round, by their names in an update.

    Empty if the plan has no feature head.
    """
    head = feature_head_of(plan)
    return {} if head is None else with_prefix(head)


def with_prefix(head: FeatureHead) -> dict[str, Tensor]:
    """Return a feature head's tensors by their names in an update."""
    return {HEAD_PREFIX + name: value for name, value in head.state_dict().items()}


def split_update(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the specialist's tensors and the feature head's, the latter without their prefix."""
    specialist = {name: value for name, value in tensors.items() if not name.startswith(HEAD_PREFIX)}
    head = {name.removeprefix(HEAD_PREFIX): tensors[name] for name in tensors if name not in specialist}
    return specialist, head


def specialist_spec(plan: Plan) -> dict[str, TensorSpec]:
    """Return name -> shape and dtype of every tensor of the plan's specialist that travels."""
    chosen, task = plan.specialist, plan.task
    outline = outline_specialist(chosen.name, chosen.arguments, len(task.channels), len(task.classes))
    return tensor_specs(travelling(plan, outline))


def travelling(plan: Plan, specialist: nn.Module) -> dict[str, Tensor]:
    """Return the specialist's tensors that travel; the others stay at the site.

    With `specialist.statistics: local`, batch-norm layers stay at the site: running statistics, scales and shifts
    (FedBN, Li et al., ICLR 2021). Batch counters never travel: they are integers that nothing depends on.

    Args:
        plan: the study plan.
        specialist: the plan's specialist; its own tensors are returned, not copies.
    """
    normalising = batch_norm_tensors(specialist)
    local = plan.specialist.statistics == "local"
    staying = {name for name in normalising if local or name.endswith("num_batches_tracked")}
    return {name: value for name, value in specialist.state_dict().items() if name not in staying}


def tensor_specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return name -> shape and dtype."""
    return {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in tensors.items()}


def disagreement(tensors: Mapping[str, Tensor], spec: Mapping[str, TensorSpec]) -> str | None:
    """Return what is wrong with the first tensor that is not as agreed or not finite, or None."""
    missing, foreign = sorted(set(spec) - set(tensors)), sorted(set(tensors) - set(spec))
    if missing or foreign:
        return (
            f"{len(missing)} agreed tensors are missing ({missing[:3]}), {len(foreign)} are not agreed ({foreign[:3]})"
        )
    for name, agreed in spec.items():
        found = tensors[name]
        if tuple(found.shape) != agreed.shape or found.dtype != agreed.dtype:
            return f"tensor {name} is {tuple(found.shape)} {found.dtype}, expected {agreed.shape} {agreed.dtype}"
        if not bool(torch.isfinite(found).all()):
            return f"tensor {name} has values that are not finite"
    return None


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of all names, shapes, dtypes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
