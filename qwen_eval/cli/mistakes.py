"""Mistakes in the configuration, each as one line: what Hydra reports, and what it silently accepts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qwen_eval.cli.arguments import quoted
from qwen_eval.cli.schemas import conf_dir
from qwen_eval.config import nearest, not_one_of
from qwen_eval.core import ConfigError
from qwen_eval.engines.kinds import ENGINES
from qwen_eval.tasks.registry import TASKS

NO_DEFAULT = re.compile(r"(?:In '([^']+)': )?Could not override '([^']+)'")
AMBIGUOUS = re.compile(r"Ambiguous value for argument '([^=]+=.*?)'\s")
LAUNCHERS = {  # of Hydra, that come with a package
    "submitit_local": "'qwen_eval[submitit]'",
    "submitit_slurm": "'qwen_eval[submitit]'",
    "ray": "hydra-ray-launcher",
}
FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\b")


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
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    if isinstance(error, HydraException):
        several, absent = AMBIGUOUS.match(str(error)), NO_DEFAULT.match(str(error))
        if absent:
            return _no_default(absent[1], absent[2])
        return _several(several[1]) if several else str(error)
    raise error


def _no_default(file: str | None, group: str) -> str:
    """For a group that this command does not have, named by an option of another group or on the command line."""
    if file is None:
        return f"{group}: no such key; a group of your own that has no default is written +{group}="
    return f"{'='.join(file.rsplit('/', 1))}: sets {group}=, which this command does not have"


def _several(argument: str) -> str:
    key, _, value = argument.partition("=")
    value = re.sub(r"(?<!\\)'", "", value).replace(r"\'", "'")
    one = f'"{key}={quoted(value)}"'
    return f"{key}={value}: several values; add -m to run each of them. One value with a comma is written {one}"


def _unknown_option(missing: str, options: Iterable[str]) -> str:
    group, _, name = missing.rpartition("/")
    if group == "hydra/launcher" and name in LAUNCHERS:
        return f"{group}={name} needs a package that is not here: pip install {LAUNCHERS[name]}"
    known = {option for option in options if not option.endswith("_schema")}
    known |= set({"task": TASKS, "engine": ENGINES}.get(group, ()))  # Hydra knows only those that were named
    known |= {path.stem for path in (conf_dir() / group).glob("*.yaml")}  # and lists none for `model=[x]`
    return str(not_one_of(group or "config", name, sorted(known)))


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
    groups = () if prefix else (path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != key)
    words = [*known, *groups]
    guess = nearest(key, words)
    hint = f'did you mean "{prefix}{guess}"?' if guess else f"one of {', '.join(prefix + name for name in known)}"
    return f"{prefix}{key}: no such key; {hint}"
