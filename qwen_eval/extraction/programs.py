"""Extraction of programs from replies.

Nothing here runs what it reads; sources are only parsed, a bounded number of times. `upstream_chat_body` is the
extractor of the official script, the others are meant to be correct: they keep imports and helpers, and drop a model's
own examples and tests.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence

from qwen_eval.extraction.slicing import (
    MAX_CHARACTERS,
    UNPARSABLE,
    Definition,
    defines,
    first_line,
    is_stub,
    missing_names,
    parsed,
    statements_of,
    tree_of,
    without_examples,
)
from qwen_eval.extraction.symptoms import READ_CHARACTERS, answer_part

FENCE = re.compile(r"^[^\n`~]*(`{3,}|~{3,})[^\n`]*\n(.*?)(?:^[ \t]*\1|\1|\Z)", re.MULTILINE | re.DOTALL)
QUOTE = re.compile(r"^>(?!>>) ?", re.MULTILINE)
TAG = re.compile(r"^</?(?:answer|code|python)>|</?(?:answer|code|python)>$", re.IGNORECASE | re.MULTILINE)
SESSION = re.compile(r"^(?:>>>|\.\.\.)(?: (.*))?$", re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
CODE_LINE = re.compile(  # a line that may stand before a definition and belong to it
    r"$|[ \t)\]}#]|@\w|import \w|from [\w.]+ import |(?:async )?def |class "
    r"|[A-Za-z_]\w*(?:\[[^\]\n]*\]|\.\w+)* *(?::[^=\n]+)?[-+*/|]?= *\S"
)
MAX_CUTS = 16  # parses of one text; every parse cuts a line or more
MAX_BLOCKS = 40  # of a reply, the last ones
MAX_PLACES = 4  # unfenced definitions of a name that are looked at
MAX_HELPERS = 12  # names looked for elsewhere in a reply


def longest_program(source: str, *, at_least: int = 0) -> str:
    """`source` without the lines at its end that keep it from parsing: prose after code, a statement cut off.

    The first `at_least` lines are never given up.
    """
    lines = source[:MAX_CHARACTERS].split("\n")
    for _ in range(MAX_CUTS):
        if len(lines) <= at_least:
            break
        tree_source = "\n".join(lines)
        try:
            tree_of(tree_source)
            return tree_source
        except SyntaxError as error:
            bad = min((error.lineno or len(lines)) - 1, len(lines) - 1)
            lines = lines[: max(bad, at_least)]
        except UNPARSABLE:
            return source
    return "\n".join(lines[:at_least])


# --- chat replies ---------------------------------------------------------------------------------------------------


def program_in_reply(reply: str, entry_point: str, prompt: str = "", *, also: Collection[str] = ()) -> str | None:
    """The program a chat reply offers for `entry_point`, None when there is no code that defines it.

    Taken from the last fenced block that defines it (a mere stub last of all), else from code between the prose, else
    the reply is read as the body that continues `prompt`. Of the rest of the reply come the imports and helpers that
    this program misses, and of the program what `entry_point` and the names `also` need.
    """
    reply = _plain_markdown(reply)
    blocks = [_plain_session(textwrap.dedent(match[2])) for match in FENCE.finditer(reply)][-MAX_BLOCKS:]
    context = prompt_context(prompt, entry_point)
    stub = None
    for number, program in _offers(reply, blocks, entry_point, also):
        others = blocks if number is None else [*reversed(blocks[:number]), *blocks[number + 1 :]]
        whole = _joined([context, *_helpers(program, context, others, reply), program])
        if not is_stub(program, entry_point):
            return whole
        stub = stub or whole
    return stub or (_continued(prompt, [*reversed(blocks), reply], entry_point) if prompt else None)


def _offers(
    reply: str, blocks: Sequence[str], entry_point: str, also: Collection[str]
) -> Iterator[tuple[int | None, str]]:
    """(number of the block, program) of what defines the entry point, best first: functions, methods, unfenced code."""
    for find in (_defining, _as_method):
        for number in range(len(blocks) - 1, -1, -1):
            if program := find(blocks[number], entry_point, also):
                yield number, program
    for loose in _loose_code(reply, entry_point):
        if program := _defining(loose, entry_point, also):
            yield None, program


def _plain_markdown(reply: str) -> str:
    """The part of a reply that answers, its line ends as in Python, without the marks of quotations and tags."""
    reply = answer_part(reply.replace("\r\n", "\n").replace("\r", "\n"))
    return TAG.sub("\n", QUOTE.sub("", reply))


def _plain_session(block: str) -> str:
    """The input of an interactive session, `>>> def f():`, as a program."""
    if not block.lstrip().startswith(">>> "):
        return block
    return "\n".join(match[1] or "" for match in SESSION.finditer(block))


def _defining(block: str, entry_point: str, also: Collection[str]) -> str | None:
    """The block as a program without the model's own examples, if it defines the entry point."""
    program = longest_program(block)
    tree = parsed(program)
    return without_examples(program, {entry_point, *also}) if tree and defines(tree, entry_point) else None


