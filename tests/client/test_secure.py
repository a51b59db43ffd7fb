"""A site's part in a secure sum: sites against a server that plays by the rules, and against one that does not."""

from __future__ import annotations

import json
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from client.secure import SecureAggregationError, SecureRound, UpdateTooLargeError, keys_sha256
from semisam_core.contract import (
    HEAD,
    HEAD_PREFIX,
    KEY_SHARE,
    MASK_KEY,
    MASKED_VECTOR,
    SEED_SHARE,
    SHARE_KEY,
    initial_head,
    update_spec,
)
from semisam_core.contract import SEALED_FOR as FOR
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.secure_aggregation.fixed_point import encode, without_head
from semisam_core.secure_aggregation.masks import add_mask, pair_key, pair_sign, recover_secret
from semisam_core.secure_aggregation.weights import WholeWeights
from tests.conftest import tiny_plan

NAMES = ("alpha", "beta", "delta", "gamma")
SECURE = "aggregation={secure: {}, admission: {norm_factor: null}, minimum_sites: 3, weights: equal}"
FEATURE_HEAD = (
    "pseudo_labels.method=evidence",
    "pseudo_labels.sources={feature_head: {generalist: fake, reduced_channels: 4, hidden_channels: 4}}",
)
FIRST, SECOND = "a" * 32, "b" * 32
Keys = dict[str, list[bytes]]


class Sites:
    """Sites with an update each, and the messages of a server."""

    def __init__(self, folder: Path, plan: Plan, heads: Mapping[str, int] | None = None, names: Any = NAMES) -> None:
        self.folder, self.plan = folder, plan
        self.spec = update_spec(plan)
        self.reference: dict[str, Tensor] = dict(new_specialist(plan).state_dict()) | initial_head(plan)
        self.plain: dict[str, NDArray[np.uint64]] = {}
        for k, name in enumerate(names):
            weights = WholeWeights(4 * (k + 1), (heads or {}).get(name, 0))
            update = self.update(k)
            self.at(name).keep(update, self.reference, weights)
            self.plain[name] = encode(update, self.reference, self.spec, weights)

    def update(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in self.reference.items()
        }

    def at(self, name: str, number: int = 1) -> SecureRound:
        """Return a site as a fresh process sees it: from its disk."""
        return SecureRound(self.folder / name, name, self.plan, number)

    def secrets(self, name: str) -> dict[str, Any]:
        path = self.folder / name / "secure" / "state.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def keys(self, *names: str, attempt: str = FIRST) -> Keys:
        found = {name: self.at(name).keys(attempt) for name in names}
        return {name: [each[MASK_KEY], each[SHARE_KEY], each[HEAD]] for name, each in found.items()}

    def shares(self, keys: Keys, *names: str, attempt: str = FIRST) -> dict[str, dict[str, bytes]]:
        """Return receiver -> sender -> sealed shares, of the sites that answer."""
        sent = {name: self.at(name).shares(attempt, keys) for name in names}
        return {to: {by: sent[by][FOR + to] for by in names if by != to} for to in names}

    def masked(self, sealed: dict[str, dict[str, bytes]], *names: str, attempt: str = FIRST) -> dict[str, Any]:
        return {
            name: self.at(name).masked(attempt, sealed[name])[MASKED_VECTOR].numpy().view(np.uint64) for name in names
        }

    def begun(self, *names: str, attempt: str = FIRST) -> tuple[Keys, dict[str, dict[str, bytes]]]:
        keys = self.keys(*names, attempt=attempt)
        return keys, self.shares(keys, *names, attempt=attempt)

    def unmask(self, active: Any, dropped: Any = (), attempt: str = FIRST) -> dict[str, dict[str, bytes]]:
        return {name: self.at(name).unmask(attempt, list(active), list(dropped)) for name in active}


def remove_masks(
    total: NDArray[np.uint64],
    keys: Keys,
    released: Mapping[str, dict[str, bytes]],
    dropped: Any,
    needed: int,
    active: Any = None,
) -> NDArray[np.uint64]:
    """Remove the masks as a server does, with the shares that it was given; by default all active sites gave theirs."""
    names, total = sorted(keys), total.copy()
    active = sorted(released) if active is None else active
    for name in active:
        seed = recover_secret({holder: each[SEED_SHARE + name] for holder, each in released.items()}, needed, names)
        add_mask(total, seed, -1)
    for name in dropped:
        key = recover_secret({holder: each[KEY_SHARE + name] for holder, each in released.items()}, needed, names)
        for other in active:
            add_mask(total, pair_key(key, keys[other][0]), -pair_sign(other, name))
    return total


