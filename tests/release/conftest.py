"""What several tests of this room share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from release.reading import ScanReader


@pytest.fixture(scope="session")
def reader() -> Iterator[ScanReader]:
    """Return a reader of scans; its process starts once for all tests."""
    with ScanReader() as running:
        yield running
