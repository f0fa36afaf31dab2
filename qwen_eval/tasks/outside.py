"""Tasks of a Python file that belongs to no package: `task.file=my_task.py`. The file is code of the user."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from qwen_eval.config import MISSING
from qwen_eval.core import ConfigError
from qwen_eval.tasks.registry import FileTask, register

METHODS = ("samples", "request", "grade", "summarise")  # of a task


def load_tasks(place: str) -> list[str]:
    """Run the file and make its task classes known; returns their names. ConfigError where it has none."""
    path = Path(place).expanduser()
    try:
        code = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"task.file={place}: cannot be read ({error.strerror})") from None
    module = _run(code, path, place)
    classes = [item for item in vars(module).values() if _is_task(item, module.__name__)]
    if not classes:
        raise ConfigError(f"task.file={place}: no task class in it; derive one from OwnChoice, see docs/own_task.md")
    digest = hashlib.sha256(code).hexdigest()
    names = []
    for found in classes:
        name = _name(found)
        register(name, FileTask(task=found, path=str(path), sha256=digest))
        names.append(name)
    return names


def _run(code: bytes, path: Path, place: str) -> ModuleType:
    """The file as a module of a name of its own, where dataclasses look up their annotations."""
    module = ModuleType(f"qwen_eval_task_file_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(code, str(path), "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        line = getattr(error, "lineno", None) or _line(error, str(path))
        raise ConfigError(f"task.file={place} line {line}: {type(error).__name__}: {error}") from error
    return module


def _line(error: Exception, path: str) -> int | None:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else None


def _is_task(item: Any, module: str) -> bool:
    is_own = inspect.isclass(item) and item.__module__ == module and not inspect.isabstract(item)
    return is_own and not item.__name__.startswith("_") and all(callable(getattr(item, m, None)) for m in METHODS)


def _name(task: Any) -> str:
    """As its schema says, else of the class: `WorldCapitals` -> `world_capitals`."""
    if not hasattr(task, "Spec"):
        raise ConfigError(f"{task.__name__}: a task class names the schema of its keys in Spec, see docs/own_task.md")
    given = getattr(task.Spec, "name", MISSING)
    return str(given) if given != MISSING else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", task.__name__).lower()
