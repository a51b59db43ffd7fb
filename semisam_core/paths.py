"""Paths as people give them: made absolute, or refused with a sentence that names the option or key."""

from __future__ import annotations

import tempfile
from pathlib import Path

from semisam_core.errors import ConfigError


def absolute_path(path: Path, origin: str, base: Path | None = None) -> Path:
    """Return a path with `~` expanded and links resolved. It need not exist.

    Args:
        path: the path as given.
        origin: the option or key it was given for, as in messages: `--out`, `sites/north.yaml: data.images`.
        base: the folder a relative path starts from; the working directory by default.

    Raises:
        ConfigError: `~user` names no user, links form a loop, a name is too long, or a folder may not be searched.
    """
    try:
        absolute = ((base or Path()) / path.expanduser()).resolve()
        absolute.stat()
    except (FileNotFoundError, NotADirectoryError):
        return absolute
    except OSError as error:
        reason = error.strerror or str(error)
    except RuntimeError as error:
        if path.parts[:1] and path.parts[0].startswith("~"):
            reason = f"this machine has no home folder for {path.parts[0]}"
        else:
            reason = f"{error}".split(" from ")[0]  # "Symlink loop from ...": the path is named already
    except ValueError:
        reason = "a path cannot contain a null character"
    else:
        return absolute
    raise ConfigError(f"{origin} {_shortened(path)}: this path cannot be used ({reason}).") from None


def writable_folder(path: Path, origin: str) -> Path:
    """Create a folder, parents included, and check that files can be written to it; return its absolute path.

    Args:
        path: the folder as given.
        origin: the option or key it was given for.

    Raises:
        ConfigError: the path cannot be used or nothing can be written there.
    """
    absolute = absolute_path(path, origin)
    try:
        absolute.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=absolute):
            pass
    except OSError as error:
        raise ConfigError(
            f"{origin} {_shortened(path)}: this folder cannot be written to ({error.strerror}). Name one that can."
        ) from None
    return absolute


def new_folder(path: Path, origin: str, advice: str) -> Path:
    """Create a folder for new files, or take an empty one; return its absolute path.

    Args:
        path: the folder as given.
        origin: the option or key it was given for.
        advice: what to do if the folder has files, to end a sentence with.

    Raises:
        ConfigError: the path cannot be used, nothing can be written there, or it has files already.
    """
    folder = writable_folder(path, origin)
    if any(folder.iterdir()):
        raise ConfigError(f"{origin} {_shortened(path)}: the folder is not empty; {advice}.")
    return folder


def _shortened(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:80]}...{text[-40:]}"
