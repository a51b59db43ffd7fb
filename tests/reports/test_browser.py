"""Reports in a real browser: nothing fetched, nothing wrong, readable on small screens and in the dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reports.lead.report import write_report
from reports.site.report import write_site_report
from tests.reports.conftest import Ran

LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3
# What sticks out of the page, beside regions that scroll by themselves.
STICKS_OUT = """
[...document.querySelectorAll('body *')]
  .filter(each => !each.closest('.scroll, pre') && each.getBoundingClientRect().right > innerWidth + 1)
  .map(each => each.tagName)
"""
SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll('svg text')].map(each => {
  const svg = each.closest('svg');
  return parseFloat(getComputedStyle(each).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
}))
"""
COLOURS = """
[...document.querySelectorAll('p, li, td, th, dt, dd, h1, h2, h3, figcaption, caption, summary, a, code')]
  .map(each => [getComputedStyle(each).color, getComputedStyle(document.body).backgroundColor])
"""


@pytest.fixture(scope="module", params=["lead", "site"])
def page(request: pytest.FixtureRequest, ran: Ran) -> Path:
    return write_report(ran.folder) if request.param == "lead" else write_site_report(ran.site("alpha"), ran.plan)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_is_readable_and_asks_for_nothing(browser: Any, page: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    for each in tab.locator("summary").all():
        each.press("Enter")  # the numbers of every chart are reached by keyboard
    assert tab.evaluate("[...document.querySelectorAll('details')].every(each => each.open)")
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(STICKS_OUT) == []
    drawn = tab.locator("figure > svg, figure > img").all()
    assert len(drawn) >= 5
    assert all((box := each.bounding_box()) and box["width"] > 250 and box["height"] > 50 for each in drawn)
    assert tab.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
    assert tab.evaluate(SMALLEST_TEXT) >= 11
    colours = tab.evaluate(COLOURS)
    assert min(_contrast(*pair) for pair in colours) >= LEAST_CONTRAST
    assert (_light(colours[0][1]) < 0.2) == (scheme == "dark")
    context.close()


def _light(colour: str) -> float:
    """Return the relative luminance of `rgb(r, g, b)`, by WCAG 2.2."""
    values = [int(each) / 255 for each in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_light(one), _light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
