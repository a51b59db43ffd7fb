"""The import graph of `semisam_core`, with imports inside functions and under TYPE_CHECKING."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "semisam_core"


def _modules() -> dict[str, Path]:
    named = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def _imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """Return the modules of the package that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            submodules = {f"{node.module}.{name.name}" for name in node.names} & modules.keys()
            names_of_module = len(submodules) < len(node.names)
            found |= submodules | ({str(node.module)} if names_of_module else set())
    return found & modules.keys()


def _graph() -> dict[str, set[str]]:
    modules = _modules()
    return {name: _imports(path, modules) for name, path in modules.items()}


def _reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    reached, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += graph[name]
    return reached


def test_the_graph_sees_imports_of_every_kind() -> None:
    graph = _graph()
    assert f"{PACKAGE}.regularizers" in graph[f"{PACKAGE}.plan"]
    assert f"{PACKAGE}.specialists.memory" in _reached(f"{PACKAGE}.plan", graph)
    assert len(graph) > 50


def test_there_is_no_import_cycle() -> None:
    TopologicalSorter(_graph()).prepare()  # raises CycleError, which lists the cycle


@pytest.mark.parametrize("room", ["plan", "specialists", "data"])
def test_regularizers_depend_on_neither_plan_nor_specialists_nor_data(room: str) -> None:
    graph = _graph()
    reached = set().union(*(_reached(name, graph) for name in graph if name.startswith(f"{PACKAGE}.regularizers")))
    assert not [name for name in reached if f"{name}.".startswith(f"{PACKAGE}.{room}.")]
