"""The words of a command line, made ready for Hydra's grammar: lists, sentences, paths, the order of a grid."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from qwen_eval.config import not_one_of
from qwen_eval.core import ConfigError

NUMBER_LIST = re.compile(r"\d+(,\d+)+")
FOREIGN = re.compile(r"[^\x00-\x7f]|[ =]")
SYNTAX = re.compile(r"[\[\]{}()'\",$]")  # a list, a sweep or quotes: the writer knows the grammar
PLAIN_KEY = re.compile(r"[+~]*[a-z_]\w*([./]\w+)*")
SHARES = ("limit", "task.limit")  # "10%" in them is 0.1
PER_CENT = re.compile(r"(\d+(?:\.\d+)?)%")
LISTS_IN_TEXT = ("model.window",)  # text to Hydra, but "2048,4096" in it is one value and no sweep
TEXTS = ("model.system", "task.template", "reply")  # a sentence: no comma, quote or bracket in it is grammar
# A path: no bracket or equal sign in it is grammar, and no comma but in a sweep
PATHS = ("task.path", "task.file", "model.path", "run_dir", "runs_dir", "engine.prices", "engine.tokenizer", "text",
         "calibration", "verify", "gate", "run")  # fmt: skip
ENGINE_GROUPS = ("model", "engine", "protocol")
GRAMMAR = ("'", '"', "[", "{", "${", "choice(", "range(")  # how a value begins that is written in Hydra's grammar
MULTIRUN = ("-m", "--multirun")
# Hydra's own flags, and the number of words that follow each
FLAGS = {
    "--help": 0, "-h": 0, "--hydra-help": 0, "--version": 0, "--cfg": 1, "-c": 1, "--resolve": 0, "--package": 1,
    "-p": 1, "--run": 0, "-r": 0, "--multirun": 0, "-m": 0, "--config-path": 1,
    "-cp": 1, "--config-name": 1, "-cn": 1, "--config-dir": 1, "-cd": 1, "--experimental-rerun": 1, "--info": 0,
    "-i": 0,
}  # fmt: skip
CFG = ("job", "hydra", "all")


def refuse_unknown_flags(argv: Sequence[str]) -> None:
    """ConfigError for a flag that Hydra does not have, or one without its value."""
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            continue
        name, equals, value = word.partition("=")
        if name not in FLAGS:
            raise ConfigError(f"unrecognized arguments: {word}; options are written key=value, see --help")
        if FLAGS[name] and not equals:
            value = next(words, "")
        if FLAGS[name] and not value:
            raise ConfigError(f"{name}: needs a value, see --help")
        if name in ("--cfg", "-c") and value not in CFG:
            raise not_one_of(name, value, CFG)


def bracket_lists(argv: Sequence[str], keys: Collection[str]) -> list[str]:
    """`["task.subjects=a,b"]` -> `["task.subjects=[a,b]"]` for list-typed keys: a bare comma there is a list, with and
    without -m. A sweep over lists is written with the brackets: `-m task.subjects=[a],[b,c]`.
    """
    is_grid = bool(set(MULTIRUN) & set(argv))
    return [_ready(argument, keys, is_grid=is_grid) for argument in argv]


def _ready(argument: str, keys: Collection[str], *, is_grid: bool) -> str:
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
    is_plain = value and value != "null" and not value.startswith(GRAMMAR)
    if name in keys and is_plain:
        return f"{key}=[{','.join(map(_quote, value.split(',')))}]"
    if name in PATHS and is_plain:
        return f"{key}={_path(value, is_grid=is_grid)}"
    return f"{key}={_quote(value)}"


def _path(value: str, *, is_grid: bool) -> str:
    """One path; in a grid a comma parts two, unless the whole is there."""
    parts = value.split(",") if is_grid and not Path(value).expanduser().exists() else [value]
    needs_quotes = FOREIGN.search(value) or SYNTAX.search(value)
    return ",".join(map(quoted, parts)) if needs_quotes else value


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


def key_of(override: str) -> str:
    """`"++model.rope.dynamic_ntk=true"` -> `"model.rope.dynamic_ntk"`."""
    return override.partition("=")[0].lstrip("+~")


def refuse_doubled(argv: Sequence[str]) -> None:
    """ConfigError for a key that is given twice: Hydra would silently use the last one."""
    given: dict[str, str] = {}
    for argument in argv:
        if "=" not in argument or argument.startswith("-"):
            continue
        key, value = key_of(argument), argument.partition("=")[2]
        if key in given:
            raise ConfigError(f"{key}= is given twice: {given[key]} and {value}; give it once, or sweep both with -m")
        given[key] = value


def is_true(argv: Sequence[str], key: str) -> bool:
    """Whether `key=true` stands among the arguments, before anything is composed."""
    return any(key_of(argument) == key and argument.partition("=")[2].lower() == "true" for argument in argv)
