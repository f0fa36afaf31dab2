"""The Hugging Face agent benchmark: which tools, named and called, and does the code give the right result.

27 prompts in run mode, 47 steps of conversations in chat mode (transformers' `evaluate_agent`, Apache-2.0). The code is
run in the sandbox with stub tools, at grading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from qwen_eval.config import TaskSpec
from qwen_eval.core import JSON, DataError, Generate, Grade, Metric, Prompt, Record, Request, Sample, Turn
from qwen_eval.data.rows import Source
from qwen_eval.extraction.symptoms import answer_part, completions_of, cut, flags
from qwen_eval.metrics import share
from qwen_eval.sandbox import Mode
from qwen_eval.sandbox.session import Session, SessionLost
from qwen_eval.tasks.generation import GenerativeTask
from qwen_eval.tasks.hf_tools import TOOLS

STOPS = {"hf_agent": ("Task:",), "hf_agent_chat": ("Human:", "=====")}
RENAMED = {"Human:": "_HUMAN_:", "Assistant:": "_ASSISTANT_:"}  # "Human:" ends a raw reply of Qwen v1
UPSTREAM = "_upstream"  # ends the names of the official reading's scores
LEAD = "I will use the following "  # the run prompt ends in it
FENCES = ("```", "```py", "```python")
STEP_S = 5.0  # of one snippet: the tools are stubs
PENALTY = 0.25  # of a missing or unexpected tool
IN_STATE, WRONG = 0.75, 0.3  # of code whose result stands in a variable; of any other code, none included


@dataclass(kw_only=True)
class HfAgentSpec(TaskSpec):
    name: str = "hf_agent"  # or hf_agent_chat
    split: str = "test"
    max_new_tokens: int = 512


@dataclass(frozen=True, kw_only=True)
class AgentStep:
    """One thing asked for. `inputs` are the variables of the prompt; several `answers` are alternatives."""

    task: str
    inputs: Mapping[str, str]
    answers: tuple[str, ...]


class Problem(TypedDict):
    """One step of a problem in the official file, in each of its wordings."""

    task: list[str]
    inputs: dict[str, str] | list[str]
    answer: str | list[str]


class File(TypedDict):
    run_problems: list[Problem]
    chat_problems: list[list[Problem]]
    prompt_templates: dict[str, str]
    tools: dict[str, str]


class HfAgent(GenerativeTask[HfAgentSpec]):
    Spec = HfAgentSpec
    version = 1
    runs_programs: Literal[True] = True
    bundled = "hf_agent"

    @property
    def is_conversation(self) -> bool:
        return self.name == "hf_agent_chat"

    # --- rows ---

    @cached_property
    def _file(self) -> File:
        content = self.source.json("hfagent.json")
        needed = ("run_problems", "chat_problems", "prompt_templates", "tools")
        if not isinstance(content, dict) or any(key not in content for key in needed):
            raise DataError(f"{self.source.origin}/hfagent.json: needs {', '.join(needed)}")
        return cast(File, content)

    def rows(self, source: Source) -> list[Sample]:
        if not self.is_conversation:
            problems = [[problem] for problem in self._file["run_problems"]]
        else:
            problems = self._file["chat_problems"]
        return [
            Sample(id=f"{number}/{wording}", cluster=str(number), data={"steps": steps})
            for number, problem in enumerate(problems)
            for wording, steps in enumerate(wordings(problem))
        ]

    # --- asking ---

    @cached_property
    def _opening(self) -> str:
        """The template with its tools."""
        templates = self._file["prompt_templates"]
        text = templates["CHAT_PROMPT_TEMPLATE" if self.is_conversation else "RUN_PROMPT_TEMPLATE"]
        listed = "\n".join(f"- {name}: {description}" for name, description in self._file["tools"].items())
        return text.replace("<<all_tools>>", listed)

    def prompt(self, sample: Sample) -> Prompt:
        return self._prompt(sample, ())

    def _prompt(self, sample: Sample, replies: Sequence[str]) -> Prompt:
        steps = steps_of(sample)
        if not self.is_conversation:
            text = self._opening.replace("<<prompt>>", steps[0].task)
        else:
            message = self._file["prompt_templates"]["CHAT_MESSAGE_PROMPT"]
            text = self._opening
            for step, reply in zip(steps, [*replies, ""]):
                text += message.replace("<<task>>", step.task) + (f"{reply}\n" if reply else "")
        for name, other in RENAMED.items():
            text = text.replace(name, other)
        return Prompt.user(text) if self.is_chat else Prompt.raw(text)

    def stops(self) -> tuple[str, ...]:
        return tuple(RENAMED.get(stop, stop) for stop in STOPS[self.name])

    def request(self, sample: Sample, turns: Sequence[Turn]) -> Request | None:
        if len(turns) == len(steps_of(sample)):
            return None
        return Generate(
            prompt=self._prompt(sample, self.replies(turns)),
            max_new_tokens=self.reply_tokens,
            stop=self.stops(),
            sampling=self.context.sampling(self.spec, self.sampling(sample)),
        )

    def replies(self, turns: Sequence[Turn]) -> list[str]:
        """What the model said, in the benchmark's own words for the speakers."""
        found = []
        for turn in turns:
            text = cut(completions_of(turn)[0].text, self.stops())
            for name, other in RENAMED.items():
                text = text.replace(other, name)
            found.append(text)
        return found

    # --- grading ---

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        steps, replies = steps_of(sample), self.replies(turns)
        reader = read_chat if self.is_conversation else read_run
        read = {"robust": [reader(answer_part(reply)) for reply in replies], "upstream": list(map(reader, replies))}
        results = {
            name: run_snippets(name, [code for _, code in found], steps, self.context.sandbox)
            for name, found in read.items()
        }
        references = references_of(steps, self.context.sandbox)
        scored = [
            {
                **score_step(*read["robust"][i], step, references[i], results["robust"][i]),
                **score_step(*read["upstream"][i], step, references[i], results["upstream"][i], suffix=UPSTREAM),
            }
            for i, step in enumerate(steps)
        ]
        completions = [completions_of(turn)[0] for turn in turns]
        pairs = zip(completions, read["robust"])
        seen = {flag for one, (_, code) in pairs for flag in flags(one, has_answer=bool(code))}
        return Grade(
            score=sum(item["code"] for item in scored) / len(scored),
            score_upstream=sum(item[f"code{UPSTREAM}"] for item in scored) / len(scored),
            extracted=[result.value for result in results["robust"]],
            extracted_upstream=[result.value for result in results["upstream"]],
            values={"steps": scored},
            flags=tuple(sorted(seen)),
        )

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        found = [(step, record.cluster) for record in records for step in record.grade.values["steps"]]
        clusters = [cluster for _, cluster in found]
        suffix = UPSTREAM if self.is_upstream else ""
        names = {name: name + suffix for name in ("code", "tool_selection", "tool_used")}
        names |= {} if self.is_upstream else {f"code{UPSTREAM}": f"code{UPSTREAM}"}
        return {name: share([step[key] for step, _ in found], clusters) for name, key in names.items()}

    def describe(self) -> Mapping[str, JSON]:
        return {**super().describe(), "agent": "chat" if self.is_conversation else "run"}


