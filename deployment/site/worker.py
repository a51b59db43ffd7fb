"""The process that runs approved code on one message. Started by path; imports nothing of this project.

It first imports what every bundle needs from other projects, which takes most of the time, then waits for one task on
standard input. It has neither the SuperNode's secret nor a task's token: its answer is a folder of files, which the
site's runner checks and sends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

PRELOAD = (
    "torch",
    "monai.data",
    "monai.inferers",
    "monai.losses",
    "monai.networks.nets",
    "monai.transforms",
    "nibabel",
    "scipy.ndimage",
    "skimage.measure",
    "safetensors.torch",
    "pydantic",
    "yaml",
    "flwr.app",
    "flwr.clientapp",
    "flwr.common.serde",
    "flwr.supercore.inflatable.inflatable_utils",
)
OWN = frozenset({"cli", "client", "deployment", "engines", "experiments", "semisam_core", "server"})


class OnlyFrom(MetaPathFinder):
    """Finds a bundle's packages in the site's copy of the bundle and nowhere else.

    Args:
        folder: the copy.
        packages: the bundle's top-level names. This project's other packages are not found at all.
    """

    def __init__(self, folder: Path, packages: Sequence[str]) -> None:
        self._folder, self._packages = str(folder), frozenset(packages)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a top-level package of the bundle; others are left to Python."""
        if path is not None or fullname not in self._packages | OWN:
            return None
        found = PathFinder.find_spec(fullname, [self._folder], target) if fullname in self._packages else None
        if found is None:
            raise ModuleNotFoundError(f"{fullname} is not in the approved bundle", name=fullname)
        return found


def main() -> None:
    """Wait for one task, run it and exit; exit earlier if the process given as the argument is no longer the parent."""
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    for name in PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    line = sys.stdin.readline()
    if line:
        work(json.loads(line))


def work(job: dict[str, Any]) -> None:
    """Run the approved ClientApp on a message and write its reply to files.

    Args:
        job: `task`, the folder with the message; `code`, the copy of the bundle; `packages` and `component` of the
            bundle; `site_file`; `manifest`, the hash of the one that was approved; `run_id`, `node_id`, `series_id`.
    """
    task = Path(job["task"])
    message = _message(task)
    app = _load(Path(job["code"]), job["packages"], job["component"])
    from flwr.app import Context, RecordDict

    # No run config from the wire: approved code gets paths from this site only.
    context = Context(
        run_id=job["run_id"],
        node_id=job["node_id"],
        node_config={"site-config": job["site_file"], "approved-manifest": job["manifest"]},
        state=RecordDict(),
        run_config={},
        series_id=job["series_id"],
    )
    _leave(app(message=message, context=context), task)


def _load(code: Path, packages: Sequence[str], component: str) -> Any:
    early = sorted(set(packages) & set(sys.modules))
    if early:
        raise ImportError(f"{', '.join(early)}: imported before the approved bundle")
    sys.meta_path.insert(0, OnlyFrom(code, packages))
    module, _, attribute = component.partition(":")
    app = getattr(importlib.import_module(module), attribute)
    for name in packages:
        origin = getattr(sys.modules.get(name), "__file__", None)
        if origin is not None and not Path(origin).is_relative_to(code):
            raise ImportError(f"{name}: not imported from the approved bundle")
    return app


def _message(task: Path) -> Any:
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    contents = {path.name: path.read_bytes() for path in (task / "objects").iterdir()}
    root = (task / "root").read_text(encoding="ascii")
    message = inflate_object_from_contents(root, contents)
    message.metadata.__dict__["_message_id"] = root  # type: ignore[attr-defined]
    return message


def _leave(reply: Any, task: Path) -> None:
    from flwr.app.message.message import remove_content_from_message
    from flwr.common.serde import message_to_proto
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        no_object_id_recompute,
    )

    reply.metadata.__dict__["_message_id"] = reply.object_id
    unfinished = task / "unfinished"
    (unfinished / "objects").mkdir(parents=True)
    head = message_to_proto(remove_content_from_message(reply))
    with no_object_id_recompute():
        (unfinished / "message.pb").write_bytes(head.SerializeToString())
        (unfinished / "tree.pb").write_bytes(get_object_tree(reply).SerializeToString())
        for name, nested in get_all_nested_objects(reply).items():
            (unfinished / "objects" / name).write_bytes(nested.deflate())
    unfinished.rename(task / "reply")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # children of approved code too
    os._exit(1)


if __name__ == "__main__":
    main()
