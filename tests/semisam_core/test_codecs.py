"""Codecs: what is smaller, what is lost, and that what is lost comes later."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from semisam_core.codecs import (
    CHANGE,
    CODECS,
    POSITIONS,
    SCALES,
    VALUES,
    Codec,
    decode_update,
    encode_update,
    leaving_bytes,
    leaving_spec,
    nothing_owed,
)
from semisam_core.contract import HEAD_PREFIX, TensorSpec, tensor_specs, update_spec
from semisam_core.plan import Plan
from semisam_core.plan_sections.aggregation import CodecSettings
from tests.conftest import tiny_plan

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5)
LARGE = ("specialist.arguments.channels=[16, 32, 64]", "specialist.arguments.strides=[2, 2]")


def _plan(name: str, *more: str) -> Plan:
    return tiny_plan(f"aggregation.codec={{name: {name}}}", *more)


def _codec(name: str, shapes: list[tuple[int, ...]], kept_share: float = 0.05) -> Codec:
    spec = {f"layer.{k}": TensorSpec(shape, torch.float32) for k, shape in enumerate(shapes)}
    return CODECS[name](CodecSettings.model_validate({"name": name, "kept_share": kept_share}), spec)


def _random(plan: Plan, seed: int, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spec = update_spec(plan)
    return {name: size * torch.randn(each.shape, generator=generator) for name, each in spec.items()}


def _changed(weights: dict[str, Tensor], seed: int, plan: Plan, size: float = 0.01) -> dict[str, Tensor]:
    return {
        name: value + each
        for (name, value), each in zip(weights.items(), _random(plan, seed, size).values(), strict=True)
    }


@pytest.mark.parametrize("name", CODECS)
@given(shapes=SHAPES, seed=st.integers(0, 99), exponent=st.integers(-6, 4))
def test_coded_tensors_are_as_the_spec_says_whatever_the_values(
    name: str, shapes: list[tuple[int, ...]], seed: int, exponent: int
) -> None:
    codec = _codec(name, shapes)
    count = sum(torch.zeros(shape).numel() for shape in shapes)
    changes = 10.0**exponent * torch.randn(count, generator=torch.Generator().manual_seed(seed))
    coded = codec.encode(changes)
    assert tensor_specs(coded) == codec.spec
    assert codec.decode(coded).shape == changes.shape
    assert bool((codec.decode(codec.encode(torch.zeros(count))) == 0).all())


@given(shapes=SHAPES, seed=st.integers(0, 99))
def test_int8_is_off_by_at_most_half_a_127th_of_its_tensors_largest_change(
    shapes: list[tuple[int, ...]], seed: int
) -> None:
    codec = _codec("int8", shapes)
    generator = torch.Generator().manual_seed(seed)
    parts = [10.0**k * torch.randn(shape, generator=generator).flatten() for k, shape in enumerate(shapes)]
    found = torch.split(codec.decode(codec.encode(torch.cat(parts))), [part.numel() for part in parts])
    for part, decoded in zip(parts, found, strict=True):
        if part.numel():
            assert float((part - decoded).abs().max()) <= float(part.abs().max()) / 254 * (1 + 1e-5)


@given(values=st.lists(st.floats(-60_000, 60_000, width=32), min_size=1, max_size=20))
def test_float16_is_rounded_to_the_nearest(values: list[float]) -> None:
    codec, changes = _codec("float16", [(len(values),)]), torch.tensor(values)
    assert torch.equal(codec.decode(codec.encode(changes)), changes.half().float())


@given(values=st.lists(st.integers(-9, 9), min_size=1, max_size=30), share=st.floats(0.01, 0.5))
def test_top_k_keeps_the_largest_exactly_and_nothing_else(values: list[int], share: float) -> None:
    codec, changes = _codec("top-k", [(len(values),)], share), torch.tensor(values, dtype=torch.float32)
    decoded = codec.decode(codec.encode(changes))
    kept = codec.spec[VALUES].shape[0]
    # The obvious way: sort by size, of equal ones the first.
    order = sorted(range(len(values)), key=lambda k: (-abs(values[k]), k))[:kept]
    assert decoded.tolist() == [float(values[k]) if k in order else 0.0 for k in range(len(values))]


def test_top_k_keeps_its_share_of_the_feature_head_too_however_small_its_changes() -> None:
    settings_ = CodecSettings(name="top-k", kept_share=0.1)
    spec = {"layer": TensorSpec((50,), torch.float32), HEAD_PREFIX + "layer": TensorSpec((30,), torch.float32)}
    codec = CODECS["top-k"](settings_, spec)
    decoded = codec.decode(codec.encode(torch.cat([torch.full((50,), 9.0), torch.full((30,), 1e-3)])))
    assert ((decoded[:50] != 0).sum(), (decoded[50:] != 0).sum()) == (5, 3)


@pytest.mark.parametrize(
    ("name", "times"), [("float16", 2.0), ("int8", 3.9), ("top-k", 9.9)], ids=lambda value: str(value)
)
def test_an_update_is_so_many_times_smaller(name: str, times: float) -> None:
    plain, coded = leaving_bytes(tiny_plan(*LARGE)), leaving_bytes(_plan(name, *LARGE))
    assert plain / coded >= times


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_what_is_sent_and_what_is_owed_are_together_what_changed(name: str, seed: int) -> None:
    plan = _plan(name)
    weights, owed = _random(plan, seed), nothing_owed(plan)
    held = dict(weights)
    for number in range(3):
        # As in a study: each change starts from what the receiver holds.
        update = _changed(held, seed + number, plan)
        wanted = {key: update[key] + owed[key] for key in held}
        coded, owed = encode_update(update, held, owed, plan)
        assert tensor_specs(coded) == leaving_spec(plan)
        held = decode_update(coded, held, plan)
        for key in held:
            torch.testing.assert_close(held[key] + owed[key], wanted[key], rtol=0, atol=1e-6)


def test_without_what_is_owed_most_of_a_steady_change_would_never_arrive() -> None:
    plan = _plan("top-k")
    start = _random(plan, 0)
    step = _random(plan, 1, 0.01)
    held, forgetful, owed = dict(start), dict(start), nothing_owed(plan)
    for _ in range(60):
        coded, owed = encode_update({key: held[key] + step[key] for key in held}, held, owed, plan)
        held = decode_update(coded, held, plan)
        coded, _ = encode_update({key: forgetful[key] + step[key] for key in held}, forgetful, nothing_owed(plan), plan)
        forgetful = decode_update(coded, forgetful, plan)

    def arrived(found: dict[str, Tensor]) -> float:
        missing = sum(float((start[key] + 60 * step[key] - found[key]).square().sum()) for key in start)
        return 1 - missing / sum(float((60 * step[key]).square().sum()) for key in start)

    assert arrived(held) > 0.9
    assert arrived(forgetful) < 0.5


@pytest.mark.parametrize("name", CODECS)
def test_a_tensor_that_did_not_change_is_sent_as_unchanged_and_still_owed(name: str) -> None:
    plan = _plan(name)
    weights = _random(plan, 0)
    owed = _random(plan, 1, 0.1)
    still, moving = list(weights)[:2], list(weights)[2:]
    update = {key: value + 0.5 if key in moving else value.clone() for key, value in weights.items()}
    coded, left = encode_update(update, weights, owed, plan)
    decoded = decode_update(coded, weights, plan)
    for key in still:
        assert torch.equal(decoded[key], weights[key])
        assert torch.equal(left[key], owed[key])
    assert any(not torch.equal(decoded[key], weights[key]) for key in moving)


def test_tensors_of_whole_numbers_travel_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan("int8")
    spec = {"layer": TensorSpec((4,), torch.float32), "index": TensorSpec((3,), torch.int64)}
    monkeypatch.setattr("semisam_core.codecs.update_spec", lambda _: spec)
    held = {"layer": torch.zeros(4), "index": torch.tensor([1, 2, 3])}
    update = {"layer": torch.tensor([1.0, -1.0, 0.0, 127.0]), "index": torch.tensor([3, 2, 1])}
    coded, owed = encode_update(update, held, nothing_owed(plan), plan)
    assert set(coded) == {CHANGE, SCALES, "index"}
    assert set(owed) == {"layer"}
    decoded = decode_update(coded, held, plan)
    assert list(decoded) == list(spec)
    assert all(torch.equal(decoded[name], update[name]) for name in spec)


@pytest.mark.parametrize(
    "positions",
    [
        pytest.param(lambda found: found.flip(0), id="descending"),
        pytest.param(lambda found: torch.cat([found[:1], found[:-1]]), id="twice"),
        pytest.param(lambda found: torch.cat([torch.tensor([-1], dtype=torch.int32), found[1:]]), id="negative"),
        pytest.param(lambda found: torch.cat([found[:-1], torch.tensor([2**31 - 1], dtype=torch.int32)]), id="beyond"),
    ],
)
def test_positions_that_no_site_sends_are_refused(positions: object) -> None:
    plan = _plan("top-k")
    weights = _random(plan, 0)
    coded, _ = encode_update(_changed(weights, 1, plan), weights, nothing_owed(plan), plan)
    hostile = coded | {POSITIONS: positions(coded[POSITIONS])}  # type: ignore[operator]
    with pytest.raises(ValueError, match="positions"):
        decode_update(hostile, weights, plan)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_change_that_is_not_finite_or_too_large_is_an_error_not_a_debt(name: str, value: float) -> None:
    plan = _plan(name)
    weights = _random(plan, 0)
    update = {key: each.clone() for key, each in weights.items()}
    next(iter(update.values())).view(-1)[0] = value
    if (name, value) in {("int8", 3e38), ("top-k", 3e38)}:
        coded, _ = encode_update(update, weights, nothing_owed(plan), plan)
        assert all(bool(each.isfinite().all()) for each in decode_update(coded, weights, plan).values())
        return
    with pytest.raises(FloatingPointError, match=f"too large for the codec {name}"):
        encode_update(update, weights, nothing_owed(plan), plan)


def test_a_plan_without_a_codec_has_the_hash_that_it_had_before_there_were_codecs() -> None:
    assert tiny_plan("aggregation.codec=null").hash == tiny_plan().hash
    assert "codec" not in tiny_plan().canonical_json()
    assert len({_plan(name).hash for name in CODECS} | {tiny_plan().hash}) == 1 + len(CODECS)


def test_a_codec_cannot_be_combined_with_a_secure_sum() -> None:
    secure = (
        "aggregation.minimum_sites=3",
        "aggregation.weights=equal",
        "aggregation.admission={norm_factor: null}",
        "aggregation.secure={}",
    )
    tiny_plan(*secure)
    with pytest.raises(ValidationError, match="set codec to null, or secure to null"):
        _plan("float16", *secure)


@pytest.mark.parametrize("wrong", ["{name: zip}", "{name: top-k, kept_share: 0.0}", "{name: top-k, kept_share: 0.6}"])
def test_what_is_no_codec_is_refused(wrong: str) -> None:
    with pytest.raises(ValidationError):
        tiny_plan(f"aggregation.codec={wrong}")
