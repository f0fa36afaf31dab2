"""Schemas of the configuration: plain dataclasses that Hydra fills once, in `cli/`. No torch here.

A variant is a yaml file in `conf/`; only keys defined here exist. The schema of a task is in the task's file and
derives from `TaskSpec`.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from qwen_eval.core import ConfigError

MISSING = "???"

if TYPE_CHECKING:
    Limit: TypeAlias = float | None  # int: samples; float: a share of them, also written 10%
else:
    Limit = Any  # OmegaConf merges no unions

DTYPES = ("auto", "bf16", "fp16", "fp32")
KV_CACHES = ("auto", "int8")
ATTENTIONS = ("auto", "sdpa", "flash", "eager")
HUBS = ("huggingface", "modelscope")
PROTOCOLS = ("robust", "upstream")
WEIGHTS = ("checkpoint", "random")
THINKING = ("auto", "on", "off")
SAMPLING = ("task", "checkpoint")
DIGESTS = ("sample", "full")


def _switch(value: str) -> str:
    """A plain `logn=false` of the command line reaches a string field as "False"."""
    return value.lower() if value in ("True", "False") else value


@dataclass(kw_only=True)
class RopeSpec:
    """`dynamic_ntk`: "auto" follows the checkpoint's config, "true"/"false" override it."""

    dynamic_ntk: str = "auto"

    def __post_init__(self) -> None:
        self.dynamic_ntk = _switch(self.dynamic_ntk)


@dataclass(kw_only=True)
class ModelSpec:
    """One row of a table: a checkpoint and how it is run."""

    name: str = MISSING
    hub_id: str | None = None  # e.g. Qwen/Qwen-7B-Chat
    modelscope_id: str | None = None  # e.g. qwen/Qwen-7B-Chat, where it differs from hub_id
    hub: str = "huggingface"
    revision: str | None = None
    path: str | None = None  # local directory: wins over the hub
    asset: str | None = None  # a checkpoint embedded in the package, e.g. qwen-nano
    weights: str = "checkpoint"  # or random: shapes of `arch` or of the checkpoint's config.json, marked as such
    chat: bool = False  # an instruction-tuned checkpoint: tasks ask in chat form
    system: str | None = None  # the system message of chats that bring none; null: the checkpoint's own default
    thinking: str = "auto"  # auto: as the chat template does by itself | on | off: by the template's own switch
    dtype: str = "auto"  # auto: the checkpoint's on CUDA; on CPU bf16 where the CPU multiplies it natively, else fp32
    quant: str = "none"
    kv_cache: str = "auto"
    rope: RopeSpec = field(default_factory=RopeSpec)
    logn: str = "auto"  # auto | true | false
    window: str = "none"  # none | layerwise | comma list of tokens per layer group, "2048,4096,8192"
    attention: str = "auto"
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | layers over several: cuda:0+cuda:1
    seed: int = 0  # of random weights
    digest: str = "sample"  # how a checkpoint is known again: small files and a part of every tensor | full: every byte
    arch: dict[str, Any] = field(default_factory=dict)  # config.json of the shape, for plans and random weights

    def __post_init__(self) -> None:
        self.logn = _switch(self.logn)
        self.thinking = {"true": "on", "false": "off"}.get(_switch(self.thinking), self.thinking)


