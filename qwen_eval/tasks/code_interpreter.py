"""Code interpreter: questions answered with a Python tool, in ReAct form (Qwen-Agent's benchmark).

`math`: GSM8K with the tool, at most three executions, the last number decides. `general`, `visualization`: the
official questions, which must be the user's (`task.path=`): does the code run, and does the picture show what was
asked. A sample has an interpreter of its own in the sandbox, whose variables stay from one execution to the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, cast

from qwen_eval.config import TaskSpec
from qwen_eval.core import JSON, ConfigError, DataError, Generate, Grade, Metric, Prompt, Record, Request, Sample, Turn
from qwen_eval.data.rows import Source
from qwen_eval.extraction.numbers import UPSTREAM_GOLD, concluded_number, written
from qwen_eval.extraction.symptoms import READ_CHARACTERS, answer_part, completions_of, flags
from qwen_eval.metrics import share
from qwen_eval.sandbox import Mode
from qwen_eval.sandbox.notebook import CellResult, Notebooks
from qwen_eval.tasks.generation import GenerativeTask
from qwen_eval.tasks.judge import VisionJudge, says_right
from qwen_eval.tasks.react import INSTRUCTION, STOP_WORDS
from qwen_eval.tasks.registry import TaskContext

QUESTIONS = "eval_code_interpreter_v1.jsonl"
MATH, GENERAL, HARD, EASY = "math", "general", "visualization_hard", "visualization_easy"
VISUAL = (HARD, EASY)
EXECUTIONS = {MATH: 3, GENERAL: 1, HARD: 3, EASY: 3, "math_code": 1}
RERUN_S = 10.0  # of all code of a question at once, for the executable rate; the official limit
MOST_FILE_BYTES = 7 << 20
TOOL = (
    "code_interpreter: Call this tool to interact with the 代码解释器 API. What is the 代码解释器 API useful for? "
    "代码解释器，可用于执行Python代码。 Parameters: "
    '[{"name": "code", "type": "string", "description": "待执行的代码"}] '
    "Enclose the code within triple backticks (`) at the beginning and end of the code."
)
UPLOADED = {"zh": "[上传文件{names}]", "en": "[Upload file {names}]"}
_FENCED = re.compile(r"```[^\n]*\n(.+?)```", re.DOTALL)
_QUOTED = re.compile(r"`([^`]*)`")
_UPSTREAM_NUMBER = re.compile(
    r"(?<=(\s|[\$%#{]))([+-])?(?=(\S))(0|([1-9](\d*|\d{0,2}(,\d{3})*)))?(\.\d*[1-9])?(?=(\s|[.,}]|$))"
)


@dataclass(kw_only=True)
class InterpreterSpec(TaskSpec):
    name: str = "code_interpreter"
    hub_id: str | None = "openai/gsm8k"
    split: str = "test"
    max_new_tokens: int = 1024  # of one turn
    timeout_s: float = 30.0  # of one execution
    output_characters: int = 2048  # of one execution that the model is shown
    judge_base_url: str | None = None  # an OpenAI-compatible endpoint with a vision model, for the pictures
    judge_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Episode:
    """What happened so far: the assistant's text with observations, the code that was run and what it gave."""

    text: str
    cells: tuple[str, ...] = ()
    results: tuple[CellResult, ...] = ()
    is_over: bool = False


