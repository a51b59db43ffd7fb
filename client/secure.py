"""A site's part in a secure sum. What it must never do twice, it forgets before it answers.

Between stages its secrets lie in a private folder on the site's disk: messages may come to different processes. Each
answer first replaces the state by one that cannot give that answer again:

- keys: a fresh pair for masks, one for sealing shares; whatever an earlier attempt left is gone.
- shares: its mask key and seed are split once, for one list of sites.
- masked: the private keys and the seed are deleted before the update is masked, so no two vectors have the same mask.
- unmask: for each site one share is released, of its seed or of its key, never both; then all is deleted.

A round's update is released in one sum only: with two that differ by a site, the server could subtract them.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import Field, TypeAdapter
from safetensors.torch import load_file, save
from torch import Tensor

from semisam_core.aggregation.norms import change_norm
from semisam_core.configuration import StrictModel, is_name
from semisam_core.contract import (
    HEAD,
    HEAD_PREFIX,
    KEY_SHARE,
    MASK_KEY,
    MASKED_VECTOR,
    SEALED_FOR,
    SEED_SHARE,
    SHARE_KEY,
    TensorSpec,
    update_spec,
)
from semisam_core.errors import SemiSAMError
from semisam_core.files import append_json_line, read_json_lines, write_atomically
from semisam_core.plan import Plan
from semisam_core.plan_sections.aggregation import MOST_SUMMED
from semisam_core.secure_aggregation.fixed_point import encode, vector_spec, without_head
from semisam_core.secure_aggregation.masks import (
    add_all_masks,
    is_public_key,
    new_key_pair,
    new_seed,
    open_shares,
    seal_shares,
    sealing_key,
    split_secret,
)
from semisam_core.secure_aggregation.weights import WholeWeights

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
TRAINED = b"1"


class SecureAggregationError(SemiSAMError):
    """A message of a secure sum asks for something that this site does not do."""


class UpdateTooLargeError(SemiSAMError):
    """The update changed by more than the plan's bound."""


class _Peer(StrictModel):
    """A site's public keys, and whether it trained its feature head."""

    mask_key: str
    share_key: str
    head: bool


class _Begun(StrictModel):
    stage: Literal["keys"] = "keys"
    round: int
    attempt: str
    mask_key: str
    share_key: str
    own: _Peer


class _Shared(StrictModel):
    stage: Literal["shares"] = "shares"
    round: int
    attempt: str
    mask_key: str
    share_key: str
    seed: str
    peers: dict[str, _Peer]
    seed_share: str
    key_share: str


class _Masked(StrictModel):
    """What is left after masking: shares, by the site whose secrets they are of."""

    stage: Literal["masked"] = "masked"
    round: int
    attempt: str
    least: int
    heads: list[str]
    seed_shares: dict[str, str]
    key_shares: dict[str, str]


_S = TypeVar("_S", _Begun, _Shared, _Masked)
_State = Annotated[_Begun | _Shared | _Masked, Field(discriminator="stage")]
_STATE: TypeAdapter[_Begun | _Shared | _Masked] = TypeAdapter(_State)


