"""The rooms of the package and the arrows between them, read from every import statement.

A room is a package (`qwen_eval/models/`) or a module at the root (`qwen_eval/metrics.py`). Entry points (the `__main__`
modules, `cli`, `demo`, the Python API and the modules that forward to them) may import every room and are imported by
none.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qwen_eval"

# Room -> the rooms that it may import. A new room is added here, above everything that it imports.
ALLOWED: dict[str, str] = {
    "core": "",
    "activity": "",
    "config": "core",
    "terminal": "core",
    "extraction": "core",
    "figures": "core",
    "sandbox": "core",
    "metrics": "core",
    "tables": "core terminal",
    "corpus": "core metrics",
    "hubs": "core activity",
    "data": "core activity config hubs",
    "models": "core activity config hubs",
    "engines": "core activity config terminal models",
    "tasks": "core config extraction figures sandbox metrics corpus data",
    "quantize": "core activity config models",
    "runs": "core activity config terminal tables metrics data models engines tasks",
    "profile": "core activity config terminal tables models engines runs",
    "report": "core activity config terminal tables figures metrics corpus data models tasks runs profile",
    "ship": "core activity config terminal tables models engines tasks runs report",
}
ENTRY_POINTS = (
    "qwen_eval", "__main__", "api", "cli", "demo", "ship.command", "ship.config", "profile.tokens",
    "runs.preview_command", "runs.regrade_command", "report.list_command",
)  # fmt: skip
# The lazy imports elsewhere, and why: modules that import torch, or a package that may not be there.
DOORS = {
    ("runs.plan", "models.device"): "a plan for a GPU, or a CPU that numpy cannot measure, asks torch",
    ("runs.plan", "models.load"): "as models.device",
    ("runs.plan", "models.quant.kernels"): "as models.device",
    ("report.finetune", "models.device"): "a plan asks the device; tables of stored runs do not",
    ("report.finetune", "models.load"): "as models.device",
    ("models.attend", "models.gpu.attention"): "Triton is there only with CUDA",
    ("models.attend", "models.gpu.block"): "as models.gpu.attention",
    ("models.fused", "models.gpu.block"): "as models.gpu.attention",
    ("models.runner", "models.gpu.check"): "as models.gpu.attention",
    ("models.dense", "models.gpu.vector"): "as models.gpu.attention",
    ("models.load", "models.gpu.measure"): "as models.gpu.attention",
    ("engines.openai.engine", "engines.api.client"): "needs a package of an extra; without it the user is told so",
    ("report.compare", "report.kld"): "only runs that kept hidden states are compared by them",
    ("ship.sides", "models.device"): "memory is looked at only before two checkpoints are loaded",
    ("ship.sides", "models.load"): "as models.device",
}
MOST_ROOT_MODULES = 12
SHIM_LINES = 10  # a module at the root that only forwards to an entry point does not count


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import of a module of ours. `is_lazy`: not executed when the importing module is."""

    importer: str
    imported: str
    line: int
    is_lazy: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules() -> dict[str, Path]:
    """Dotted name without the package's -> file; "qwen_eval" is the package itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if "assets" not in path.relative_to(PACKAGE).parts:
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "qwen_eval"] = path
    return found


MODULES = modules()


def imports_of(name: str) -> Iterator[Import]:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    at_once = set(_executed_at_import(tree))
    for node in ast.walk(tree):
        for imported in _names(node):
            yield Import(importer=name, imported=imported, line=node.lineno, is_lazy=node not in at_once)  # type: ignore[attr-defined]


def _executed_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements that run with the module: not those of functions, nor of `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not is_typing:
            yield node
            yield from _executed_at_import(node)


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        found = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return
    for full in found:
        if full == "qwen_eval" or full.startswith("qwen_eval."):
            inner = full.removeprefix("qwen_eval").lstrip(".")
            yield inner if inner in MODULES else inner.rpartition(".")[0] or "qwen_eval"


def room_of(name: str) -> str:
    return name.split(".")[0]


def is_entry_point(name: str) -> bool:
    return name in ENTRY_POINTS or room_of(name) == "cli" or name.endswith(".__main__") or is_shim(name)


def is_shim(name: str) -> bool:
    """A module at the root that forwards to an entry point elsewhere: `qwen_eval/regrade.py`."""
    is_at_root = "." not in name and MODULES[name].parent == PACKAGE and name not in ("qwen_eval", "__main__")
    return is_at_root and len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= SHIM_LINES


@cache  # not while tests are collected, which every worker does
def imports() -> list[Import]:
    return [item for name in MODULES for item in imports_of(name)]


def test_an_import_is_lazy_in_a_function_and_for_type_checkers() -> None:
    lines = [
        "import a", "if TYPE_CHECKING:", "    import b", "class C:", "    def f(self):", "        import c",
        "    import d", "try:", "    import e", "except ImportError:", "    pass",
    ]  # fmt: skip
    found = _executed_at_import(ast.parse("\n".join(lines)))
    assert [node.names[0].name for node in found if isinstance(node, ast.Import)] == ["a", "d", "e"]


def test_core_imports_nothing_of_ours() -> None:
    assert [str(item) for item in imports() if item.importer == "core"] == []


def test_each_room_imports_only_the_rooms_below_it() -> None:
    wrong = []
    for item in imports():
        room, other = room_of(item.importer), room_of(item.imported)
        if room != other and not is_entry_point(item.importer) and other not in ALLOWED.get(room, "").split():
            wrong.append(str(item))
    assert wrong == []


def test_every_room_is_named_with_what_it_may_import() -> None:
    rooms = {room_of(name) for name in MODULES if not is_entry_point(name)} - set(ENTRY_POINTS)
    assert rooms == set(ALLOWED)


def test_the_allowed_imports_only_point_down() -> None:
    order = list(ALLOWED)
    assert [f"{room} -> {other}" for room in order for other in ALLOWED[room].split() if other not in order] == []
    upward = [
        (room, other) for room in order for other in ALLOWED[room].split() if order.index(other) > order.index(room)
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also through a lazy import, or one for type checkers alone."""
    ahead: dict[str, set[str]] = defaultdict(set)
    for item in imports():
        ahead[item.importer].add(item.imported)
    assert _circle(ahead) is None


