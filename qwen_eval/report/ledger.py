"""The ledger: what was published for Qwen v1 and the models in the same tables, and its own contradictions.

ledger.json holds every number as printed, with its sources.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

from qwen_eval.core import JSON
from qwen_eval.tables import Table, number_cell, text_cell

LEDGER = Path(__file__).with_name("ledger.json")
HARDWARE = ("gpu", "torch", "cuda", "context_tokens")  # of a speed: where it was measured, not what


@dataclass(frozen=True, kw_only=True)
class Published:
    """One printed number. `value` is None where "-" or out-of-memory was printed; `text` is what stands there."""

    table: str
    model: str
    variant: str | None
    benchmark: str
    metric: str
    setting: Mapping[str, Any]
    value: float | None
    text: str | None
    unit: str | None
    sources: tuple[str, ...]
    checked: bool

    @property
    def split(self) -> str | None:
        # the C-Eval column of the base table is the test split: 59.6 there, 60.8 on val in the same model's own table
        if self.table == "base_benchmarks" and self.benchmark == "C-Eval":
            return "test"
        return self.setting.get("split")

    @property
    def resolution(self) -> float:
        """Half a unit of the last printed digit."""
        decimals = len(str(self.value).partition(".")[2]) if self.value is not None else 1
        return 0.5 * 10.0**-decimals


@lru_cache(maxsize=1)
def ledger() -> tuple[Published, ...]:
    value = _read()
    rows = [dict(zip(value["columns"], row)) for row in value["rows"]]
    return tuple(
        Published(**{**row, "setting": value["settings"][row["setting"]], "sources": tuple(row["sources"])})
        for row in rows
    )


def sources() -> Mapping[str, str]:
    """Short name of a source -> its title."""
    return _read()["sources"]


class Note(TypedDict):
    """What is known of some printed numbers."""

    what: str
    values: dict[str, JSON]
    note: str | None  # often missing


class Ledger(TypedDict):
    """The file: `rows` are lists under `columns`; `settings` and `sources` are shared by name."""

    columns: list[str]
    rows: list[list[Any]]
    settings: dict[str, dict[str, Any]]
    sources: dict[str, str]
    notes: list[Note]


@lru_cache(maxsize=1)
def _read() -> Ledger:
    value: Ledger = json.loads(LEDGER.read_text(encoding="utf-8"))
    return value


def sources_of(row: Published) -> str:
    titles = sources()
    return "; ".join(titles[key] for key in row.sources) + f" [{row.table}]"


# --- contradictions --------------------------------------------------------------------------------------------------


def contradictions() -> list[Table]:
    """Numbers printed with different values for the same thing, found by rule, and what is known about them."""
    rows = []
    for key, members in _same_thing(ledger()):
        values = sorted({row.value for row in members if row.value is not None})
        if len(values) < 2 or not _conflict(members):
            continue
        printed = "; ".join(f"{row.text}: {sources_of(row)}" for row in members)
        rows.append((text_cell(key), number_cell(values[0], 2), number_cell(values[-1], 2), text_cell(printed)))
    found = Table(
        name="contradictions", title="The ledger's contradictions, found by rule",
        columns=("what", "smallest", "largest", "printed"), rows=tuple(rows),
        notes=("Two values that agree when rounded to the coarser one's digits are no contradiction.",),
    )  # fmt: skip
    known = []
    for note in _read()["notes"]:
        printed = "; ".join(f"{where}: {value}" for where, value in note["values"].items())
        known.append((text_cell(note["what"]), text_cell(printed), text_cell(note.get("note"))))
    remarks = Table(
        name="ledger-notes",
        title="What is known about the ledger",
        columns=("what", "values", "remark"),
        rows=tuple(known),
    )
    return [found, remarks]


def _same_thing(rows: Iterable[Published]) -> list[tuple[str, list[Published]]]:
    groups: dict[str, list[Published]] = defaultdict(list)
    for row in rows:
        metric = {"avg": "accuracy", "peak_gpu_memory": "gpu_memory"}.get(row.metric, row.metric)
        setting = {k: v for k, v in row.setting.items() if k not in (*HARDWARE, "split")} | {"split": row.split}
        shown = ", ".join(f"{k}={v}" for k, v in sorted(setting.items()) if v is not None)
        groups[f"{row.model} {row.variant or ''} · {row.benchmark} {metric} · {shown}"].append(row)
    return sorted(groups.items())


def _conflict(members: Sequence[Published]) -> bool:
    valued = [(row.value, row.resolution) for row in members if row.value is not None]
    return any(
        not math.isclose(a, b, abs_tol=max(ra, rb) + 1e-9)
        for i, (a, ra) in enumerate(valued)
        for b, rb in valued[i + 1 :]
    )
