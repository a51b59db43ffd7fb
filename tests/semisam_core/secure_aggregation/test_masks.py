"""Masks that hide everything but a sum, and secrets that a threshold of sites recovers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from semisam_core.secure_aggregation.masks import (
    CHUNK,
    add_all_masks,
    add_mask,
    is_public_key,
    new_key_pair,
    new_seed,
    open_shares,
    pair_key,
    public_half,
    recover_secret,
    seal_shares,
    sealing_key,
    split_secret,
)

SITES = ("alpha", "beta", "gamma")


def _mask(key: bytes, size: int) -> NDArray[np.uint64]:
    vector = np.zeros(size, np.uint64)
    add_mask(vector, key, 1)
    return vector


def test_a_mask_depends_on_every_bit_of_its_key() -> None:
    """Flower's generator folds the key into 32 bits: a key with two words exchanged makes the same mask."""
    key = bytes(range(32))
    turned = key[4:8] + key[:4] + key[8:]
    flowers = [pseudo_rand_gen(each, 2**32, [(8,)])[0] for each in (key, turned)]
    assert np.array_equal(*flowers)
    seen = {bytes(_mask(key, 8).tobytes()), _mask(turned, 8).tobytes()}
    for bit in range(256):
        changed = bytearray(key)
        changed[bit // 8] ^= 1 << bit % 8
        seen.add(_mask(bytes(changed), 8).tobytes())
    assert len(seen) == 258


def test_a_mask_is_a_known_key_stream() -> None:
    """AES-256 of counters 0, 1, ... (NIST SP 800-38A): the oracle encrypts the counters one by one."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = new_seed()
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    stream = b"".join(block.update(number.to_bytes(16, "big")) for number in range(4))
    assert _mask(key, 8).tobytes() == stream


def test_masks_longer_than_a_chunk_go_on_and_subtracting_undoes_adding() -> None:
    key, size = new_seed(), CHUNK + 5
    long = _mask(key, size)
    assert len(set(long[-8:].tolist())) == 8
    assert not np.array_equal(long[CHUNK:], long[:5])
    add_mask(long, key, -1)
    assert not long.any()


def test_pairwise_masks_cancel_and_seeds_remove_the_rest() -> None:
    keys = {site: new_key_pair() for site in SITES}
    seeds = {site: new_seed() for site in SITES}
    plain = {site: np.arange(5, dtype=np.uint64) * (k + 1) for k, site in enumerate(SITES)}
    total = np.zeros(5, np.uint64)
    for site in SITES:
        vector = plain[site].copy()
        others = {other: public for other, (_, public) in keys.items() if other != site}
        add_all_masks(vector, site, seeds[site], keys[site][0], others)
        assert not np.array_equal(vector, plain[site])
        total += vector
    for seed in seeds.values():
        add_mask(total, seed, -1)
    assert np.array_equal(total, sum(plain.values()))


def test_what_the_server_sees_of_one_site_is_uniform_whatever_the_site_sends() -> None:
    """All 64 bits and all bytes of a masked vector of zeros, of noise and of a large constant are equally likely."""
    size = 200_000
    normal = np.random.default_rng(0).normal(0, 2**30, size).astype(np.int64).view(np.uint64)
    for plain in (np.zeros(size, np.uint64), normal, np.full(size, 2**55, np.uint64)):
        keys = {site: new_key_pair() for site in SITES}
        vector = plain.copy()
        others = {site: keys[site][1] for site in ("beta", "gamma")}
        add_all_masks(vector, "alpha", new_seed(), keys["alpha"][0], others)
        counts = np.bincount(vector.view(np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
        bits = np.unpackbits(vector.view(np.uint8)).reshape(size, 64).mean(0)
        assert np.abs(bits - 0.5).max() < 6 * 0.5 / np.sqrt(size)
        assert abs(np.corrcoef(vector.astype(float), plain.view(np.int64) + np.arange(size))[0, 1]) < 0.02
        assert stats.kstest(vector.astype(float) / 2.0**64, "uniform").pvalue > 1e-6


@settings(deadline=None, max_examples=25)
@given(st.binary(min_size=1, max_size=80), st.integers(2, 6), st.data())
def test_any_threshold_of_shares_recovers_a_secret(secret: bytes, sites: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(2, sites))
    names = [f"s{k}" for k in range(sites)]
    shares = split_secret(secret, threshold, names)
    chosen = data.draw(st.permutations(names))[:threshold]
    assert recover_secret({name: shares[name] for name in chosen}, threshold, names) == secret


def test_fewer_shares_than_the_threshold_or_malformed_ones_recover_nothing() -> None:
    names = ["a", "b", "c", "d"]
    shares = split_secret(b"secret", 3, names)
    with pytest.raises(ValueError, match="2 shares of a secret, 3 are needed"):
        recover_secret({name: shares[name] for name in "ab"}, 3, names)
    for wrong in (b"", b"\0" * 7, shares["a"], shares["b"][:-16], shares["b"] + b"\0"):
        with pytest.raises(ValueError, match="malformed"):
            recover_secret({"a": shares["a"], "b": wrong, "c": shares["c"]}, 3, names)
    for pair in itertools.combinations(names, 2):  # combined all the same, two of the three that are needed say nothing
        try:
            found = recover_secret({name: shares[name] for name in pair}, 2, names)
        except ValueError:
            continue
        assert found != b"secret"


def test_sealed_shares_open_for_their_receiver_alone() -> None:
    (private, public), (other_private, other_public), (_, foreign) = (new_key_pair() for _ in range(3))
    key = sealing_key(private, other_public)
    sealed = seal_shares(key, (0, 1), b"seed", b"key")
    assert open_shares(sealing_key(other_private, public), (0, 1), sealed) == (b"seed", b"key")
    with pytest.raises(ValueError, match="agreed on"):
        open_shares(sealing_key(private, foreign), (0, 1), sealed)
    with pytest.raises(ValueError, match="agreed on"):
        open_shares(key, (0, 1), sealed[:-4] + b"AAA=")
    for positions in ((1, 0), (0, 2), (2, 1)):
        with pytest.raises(ValueError, match="from or for another site"):
            open_shares(key, positions, sealed)


def test_both_ends_of_a_pair_agree_on_one_key_and_a_private_key_has_one_public_half() -> None:
    (private, public), (other_private, other_public) = new_key_pair(), new_key_pair()
    assert pair_key(private, other_public) == pair_key(other_private, public)
    assert len(pair_key(private, other_public)) == 32
    assert public_half(private) == public
    with pytest.raises(ValueError, match=r"."):
        public_half(b"nonsense")


def test_only_keys_of_the_agreed_kind_are_public_keys() -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    private, public = new_key_pair()
    assert is_public_key(public)
    foreign = (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1()))
    written = [each.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for each in foreign]
    assert not any(is_public_key(each) for each in (private, b"", b"\xff" * 50, public[:-40], *written))
