"""Completion of a command line in bash: groups, keys and their values. No Hydra: it would answer too late.

eval "$(python -m qwen_eval --shell-completion install=bash)"
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Sequence

from qwen_eval.cli.schemas import conf_dir, list_keys, typed_keys
from qwen_eval.config import CHOICES
from qwen_eval.core import ConfigError
from qwen_eval.engines.kinds import ENGINES
from qwen_eval.tasks.registry import TASKS

FLAGS = ("--shell-completion", "-sc")
ASKED = ("install=bash", "query=bash")
# Command -> where its schema is, and the groups that it takes
COMMANDS = {
    "": ("qwen_eval.config:EvalSpec", ("task", "model", "engine")),
    "preview": ("qwen_eval.runs.preview_command:PreviewSpec", ("task", "model", "engine")),
    "profile": ("qwen_eval.profile.config:ProfileSpec", ("model", "profile")),
    "report": ("qwen_eval.report.config:ReportSpec", ()),
    "quantize": ("qwen_eval.quantize.config:QuantizeSpec", ("model",)),
    "regrade": ("qwen_eval.runs.regrade:RegradeSpec", ()),
    "tokens": ("qwen_eval.profile.tokens:TokensSpec", ()),
}
MODULE = re.compile(r"\bqwen_eval(?:\.(\w+))?\s|\bqwen-eval\s()")
TASK = re.compile(r"\btask=(\w+)")
SCRIPT = r"""
_qwen_eval() {
    local line="${COMP_LINE:0:COMP_POINT}" command word
    case "$line" in
        qwen-eval\ *) command="qwen-eval" ;;
        *\ -m\ qwen_eval*) command="${line%% *} -m qwen_eval" ;;
        *) return ;;
    esac
    word="${line##* }"
    COMPREPLY=( $(COMP_LINE="$line" $command --shell-completion query=bash 2>/dev/null) )
    case "$COMP_WORDBREAKS" in
        *=*) COMPREPLY=( "${COMPREPLY[@]#"${word%"${word##*=}"}"}" ) ;;
    esac
}
complete -o default -o nospace -F _qwen_eval python python3 qwen-eval
"""


def is_asked(argv: Sequence[str]) -> bool:
    return bool(argv) and argv[0].partition("=")[0] in FLAGS


def text(argv: Sequence[str]) -> str:
    """The script to be evaluated, or the words that may follow what is typed (COMP_LINE)."""
    asked = [word for argument in argv for word in argument.split("=", 1)]
    wanted = "=".join(asked[1:]) if argv[0] in FLAGS else ""
    if wanted not in ASKED:
        raise ConfigError(f"--shell-completion {wanted}: written --shell-completion install=bash")
    if wanted == "install=bash":
        return SCRIPT.strip()
    return "\n".join(completions(os.environ.get("COMP_LINE", "")))


def completions(line: str) -> list[str]:
    """What the last word of a line may become: `"task=mm"` -> `["task=mmlu"]`; a key up to its next dot: `"mod"` ->
    `["model.", "model="]`."""
    found = MODULE.search(line)
    if found is None or (found[1] or "") not in COMMANDS:
        return []
    place, groups = COMMANDS[found[1] or ""]
    schema = _schema(place)
    task = TASK.search(line)
    tasks = [task[1]] if task and task[1] in TASKS and "task" in groups else []
    word = line.rpartition(" ")[2]
    key, equals, value = word.partition("=")
    if not equals:
        return sorted(set(_keys(word, schema, groups, tasks)))
    before, comma, last = value.rpartition(",")
    words = [each for each in _values(key, schema, groups) if each.startswith(last)]
    return [f"{key}={before}{comma}{each}" for each in words]


def _schema(place: str) -> type:
    module, _, name = place.partition(":")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _keys(word: str, schema: type, groups: Sequence[str], tasks: Sequence[str]) -> Iterator[str]:
    for name in (*(f"{group}=" for group in groups), *(f"{key}=" for key, _ in typed_keys(schema, tasks=tasks))):
        if name.startswith(word):
            dot = name.find(".", len(word))
            yield name if dot < 0 else name[: dot + 1]


def _values(key: str, schema: type, groups: Sequence[str]) -> list[str]:
    if key in groups:
        names = {path.stem for path in (conf_dir() / key).glob("*.yaml")}
        return sorted(names | {"task": set(TASKS), "engine": set(ENGINES)}.get(key, set()))
    kinds = dict(typed_keys(schema))
    if kinds.get(key) is bool:
        return ["true", "false"]
    short = key if key in CHOICES else f"model.{key}" if key in list_keys(schema) else ""
    return list(CHOICES.get(short, ()))