class CodeInterpreter(GenerativeTask[InterpreterSpec]):
    Spec = InterpreterSpec
    version = 1
    runs_programs: Literal[True] = True
    bundled = "gsm8k"

    def __init__(self, spec: InterpreterSpec, context: TaskContext):
        super().__init__(spec, context)
        if spec.timeout_s <= 0 or spec.output_characters < 1:
            raise ConfigError(
                f"task.timeout_s={spec.timeout_s}, task.output_characters={spec.output_characters}: both are positive"
            )
        self.judge = VisionJudge(spec.judge_base_url, spec.judge_model) if spec.judge_base_url else None

    # --- rows ---

    def rows(self, source: Source) -> list[Sample]:
        if source.is_hub:
            return [_gsm8k(source, i, row) for i, row in enumerate(source.hub_rows("main", self.spec.split))]
        official = source.jsonl(QUESTIONS) if source.has(QUESTIONS) else []
        samples = [_question(source, i, row) for i, row in enumerate(official)]
        for sample in samples:
            self._files(sample)  # now, so that the digest of the data holds them and a missing one is told at once
        names = (f"{self.spec.split}.jsonl", f"{self.spec.split}.jsonl.gz")
        if source.has(*names) or not samples:
            samples += [_gsm8k(source, i, row) for i, row in enumerate(source.jsonl(*names))]
        return samples

    def _files(self, sample: Sample) -> dict[str, bytes]:
        """The input files of a question, by their plain names."""
        found = {}
        for place in sample.data.get("input_file_path") or ():
            name = str(place).rpartition("/")[2]
            at = self.source.names(f"*{name}")
            if not at:
                raise DataError(f"{self.source.origin}: no input file {name} of question {sample.id}")
            content = self.source.content(at[0])
            if len(content) > MOST_FILE_BYTES:
                raise DataError(f"{self.source.origin}/{at[0]}: {len(content)} bytes, more than {MOST_FILE_BYTES}")
            found[name] = content
        return found

    @property
    def notes(self) -> Sequence[str]:
        notes = [] if self.is_chat else ["base form: the official benchmark asks chat models alone"]
        if self.judge is None and any(sample.group in VISUAL for sample in self.samples()):
            notes.append(
                "visualisation: no judge, so only the executable rate is told; task.judge_base_url= and "
                "task.judge_model= name an OpenAI-compatible vision model"
            )
        return notes

    # --- asking ---

    @cached_property
    def _notebooks(self) -> Notebooks:
        return Notebooks(
            mode=cast("Mode", self.context.sandbox),
            timeout_s=self.spec.timeout_s,
            most_characters=self.spec.output_characters,
            wants_figures=True,
        )

    def prompt(self, sample: Sample) -> Prompt:
        return self._prompt(sample, "")

    def _prompt(self, sample: Sample, text: str) -> Prompt:
        query = sample.data["query"].partition("<|im_end|>")[0]
        names = ", ".join(str(place).rpartition("/")[2] for place in sample.data.get("input_file_path") or ())
        language = "zh" if sample.data.get("lang") == "zh" else "en"
        query = (UPLOADED[language].format(names=names) if names else "") + query
        asked = INSTRUCTION.replace("{tools}", TOOL).replace("{names}", "code_interpreter").replace("{query}", query)
        if self.is_chat:
            return Prompt.user(asked.strip(), prefill=text)
        return Prompt.raw(f"{asked}\n{text}")

    def request(self, sample: Sample, turns: Sequence[Turn]) -> Request | None:
        episode = self.replay(sample, turns)
        if episode.is_over:
            return None
        return Generate(
            prompt=self._prompt(sample, episode.text),
            max_new_tokens=self.reply_tokens,
            stop=STOP_WORDS,
            sampling=self.context.sampling(self.spec, self.sampling(sample)),
        )

    def replay(self, sample: Sample, turns: Sequence[Turn]) -> Episode:
        """The episode as these replies make it: their code is run, or found as it was run in the sample's notebook."""
        begun = begun_episode(sample.data["query"])
        text, cells = begun.text, list(begun.cells)
        results = self._results(sample, cells)
        limit = EXECUTIONS[sample.group] + len(cells)
        is_over = False
        for turn in turns:
            reply, action, code = read_call(completions_of(turn)[0].text, is_upstream=self.is_upstream)
            text += reply
            if not action:
                is_over = True
                break
            cells.append(code)
            results = self._results(sample, cells)
            observation = observed(results[-1], len(cells))
            text += f"\nObservation: {observation}\nThought:"
            if len(cells) >= limit or "error:" in observation or "Traceback" in observation:
                is_over = True
                break
        return Episode(text=text, cells=tuple(cells), results=tuple(results), is_over=is_over)

    def _results(self, sample: Sample, cells: Sequence[str]) -> list[CellResult]:
        return self._notebooks.results(sample.id, cells, self._files(sample)) if cells else []

    # --- grading ---

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        episode = self.replay(sample, turns)
        self._notebooks.close(sample.id)
        if sample.group == MATH:
            return self._graded_math(sample, turns, episode)
        is_executable = self._is_executable(sample, episode)
        values: dict[str, Any] = {**_told(episode), "executable": is_executable}
        score: float | None = is_executable
        if sample.group in VISUAL:
            values |= self._judged(sample, episode)
            score = values["picture"] if self.judge else is_executable
        return Grade(
            score=score,
            extracted=list(episode.cells),
            values=values,
            flags=_flags(turns, has_answer=bool(episode.cells)),
        )

    def _graded_math(self, sample: Sample, turns: Sequence[Turn], episode: Episode) -> Grade:
        answer = concluded_number(answer_part(episode.text).rpartition("Final Answer:")[2])
        robust = answer == Fraction(sample.target)
        read = upstream_number(episode.text)
        upstream = read is not None and read == upstream_number(sample.data["answer"])
        ran = [not result.error for result in episode.results]
        return Grade(
            score=float(robust),
            extracted=written(answer),
            extracted_upstream=None if read is None else written(read),
            score_upstream=float(upstream),
            values={**_told(episode), "executable": float(bool(ran) and all(ran))},
            flags=_flags(turns, has_answer=answer is not None),
        )

    def _is_executable(self, sample: Sample, episode: Episode) -> float:
        """Whether the code runs by itself in a new interpreter: the first block, or all of a mathematical question."""
        begun = begun_episode(sample.data["query"]).cells
        written_cells = episode.cells[len(begun) :]
        if not written_cells:
            return 0.0
        code = "\n".join([*begun, *(written_cells if sample.group == "math_code" else written_cells[:1])])
        if "def solution()" in code:
            code += "\nsolution()\n"
        limit_s = self.spec.timeout_s if sample.group == GENERAL else RERUN_S
        books = Notebooks(mode=cast("Mode", self.context.sandbox), timeout_s=limit_s)
        [result] = books.results(sample.id, [code], self._files(sample))
        books.close()
        return float(not result.error)

    def _judged(self, sample: Sample, episode: Episode) -> dict[str, JSON]:
        """Whether there is a picture of code that ran, and what the judge says of it."""
        figures = [result.figure for result in episode.results if result.figure and not result.error]
        if self.judge is None:
            return {"has_figure": float(bool(figures))}
        if not figures:
            return {"has_figure": 0.0, "picture": 0.0}
        query = sample.data["query"].partition("<|im_end|>")[0]
        reply = self.judge.reply(query, str(sample.data.get("lang", "en")), figures[-1])
        return {"has_figure": 1.0, "picture": float(says_right(reply)), "judge": reply[:500]}

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        grades: dict[str, list[Grade]] = {}
        for record in records:
            grades.setdefault(record.group, []).append(record.grade)
        metrics: dict[str, Metric] = {}
        if MATH in grades:
            metrics["math_accuracy"] = share([grade.score for grade in grades[MATH]])
            if not self.is_upstream:
                metrics["math_accuracy_upstream"] = share([grade.score_upstream for grade in grades[MATH]])
        for group in VISUAL if self.judge else ():
            if group in grades:
                metrics[f"{group}_accuracy"] = share([grade.values["picture"] for grade in grades[group]])
        parts = {
            "math": ("math_code",) if "math_code" in grades else (MATH,),
            "visualization": VISUAL,
            GENERAL: (GENERAL,),
        }
        for name, groups in parts.items():
            ran = [grade.values["executable"] for group in groups for grade in grades.get(group, ())]
            if ran:
                metrics[f"{name}_executable_rate"] = share(ran)
        return metrics

    def describe(self) -> Mapping[str, JSON]:
        return {
            **super().describe(),
            "timeout_s": self.spec.timeout_s,
            "output_characters": self.spec.output_characters,
            "judge": self.spec.judge_model,
        }


