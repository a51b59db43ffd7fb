"""A real browser for tests of pages.

They skip without a Chromium and the extra `browser`. SEMISAM_CHROMIUM names the program; without it, one on the PATH is
taken. The npm package @sparticuz/chromium ships one, and its `executablePath()` unpacks it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    on_the_path = next((found for each in NAMES if (found := shutil.which(each))), None)
    program = os.environ.get("SEMISAM_CHROMIUM") or on_the_path
    if program is None:
        pytest.skip("no Chromium: SEMISAM_CHROMIUM names none and none is on the PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--enable-unsafe-swiftshader"])
        yield opened
        opened.close()
