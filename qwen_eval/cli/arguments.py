"""The words of a command line, made ready for Hydra's grammar: lists, sentences, paths, the order of a grid."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence

from qwen_eval.config import not_one_of
from qwen_eval.core import ConfigError

NUMBER_LIST = re.compile(r"\d+(,\d+)+")
FOREIGN = re.compile(r"[^\x00-\x7f]|[ =]")
SYNTAX = re.compile(r"[\[\]{}()'\",$]")  # a list, a sweep or quotes: the writer knows the grammar
LIST = re.compile(r"\[.*\]", re.DOTALL)
PLAIN_KEY = re.compile(r"[+~]*[a-z_]\w*([./]\w+)*")
SHARES = ("limit", "task.limit")  # "10%" in them is 0.1
PER_CENT = re.compile(r"(\d+(?:\.\d+)?)%")
LISTS_IN_TEXT = ("model.window",)  # text to Hydra, but "2048,4096" in it is one value and no sweep
# Sentences: no comma, quote or bracket in them is grammar
SENTENCES = ("model.system", "task.template", "task.needle", "task.question", "engine.fake_reply", "reply", "title")
# Paths: no bracket or equal sign in them is grammar, and no comma but in a sweep
PATH = re.compile(r"(?:\w+\.)*(?:path|file|prices|tokenizer)|run_dir|runs_dir|text|calibration|verify|gate|run|out")
PATH_LISTS = ("runs", "compare", "accept", "out", "tokenizers")  # here a comma parts two, unless the whole is there
PLAIN = re.compile(r"(?:[A-Za-z_/]|\.(?!\d))[\w/.:-]*", re.ASCII)  # Hydra takes it as the text that it is
NO_TEXTS = ("null", "true", "false", "inf", "nan")  # to Hydra, but for their case
ENGINE_GROUPS = ("model", "engine", "protocol")
NO_LIST = ("'", '"', "${", "choice(", "range(")  # how a text begins that is written in Hydra's grammar
GRAMMAR = (*NO_LIST, "[", "{")  # how any other value does
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


def bracket_lists(argv: Sequence[str], lists: Collection[str], texts: Collection[str] = ()) -> list[str]:
    """`["task.subjects=a,b"]` -> `["task.subjects=[a,b]"]` for the keys of `lists`: a bare comma there is a list, with
    and without -m. A sweep over lists is written with the brackets: `-m task.subjects=[a],[b,c]`.

    The values of `texts` are text whatever they look like: `tag=1e5` is no number, `model.name=it's` no open quote.
    """
    is_grid = bool(set(MULTIRUN) & set(argv))
    return [_ready(argument, lists, texts, is_grid=is_grid) for argument in argv]


def _ready(argument: str, lists: Collection[str], texts: Collection[str], *, is_grid: bool) -> str:
    key, equals, value = argument.partition("=")
    name = key.lstrip("+~")
    if name in SHARES:
        return f"{key}={PER_CENT.sub(lambda found: repr(float(found[1]) / 100), value)}"
    if name in LISTS_IN_TEXT and NUMBER_LIST.fullmatch(value):
        return f"{key}='{value}'"
    if name in SENTENCES and value and value != "null" and value[0] not in "'\"":
        return f"{key}={quoted(value)}"
    if not equals or not PLAIN_KEY.fullmatch(key) or value in ("", "null"):
        return argument
    if name in lists:
        return f"{key}={_list(name, value, is_text=name in texts)}"
    is_text = (name in texts or PATH.fullmatch(name) is not None) and not LIST.fullmatch(value)
    if value.startswith(NO_LIST if is_text else GRAMMAR):
        return argument
    if PATH.fullmatch(name):
        parts = value.split(",") if is_grid and not _is_there(value) else [value]
        return f"{key}={','.join(text(_at_home(part)) for part in parts)}"
    return f"{key}={_several_texts(value) if name in texts else _quote(value)}"


def _list(name: str, value: str, *, is_text: bool) -> str:
    """A list in brackets. A quoted value is one element, or several: `'a,b'`, `'a','b'`."""
    if value.startswith(("'", '"')):
        return f"[{value}]"
    if value.startswith(GRAMMAR):
        return value
    if name in PATH_LISTS:
        parts = value.split(",")
        is_one = _is_there(value) and not all(map(_is_there, parts))
        return f"[{','.join(text(_at_home(part)) for part in ([value] if is_one else parts))}]"
    return f"[{_several_texts(value) if is_text else ','.join(map(_quote, value.split(',')))}]"


def _several_texts(value: str) -> str:
    parts = value.split(",")
    return ",".join(text(part.strip()) for part in parts) if len(parts) > 1 else text(value)


def _is_there(path: str) -> bool:
    return os.path.exists(_at_home(path))


def _at_home(path: str) -> str:
    """A shell leaves the `~` of `key=~/x` as it is."""
    return os.path.expanduser(path)


def text(value: str) -> str:
    """A value that is text, in quotes where Hydra's grammar would read something else in it."""
    return value if PLAIN.fullmatch(value) and value.lower() not in NO_TEXTS else quoted(value)


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
