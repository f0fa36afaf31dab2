"""Benchmarks of the user: a class of a few lines says which questions there are. See docs/own_task.md.

Rows in a file need no class: `tasks/rows.py`.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from string import ascii_uppercase
from typing import ClassVar, Literal

from qwen_eval.config import MISSING, TaskSpec, not_one_of
from qwen_eval.core import (
    JSON,
    ChoiceLogprobs,
    Choose,
    ConfigError,
    DataError,
    Generate,
    Grade,
    Message,
    Metric,
    Prompt,
    Record,
    Request,
    Sample,
    Turn,
)
from qwen_eval.data.sources import nearest
from qwen_eval.extraction.letters import concluded_letter
from qwen_eval.extraction.numbers import concluded_number, written
from qwen_eval.extraction.symptoms import answer_part, completions_of, flags
from qwen_eval.metrics import mean, share
from qwen_eval.tasks.benchmark import Benchmark
from qwen_eval.tasks.choice import letter_values
from qwen_eval.tasks.prompts import MMLU_BASE, MMLU_CHAT, option_letters
from qwen_eval.tasks.registry import TaskContext

MATCHES = ("exact", "contains", "number")
FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Question:
    """`answer` is the text or the letter of the right option; for a generated text, what it must match.

    `group` is scored apart; `data` holds further columns that a template may name.
    """

    question: str
    answer: str | Sequence[str]
    options: Sequence[str] = ()
    group: str = ""
    data: Mapping[str, JSON] = field(default_factory=dict)
    where: str = ""  # for messages: "rows.csv line 3"


@dataclass(kw_only=True)
class OwnSpec(TaskSpec):
    template: str | None = None  # "Question: {question}\nAnswer:"; {name} is a column of the row
    max_new_tokens: int = 256
    match: str | None = None  # generated texts: exact | contains | number; None: as the class says
    stop: list[str] = field(default_factory=list)  # further strings that end a generated text


class OwnTask(Benchmark[OwnSpec]):
    """`questions` in their order. The first `task.shots` of them are worked examples and are not scored."""

    Spec = OwnSpec
    average: ClassVar[Literal["micro"]] = "micro"
    template: ClassVar[str]  # of base form
    chat_template: ClassVar[str]

    def __init__(self, spec: OwnSpec, context: TaskContext):
        super().__init__(spec, context)
        if self.is_upstream:
            raise ConfigError(f"protocol=upstream: {self.name} has no official script; leave protocol= out")
        if spec.shots < 0:
            raise ConfigError(f"task.shots={spec.shots}: {self.name} has no official number; at least 0")

    @abstractmethod
    def questions(self) -> Iterable[Question]:
        """All of them, in the same order each time."""

    @abstractmethod
    def sample(self, number: int, question: Question) -> Sample: ...

    @cached_property
    def _all(self) -> list[Sample]:
        samples = [self.sample(number, question) for number, question in enumerate(self.questions())]
        if len(samples) <= self.spec.shots:
            raise DataError(
                f"{self.name}: {len(samples)} questions and task.shots={self.spec.shots}: none is left to ask"
            )
        return samples

    def samples(self) -> Sequence[Sample]:
        samples = self._all[self.spec.shots :]
        groups = sorted({sample.group for sample in samples})
        for subject in self.spec.subjects:
            if subject not in groups:
                raise ConfigError(f"task.subjects={subject}: not in {self.name}{nearest(subject, groups)}")
        wanted = set(self.spec.subjects or groups)
        return [sample for sample in samples if sample.group in wanted]

    # --- asking ---

    def worded(self, sample: Sample) -> str:
        """The template of this form with the columns of the row."""
        own = None if self.spec.template is None else self.spec.template.replace("\\n", "\n")
        template = own if own is not None else self.chat_template if self.is_chat else self.template
        return filled(template, _shown(sample.data), sample.id)

    def prompt(self, sample: Sample) -> Prompt:
        """The question behind the worked examples: one text in base form, earlier turns in a chat."""
        shots = self._all[: self.spec.shots]
        if not self.is_chat:
            examples = "".join(f"{self.worded(shot)} {shown_answer(shot)}\n\n" for shot in shots)
            return Prompt.raw(examples + self.worded(sample))
        messages: list[Message] = []
        for shot in shots:
            messages.append(Message(role="user", content=self.worded(shot)))
            messages.append(Message(role="assistant", content=shown_answer(shot)))
        return Prompt(messages=(*messages, Message(role="user", content=self.worded(sample))))

    def generate(self, sample: Sample, stop: Sequence[str]) -> Generate:
        sampling = self.context.sampling(self.spec)
        return Generate(
            prompt=self.prompt(sample), max_new_tokens=self.reply_tokens, stop=tuple(stop), sampling=sampling
        )

    # --- reporting ---

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        """ "accuracy" over all questions, then "accuracy/<group>" where there are several groups."""
        records = list(records)
        groups: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            groups[record.group].append(record)
        metrics = {"accuracy": _score(records)}
        if len(groups) > 1:
            metrics |= {f"accuracy/{group}": _score(part) for group, part in groups.items()}
        masses = [record.grade.values["mass"] for record in records if "mass" in record.grade.values]
        return metrics | ({"letter_mass": share(masses)} if masses else {})

    def describe(self) -> Mapping[str, JSON]:
        num_samples = len(self.samples())  # read before the digest is taken
        data = super().describe() if self.spec.path is not None else {"version": self.version}
        return {"shots": self.spec.shots, "format": self.form, "num_samples": num_samples, **data}


class OwnChoice(OwnTask):
    """Questions with options. Base models: the likeliest letter; chat models: the letter read out of the reply."""

    template = MMLU_BASE.query
    chat_template = MMLU_CHAT

    def sample(self, number: int, question: Question) -> Sample:
        letters = ascii_uppercase[: len(question.options)]
        where = question.where or f"{self.name}: question {number}"
        if not 2 <= len(question.options) <= len(ascii_uppercase):
            raise DataError(f"{where}: {len(question.options)} options; 2 to {len(ascii_uppercase)} expected")
        options = dict(zip(letters, map(str, question.options)))
        data = {**question.data, "question": question.question, **options}
        target = right_letter(str(question.answer), options, where)
        return Sample(id=str(number), group=question.group, data=data, target=target)

    def request(self, sample: Sample, turns: Sequence[Turn]) -> Request | None:
        if turns:
            return None
        if self.is_chat:
            return self.generate(sample, self.spec.stop)
        prompt = self.prompt(sample)
        before = " " if str(prompt.text).endswith(":") else ""  # the letter is a word of its own
        return Choose(prompt=prompt, choices=tuple(before + letter for letter in option_letters(sample.data)))

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        answer, letters = turns[0].answer, option_letters(sample.data)
        if isinstance(answer, ChoiceLogprobs):
            letter = letters[answer.best]
            return Grade(score=float(letter == sample.target), extracted=letter, values=letter_values(answer, letters))
        completion = completions_of(turns[0])[0]
        read = concluded_letter(completion.text, [sample.data[x] for x in letters], letters="".join(letters))
        symptoms = flags(completion, has_answer=read is not None)
        return Grade(score=float(read == sample.target), extracted=read, flags=symptoms)


class OwnGenerative(OwnTask):
    """Questions answered by a text. Override `score` where none of the three ways to match is right."""

    template = "{question}"
    chat_template = "{question}"
    match: ClassVar[str] = "exact"
    stop: ClassVar[Sequence[str]] = ("\n",)  # ends the answer of a base model

    def __init__(self, spec: OwnSpec, context: TaskContext):
        super().__init__(spec, context)
        if self.matching not in MATCHES:
            raise not_one_of("task.match", self.matching, MATCHES)

    @property
    def matching(self) -> str:
        return self.spec.match or self.match

    def score(self, reply: str, answer: str) -> float:
        """1.0 for right, 0.0 for wrong; `answer` is each right answer in turn, and the best score counts."""
        return float(matches(self.matching, reply, answer))

    def sample(self, number: int, question: Question) -> Sample:
        answers = [question.answer] if isinstance(question.answer, str) else list(question.answer)
        if not answers:
            raise DataError(f"{question.where or f'{self.name}: question {number}'}: no right answer")
        data = {**question.data, "question": question.question}
        return Sample(id=str(number), group=question.group, data=data, target=answers)

    def request(self, sample: Sample, turns: Sequence[Turn]) -> Request | None:
        stop = () if self.is_chat else self.stop
        return None if turns else self.generate(sample, (*stop, *self.spec.stop))

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        completion = completions_of(turns[0])[0]
        reply = answer_part(completion.text).strip()
        read = written(concluded_number(reply)) if self.matching == "number" else reply
        best = max(float(self.score(reply, str(answer))) for answer in sample.target)
        return Grade(score=best, extracted=read, flags=flags(completion, has_answer=bool(read)))


# --- words -----------------------------------------------------------------------------------------------------------


def filled(template: str, cells: Mapping[str, JSON], where: str) -> str:
    """`{name}` becomes that cell; braces around anything else, and braces inside cells, are text."""

    def cell(found: re.Match[str]) -> str:
        value = cells.get(found[1], MISSING)
        if found[1] not in cells or value is None:
            raise DataError(f"sample {where}: the template names {{{found[1]}}}; the row has {', '.join(cells)}")
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return FIELD.sub(cell, template)


def _shown(data: Mapping[str, JSON]) -> dict[str, JSON]:
    letters = option_letters(data)
    if not letters:
        return dict(data)
    named = ", ".join(letters[:-1]) + " and " + letters[-1] if len(letters) > 1 else letters[0]
    return {**data, "options": "".join(f"{letter}. {data[letter]}\n" for letter in letters), "letters": named}


def shown_answer(sample: Sample) -> str:
    """The answer of a worked example."""
    return sample.target if isinstance(sample.target, str) else str(sample.target[0])


def right_letter(answer: str, options: Mapping[str, str], where: str) -> str:
    """The letter of the right option, given as a letter or as its text; DataError where that is none or not one."""
    named = {letter for letter, text in options.items() if text.strip() == answer.strip()}
    named |= {answer} & set(options)
    if len(named) != 1:
        what = "names two options" if named else "is no option"
        raise DataError(f"{where}: answer {answer!r} {what}; give a letter ({', '.join(options)}) or the option's text")
    return named.pop()


def matches(how: str, reply: str, answer: str) -> bool:
    """Exact and contained texts are compared without regard to case and to runs of spaces."""
    if how == "number":
        number = concluded_number(reply)
        return number is not None and number == concluded_number(answer)
    said, wanted = (" ".join(text.split()).casefold() for text in (reply, answer))
    return wanted in said if how == "contains" else said == wanted


def _score(records: Sequence[Record]) -> Metric:
    """A share where every score lies in 0..1, as those of right and wrong do; else a mean."""
    scores = [record.grade.score for record in records]
    return share(scores) if all(0 <= (score or 0.0) <= 1 for score in scores) else mean(scores)
