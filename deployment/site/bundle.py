"""Read a Flower app bundle without trusting it, and compare it with another, file by file."""

from __future__ import annotations

import codecs
import difflib
import importlib.metadata
import io
import re
import stat
import sys
import tokenize
import tomllib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from deployment.invitation import sha256
from deployment.site.worker import OWN
from semisam_core.errors import SemiSAMError
from semisam_core.text import printable

MAXIMUM_PACKED = 10 * 2**20
MAXIMUM_UNPACKED = 64 * 2**20
MAXIMUM_FILES = 2000
PROJECT = "pyproject.toml"
PATH = re.compile(r"[A-Za-z0-9_.\-]+(?:/[A-Za-z0-9_.\-]+)*")
COMPONENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*")


class BundleError(SemiSAMError):
    """A bundle that cannot be approved; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Bundle:
    """A bundle in which every file is text that a person can read.

    Attributes:
        content: the bundle as it travels, a zip.
        files: path within the bundle -> bytes.
        component: the ClientApp, `module:attribute`.
        packages: import names of its top-level modules and packages.
    """

    content: bytes
    files: Mapping[str, bytes]
    component: str
    packages: tuple[str, ...]

    @property
    def hash(self) -> str:
        """SHA-256 of the content; approvals refer to it."""
        return sha256(self.content)


@dataclass(frozen=True)
class FileChange:
    """How one file differs: lines added and removed, and the unified diff."""

    path: str
    kind: str
    added: int
    removed: int
    diff: str


def read_bundle(content: bytes, origin: str) -> Bundle:
    """Read a bundle and check everything that must hold before a person may approve it. Nothing is imported or written.

    Args:
        content: the zip.
        origin: what to call it in messages.

    Raises:
        BundleError: a path leads out of the bundle, a file is not text, too large or listed twice, or one of the
            bundle's packages would shadow a Python package.
    """
    if len(content) > MAXIMUM_PACKED:
        raise BundleError(f"{origin}: {len(content)} bytes, accepted are {MAXIMUM_PACKED}.")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = _files(archive, origin)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise BundleError(f"{origin}: this is not a readable bundle ({error}).") from None
    packages = _packages(files)
    _check_shadows(packages, origin)
    return Bundle(content, files, _component(files, packages, origin), packages)


def compare(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[FileChange]:
    """Return every file that was added, removed or changed, by path."""
    changes = []
    for path in sorted(set(before) | set(after)):
        if before.get(path) == after.get(path):
            continue
        kind = "added" if path not in before else "removed" if path not in after else "changed"
        old, new = (_lines(side.get(path, b"")) for side in (before, after))
        lines = list(difflib.unified_diff(old, new, f"approved/{path}", f"offered/{path}", lineterm=""))
        body = lines[2:]
        added, removed = (sum(line.startswith(sign) for line in body) for sign in "+-")
        changes.append(FileChange(path, kind, added, removed, "\n".join(lines)))
    return changes


def _lines(content: bytes) -> list[str]:
    """Return the lines, split at newlines only, so that other characters that some programs take for line ends show."""
    lines = content.decode("utf-8").split("\n")
    return lines if lines[-1] else lines[:-1]


def _files(archive: zipfile.ZipFile, origin: str) -> dict[str, bytes]:
    infos = [info for info in archive.infolist() if not info.is_dir()]
    if len(infos) > MAXIMUM_FILES:
        raise BundleError(f"{origin}: {len(infos)} files, accepted are {MAXIMUM_FILES}.")
    files: dict[str, bytes] = {}
    seen: set[str] = set()
    left = MAXIMUM_UNPACKED
    for info in infos:
        _check_member(info, origin)
        if info.filename.casefold() in seen:
            raise BundleError(f"{origin}: {info.filename} is listed twice.")
        seen.add(info.filename.casefold())
        with archive.open(info) as file:
            content = file.read(left + 1)  # the size in the zip header may be a lie
        left -= len(content)
        if left < 0:
            raise BundleError(f"{origin}: its files add up to more than {MAXIMUM_UNPACKED} bytes.")
        files[info.filename] = _text(content, info.filename, origin)
    for path in files:
        if any(str(parent).casefold() in seen for parent in PurePosixPath(path).parents):
            raise BundleError(f"{origin}: {path} lies below a file, as if that were a folder.")
    return files


def _check_member(info: zipfile.ZipInfo, origin: str) -> None:
    name = info.filename
    if info.orig_filename != name or not PATH.fullmatch(name) or any(part in {".", ".."} for part in name.split("/")):
        raise BundleError(f"{origin}: {printable(info.orig_filename)!r} is not a valid path within a bundle.")
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise BundleError(f"{origin}: {name} is a link or a special file.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 0x1:
        raise BundleError(f"{origin}: {name} is encrypted or packed in an unusual way.")


def _text(content: bytes, path: str, origin: str) -> bytes:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise BundleError(f"{origin}: {path} is not UTF-8 text, so nobody could review it.")
    if path.endswith(".py") and not _read_as_utf8(content):
        raise BundleError(f"{origin}: {path} declares an encoding other than UTF-8, in which comments could be code.")
    return content


def _read_as_utf8(source: bytes) -> bool:
    """Return whether Python decodes this source as UTF-8, which is how reviewers see it."""
    # When Python looks for a declared encoding, a lone carriage return ends a line too.
    lines = io.BytesIO(source.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    try:
        return codecs.lookup(tokenize.detect_encoding(lines.readline)[0]).name in {"utf-8", "utf-8-sig"}
    except SyntaxError:
        return False


def _packages(files: Mapping[str, bytes]) -> tuple[str, ...]:
    names = set()
    for path in files:
        first, _, rest = path.partition("/")
        if rest and path.endswith(".py"):
            names.add(first)
        elif not rest and first.endswith(".py"):
            names.add(first.removesuffix(".py"))
    return tuple(sorted(names))


def _check_shadows(packages: tuple[str, ...], origin: str) -> None:
    installed = set(importlib.metadata.packages_distributions()) - OWN
    shadowing = [name for name in packages if name in sys.stdlib_module_names or name in installed]
    if shadowing:
        raise BundleError(f"{origin}: {', '.join(shadowing)} would shadow installed Python packages of that name.")


def _component(files: Mapping[str, bytes], packages: tuple[str, ...], origin: str) -> str:
    try:
        settings = tomllib.loads(files[PROJECT].decode("utf-8"))
        component = settings["tool"]["flwr"]["app"]["components"]["clientapp"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise BundleError(f"{origin}: {PROJECT} is missing or names no clientapp.") from None
    if not isinstance(component, str) or not COMPONENT.fullmatch(component):
        raise BundleError(f"{origin}: {PROJECT} names no clientapp of the form module:attribute.")
    if component.partition(":")[0].partition(".")[0] not in packages:
        raise BundleError(f"{origin}: the clientapp {component} is not in the bundle.")
    return component
