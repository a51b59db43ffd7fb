"""The manifest: all that may leave a site under a plan. People approve it; the egress gate holds replies to it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from client.site_config import Egress, SiteConfig
from semisam_core.codecs import leaving_spec
from semisam_core.contract import (
    BUCKETED_COUNTS,
    CLASS_SCORES,
    COUNTS_WORD,
    EXACT_COUNTS,
    JOIN_SCALARS,
    MATERIAL,
    MATERIAL_BYTES,
    PATIENTLESS,
    SPLIT_HASH,
    RefusalRule,
    Stage,
    TensorSpec,
    counts_patients,
    evaluation_scalars,
    is_count,
    scalar_range,
    train_scalars,
    update_spec,
)
from semisam_core.data.fingerprint import fingerprint_scalars, rounding_of
from semisam_core.plan import Plan
from semisam_core.plan_sections.aggregation import MOST_SUMMED
from semisam_core.small_numbers import EXACT, IN_BUCKETS, Rounding

VERSION = 1
JOIN, TRAIN, EVALUATE, FINGERPRINT, REFUSAL = "join", "train", "evaluate", "fingerprint", "refusal"
NUMBER_BYTES = 8
UNSIGNED = frozenset(
    {"patients", "spacing_mm", "extent_mm", "volume_ml"}
)  # of a fingerprint; intensities have any sign


@dataclass(frozen=True)
class ScalarItem:
    """One number that may leave.

    Attributes:
        lowest: the lowest value; minus infinity for none.
        highest: the highest value; infinity for none.
        whole: whether it is a whole number.
        rounding: how it is coarsened.
        minimum_patients: about fewer patients than this it is withheld; 0 if it always leaves.
    """

    lowest: float
    highest: float
    whole: bool
    rounding: Rounding = EXACT
    minimum_patients: int = 0

    def mistake(self, value: object) -> str | None:
        """Return why a value may not leave, or None."""
        if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
            return "is not a finite number"
        if self.whole and type(value) is not int:
            return "is not a whole number"
        if not self.lowest <= value <= self.highest:  # type: ignore[operator]
            return f"is not between {self.lowest:g} and {self.highest:g}"
        return None


@dataclass(frozen=True)
class TextItem:
    """One text, or number written as text, that may leave.

    Attributes:
        pattern: the regular expression that the whole text matches.
        longest: the most characters that it can have.
    """

    pattern: str
    longest: int

    def mistake(self, value: object) -> str | None:
        """Return why a value may not leave, or None."""
        if re.fullmatch(self.pattern, str(value)) is None:
            return f"is not of the form {self.pattern}"
        return None


@dataclass(frozen=True)
class MessageItems:
    """All that one kind of message may hold.

    Attributes:
        times: how often it is sent in a study in which nothing is asked for twice; 0 if only when something is wrong.
        scalars: name -> what is agreed of a number.
        texts: name -> what is agreed of a text.
        tensors: name -> shape and dtype.
        tensor_bytes_limit: the site's own limit on the size of the tensors.
        material: names of keys and shares of a secure sum; one that ends with a dot is followed by a site's.
        change_of: name -> shape and dtype of the tensors whose change is coded in `tensors`; empty without a codec.
    """

    times: int
    scalars: Mapping[str, ScalarItem] = field(default_factory=dict)
    texts: Mapping[str, TextItem] = field(default_factory=dict)
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    tensor_bytes_limit: float = 0.0
    material: tuple[str, ...] = ()
    change_of: Mapping[str, TensorSpec] = field(default_factory=dict)

    @property
    def tensor_bytes(self) -> int:
        """Size of the values of all tensors."""
        return sum(math.prod(each.shape) * each.dtype.itemsize for each in self.tensors.values())

    @property
    def most_bytes(self) -> int:
        """The most bytes that values of this message can have; names and Flower's framing come on top."""
        texts = sum(each.longest for each in self.texts.values())
        material = sum(MATERIAL_BYTES * (MOST_SUMMED if name.endswith(".") else 1) for name in self.material)
        return self.tensor_bytes + NUMBER_BYTES * len(self.scalars) + texts + material

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        change_of = {"change_of": _tensors_json(self.change_of)} if self.change_of else {}
        return {
            "times": self.times,
            "scalars": {name: _scalar_json(each) for name, each in self.scalars.items()},
            "texts": {name: each.pattern for name, each in self.texts.items()},
            "tensors": _tensors_json(self.tensors),
            **change_of,
            "material": {name: {"longest_bytes": MATERIAL_BYTES} for name in self.material},
            "tensor_bytes": self.tensor_bytes,
            "tensor_bytes_limit": self.tensor_bytes_limit,
            "most_bytes": self.most_bytes,
        }


