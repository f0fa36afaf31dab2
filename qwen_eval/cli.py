"""The command line: Hydra composes `conf/` into plain dataclasses; every mistake of the user is reported in one line.

Other modules do not use Hydra or OmegaConf. Torch is not imported before the configuration is valid.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qwen_eval.config import MISSING, EngineSpec, EvalSpec, ModelSpec, check_values, nearest, not_one_of
from qwen_eval.core import ConfigError, QwenEvalError
from qwen_eval.engines.kinds import ENGINES
from qwen_eval.engines.kinds import kind as engine_kind
from qwen_eval.engines.kinds import kinds as engine_kinds
from qwen_eval.models.naming import anonymous, settle
from qwen_eval.models.quant.formats import quant_format
from qwen_eval.tasks.registry import TASKS, task_class
from qwen_eval.terminal import plain_text

PACKAGE = Path(__file__).parent
NUMBER_LIST = re.compile(r"\d+(,\d+)+")
FOREIGN = re.compile(r"[^\x00-\x7f]|[ =]")
SYNTAX = re.compile(r"[\[\]{}()'\",$]")  # a list, a sweep or quotes: the writer knows the grammar
PLAIN_KEY = re.compile(r"[+~]*[a-z_]\w*([./]\w+)*")
DEFAULT_MODEL = "qwen-nano"  # of every command that has a model
SHARES = ("limit", "task.limit")  # "10%" in them is 0.1
PER_CENT = re.compile(r"(\d+(?:\.\d+)?)%")
BROKEN_PIPE = 141  # as shells say of a program whose reader has left
FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\b")
LISTS_IN_TEXT = ("model.window",)  # text to Hydra, but "2048,4096" in it is one value and no sweep
TEXTS = ("model.system", "task.template", "reply")  # a sentence: no comma, quote or bracket in it is grammar
DEFAULT_TAG = EvalSpec.tag
ENGINE_GROUPS = ("model", "engine", "protocol")

Job = Callable[[Any], None]


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


def run(argv: Sequence[str], *, config_name: str, schema: type, job: Job, usage: str = "") -> int:
    """Compose `conf/<config_name>.yaml` with the overrides in `argv`; call `job` with the `schema` object of each cell.

    Returns the exit code: 0, 2 after a mistake of the user (one line on stderr each), 130 after Ctrl-C, 141 where the
    reader of a pipe has left (`| head`). In a grid (-m) the other cells still run when one fails.
    """
    return quiet_pipe(lambda: _run(argv, config_name, schema, job, usage))


def quiet_pipe(command: Callable[[], int]) -> int:
    """The exit code of a command, whose output may have lost its reader (`| head`): 141 then, and no traceback."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it leaves
        return BROKEN_PIPE


def _run(argv: Sequence[str], config_name: str, schema: type, job: Job, usage: str) -> int:
    failures: list[str] = []
    if usage and {"-h", "--help"} & set(argv):
        print(usage.strip(), groups_text(), sep="\n\n")  # Hydra takes two seconds to list what a directory lists
        return 0
    if "--version" in argv:
        package = sys.modules[__package__]  # it imports this module: an import here would be a circle
        print(f"qwen_eval {package.__version__}")
        return 0
    try:
        argv = with_task_file(argv)
        _register(config_name, schema, [conf_dir(), *_given_folders(argv)])
        arguments = model_first(bracket_lists(argv, list_keys(schema, tasks=TASKS)))
        _hydra(arguments, config_name, lambda config: _cell(config, job, schema, failures))
    except KeyboardInterrupt:
        print("interrupted; graded samples are kept, the same command resumes the run", file=sys.stderr)
        return 130
    except QwenEvalError as error:
        failures.append(_tell(str(error)))
    except BrokenPipeError:
        raise
    except Exception as error:
        failures.append(_tell(explain(error, schema)))
    return 2 if failures else 0


def _cell(config: Any, job: Job, schema: type, failures: list[str]) -> None:
    from hydra.core.hydra_config import HydraConfig

    try:
        refuse_doubled(sys.argv[1:])
        job(_settings(config, schema, HydraConfig.get()))
    except QwenEvalError as error:
        failures.append(_tell(f"{cell_name()}{error}"))


def cell_name() -> str:
    """`"task=mmlu model=qwen-7b: "` in a grid: which cell an error is of; "" outside one."""
    swept = _swept()
    return f"{' '.join(swept)}: " if swept else ""