def _as_method(block: str, entry_point: str, also: Collection[str]) -> str | None:
    """The block as a program, if a class of it without arguments (`class Solution`) has the entry point as a method."""
    program = longest_program(block)
    tree = parsed(program)
    for node in tree.body if tree else []:
        if isinstance(node, ast.ClassDef) and any(getattr(part, "name", None) == entry_point for part in node.body):
            return f"{without_examples(program, {node.name, *also})}\n\n{entry_point} = {node.name}().{entry_point}"
    return None


def _helpers(program: str, context: str, blocks: Sequence[str], reply: str) -> list[str]:
    """Definitions elsewhere in the reply of the names that a program misses, and of those that these miss in turn."""
    found: list[str] = []
    known = _bound(context)
    todo = sorted(missing_names(program) - known)
    for _ in range(MAX_HELPERS):
        if not todo:
            break
        name = todo.pop()
        known.add(name)
        candidates = (_defining(source, name, ()) for source in (*blocks, *_loose_code(reply, name)))
        if helper := next((candidate for candidate in candidates if candidate), None):
            found.insert(0, helper)
            known |= _bound(helper)
            todo = sorted((missing_names(helper) | set(todo)) - known)
    return found


def _bound(source: str) -> set[str]:
    tree = parsed(source)
    return {name for statement in statements_of(tree) for name in statement.binds} if tree else set()


def _joined(parts: Sequence[str]) -> str:
    """One program of several; `from __future__` must stand first in it."""
    source = "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"
    future = [line for line in source.split("\n") if line.startswith("from __future__ ")]
    rest = "\n".join(line for line in source.split("\n") if not line.startswith("from __future__ "))
    return "\n".join([*dict.fromkeys(future), rest])


def _loose_code(reply: str, name: str) -> Iterator[str]:
    """Unfenced code that may define `name`, the last first: from the code lines above its definition to the end, or to
    a line that is indented less; then inline code. The reader cuts the prose behind it."""
    lines = reply.split("\n")
    functions = re.compile(rf"([ \t]*)(?:async )?(?:def|class) +{name}\b")
    assignments = re.compile(rf"([ \t]*){name} *(?::[^=\n]+)?=(?!=)")
    for i, indent in [*_places(functions, lines), *_places(assignments, lines)]:
        stretch = [line.removeprefix(indent) for line in _indented(lines[i:], indent)]
        above = []
        for line in reversed(lines[max(0, i - 200) : i]):
            if not line.strip():
                above.append("")
            elif line.startswith(indent) and CODE_LINE.match(line[len(indent) :]):
                above.append(line[len(indent) :])
            else:
                break
        for start in ("\n".join(reversed(above)), ""):
            yield start + "\n" + "\n".join(stretch)
    yield from (code for code in INLINE.findall(reply)[-MAX_BLOCKS:] if name in code)


def _places(definition: re.Pattern[str], lines: Sequence[str]) -> list[tuple[int, str]]:
    """(number, indentation) of the last lines that match, the last first."""
    found = [(i, match[1]) for i, line in enumerate(lines) if (match := definition.match(line))]
    return found[: -MAX_PLACES - 1 : -1]


def _indented(lines: Sequence[str], indent: str) -> Iterator[str]:
    for line in lines:
        if line.strip() and not line.startswith(indent):
            return
        yield line


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
            return "\n".join(lines[: first_line(node) - 1])
    return prompt


