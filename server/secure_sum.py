"""A round's updates summed so that the server sees none of them (SecAgg; Bonawitz et al., CCS 2017).

Sites train first and keep their updates. Then come four short stages, each with its deadline: public keys, sealed
shares of each site's secrets, masked vectors, and the shares that remove the masks. Every site is a neighbour of every
other: the sparser graphs of SecAgg+ (Bell et al., CCS 2020) pay from about a hundred sites on. Before the last stage
nothing can be read, so an attempt that loses too many sites is given up and begun anew with fresh keys; from the last
stage on the sum is of these sites or of none.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ConfigRecord
from torch import Tensor

from semisam_core.codecs import leaving_spec
from semisam_core.contract import (
    ACTIVE,
    ATTEMPT,
    DROPPED,
    HEAD,
    KEY_SHARE,
    MASK_KEY,
    MASKED_VECTOR,
    SEALED_BY,
    SEALED_FOR,
    SEED_SHARE,
    SHARE_KEY,
    SITE_KEYS,
    RejectionRule,
    Stage,
    TensorSpec,
    update_spec,
)
from semisam_core.files import read_json_lines
from semisam_core.plan import Plan
from semisam_core.plan_sections.aggregation import MOST_SUMMED, SecureAggregation
from semisam_core.secure_aggregation.fixed_point import Mean, decode
from semisam_core.secure_aggregation.masks import (
    SEED_BYTES,
    Vector,
    add_mask,
    is_public_key,
    pair_key,
    pair_sign,
    public_half,
    recover_secret,
)
from server.admission import Admitted, Rejected
from server.arrays import Reader, vector_reader
from server.exchange import ATTEMPTS, Content, Exchange, Phase
from server.quorum import SHOWN_REASONS, TooFewSitesError
from server.roster import RETRY_S

logger = logging.getLogger(__name__)
UNMASKING = "unmasking"  # the event by which a resumed server knows whose sum may have been released
ATTEMPT_BYTES = 16

Check = Callable[[Admitted], str | None]


@dataclass
class SecureMean:
    """The result of a secure sum.

    Attributes:
        mean: the weighted mean and the sums of the weights.
        sites: whose updates are in it.
        lost: site -> why its update is not, of the sites that had one.
    """

    mean: Mean
    sites: list[str]
    lost: dict[str, str]


@dataclass
class _Attempt:
    """How far one attempt has come; each stage's sites are among those of the one before.

    Attributes:
        name: 32 hexadecimal digits.
        keys: public keys by site, in the order of names.
        heads: sites that trained their feature head.
        sealed: receiver -> sender -> sealed shares.
        active: sites whose masked vectors are in `total`.
        total: the sum of the masked vectors.
        shares: holder -> the shares that it released.
    """

    name: str
    keys: dict[str, list[bytes]] = field(default_factory=dict)
    heads: set[str] = field(default_factory=set)
    sealed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    active: set[str] = field(default_factory=set)
    total: Vector | None = None
    shares: dict[str, Mapping[str, bytes]] = field(default_factory=dict)

    @property
    def sharing(self) -> set[str]:
        """The sites that shared their secrets."""
        return set(self.sealed)


class _GivenUpError(Exception):
    """An attempt lost too many sites before anything could be read."""


class SecureSum:
    """Sums the updates that sites keep after training.

    Args:
        plan: must ask for secure aggregation.
        exchange: sends messages and handles replies.
        content: makes the part of a stage's message that is the same for all sites of a round.
    """

    def __init__(self, plan: Plan, exchange: Exchange, content: Callable[[int], Content]) -> None:
        if plan.aggregation.secure is None:
            raise ValueError("the plan does not ask for secure aggregation")
        self._settings: SecureAggregation = plan.aggregation.secure
        self._least, self._patience_s = plan.aggregation.minimum_sites, plan.aggregation.wait_for_quorum_s
        self._spec: Mapping[str, TensorSpec] = update_spec(plan)
        self._read = vector_reader(leaving_spec(plan))
        self._exchange, self._content = exchange, content
        self._roster, self._mailbox, self._clock = exchange.roster, exchange.mailbox, exchange.clock
        self._folder = exchange.folder
        self._lost: dict[str, str] = {}

    def mean(self, number: int, sites: Collection[str], weights: Mapping[str, Tensor]) -> SecureMean:
        """Return the weighted mean of the sites' updates of a round.

        Args:
            number: the round.
            sites: those that have an update with a weight.
            weights: the round's global tensors.

        Raises:
            TooFewSitesError: too few sites took part, after all attempts and waiting, or the sum cannot be unmasked.
        """
        self._lost = {}
        wanted, least = self._wanted(number, sites)
        give_up: float | None = None
        attempts = 0
        while True:
            present = sorted(wanted & set(self._roster.joined))
            if len(present) >= least:
                attempts += 1
                attempt = _Attempt(secrets.token_hex(ATTEMPT_BYTES))
                try:
                    self._collect(number, attempt, present, least)
                    return self._finish(number, attempt, wanted, weights)
                except _GivenUpError as error:
                    self._folder.record("sum-given-up", round=number, attempt=attempts, reason=str(error))
                    if attempts >= ATTEMPTS:
                        raise TooFewSitesError(self._shortage(number, str(error))) from None
                continue
            if give_up is None:
                give_up = self._clock.now() + self._patience_s
                self._folder.record(
                    "waiting", round=number, sites=sorted(wanted - set(present)), seconds=self._patience_s
                )
            if self._clock.now() >= give_up:
                missing = ", ".join(sorted(wanted - set(present)))
                raise TooFewSitesError(
                    self._shortage(number, f"{len(present)} are connected, {least} are needed; missing: {missing}")
                )
            self._exchange.note = f"Round {number}: the secure sum waits for more of its sites."
            self._exchange.poll()
            self._exchange.report()

    def _wanted(self, number: int, sites: Collection[str]) -> tuple[set[str], int]:
        """Return whose updates are summed, and how many of them are needed.

        If the server was killed while the round's sum was unmasked, sites may have released it: then the round has this
        sum or none, because the difference to another would be single sites' updates.
        """
        lines = read_json_lines(self._folder.metrics_path)
        released = [line["sites"] for line in lines if (line.get("event"), line.get("round")) == (UNMASKING, number)]
        wanted, least = set(sites), self._least
        if released:
            wanted, least = set(released[-1]), len(released[-1])
        if not wanted <= set(sites):
            absent = ", ".join(sorted(wanted - set(sites)))
            raise TooFewSitesError(
                f"Round {number}: before the server stopped, the sum of {', '.join(sorted(wanted))} was released. A "
                f"sum without {absent} would tell the difference. Resume when all of them are back."
            )
        if len(wanted) < least:
            raise TooFewSitesError(
                f"Round {number}: {len(wanted)} sites have anything to add, a secure sum needs {least}. With "
                "aggregation.weights equal or samples every site that takes a step counts."
            )
        if len(wanted) > MOST_SUMMED:
            raise TooFewSitesError(f"Round {number}: {len(wanted)} sites; a secure sum has at most {MOST_SUMMED}.")
        return wanted, least

    def _collect(self, number: int, attempt: _Attempt, present: Collection[str], least: int) -> None:
        """Collect keys, sealed shares and masked vectors.

        Raises:
            _GivenUpError: too few sites are left.
        """

        def keep_keys(answer: Admitted) -> None:
            attempt.keys[answer.site] = [answer.material[name] for name in (MASK_KEY, SHARE_KEY, HEAD)]

        self._stage(Stage.KEYS, number, present, lambda _: _record(attempt), keep_keys, check=_check_keys)
        attempt.keys = {site: attempt.keys[site] for site in sorted(attempt.keys)}
        attempt.heads = {site for site, keys in attempt.keys.items() if keys[2] == b"1"}
        self._go_on(len(attempt.keys), least, "public keys")
        needed = self._settings.shares_needed(len(attempt.keys))

        sealed: dict[str, dict[str, bytes]] = {}

        def keep_shares(answer: Admitted) -> None:
            sealed[answer.site] = {name.removeprefix(SEALED_FOR): each for name, each in answer.material.items()}

        listed: Mapping[str, list[bytes]] = {SITE_KEYS + site: keys for site, keys in attempt.keys.items()}
        self._stage(
            Stage.SHARES,
            number,
            attempt.keys,
            lambda _: _record(attempt, listed),
            keep_shares,
            check=lambda answer: _check_sealed(answer, set(attempt.keys)),
        )
        attempt.sealed = {to: {by: sealed[by][to] for by in sorted(sealed) if by != to} for to in sorted(sealed)}
        self._go_on(len(sealed), max(least, needed), "sealed shares")

        def add(answer: Admitted) -> None:
            vector = (answer.weights or {})[MASKED_VECTOR].numpy().view(np.uint64)
            attempt.total = vector.copy() if attempt.total is None else np.add(attempt.total, vector, out=attempt.total)
            attempt.active.add(answer.site)

        self._stage(
            Stage.MASKED,
            number,
            attempt.sharing,
            lambda site: _record(attempt, {SEALED_BY + by: each for by, each in attempt.sealed[site].items()}),
            add,
            self._read,
        )
        self._go_on(len(attempt.active), max(least, needed), "masked vectors")
        if len(attempt.heads & attempt.sharing) >= self._least > len(attempt.heads & attempt.active):
            raise _GivenUpError(f"fewer than {self._least} sites with a trained feature head sent a masked vector")

    def _finish(
        self, number: int, attempt: _Attempt, wanted: Collection[str], weights: Mapping[str, Tensor]
    ) -> SecureMean:
        """Collect the shares of secrets and remove the masks."""
        active = sorted(attempt.active)
        dropped = sorted(attempt.sharing - attempt.active)
        needed = self._settings.shares_needed(len(attempt.keys))
        self._folder.record(UNMASKING, round=number, sites=active)

        def keep(answer: Admitted) -> None:
            attempt.shares[answer.site] = answer.material

        agreed = {SEED_SHARE + site for site in active} | {KEY_SHARE + site for site in dropped}
        self._stage(
            Stage.UNMASK,
            number,
            active,
            lambda _: _record(attempt, {ACTIVE: active, DROPPED: dropped}),
            keep,
            check=lambda answer: None if set(answer.material) == agreed else "the shares are not those asked for",
            enough=lambda: len(attempt.shares) >= needed,
        )
        if len(attempt.shares) < needed:
            reason = f"{len(attempt.shares)} of {len(active)} sites released their shares, {needed} are needed"
            raise TooFewSitesError(self._shortage(number, reason))
        try:
            total = self._unmasked(attempt, dropped, needed)
            mean = decode(total, weights, self._spec, len(active), self._settings)
        except ValueError as error:
            raise TooFewSitesError(
                f"Round {number}: the sum cannot be unmasked: {error}. One of the sites {', '.join(active)} sent a "
                "wrong share or vector; which one cannot be told."
            ) from None
        lost = {site: self._lost.get(site, "not connected when the updates were summed") for site in wanted}
        return SecureMean(mean, active, {site: why for site, why in sorted(lost.items()) if site not in attempt.active})

    def _unmasked(self, attempt: _Attempt, dropped: Collection[str], needed: int) -> Vector:
        """Return the sum without masks.

        Raises:
            ValueError: a share is wrong.
        """

        def recovered(name: str) -> bytes:
            shares = {holder: each[name] for holder, each in attempt.shares.items()}
            return recover_secret(shares, needed, list(attempt.keys))

        total = attempt.total
        if total is None:
            raise ValueError("there is no masked vector")
        for site in attempt.active:
            seed = recovered(SEED_SHARE + site)
            if len(seed) != SEED_BYTES:
                raise ValueError("a seed is malformed")
            add_mask(total, seed, -1)
        for site in dropped:
            private = recovered(KEY_SHARE + site)
            if public_half(private) != attempt.keys[site][0]:
                raise ValueError(f"the recovered key of {site} is not its own")
            for other in attempt.active:
                add_mask(total, pair_key(private, attempt.keys[other][0]), -pair_sign(other, site))
        return total

    def _stage(
        self,
        stage: Stage,
        number: int,
        sites: Collection[str],
        record: Callable[[str], ConfigRecord],
        accept: Callable[[Admitted], None],
        read: Reader | None = None,
        check: Check = lambda _: None,
        enough: Callable[[], bool] | None = None,
    ) -> None:
        """Ask sites for one stage and wait for their answers, or for the deadline.

        Args:
            enough: whether the answers suffice; if given, sites that failed for a reason that may pass are asked again
                and those that left are waited for, until they do or the plan's patience has passed.
        """
        wrong: list[Rejected] = []

        def checked(answer: Admitted) -> None:
            if (mistake := check(answer)) is not None:
                wrong.append(Rejected(answer.site, mistake, RejectionRule.SECURE))
            else:
                accept(answer)

        phase = self._exchange.begin(stage.value, number, self._content(number), checked, read)
        phase.private = record
        self._folder.record("asked", kind=stage.value, round=number, sites=len(sites), names=sorted(sites))
        for site in sorted(sites):
            self._ask(phase, site)
        self._exchange.report()
        give_up = self._clock.now() + self._patience_s
        while True:
            while self._mailbox.awaited(stage.value, number):
                self._exchange.poll()
            for answer in wrong:
                self._exchange.reject(phase, answer)
            wrong.clear()
            if enough is None or enough() or self._clock.now() >= give_up or not self._may_answer(phase, sites):
                break
            phase.reason = f"Round {number}: waiting for shares that unmask the sum."
            self._ask_again(phase, sites)
            self._exchange.poll()
        self._exchange.end()
        self._lost |= phase.failed

    def _ask(self, phase: Phase, site: str) -> None:
        node = self._roster.joined.get(site)
        if node is None:
            phase.fail(site, "not connected when the updates were summed", retryable=True)
        else:
            self._exchange.send(phase, site, node)

    def _ask_again(self, phase: Phase, sites: Collection[str]) -> None:
        now = self._clock.now()
        if now < phase.retried + RETRY_S:
            return
        phase.retried = now
        for site in self._may_answer(phase, sites):
            self._ask(phase, site)

    def _may_answer(self, phase: Phase, sites: Collection[str]) -> list[str]:
        """Return the sites without an answer that it is worth asking again."""
        asked = phase.attempts
        return [site for site in sorted(sites) if site in phase.retryable and asked.get(site, 0) < ATTEMPTS]

    def _go_on(self, found: int, needed: int, what: str) -> None:
        if found < needed:
            raise _GivenUpError(f"{found} sites sent {what}, {needed} are needed")

    def _shortage(self, number: int, reason: str) -> str:
        reasons = "; ".join(f"{site}: {why}" for site, why in sorted(self._lost.items())[:SHOWN_REASONS])
        return f"Round {number}: the updates could not be summed securely: {reason}. {reasons}".rstrip()


def _record(attempt: _Attempt, items: Mapping[str, list[bytes] | list[str] | bytes] | None = None) -> ConfigRecord:
    return ConfigRecord({ATTEMPT: attempt.name, **(items or {})})


def _check_keys(answer: Admitted) -> str | None:
    keys = [answer.material[name] for name in (MASK_KEY, SHARE_KEY)]
    return None if all(map(is_public_key, keys)) else "a key is not a public key of the agreed kind"


def _check_sealed(answer: Admitted, sites: set[str]) -> str | None:
    receivers = {name.removeprefix(SEALED_FOR) for name in answer.material}
    return None if receivers == sites - {answer.site} else "the shares are not for the other sites of the sum"
