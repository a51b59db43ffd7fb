"""What a hospital allows to be spent of its patients' privacy, and what a round costs them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from client.privacy_ledger import Booking, PrivacyLedger, Round
from client.site_config import SiteConfig
from semisam_core.errors import SemiSAMError
from semisam_core.plan import Plan
from semisam_core.privacy.accounting import Epsilon, Spending, epsilon_of

UNIT = "the patient: all of a patient's scans, labels, patches, pseudo-labels and repeat scans at this site"
MECHANISM = (
    "Gaussian noise on the sum of clipped per-patient gradients of patients drawn by Poisson sampling (DP-SGD); "
    "neighbouring data sets differ by one patient"
)
NOT_COVERED = (
    "validation patients: their mean scores leave without noise, as egress.validation_scores allows",
    "the numbers of scans that are sent when joining and with each round, and that a site takes part",
    "how long a round takes, which the server can measure",
    "a fingerprint that was sent before there was a plan",
    "rounds of plans without privacy on the same patients: they are not in this ledger",
    "the same patients at another hospital, or under another pseudonym and in other files",
    "what stays at this site: logs, pseudo-labels, pictures, this ledger",
)


class PrivacyLimitError(SemiSAMError):
    """The plan's privacy is less than this site demands."""


class PrivacyBudgetError(SemiSAMError):
    """The round would spend more than this site allows."""


@dataclass(frozen=True)
class Cost:
    """Epsilon of one round and of everything that its patients have spent, this round included, at one delta."""

    round: Epsilon
    total: Epsilon
    delta: float

    def scalars(self) -> dict[str, float | int]:
        """Return the cost as scalars by their agreed names."""
        return {"epsilon.round": self.round.value, "epsilon.total": self.total.value, "epsilon.delta": self.delta}


class SitePrivacy:
    """Holds a plan to the site's limits, and books its rounds.

    Args:
        config: the site's YAML, whose limits prevail over the plan.
        plan: the study plan.
    """

    def __init__(self, config: SiteConfig, plan: Plan) -> None:
        self._site, self._limits, self._plan = config.site, config.privacy, plan
        self._ledger = PrivacyLedger(config.ledger_folder, config.storage.folder)

    def check_join(self, identities: Collection[str]) -> None:
        """Check that the plan respects the site's limits, and that a round can be afforded.

        Raises:
            PrivacyLimitError: the plan has too little privacy, or none where the site demands some.
            PrivacyBudgetError: not even one round can be afforded.
            LedgerError: the ledger cannot be trusted.
            OSError: it cannot be read.
        """
        self.check_limits()
        if self._plan.privacy is not None:
            spent = [each.spending for each in self._ledger.bookings(identities)]
            self._allow([*spent, round_spending(self._plan)])

    def book(self, run: str, round_number: int, identities: Collection[str]) -> Cost:
        """Book a round, before its first step, and return what it costs.

        Args:
            run: the study's run.
            round_number: counts from 1.
            identities: everything by which the patients that it trains on may be recognised.

        Raises:
            PrivacyLimitError: the plan has too little privacy.
            PrivacyBudgetError: the round would spend more than the site allows.
            LedgerError: the ledger cannot be trusted.
            OSError: it cannot be written.
        """
        self.check_limits()
        about, spending = Round(self._site, run, round_number, self._plan.hash), round_spending(self._plan)
        totals: list[Epsilon] = []
        self._ledger.book(identities, about, spending, lambda spent: totals.append(self._allow(spent)))
        delta = delta_of(self._plan)
        return Cost(epsilon_of([spending], delta), totals[-1], delta)

    def check_limits(self) -> None:
        """Check that the plan has the privacy that this site demands.

        Raises:
            PrivacyLimitError: it has less, or none.
        """
        limits, privacy = self._limits, self._plan.privacy
        if privacy is None:
            if limits.required:
                raise PrivacyLimitError(
                    f"site {self._site}: the plan has no privacy section, and this site's privacy.required demands one."
                )
            return
        if privacy.noise_multiplier < limits.minimum_noise:
            raise PrivacyLimitError(
                f"site {self._site}: the plan's privacy.noise_multiplier is {privacy.noise_multiplier:g}; this site's "
                f"privacy.minimum_noise demands at least {limits.minimum_noise:g}."
            )
        if privacy.delta > limits.maximum_delta:
            raise PrivacyLimitError(
                f"site {self._site}: the plan's privacy.delta is {privacy.delta:g}; this site's privacy.maximum_delta "
                f"allows at most {limits.maximum_delta:g}."
            )

    def _allow(self, spent: Sequence[Spending]) -> Epsilon:
        """Return the epsilon of everything together.

        Raises:
            PrivacyBudgetError: it is more than the site allows.
        """
        delta, most = delta_of(self._plan), self._limits.maximum_epsilon
        total = epsilon_of(spent, delta)
        if not total.value <= most:
            raise PrivacyBudgetError(
                f"site {self._site}: with this round its patients would have spent epsilon {total.value:.2f} at delta "
                f"{delta:g}; this site's privacy.maximum_epsilon allows {most:g}."
            )
        return total