# --- programs between marks (MBPP) ----------------------------------------------------------------------------------

# In other cases and words only where they stand alone: `arr[end]` is code.
BEGIN = re.compile(r"\[BEGIN\]|^[* ]*\[(?i:BEGIN)\][* ]*$", re.MULTILINE)
END = re.compile(r"\[DONE\]|^[* ]*\[(?i:DONE|END)\][* ]*$|^DONE$", re.MULTILINE)


def program_between_marks(text: str, function: str, *, also: Collection[str] = ()) -> str | None:
    """The program between `[BEGIN]` and `[DONE]`, quoted, fenced or bare, that defines `function`.

    The last pair of marks with such a program counts: what stands behind it is prose or the next task. Without marks
    the text is read as a chat reply.
    """
    text = answer_part(text.replace("\r\n", "\n").replace("\r", "\n"))
    pieces = [END.split(piece, maxsplit=1)[0] for piece in BEGIN.split(text)][-MAX_BLOCKS:]
    for piece in reversed(pieces):
        for candidate in _unquoted(piece):
            if program := _defining(candidate, function, also):
                return program + "\n"
    return next((p for piece in reversed([text, *pieces]) if (p := program_in_reply(piece, function, also=also))), None)


def _unquoted(piece: str) -> Iterator[str]:
    """The piece as it stands, and what stands in the quotes around it; `\\n` in quotes on one line ends a line."""
    yield piece.strip("\n")
    opening = re.match(r"\s*('{3}|\"{3}|['\"`“‘])", piece)
    if not opening:
        return
    inside, quote = piece[opening.end() :], {"“": "”", "‘": "’"}.get(opening[1], opening[1])
    ends = [match.start() for match in re.finditer(rf"{quote}[ \t]*$", inside, re.MULTILINE)]
    yield from (inside[:end] for end in ends[: -MAX_PLACES - 1 : -1] if parsed(inside[:end]))
    yield inside.rstrip().removesuffix(quote)
    first = inside.strip("\n").split("\n")[0].rstrip().removesuffix(quote)
    if "\\n" in first:
        yield first.replace("\\n", "\n").replace("\\t", "\t")


# --- base completions -----------------------------------------------------------------------------------------------


def continued_program(prompt: str, completion: str) -> str:
    """Prompt and completion as one program, without what follows the code; both as they are if no cut helps.

    Of a completion the beginning is read, its first 20,000 characters: it continues the prompt.
    """
    source = prompt + completion.replace("\r\n", "\n")[:READ_CHARACTERS]
    return longest_program(source, at_least=prompt.rstrip("\n").count("\n") + 1)


# --- the official reader --------------------------------------------------------------------------------------------


def upstream_chat_body(reply: str, entry_point: str) -> str:
    r"""The function body that the official script takes, by three patterns in order, else all of the reply, indented.

    The patterns, which this reads in linear time:
    "```(?:[Pp]ython\n)?.*?def\s+NAME.*?:\n(.*?)\n```", "def\s+NAME.*?:\n(.*?)(?:\n(?!\n*(?:  |\t))|$)", and the latter
    for any name.
    """
    named = re.compile(rf"def\s+{entry_point}")
    fence = reply.find("```")
    if fence >= 0 and (begin := _body_begin(named, reply, fence + 3)) >= 0 and (end := reply.find("\n```", begin)) >= 0:
        return reply[begin:end]
    for definition in (named, re.compile("def")):
        if (begin := _body_begin(definition, reply, 0)) >= 0:
            return reply[begin : _body_end(reply, begin)]
    return textwrap.indent(reply, "    ")


def _body_begin(definition: re.Pattern[str], reply: str, start: int) -> int:
    match = definition.search(reply, start)
    end = reply.find(":\n", match.end()) if match else -1
    return end + 2 if end >= 0 else -1


def _body_end(reply: str, begin: int) -> int:
    """Before the first line end that no indented line follows."""
    for match in re.compile("\n+").finditer(reply, begin):
        if not reply.startswith(("  ", "\t"), match.end()):
            return match.start()
    return len(reply)