@dataclass(frozen=True)
class Manifest:
    """All that may leave a site under one plan.

    Attributes:
        site: the site's name.
        rounds: the plan's number of rounds.
        messages: kind of message -> what it may hold.
    """

    site: str
    rounds: int
    messages: Mapping[str, MessageItems]

    @property
    def most_bytes(self) -> int:
        """The most bytes of values in a whole study in which nothing is asked for twice."""
        return sum(each.times * each.most_bytes for each in self.messages.values())

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "version": VERSION,
            "site": self.site,
            "rounds": self.rounds,
            "messages": {kind: each.as_json() for kind, each in self.messages.items()},
            "most_bytes": self.most_bytes,
        }

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON, which is what a person approves."""
        text = json.dumps(self.as_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def manifest_of(config: SiteConfig, plan: Plan) -> Manifest:
    """Return all that may leave a site under a plan and the site's own limits."""
    rounds, egress = plan.training.rounds, config.egress
    texts = _texts(config.site, plan.training.rounds)
    evaluations = (rounds - 1) // plan.evaluation.every_rounds + 1  # of due rounds, and of the last specialist
    limit, counts = egress.maximum_update_mb * 1e6, counts_word(egress)
    messages = {
        JOIN: MessageItems(1, _agreed(JOIN_SCALARS, egress), texts | {COUNTS_WORD: TextItem(counts, len(counts))}),
        **_training_items(plan, _agreed(_reported(plan, egress), egress), texts, limit),
        EVALUATE: MessageItems(evaluations, _agreed(_allowed_scores(plan, egress), egress), texts),
        REFUSAL: refusal_items(config.site),
    }
    if egress.fingerprint:
        items = _fingerprint_items(plan, egress.minimum_patients)
        messages[FINGERPRINT] = MessageItems(1, items, {"site": texts["site"]})
    return Manifest(config.site, rounds, messages)


def _training_items(
    plan: Plan, scalars: Mapping[str, ScalarItem], texts: Mapping[str, TextItem], limit: float
) -> dict[str, MessageItems]:
    """Return what a round of training sends: the update itself, or what a secure sum takes in its place."""
    rounds, leaving = plan.training.rounds, leaving_spec(plan)
    if plan.aggregation.secure is None:
        change_of = {} if plan.aggregation.codec is None else update_spec(plan)
        return {TRAIN: MessageItems(rounds, scalars, texts, leaving, limit, change_of=change_of)}
    tensors = {stage: leaving if stage is Stage.MASKED else {} for stage in Stage}
    stages = {
        stage.value: MessageItems(rounds, {}, texts, tensors[stage], limit if tensors[stage] else 0.0, MATERIAL[stage])
        for stage in Stage
    }
    return {TRAIN: MessageItems(rounds, scalars, texts), **stages}


def counts_word(egress: Egress) -> str:
    """Return the word by which a site that joins says how its counts of scans are to be read."""
    return EXACT_COUNTS if egress.numbers == "exact" else BUCKETED_COUNTS


def refusal_items(site: str) -> MessageItems:
    """Return all that a refusal may hold, under any plan."""
    words = [rule.value for rule in RefusalRule]
    texts = {
        "site": TextItem(re.escape(site), len(site)),
        "round": TextItem("-1|[0-9]{1,6}", NUMBER_BYTES),
        "plan-hash": TextItem("", 0),
        "rule": TextItem("|".join(words), max(map(len, words))),
    }
    return MessageItems(0, {}, texts)


def _agreed(names: Iterable[str], egress: Egress) -> dict[str, ScalarItem]:
    return {name: _item(name, egress) for name in names}


def _item(name: str, egress: Egress) -> ScalarItem:
    """Return what is agreed of a scalar of the contract. Whatever is not known to say nothing of patients may."""
    kind, whole = name.partition(".")[0], is_count(name)
    if egress.numbers == "exact":
        return ScalarItem(*scalar_range(name), whole)
    of_the_plan = whole or kind == "epsilon"
    digits = EXACT if of_the_plan else Rounding("digits", egress.significant_digits)
    rounding = IN_BUCKETS if counts_patients(name) else digits
    always = kind in PATIENTLESS or (whole and kind not in CLASS_SCORES)
    return ScalarItem(*scalar_range(name), whole, rounding, 0 if always else egress.minimum_patients)


def _reported(plan: Plan, egress: Egress) -> list[str]:
    """Return the names of a training round's scalars."""
    return [name for name in train_scalars(plan) if egress.epsilon or not name.startswith("epsilon.")]


def _allowed_scores(plan: Plan, egress: Egress) -> list[str]:
    """Return the names of an evaluation's scalars without the scores that the site keeps."""
    kept = set(CLASS_SCORES) - set(egress.validation_scores)
    return [name for name in evaluation_scalars(plan) if name.partition(".")[0] not in kept]


def _fingerprint_items(plan: Plan, minimum: int) -> dict[str, ScalarItem]:
    items = {}
    for name in fingerprint_scalars(plan.task):
        kind = name.partition(".")[0]
        lowest = 0.0 if kind in UNSIGNED else -math.inf
        count = kind == "patients"
        items[name] = ScalarItem(lowest, math.inf, count, rounding_of(name), 0 if count else minimum)
    return items


def _texts(site: str, rounds: int) -> dict[str, TextItem]:
    return {
        "site": TextItem(re.escape(site), len(site)),
        "round": TextItem(f"[0-9]{{1,{len(str(rounds))}}}", NUMBER_BYTES),
        "plan-hash": TextItem("[0-9a-f]{64}", 64),
        SPLIT_HASH: TextItem("[0-9a-f]{64}", 64),
    }


def _tensors_json(tensors: Mapping[str, TensorSpec]) -> dict[str, Any]:
    return {
        name: {"shape": list(each.shape), "dtype": str(each.dtype).removeprefix("torch.")}
        for name, each in tensors.items()
    }


def _scalar_json(item: ScalarItem) -> dict[str, Any]:
    return {
        "lowest": item.lowest if math.isfinite(item.lowest) else None,
        "highest": item.highest if math.isfinite(item.highest) else None,
        "whole": item.whole,
        "rounding": str(item.rounding),
        "minimum_patients": item.minimum_patients,
    }