# --- rows ------------------------------------------------------------------------------------------------------------


def _gsm8k(source: Source, number: int, row: Mapping[str, Any]) -> Sample:
    gold = UPSTREAM_GOLD.search(str(row.get("answer")))
    if "question" not in row or not gold:
        raise DataError(f"{source.origin} row {number + 1}: no question with an answer that ends in '#### number'")
    data = {"query": row["question"], "answer": row["answer"]}
    return Sample(id=f"math/{number}", group=MATH, data=data, target=gold[1].replace(",", "").rstrip("."))


def _question(source: Source, number: int, row: Mapping[str, Any]) -> Sample:
    """A row of the official file; "easy" pictures are those of which a first execution is told in the question."""
    tags = row.get("tags")
    tags = tags.split(",") if isinstance(tags, str) else tags
    if not isinstance(row.get("query"), str) or not isinstance(tags, list):
        raise DataError(f"{source.origin}/{QUESTIONS} row {number + 1}: needs query and tags")
    if "visualization" in tags:
        group = EASY if "<|im_start|>" in row["query"] else HARD
    else:
        group = "math_code" if "math" in tags else GENERAL
    return Sample(id=f"{group}/{number}", group=group, data=dict(row))


# --- ReAct with code -------------------------------------------------------------------------------------------------


