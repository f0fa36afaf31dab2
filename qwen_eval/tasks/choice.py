"""What the multiple-choice exams share: rows by subject, base form by letter logits, chat form by generation, averages.

A row may have any number of options: its columns A, B, C ... as far as they go.

Base form (the official protocol of base models): 5 shots, the letter whose logit at the last position is highest.
Chat form (of chat models): no shots, the letter is read out of the reply.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from qwen_eval.config import TaskSpec
from qwen_eval.core import (
    JSON,
    ChoiceLogprobs,
    Choose,
    Completions,
    ConfigError,
    DataError,
    Generate,
    Grade,
    Metric,
    Prompt,
    Record,
    Request,
    Sample,
    Turn,
)
from qwen_eval.data.rows import TableRow
from qwen_eval.data.sources import nearest
from qwen_eval.extraction.letters import concluded_letter
from qwen_eval.extraction.symptoms import flags
from qwen_eval.metrics import macro, share
from qwen_eval.tasks.benchmark import Benchmark
from qwen_eval.tasks.prompts import ShotFormat, chat_shots, few_shot, option_letters
from qwen_eval.tasks.registry import TaskContext

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

LETTERS = ("A", "B", "C", "D")  # the columns of the exams' files
OFFICIAL = -1  # shots
MAX_SHOTS = 5  # the dev split of each exam has five rows a subject

NAMED = 5  # rows named in a note

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ChoiceSpec(TaskSpec):
    """`shots=-1`: the official number, 5 in base form and 0 in chat form, where shots are earlier turns."""

    split: str = "test"
    shots: int = OFFICIAL


class ChoiceTask(Benchmark[ChoiceSpec]):
    """One exam: subclasses are its tables (subjects, categories, templates) and how its rows are read."""

    version: ClassVar[int] = 2
    splits: ClassVar[tuple[str, ...]] = ("test",)
    categories: ClassVar[Mapping[str, tuple[str, ...]]]  # of subjects; they may overlap
    average: ClassVar[Literal["micro", "macro"]]
    base_format: ClassVar[ShotFormat]
    chat_template: ClassVar[str]
    letter_prefix: ClassVar[str] = ""  # " " where the base prompt ends in ":" and the letter is a word of its own
    max_prompt_tokens: ClassVar[int | None] = None  # the official script's cut; nothing is cut otherwise

    def __init__(self, spec: ChoiceSpec, context: TaskContext):
        super().__init__(spec, context)
        self._check()
        if spec.sampling != "task" and not self.is_chat:
            raise ConfigError(f"task.sampling={spec.sampling}: base models are asked for letters, which are not drawn")
        assert self.source  # a wrong path is said before a model is loaded

    def _check(self) -> None:
        if self.spec.split not in self.splits:
            raise ConfigError(f"task.split={self.spec.split}: {self.name} is scored on {' or '.join(self.splits)}")
        if not OFFICIAL <= self.spec.shots <= MAX_SHOTS:
            raise ConfigError(f"task.shots={self.spec.shots}: 0 to {MAX_SHOTS}, or {OFFICIAL} for the official number")
        for name in self.spec.subjects:
            self._named(name)

    @property
    def shots(self) -> int:
        if self.spec.shots != OFFICIAL:
            return self.spec.shots
        return 0 if self.is_chat else MAX_SHOTS

    # --- rows ---

    @classmethod
    def all_subjects(cls) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s for subjects in cls.categories.values() for s in subjects))

    @abstractmethod
    def candidates(self, subject: str, split: str) -> tuple[str, ...]:
        """Names under which the official releases keep a subject's csv."""

    @abstractmethod
    def read(self, subject: str, split: str) -> list[TableRow]:
        """Rows with the cells question, A, B, C, D and, where the split has them, answer and id."""

    @abstractmethod
    def official_letter(self, reply: str, row: Mapping[str, str]) -> str:
        """The letter that the official chat script reads out of a reply."""

    @cached_property
    def subjects(self) -> tuple[str, ...]:
        """Those asked for, or all whose rows are there."""
        known = self.all_subjects()
        if self.spec.subjects:
            return tuple(dict.fromkeys(s for name in self.spec.subjects for s in self._named(name)))
        if self.source.is_hub:
            return known
        found = tuple(s for s in known if self.source.has(*self.candidates(s, self.spec.split)))
        if not found:
            example = self.candidates(known[0], self.spec.split)[0]
            raise DataError(
                f"{self.source.origin}: no subject of {self.name} there, such as {example}; {self.source.how}"
            )
        if len(found) < len(known) and not self.source.is_bundled:
            logger.warning("%s: %d of %d subjects are there", self.source.origin, len(found), len(known))
        return found

    def _named(self, name: str) -> tuple[str, ...]:
        """The subjects of a category, or the one subject of this name."""
        if name in self.categories:
            return self.categories[name]
        known = self.all_subjects()
        if name not in known:
            raise ConfigError(
                f"task.subjects={name}: not a subject of {self.name}{nearest(name, (*known, *self.categories))}"
            )
        return (name,)

    @cached_property
    def _rows(self) -> dict[str, list[TableRow]]:
        return {subject: self._checked(self.read(subject, self.spec.split)) for subject in self.subjects}

    @cached_property
    def _shots(self) -> dict[str, list[TableRow]]:
        """The first dev rows of every subject, in order."""
        n = self.shots
        if n == 0:
            return {subject: [] for subject in self.subjects}
        shots = {subject: self._checked(self.read(subject, "dev")) for subject in self.subjects}
        for subject, rows in shots.items():
            if len(rows) < n:
                raise DataError(f"{self.source.origin}: {len(rows)} dev rows of {subject}, {n} shots asked for")
            if any("answer" not in row.cells for row in rows[:n]):
                raise DataError(f"{self.source.origin}: the dev rows of {subject} have no answers")
        return {subject: rows[:n] for subject, rows in shots.items()}

    def _checked(self, rows: list[TableRow]) -> list[TableRow]:
        for row in rows:
            letters = option_letters(row.cells)
            if (answer := row.cells.get("answer", LETTERS[0])) not in letters:
                raise DataError(
                    f"{self.source.origin} {row.where}: answer {answer!r}, one of {', '.join(letters)} expected"
                )
        return rows

    @cached_property
    def _samples(self) -> list[Sample]:
        """A question that occurs twice is one draw: its samples carry the id of the first one as their cluster."""
        asked: dict[tuple[str, ...], list[str]] = defaultdict(list)
        rows = {f"{subject}/{i}": (subject, row) for subject, rows in self._rows.items() for i, row in enumerate(rows)}
        for name, (_, row) in rows.items():
            asked[_question(row.cells)].append(name)
        clusters = {name: names[0] for names in asked.values() if len(names) > 1 for name in names}
        return [
            Sample(
                id=name, group=subject, cluster=clusters.get(name, ""), data=row.cells, target=row.cells.get("answer")
            )
            for name, (subject, row) in rows.items()
        ]

    @property
    def notes(self) -> list[str]:
        """Rows whose gold text appears at two letters: both would be right, but only one counts."""
        twice = [s.id for s in self.samples() if s.target is not None and _has_gold_twice(s.data, s.target)]
        if not twice:
            return []
        named = ", ".join(twice[:NAMED]) + (f" and {len(twice) - NAMED} more" if len(twice) > NAMED else "")
        return [f"{len(twice)} of {len(self.samples())} rows have the text of the right option at two letters: {named}"]

    def samples(self) -> Sequence[Sample]:
        return self._samples

    # --- asking ---

    def request(self, sample: Sample, turns: Sequence[Turn]) -> Request | None:
        if turns:
            return None
        shots = [row.cells for row in self._shots[sample.group]]
        if self.is_chat:
            prompt = chat_shots(self.chat_template, shots, sample.data)
            sampling = self.context.sampling(self.spec)
            return Generate(prompt=prompt, max_new_tokens=self.reply_tokens, sampling=sampling)
        head = {"subject": sample.group.replace("_", " ")}
        return Choose(
            # Upstream tokenises raw text with special tokens allowed, so a question that shows one becomes one.
            prompt=Prompt.raw(
                few_shot(self.base_format, shots, sample.data, head=head), parse_special=self.is_upstream
            ),
            choices=tuple(self.letter_prefix + letter for letter in option_letters(sample.data)),
            max_prompt_tokens=self.max_prompt_tokens if self.is_upstream else None,
        )

    # --- grading ---

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        answer, letters = turns[0].answer, option_letters(sample.data)
        if isinstance(answer, ChoiceLogprobs):
            values = letter_values(answer, letters)
            letter = letters[answer.best] if answer.is_decided else None
            symptoms: tuple[str, ...] = () if answer.is_decided else ("no_answer",)
            official = official_letter(answer, letters)
            return self._grade(sample, letter, official, values=values, symptoms=symptoms)
        assert isinstance(answer, Completions), answer
        letter = concluded_letter(answer.text, [sample.data[x] for x in letters], letters="".join(letters))
        official = self.official_letter(answer.text, sample.data)
        symptoms = flags(answer.completions[0], has_answer=letter is not None)
        return self._grade(sample, letter, official, symptoms=symptoms)

    def _grade(
        self,
        sample: Sample,
        letter: str | None,
        official: str,
        *,
        values: Mapping[str, JSON] | None = None,
        symptoms: tuple[str, ...] = (),
    ) -> Grade:
        is_graded = sample.target is not None
        robust, upstream = float(letter == sample.target), float(official == sample.target)
        return Grade(
            score=robust if is_graded else None,
            extracted=letter,
            extracted_upstream=official,
            score_upstream=upstream if is_graded else None,
            values=dict(values or {}) | ({} if is_graded else {"id": sample.data.get("id")}),
            flags=symptoms,
        )

    def chosen(self, grade: Grade) -> JSON:
        """The letter under the protocol in force."""
        return grade.extracted_upstream if self.is_upstream else grade.extracted

    # --- averages ---

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        """ "accuracy" and "accuracy/<category>" averaged as the exam's authors do, then "accuracy/<subject>"."""
        records = list(records)
        scores: dict[str, list[float]] = defaultdict(list)
        upstream: dict[str, list[float]] = defaultdict(list)
        draws: dict[str, list[Hashable]] = defaultdict(list)
        for record in records:
            if record.grade.score is not None:
                scores[record.group].append(record.grade.score)
                upstream[record.group].append(record.grade.score_upstream or 0.0)
                draws[record.group].append(record.cluster or record.sample_id)
        if not scores:  # the split has no answers
            return {"answered": Metric(value=float(len(records)), n=len(records), kind="count")}
        metrics = {"accuracy": self.averaged(scores, draws)}
        if not self.is_upstream:
            metrics["accuracy_upstream"] = self.averaged(upstream, draws)
        for category, subjects in self.categories.items():
            part = {s: scores[s] for s in subjects if s in scores}
            if part:
                metrics[f"accuracy/{category}"] = self.averaged(part, draws)
        metrics |= {f"accuracy/{s}": _share(scores[s], draws[s]) for s in self.all_subjects() if s in scores}
        masses = {i: r.grade.values["mass"] for i, r in enumerate(records) if "mass" in r.grade.values}
        if masses:
            metrics["letter_mass"] = _share(
                list(masses.values()), [records[i].cluster or records[i].sample_id for i in masses]
            )
        return metrics

    def averaged(self, scores: Mapping[str, Sequence[float]], draws: Mapping[str, Sequence[Hashable]]) -> Metric:
        """Micro: every question counts the same. Macro: every subject does. `draws` name what was drawn as one."""
        if self.average == "macro":
            return macro(scores, {subject: draws[subject] for subject in scores})
        return _share([score for s in scores for score in scores[s]], [draw for s in scores for draw in draws[s]])

    def describe(self) -> Mapping[str, JSON]:
        num_samples = len(self.samples())
        shots = self._shots  # read before the digest is taken
        facts: dict[str, JSON] = {
            "split": self.spec.split,
            "shots": self.shots,
            "format": self.form,
            "average": self.average,
            "num_samples": num_samples,
            "num_subjects": len(shots),
            "num_subjects_official": len(self.all_subjects()),
            **super().describe(),
        }
        return facts | {"max_new_tokens": self.spec.max_new_tokens} if self.is_chat else facts