@dataclass(frozen=True)
class PrivacyReport:
    """What was spent at this site, for its data-protection officer.

    Attributes:
        delta: at which every epsilon is given.
        maximum_epsilon: the site's own limit.
        minimum_noise: the site's own limit.
        rounds: every booked round with its own epsilon, in order.
        totals: epsilon of everything, for each group of patients that shares none with another group.
    """

    delta: float
    maximum_epsilon: float
    minimum_noise: float
    rounds: list[tuple[Booking, Epsilon]]
    totals: list[Epsilon]

    @property
    def total(self) -> Epsilon:
        """The most that any patient may have spent."""
        return max(self.totals, key=lambda each: each.value, default=Epsilon(0.0, 0.0))

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "unit": UNIT,
            "mechanism": MECHANISM,
            "not_covered": list(NOT_COVERED),
            "delta": self.delta,
            "maximum_epsilon": self.maximum_epsilon,
            "minimum_noise": self.minimum_noise,
            "total": asdict(self.total) | {"epsilon": self.total.value},
            "rounds": [each.model_dump(mode="json") | {"epsilon": cost.value} for each, cost in self.rounds],
        }


def privacy_report(config: SiteConfig, delta: float | None = None) -> PrivacyReport:
    """Return what the site's ledger says.

    Args:
        config: the site's YAML.
        delta: None for the site's `privacy.maximum_delta`.

    Raises:
        LedgerError: the ledger cannot be trusted.
        OSError: it cannot be read.
    """
    at = config.privacy.maximum_delta if delta is None else delta
    groups = PrivacyLedger(config.ledger_folder, config.storage.folder).groups()
    booked = sorted((each for group in groups for each in group), key=lambda each: each.time)
    costs = {spending: epsilon_of([spending], at) for spending in {each.spending for each in booked}}
    return PrivacyReport(
        delta=at,
        maximum_epsilon=config.privacy.maximum_epsilon,
        minimum_noise=config.privacy.minimum_noise,
        rounds=[(each, costs[each.spending]) for each in booked],
        totals=[epsilon_of([each.spending for each in group], at) for group in groups],
    )


def round_spending(plan: Plan) -> Spending:
    """Return what a round of this plan spends.

    Raises:
        ValueError: the plan has no privacy section.
    """
    if plan.privacy is None:
        raise ValueError("the plan has no privacy section")
    return Spending(plan.privacy.noise_multiplier, plan.privacy.sampling_rate, plan.training.steps_per_round)


def delta_of(plan: Plan) -> float:
    """Return the plan's delta.

    Raises:
        ValueError: the plan has no privacy section.
    """
    if plan.privacy is None:
        raise ValueError("the plan has no privacy section")
    return plan.privacy.delta