@pytest.fixture
def sites(tmp_path: Path) -> Sites:
    return Sites(tmp_path, tiny_plan(SECURE))


def test_the_sum_of_masked_vectors_is_the_plain_sum_and_single_ones_are_noise(sites: Sites) -> None:
    keys, sealed = sites.begun(*NAMES)
    vectors = sites.masked(sealed, *NAMES)
    total = sum(vectors.values(), np.uint64(0))
    found = remove_masks(total, keys, sites.unmask(NAMES), (), 3)
    assert np.array_equal(found, sum(sites.plain.values(), np.uint64(0)))
    for name, vector in vectors.items():
        rest = vector - sites.plain[name]
        assert len(np.unique(rest)) == len(rest)
        bits = np.unpackbits(vector.view(np.uint8)).mean()
        assert abs(bits - 0.5) < 6 * 0.5 / np.sqrt(64 * len(vector))


@pytest.mark.parametrize("lost_at", ["shares", "masked", "unmask"])
def test_a_site_lost_at_any_stage_is_recovered_from(sites: Sites, lost_at: str) -> None:
    rest = NAMES[:3]
    keys = sites.keys(*NAMES)
    sealed = sites.shares(keys, *(rest if lost_at == "shares" else NAMES))
    vectors = sites.masked(sealed, *(NAMES if lost_at == "unmask" else rest))
    dropped = [NAMES[3]] if lost_at == "masked" else []
    released = {name: sites.at(name).unmask(FIRST, list(vectors), dropped) for name in rest}
    total = sum(vectors.values(), np.uint64(0))
    found = remove_masks(total, keys, released, dropped, 3, list(vectors))
    assert np.array_equal(found, sum((sites.plain[name] for name in vectors), np.uint64(0)))


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_whoever_is_lost_the_rest_completes_the_sum_of_all_vectors_that_came(data: st.DataObject) -> None:
    names = sorted(data.draw(st.permutations([*NAMES, "omega", "zeta"])))[: data.draw(st.integers(4, 6))]
    with tempfile.TemporaryDirectory() as folder:
        sites = Sites(Path(folder), tiny_plan(SECURE), names=names)
        policy = sites.plan.aggregation.secure
        assert policy is not None
        needed = policy.shares_needed(len(names))
        least = max(3, needed)
        keys = sites.keys(*names)
        some = st.lists(st.sampled_from(names), max_size=len(names) - least, unique=True)
        lost, gone = data.draw(some), data.draw(some)
        sharing = (
            [name for name in names if name not in lost] if len(set(lost) | set(gone)) <= len(names) - least else names
        )
        sealed = sites.shares(keys, *sharing)
        active = [name for name in sharing if name not in gone]
        vectors = sites.masked(sealed, *active)
        dropped = [name for name in sharing if name in gone]
        answering = data.draw(st.permutations(active))[: data.draw(st.integers(needed, len(active)))]
        released = {name: sites.at(name).unmask(FIRST, active, dropped) for name in answering}
        found = remove_masks(sum(vectors.values(), np.uint64(0)), keys, released, dropped, needed, active)
        assert np.array_equal(found, sum((sites.plain[name] for name in active), np.uint64(0)))


def test_a_vector_that_comes_late_stays_masked_though_its_sites_key_was_recovered(sites: Sites) -> None:
    keys, sealed = sites.begun(*NAMES)
    vectors = sites.masked(sealed, *NAMES)  # gamma's arrives after the server has given it up
    released = {name: sites.at(name).unmask(FIRST, list(NAMES[:3]), ["gamma"]) for name in NAMES[:3]}
    key = recover_secret({h: each[KEY_SHARE + "gamma"] for h, each in released.items()}, 3, sorted(keys))
    late = vectors["gamma"].copy()
    for other in NAMES[:3]:
        add_mask(late, pair_key(key, keys[other][0]), -pair_sign("gamma", other))
    left = late - sites.plain["gamma"]
    assert len(np.unique(left)) == len(left)
    assert not any(SEED_SHARE + "gamma" in each for each in released.values())


