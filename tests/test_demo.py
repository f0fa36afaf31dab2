"""python -m qwen_eval without arguments: its suite composes, and its table fits a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_eval import cli, demo
from qwen_eval.config import EvalSpec, check
from qwen_eval.core import Metric


def test_every_cell_composes() -> None:
    suite = demo.load_suite(cli.conf_dir() / "demo.yaml")
    for cell in suite.cells:
        assert cell.show
        argv = [*suite.overrides, *cell.overrides]
        assert cli.run(argv, config_name="config", schema=EvalSpec, job=check) == 0, cell.name


def test_the_table_fits_eighty_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    suite = demo.load_suite(cli.conf_dir() / "demo.yaml")
    wide = Metric(value=109.87, low=43.72, high=265.4, n=12_282, kind="ppl", unit="ppl")
    lines = [demo.Line(cell=cell.name, what=what, metric=wide) for cell in suite.cells for what in cell.show.values()]
    demo.show(suite, lines, "runs/demo", {"num_parameters": 3_051_456}, 20.0)
    said = capsys.readouterr().out
    table = said[said.index("what") : said.index("20 s")]
    assert table.count("12,282") == len(lines)
    assert all(cell.name in table for cell in suite.cells)  # none is broken over two lines
    assert Path("runs/demo").name in said
