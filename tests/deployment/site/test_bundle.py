"""A bundle is read without trusting it."""

from __future__ import annotations

import io
import stat
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployment.site.bundle import BundleError, compare, read_bundle
from semisam_core.text import printable
from tests.deployment.site.bundles import PYPROJECT, echo_fab, fab


@pytest.mark.parametrize(
    "path",
    ["../evil.py", "/etc/evil.py", "client/../../evil.py", "client\\evil.py", "C:evil.py", "client//evil.py", "."],
)
def test_a_path_outside_the_bundle_is_refused(path: str) -> None:
    with pytest.raises(BundleError, match="not a valid path within a bundle"):
        read_bundle(echo_fab(**{path: "x = 1"}), "a.fab")


def test_a_link_is_refused() -> None:
    buffer = io.BytesIO(echo_fab())
    with zipfile.ZipFile(buffer, "a") as archive:
        info = zipfile.ZipInfo("client/link.py")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(BundleError, match="link"):
        read_bundle(buffer.getvalue(), "a.fab")


def test_content_that_cannot_be_reviewed_is_refused() -> None:
    with pytest.raises(BundleError, match="not UTF-8 text"):
        read_bundle(fab({"pyproject.toml": PYPROJECT, "client/app.py": b"\xff\xfe\x00"}), "a.fab")


@pytest.mark.parametrize(
    "start", ["# coding: unicode_escape\n", "#!x\n# vim: set fileencoding=utf-7 :\n", "\r# -*- coding: utf_7 -*-\n"]
)
def test_source_where_python_runs_what_looks_like_a_comment_is_refused(start: str) -> None:
    with pytest.raises(BundleError, match="encoding other than UTF-8"):
        read_bundle(echo_fab(**{"client/more.py": start + "# harmless\\nevil()\n"}), "a.fab")


@pytest.mark.parametrize("start", ["# -*- coding: utf-8 -*-\n", "# coding: utf8\n", "\ufeff", "\r\n"])
def test_source_that_python_and_a_reader_see_alike_is_accepted(start: str) -> None:
    assert "client/more.py" in read_bundle(echo_fab(**{"client/more.py": start + "x = 1\n"}), "a.fab").files


@pytest.mark.parametrize("path", ["torch/__init__.py", "json.py", "numpy.py", "flwr/x.py"])
def test_a_bundle_that_would_shadow_an_installed_package_is_refused(path: str) -> None:
    with pytest.raises(BundleError, match="would shadow"):
        read_bundle(echo_fab(**{path: ""}), "a.fab")


def test_a_duplicate_file_is_refused() -> None:
    with pytest.raises(BundleError, match="twice"):
        read_bundle(echo_fab(**{"client/App.py": "other"}), "a.fab")


def test_a_zip_that_unpacks_beyond_the_size_limit_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pyproject.toml", PYPROJECT)
        archive.writestr("client/app.py", b" " * (65 * 2**20))
    with pytest.raises(BundleError, match="more than"):
        read_bundle(buffer.getvalue(), "a.fab")


@pytest.mark.parametrize("component", ["torch:load", "client.app", "os:system", "client.app:app; import os"])
def test_a_bundle_without_its_clientapp_is_refused(component: str) -> None:
    project = PYPROJECT.replace("client.app:app", component)
    with pytest.raises(BundleError, match="clientapp"):
        read_bundle(fab({"pyproject.toml": project, "client/app.py": ""}), "a.fab")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 600), st.booleans())
def test_bytes_that_are_not_a_bundle_are_refused_with_a_sentence(noise: bytes, place: int, damaged: bool) -> None:
    content = echo_fab()
    content = content[:place] + noise + content[place + len(noise) :] if damaged else noise
    said = "a.fab: it is a bundle after all"
    try:
        read_bundle(content, "a.fab")
    except BundleError as error:
        said = str(error)
    assert said.startswith("a.fab: ")


def test_a_diff_counts_lines_and_shows_them() -> None:
    before = {"a.py": b"one\ntwo\n", "b.py": b"gone\n", "same.py": b"x\n"}
    changes = compare(before, {"a.py": b"one\nthree\nfour\n", "c.py": b"new\n", "same.py": b"x\n"})
    assert [(c.path, c.kind, c.added, c.removed) for c in changes] == [
        ("a.py", "changed", 2, 1),
        ("b.py", "removed", 0, 1),
        ("c.py", "added", 1, 0),
    ]
    assert "+three" in changes[0].diff
    assert "-two" in changes[0].diff


@pytest.mark.parametrize("end", ["\u2028", "\x0c", "\x85", "\r", "\x1c"])
def test_a_line_that_joins_the_comment_above_it_is_shown_as_changed(end: str) -> None:
    (change,) = compare({"a.py": b"# the limit\ncheck()\n"}, {"a.py": f"# the limit{end}check()\n".encode()})
    assert (change.added, change.removed) == (1, 2)
    assert f"+# the limit{end}check()" in change.diff


def test_a_line_that_looks_like_a_diff_header_is_counted() -> None:
    (change,) = compare({"a.py": b"-- x\n"}, {"a.py": b"++ y\n"})
    assert (change.added, change.removed) == (1, 1)


def test_code_cannot_send_control_sequences_to_the_terminal() -> None:
    assert printable("safe\x1b[2J\u202eevil") == "safe\\x1b[2J\\u202eevil"