@dataclass(kw_only=True)
class EngineSpec:
    name: str = "native"
    prefix_sharing: bool = True
    max_batch_tokens: int | None = None  # tokens of one scoring forward; None: from the cost model
    max_batch_size: int | None = None  # sequences of one batch or generation slots; None: from the cost model
    prefill_chunk: int | None = None  # tokens of one chunk of a long prefill; None: 1024, or what fits on a GPU
    kernels: str = "auto"  # of CUDA: auto compiles and captures where it can | plain | triton
    memory_fraction: float = 0.85  # of the free memory that weights, cache and activations may take
    num_threads: int | None = None
    server: str = "openai"  # openai engine: what kind of server answers, which decides how it is asked
    base_url: str | None = None  # openai engine; null: the usual address of its server
    api_model: str | None = None  # openai engine; null, without model=: the one that the server has
    concurrency: int = 16  # openai engine: requests in flight
    timeout_s: float = 600.0  # openai engine: seconds of one try, from sending to the last byte
    retries: int = 6  # openai engine: of one request after faults; a busy server is asked longer
    retry_share: float = 1.0  # openai engine: all retries of a run, as a share of its requests
    tokenizer: str | None = None  # openai engine: directory with the model's tokenizer, for token ids and counts
    prices: str | None = None  # openai engine: YAML file of prices per million tokens
    tensor_parallel: int = 1  # vllm engine: GPUs that share each layer
    pipeline_parallel: int = 1  # vllm engine: groups of layers, each on its own GPUs
    executor: str = "auto"  # vllm engine: who starts its processes, auto | mp | ray | uni
    workers: int = 1  # engines of one run, each in a process of its own on its own GPUs; needs the package ray
    ray: str = "auto"  # where they run: auto is this machine, HOST:PORT the Ray cluster there
    fake_reply: str = ""  # fake engine: what it says to everything; "" is a hash of the prompt
    fake_delay_s: float = 0.0  # fake engine: seconds it takes for one request


@dataclass(kw_only=True)
class TaskSpec:
    """What every benchmark has. `limit` draws a seeded, nested, stratified subset; the result is marked partial."""

    name: str = MISSING
    file: str | None = None  # a Python file with the task's class, on the command line only: docs/own_task.md
    path: str | None = None  # local directory or file in the official format
    data: str = "auto"  # auto: path if given, else the hub if reachable, else the bundled sample | bundled | hub
    hub_id: str | None = None
    revision: str | None = None
    split: str = ""
    shots: int = 0
    mode: str = "auto"  # auto: chat for chat models, base otherwise | base | chat
    limit: Limit = None
    seed: int = 1234
    subjects: list[str] = field(default_factory=list)  # only these groups
    max_new_tokens: int = 512
    thinking_tokens: int = 32768  # added to max_new_tokens where the model thinks before it answers
    sampling: str = "task"  # checkpoint: generated texts are drawn as the model's generation_config.json says


@dataclass(kw_only=True)
class EvalSpec:
    """`python -m qwen_eval`: one cell of a table."""

    task: TaskSpec = field(default_factory=TaskSpec)
    model: ModelSpec = field(default_factory=ModelSpec)
    engine: EngineSpec = field(default_factory=EngineSpec)
    protocol: str = "robust"
    limit: Limit = None  # short for task.limit
    seed: int | None = None  # short for task.seed
    sandbox: str = "auto"  # auto | bubblewrap | namespaces | unsafe
    runs_dir: str = "runs"
    run_dir: str | None = None  # names the run directory outright
    tag: str = "default"
    overwrite: bool = False
    keep_hidden: bool = False  # native engine: final hidden states of scored texts, for an exact KL divergence
    quiet: bool = False
    plan: bool = False  # say what the run will take; nothing is loaded, asked or written
    on: str | None = None  # plan=true: for this device instead of the one here, e.g. A100-SXM4-80GB


# --- rules that types do not express ---------------------------------------------------------------------------------

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": DTYPES,
    "model.kv_cache": KV_CACHES,
    "model.attention": ATTENTIONS,
    "model.hub": HUBS,
    "model.weights": WEIGHTS,
    "model.thinking": THINKING,
    "model.digest": DIGESTS,
    "model.logn": ("auto", "true", "false"),
    "model.rope.dynamic_ntk": ("auto", "true", "false"),
    "task.data": ("auto", "bundled", "hub"),
    "task.mode": ("auto", "base", "chat"),
    "task.sampling": SAMPLING,
    "engine.kernels": ("auto", "plain", "triton"),
    "engine.executor": ("auto", "mp", "ray", "uni"),
    "engine.server": ("openai", "vllm", "sglang", "llama-server", "dashscope"),
    "protocol": PROTOCOLS,
    "sandbox": ("auto", "bubblewrap", "namespaces", "unsafe"),
}
AT_LEAST: dict[str, int] = {
    "task.shots": -1,  # -1: the official number of the task
    "task.max_new_tokens": 1,
    "task.thinking_tokens": 0,
    "engine.max_batch_tokens": 1,
    "engine.max_batch_size": 1,
    "engine.prefill_chunk": 1,
    "engine.num_threads": 1,
    "engine.concurrency": 1,
    "engine.retries": 0,
    "engine.retry_share": 0,
    "engine.workers": 1,
    "engine.tensor_parallel": 1,
    "engine.pipeline_parallel": 1,
}