def _question(row: Mapping[str, str]) -> tuple[str, ...]:
    """What makes two rows the same question: its words and its options in their order."""
    return " ".join(row["question"].split()), *(" ".join(row[letter].split()) for letter in option_letters(row))


def _has_gold_twice(row: Mapping[str, str], target: str) -> bool:
    gold = row[target].strip()
    return sum(row[letter].strip() == gold for letter in option_letters(row)) > 1


def _share(scores: Sequence[float], draws: Sequence[Hashable]) -> Metric:
    """Of independent questions, where none occurs twice."""
    return share(scores, draws if len(set(draws)) < len(draws) else None)


# --- reading letter logits -----------------------------------------------------------------------------------------


def letter_values(answer: ChoiceLogprobs, letters: Sequence[str] = LETTERS) -> dict[str, JSON]:
    """`p`: probability of each letter among the letters (sums to 1); `mass`: share of the vocabulary they hold.

    `official_prob` are the numbers the official scripts write: near 0.25, because they are softmaxed twice.
    """
    assert len(letters) == len(answer.logprobs), (letters, answer.logprobs)
    top = max(answer.logprobs)
    weights = [math.exp(x - top) for x in answer.logprobs]
    return {
        "p": {letter: weight / sum(weights) for letter, weight in zip(letters, weights)},
        "mass": math.fsum(math.exp(x) for x in answer.logprobs),
        "official_prob": official_probs(answer),
    }


def official_probs(answer: ChoiceLogprobs) -> list[float]:
    """Softmax over the vocabulary, then a second one over the letters' probabilities, each rounded to the dtype of the
    logits, as the scripts do: in bf16 many letters are equally likely then."""
    import numpy

    probs = _rounded(numpy.exp(numpy.asarray(answer.logprobs, dtype=numpy.float32)), answer.dtype)
    again = numpy.exp(probs - probs.max())
    return [float(p) for p in _rounded(again / again.sum(dtype=numpy.float32), answer.dtype)]


def _rounded(values: NDArray[float32], dtype: str) -> NDArray[float32]:
    """To the nearest number of that dtype, of two equally near ones the even one."""
    if dtype == "float16":
        return values.astype("float16").astype("float32")
    if dtype == "bfloat16":  # the upper half of an fp32 number
        bits = values.view("uint32")
        rounded: NDArray[float32] = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype("uint32").view("float32")
        return rounded
    return values


def official_letter(answer: ChoiceLogprobs, letters: Sequence[str] = LETTERS) -> str:
    """The first of the highest official probabilities: where the letters hold next to no mass, that is "A"."""
    probs = official_probs(answer)
    return letters[probs.index(max(probs))]
