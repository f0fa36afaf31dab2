"""Text and tables in a terminal: its width, safe characters, wrapping that breaks no number, the layout of tables."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence

MAX_WORD = 24  # columns: longer words are broken, behind punctuation where there is some, never within a number
MIN_WIDTH = 20
MIN_TEXT = 20  # a column of text is not wrapped narrower than this
PIPE_WIDTH = 200  # without a terminal text is wrapped within this, and numbers may take more
GAP = 2  # columns between two columns of a table

_ATOMS = re.compile(r"[+\-−±]?\d[\d.,]*%?|\D", re.DOTALL)
_PIECES = re.compile(r"[^/_,;:=\-]*[/_,;:=\-]+|[^/_,;:=\-]+")


def plain_text(text: str) -> str:
    """One line of text that no terminal, browser or spreadsheet interprets as a command.

    Control characters, direction overrides, invisible characters and lone surrogates are written as `\\x1b`.
    """
    if text.isprintable():
        return text
    text = text.replace("\r\n", "⏎").replace("\n", "⏎")
    return "".join(_plain(character) for character in text)


def _plain(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character in "\t\u00a0\u2002\u2003\u2009\u202f\u3000" else f"\\x{ord(character):02x}"


def terminal_width() -> int | None:
    """The columns of the terminal, or of COLUMNS where it is set; None into a file or a pipe."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return max(int(columns), MIN_WIDTH)
    return max(shutil.get_terminal_size().columns, MIN_WIDTH) if sys.stdout.isatty() else None


def text_width(text: str) -> int:
    """Columns that it takes: a Chinese character takes two."""
    from rich.cells import cell_len

    return len(text) if text.isascii() else cell_len(text)


# --- wrapping --------------------------------------------------------------------------------------------------------


def longest_piece(text: str) -> int:
    """The width below which `wrapped` would have to break a number or a short word."""
    return max((text_width(piece.rstrip()) for piece in _pieces(text)), default=0)


def wrapped(text: str, width: int | None, *, indent: str = "") -> list[str]:
    """Lines of at most `width` columns, broken between words; a single piece that is wider stays whole."""
    if width is None or text_width(text) + len(indent) <= width:
        return [indent + text]
    lines, line, used = [], "", 0
    room = width - len(indent)
    for piece in _pieces(text):
        needed = text_width(piece.rstrip())
        if line and used + needed > room:
            lines.append(line)
            line, used = "", 0
        line += piece
        used += text_width(piece)
    return [indent + part.rstrip() for part in [*lines, line]]


def _pieces(text: str) -> Iterable[str]:
    """Words with the blanks behind them; parts of words that are longer than MAX_WORD."""
    for word in re.findall(r"\S+\s*|\s+", text):
        if text_width(word.rstrip()) <= MAX_WORD:
            yield word
            continue
        for part in _PIECES.findall(word):
            if text_width(part.rstrip()) <= MAX_WORD:
                yield part
            else:
                yield from _ATOMS.findall(part)


# --- layout ----------------------------------------------------------------------------------------------------------


def layout(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    floors: Sequence[int],
    is_number: Sequence[bool],
    optional: Sequence[int],
    num_keys: int,
    width: int | None,
) -> tuple[str, list[int]]:
    """The table as text, and the columns that were left out.

    In this order until it fits: text is wrapped down to `floors`; columns of `optional` are left out; the columns
    stand in several blocks, each with the first `num_keys`; a row becomes lines of "column: value".
    """
    columns, left_out = list(range(len(heads))), []
    if width is None:
        width = max(PIPE_WIDTH, _needed(columns, floors))
    for column in optional:
        if _needed(columns, floors) <= width:
            break
        columns.remove(column)
        left_out.append(column)
    keys, others = columns[:num_keys], columns[num_keys:]
    if any(_needed([*keys, column], floors) > width for column in others or keys[:1]):
        return _as_lines(heads, rows, columns, width), left_out
    blocks = _blocks(keys, others, floors, width)
    return "\n".join(_grid(heads, rows, block, floors, is_number, width) for block in blocks), left_out


def _needed(columns: Sequence[int], widths: Sequence[int] | Mapping[int, int]) -> int:
    return sum(widths[column] for column in columns) + GAP * (len(columns) - 1)


def _blocks(keys: list[int], others: Sequence[int], floors: Sequence[int], width: int) -> list[list[int]]:
    blocks = [list(keys)]
    for column in others:
        if _needed([*blocks[-1], column], floors) > width:
            blocks.append(list(keys))
        blocks[-1].append(column)
    return blocks


def _grid(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    columns: Sequence[int],
    floors: Sequence[int],
    is_number: Sequence[bool],
    width: int,
) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    widths = _fitted(heads, rows, columns, floors, width)
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, padding=(0, 1))
    for column in columns:
        head = "\n".join(wrapped(heads[column], widths[column]))
        grid.add_column(Text(head), justify="right" if is_number[column] else "left", min_width=widths[column])
    for row in rows:
        grid.add_row(*(Text("\n".join(wrapped(row[column], widths[column]))) for column in columns))
    out = io.StringIO()
    # wide enough that the renderer has nothing to fold: every line break is made above
    Console(file=out, width=_needed(columns, widths) + 2 * len(columns) + 2, highlight=False).print(grid)
    return "".join(line.rstrip() + "\n" for line in out.getvalue().splitlines())


def _fitted(
    heads: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[int], floors: Sequence[int], width: int
) -> dict[int, int]:
    """The width of each column: what its cells take, the widest made narrower until all fit."""
    widths = {
        column: max([text_width(heads[column]), *(text_width(row[column]) for row in rows)]) for column in columns
    }
    excess = sum(widths.values()) + GAP * (len(columns) - 1) - width
    while excess > 0:
        shrinkable = [column for column in columns if widths[column] > floors[column]]
        widest = max(shrinkable, key=lambda column: widths[column])
        widths[widest] -= 1
        excess -= 1
    return widths


def _as_lines(heads: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[int], width: int) -> str:
    parts = []
    for row in rows:
        for column in columns:
            first = f"{heads[column]}: " if heads[column] else ""
            parts += wrapped(first + row[column], width, indent="" if column == columns[0] else "  ")
        parts.append("")
    return "\n".join(parts)