def announced(group: str) -> dict[str, str]:
    """What installed packages announce under an entry point group ("qwen_eval.tasks"): name -> "module:attribute"."""
    found: importlib.metadata.EntryPoints = _entry_points().select(group=group)
    return {point.name: point.value for point in found}


@functools.cache  # every package is looked into: some milliseconds
def _entry_points() -> Any:
    return importlib.metadata.entry_points()


def nearest(word: str, words: Iterable[str]) -> str | None:
    """`nearest("mmlv", ["mmlu", "ceval"])` -> `"mmlu"`; None when nothing is near."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return found[0] if found else None


def not_one_of(key: str, value: str, words: Iterable[str]) -> ConfigError:
    """The error for a value outside its set: the value, a suggestion, the set."""
    words = list(words)
    guess = nearest(value, words)
    listed = ", ".join(words[:12]) + (", …" if len(words) > 12 else "")
    return ConfigError(
        f"{key}={value}: unknown;{f' did you mean {chr(34)}{guess}{chr(34)}?' if guess else ''} one of {listed}"
    )


def check(spec: EvalSpec) -> EvalSpec:
    """The spec with its shortcuts (`limit=`, `seed=`) moved to the task; ConfigError for a value out of range."""
    for key in ("limit", "seed"):
        short: float | None = getattr(spec, key)
        if short is not None:
            long: float | None = getattr(spec.task, key)
            if long not in (short, getattr(type(spec.task)(), key)):
                raise ConfigError(f"{key}={short} and task.{key}={long}: two values for one setting; give one of them")
            setattr(spec.task, key, short)
    if spec.on is not None and not spec.plan:
        raise ConfigError(f"on={spec.on}: has an effect with plan=true only; a run uses the device that is here")
    check_values(spec)
    check_limit(spec.task.limit)
    if not 0 < spec.engine.memory_fraction <= 1:
        raise ConfigError(f"engine.memory_fraction={spec.engine.memory_fraction}: must be in (0, 1]")
    if not 0 < spec.engine.timeout_s < float("inf"):
        raise ConfigError(f"engine.timeout_s={spec.engine.timeout_s}: must be a number of seconds above 0")
    for key, name in (("task.name", spec.task.name), ("model.name", spec.model.name), ("tag", spec.tag)):
        if not name or "/" in name or name.startswith("."):
            raise ConfigError(f"{key}={name}: must be a plain file name, it names a part of the run directory")
    return spec


def check_limit(limit: object) -> None:
    """ConfigError for what is neither a number of samples nor a share of them."""
    is_number = isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1
    is_share = isinstance(limit, float) and 0 < limit < 1
    if limit is not None and not is_number and not is_share:
        raise ConfigError(f"task.limit={limit}: a number of samples, at least 1, or a share such as 10% or 0.1")


def check_values(spec: object) -> None:
    """ConfigError for a value outside its set or below its minimum; keys that `spec` does not have are skipped."""
    for key, words in CHOICES.items():
        value = _select(spec, key)
        if value is not None and value not in words:
            raise not_one_of(key, str(value), words)
    for key, low in AT_LEAST.items():
        value = _select(spec, key)
        if isinstance(value, (int, float)) and value < low:
            raise ConfigError(f"{key}={value}: must be at least {low}")


def _select(spec: object, key: str) -> object:
    for part in key.split("."):
        spec = getattr(spec, part, None)
    return spec