def compose(overrides: Sequence[str], *, config_name: str, schema: type) -> Any:
    """The settings of the command with these overrides, a `schema` object, for calls from Python.

    Raises a QwenEvalError for every mistake that the command reports; prints nothing.
    """
    import hydra
    from omegaconf import OmegaConf, open_dict

    overrides = with_task_file(overrides)
    _register(config_name, schema, [conf_dir()])
    arguments = bracket_lists(overrides, list_keys(schema, tasks=TASKS))
    refuse_doubled(arguments)
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            config = hydra.compose(config_name, overrides=arguments, return_hydra_config=True)
    except Exception as error:
        raise ConfigError(explain(error, schema)) from error
    known = config.hydra
    OmegaConf.set_readonly(config, False)
    with open_dict(config):
        del config["hydra"]
    return _settings(config, schema, known)


def _settings(config: Any, schema: type, hydra_config: Any) -> Any:
    """A composed configuration as a `schema` object; ConfigError for an unknown key or an invalid value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    refuse_unknown_keys(config)
    try:
        spec: Any = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, schema)) from error
    _settle_model(spec, hydra_config.overrides.task, hydra_config.runtime.choices.get("model"))
    return spec


def _settle_model(spec: Any, overrides: Iterable[str], chosen: str | None) -> None:
    """A checkpoint given by its path alone gets its name and chat form from its files; a named one must match them."""
    model, engine = getattr(spec, "model", None), getattr(spec, "engine", None)
    model_at = engine_kind(engine.name).model_at if isinstance(engine, EngineSpec) else "checkpoint"
    if not isinstance(model, ModelSpec) or model_at == "nowhere":
        return
    check_values(spec)  # before anything is looked for, let alone fetched
    quant_format(model.quant)
    given = {_key(override) for override in overrides}
    if chosen != DEFAULT_MODEL:
        given.add("model")  # by an experiment
    if model_at == "checkpoint":
        spec.model = settle(model, frozenset(given))
    elif engine is not None and not {"model", "model.hub_id"} & given:
        if engine.api_model is None:
            from qwen_eval.engines.api.servers import base_url, required_key
            from qwen_eval.engines.endpoint import only_model

            engine.api_model = only_model(base_url(engine), required_key(engine))
        spec.model = anonymous(model, engine.api_model, frozenset(given))


def _tell(line: str) -> str:
    line = " ".join(line.split())
    print(plain_text(line), file=sys.stderr, flush=True)
    return line


def _hydra(arguments: list[str], config_name: str, job: Callable[[Any], None]) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing several lines and leaving with 1
    import hydra
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]
    parser.parse_args(arguments)
    old, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)()
    finally:
        sys.argv = old


def _refuse_flag(message: str) -> NoReturn:
    raise ConfigError(f"{message}; options are written key=value, see --help")


def _register(config_name: str, schema: type, folders: Sequence[Path]) -> None:
    """Tell Hydra the schemas: `eval_schema`, `model/model_schema`, `engine/engine_schema`, `engine/<engine>_schema`,
    `task/<task>_schema`."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name=f"{'eval' if config_name == 'config' else config_name}_schema", node=schema)
    store.store(group="model", name="model_schema", node=ModelSpec)
    store.store(group="engine", name="engine_schema", node=EngineSpec)
    for each in engine_kinds():
        _store_option(store, "engine", each.name, each.spec, folders)
    for name in TASKS:
        spec = _task_spec(name)
        if spec is not None:
            _store_option(store, "task", name, spec, folders)


def _given_folders(argv: Sequence[str]) -> list[Path]:
    """The values of `--config-dir`, which Hydra searches too."""
    flags = ("--config-dir", "-cd")
    apart = [value for flag, value in itertools.pairwise(argv) if flag in flags]
    joined = [argument.partition("=")[2] for argument in argv if argument.startswith("--config-dir=")]
    return [Path(folder) for folder in (*apart, *joined)]


def _store_option(store: Any, group: str, name: str, spec: Any, folders: Sequence[Path]) -> None:
    """The schema, and the option itself where no folder has a yaml of its name."""
    store.store(group=group, name=f"{name}_schema", node=spec)
    if spec.name == MISSING:
        spec = spec(name=name)
    if not any((folder / group / f"{name}.yaml").is_file() for folder in folders):
        store.store(group=group, name=name, node=spec)


