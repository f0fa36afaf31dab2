"""Which benchmark is which class. A module is imported only when its task is asked for (or to list the schemas)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen_eval.config import TaskSpec, announced
from qwen_eval.core import ConfigError, Sampling, Task, Tokenizer

OWN = {
    "mmlu": "qwen_eval.tasks.mmlu:Mmlu",
    "ceval": "qwen_eval.tasks.ceval:Ceval",
    "cmmlu": "qwen_eval.tasks.cmmlu:Cmmlu",
    "gsm8k": "qwen_eval.tasks.gsm8k:Gsm8k",
    "math": "qwen_eval.tasks.math:Math",
    "humaneval": "qwen_eval.tasks.humaneval:HumanEval",
    "humaneval_plus": "qwen_eval.tasks.humaneval:HumanEval",
    "mbpp_sanitized": "qwen_eval.tasks.mbpp:Mbpp",
    "mbpp_plus": "qwen_eval.tasks.mbpp:Mbpp",
    "plugin": "qwen_eval.tasks.plugin:Plugin",
    "plugin_template": "qwen_eval.tasks.plugin:Plugin",
    "mbpp": "qwen_eval.tasks.mbpp:Mbpp",
    "code_interpreter": "qwen_eval.tasks.code_interpreter:CodeInterpreter",
    "hf_agent": "qwen_eval.tasks.hf_agent:HfAgent",
    "hf_agent_chat": "qwen_eval.tasks.hf_agent:HfAgent",
    "bbh": "qwen_eval.tasks.bbh:Bbh",
    "long_ppl": "qwen_eval.tasks.long_ppl:LongPpl",
    "needle": "qwen_eval.tasks.needle:Needle",
    "vcsum": "qwen_eval.tasks.vcsum:Vcsum",
    "leval": "qwen_eval.tasks.leval:Leval",
    "wmt22": "qwen_eval.tasks.wmt22:Wmt22",
    "wmt22_sacrebleu": "qwen_eval.tasks.wmt22:Wmt22",
    "nano": "qwen_eval.tasks.nano:Nano",
    "csv": "qwen_eval.tasks.rows:CsvTask",
    "jsonl": "qwen_eval.tasks.rows:JsonlTask",
}
TASKS = announced("qwen_eval.tasks") | OWN  # no package can take the name of a task of ours


class NeedsTokenizer(ConfigError):
    """A task that counts in tokens, with an engine that has none, or none yet."""


@dataclass(frozen=True, kw_only=True)
class FileTask:
    """A task of a file outside any package (`task.file=`). `sha256` is that of the file as it was run."""

    task: Any
    path: str
    sha256: str


FROM_FILES: dict[str, FileTask] = {}


def register(name: str, found: FileTask) -> None:
    """Make a task of a file known under its name; ConfigError for the name of a task that is there without it."""
    if name in TASKS and name not in FROM_FILES:
        raise ConfigError(f"task.file={found.path}: {name} is a task already; give the class another name")
    FROM_FILES[name] = found
    TASKS[name] = f"{found.path}:{found.task.__name__}"


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """What a task may know about its run, besides its own spec. `tokenizer` is None for engines without one."""

    protocol: str = "robust"
    is_chat: bool = False
    tokenizer: Tokenizer | None = None
    sandbox: str = "auto"
    hidden_dir: str | None = None  # where `Score` requests keep hidden states
    model_facts: Mapping[str, Any] = field(default_factory=dict)  # engine.info: train_length, dynamic_ntk, windows ...

    def reply_tokens(self, spec: TaskSpec, *, is_chat: bool) -> int:
        """The maximum of new tokens of a reply: the task's, plus `thinking_tokens` for a chat model that thinks."""
        thinks = is_chat and bool(self.model_facts.get("thinks"))
        return spec.max_new_tokens + (spec.thinking_tokens if thinks else 0)

    def sampling(self, spec: TaskSpec, own: Sampling | None = None) -> Sampling:
        """How replies are sampled: as the task defines, or as the model's generation_config.json does."""
        if spec.sampling == "task":
            return own or Sampling()
        found = self.model_facts.get("sampling")
        if not found:
            raise ConfigError("task.sampling=checkpoint: the engine knows no generation_config.json; use sampling=task")
        return Sampling(**found, seed=spec.seed)

    def prompt_limit(self, asked: int | None, new_tokens: int) -> int | None:
        """The most tokens of a prompt: as asked, else what the checkpoint states less the reply; None: unknown.

        At least half of what it states: the room to think may be as large as all of it.
        """
        stated = self.model_facts.get("max_length")
        return asked if asked is not None or not stated else max(int(stated) - new_tokens, int(stated) // 2, 1)

    def required_tokenizer(self, task: str, why: str) -> Tokenizer:
        """The tokenizer, for tasks that count in tokens. Raises NeedsTokenizer where the engine has none."""
        if self.tokenizer is None:
            raise NeedsTokenizer(f"{task}: the engine has no tokenizer{why}")
        return self.tokenizer


def task_class(name: str) -> Any:
    """The class of a registered task; it is built as `cls(spec, context)` and names its schema in `cls.Spec`."""
    if name not in TASKS:
        raise ConfigError(f"task.name={name}: not a task; one of {', '.join(sorted(TASKS))}")
    if name in FROM_FILES:
        return FROM_FILES[name].task
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(spec: TaskSpec, context: TaskContext) -> Task:
    task: Task = task_class(spec.name)(spec, context)
    return task