def test_no_site_releases_both_shares_of_another(sites: Sites) -> None:
    _, sealed = sites.begun(*NAMES)
    sites.masked(sealed, *NAMES)
    for active, dropped in ((NAMES, ["gamma"]), (NAMES[:3], []), (NAMES[:3], ["gamma", "beta"]), (NAMES, ["other"])):
        with pytest.raises(SecureAggregationError, match="not those of this attempt, once each"):
            sites.at("alpha").unmask(FIRST, list(active), list(dropped))
    with pytest.raises(SecureAggregationError, match="own masked vector"):
        sites.at("alpha").unmask(FIRST, list(NAMES[1:]), ["alpha"])
    first = sites.at("alpha").unmask(FIRST, list(NAMES[:3]), ["gamma"])
    assert KEY_SHARE + "gamma" in first
    assert SEED_SHARE + "gamma" not in first
    for active, dropped in ((NAMES, []), (NAMES[:3], ["gamma"])):
        with pytest.raises(SecureAggregationError, match="not the next one"):
            sites.at("alpha").unmask(FIRST, list(active), list(dropped))


def test_the_server_cannot_collect_a_threshold_of_both_shares_by_telling_sites_different_things(sites: Sites) -> None:
    """Half of the sites are told that gamma dropped out, the others that it did not: no threshold of either kind."""
    _, sealed = sites.begun(*NAMES)
    sites.masked(sealed, *NAMES)
    released = [sites.at(name).unmask(FIRST, list(NAMES[:3]), ["gamma"]) for name in ("alpha", "beta")]
    released += [sites.at(name).unmask(FIRST, list(NAMES), []) for name in ("delta", "gamma")]
    needed = sites.plan.aggregation.secure.shares_needed(4) if sites.plan.aggregation.secure else 0
    for prefix in (SEED_SHARE, KEY_SHARE):
        assert sum(prefix + "gamma" in each for each in released) < needed


def test_stages_out_of_turn_and_again_are_refused_and_make_no_second_masking(sites: Sites) -> None:
    keys, sealed = sites.begun(*NAMES)
    refused = pytest.raises(SecureAggregationError, match="not the next one")
    with refused:
        sites.at("alpha").unmask(FIRST, list(NAMES), [])
    with refused:
        sites.at("alpha").shares(FIRST, keys)  # a second split of the same secrets
    first = sites.masked(sealed, "alpha")
    for again in (sealed["alpha"], {name: sealed["alpha"][name] for name in ("beta", "delta")}):
        with refused:
            sites.at("alpha").masked(FIRST, again)
    with refused:
        sites.at("alpha").shares(FIRST, keys)
    # A new attempt: old messages do not fit it, and its mask is another.
    keys, again = sites.begun(*NAMES, attempt=SECOND)
    with pytest.raises(SecureAggregationError, match="not the next one"):
        sites.at("alpha").masked(FIRST, sealed["alpha"])
    with pytest.raises(SecureAggregationError, match="agreed on"):
        sites.at("alpha").masked(SECOND, sealed["alpha"])
    second = sites.masked(again, "alpha", attempt=SECOND)
    difference = first["alpha"] - second["alpha"]
    assert len(np.unique(difference)) == len(difference)


def test_secrets_are_private_on_disk_and_gone_as_soon_as_they_can_be(sites: Sites) -> None:
    folder = sites.folder / "alpha" / "secure"
    keys = sites.keys(*NAMES)
    old = sites.secrets("alpha")
    sealed = sites.shares(keys, *NAMES)
    seed = sites.secrets("alpha")["seed"]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"update.safetensors": 0o600, "state.json": 0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    sites.masked(sealed, *NAMES)
    left = json.dumps(sites.secrets("alpha"))
    assert seed not in left
    assert "PRIVATE" not in left
    assert "PRIVATE" in old["mask_key"]
    assert "PRIVATE" in old["share_key"]
    sites.unmask(NAMES)
    assert not folder.exists()
    assert {path.name for path in (sites.folder / "alpha").iterdir()} == {"released.jsonl"}


