"""What a hostile or broken site may send, and how it is stopped: rejected, or bounded by a robust rule."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from torch import Tensor

from semisam_core.contract import RejectionRule
from semisam_core.plan import Plan
from semisam_core.plan_sections.aggregation import Admission, Aggregation
from server.admission import Admitted, Rejected
from server.aggregation import combine, votes
from server.outliers import outliers
from server.updates import MemoryUpdate, UpdateShelf
from tests.server.replies import DECLARED, SCALARS, answer, arrays, initial, train_records, trained

Records = dict[str, Any]
NPY = b"\x93NUMPY\x01\x00"


class _RaisingArray(Array):
    """An array whose bytes fail to load when they are read."""

    def __getattribute__(self, name: str) -> Any:
        if name == "data":
            raise RuntimeError("the chunk is not there")
        return super().__getattribute__(name)


def _tensor(change: Callable[[Tensor], Tensor]) -> Callable[[Plan, Records], Records]:
    """Change the vector that holds all tensors."""
    return _array(lambda array: Array(np.ascontiguousarray(change(torch.from_numpy(array.numpy().copy())).numpy())))


def _array(make: Callable[[Array], Array]) -> Callable[[Plan, Records], Records]:
    def hostile(plan: Plan, records: Records) -> Records:
        record = arrays(trained(plan))
        name = list(record)[-1]
        record[name] = make(record[name])
        return records | {"specialist": record}

    return hostile


def _bytes(data: Callable[[bytes], bytes]) -> Callable[[Plan, Records], Records]:
    return _array(lambda array: Array(array.dtype, array.shape, array.stype, data(array.data)))


def _count(data: bytes) -> int:
    """Return how many numbers the vector's own bytes hold."""
    return len(np.load(io.BytesIO(data), allow_pickle=False))


def _header(text: str, payload: bool = False) -> Callable[[bytes], bytes]:
    """Write another header; COUNT in it stands for the vector's length."""

    def data(honest: bytes) -> bytes:
        said = text.replace("COUNT", str(_count(honest))).encode("latin1")
        return NPY + struct.pack("<H", len(said)) + said + (bytes(4 * _count(honest)) if payload else b"")

    return data


def _scalar(**changes: Any) -> Callable[[Plan, Records], Records]:
    return lambda _, records: records | {"metrics": MetricRecord(SCALARS | changes)}


def _about(**changes: Any) -> Callable[[Plan, Records], Records]:
    return lambda _, records: records | {"site": ConfigRecord({**records["site"], **changes})}


def _without_a_key(plan: Plan, records: Records) -> Records:
    return records | {"specialist": arrays(dict(list(trained(plan).items())[1:]))}


def _with_a_foreign_key(plan: Plan, records: Records) -> Records:
    return records | {"specialist": arrays(trained(plan) | {"backdoor" * 1000: torch.zeros(1)})}


def _with_a_foreign_vector(plan: Plan, records: Records) -> Records:
    record = arrays(trained(plan))
    record["float16"] = Array(np.zeros(1, np.float16))
    return records | {"specialist": record}


def _pickled(_: bytes) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}, {"b": 2}], dtype=object), allow_pickle=True)
    return file.getvalue()


def _saved(shape: Callable[[int], int | tuple[int, ...]], dtype: str) -> Callable[[bytes], bytes]:
    def data(honest: bytes) -> bytes:
        file = io.BytesIO()
        np.save(file, np.zeros(shape(_count(honest)), dtype))
        return file.getvalue()

    return data


