"""What a site may say about its scans: rounded aggregates over enough patients, and nothing else."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.data.fingerprint import CaseFacts, fingerprint, fingerprint_scalars
from semisam_core.small_numbers import BUCKETS
from tests.conftest import tiny_plan

TASK = tiny_plan("pseudo_labels.generalists=[lite-medsam]").task
_length = st.floats(0.3, 300)


@st.composite
def _facts(draw: st.DrawFn) -> CaseFacts:
    values = sorted(draw(st.lists(st.floats(-2000, 2000), min_size=3, max_size=3)))
    return CaseFacts(
        patient=draw(st.sampled_from("abcdefghij")),
        spacing_mm=(draw(_length), draw(_length), draw(_length)),
        extent_mm=(draw(_length), draw(_length), draw(_length)),
        intensities=np.array([values]),
        volumes_ml=draw(st.just({}) | st.fixed_dictionaries({"blob": st.floats(0.01, 900)})),
        foreground=draw(st.none() | st.just(np.array([values]) / 2)),
    )


def _case(patient: str, spacing: float = 1.0, volume: float | None = None) -> CaseFacts:
    sides = (spacing, spacing, spacing)
    volumes = {} if volume is None else {"blob": volume}
    return CaseFacts(patient, sides, (100.0, 100.0, 100.0), np.array([[0.0, 50.0, 100.0]]), volumes)


@settings(max_examples=60, deadline=None)
@given(cases=st.lists(_facts(), max_size=30), minimum=st.integers(1, 8), seed=st.integers(0, 99))
def test_it_has_agreed_names_only_and_does_not_depend_on_the_order(
    cases: list[CaseFacts], minimum: int, seed: int
) -> None:
    found = fingerprint(cases, TASK, minimum)
    assert set(found) <= set(fingerprint_scalars(TASK))
    mixed = random.Random(seed).sample(cases, len(cases))
    assert found == fingerprint(mixed, TASK, minimum)
    if len({case.patient for case in cases}) < minimum:
        assert found == {"patients": 0}


def test_too_few_patients_say_nothing_however_many_scans_they_have() -> None:
    assert fingerprint([_case("a")] * 20 + [_case("b")] * 20, TASK, 5) == {"patients": 0}


def test_volumes_need_enough_labeled_patients_of_their_own() -> None:
    cases = [_case(f"p{k}", volume=3.0 if k < 4 else None) for k in range(9)]
    assert not [name for name in fingerprint(cases, TASK, 5) if name.startswith("volume_ml")]
    cases = [_case(f"p{k}", volume=3.0 if k < 5 else None) for k in range(9)]
    assert fingerprint(cases, TASK, 5)["volume_ml.blob.median"] == 3.0


def test_one_patient_more_or_less_is_not_seen_in_the_count() -> None:
    counts = {n: fingerprint([_case(f"p{k}") for k in range(n)], TASK, 5)["patients"] for n in (10, 11, 19, 20)}
    assert counts == {10: 10, 11: 10, 19: 10, 20: 20}
    assert all(each in BUCKETS for each in counts.values())
    few = {n: fingerprint([_case(f"p{k}") for k in range(n)], TASK, 1)["patients"] for n in (1, 2, 4)}
    assert few == {1: 1, 2: 1, 4: 1}


def test_values_are_rounded() -> None:
    cases = [_case(f"p{k}", spacing=1.0123 + k / 1e4, volume=3.14159) for k in range(7)]
    found = fingerprint(cases, TASK, 5)
    assert found["spacing_mm.right-left.median"] == 1.0
    assert found["volume_ml.blob.p90"] == 3.1


def test_whole_scans_and_what_is_labeled_are_not_mixed() -> None:
    """On CT, whole scans are mostly air: a few labeled ones must not be lost among them."""
    air, liver = np.array([[-1000.0, -900.0, 400.0]]), np.array([[20.0, 100.0, 180.0]])
    sides = (1.0, 1.0, 1.0)
    cases = [CaseFacts(f"p{k}", sides, sides, air, {}, liver if k < 5 else None) for k in range(50)]
    found, channel = fingerprint(cases, TASK, 5), TASK.channels[0]
    assert [found[f"foreground.{channel}.{which}"] for which in ("p0_5", "median", "p99_5")] == [20, 100, 180]
    assert found[f"intensity.{channel}.median"] == -900
    assert f"foreground.{channel}.median" not in fingerprint(cases[1:], TASK, 5)  # four labeled patients


def test_with_enough_patients_an_extreme_one_moves_nothing_to_its_own_value() -> None:
    cases = [_case(f"p{k}", spacing=1.0, volume=50.0) for k in range(30)] + [_case("giant", spacing=9.0, volume=800.0)]
    assert not {9.0, 800.0} & set(fingerprint(cases, TASK, 5).values())
