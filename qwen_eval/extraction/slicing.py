"""The part of a program that a function needs: its own statements, without the examples and tests around it.

A model's own example must not fail a right function, nor its `input()`, endless menu or `exit()` hang or end it. So
statements are kept by use: the definitions, imports and assignments that the function reads, directly or through
others, and the statements that change what it reads. Sources are only parsed, never run.
"""

from __future__ import annotations

import ast
import builtins
import symtable
import sys
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

MAX_CHARACTERS = 50_000  # no program is that long; parsing is linear, but a loop is no program
UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # the last two: hostile nesting

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

BUILTINS = frozenset(dir(builtins))
DYNAMIC = frozenset(("exec", "eval", "globals", "vars"))  # names that are looked up while the program runs
SETTINGS = frozenset(  # calls that change how the interpreter or a library computes
    (
        "setrecursionlimit",
        "set_int_max_str_digits",
        "seed",
        "filterwarnings",
        "simplefilter",
        "getcontext",
        "setcontext",
    )
)


def tree_of(source: str) -> ast.Module:
    """The syntax tree; raises one of UNPARSABLE."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in somebody's code is their own affair; Python 3.12 would print it
        return ast.parse(source)


def parsed(source: str) -> ast.Module | None:
    """The syntax tree, None when this is not a whole Python program."""
    if len(source) > MAX_CHARACTERS:
        return None
    try:
        return tree_of(source)
    except UNPARSABLE:
        return None


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A statement at the top level, and the names it reads (also within its functions), binds, stores into and uses.

    `stores`: `x[0] = 1`, `x.a = 1`. `uses`: what it may change through a call, `x.append(1)` or `shuffle(x)`.
    """

    node: ast.stmt
    reads: frozenset[str]
    binds: frozenset[str]
    stores: frozenset[str]
    uses: frozenset[str]

    @property
    def is_import(self) -> bool:
        return isinstance(self.node, (ast.Import, ast.ImportFrom))

    @property
    def is_definition(self) -> bool:
        return isinstance(self.node, Definition)


def without_examples(source: str, roots: Collection[str]) -> str:
    """The statements of `source` that its `roots` need, as they stand; all of it when it is no program."""
    tree = parsed(source)
    if tree is None:
        return source
    kept = [statement.node for statement in _needed(statements_of(tree), roots)]
    return source if len(kept) == len(tree.body) else lines_of(source, kept)


def defines(tree: ast.Module, name: str) -> bool:
    """Whether running the program binds `name` to something of its own, or to a part of the standard library."""
    return any(name in statement.binds and not _is_foreign(statement.node) for statement in statements_of(tree))


def _is_foreign(node: ast.stmt) -> bool:
    """`from solution import f`: a usage example, not a definition."""
    if isinstance(node, ast.Import):
        return True
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in sys.stdlib_module_names


def called_function(test: str, reference: str) -> str:
    """The function of the `reference` solution that `test` calls: the entry point where a benchmark names none (MBPP).

    The last one defined where there are several; "" where there is none. Raises one of UNPARSABLE.
    """
    defined = [node.name for node in tree_of(reference).body if isinstance(node, ast.FunctionDef)]
    calls = (node.func for node in ast.walk(tree_of(test)) if isinstance(node, ast.Call))
    used = {function.id for function in calls if isinstance(function, ast.Name)}
    return next((name for name in reversed(defined) if name in used), "")


def is_stub(source: str, name: str) -> bool:
    """Whether the function `name` is only announced: `...`, `pass` or a docstring."""
    tree = parsed(source)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name] if tree else []
    return bool(functions) and all(_does_nothing(node) for node in functions[-1].body)


