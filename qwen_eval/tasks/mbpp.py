"""MBPP: short Python functions from a sentence and three tests, 3-shot (https://arxiv.org/abs/2108.07732).

`mbpp` is the test part of the full set (ids 11-510), `mbpp_sanitized` that of the hand-verified one, `mbpp_plus`
EvalPlus' rows with many more inputs. Prompt: the OpenCompass form that the Qwen reports use, `[BEGIN]` ... `[DONE]`.
"""

from __future__ import annotations

import ast
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_eval.core import Completion, ConfigError, DataError, Message, Prompt, Sample
from qwen_eval.data.rows import Source
from qwen_eval.extraction.programs import program_between_marks
from qwen_eval.extraction.slicing import UNPARSABLE, called_function, tree_of
from qwen_eval.sandbox import Program
from qwen_eval.tasks.code import CodeSpec, CodeTask, Readings
from qwen_eval.tasks.evalplus import plus_test
from qwen_eval.tasks.generation import prompt_text

FILES = {
    "mbpp": ("mbpp.jsonl", "mbpp.jsonl.gz"),
    "mbpp_sanitized": ("sanitized-mbpp.json",),
    "mbpp_plus": ("MbppPlus.jsonl.gz", "MbppPlus.jsonl"),
}
SPLITS = {"test": range(11, 511), "validation": range(511, 601), "train": range(601, 975), "all": range(1, 975)}
STOPS = ("[DONE]",)
UPSTREAM_END = re.compile(r"('\s*|)(\[DONE\]|DONE)")
UPSTREAM_BEGIN = re.compile(r"(\[BEGIN\]|BEGIN)('\s*|)")


@dataclass(kw_only=True)
class MbppSpec(CodeSpec):
    name: str = "mbpp"
    shots: int = 3
    timeout_s: float = 10.0  # id 123's reference counts for a second or two


class Mbpp(CodeTask[MbppSpec]):
    Spec = MbppSpec
    version = 2

    def rows(self, source: Source) -> list[Sample]:
        if self.spec.split not in SPLITS:
            raise ConfigError(f"task.split={self.spec.split}: one of {', '.join(SPLITS)}")
        rows = self._hub_rows(source) if source.is_hub else self._file_rows(source)
        samples = []
        for i, row in enumerate(rows):
            if "task_id" not in row or not ("test_list" in row or "assertion" in row):
                raise DataError(f"{source.origin} row {i + 1}: no task_id with tests, not a row of MBPP")
            if self.name == "mbpp_plus" and not row.keys() & {"plus_input", "test"}:
                raise DataError(f"{source.origin} row {i + 1}: only the shown tests, not a row of MBPP+; use task=mbpp")
            if fault := _fault_in_python(row):
                raise DataError(f"{source.origin} row {i + 1}: {fault}; mend or remove the row")
            number = int(str(row["task_id"]).rpartition("/")[2])
            if self.name == "mbpp_plus" or number in SPLITS[self.spec.split]:
                samples.append(Sample(id=f"mbpp/{number}", data=row))
        return samples

    def _file_rows(self, source: Source) -> list[dict[str, Any]]:
        names = FILES[self.name]
        rows: list[dict[str, Any]] = source.json(*names) if names[0].endswith(".json") else source.jsonl(*names)
        return rows

    def _hub_rows(self, source: Source) -> list[dict[str, Any]]:
        config = {"mbpp": "full", "mbpp_sanitized": "sanitized"}.get(self.name)
        return source.hub_rows(config, self.spec.split)

    # --- asking ---

    def prompt(self, sample: Sample) -> Prompt:
        stored: list[dict[str, str]] = json.loads(prompt_text("mbpp_3shot.json"))
        *examples, query, begin = stored
        if not 0 <= self.shots <= len(examples) // 2:
            raise ConfigError(f"task.shots={self.shots}: the official prompt has {len(examples) // 2} examples")
        words = {"{text}": task_text(sample.data), "{test_list}": "\n".join(tests_of(sample.data))}
        question = re.sub(r"\{\w+\}", lambda match: words[match[0]], query["prompt"])
        texts = [turn["prompt"] for turn in examples[: 2 * self.shots]] + [question]
        if not self.is_chat:
            return Prompt.raw("\n".join([*texts, begin["prompt"]]))
        turns = [Message(role=("assistant" if i % 2 else "user"), content=text) for i, text in enumerate(texts)]
        return Prompt(messages=(Message(role="system", content="You are a helpful assistant."), *turns))

    def stops(self) -> tuple[str, ...]:
        return STOPS

    # --- reading and running ---

    def read(self, sample: Sample, completion: Completion) -> Readings:
        upstream = upstream_program(completion.text)
        function = entry_point(sample.data)
        robust = program_between_marks(completion.text, function, also=names_in_tests(sample.data))
        return Readings(robust=robust, upstream=upstream)

    def program(self, sample: Sample, source: str) -> Program:
        return Program(
            id=sample.id, solution=source, test=test_source(sample.data), entry_point=entry_point(sample.data)
        )


def task_text(row: Mapping[str, Any]) -> str:
    """The sentence that asks: `text` in the full set, `prompt` in the sanitized one, a docstring in EvalPlus'."""
    text = str(row["text"] if "text" in row else row["prompt"]).strip()
    return text.strip('"').strip().split("\nassert")[0] if "assertion" in row else text


def tests_of(row: Mapping[str, Any]) -> list[str]:
    """The assertions a model is shown."""
    if "test_list" in row:
        return list(row["test_list"])
    return [line for line in str(row["assertion"]).splitlines() if line.strip()]


def entry_point(row: Mapping[str, Any]) -> str:
    """The function that the tests call; MBPP's own rows do not name it."""
    if "entry_point" in row:
        return str(row["entry_point"])
    return called_function("\n".join(row["test_list"]), row["code"].replace("\r\n", "\n"))


def _fault_in_python(row: Mapping[str, Any]) -> str | None:
    """Why the row's own code and tests cannot be read by the Python at hand."""
    try:
        names_in_tests(row)
        entry_point(row)
    except UNPARSABLE as error:
        return f"its code or its tests are no Python {platform.python_version()} ({error})"
    return None


def names_in_tests(row: Mapping[str, Any]) -> set[str]:
    """The names that the shown tests and their set-up code use: a program must keep those that it defines."""
    source = "\n".join([*tests_of(row), row.get("test_setup_code") or ""]).replace("\r\n", "\n")
    return {node.id for node in ast.walk(tree_of(source)) if isinstance(node, ast.Name)}


def test_source(row: Mapping[str, Any]) -> str:
    """What is run: of MBPP+ the inputs of EvalPlus' release, or the `test` that the hub's rows bring.

    Set-up code stands behind the solution: that of ids 367 and 927 uses the solution's own classes.
    """
    if "plus_input" in row:
        return plus_test(row)
    if "test" in row:
        return str(row["test"])
    parts = [*row.get("test_imports", []), row.get("test_setup_code", ""), *row["test_list"]]
    return "\n".join(part.replace("\r\n", "\n") for part in parts if part) + "\n"


def upstream_program(text: str) -> str:
    """What the official harness runs: the text between the first marks, without the quote that opens it."""
    text = text.strip()
    if end := UPSTREAM_END.search(text):
        text = text[: end.start()]
    if begin := UPSTREAM_BEGIN.search(text):
        text = text[begin.end() :]
    return text.strip().removeprefix("'")