class SecureRound:
    """One round's update of one site, and how far the secure sum has come.

    Args:
        run_folder: the run's folder at this site.
        site: the site's name.
        plan: must ask for secure aggregation.
        round_number: the round.
    """

    def __init__(self, run_folder: Path, site: str, plan: Plan, round_number: int) -> None:
        if plan.aggregation.secure is None:
            raise SecureAggregationError("the plan does not ask for secure aggregation")
        self._settings, self._least = plan.aggregation.secure, plan.aggregation.minimum_sites
        self._spec: Mapping[str, TensorSpec] = update_spec(plan)
        self._site, self._round = site, round_number
        self._folder, self._released = run_folder / "secure", run_folder / "released.jsonl"
        self._update, self._state = self._folder / "update.safetensors", self._folder / "state.json"

    def discard(self) -> None:
        """Delete the update and all secrets."""
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def keep(self, update: Mapping[str, Tensor], reference: Mapping[str, Tensor], weights: WholeWeights) -> None:
        """Keep this round's update for the sum, in place of whatever was kept.

        Args:
            update: the tensors after training.
            reference: the global tensors that the round began with.
            weights: what specialist and head count; an update without weight is not kept.

        Raises:
            FloatingPointError: a tensor is not finite.
            UpdateTooLargeError: the specialist or the feature head changed by more than the plan's bound.
            OSError: the disk is full.
        """
        self.discard()
        for words, head in (("specialist", False), ("feature head", True)):
            part = {name: value for name, value in reference.items() if name.startswith(HEAD_PREFIX) == head}
            if not all(bool(torch.isfinite(update[name]).all()) for name in part):
                raise FloatingPointError(f"the {words} has values that are not finite")
            if (norm := change_norm(update, part)) > self._settings.maximum_norm:
                raise UpdateTooLargeError(
                    f"the norm of the {words}'s change is {norm:g}; "
                    f"aggregation.secure.maximum_norm allows {self._settings.maximum_norm:g}"
                )
        if weights.specialist == 0:
            return
        vector = torch.from_numpy(encode(update, reference, self._spec, weights).view("int64"))
        self._folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        write_atomically(self._update, save({str(self._round): vector}), PRIVATE_FILE)

    def keys(self, attempt: object) -> dict[str, bytes]:
        """Begin an attempt with fresh keys; return the public ones, and whether this site trained its head.

        Raises:
            SecureAggregationError: this site has no update of the round.
        """
        if not isinstance(attempt, str) or not attempt:
            raise SecureAggregationError("the message names no attempt")
        head = TRAINED if int(self._vector()[1]) > 0 else b"0"
        (mask_key, mask_public), (share_key, share_public) = new_key_pair(), new_key_pair()
        own = _Peer(mask_key=mask_public.decode(), share_key=share_public.decode(), head=head == TRAINED)
        self._write(
            _Begun(
                round=self._round, attempt=attempt, mask_key=mask_key.decode(), share_key=share_key.decode(), own=own
            )
        )
        return {MASK_KEY: mask_public, SHARE_KEY: share_public, HEAD: head}

    def shares(self, attempt: object, keys: Mapping[str, object]) -> dict[str, bytes]:
        """Split this site's secrets among the sites of the sum.

        Args:
            attempt: the attempt that the message is about.
            keys: every site's public keys and whether it trained its head, this site's among them.

        Returns:
            Sealed shares by the name of the site that they are for.

        Raises:
            SecureAggregationError: out of turn, too few or too many sites, keys that are not of the agreed kind or not
                each site's own.
        """
        state = self._expect(_Begun, attempt)
        peers = {name: _peer(name, each) for name, each in sorted(keys.items())}
        self._check_peers(state, peers)
        names, needed = list(peers), self._settings.shares_needed(len(peers))
        seed = new_seed()
        seed_shares = split_secret(seed, needed, names)
        key_shares = split_secret(state.mask_key.encode(), needed, names)
        self._write(
            _Shared(
                round=self._round,
                attempt=state.attempt,
                mask_key=state.mask_key,
                share_key=state.share_key,
                seed=seed.hex(),
                peers=peers,
                seed_share=seed_shares[self._site].hex(),
                key_share=key_shares[self._site].hex(),
            )
        )
        own = names.index(self._site)
        return {
            SEALED_FOR + name: seal_shares(
                sealing_key(state.share_key.encode(), peers[name].share_key.encode()),
                (own, position),
                seed_shares[name],
                key_shares[name],
            )
            for position, name in enumerate(names)
            if name != self._site
        }

    def masked(self, attempt: object, sealed: Mapping[str, object]) -> dict[str, Tensor]:
        """Mask this round's update, once.

        Args:
            attempt: the attempt that the message is about.
            sealed: the shares that the other sites of the sum sealed for this one, by their names.

        Returns:
            One tensor (N,), int64.

        Raises:
            SecureAggregationError: out of turn, too few sites, shares that were altered, or this site has already
                released the round's update in a sum of other sites.
        """
        state = self._expect(_Shared, attempt)
        names = list(state.peers)
        sites = sorted({self._site, *sealed})
        if not set(sites) <= set(names) or self._site in sealed:
            raise SecureAggregationError("the shares are not from the other sites of this attempt")
        self._check_enough(sites, len(names))
        if (before := self._released_to()) is not None and not before <= set(sites):
            raise SecureAggregationError("this site has released the round's update in a sum of other sites")
        vector = self._vector()
        heads = [name for name in sites if state.peers[name].head]
        held = {name: self._open(state, name, names, sealed[name]) for name in sites if name != self._site}
        seed_shares = {name: shares[0].hex() for name, shares in held.items()} | {self._site: state.seed_share}
        key_shares = {name: shares[1].hex() for name, shares in held.items()} | {self._site: state.key_share}
        self._write(
            _Masked(
                round=self._round,
                attempt=state.attempt,
                least=max(self._least, self._settings.shares_needed(len(names))),
                heads=heads if len(heads) >= self._least else [],
                seed_shares=seed_shares,
                key_shares=key_shares,
            )
        )
        numbers = vector.numpy().view("uint64")
        if len(heads) < self._least:
            numbers = without_head(numbers, self._spec)
        others = {name: state.peers[name].mask_key.encode() for name in sites if name != self._site}
        add_all_masks(numbers, self._site, bytes.fromhex(state.seed), state.mask_key.encode(), others)
        return {MASKED_VECTOR: torch.from_numpy(numbers.view("int64"))}

    def unmask(self, attempt: object, active: object, dropped: object) -> dict[str, bytes]:
        """Release the shares that remove the masks from the sum of the active sites, and delete everything.

        Args:
            attempt: the attempt that the message is about.
            active: the names of the sites whose masked vectors are in the sum.
            dropped: the names of all other sites that shared their secrets.

        Returns:
            A share of each active site's seed and of each dropped site's mask key.

        Raises:
            SecureAggregationError: out of turn, too few sites, the two lists overlap or are not the sites of this
                attempt, or this site has already released the round's update in another sum.
        """
        state = self._expect(_Masked, attempt)
        summed, lost = _names(active), _names(dropped)
        if summed & lost or summed | lost != set(state.seed_shares):
            raise SecureAggregationError("the active and the dropped sites are not those of this attempt, once each")
        if self._site not in summed:
            raise SecureAggregationError("this site's own masked vector is not in the sum")
        if len(summed) < state.least:
            raise SecureAggregationError(f"a sum of {len(summed)} sites; this plan's has at least {state.least}")
        if state.heads and len(summed & set(state.heads)) < self._least:
            raise SecureAggregationError(f"fewer than {self._least} of the sum's sites trained their feature head")
        if (before := self._released_to()) is not None and before != summed:
            raise SecureAggregationError("this site has released the round's update in another sum")
        append_json_line(self._released, {"round": self._round, "sites": sorted(summed)})
        self.discard()
        seeds = {SEED_SHARE + name: bytes.fromhex(state.seed_shares[name]) for name in sorted(summed)}
        return seeds | {KEY_SHARE + name: bytes.fromhex(state.key_shares[name]) for name in sorted(lost)}

    def _vector(self) -> Tensor:
        name = str(self._round)
        kept = load_file(self._update) if self._update.exists() else {}
        if name not in kept or kept[name].shape != vector_spec(self._spec).shape:
            raise SecureAggregationError("this site has no update of this round to add")
        return kept[name]

    def _expect(self, kind: type[_S], attempt: object) -> _S:
        state = _STATE.validate_json(self._state.read_bytes()) if self._state.exists() else None
        if not isinstance(state, kind) or (state.round, state.attempt) != (self._round, attempt):
            raise SecureAggregationError("the message is not the next one of this round's latest attempt")
        return state

    def _write(self, state: StrictModel) -> None:
        write_atomically(self._state, state.model_dump_json().encode(), PRIVATE_FILE)

    def _check_peers(self, state: _Begun, peers: Mapping[str, _Peer]) -> None:
        if not self._least <= len(peers) <= MOST_SUMMED:
            raise SecureAggregationError(f"a sum of {len(peers)} sites; accepted are {self._least} to {MOST_SUMMED}")
        if peers.get(self._site) != state.own:
            raise SecureAggregationError("the list of keys does not have this site's own")
        keys = [key for peer in peers.values() for key in (peer.mask_key, peer.share_key)]
        if len(set(keys)) != len(keys) or not all(is_public_key(key.encode()) for key in keys):
            raise SecureAggregationError("two keys are the same, or one is not a public key of the agreed kind")

    def _check_enough(self, sites: Sequence[str], begun: int) -> None:
        least = max(self._least, self._settings.shares_needed(begun))
        if len(sites) < least:
            raise SecureAggregationError(f"{len(sites)} sites are left; a sum needs {least}")

    def _open(self, state: _Shared, name: str, names: Sequence[str], sealed: object) -> tuple[bytes, bytes]:
        key = sealing_key(state.share_key.encode(), state.peers[name].share_key.encode())
        if not isinstance(sealed, bytes):
            raise SecureAggregationError("a share is not bytes")
        try:
            return open_shares(key, (names.index(name), names.index(self._site)), sealed)
        except ValueError as error:
            raise SecureAggregationError(f"the shares from {name}: {error}") from None

    def _released_to(self) -> set[str] | None:
        """Return the sites of the sum in which this site released the round's update, or None."""
        lines = [line for line in read_json_lines(self._released) if line.get("round") == self._round]
        return set(lines[0]["sites"]) if lines else None


def keys_sha256(keys: Mapping[str, object]) -> str:
    """Return a hash of all sites' names and public keys, the same wherever the lists are the same.

    Raises:
        SecureAggregationError: the list is malformed.
    """
    peers = {name: _peer(name, each) for name, each in sorted(keys.items())}
    text = "\n".join(f"{name}|{peer.mask_key}|{peer.share_key}|{peer.head}" for name, peer in peers.items())
    return hashlib.sha256(text.encode()).hexdigest()


def _peer(name: str, keys: object) -> _Peer:
    if not is_name(name) or not isinstance(keys, list) or len(keys) != 3 or not all(type(k) is bytes for k in keys):
        raise SecureAggregationError("the list of keys is malformed")
    try:
        return _Peer(mask_key=keys[0].decode("ascii"), share_key=keys[1].decode("ascii"), head=keys[2] == TRAINED)
    except UnicodeDecodeError:
        raise SecureAggregationError("the list of keys is malformed") from None


def _names(value: object) -> set[str]:
    if not isinstance(value, list) or not all(is_name(each) for each in value) or len(set(value)) != len(value):
        raise SecureAggregationError("a list of sites is malformed")
    return set(value)