# --- problems --------------------------------------------------------------------------------------------------------


def wordings(problem: Sequence[Problem]) -> list[list[dict[str, Any]]]:
    """A problem's steps, once for each of its wordings."""
    return [
        [{"task": step["task"][i], "inputs": step["inputs"], "answer": step["answer"]} for step in problem]
        for i in range(len(problem[0]["task"]))
    ]


def steps_of(sample: Sample) -> list[AgentStep]:
    return [
        AgentStep(
            task=row["task"],
            inputs=dict(row["inputs"]) if isinstance(row["inputs"], dict) else {n: f"<<{n}>>" for n in row["inputs"]},
            answers=tuple(row["answer"]) if isinstance(row["answer"], list) else (row["answer"],),
        )
        for row in sample.data["steps"]
    ]


# --- replies ---------------------------------------------------------------------------------------------------------


def read_run(reply: str) -> tuple[str, str]:
    """(explanation, code) of a reply in run mode: the code stands after "Answer:"; no code where that is missing.

    The official reading fails as a whole where "Answer:" is there twice; here the first one counts.
    """
    explanation, _, code = (LEAD + reply).partition("Answer:")
    lines = code.strip().split("\n")
    if lines[0].strip() in FENCES:
        lines = lines[1:]
    end = next((i for i, line in enumerate(lines) if line.strip() == "```"), len(lines))
    return explanation.strip(), "\n".join(lines[:end])