def _circle(ahead: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return None
        found = next((circle for other in sorted(ahead[name]) if (circle := walk(other, [*path, name]))), None)
        done.add(name)
        return found

    return next((circle for name in sorted(ahead) if (circle := walk(name, []))), None)


def test_a_circle_would_be_found() -> None:
    assert _circle(defaultdict(set, {"a": {"b"}, "b": {"c"}, "c": {"b"}})) == ["b", "c"]


def test_our_own_modules_are_imported_lazily_only_at_entry_points() -> None:
    lazy = [item for item in imports() if item.is_lazy and not is_entry_point(item.importer)]
    assert [str(item) for item in lazy if (item.importer, item.imported) not in DOORS] == []


@pytest.mark.parametrize(("importer", "imported"), DOORS)
def test_a_door_that_is_no_longer_used_is_taken_off_the_list(importer: str, imported: str) -> None:
    doors = [item for item in imports() if (item.importer, item.imported) == (importer, imported)]
    assert {item.is_lazy for item in doors} == {True}


def test_entry_points_are_imported_by_entry_points_and_their_own_room_alone() -> None:
    wrong = [item for item in imports() if is_entry_point(item.imported) and not is_entry_point(item.importer)]
    assert [str(item) for item in wrong if room_of(item.importer) != room_of(item.imported)] == []


def test_the_root_holds_at_most_twelve_modules_beside_the_shims() -> None:
    at_root = [name for name, path in MODULES.items() if path.parent == PACKAGE and not is_shim(name)]
    assert len(at_root) <= MOST_ROOT_MODULES, at_root


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            places[node.name].append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
