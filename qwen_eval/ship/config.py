"""Schema of `python -m qwen_eval.ship`, and how its short keys become Hydra's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from qwen_eval import cli
from qwen_eval.config import PROTOCOLS, EngineSpec, EvalSpec, ModelSpec, TaskSpec, not_one_of
from qwen_eval.config import check as check_cell
from qwen_eval.core import ConfigError
from qwen_eval.engines.kinds import kind
from qwen_eval.models.naming import anonymous, settle
from qwen_eval.tasks.registry import TASKS

Side = Literal["reference", "candidate"]
SIDES: tuple[Side, Side] = ("reference", "candidate")
TOGETHER = ("auto", "true", "false")
OF_ENGINES = {item.name for item in fields(EngineSpec)} - {item.name for item in fields(ModelSpec)}


@dataclass(kw_only=True)
class ShipSpec:
    """May `candidate` replace `reference`? Each takes every key of a model and of an engine: `candidate.dtype=bf16`."""

    reference: ModelSpec = field(default_factory=ModelSpec)
    candidate: ModelSpec = field(default_factory=ModelSpec)
    reference_engine: EngineSpec = field(default_factory=EngineSpec)
    candidate_engine: EngineSpec = field(default_factory=EngineSpec)
    tasks: dict[str, TaskSpec] = field(default_factory=dict)  # tasks=mmlu,gsm8k; tasks.mmlu.shots=0; task.KEY= for all
    margin: float = 1.0  # points of a score that the candidate may lose
    margin_ppl: float = 1.0  # per cent that its perplexity may rise
    alpha: float = 0.05  # chance that an answer is wrong
    seed: int = 1  # of the order in which items are drawn
    two_sided: bool = False  # go on until it is known, too, that it is not better by more than the margin
    all_tasks: bool = False  # go on with the other tasks after one has failed
    max_items: int | None = None  # of one task
    max_minutes: float | None = None  # of this command
    together: str = "auto"  # both models in memory: auto | true | false
    protocol: str = "robust"
    sandbox: str = "auto"  # auto | bubblewrap | namespaces | unsafe
    runs_dir: str = "runs"
    tag: str = "default"
    overwrite: bool = False
    quiet: bool = False
    verify: str | None = None  # a certificate.json to check instead
    spot: int = 0  # verify: so many items of each task are asked again

    def __post_init__(self) -> None:
        self.together = self.together.lower()

    def model(self, side: str) -> ModelSpec:
        return self.reference if side == "reference" else self.candidate

    def engine(self, side: str) -> EngineSpec:
        return self.reference_engine if side == "reference" else self.candidate_engine

    def cell(self, side: str, task: str, run_dir: str | None = None) -> EvalSpec:
        """One task with one of the models, as `python -m qwen_eval` would run it."""
        return EvalSpec(
            task=replace(self.tasks[task]), model=self.model(side), engine=self.engine(side), protocol=self.protocol,
            sandbox=self.sandbox, runs_dir=self.runs_dir, run_dir=run_dir, tag=self.tag, quiet=self.quiet,
        )  # fmt: skip


def check(spec: ShipSpec) -> ShipSpec:
    """The spec with what a checkpoint says of itself; ConfigError for a value out of range."""
    if spec.verify is not None:
        _check_verify(spec)
        return spec
    if "reference" not in named_sides():
        raise ConfigError("reference=: none given; name the model that is in use, and the other one as candidate=")
    if not spec.tasks:
        raise ConfigError("tasks=: none given; name those that must hold, such as tasks=mmlu,gsm8k")
    _check_numbers(spec)
    for task in spec.tasks:
        for side in SIDES:
            _check_cell(spec, side, task)
    _settle(spec)
    return spec


def _check_verify(spec: ShipSpec) -> None:
    if spec.spot and len(named_sides()) < len(SIDES):
        raise ConfigError(f"spot={spec.spot}: pass reference= and candidate= as well, they are asked again")
    if spec.spot < 0:
        raise ConfigError(f"spot={spec.spot}: must be at least 0")
    _settle(spec)


def _check_numbers(spec: ShipSpec) -> None:
    if spec.spot:
        raise ConfigError(f"spot={spec.spot}: has an effect with verify=FILE only")
    if not 0 < spec.margin < 100:
        raise ConfigError(f"margin={spec.margin}: points of a score between 0 and 100, such as 1")
    if not 0 < spec.margin_ppl < 100:
        raise ConfigError(f"margin_ppl={spec.margin_ppl}: per cent of a perplexity between 0 and 100, such as 1")
    if not 0 < spec.alpha <= 0.2:
        raise ConfigError(f"alpha={spec.alpha}: a chance of error in (0, 0.2], such as 0.05")
    for key in ("max_items", "max_minutes"):
        value = getattr(spec, key)
        if value is not None and value <= 0:
            raise ConfigError(f"{key}={value}: must be positive")
    for key, words in (("together", TOGETHER), ("protocol", PROTOCOLS)):
        if getattr(spec, key) not in words:
            raise not_one_of(key, getattr(spec, key), words)


def _check_cell(spec: ShipSpec, side: str, task: str) -> None:
    try:
        check_cell(spec.cell(side, task))
    except ConfigError as error:
        text = str(error)
        for short, long in (("model.", f"{side}."), ("engine.", f"{side}.engine."), ("task.", f"tasks.{task}.")):
            text = f"{long}{text.removeprefix(short)}" if text.startswith(short) else text
        raise ConfigError(text) from error


def _settle(spec: ShipSpec) -> None:
    """A side given by its place alone gets its name and form from there, and a named one must be that model."""
    given = _given()
    for side in SIDES:
        keys = {f"model.{key.partition('.')[2]}" for key in given if key.startswith(f"{side}.")}
        keys |= {"model"} if f"model@{side}" in given else set()
        engine = spec.engine(side)
        model_at = kind(engine.name).model_at
        if model_at == "server" and "model" not in keys and engine.api_model is not None:
            setattr(spec, side, anonymous(spec.model(side), engine.api_model, frozenset(keys)))
        elif model_at == "checkpoint":
            setattr(spec, side, settle(spec.model(side), frozenset(keys)))


def named_sides() -> list[Side]:
    """The sides for which the user named a model."""
    given = _given()
    return [side for side in SIDES if {f"model@{side}", f"{side}.path", f"{side}.hub_id"} & given]


def _given() -> set[str]:
    from hydra.core.hydra_config import HydraConfig

    return {override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task}


# --- arguments -------------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str]) -> list[str]:
    """`["reference=A", "candidate.num_threads=2", "tasks=x"]` in Hydra's words: `"model@reference=A"`,
    `"candidate_engine.num_threads=2"`, `"+task@tasks.x=x"`.

    A candidate that is not named is the reference with the candidate's keys changed.
    """
    names = [name for argument in argv for name in _task_names(argument)]
    found = [long for argument in argv for long in _long(argument, names)]
    keys = {argument.partition("=")[0] for argument in found}
    if "verify" not in keys and not {"model@candidate", "candidate.path", "candidate.hub_id"} & keys:
        for argument in list(found):
            key, _, value = argument.partition("=")
            copied = key.replace("reference", "candidate", 1)
            if "reference" in key and copied not in keys:
                found.append(f"{copied}={value}")
    return found


def _task_names(argument: str) -> list[str]:
    key, equals, value = argument.partition("=")
    if key != "tasks" or not equals:
        return []
    names = [name.strip() for name in value.strip("[]").split(",") if name.strip()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"tasks={value}: {twice} stands twice")
    return names


def _long(argument: str, tasks: Sequence[str]) -> Iterator[str]:
    """One argument in Hydra's words; lists and sentences are quoted as in the other commands."""
    key, equals, value = argument.partition("=")
    head, _, rest = key.partition(".")
    if argument.startswith("-") or not equals:
        yield argument
    elif key == "tasks":
        yield from (f"+task@tasks.{name}={name}" for name in tasks)
    elif head == "task" and rest:
        yield from (_quoted(f"task.{rest}={value}", "task", f"tasks.{name}") for name in tasks)
    elif head == "tasks":
        name, _, rest = rest.partition(".")
        yield _quoted(f"task.{rest}={value}", "task", f"tasks.{name}")
    elif head == "engine":
        yield from (_of_side(side, key, value) for side in SIDES)
    elif head in SIDES:
        yield _of_side(head, rest, value)
    else:
        yield argument


def _of_side(side: str, key: str, value: str) -> str:
    """`"candidate.engine=hf"`, `"candidate.dtype=bf16"`, `"candidate=qwen-nano"` in Hydra's words."""
    if not key:
        return f"model@{side}={value}"
    if key == "engine":
        return f"engine@{side}_engine={value}"
    if key.startswith("engine.") or key.partition(".")[0] in OF_ENGINES:
        return f"{side}_engine.{key.removeprefix('engine.')}={value}"
    return _quoted(f"model.{key}={value}", "model", side)


def _quoted(argument: str, old: str, new: str) -> str:
    keys = cli.list_keys(EvalSpec, tasks=TASKS), cli.text_keys(EvalSpec, tasks=TASKS)
    return new + cli.bracket_lists([argument], *keys)[0].removeprefix(old)
