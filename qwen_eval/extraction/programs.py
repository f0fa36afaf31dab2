"""Programs in replies: finding the code that is meant to be run.

Nothing here runs what it reads; sources are only parsed. `upstream_chat_body` is the reader of the official script,
the others are meant to be right: they keep imports and helpers, and drop a model's own examples and tests.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence

MAX_CHARACTERS = 50_000  # no reply is that long; parsing is linear, but a loop is no program
FENCE = re.compile(r"^[ \t]*(```|~~~)[^\n`]*\n(.*?)(?:^[ \t]*\1|\1|\Z)", re.MULTILINE | re.DOTALL)
CODE_START = re.compile(r"^(?:import |from [\w.]+ import |(?:async )?def |class |@\w|[A-Za-z_]\w* *(?::[^=\n]+)?= *\S)")
UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # the last two: hostile nesting

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def parsed(source: str) -> ast.Module | None:
    """The syntax tree, None when this is not a whole Python program."""
    if len(source) > MAX_CHARACTERS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a model's code is its own affair
            return ast.parse(source)
    except UNPARSABLE:
        return None


def defines(tree: ast.Module, name: str) -> bool:
    """Whether running the program binds `name` at its top level (a def, class, assignment or import)."""
    for node in tree.body:
        if isinstance(node, Definition) and node.name == name:
            return True
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return True
    return False


def longest_program(source: str, *, at_least: int = 0) -> str:
    """`source` without the lines at its end that keep it from parsing: prose after code, a statement cut off.

    The first `at_least` lines are never given up.
    """
    lines = source[:MAX_CHARACTERS].split("\n")
    while len(lines) > at_least:
        tree_source = "\n".join(lines)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(tree_source)
            return tree_source
        except SyntaxError as error:
            bad = min((error.lineno or len(lines)) - 1, len(lines) - 1)
            lines = lines[: max(bad, at_least)]
        except UNPARSABLE:
            return source
    return "\n".join(lines)


# --- chat replies ---------------------------------------------------------------------------------------------------


def program_in_reply(reply: str, entry_point: str, prompt: str = "") -> str | None:
    """The program a chat reply offers for `entry_point`, None when there is no code that defines it.

    Taken from the last fenced block that defines it, else from code between the prose, else the reply is read as the
    body that continues `prompt`. Imports and helpers of earlier blocks and of the prompt come along.
    """
    reply = reply.replace("\r\n", "\n").replace("\r", "\n")[:MAX_CHARACTERS]
    blocks = [textwrap.dedent(match[2]) for match in FENCE.finditer(reply)]
    context = prompt_context(prompt, entry_point)
    for number in range(len(blocks) - 1, -1, -1):
        if program := _defining(blocks[number], entry_point):
            return _joined([context, *(definitions(b) for b in blocks[:number]), program])
    for loose in _code_between_prose(reply):
        if program := _defining(loose, entry_point):
            return _joined([context, program])
    return _continued(prompt, [*reversed(blocks), reply], entry_point) if prompt else None


def _defining(block: str, entry_point: str) -> str | None:
    """The block as a program without the model's own examples, if it defines the entry point."""
    program = longest_program(block)
    tree = parsed(program)
    return without_examples(program) if tree and defines(tree, entry_point) else None


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def _code_between_prose(reply: str) -> Iterator[str]:
    """Each stretch of text from a line that looks like code to the end; the reader cuts the prose behind it."""
    lines = reply.split("\n")
    is_code = [bool(CODE_START.match(line)) for line in lines]
    for i, line_is_code in enumerate(is_code):
        if line_is_code and not (i and is_code[i - 1]):
            yield "\n".join(lines[i:])


def _continued(prompt: str, bodies: Sequence[str], entry_point: str) -> str | None:
    """`prompt` and the first of `bodies` that is a body for it."""
    for body in bodies:
        body = body.strip("\n")
        indented = textwrap.indent(textwrap.dedent(body), "    ")
        for candidate in (body, indented) if body[:1].isspace() else (indented,):
            num_lines = prompt.rstrip("\n").count("\n") + 1
            program = longest_program(prompt.rstrip("\n") + "\n" + candidate, at_least=num_lines)
            tree = parsed(program)
            if tree and defines(tree, entry_point) and len(program.rstrip()) > len(prompt.rstrip()):
                return program
    return None


def prompt_context(prompt: str, entry_point: str) -> str:
    """Imports and helpers that a prompt gives before the function it asks for."""
    tree = parsed(prompt)
    if tree is None:
        return ""
    lines = prompt.split("\n")
    for node in tree.body:
        if isinstance(node, Definition) and node.name == entry_point:
            return "\n".join(lines[: _first_line(node) - 1])
    return prompt


def definitions(source: str) -> str:
    """Only the imports, functions, classes and assignments of a program: what later code may need."""
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    tree = parsed(source)
    return _lines_of(source, [node for node in tree.body if isinstance(node, kept)]) if tree else ""


def without_examples(source: str) -> str:
    """A program without its trailing prints, asserts and `if __name__ == "__main__"`: a wrong example of the model's
    own must not fail a right function, nor one that waits for input hang it."""
    tree = parsed(source)
    if tree is None:
        return source
    kept = [node for node in tree.body if not _is_example(node)]
    return source if len(kept) == len(tree.body) else _lines_of(source, kept)


def _is_example(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.Expr):
        call = node.value
        return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"
    return isinstance(node, ast.If) and "__name__" in {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _lines_of(source: str, nodes: Sequence[ast.stmt]) -> str:
    lines = source.split("\n")
    pieces = ["\n".join(lines[_first_line(node) - 1 : node.end_lineno]) for node in nodes]
    return "\n".join(dict.fromkeys(pieces))  # statements that share a line come once


# --- base completions -----------------------------------------------------------------------------------------------


def continued_program(prompt: str, completion: str) -> str:
    """Prompt and completion as one program, without what follows the code; both as they are if no cut helps."""
    source = prompt + completion.replace("\r\n", "\n")
    return longest_program(source, at_least=prompt.rstrip("\n").count("\n") + 1)


# --- the official reader --------------------------------------------------------------------------------------------


def upstream_chat_body(reply: str, entry_point: str) -> str:
    """The function body that the official script takes: three patterns in order, else all of it, indented."""
    patterns = (
        rf"```(?:[Pp]ython\n)?.*?def\s+{entry_point}.*?:\n(.*?)\n```",
        rf"def\s+{entry_point}.*?:\n(.*?)(?:\n(?!\n*(?:  |\t))|$)",
        r"def.*?:\n(.*?)(?:\n(?!\n*(?:  |\t))|$)",
    )
    for pattern in patterns:
        if match := re.search(pattern, reply, re.DOTALL):
            return match[1]
    return textwrap.indent(reply, "    ")
