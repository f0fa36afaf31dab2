"""From arguments to the settings of a command: what Hydra composes, as an object of the command's schema."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qwen_eval.cli.arguments import MULTIRUN, bracket_lists, key_of, model_first, refuse_doubled, refuse_unknown_flags
from qwen_eval.cli.mistakes import explain, refuse_unknown_keys
from qwen_eval.cli.schemas import (
    conf_dir,
    default_groups,
    given_folders,
    groups_in,
    is_open,
    list_keys,
    named,
    register,
    text_keys,
)
from qwen_eval.config import EngineSpec, ModelSpec, check_values, not_one_of
from qwen_eval.core import ConfigError
from qwen_eval.engines.kinds import kind as engine_kind
from qwen_eval.models.naming import anonymous, settle
from qwen_eval.models.quant.formats import quant_format
from qwen_eval.tasks.registry import TASKS

DEFAULT_MODEL = "qwen-nano"  # of every command that has a model


def compose(overrides: Sequence[str], *, config_name: str, schema: type) -> Any:
    """The settings of the command with these overrides, a `schema` object, for calls from Python.

    Raises a QwenEvalError for every mistake that the command reports; prints nothing.
    """
    arguments = ready(overrides, config_name, schema)
    refuse_doubled(arguments)
    try:
        config = _composed(arguments, config_name)
    except Exception as error:
        raise ConfigError(explain(error, schema)) from error
    known = config.hydra
    return settings(_without_hydra(config), schema, known)


def _composed(arguments: Sequence[str], config_name: str) -> Any:
    """The configuration of one cell, with what Hydra says of itself under `hydra`."""
    import hydra

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra.compose(config_name, overrides=list(arguments), return_hydra_config=True)


def _without_hydra(config: Any) -> Any:
    from omegaconf import OmegaConf, open_dict

    OmegaConf.set_readonly(config, False)
    with open_dict(config):
        del config["hydra"]
    return config


def each_cell(argv: Sequence[str], config_name: str, schema: type, job: Callable[[Any], None]) -> None:
    """Call `job` with the composed configuration, of each cell in a grid; what goes wrong is raised."""
    refuse_unknown_flags(argv)
    arguments = model_first(ready(argv, config_name, schema))
    old = sys.argv
    with tempfile.TemporaryDirectory() as scratch:
        sys.argv = [old[0], *arguments, *_sweep_folder(arguments, scratch)]
        try:
            if is_open(arguments) or any(argument.startswith("-") for argument in arguments):
                _by_hydra(config_name, job)
            else:
                _one_cell(arguments, config_name, job)
        finally:
            sys.argv = old


def _by_hydra(config_name: str, job: Callable[[Any], None]) -> None:
    """Grids, Hydra's flags, and files that may say anything of Hydra itself."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing several lines and leaving with 1
    import hydra

    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)()


def _one_cell(arguments: Sequence[str], config_name: str, job: Callable[[Any], None]) -> None:
    """In half the time: `hydra.main` composes everything twice, to learn first whether it is a grid."""
    from hydra.core.hydra_config import HydraConfig

    config = _composed(arguments, config_name)
    current = HydraConfig.instance()
    before = current.cfg
    current.set_config(config)
    try:
        job(_without_hydra(config))
    finally:
        current.cfg = before


def _sweep_folder(arguments: Sequence[str], scratch: str) -> list[str]:
    """Hydra keeps a file of each grid, which nobody needs; only another launcher (`hydra/launcher=`) keeps its logs
    beside it."""
    is_grid = bool(set(MULTIRUN) & set(arguments))
    return [] if not is_grid or is_open(arguments) else [f"hydra.sweep.dir='{scratch}'"]


def ready(argv: Sequence[str], config_name: str, schema: type) -> list[str]:
    """The arguments in Hydra's grammar, once it knows the schemas that they need. A group that has no default
    (`experiment=`) gets the plus that Hydra asks for.
    """
    argv = with_task_file(argv)
    folders = [conf_dir(), *given_folders(argv)]
    register(config_name, schema, folders, argv)
    tasks, groups = named(argv, "task", TASKS), groups_in(folders)
    words = bracket_lists(argv, list_keys(schema, tasks=tasks), text_keys(schema, tasks=tasks) | groups)
    added = groups - default_groups(config_name)
    return [f"+{word}" if word.partition("=")[0] in added and "=" in word else word for word in words]


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


def settings(config: Any, schema: type, hydra_config: Any) -> Any:
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
    given = {key_of(override) for override in overrides}
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