def _task_spec(name: str) -> Any:
    module = TASKS[name].partition(":")[0]
    try:
        return task_class(name).Spec
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None  # using it then says "unknown", and --help does not list it


def with_task_file(argv: Sequence[str]) -> list[str]:
    """Load the classes of `task.file=`, and name the one there is as the task."""
    files = [value for key, _, value in (argument.partition("=") for argument in argv) if key == "task.file"]
    if not files:
        return list(argv)
    from qwen_eval.tasks.outside import load_tasks

    names = load_tasks(files[0])
    asked = [argument.partition("=")[2] for argument in argv if argument.startswith("task=")]
    if not asked and len(names) > 1:
        raise ConfigError(f"task.file={files[0]}: holds {', '.join(names)}; name one of them, as task={names[0]}")
    unknown = [name for value in asked for name in value.split(",") if name not in names]
    if unknown:
        raise not_one_of("task", unknown[0], names)
    return list(argv) if asked else [*argv, f"task={names[0]}"]


# --- arguments -------------------------------------------------------------------------------------------------------


def list_keys(schema: type, prefix: str = "", *, tasks: Iterable[str] = ()) -> set[str]:
    """The dotted keys of a schema whose type is `list[...]`: `{"task.subjects"}`; those of each task are `task.KEY`."""
    keys = set()
    for name, kind in typing.get_type_hints(schema).items():
        kinds = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
        for kind in kinds:
            if typing.get_origin(kind) is list:
                keys.add(f"{prefix}{name}")
            elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
                keys |= list_keys(kind, f"{prefix}{name}.")
    for task in tasks:
        spec = _task_spec(task)
        keys |= list_keys(spec, "task.") if spec is not None else set()
    return keys


def bracket_lists(argv: Sequence[str], keys: Collection[str]) -> list[str]:
    """`["task.subjects=a,b"]` -> `["task.subjects=[a,b]"]` for list-typed keys: a bare comma there is a list, with and
    without -m. A sweep over lists is written with the brackets: `-m task.subjects=[a],[b,c]`.
    """
    return [_bracket(argument, keys) for argument in argv]


def _bracket(argument: str, keys: Collection[str]) -> str:
    key, equals, value = argument.partition("=")
    name = key.lstrip("+~")
    if name in SHARES:
        return f"{key}={PER_CENT.sub(lambda found: repr(float(found[1]) / 100), value)}"
    if name in LISTS_IN_TEXT and NUMBER_LIST.fullmatch(value):
        return f"{key}='{value}'"
    if name in TEXTS and value and value != "null" and value[0] not in "'\"":
        return f"{key}={quoted(value)}"
    if not equals or not PLAIN_KEY.fullmatch(key):
        return argument
    is_plain = value and value != "null" and not value.startswith(("[", "{", "${", "choice(", "range("))
    if name in keys and is_plain:
        return f"{key}=[{','.join(map(_quote, value.split(',')))}]"
    return f"{key}={_quote(value)}"


