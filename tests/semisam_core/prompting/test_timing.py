"""The standard scan costs what it says: every unit encoded once, one prompt set answered."""

from __future__ import annotations

from semisam_core.prompting.timing import RADIUS_MM, SPACING_MM, measure
from tests.semisam_core.generalists.fake import FakeGeneralist


def test_the_standard_scan_has_one_prompt_set_on_each_slice_of_the_ball() -> None:
    model = FakeGeneralist()
    timing = measure(model)
    assert len(model.embedded) == len(set(model.embedded)) == 2 * RADIUS_MM / SPACING_MM
    assert len(model.prompts) == 1
    assert timing.encode_s > 0
    assert timing.answer_s > 0
    assert timing.scan_s == timing.encode_s + timing.answer_s
