"""Notebooks: a session a key whose cells keep their variables, at most so many at a time, run anew when asked again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from qwen_eval.sandbox.program import Mode
from qwen_eval.sandbox.session import Session, SessionLost

PACKAGES = (
    "pandas", "pytz", "tzdata", "dateutil", "six.py", "matplotlib", "mpl_toolkits", "contourpy", "cycler", "cycler.py",
    "fontTools", "kiwisolver", "packaging", "PIL", "pillow.libs", "pyparsing", "seaborn", "sympy", "mpmath", "scipy",
    "scipy.libs",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """`value` of the last expression; `error`: the last line of what was raised, or "timed out", "killed", ..."""

    output: str
    value: str = ""
    error: str = ""
    figure: bytes | None = None
    is_lost: bool = False  # the interpreter is gone, with its variables


@dataclass
class Notebook:
    """One interpreter. After a cell that lost it, all further cells are lost too."""

    mode: Mode
    timeout_s: float
    most_characters: int
    wants_figures: bool
    files: Mapping[str, bytes]
    cells: list[str] = field(default_factory=list)
    results: list[CellResult] = field(default_factory=list)
    _session: Session | None = None

    def run(self, source: str) -> CellResult:
        self.cells.append(source)
        self.results.append(self._run(source))
        return self.results[-1]

    def _run(self, source: str) -> CellResult:
        if self.results and self.results[-1].is_lost:
            return CellResult(output="", error="the interpreter has ended", is_lost=True)
        try:
            if self._session is None:
                self._session = self._opened()
            answer = self._session.call(
                "run_cell", source, self.most_characters, self.wants_figures, timeout_s=self.timeout_s
            )
            return _result(answer, self.most_characters)
        except SessionLost as lost:
            self.close()
            return CellResult(output="", error=lost.reason, is_lost=True)

    def _opened(self) -> Session:
        session = Session(kernel(), mode=self.mode, cpu_s=int(4 * self.timeout_s) + 4, packages=PACKAGES)
        for name, content in self.files.items():
            session.call("put_file", name, content, timeout_s=self.timeout_s)
        return session

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


def _result(answer: Any, most: int) -> CellResult:
    """The candidate's word, checked for its shape alone."""
    match answer:
        case [str(output), int(dropped), str(value), str(error), figure] if isinstance(figure, bytes | None):
            cut = f"\n... ({dropped:,} more characters)" if dropped > 0 else ""
            return CellResult(output=output[:most] + cut, value=value[:most], error=error[:most], figure=figure)
    return CellResult(output="", error="damaged answer", is_lost=True)


@cache
def kernel() -> str:
    return Path(__file__).with_name("kernel.py").read_text(encoding="utf-8")


class Notebooks:
    """The newest `most_open` notebooks stay alive; an older one's cells are run again when it is asked for.

    So a question needs its earlier cells alone, and a resumed run finds the same variables. Cells that draw random
    numbers draw the same ones again.
    """

    def __init__(
        self,
        *,
        mode: Mode,
        timeout_s: float,
        most_characters: int = 2048,
        wants_figures: bool = False,
        most_open: int = 8,
    ) -> None:
        self._make = partial(
            Notebook,
            mode=mode,
            timeout_s=timeout_s,
            most_characters=most_characters,
            wants_figures=wants_figures,
        )
        self.most_open = most_open
        self._lock = threading.RLock()  # asked by the thread that asks the model and by those that grade
        self._open: OrderedDict[str, Notebook] = OrderedDict()

    def results(self, key: str, cells: Sequence[str], files: Mapping[str, bytes] | None = None) -> list[CellResult]:
        """What each cell gave, the cells run in their order in the interpreter of `key`."""
        with self._lock:
            notebook = self._open.pop(key, None)
            if notebook is None or notebook.cells != list(cells)[: len(notebook.cells)]:
                if notebook is not None:
                    notebook.close()
                notebook = self._make(files=dict(files or {}))
            self._open[key] = notebook
            for cell in cells[len(notebook.cells) :]:
                notebook.run(cell)
            while len(self._open) > self.most_open:
                self._open.popitem(last=False)[1].close()
            return list(notebook.results)

    def close(self, key: str | None = None) -> None:
        """End one notebook, or all."""
        with self._lock:
            for name in [key] if key is not None else list(self._open):
                notebook = self._open.pop(name, None)
                if notebook is not None:
                    notebook.close()
