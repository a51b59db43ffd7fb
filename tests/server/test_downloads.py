"""Who is sent the weights, who their change, and what is owed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from semisam_core.codecs import leaving_spec
from semisam_core.contract import update_spec, weights_sha256
from semisam_core.packing import packed_spec
from semisam_core.plan import Plan
from server.downloads import Downloads
from tests.conftest import tiny_plan
from tests.server.replies import initial, trained

Weights = dict[str, Tensor]


@pytest.fixture
def coded() -> Plan:
    return tiny_plan("aggregation.codec={name: int8}")


def test_holders_are_sent_the_change_once_and_all_others_the_weights(coded: Plan) -> None:
    downloads, start = Downloads(coded), initial(coded)
    whole, change = set(packed_spec(update_spec(coded))), set(packed_spec(leaving_spec(coded)))
    assert set(downloads.of(start)("alpha").arrays) == whole
    new = downloads.advance(start, trained(coded), {"alpha"})
    for _ in range(2):  # scoring, then the next round
        download = downloads.of(new)
        assert (set(download("alpha").arrays), download("beta").base) == (change, None)
        assert set(download("beta").arrays) == set(download("alpha").arrays) == whole
    assert downloads.of(new)("alpha").base == weights_sha256(start)


def test_what_is_owed_is_what_the_new_weights_lack(coded: Plan) -> None:
    downloads, start, wanted = Downloads(coded), initial(coded), trained(coded)
    new = downloads.advance(start, wanted, ())
    owed = {name.removeprefix("owed."): value for name, value in downloads.state().items()}
    assert any(bool(value.any()) for value in owed.values())
    for name, value in wanted.items():
        torch.testing.assert_close(new[name] + owed[name], value, rtol=0, atol=1e-6)


def test_after_a_restart_nothing_is_owed_and_nobody_holds_anything(coded: Plan) -> None:
    downloads, start = Downloads(coded), initial(coded)
    new = downloads.advance(start, trained(coded), {"alpha"})
    downloads.restart()
    assert downloads.of(new)("alpha").base is None
    assert downloads.state().keys() == Downloads(coded).state().keys()
    assert not any(bool(value.any()) for value in downloads.state().values())


@pytest.mark.parametrize("codec", ["null", "{name: int8, downloads: false}"])
def test_without_coded_downloads_the_combined_weights_are_the_global_ones(codec: str) -> None:
    plan = tiny_plan(f"aggregation.codec={codec}")
    downloads, combined = Downloads(plan), trained(plan)
    assert downloads.advance(initial(plan), combined, {"alpha"}) is combined
    assert downloads.of(combined)("alpha").base is None
    assert downloads.state() == {}
