"""Which nodes are asked to join, and when; which sites sit out a round."""

from __future__ import annotations

from semisam_core.plan_sections.aggregation import Exclusion
from server.admission import Admitted
from server.roster import Roster


def _roster() -> Roster:
    return Roster(Exclusion(after_failures=2, rounds=3))


def _waits(roster: Roster, failures: int) -> list[float]:
    """Return how long node 1 is left in peace after each of its failures to join."""
    now, waits = 0.0, []
    for _ in range(failures):
        roster.decline(1, "alpha", "refused by rule storage", 0, transient_at=now)
        wait = next(s for s in range(0, 10_000, 10) if roster.newcomers([1], 0, now + s))
        waits.append(float(wait))
        now += wait
    return waits


def test_a_node_with_a_transient_reason_is_asked_less_and_less_often_within_limits() -> None:
    assert _waits(_roster(), 7) == [30, 60, 120, 240, 480, 600, 600]


def test_the_waits_begin_again_once_a_node_has_joined() -> None:
    roster = _roster()
    _waits(roster, 3)
    assert roster.join(Admitted("alpha", {}, None), 1, [1]) is None
    roster.leave("alpha")
    assert _waits(roster, 2) == [30, 60]


def test_a_node_with_a_lasting_reason_is_asked_again_after_some_rounds_whatever_the_time() -> None:
    roster = _roster()
    roster.decline(1, "alpha", "refused by rule version", 0)
    assert [number for number in range(6) if roster.newcomers([1], number, 1e9)] == [4, 5]
    assert roster.retrying() == []


def test_a_reason_that_turns_lasting_is_not_retried_soon() -> None:
    roster = _roster()
    roster.decline(1, "alpha", "refused by rule storage", 0, transient_at=0.0)
    assert [declined.site for declined in roster.retrying(attempts=2)] == ["alpha"]
    assert roster.retrying(attempts=1) == []
    roster.decline(1, "alpha", "refused by rule version", 0)
    assert roster.retrying() == []
    assert roster.newcomers([1], 0, 1e9) == []


def test_a_declined_node_that_disconnects_is_asked_again_when_it_returns() -> None:
    roster = _roster()
    roster.decline(1, "alpha", "refused by rule version", 0)
    roster.remove_disconnected([])
    assert roster.newcomers([1], 0, 0.0) == [1]


def test_a_site_is_excluded_after_failures_in_a_row_for_the_rounds_of_the_plan() -> None:
    roster = _roster()
    roster.close_round(1, [], {"alpha": "why"})
    roster.close_round(2, ["alpha"], {})
    assert roster.close_round(3, [], {"alpha": "why"}) == []
    (excluded,) = roster.close_round(4, [], {"alpha": "why"})
    assert (excluded.site, excluded.reason, excluded.failures, excluded.until) == ("alpha", "why", 2, 7)
    assert [number for number in range(4, 10) if roster.excluded("alpha", number)] == [4, 5, 6, 7]


def test_excluded_sites_take_part_if_there_would_be_too_few_without_them() -> None:
    roster = _roster()
    for node, site in ((1, "alpha"), (2, "beta")):
        roster.join(Admitted(site, {}, None), node, [1, 2])
    for number in (1, 2):
        roster.close_round(number, ["beta"], {"alpha": "why"})
    assert list(roster.participants(3, needed=1)) == ["beta"]
    assert list(roster.participants(3, needed=2)) == ["alpha", "beta"]
