"""Keys, masks and shares of SecAgg (Bonawitz et al., CCS 2017).

Key agreement, encryption and secret sharing are Flower's. Its mask generator is not used: it folds a key of 256 bits
into 32 and seeds a Mersenne Twister with them, so a curious server could try all seeds. Here a mask is the key stream
of AES-256 in counter mode.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import (
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from numpy.typing import NDArray

SEED_BYTES = 32
INDEX_BYTES = 4  # before a share's value, as Flower writes it
CHUNK = 2**20  # numbers of a mask made at a time

Vector = NDArray[np.uint64]


def new_key_pair() -> tuple[bytes, bytes]:
    """Return a fresh private and public key (P-384) in PEM."""
    private, public = generate_key_pairs()
    return private_key_to_bytes(private), public_key_to_bytes(public)


def new_seed() -> bytes:
    """Return a fresh seed of a site's own mask."""
    return secrets.token_bytes(SEED_BYTES)


def is_public_key(pem: bytes) -> bool:
    """Return whether these bytes are a public key of the agreed kind."""
    try:
        key = bytes_to_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)


def public_half(private: bytes) -> bytes:
    """Return the public key of a private one, both in PEM.

    Raises:
        ValueError: it is no private key.
    """
    try:
        return public_key_to_bytes(bytes_to_private_key(private).public_key())
    except (TypeError, AttributeError, UnsupportedAlgorithm) as error:
        raise ValueError("not a private key") from error


def add_mask(vector: Vector, key: bytes, sign: int) -> None:
    """Add a key's mask to a vector in place, or subtract it, modulo 2^64.

    Args:
        vector: (N,).
        key: 32 bytes that make no other mask.
        sign: 1 or -1.
    """
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    for start in range(0, len(vector), CHUNK):
        part = vector[start : start + CHUNK]
        mask = np.frombuffer(stream.update(bytes(8 * len(part))), "<u8")
        if sign > 0:
            part += mask
        else:
            part -= mask


def pair_key(private: bytes, public: bytes) -> bytes:
    """Return the key of two sites' common mask: 32 bytes, the same at both."""
    return base64.urlsafe_b64decode(_agree(private, public))


def pair_sign(site: str, other: str) -> int:
    """Return the sign with which a site adds the mask that it has in common with another: together they cancel."""
    return 1 if site < other else -1


def add_all_masks(vector: Vector, site: str, seed: bytes, private: bytes, others: Mapping[str, bytes]) -> None:
    """Mask a site's vector in place: its own mask, and one with each other site.

    Args:
        vector: (N,).
        site: its name.
        seed: of its own mask.
        private: its private mask key.
        others: the other sites' public mask keys.
    """
    add_mask(vector, seed, 1)
    for other, public in others.items():
        add_mask(vector, pair_key(private, public), pair_sign(site, other))


def split_secret(secret: bytes, threshold: int, sites: Sequence[str]) -> dict[str, bytes]:
    """Return one share for each site, of which `threshold` recover the secret and fewer tell nothing (Shamir)."""
    return dict(zip(sites, create_shares(secret, threshold, len(sites)), strict=True))


def recover_secret(shares: Mapping[str, bytes], threshold: int, sites: Sequence[str]) -> bytes:
    """Return the secret from `threshold` of its shares.

    Args:
        shares: who holds each share.
        threshold: how many are needed.
        sites: all holders, in the order in which the secret was split.

    Raises:
        ValueError: there are too few shares, or they are not of one secret.
    """
    chosen = [shares[site] for site in sites if site in shares][:threshold]
    indices = [sites.index(site) + 1 for site in sites if site in shares][:threshold]
    if len(chosen) < threshold:
        raise ValueError(f"{len(chosen)} shares of a secret, {threshold} are needed")
    same_length = len({len(share) for share in chosen}) == 1 and (len(chosen[0]) - INDEX_BYTES) % 16 == 0
    if not same_length or [int.from_bytes(share[:INDEX_BYTES], "little") for share in chosen] != indices:
        raise ValueError("a share is malformed")
    return combine_shares(chosen)


def seal_shares(key: bytes, positions: tuple[int, int], seed_share: bytes, key_share: bytes) -> bytes:
    """Encrypt two shares of one site for another.

    Args:
        key: from `sealing_key`.
        positions: of sender and receiver among all sites.
        seed_share: of the sender's seed.
        key_share: of the sender's private mask key.
    """
    return encrypt(key, share_keys_plaintext_concat(*positions, seed_share, key_share))


def open_shares(key: bytes, positions: tuple[int, int], sealed: bytes) -> tuple[bytes, bytes]:
    """Return the shares of a sender's seed and private mask key.

    Raises:
        ValueError: they were altered, or are from or for another site.
    """
    try:
        sender, receiver, seed_share, key_share = share_keys_plaintext_separate(decrypt(key, sealed))
    except InvalidToken:
        raise ValueError("the shares were not sealed with the key that the two sites agreed on") from None
    if (sender, receiver) != positions:
        raise ValueError("the shares are from or for another site")
    return seed_share, key_share


def sealing_key(private: bytes, public: bytes) -> bytes:
    """Return the key by which two sites exchange shares."""
    return _agree(private, public)


def _agree(private: bytes, public: bytes) -> bytes:
    return generate_shared_key(bytes_to_private_key(private), bytes_to_public_key(public))