def _does_nothing(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def missing_names(source: str) -> set[str]:
    """The names that a program reads and neither binds nor finds among the builtins."""
    tree = parsed(source)
    found = statements_of(tree) if tree else []
    bound = {name for statement in found for name in statement.binds}
    return {name for statement in found for name in statement.reads} - bound - BUILTINS


def statements_of(tree: ast.Module) -> list[Statement]:
    """The statements of a program; one that cannot be compiled (a `return` outside) is left out."""
    return [statement for node in tree.body if (statement := _statement(node))]


def _statement(node: ast.stmt) -> Statement | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = symtable.symtable(ast.unparse(node), "reply", "exec")
        reads = frozenset(_reads(table))
    except UNPARSABLE:
        return None
    symbols = [] if isinstance(node, ast.AnnAssign) and node.value is None else table.get_symbols()
    binds = frozenset(s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace())
    return Statement(node=node, reads=reads, binds=binds, stores=frozenset(_stores(node)), uses=frozenset(_uses(node)))


def _reads(table: symtable.SymbolTable, *, is_top: bool = True) -> Iterator[str]:
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (is_top or symbol.is_global()):
            yield symbol.get_name()
    for child in table.get_children():
        yield from _reads(child, is_top=False)


def _stores(node: ast.stmt) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, (ast.Subscript, ast.Attribute)) and not isinstance(part.ctx, ast.Load):
            yield from _base_name(part.value)
        elif isinstance(part, ast.Global):
            yield from part.names


def _uses(node: ast.stmt) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
            yield from _base_name(part.func.value)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not _is_print(node.value):
        yield from (argument.id for argument in node.value.args if isinstance(argument, ast.Name))


def _is_print(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "print"


def _base_name(node: ast.expr) -> Iterator[str]:
    while isinstance(node, (ast.Subscript, ast.Attribute)):
        node = node.value
    if isinstance(node, ast.Name):
        yield node.id


def _needed(found: Sequence[Statement], roots: Collection[str]) -> list[Statement]:
    """The statements that bind or change what `roots` read, and what those read in turn, in their order."""
    kept = {id(statement) for statement in found if _is_setting(statement.node)}
    names = [*roots, *(name for statement in found if id(statement) in kept for name in statement.reads)]
    makers = _makers(found, roots)
    while names:
        for statement in makers.pop(names.pop(), []):
            if id(statement) not in kept:
                kept.add(id(statement))
                names.extend(statement.reads)
    if any(statement.reads & DYNAMIC for statement in found if id(statement) in kept):
        kept |= {id(statement) for statement in found if statement.is_import or statement.is_definition}
    return [statement for statement in found if id(statement) in kept]


def _makers(found: Sequence[Statement], roots: Collection[str]) -> dict[str, list[Statement]]:
    """By name, the statements that bind it or change its object: also `fill()`, where the function `fill` does."""
    modules = {name for statement in found if statement.is_import for name in statement.binds}
    functions = {name: statement for statement in found if statement.is_definition for name in statement.binds}
    fillers = {
        name: statement.stores | (statement.uses - functions.keys() - modules)
        for name, statement in functions.items()
        if not statement.reads & set(roots) and name not in roots
    }
    makers: defaultdict[str, list[Statement]] = defaultdict(list)
    for statement in found:
        if _is_example(statement.node):
            continue
        names = statement.binds
        if not statement.is_definition:
            filled = {name for called in statement.reads & fillers.keys() for name in fillers[called]}
            names = names | (statement.stores - modules) | (statement.uses - modules - functions.keys()) | filled
        for name in names:
            makers[name].append(statement)
    return makers


def _is_example(node: ast.stmt) -> bool:
    """An assert, a print, `if __name__ == "__main__"`, or `f = f(3)`."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
        return node.value.func.id in {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.If):
        return "__name__" in {part.id for part in ast.walk(node.test) if isinstance(part, ast.Name)}
    is_print = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _is_print(node.value)
    return is_print or isinstance(node, ast.Assert)


def _is_setting(node: ast.stmt) -> bool:
    """`sys.setrecursionlimit(...)`, `getcontext().prec = 50`, `from x import *`, `from __future__ import ...`."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__" or any(alias.name == "*" for alias in node.names)
    if not isinstance(node, (ast.Expr, ast.Assign)):
        return False
    called = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    return any(getattr(function, "attr", getattr(function, "id", None)) in SETTINGS for function in called)


# --- source text ----------------------------------------------------------------------------------------------------


def first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def lines_of(source: str, nodes: Sequence[ast.stmt]) -> str:
    """The lines of the statements; one that shares a line with another statement is written anew."""
    lines = source.split("\n")
    return "\n".join(
        "\n".join(lines[first_line(node) - 1 : node.end_lineno]) if _is_alone(node, lines) else ast.unparse(node)
        for node in nodes
    )


def _is_alone(node: ast.stmt, lines: Sequence[str]) -> bool:
    if node.end_lineno is None or node.end_col_offset is None:
        return False
    rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].strip(b" \t;")
    return node.col_offset == 0 and (not rest or rest.startswith(b"#"))