CORPUS: dict[str, tuple[Callable[[Plan, Records], Records], RejectionRule]] = {
    "nan": (_tensor(lambda t: t * float("nan")), RejectionRule.NOT_FINITE),
    "one infinity": (_tensor(lambda t: t.index_fill(0, torch.tensor([1]), float("inf"))), RejectionRule.NOT_FINITE),
    "minus infinity": (_tensor(lambda t: t - float("inf")), RejectionRule.NOT_FINITE),
    "a shape that broadcasts": (_tensor(lambda t: t[:1]), RejectionRule.TENSORS),
    "a further axis": (_tensor(lambda t: t[None]), RejectionRule.TENSORS),
    "0-d": (_tensor(lambda t: t[0]), RejectionRule.TENSORS),
    "float64": (_tensor(lambda t: t.double()), RejectionRule.TENSORS),
    "float16": (_tensor(lambda t: t.half()), RejectionRule.TENSORS),
    "whole numbers": (_tensor(lambda t: t.int()), RejectionRule.TENSORS),
    "claims to be bfloat16": (_array(lambda a: Array("bfloat16", a.shape, a.stype, a.data)), RejectionRule.TENSORS),
    "bfloat16 bytes": (_bytes(_saved(lambda n: n, "V2")), RejectionRule.UNREADABLE),
    "missing key": (_without_a_key, RejectionRule.TENSORS),
    "foreign key": (_with_a_foreign_key, RejectionRule.TENSORS),
    "a foreign vector": (_with_a_foreign_vector, RejectionRule.TENSORS),
    "no tensors": (lambda _, r: r | {"specialist": ArrayRecord()}, RejectionRule.TENSORS),
    "no specialist": (lambda _, r: {k: v for k, v in r.items() if k != "specialist"}, RejectionRule.RECORDS),
    "no scalars": (lambda _, r: {k: v for k, v in r.items() if k != "metrics"}, RejectionRule.RECORDS),
    "a foreign record": (lambda _, r: r | {"extra": ConfigRecord({"notes": "x" * 10_000})}, RejectionRule.RECORDS),
    "a second specialist": (lambda p, r: r | {"more": arrays(initial(p))}, RejectionRule.RECORDS),
    "oversize": (_bytes(lambda data: data + bytes(10_000_000)), RejectionRule.TOO_LARGE),
    "a few bytes too many": (_bytes(lambda data: data + bytes(8)), RejectionRule.UNREADABLE),
    "truncated": (_bytes(lambda data: data[:-1]), RejectionRule.UNREADABLE),
    "empty": (_bytes(lambda _: b""), RejectionRule.UNREADABLE),
    "not an array": (_bytes(lambda _: b"\x00" * 136), RejectionRule.UNREADABLE),
    "pickled objects": (_bytes(_pickled), RejectionRule.UNREADABLE),
    "bytes of another shape": (_bytes(_saved(lambda n: (1, n), "<f4")), RejectionRule.UNREADABLE),
    "bytes of another dtype": (_bytes(_saved(lambda n: n // 2, "<f8")), RejectionRule.UNREADABLE),
    "big-endian bytes": (_bytes(_saved(lambda n: n, ">f4")), RejectionRule.UNREADABLE),
    "column-major bytes": (
        _bytes(_header("{'descr': '<f4', 'fortran_order': True, 'shape': (COUNT,), }\n", True)),
        RejectionRule.UNREADABLE,
    ),
    "a header that claims a terabyte": (
        _bytes(_header("{'descr': '<f4', 'fortran_order': False, 'shape': (250000000000,), }\n")),
        RejectionRule.UNREADABLE,
    ),
    "a deeply nested header": (_bytes(_header("(" * 900)), RejectionRule.UNREADABLE),
    "a header that is code": (_bytes(_header("__import__('os').abort()")), RejectionRule.UNREADABLE),
    "another serialization": (_array(lambda a: Array(a.dtype, a.shape, "pickle", a.data)), RejectionRule.UNREADABLE),
    "bytes that fail to load": (
        _array(lambda a: _RaisingArray(a.dtype, a.shape, a.stype, a.data)),
        RejectionRule.UNREADABLE,
    ),
    "replayed round": (_about(round=0), RejectionRule.ANOTHER_ROUND),
    "a future round": (_about(round=2), RejectionRule.ANOTHER_ROUND),
    "a round that is not a number": (_about(round="1"), RejectionRule.ANOTHER_ROUND),
    "a round that equals one": (_about(round=True), RejectionRule.ANOTHER_ROUND),
    "other plan": (_about(**{"plan-hash": "0" * 64}), RejectionRule.ANOTHER_ROUND),
    "the name of another site": (_about(site="beta"), RejectionRule.ANOTHER_SITE),
    "negative count": (_scalar(labeled=-1), RejectionRule.SCALARS),
    "infinite count": (_scalar(labeled=float("inf")), RejectionRule.SCALARS),
    "a count of text": (_scalar(labeled=[1, 2]), RejectionRule.SCALARS),
    "foreign scalar": (_scalar(patients=3), RejectionRule.SCALARS),
    "huge count": (_scalar(labeled=10**15), RejectionRule.COUNTS),
    "more labels than declared": (_scalar(labeled=2), RejectionRule.COUNTS),
    "more unlabeled scans than declared": (_scalar(unlabeled=3), RejectionRule.COUNTS),
    "more pseudo-labels than scans have classes": (_scalar(accepted=2), RejectionRule.COUNTS),
    "more steps than the plan has": (_scalar(steps=3), RejectionRule.COUNTS),
}


@pytest.mark.parametrize("name", CORPUS)
def test_a_hostile_reply_is_rejected_by_the_right_rule(name: str, plan: Plan) -> None:
    hostile, rule = CORPUS[name]
    began = time.monotonic()
    found = answer(plan, hostile(plan, train_records(plan)))
    assert isinstance(found, Rejected)
    assert found.rule == rule, found.reason
    assert len(found.reason) < 400
    assert time.monotonic() - began < 5


def test_the_honest_reply_is_admitted_unchanged(plan: Plan) -> None:
    found = answer(plan, train_records(plan))
    assert isinstance(found, Admitted)
    assert found.weights is not None
    assert list(found.weights) == list(initial(plan))
    assert all(torch.equal(found.weights[name], value) for name, value in trained(plan).items())


def test_a_repaired_scan_may_count_although_it_was_quarantined(plan: Plan) -> None:
    records = train_records(plan) | {"metrics": MetricRecord(SCALARS | {"labeled": 2})}
    assert isinstance(answer(plan, records, DECLARED | {"quarantined": 1.0}), Admitted)
    records = train_records(plan) | {"metrics": MetricRecord(SCALARS | {"labeled": 2, "unlabeled": 3})}
    found = answer(plan, records, DECLARED | {"quarantined": 1.0})
    assert isinstance(found, Rejected)
    assert found.rule == RejectionRule.COUNTS


def test_pseudo_labels_under_a_plan_without_them_are_rejected(plan: Plan) -> None:
    without = plan.model_copy(update={"pseudo_labels": None})
    found = answer(without, train_records(without))
    assert isinstance(found, Rejected)
    assert found.rule == RejectionRule.COUNTS
    honest = train_records(without) | {"metrics": MetricRecord(SCALARS | {"accepted": 0, "gated": 0})}
    assert isinstance(answer(without, honest), Admitted)


def _round(plan: Plan, folder: Path, hostile: dict[str, Tensor], steps: int = 2) -> UpdateShelf:
    """Return a round's shelf: four honest sites whose changes have norms 1 to 4, and a hostile one."""
    start, shelf = initial(plan), UpdateShelf(folder)
    for k in range(1, 5):
        shelf.add(f"honest-{k}", _moved(plan, k), {"steps": 2}, start)
    shelf.add("mallory", hostile, {"steps": steps}, start)
    return shelf


def _moved(plan: Plan, times: float) -> dict[str, Tensor]:
    start, further = initial(plan), trained(plan)
    return {name: value + times * (further[name] - value) for name, value in start.items()}


ROUNDS: dict[str, tuple[float, int, RejectionRule]] = {
    "huge": (1e9, 2, RejectionRule.CHANGE_TOO_LARGE),
    "scaled": (50.0, 2, RejectionRule.CHANGE_TOO_LARGE),
    "flipped and scaled": (-50.0, 2, RejectionRule.CHANGE_TOO_LARGE),
    "zero after steps": (0.0, 2, RejectionRule.STEPS),
    "changed without steps": (1.0, 0, RejectionRule.STEPS),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_an_outlier_is_rejected_and_the_others_stay(name: str, plan: Plan, tmp_path: Path) -> None:
    times, steps, rule = ROUNDS[name]
    (found,) = outliers(_round(plan, tmp_path, _moved(plan, times), steps).updates, Admission(norm_factor=10.0))
    assert (found.site, found.rule) == ("mallory", rule)


@pytest.mark.parametrize(("times", "steps"), [(1e-6, 2), (9.0, 2), (-1.0, 2), (0.0, 0)])
def test_small_changes_changes_within_the_factor_and_no_change_without_steps_are_kept(
    times: float, steps: int, plan: Plan, tmp_path: Path
) -> None:
    shelf = _round(plan, tmp_path, _moved(plan, times), steps)
    assert outliers(shelf.updates, Admission(norm_factor=10.0)) == []


def test_norms_are_not_compared_if_the_plan_says_so_or_fewer_than_three_sites_took_steps(
    plan: Plan, tmp_path: Path
) -> None:
    shelf = _round(plan, tmp_path, _moved(plan, 1e9))
    assert outliers(shelf.updates, Admission(norm_factor=None)) == []
    assert len(outliers(shelf.updates, Admission())) == 1
    for site in ("honest-1", "honest-2", "honest-3"):
        shelf.drop(site)
    assert outliers(shelf.updates, Admission()) == []


def test_sites_without_steps_do_not_pull_the_median_to_zero(plan: Plan, tmp_path: Path) -> None:
    shelf = _round(plan, tmp_path, _moved(plan, 2.0))
    for k in range(8):
        shelf.add(f"idle-{k}", initial(plan), {"steps": 0}, initial(plan))
    assert outliers(shelf.updates, Admission()) == []


def _consistency_alone(plan: Plan, folder: Path, taught: dict[str, float]) -> UpdateShelf:
    """Return a round's shelf: sites that learned from labels or pseudo-labels, and three that had neither."""
    start, shelf = initial(plan), UpdateShelf(folder)
    for k, (what, times) in enumerate(taught.items()):
        shelf.add(f"taught-{k}", _moved(plan, times), {"steps": 2, what.partition("-")[0]: 1}, start)
    for k in range(3):
        shelf.add(f"unlabeled-{k}", _moved(plan, 0.01), {"steps": 2, "unlabeled": 4}, start)
    return shelf


def test_sites_that_learn_from_consistency_alone_make_no_outlier_of_those_with_labels(
    plan: Plan, tmp_path: Path
) -> None:
    assert outliers(_consistency_alone(plan, tmp_path, {"labeled": 1.0}).updates, Admission()) == []


def test_sites_without_labels_are_compared_with_those_that_have_some(plan: Plan, tmp_path: Path) -> None:
    shelf = _consistency_alone(plan, tmp_path, {"labeled": 1.0, "accepted": 1.5})
    shelf.add("mallory", _moved(plan, 20.0), {"steps": 2, "unlabeled": 4}, initial(plan))
    (found,) = outliers(shelf.updates, Admission(norm_factor=10.0))
    assert (found.site, found.rule) == ("mallory", RejectionRule.CHANGE_TOO_LARGE)


def test_three_sites_with_labels_or_pseudo_labels_are_compared_with_each_other(plan: Plan, tmp_path: Path) -> None:
    taught = {"labeled-a": 1.0, "labeled-b": 1.0, "accepted": 30.0}
    (found,) = outliers(_consistency_alone(plan, tmp_path, taught).updates, Admission(norm_factor=10.0))
    assert found.site == "taught-2"


HEAD = "feature-head.axial.1.weight"


def _with_head(plan: Plan, change: float, head_change: float) -> dict[str, Tensor]:
    return {**_moved(plan, change), HEAD: torch.full((3,), head_change)}


def _headed_round(plan: Plan, folder: Path, heads: Sequence[float], head_steps: int = 5) -> UpdateShelf:
    """Return a round's shelf: one site for each head's change, and an unlabeled one that sends the head back."""
    start, shelf = _with_head(plan, 0.0, 0.0), UpdateShelf(folder)
    for k, change in enumerate(heads):
        shelf.add(f"labeled-{k}", _with_head(plan, 1.0, change), {"steps": 2, "head_steps": head_steps}, start)
    shelf.add("unlabeled", _with_head(plan, 1.0, 0.0), {"steps": 2}, start)
    return shelf


def test_the_only_site_that_trains_a_feature_head_is_no_outlier(plan: Plan, tmp_path: Path) -> None:
    shelf = _headed_round(plan, tmp_path, [1e6])
    start = _with_head(plan, 0.0, 0.0)
    for k in range(2):
        shelf.add(f"idle-head-{k}", _with_head(plan, 1.0, 0.0), {"steps": 2}, start)
    assert outliers(shelf.updates, Admission(norm_factor=10.0)) == []


def test_a_feature_head_is_compared_with_the_others_heads(plan: Plan, tmp_path: Path) -> None:
    (found,) = outliers(_headed_round(plan, tmp_path, [1.0, 2.0, 3.0, 100.0]).updates, Admission(norm_factor=10.0))
    assert (found.site, found.rule) == ("labeled-3", RejectionRule.CHANGE_TOO_LARGE)
    assert "feature head" in found.reason


@pytest.mark.parametrize(("change", "head_steps"), [(0.0, 5), (1.0, 0)])
def test_a_feature_head_must_change_if_and_only_if_it_took_steps(
    change: float, head_steps: int, plan: Plan, tmp_path: Path
) -> None:
    (found,) = outliers(_headed_round(plan, tmp_path, [change], head_steps).updates, Admission())
    assert (found.site, found.rule) == ("labeled-0", RejectionRule.STEPS)


ROBUST = {
    "median": Aggregation(rule="median", weights="equal", minimum_sites=5),
    "trimmed-mean": Aggregation(rule="trimmed-mean", weights="equal", minimum_sites=5),
    "krum": Aggregation(rule="krum", weights="equal", minimum_sites=5),
    "multi-krum": Aggregation(rule="multi-krum", weights="equal", minimum_sites=5),
}
MEAN = Aggregation(weights="equal")


def _distance(plan: Plan, policy: Aggregation, attack: float) -> float:
    """Return how far one sign-flipped update moves a round's result from that of the honest updates alone.

    The unit is the honest change; honest sites differ by up to a tenth of it.
    """
    honest = [_noisy(plan, k) for k in range(4)]
    updates = [MemoryUpdate(f"s{k}", weights, {}) for k, weights in enumerate([*honest, _moved(plan, attack)])]
    combined = combine(updates, votes(updates, [0.2] * 5, policy), policy)
    start, further = initial(plan), trained(plan)
    ideal = {name: sum(each[name] for each in honest) / len(honest) for name in start}
    change = sum(float((further[name] - start[name]).square().sum()) for name in start) ** 0.5
    return float(sum(float((combined[name] - ideal[name]).square().sum()) for name in start)) ** 0.5 / change


def _noisy(plan: Plan, seed: int) -> dict[str, Tensor]:
    return {
        name: value + trained(plan, 10 + seed, 0.001)[name] - initial(plan)[name]
        for name, value in trained(plan).items()
    }


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("attack", [-1.0, -9.0])
def test_a_flipped_update_of_normal_size_moves_robust_rules_little_and_the_mean_a_lot(
    rule: str, attack: float, plan: Plan
) -> None:
    """Admission cannot detect a change of normal size; the mean of five follows it a fifth of the way."""
    assert _distance(plan, ROBUST[rule], attack) < 0.15
    assert _distance(plan, MEAN, attack) > 0.18 * (1 - attack)
