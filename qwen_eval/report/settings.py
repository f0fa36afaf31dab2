"""The settings of a run besides its model, the differences between two runs, and the footnotes of a table about them.

All of the section `decides` of spec.json counts: a run is resumed only when all of it is equal. The keys that are not
reported as differences are listed here with the reason; a new key, also of a new task, is reported.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qwen_eval.core import JSON
from qwen_eval.runs.run import Run
from qwen_eval.tables import Footnote, Table, text_cell

CARD_ORDER = ("mmlu", "ceval", "gsm8k", "math", "humaneval", "mbpp", "bbh", "cmmlu")  # the columns of the base table
MARKS = "abcdefghijklmnopqrstuvwxyz"

# Where the rows of a benchmark lay: their sha256 is compared instead. `format` is told as `mode`.
PLACES = ("name", "data", "path", "hub_id", "revision", "origin", "source", "data_origin", "format", "version")
# Which checkpoint, and its precision: the row of a table says both.
MODEL = (
    "name", "hub_id", "modelscope_id", "hub", "revision", "path", "asset", "weights", "chat", "arch", "seed",
    "dtype", "quant", "kv_cache", "rope", "logn", "window",
)  # fmt: skip
ENGINE = ("api_model",)  # the model's name at its endpoint
FIRST = ("task", "task_version", "protocol", "mode", "split", "shots", "limit", "subjects", "seed")  # told first
DATA = "data_sha256"
SECTIONS = (
    "task", "model", "engine", "benchmark", "protocol", "task_version", "packages", "requests_sha256", "weights",
    "num_samples", "chat_template",  # the checkpoint's own, as its weights are
)  # fmt: skip
CIRCUMSTANCES = ("engine", "model", "packages", "run")  # they change numbers a little, and may be just what is compared


def settings(run: Run) -> dict[str, JSON]:
    """Everything that decides what kind of number this is, but not the model: leaves by name, `{"shots": 5, …}`."""
    decides, benchmark = run.decides, run.benchmark
    asked = _section(decides.get("task")) or _section(run.config.get("task"))
    found = {**_without(asked, PLACES), **_without(benchmark, (*PLACES, "sha256"))}
    found |= {"protocol": run.config.get("protocol"), "task_version": decides.get("task_version")}
    found["limit"] = run.config.get("limit") if asked.get("limit") is None else asked.get("limit")
    if found["limit"] is None:
        found["seed"] = None  # the seed only draws the subset
    found["mode"] = benchmark.get("format") or _mode(run, str(asked.get("mode") or "auto"))
    found[DATA] = benchmark.get(DATA, benchmark.get("sha256"))
    engine = _without(_section(decides.get("engine")), ENGINE)
    found |= {"engine": engine.pop("name", None)} | {f"engine.{key}": value for key, value in engine.items()}
    found |= {f"model.{key}": value for key, value in _without(_section(decides.get("model")), MODEL).items()}
    found |= {"packages": decides.get("packages"), "prompts": decides.get("requests_sha256")}
    found |= {f"run.{key}": value for key, value in _without(decides, SECTIONS).items()}
    leaves = _leaves({"task": run.task, **found})
    return {key: leaves[key] for key in [*FIRST, *leaves] if key in leaves}


def settings_text(
    found: Mapping[str, JSON], keys: Sequence[str] = ("shots", "split", "mode", "protocol", "limit")
) -> str:
    """`"5-shot, val, base"`: the settings in few words; the default protocol and no limit go without saying."""
    parts = []
    for key in keys:
        value = found.get(key)
        if value is None or (key == "protocol" and value == "robust"):
            continue
        parts.append({"shots": f"{value}-shot", "limit": f"limit {value}"}.get(key, plain(value)))
    return ", ".join(parts)


def differing_keys(first: Run, second: Run) -> list[str]:
    """Names of the settings in which two runs differ, the plainest first.

    Counts and the digest of the prompts follow from other settings: they are told when nothing else is.
    """
    a, b = settings(first), settings(second)
    found = [key for key in [*a, *(key for key in b if key not in a)] if a.get(key) != b.get(key)]
    asked = _section(first.decides.get("task")) | _section(second.decides.get("task"))
    found = [key for key in found if key != "seed" or "limit" not in found]  # it draws the subset of `limit`
    causes = [key for key in found if not _is_consequence(key, asked)]
    return causes if any(not _is_circumstance(key) for key in causes) else found


def differing_settings(first: Run, second: Run) -> list[str]:
    """`["shots: 5 against 0"]`: why two scores are not of one kind; engine and packages do not make them unlike."""
    a, b = settings(first), settings(second)
    return [
        f"{key}: {plain(a.get(key))} against {plain(b.get(key))}"
        for key in differing_keys(first, second)
        if not _is_circumstance(key) and key != "prompts"  # the prompts themselves are compared sample by sample
    ]


def by_task(runs: Iterable[Run]) -> list[tuple[str, list[Run]]]:
    """Runs by task, the tasks in the order of the model cards."""
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        found[run.task].append(run)
    rank = {task: i for i, task in enumerate(CARD_ORDER)}
    return sorted(found.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0]))


class Footnotes:
    """Letters for runs whose settings differ from those of most runs of their task."""

    def __init__(self, runs: Sequence[Run], *, across_tasks: bool = False) -> None:
        self._common: dict[str, Run] = {}
        self._letters: dict[str, str] = {}
        self._across = across_tasks
        for task, members in by_task(runs):
            kinds = [json.dumps(settings(run), sort_keys=True) for run in members]
            counts = Counter(kinds)
            ranked = zip(kinds, members)
            self._common[task] = max(ranked, key=lambda item: (counts[item[0]], item[1].status == "complete"))[1]

    def column(self, task: str) -> str:
        return settings_text(settings(self._common[task])) or "default protocol"

    def of(self, run: Run) -> Footnote | None:
        """None for a run with the settings of its column."""
        common = self._common[run.task]
        mine, usual = settings(run), settings(common)
        changes = []
        for key in differing_keys(run, common):
            hashes = {DATA: "other data", "prompts": "other prompts"}
            changes.append(hashes.get(key, f"{key} {plain(mine.get(key))} (column: {plain(usual.get(key))})"))
        if not changes:
            return None
        text = ("" if self._across else f"{run.task}: ") + ", ".join(changes)
        number = len(self._letters)
        letter = self._letters.setdefault(text, MARKS[number % 26] * (1 + number // 26))
        return Footnote(mark=f"[{letter}]", text=f"settings differ: {text}")

    def mark(self, run: Run) -> str:
        """`" [a]"`, or nothing: for a heading, whose footnote the table must list itself."""
        found = self.of(run)
        return f" {found.mark}" if found else ""

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"[{letter}] settings differ: {text}" for text, letter in self._letters.items())


def checkpoint_of(run: Run) -> tuple[str, ...]:
    """What must be equal for two runs to stand in one row: name, tag, precision and the weights themselves."""
    return run.label, run.variant, run.weights, json.dumps(run.model_spec.get("window"))


def run_names(rows: Sequence[tuple[str, Sequence[Run]]]) -> list[str] | None:
    """What tells apart rows of one name, for a column `run`: directory and weights; None where all names differ."""
    counts = Counter(name for name, _ in rows)
    if max(counts.values(), default=1) == 1:
        return None
    places = _told_apart([_place(runs) for _, runs in rows])
    weights: dict[str, set[str]] = defaultdict(set)
    for name, runs in rows:
        weights[name] |= {run.weights for run in runs}
    return [
        place + (f" (weights {_short_digest(runs[0].weights)})" if len(weights[name]) > 1 and runs[0].weights else "")
        if counts[name] > 1
        else ""
        for place, (name, runs) in zip(places, rows)
    ]


def with_runs(table: Table, names: Sequence[str] | None, *, at: int) -> Table:
    """The table with a column `run` before column `at`, where names repeat; the run is part of what names a row."""
    if names is None:
        return table
    rows = tuple((*row[:at], text_cell(name), *row[at:]) for row, name in zip(table.rows, names))
    columns = (*table.columns[:at], "run", *table.columns[at:])
    return replace(table, columns=columns, rows=rows, num_keys=table.num_keys + 1)


def plain(value: JSON) -> str:
    """A setting as a person writes it."""
    if value is None or value == "" or value == []:
        return "none"
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 60 else text[:40] + "…"


# --- pieces ----------------------------------------------------------------------------------------------------------


def _mode(run: Run, asked: str) -> str:
    return asked if asked != "auto" else "chat" if run.model_spec.get("chat") else "base"


def _is_circumstance(key: str) -> bool:
    return key.partition(".")[0] in CIRCUMSTANCES


def _is_consequence(key: str, asked: Mapping[str, JSON]) -> bool:
    name = key.partition(".")[0]
    return name == "prompts" or (name not in asked and (name.startswith("num_") or name == "haystack_tokens"))


def _leaves(value: Mapping[str, JSON], prefix: str = "") -> dict[str, JSON]:
    """Nested sections as `{"wording.en": …}`; what is empty counts as not there."""
    found: dict[str, JSON] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            found |= _leaves(item, f"{prefix}{key}.")
        elif item is not None and item not in ("", []):
            found[f"{prefix}{key}"] = item
    return found


def _section(value: JSON) -> dict[str, JSON]:
    return dict(value) if isinstance(value, Mapping) else {}


def _without(section: Mapping[str, JSON], keys: Iterable[str]) -> dict[str, JSON]:
    return {key: value for key, value in section.items() if key not in keys}


def _place(runs: Sequence[Run]) -> tuple[str, ...]:
    return Path(os.path.commonpath([run.path.absolute() for run in runs])).parts


def _told_apart(places: Sequence[tuple[str, ...]]) -> list[str]:
    """Paths without what all begin and all end with."""
    first = _shared(places)
    rest = [place[first:] for place in places]
    last = _shared([place[::-1] for place in rest])
    return ["/".join(place[: len(place) - last]) or "." for place in rest]


def _shared(places: Sequence[tuple[str, ...]]) -> int:
    count = 0
    for parts in zip(*places):
        if len(set(parts)) > 1:
            break
        count += 1
    return count


def _short_digest(weights: str) -> str:
    digest = weights.rpartition(":")[2]
    return digest[:8] if re.fullmatch("[0-9a-f]{8,}", digest) else weights[:40]