def read_chat(reply: str) -> tuple[str, str]:
    """(explanation, code) of a reply in chat mode: the first fenced block, to the end where it is not closed."""
    lines = reply.split("\n")
    fences = [i for i, line in enumerate(lines) if line.lstrip().startswith("```")]
    if not fences:
        return reply.strip(), ""
    end = fences[1] if len(fences) > 1 else len(lines)
    return "\n".join(lines[: fences[0]]).strip(), "\n".join(lines[fences[0] + 1 : end]).strip()


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SnippetResult:
    """`value` of a snippet and all texts in its variables."""

    value: str | None = None
    texts: tuple[str, ...] = ()


@cache
def driver() -> str:
    return Path(__file__).with_name("hf_tools.py").read_text(encoding="utf-8")


def run_snippets(
    reading: str, snippets: Sequence[str], steps: Sequence[AgentStep], sandbox: str
) -> list[SnippetResult]:
    """The snippets of a conversation in one interpreter; after one that ends it, nothing has a result."""
    found: list[SnippetResult] = []
    try:
        with Session(driver(), mode=cast("Mode", sandbox)) as session:
            for code, step in zip(snippets, steps):
                found.append(_result(session.call("run", reading, code, dict(step.inputs), timeout_s=STEP_S)))
    except SessionLost:
        pass
    return found + [SnippetResult()] * (len(snippets) - len(found))


def _result(answer: object) -> SnippetResult:
    """The interpreter's word, which hostile code may have forged: checked for its shape alone."""
    match answer:
        case [value, list(texts), str()] if value is None or isinstance(value, str):
            return SnippetResult(value=value, texts=tuple(text for text in texts if isinstance(text, str)))
    return SnippetResult()


@cache
def _references(steps: tuple[tuple[str, tuple[tuple[str, str], ...]], ...], sandbox: str) -> tuple[str | None, ...]:
    plain = [AgentStep(task="", inputs=dict(inputs), answers=(code,)) for code, inputs in steps]
    return tuple(result.value for result in run_snippets("robust", [step.answers[0] for step in plain], plain, sandbox))


def references_of(steps: Sequence[AgentStep], sandbox: str) -> list[tuple[str | None, ...]]:
    """What the reference code of each step gives, each alternative in an interpreter of its own."""
    num = max(len(step.answers) for step in steps)
    found = []
    for i in range(num):
        code = tuple((step.answers[min(i, len(step.answers) - 1)], tuple(step.inputs.items())) for step in steps)
        found.append(_references(code, sandbox))
    return [tuple(column[: len(step.answers)]) for column, step in zip(zip(*found), steps)]


# --- scores ----------------------------------------------------------------------------------------------------------


def score_step(
    explanation: str,
    code: str,
    step: AgentStep,
    references: Sequence[str | None],
    result: SnippetResult,
    *,
    suffix: str = "",
) -> dict[str, float]:
    """The three official scores of one step by one reading; the official one looks at no variables for the answer."""
    due = tools_due(step, references, result.value)
    return {
        f"tool_selection{suffix}": tools_score({name for name in tool_names() if f"`{name}`" in explanation}, due),
        f"tool_used{suffix}": tools_score({name for name in tool_names() if name in code}, due),
        f"code{suffix}": code_score(SnippetResult(value=result.value) if suffix else result, references),
    }


@cache
def tool_names() -> tuple[str, ...]:
    return tuple(TOOLS)


def tools_due(step: AgentStep, references: Sequence[str | None], value: str | None) -> set[str]:
    """The tools of the reference that the result equals, of the first one where it equals none."""
    at = references.index(value) if value is not None and value in references else 0
    return {name for name in tool_names() if re.search(rf"\b{name}\b", step.answers[at])}


def tools_score(named: set[str], due: set[str]) -> float:
    return max(0.0, 1.0 - PENALTY * len(named ^ due))


def code_score(result: SnippetResult, references: Sequence[str | None]) -> float:
    if result.value is not None and result.value in references:
        return 1.0
    return IN_STATE if any(text in references for text in result.texts) else WRONG
