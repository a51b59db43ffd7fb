"""The page in a real browser: what a radiologist does with mouse and keyboard, and what becomes of it."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from review.desk import Desk
from review.masks import read_mask
from review.server import PageServer
from tests.browser import browser as browser
from tests.conftest import write_blobs, write_site
from tests.review.site import PLAN, reviewing, trained

NAMELESS = """
[...document.querySelectorAll('button, input, select, canvas')]
  .filter(each => !(each.labels?.length || each.getAttribute('aria-label') || each.textContent.trim()))
  .map(each => each.outerHTML)
"""
CUT_OFF = """
[...document.querySelectorAll('button, input, select, h1, h2, p')]
  .filter(each => each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML)
"""


@dataclass
class Opened:
    """The page, open on the first scan, and what the browser said and asked."""

    tab: Any
    server: PageServer
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def coloured(self) -> int:
        """Return how many pixels of the slice, as it is seen, have a class's colour."""
        seen = Image.open(io.BytesIO(self.tab.locator("#picture").screenshot())).convert("RGB")
        pixels = np.asarray(seen).astype(int)
        return int((abs(pixels[..., 0] - pixels[..., 2]) > 20).sum())

    def where(self) -> str:
        return str(self.tab.locator("#where").text_content())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    write_blobs(folder / "data" / "alpha", 8)
    return trained(write_site(folder, "alpha"))


@pytest.fixture(params=[1280, 390])
def opened(browser: Any, site: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    server = PageServer(Desk(reviewing(site, f"browser-{request.param}"), 10))
    serving = threading.Thread(target=server.serve_until_idle, args=(120.0,))
    serving.start()
    context = browser.new_context(viewport={"width": request.param, "height": 800})
    found = Opened(context.new_page(), server)
    found.tab.on("console", lambda message: found.said.append(message.text))
    found.tab.on("pageerror", lambda error: found.said.append(str(error)))
    found.tab.on("request", lambda asked: found.asked.append(asked.url))
    found.tab.goto(server.url)
    found.tab.locator("#where", has_text="axial").wait_for()
    yield found
    context.close()
    server.shutdown()
    serving.join(10)


def test_the_page_asks_only_its_own_command_and_every_control_has_a_name(opened: Opened) -> None:
    assert opened.said == []
    assert all(url.startswith(opened.server.url) for url in opened.asked)
    assert opened.tab.evaluate(NAMELESS) == []


def test_every_control_is_within_the_page_at_any_width(opened: Opened) -> None:
    assert opened.tab.evaluate(CUT_OFF) == []
    box = opened.tab.locator("#picture").bounding_box()
    assert box["width"] > 150
    assert box["height"] > 150


def test_keyboard_and_wheel_move_through_slices_and_planes(opened: Opened) -> None:
    tab = opened.tab
    tab.locator("#picture").focus()
    before = opened.where()
    tab.keyboard.press("ArrowUp")
    tab.locator("#where", has_not_text=before).wait_for()
    tab.keyboard.press("ArrowDown")
    tab.locator("#where", has_text=before).wait_for()
    tab.locator("#picture").hover()
    tab.mouse.wheel(0, 100)
    tab.locator("#where", has_not_text=before).wait_for()
    tab.locator("#plane").select_option(label="coronal")
    tab.locator("#where", has_text="coronal").wait_for()
    assert opened.said == []


def test_a_stroke_is_drawn_undone_drawn_again_rated_and_becomes_the_label(opened: Opened, site: Path) -> None:
    tab = opened.tab
    case = tab.locator("#worklist li.open button").evaluate("each => each.firstChild.textContent")
    shown = reviewing(site, "reader").open(case).mask
    tab.locator("#brush").fill("8")
    tab.locator("#picture").scroll_into_view_if_needed()
    box = tab.locator("#picture").bounding_box()
    before = opened.coloured()

    def stroke() -> None:
        tab.mouse.move(box["x"] + 0.15 * box["width"], box["y"] + 0.15 * box["height"])
        tab.mouse.down()
        tab.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.15 * box["height"])
        tab.mouse.up()

    stroke()
    assert opened.coloured() > 1.05 * before
    tab.locator("#picture").focus()
    tab.keyboard.press("z")
    assert opened.coloured() == pytest.approx(before, rel=0.01)  # at the edge, scrolling mixes colours
    stroke()
    tab.locator("#keep").click()
    tab.get_by_text("Rate every class first.").wait_for()
    tab.locator("#rating-0").select_option("2")
    tab.locator("#minutes").fill("4.5")
    tab.locator("#keep").click()
    tab.locator("#worklist li.done", has_text=case).wait_for()
    review = reviewing(site)
    record = review.store.records()[-1]
    assert (record.case, record.ratings, record.minutes, record.decision) == (case, {"blob": 2}, 4.5, "corrected")
    assert record.label is not None
    kept, _ = read_mask(review.store.mask(record.label), reviewing(site, "reader", second=True).open(case).case, PLAN)
    changed = np.argwhere(kept != shown)
    assert len(changed) > 5
    assert len(set(changed[:, 2])) == 1  # on the slice that was shown, and no other
    assert opened.said == []