def test_the_private_keys_are_gone_before_the_masked_vector_is_made(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that dies while it masks cannot be made to mask again."""
    _, sealed = sites.begun(*NAMES)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("client.secure.add_all_masks", die)
    with pytest.raises(KeyboardInterrupt):
        sites.masked(sealed, "alpha")
    monkeypatch.undo()
    assert "PRIVATE" not in json.dumps(sites.secrets("alpha"))
    with pytest.raises(SecureAggregationError, match="not the next one"):
        sites.masked(sealed, "alpha")


def test_a_rounds_update_is_released_in_one_sum_only(sites: Sites) -> None:
    """Two sums that differ by one site would tell its update."""
    _, sealed = sites.begun(*NAMES)
    sites.masked(sealed, *NAMES)
    sites.unmask(NAMES)
    for k, name in enumerate(NAMES):  # the server says that it was killed, and lets the round be trained again
        sites.at(name).keep(sites.update(k), sites.reference, WholeWeights(4, 0))
    _, sealed = sites.begun(*NAMES[:3], attempt=SECOND)
    with pytest.raises(SecureAggregationError, match="released the round's update in a sum of other sites"):
        sites.masked(sealed, "alpha", attempt=SECOND)
    _, sealed = sites.begun(*NAMES, attempt=SECOND)
    sites.masked(sealed, *NAMES, attempt=SECOND)
    with pytest.raises(SecureAggregationError, match="released the round's update in another sum"):
        sites.at("alpha").unmask(SECOND, list(NAMES[:3]), ["gamma"])
    assert sites.unmask(NAMES, attempt=SECOND)  # the same sum once more tells nothing new


def test_an_update_goes_into_the_sum_of_its_round_alone(sites: Sites) -> None:
    with pytest.raises(SecureAggregationError, match="no update of this round"):
        sites.at("alpha", 2).keys(FIRST)
    sites.keys("alpha")
    with pytest.raises(SecureAggregationError, match="not the next one"):
        sites.at("alpha", 2).shares(FIRST, {})
    sites.at("alpha").discard()
    with pytest.raises(SecureAggregationError, match="no update of this round"):
        sites.at("alpha").keys(FIRST)


def _too_few(keys: Keys) -> Keys:
    return {name: keys[name] for name in ("alpha", "beta")}


def _stolen(keys: Keys) -> Keys:
    return keys | {"beta": keys["gamma"]}


def _swapped_own(keys: Keys) -> Keys:
    return keys | {"alpha": keys["beta"], "beta": keys["alpha"]}


def _without_me(keys: Keys) -> Keys:
    return {name: each for name, each in keys.items() if name != "alpha"}


def _head_flag(keys: Keys) -> Keys:
    return keys | {"alpha": [*keys["alpha"][:2], b"1"]}


def _not_keys(keys: Keys) -> Keys:
    return keys | {"beta": [b"x", b"y", b"0"]}


def _not_a_list(keys: Keys) -> Any:
    return keys | {"beta": b"x"}


def _bad_name(keys: Keys) -> Keys:
    return keys | {"../x": keys["beta"]}


def _not_ascii(keys: Keys) -> Keys:
    return keys | {"beta": [b"\xff", b"\xfe", b"0"]}


@pytest.mark.parametrize(
    "change",
    [_too_few, _stolen, _swapped_own, _without_me, _head_flag, _not_keys, _not_a_list, _bad_name, _not_ascii],
    ids=lambda change: change.__name__,
)
def test_a_list_of_keys_that_is_not_right_is_refused(sites: Sites, change: Callable[[Keys], Keys]) -> None:
    keys = sites.keys(*NAMES)
    with pytest.raises(SecureAggregationError, match=r"."):
        sites.at("alpha").shares(FIRST, change(keys))
    assert sites.secrets("alpha")["stage"] == "keys"
    sites.at("alpha").shares(FIRST, keys)


def test_altered_or_foreign_shares_are_refused_before_anything_is_masked(sites: Sites) -> None:
    _, sealed = sites.begun(*NAMES)
    good = sealed["alpha"]
    wrong: list[dict[str, Any]] = [
        {name: good[name] for name in ("beta",)},
        good | {"beta": good["gamma"]},
        good | {"beta": good["beta"][:-4] + b"AAA="},
        good | {"beta": sealed["gamma"]["beta"]},
        good | {"beta": 7},
        good | {"stranger": good["beta"]},
        good | {"alpha": good["beta"]},
    ]
    for each in wrong:
        with pytest.raises(SecureAggregationError, match=r"."):
            sites.at("alpha").masked(FIRST, each)
    assert sites.secrets("alpha")["stage"] == "shares"
    assert len(sites.masked(sealed, "alpha")["alpha"]) == len(sites.plain["alpha"])


def test_too_small_a_sum_is_never_released(sites: Sites) -> None:
    _, sealed = sites.begun(*NAMES)
    sites.masked(sealed, *NAMES)
    with pytest.raises(SecureAggregationError, match="a sum of 2 sites; this plan's has at least 3"):
        sites.at("alpha").unmask(FIRST, ["alpha", "beta"], ["delta", "gamma"])
    for active in (None, "alpha", ["alpha", "alpha", "beta", "delta"], [1, 2, 3], ["alpha", "../x", "beta"]):
        with pytest.raises(SecureAggregationError, match="malformed"):
            sites.at("alpha").unmask(FIRST, active, [])


@pytest.mark.parametrize(("trained", "summed"), [(2, False), (3, True)])
def test_heads_are_summed_if_enough_sites_trained_one(tmp_path: Path, trained: int, summed: bool) -> None:
    plan = tiny_plan(SECURE, *FEATURE_HEAD)
    sites = Sites(tmp_path, plan, dict.fromkeys(NAMES[:trained], 8))
    assert any(name.startswith(HEAD_PREFIX) for name in sites.spec)
    keys, sealed = sites.begun(*NAMES)
    vectors = sites.masked(sealed, *NAMES)
    found = remove_masks(sum(vectors.values(), np.uint64(0)), keys, sites.unmask(NAMES), (), 3)
    plain = [each if summed else without_head(each, sites.spec) for each in sites.plain.values()]
    assert np.array_equal(found, sum(plain, np.uint64(0)))
    assert bool(found[1]) == summed


def test_heads_of_too_few_sites_are_not_released_if_some_drop_out(tmp_path: Path) -> None:
    sites = Sites(tmp_path, tiny_plan(SECURE, *FEATURE_HEAD), dict.fromkeys(NAMES[:3], 8))
    _, sealed = sites.begun(*NAMES)
    sites.masked(sealed, *NAMES)
    with pytest.raises(SecureAggregationError, match="fewer than 3 of the sum's sites trained their feature head"):
        sites.at("beta").unmask(FIRST, list(NAMES[1:]), ["alpha"])


def test_an_update_that_is_too_large_or_not_finite_is_not_kept(sites: Sites) -> None:
    site, update = sites.at("alpha"), sites.update(0)
    name = next(iter(update))
    with pytest.raises(UpdateTooLargeError, match=r"specialist's change is .*; aggregation.secure.maximum_norm allows"):
        site.keep(update | {name: update[name] + 1000}, sites.reference, WholeWeights(4, 0))
    for value in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match="not finite"):
            site.keep(update | {name: torch.full_like(update[name], value)}, sites.reference, WholeWeights(4, 0))
    with pytest.raises(SecureAggregationError, match="no update of this round"):
        site.keys(FIRST)


def test_an_update_without_weight_is_not_kept(sites: Sites) -> None:
    sites.at("alpha").keep(sites.update(0), sites.reference, WholeWeights(0, 0))
    with pytest.raises(SecureAggregationError, match="no update of this round"):
        sites.at("alpha").keys(FIRST)


def test_sites_with_the_same_list_of_keys_log_the_same_hash(sites: Sites) -> None:
    keys = sites.keys(*NAMES)
    turned = dict(reversed(keys.items()))
    assert keys_sha256(keys) == keys_sha256(turned)
    assert keys_sha256(keys) != keys_sha256(keys | {"beta": [*keys["beta"][:2], b"1"]})
    assert keys_sha256(keys) != keys_sha256(sites.keys(*NAMES))


def test_a_plan_without_a_secure_sum_has_none(tmp_path: Path) -> None:
    with pytest.raises(SecureAggregationError, match="does not ask"):
        SecureRound(tmp_path, "alpha", tiny_plan(), 1)
