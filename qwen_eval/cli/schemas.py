"""The folders of `conf/`, and the schemas of the groups, which Hydra is told before it composes."""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_eval.config import MISSING, EngineSpec, ModelSpec
from qwen_eval.engines.kinds import ENGINES
from qwen_eval.engines.kinds import kind as engine_kind
from qwen_eval.tasks.registry import TASKS, task_class

PACKAGE = Path(__file__).parents[1]
DEFAULTS = ("mmlu", "native")  # of the commands that have a task and an engine
SCHEMA = re.compile(r"\b(\w+)_schema\b")
_stored: dict[tuple[str | None, str], type] = {}  # (group, name) -> what Hydra has been told
OPEN = ("hydra", "experiment=", "config-dir", "-cd", "searchpath", "config-name", "-cn", "config-path", "-cp")


def conf_dir() -> Path:
    """`conf/` inside an installed package, or beside the package in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


def groups_text() -> str:
    """The options of every group of `conf/`, one group a line."""
    folders = sorted(path for path in conf_dir().iterdir() if path.is_dir() and path.name != "hydra")
    known = {folder.name: {path.stem for path in folder.glob("*.yaml")} for folder in folders}
    known["task"] |= set(TASKS)
    known["engine"] |= set(ENGINES)
    options = {name: ", ".join(sorted(names)) for name, names in known.items()}
    return "\n".join(f"{name}: {listed}" for name, listed in options.items() if listed)


def groups_in(folders: Iterable[Path]) -> set[str]:
    """The names of all groups."""
    found = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
    return found - {"hydra"}


def default_groups(config_name: str) -> set[str]:
    """The groups of which a command takes an option by itself, as its yaml names them: `model`, `model@reference`."""
    import yaml

    defaults = yaml.safe_load((conf_dir() / f"{config_name}.yaml").read_text(encoding="utf-8"))["defaults"]
    return {name for entry in defaults if isinstance(entry, dict) for name in entry}


def register(config_name: str, schema: type, folders: Sequence[Path], words: Sequence[str]) -> None:
    """Tell Hydra the schemas: `eval_schema`, `model/model_schema`, `engine/engine_schema`, `engine/<engine>_schema`,
    `task/<task>_schema`."""
    _store(None, f"{'eval' if config_name == 'config' else config_name}_schema", schema)
    _store("model", "model_schema", ModelSpec)
    _store("engine", "engine_schema", EngineSpec)
    for name in named(words, "engine", ENGINES):
        _store_option("engine", name, engine_kind(name).spec, folders)
    for name in named(words, "task", TASKS):
        spec = _task_spec(name)
        if spec is not None:
            _store_option("task", name, spec, folders)


def _store(group: str | None, name: str, schema: type, *, is_named: bool = False) -> None:
    """`is_named`: the option itself, with its name as `name`. In a process of many calls each is stored once: OmegaConf
    takes five milliseconds to read a schema."""
    if _stored.get((group, name)) is schema:
        return
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(group=group, name=name, node=schema(name=name) if is_named else schema)
    _stored[group, name] = schema


def named(argv: Sequence[str], group: str, known: Iterable[str]) -> list[str]:
    """Which tasks, or engines, these arguments may need, so that no other one is imported: those whose name stands in
    them, the default, and those whose schema their yaml builds on. All of them where a file may name any."""
    if is_open(argv):
        return list(known)
    words = {word for argument in argv for word in re.split(r"[^\w-]+", argument)}
    wanted = _with_parents(group, {*DEFAULTS, *words})
    return [name for name in known if name in wanted]


def is_open(argv: Sequence[str]) -> bool:
    """Whether a file of the user or a setting of Hydra itself may say more than the arguments do."""
    return any(word in argument for argument in argv for word in OPEN)


def _with_parents(group: str, names: Iterable[str]) -> set[str]:
    found, pending = set(), list(names)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        file = conf_dir() / group / f"{name}.yaml"
        if name and file.is_file():
            pending += SCHEMA.findall(file.read_text(encoding="utf-8"))
    return found


def given_folders(argv: Sequence[str]) -> list[Path]:
    """The values of `--config-dir`, which Hydra searches too."""
    flags = ("--config-dir", "-cd")
    apart = [value for flag, value in itertools.pairwise(argv) if flag in flags]
    joined = [argument.partition("=")[2] for argument in argv if argument.startswith("--config-dir=")]
    return [Path(folder) for folder in (*apart, *joined)]


def _store_option(group: str, name: str, spec: Any, folders: Sequence[Path]) -> None:
    """The schema, and the option itself where no folder has a yaml of its name."""
    _store(group, f"{name}_schema", spec)
    if not any((folder / group / f"{name}.yaml").is_file() for folder in folders):
        _store(group, name, spec, is_named=spec.name == MISSING)


def _task_spec(name: str) -> Any:
    module = TASKS[name].partition(":")[0]
    try:
        return task_class(name).Spec
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None  # using it then says "unknown", and --help does not list it


def list_keys(schema: type, *, tasks: Iterable[str] = ()) -> set[str]:
    """The dotted keys of a schema whose type is `list[...]`: `{"task.subjects"}`; those of each task are `task.KEY`."""
    return {key for key, kind in typed_keys(schema, tasks=tasks) if typing.get_origin(kind) is list}


def text_keys(schema: type, *, tasks: Iterable[str] = ()) -> set[str]:
    """The dotted keys whose value, or every element of it, is text."""
    return {key for key, kind in typed_keys(schema, tasks=tasks) if kind is str or kind == list[str]}


def typed_keys(schema: type, prefix: str = "", *, tasks: Iterable[str] = ()) -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every leaf of a schema; `int | None` is given as `int`."""
    for name, kind in typing.get_type_hints(schema).items():
        kinds = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
        for each in kinds:
            if dataclasses.is_dataclass(each) and isinstance(each, type):
                yield from typed_keys(each, f"{prefix}{name}.")
            elif each is not type(None):
                yield f"{prefix}{name}", each
    for task in tasks:
        spec = _task_spec(task)
        if spec is not None:
            yield from typed_keys(spec, "task.")