def begun_episode(query: str) -> Episode:
    """The execution that an "easy" question already tells, in ChatML after its text; nothing else."""
    _, marker, begun = query.partition("<|im_start|>assistant\n")
    if not marker:
        return Episode(text="")
    call = re.search(r"\nAction Input:(.*?)(?=\nObservation:|\Z)", "\n" + begun, re.DOTALL)
    return Episode(text=begun, cells=(code_of(call[1].strip()),) if call else ())


def read_call(reply: str, *, is_upstream: bool) -> tuple[str, str, str]:
    """(what of the reply stays, tool, code) of its last call; no tool where there is none.

    The official parser misses a call in the first line of a reply, since it looks for a line break before "Action:".
    """
    text = reply if is_upstream else "\n" + reply
    action, given = text.rfind("\nAction:"), text.rfind("\nAction Input:")
    if not 0 <= action < given:
        return reply, "", ""
    name = text[action + len("\nAction:") : given].strip()
    return reply.rstrip(), name, code_of(text[given + len("\nAction Input:") :].strip())


def code_of(given: str) -> str:
    """The code of an action's input: the first fenced block, quoted text, the JSON field `code`, or all of it."""
    given = given[:READ_CHARACTERS]  # what a text without any line break costs grows with its square
    for pattern in (_FENCED, _QUOTED):
        if match := pattern.search(given):
            return match[1]
    import json5

    try:
        return str(json5.loads(given)["code"])
    except Exception:  # json5 raises its own kinds too: it is no JSON with code
        return given


def observed(result: CellResult, number: int) -> str:
    """What the model is shown of an execution, in the words of the official tool."""
    parts = {"stdout": result.output, "execute_result": result.value, "error": _error(result)}
    shown = [f"{name}:\n\n```\n{text.rstrip()}\n```" for name, text in parts.items() if text.strip()]
    shown += [f"![fig-{number:03}](fig-{number:03}.png)"] if result.figure else []
    return "\n\n".join(shown) or "Finished execution."


def _error(result: CellResult) -> str:
    return "Timeout: Code execution exceeded the time limit." if result.error == "timed out" else result.error


def upstream_number(text: str) -> Fraction | None:
    """The last number as the official script finds it, between spaces or signs."""
    found = [match[0] for match in _UPSTREAM_NUMBER.finditer(text.strip(".").replace("\n", "\\n"))]
    last = found[-1].replace(",", "").replace("+", "") if found else ""
    return Fraction(last) if any(character.isdigit() for character in last) else None


def _told(episode: Episode) -> dict[str, JSON]:
    return {"executions": len(episode.results), "errors": [result.error for result in episode.results if result.error]}


def _flags(turns: Sequence[Turn], *, has_answer: bool) -> tuple[str, ...]:
    return tuple(sorted({flag for turn in turns for flag in flags(completions_of(turn)[0], has_answer=has_answer)}))
