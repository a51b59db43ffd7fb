"""Reports in a real browser: nothing fetched, nothing wrong, readable on small screens and in the dark."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from reports.lead.report import write_report
from reports.site.report import VIEWER, write_site_report
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


def test_the_viewer_shows_volumes_and_asks_for_nothing(browser: Any, ran: Ran) -> None:
    path = write_site_report(ran.site("alpha"), ran.plan, cases=["case-1", "case-2"], viewer=True).with_name(VIEWER)
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    tab.on(
        "console",
        lambda message: (
            "GPU stall" in message.text or message.type not in ("error", "warning") or said.append(message.text)
        ),
    )
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    tab.locator("#state", has_text="case-1 (unlabeled): scan, pseudo-label, prediction, uncertainty").wait_for()
    planes = _seen(tab)
    assert (planes > 60).mean() > 0.05  # a scan, not an empty canvas
    assert _colours(planes) > 100  # with its prediction
    tab.locator("#opacity-2").fill("0")  # the prediction
    assert _colours(_seen(tab)) < 0.5 * _colours(planes)
    tab.locator("#view").select_option(label="axial")
    assert abs(_seen(tab) - planes).mean() > 1
    tab.locator("#case").select_option(label="case-2 (validation)")
    tab.locator("#state", has_text="case-2 (validation): scan, label, prediction").wait_for()
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
    assert said == []
    tab.close()


def _seen(tab: Any) -> NDArray[np.int64]:
    """Return the pixels (rows, columns, RGB) of the viewer's picture."""
    tab.wait_for_timeout(300)
    picture = Image.open(io.BytesIO(tab.locator("#volume").screenshot())).convert("RGB")
    return np.asarray(picture).astype(np.int64)


def _colours(pixels: NDArray[np.int64]) -> int:
    return int((np.ptp(pixels, axis=-1) > 60).sum())


def _light(colour: str) -> float:
    """Return the relative luminance of `rgb(r, g, b)`, by WCAG 2.2."""
    values = [int(each) / 255 for each in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_light(one), _light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
