"""How updates are weighted and combined."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.aggregation.weighted_mean import weighted_mean
from semisam_core.plan_sections.aggregation import Aggregation
from server.aggregation import evidence_weights
from server.updates import MemoryUpdate


def _update(site: str, value: float, **scalars: float) -> MemoryUpdate:
    counts = {"labeled": 1.0, "unlabeled": 0.0, "accepted": 0.0, "confidence": 1.0, "steps": 1.0} | scalars
    return MemoryUpdate(site, {"w": torch.full((2, 2), value)}, counts)


def test_a_withheld_confidence_counts_as_the_mean_of_the_others() -> None:
    policy = Aggregation(weights="confidence", unlabeled_share=1.0)
    scalars = {"labeled": 0.0, "accepted": 4.0}
    known = [_update("a", 0, **scalars | {"confidence": 0.2}), _update("b", 0, **scalars | {"confidence": 0.6})]
    silent = _update("c", 0, **scalars)
    without = MemoryUpdate("c", silent.weights, {k: v for k, v in silent.scalars.items() if k != "confidence"})
    assert evidence_weights([*known, without], policy, 1.0) == pytest.approx([0.2 / 1.2, 0.6 / 1.2, 0.4 / 1.2])
    assert evidence_weights([without, without], policy, 1.0) == pytest.approx([0.5, 0.5])


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_the_mean_equals_the_obvious_one_in_any_order(values: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = (torch.rand(len(values), generator=generator) + 0.01).double()
    shares = (raw / raw.sum()).tolist()
    updates = [_update(f"s{k}", value) for k, value in enumerate(values)]
    expected = sum(share * value for share, value in zip(shares, values, strict=True))
    mean = weighted_mean(updates, shares)
    assert torch.allclose(mean["w"].double(), torch.full((2, 2), expected, dtype=torch.float64), atol=1e-4)
    turned = weighted_mean(updates[::-1], shares[::-1])
    assert torch.equal(mean["w"], turned["w"])


def test_the_order_of_arrival_does_not_decide_the_sum() -> None:
    """Even in double precision these sums depend on their order: small terms are lost until the large ones cancel."""
    values = {"a": 1e16, "b": 1.0, "c": -1e16, "d": 3.0}
    updates, share = [_update(site, value) for site, value in values.items()], 1 / len(values)
    naive = {sum(share * value for value in order) for order in itertools.permutations(values.values())}
    assert len(naive) > 1
    means = {float(weighted_mean(order, [share] * 4)["w"][0, 0]) for order in itertools.permutations(updates)}
    assert means == {sum(share * value for value in values.values())}


def test_the_sum_is_accumulated_in_double_precision() -> None:
    updates = [_update("a", 1e8), _update("b", 1.0), _update("c", -1e8)]
    assert float(weighted_mean(updates, [1 / 3] * 3)["w"][0, 0]) == pytest.approx(1 / 3, abs=1e-6)


def test_the_mean_of_identical_updates_is_that_update() -> None:
    updates = [_update("a", 0.1), _update("b", 0.1), _update("c", 0.1)]
    assert torch.equal(weighted_mean(updates, [0.2, 0.3, 0.5])["w"], updates[0].weights["w"])


def test_dtypes_are_kept() -> None:
    updates = [MemoryUpdate("a", {"n": torch.tensor([3])}, {}), MemoryUpdate("b", {"n": torch.tensor([3])}, {})]
    assert weighted_mean(updates, [0.5, 0.5])["n"].dtype == torch.int64


def test_samples_weights_by_scans_and_equal_by_sites() -> None:
    updates = [_update("a", 0, labeled=1), _update("b", 0, labeled=0, unlabeled=9, accepted=9)]
    assert evidence_weights(updates, Aggregation(weights="samples"), 0.5) == pytest.approx([0.1, 0.9])
    assert evidence_weights(updates, Aggregation(weights="equal"), 0.5) == pytest.approx([0.5, 0.5])


def test_accepted_pseudo_labels_count_more_as_the_study_goes_on() -> None:
    policy = Aggregation(weights="evidence", unlabeled_share=0.5)
    updates = [_update("a", 0, labeled=2), _update("b", 0, labeled=0, unlabeled=4, accepted=4)]
    for progress in (0.25, 0.5, 1.0):
        pseudo = 0.5 * 4 * math.exp(-5 * (1 - progress) ** 2)
        expected = [2 / (2 + pseudo), pseudo / (2 + pseudo)]
        assert evidence_weights(updates, policy, progress) == pytest.approx(expected)


def test_evidence_does_not_let_pseudo_labels_drown_expert_masks() -> None:
    policy = Aggregation(weights="evidence", unlabeled_share=0.001)
    updates = [_update("a", 0, labeled=3), _update("b", 0, labeled=0, unlabeled=2000, accepted=1000)]
    early, late = (evidence_weights(updates, policy, progress) for progress in (0.05, 1.0))
    assert late == pytest.approx([0.75, 0.25], abs=0.05)
    assert early[1] < late[1]


@settings(deadline=None, max_examples=50)
@given(
    counts=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 500)), min_size=1, max_size=6),
    rule=st.sampled_from(["samples", "equal", "evidence", "confidence"]),
    progress=st.floats(0.01, 1),
)
def test_shares_are_non_negative_and_sum_to_one_or_there_is_an_error(
    counts: list[tuple[int, int]], rule: str, progress: float
) -> None:
    policy = Aggregation.model_validate({"weights": rule})
    updates = [_update(f"s{k}", 0, labeled=n, unlabeled=m, accepted=m) for k, (n, m) in enumerate(counts)]
    if rule != "equal" and all(n == m == 0 for n, m in counts):
        with pytest.raises(ValueError, match="anything to learn"):
            evidence_weights(updates, policy, progress)
        return
    shares = evidence_weights(updates, policy, progress)
    assert sum(shares) == pytest.approx(1)
    assert all(share >= 0 for share in shares)


@pytest.mark.parametrize("rule", ["samples", "equal", "evidence", "confidence"])
def test_a_site_that_took_no_steps_has_no_weight(rule: str) -> None:
    updates = [_update("a", 0), _update("b", 0, steps=0)]
    assert evidence_weights(updates, Aggregation.model_validate({"weights": rule}), 1.0) == [1.0, 0.0]


def test_no_evidence_at_all_is_an_error_instead_of_a_division_by_zero() -> None:
    with pytest.raises(ValueError, match="anything to learn"):
        evidence_weights([_update("a", 0, steps=0)], Aggregation(), 1.0)


CONFIDENCE = Aggregation(weights="confidence")
SITES = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 5000), st.floats(0, 1)).filter(lambda site: site[0] > 0),
    min_size=1,
    max_size=6,
)


def _sites(sites: list[tuple[int, int, float]]) -> list[MemoryUpdate]:
    return [
        _update(f"s{k}", 0, labeled=labeled, unlabeled=accepted, accepted=accepted, confidence=confidence)
        for k, (labeled, accepted, confidence) in enumerate(sites)
    ]


@settings(deadline=None, max_examples=100)
@given(sites=SITES, progress=st.floats(0, 1))
def test_shares_by_confidence_are_non_negative_and_sum_to_one(
    sites: list[tuple[int, int, float]], progress: float
) -> None:
    shares = evidence_weights(_sites(sites), CONFIDENCE, progress)
    assert sum(shares) == pytest.approx(1)
    assert all(share >= 0 for share in shares)


@settings(deadline=None, max_examples=100)
@given(sites=SITES, progress=st.floats(0, 1), more=st.floats(0, 1))
def test_more_confidence_never_lowers_a_sites_weight_nor_raises_the_others(
    sites: list[tuple[int, int, float]], progress: float, more: float
) -> None:
    labeled, accepted, confidence = sites[0]
    surer = [(labeled, accepted, max(confidence, more)), *sites[1:]]
    before, after = (evidence_weights(_sites(each), CONFIDENCE, progress) for each in (sites, surer))
    assert after[0] >= before[0] - 1e-12
    assert all(late <= early + 1e-12 for early, late in zip(before[1:], after[1:], strict=True))


@settings(deadline=None, max_examples=50)
@given(accepted=st.integers(0, 100_000), progress=st.floats(0, 1), unlabeled_share=st.floats(0, 1))
def test_an_unlabeled_site_without_confidence_has_no_weight(
    accepted: int, progress: float, unlabeled_share: float
) -> None:
    policy = Aggregation(weights="confidence", unlabeled_share=unlabeled_share)
    assert evidence_weights(_sites([(1, 0, 0.0), (0, accepted, 0.0)]), policy, progress) == [1.0, 0.0]


def test_no_labels_and_no_confidence_anywhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="anything to learn"):
        evidence_weights(_sites([(0, 50, 0.0), (0, 9, 0.0)]), CONFIDENCE, 1.0)


@settings(deadline=None, max_examples=50)
@given(
    labeled=st.integers(3, 20),
    accepted=st.integers(1000, 5000),
    confidence=st.floats(0, 0.25),
    progress=st.floats(0, 0.05),
)
def test_thousands_of_unsure_pseudo_labels_do_not_drown_a_few_expert_masks_early(
    labeled: int, accepted: int, confidence: float, progress: float
) -> None:
    experts, crowd = evidence_weights(_sites([(labeled, 0, 0.0), (0, accepted, confidence)]), CONFIDENCE, progress)
    assert experts > crowd


@settings(deadline=None, max_examples=50)
@given(sites=SITES, progress=st.floats(0, 1))
def test_full_confidence_equals_evidence_and_less_gives_less_weight(
    sites: list[tuple[int, int, float]], progress: float
) -> None:
    evidence = Aggregation(weights="evidence")
    certain = [(labeled, accepted, 1.0) for labeled, accepted, _ in sites]
    assert evidence_weights(_sites(certain), CONFIDENCE, progress) == evidence_weights(
        _sites(sites), evidence, progress
    )
    crowd = [(1, 0, 0.0), (0, sites[0][1], sites[0][2])]
    sure, counted = (evidence_weights(_sites(crowd), policy, progress)[1] for policy in (CONFIDENCE, evidence))
    assert sure <= counted + 1e-12


def test_a_pseudo_labeled_scan_counts_once_however_many_classes_it_has() -> None:
    policy = Aggregation(weights="evidence", unlabeled_share=0.2)
    one = [_update("a", 0, labeled=2), _update("b", 0, labeled=0, unlabeled=9, accepted=9)]
    three = [_update("a", 0, labeled=2), _update("b", 0, labeled=0, unlabeled=9, accepted=27)]
    assert evidence_weights(three, policy, 1.0, classes=3) == pytest.approx(evidence_weights(one, policy, 1.0))
