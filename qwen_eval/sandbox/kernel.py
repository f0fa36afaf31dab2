"""A notebook's kernel: cells of code in one namespace. The driver of a `Session`, so it runs inside the sandbox.

It is in the hands of the cells: it decides nothing. Standard library alone; other packages where a cell names them.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import sys
import traceback
import warnings
from typing import Any

ALIASES = {
    "np": "import numpy as np",
    "pd": "import pandas as pd",
    "plt": "import matplotlib.pyplot as plt",
    "sns": "import seaborn as sns",
    "math": "import math",
    "symbols": "from sympy import symbols",
    "solve": "from sympy import solve",
    "Eq": "from sympy import Eq",
}  # imported before a cell that uses the name, where the package is there
FIGURE_BYTES = 4 << 20
os.environ["MPLBACKEND"] = "Agg"
os.environ["MPLCONFIGDIR"] = os.path.abspath(".matplotlib")  # there is no home, which some versions refuse, others tell
warnings.filterwarnings("ignore", "invalid (escape|octal)", SyntaxWarning)  # of Python 3.12: earlier ones do not say so
_cells: dict[str, Any] = {"__name__": "__main__"}


class Capture(io.TextIOBase):
    """Keeps the first `limit` characters and counts the others."""

    def __init__(self, limit: int) -> None:
        self.limit, self.num_dropped, self.kept = limit, 0, io.StringIO()

    def write(self, text: str) -> int:
        text = str(text)
        part = text[: max(0, self.limit - self.kept.tell())]
        self.kept.write(part)
        self.num_dropped += len(text) - len(part)
        return len(text)


def run_cell(source: str, limit: int, wants_figure: bool) -> list[Any]:
    """[output, characters dropped, value of the last expression, error, the last figure as PNG or None]."""
    captured, value, error = Capture(limit), "", ""
    with contextlib.redirect_stdout(captured), contextlib.redirect_stderr(captured):
        try:
            value = _execute(source)[:limit]
        except BaseException as raised:  # SystemExit too: a cell does not end the notebook
            error = "".join(traceback.format_exception_only(type(raised), raised)).strip()[:limit]
    return [captured.kept.getvalue(), captured.num_dropped, value, error, _figure() if wants_figure else None]


def put_file(name: str, content: bytes) -> None:
    """A file of the question in the working folder."""
    with open(os.path.basename(name), "wb") as file:
        file.write(content)


def _execute(source: str) -> str:
    """Run a cell; the value of its last expression as notebooks show it, "" where there is none."""
    tree = ast.parse(source, "<cell>")
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for name in names & ALIASES.keys() - _cells.keys():
        with contextlib.suppress(ImportError):
            exec(ALIASES[name], _cells)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec", dont_inherit=True), _cells)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval", dont_inherit=True), _cells)
        if value is not None:
            return repr(value)
    return ""


def _figure() -> bytes | None:
    """The newest figure that was drawn, which is closed with all others."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None or not pyplot.get_fignums():
        return None
    buffer = io.BytesIO()
    try:
        pyplot.gcf().savefig(buffer, format="png")
        pyplot.close("all")
    except Exception:  # a figure that cannot be drawn is none
        return None
    return buffer.getvalue() if len(buffer.getvalue()) <= FIGURE_BYTES else None