def quoted(value: str) -> str:
    """In Hydra's quotes: backslashes are doubled only before a quote, where they would escape it."""
    escaped = re.sub(r"(\\*)'", r"\1\1\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _quote(value: str) -> str:
    """Quoted if Hydra's grammar does not accept a character: another alphabet, a space, "=": `数据/ceval`."""
    return f"'{value}'" if FOREIGN.search(value) and not SYNTAX.search(value) else value


def model_first(argv: Sequence[str]) -> list[str]:
    """Flags, overrides of the model, then the rest: a grid sweeps tasks within a model and loads each model once."""

    def rank(argument: str) -> int:
        if argument.startswith("-") or "=" not in argument:
            return 0  # flags and their values stay together
        return 1 if re.split(r"[.=@]", argument.lstrip("+~"))[0] in ENGINE_GROUPS else 2

    return sorted(argv, key=rank)


def cell_tag(tag: str) -> str:
    """In a grid: the tag with every swept key but task and model, so that each cell has its own run directory.

    `"dtype=bf16"`, or with a tag of the user `"mine+dtype=bf16"`: no comma, so that it can stand in `compare=`.
    """
    swept = [item.partition("=")[::2] for item in _swept() if item.partition("=")[0] not in ("task", "model")]
    ends = [key.rpartition(".")[2] for key, _ in swept]
    names = [end if ends.count(end) == 1 else key for (key, _), end in zip(swept, ends)]
    parts = [re.sub(r"[^\w.=-]+", "_", f"{name}={value}") for name, (_, value) in zip(names, swept)]
    return "+".join(parts if tag == DEFAULT_TAG and parts else [tag, *parts])


def _swept() -> list[str]:
    """`["task=mmlu", "model.dtype=bf16"]`: what this cell of a grid has for the keys that are swept."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return []
    given = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(given)
    keys = {item.get_key_element() for item in parsed if item.is_sweep_override()}
    return [item for item in HydraConfig.get().overrides.task if item.partition("=")[0] in keys]


# --- mistakes that Hydra accepts -------------------------------------------------------------------------------------


def _key(override: str) -> str:
    """`"++model.rope.dynamic_ntk=true"` -> `"model.rope.dynamic_ntk"`."""
    return override.partition("=")[0].lstrip("+~")


def refuse_doubled(argv: Sequence[str]) -> None:
    """ConfigError for a key that is given twice: Hydra would silently use the last one."""
    given: dict[str, str] = {}
    for argument in argv:
        if "=" not in argument or argument.startswith("-"):
            continue
        key, value = _key(argument), argument.partition("=")[2]
        if key in given:
            raise ConfigError(f"{key}= is given twice: {given[key]} and {value}; give it once, or sweep both with -m")
        given[key] = value


def refuse_unknown_keys(config: Any) -> None:
    """ConfigError for a key that no schema has, however it was written: `+key=`, `++key=`, a yaml of an experiment.

    Also for a value from the environment: settings are recorded, and it may be a secret.
    """
    for key, value in _leaves(config, ""):
        if isinstance(value, str) and FROM_ENVIRONMENT.search(value):
            raise ConfigError(
                f"{key}={value}: not filled in, since every setting is recorded; let the shell do it: $NAME"
            )


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value as written) of every leaf; ConfigError at a key that its dataclass does not have."""
    from omegaconf import DictConfig, ListConfig, OmegaConf

    is_plain = not (node._is_interpolation() or node._is_missing() or node._is_none())
    if isinstance(node, DictConfig) and is_plain:
        kind = OmegaConf.get_type(node)
        known = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else None
        for name in map(str, node):
            if known is not None and name not in known:
                raise ConfigError(_no_such_key(name, prefix, known))
            yield from _leaves(node._get_node(name), f"{prefix}{name}.")
    elif isinstance(node, ListConfig) and is_plain:
        for index in range(len(node)):
            yield from _leaves(node._get_node(index), f"{prefix}{index}.")
    else:
        yield prefix.rstrip("."), node._value()


# --- error text ------------------------------------------------------------------------------------------------------


def explain(error: Exception, schema: type) -> str:
    """One line for an error of Hydra or OmegaConf: the key or value, what it may be. Re-raises all other errors."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(error.missing_cfg_file, error.options or ())
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form key=value ({str(error).splitlines()[0]})"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return _bad_key(cause, schema)
    if isinstance(error, OSError):
        return f"{error.filename or ''}: {error.strerror or error}"
    if isinstance(error, HydraException):
        return str(error)
    raise error


def _unknown_option(missing: str, options: Iterable[str]) -> str:
    group, _, name = missing.rpartition("/")
    return str(not_one_of(group or "config", name, [o for o in options if not o.endswith("_schema")]))


def _bad_key(error: Any, schema: type) -> str:
    first = str(error.msg or error).splitlines()[0]
    if "not in" not in first:
        return f"{error.full_key}: {first}"
    parent, _, _ = str(error.full_key).rpartition(".")
    owner = error.object_type if dataclasses.is_dataclass(error.object_type) else schema
    known = [field.name for field in dataclasses.fields(owner)]
    return _no_such_key(str(error.key), f"{parent}." if parent else "", known)


def _no_such_key(key: str, prefix: str, known: Sequence[str]) -> str:
    """`'modle: no such key; did you mean "model"?'`; at the top the groups of `conf/` are keys too."""
    words = [*known, *(() if prefix else (path.name for path in conf_dir().iterdir() if path.is_dir()))]
    guess = nearest(key, words)
    hint = f'did you mean "{prefix}{guess}"?' if guess else f"one of {', '.join(prefix + name for name in known)}"
    return f"{prefix}{key}: no such key; {hint}"
