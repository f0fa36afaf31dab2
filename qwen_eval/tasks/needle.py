"""Needle in a haystack: a number hidden in a long text, asked for at its end. A grid of lengths and depths.

The number may appear anywhere in the reply (lenient, the score) or must be its beginning (strict).
"Effective length" is the longest at which, and below which, at least 85 % are found (https://arxiv.org/abs/2404.06654).
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qwen_eval.config import TaskSpec, not_one_of
from qwen_eval.core import JSON, ConfigError, DataError, Generate, Grade, Metric, Prompt, Record, Request, Sample, Turn
from qwen_eval.data.exercises import CITIES, CITIES_ZH
from qwen_eval.extraction.symptoms import answer_part, completions_of, flags
from qwen_eval.figures import heat_map
from qwen_eval.metrics import share
from qwen_eval.tasks.benchmark import Benchmark
from qwen_eval.tasks.documents import read_documents
from qwen_eval.tasks.haystack import Buried, Frame, base_frame, bury, chat_frame
from qwen_eval.tasks.registry import TaskContext

FOUND_SHARE = 0.85  # RULER's threshold of an effective length
AUTO_FACTORS = (0.5, 1, 2, 4, 8)
AUTO_LONGEST = 32768
TRAIN_LENGTH = 2048  # where an engine does not say
STOPS = ("\n\n", "Question:", "问题：")


@dataclass(frozen=True, kw_only=True)
class Wording:
    """`needle` holds {city} and {number}; `question` and `questions` (of several) hold {city}."""

    needle: str
    question: str
    questions: str
    base: str  # how a base model is asked; holds {question}
    cities: Sequence[str]
    joints: tuple[str, str]  # between the items of a list, before its last item


WORDINGS = {
    "en": Wording(
        needle=" The special magic number of {city} is {number}.",
        question="What is the special magic number of {city}?",
        questions="What are the special magic numbers of {city}?",
        base="\n\nQuestion: {question}\nAnswer:",
        cities=CITIES,
        joints=(", ", " and "),
    ),
    "zh": Wording(
        needle="{city}的神奇数字是{number}。",
        question="{city}的神奇数字是多少？",
        questions="{city}的神奇数字分别是多少？",
        base="\n\n问题：{question}\n答案：",
        cities=CITIES_ZH,
        joints=("、", "和"),
    ),
}


@dataclass(kw_only=True)
class NeedleSpec(TaskSpec):
    """`lengths` empty: half to eight times the training length, at most 32,768. Prompts have exactly these lengths."""

    name: str = "needle"
    lengths: list[int] = field(default_factory=list)
    depths: list[float] = field(default_factory=lambda: [0.0, 20.0, 40.0, 60.0, 80.0, 100.0])  # per cent
    languages: list[str] = field(default_factory=lambda: ["en", "zh"])
    per_cell: int = 2  # different needles of one language in each cell
    num_needles: int = 1  # in one prompt: all are asked for, the score is the share found
    digits: int = 7
    needle: str | None = None  # another sentence, with {number} and {city}
    question: str | None = None  # another question, with {city}
    max_new_tokens: int = 48
    text_key: str = "text"


class Needle(Benchmark[NeedleSpec]):
    Spec = NeedleSpec
    version = 2
    bundled = "haystack"

    def __init__(self, spec: NeedleSpec, context: TaskContext):
        self.tokenizer = context.required_tokenizer(spec.name, ", so no prompt of an exact length can be made")
        super().__init__(spec, context)
        _check(spec)
        train_length = context.model_facts.get("train_length") or TRAIN_LENGTH
        auto = [n for n in (int(train_length * factor) for factor in AUTO_FACTORS) if n <= AUTO_LONGEST]
        self.lengths = sorted(set(spec.lengths)) or auto or [AUTO_LONGEST]

    # --- the grid ---

    @cached_property
    def haystacks(self) -> dict[str, list[int]]:
        """Language -> token ids. A file named after a language (en.txt) is for it alone, others are for all."""
        documents = read_documents(self.source, text_key=self.spec.text_key, split=self.spec.split)
        texts: dict[str, str] = {}
        for language in self.spec.languages:
            own = [d.text for d in documents if d.id.split("#")[0].rpartition("/")[2].startswith(f"{language}.")]
            shared = [d.text for d in documents if not _is_named(d.id)]
            texts[language] = "\n\n".join(own or shared)
            if not texts[language].strip():
                raise DataError(
                    f"{self.source.origin}: no haystack for {language}; add {language}.txt or leave it out of "
                    "task.languages"
                )
        return {language: self.tokenizer.encode(text) for language, text in texts.items()}

    @cached_property
    def _samples(self) -> list[Sample]:
        spec = self.spec
        return [
            self._sample(length, float(depth), language, i)
            for length in self.lengths
            for depth in sorted(set(spec.depths))
            for language in spec.languages
            for i in range(spec.per_cell)
        ]

    def samples(self) -> Sequence[Sample]:
        assert self.haystacks, "checked before anything is asked"
        return self._samples

    def _sample(self, length: int, depth: float, language: str, i: int) -> Sample:
        """Cities and numbers depend on the cell and the seed alone."""
        spec = self.spec
        name = f"{length}@{depth:g}/{language}/{i}"
        draw = random.Random(f"{spec.seed}/{name}")
        cities = draw.sample(list(WORDINGS[language].cities), spec.num_needles)
        keys = [str(draw.randrange(10 ** (spec.digits - 1), 10**spec.digits)) for _ in cities]
        depths = [depth if n == 0 else (depth + 100 * n / spec.num_needles) % 100 for n in range(spec.num_needles)]
        data = {"length": length, "depths": depths, "language": language, "cities": cities}
        return Sample(id=name, group=f"{length}@{depth:g}", data=data, target=keys)

    # --- asking ---

    def request(self, sample: Sample, turns: Sequence[Turn]) -> Request | None:
        if turns:
            return None
        stop = () if self.is_chat else STOPS
        prompt = Prompt(ids=self.buried(sample).ids)
        limit = self.reply_tokens
        return Generate(prompt=prompt, max_new_tokens=limit, stop=stop, sampling=self.context.sampling(self.spec))

    def buried(self, sample: Sample) -> Buried:
        """The prompt of a cell, with the places of its needles."""
        data = sample.data
        wording = WORDINGS[data["language"]]
        needles = [
            self.tokenizer.encode(_filled(self.spec.needle or wording.needle, city=city, number=key))
            for city, key in zip(data["cities"], sample.target)
        ]
        frame = self._frame(data["language"], tuple(data["cities"]))
        return bury(self.haystacks[data["language"]], needles, data["depths"], frame, data["length"])

    def _frame(self, language: str, cities: tuple[str, ...]) -> Frame:
        wording = WORDINGS[language]
        form = self.spec.question or (wording.question if len(cities) == 1 else wording.questions)
        comma, last = wording.joints
        listed = last.join([comma.join(cities[:-1]), cities[-1]]) if len(cities) > 1 else cities[0]
        question = _filled(form, city=listed)
        if self.is_chat:
            return chat_frame(self.tokenizer, f"\n\n{question}")
        return base_frame(self.tokenizer, _filled(wording.base, question=question))

    # --- grading ---

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        completion = completions_of(turns[0])[0]
        said = answer_part(completion.text)
        found = [key for key in sample.target if says(said, key)]
        numbers = re.findall(r"\d[\d, ]*\d", unicodedata.normalize("NFKC", said))
        buried = self.buried(sample)
        return Grade(
            score=len(found) / len(sample.target),
            extracted=found or numbers[:1],
            values={
                "length": sample.data["length"],
                "depth_percent": sample.data["depths"][0],
                "language": sample.data["language"],
                "starts": list(buried.starts),
                "strict": float(len(found) == len(sample.target) and begins_with(said, sample.target[0])),
            },
            flags=flags(completion, has_answer=bool(numbers)),
        )

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        """`accuracy`, `accuracy/en`, `accuracy/4096`, each cell `accuracy/4096@20`, and the effective length."""
        rows = list(records)
        metrics = {"accuracy": _accuracy(rows), "accuracy_strict": share([r.grade.values["strict"] for r in rows])}
        metrics["effective_length"] = effective_length(_by(rows, "length"))
        metrics |= {f"accuracy/{name}": _accuracy(part) for name, part in _by(rows, "language").items()}
        metrics |= {f"accuracy/{length}": _accuracy(part) for length, part in sorted(_by(rows, "length").items())}
        return metrics | {f"accuracy/{r.group}": _accuracy([x for x in rows if x.group == r.group]) for r in rows}

    def artifacts(self, records: Iterable[Record]) -> dict[str, JSON | str | bytes]:
        """The heat map, with the interval of each cell in its numbers."""
        cells: dict[tuple[int, float], list[Record]] = defaultdict(list)
        for record in records:
            cells[record.grade.values["length"], record.grade.values["depth_percent"]].append(record)
        shares = {cell: _accuracy(rows) for cell, rows in cells.items()}
        return {f"needle.{form}": heat_map(shares, form) for form in ("svg", "png")}

    # --- what is said of it ---

    @property
    def notes(self) -> list[str]:
        longest = self.lengths[-1]
        found = [
            f"the {language} haystack of {len(ids)} tokens is repeated to reach {longest}"
            for language, ids in self.haystacks.items()
            if len(ids) < longest
        ]
        facts = self.context.model_facts
        has_trick = facts.get("dynamic_ntk") or facts.get("logn") or facts.get("windows")
        if facts.get("train_length") and longest > facts["train_length"] and not has_trick:
            found.append(f"lengths beyond {facts['train_length']} tokens, with dynamic NTK, LogN and windows all off")
        return found

    def describe(self) -> Mapping[str, JSON]:
        return {
            "lengths": self.lengths,
            "depths": sorted(set(self.spec.depths)),
            "format": self.form,
            "wording": {
                language: {"needle": self.spec.needle or w.needle, "question": self.spec.question or w.question}
                for language, w in WORDINGS.items()
                if language in self.spec.languages
            },
            "haystack_tokens": {language: len(ids) for language, ids in self.haystacks.items()},
            **super().describe(),
        }


def says(text: str, key: str) -> bool:
    """Whether the text has the digits of `key` as a separate number, also full-width or with commas or spaces.

    >>> says("It is １，２３４，５６７.", "1234567"), says("91234567", "1234567")
    (True, False)
    """
    pattern = rf"(?<!\d){'[ ,]?'.join(key)}(?!\d)"
    return re.search(pattern, unicodedata.normalize("NFKC", text)) is not None


def begins_with(text: str, key: str) -> bool:
    return re.match(rf"\s*{key}(?!\d)", text) is not None


def effective_length(by_length: Mapping[int, Sequence[Record]]) -> Metric:
    """The longest length with at least 85 % found at it and at every shorter one; 0 when already the shortest fails."""
    reached = 0
    for length in sorted(by_length):
        if _accuracy(by_length[length]).value < FOUND_SHARE:
            break
        reached = length
    return Metric(value=reached, n=len(by_length), kind="count", unit="tokens")


def _accuracy(records: Sequence[Record]) -> Metric:
    return share([record.grade.score for record in records])


def _by(records: Sequence[Record], key: str) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.grade.values[key]].append(record)
    return dict(groups)


def _filled(form: str, **values: str) -> str:
    """`{name}` replaced; every other brace stays text."""
    for name, value in values.items():
        form = form.replace(f"{{{name}}}", value)
    return form


def _is_named(document: str) -> bool:
    return any(document.split("#")[0].rpartition("/")[2].startswith(f"{language}.") for language in WORDINGS)


def _check(spec: NeedleSpec) -> None:
    for depth in spec.depths:
        if not 0 <= depth <= 100:
            raise ConfigError(f"task.depths={depth:g}: a depth is a percentage, 0 to 100")
    for language in spec.languages:
        if language not in WORDINGS:
            raise not_one_of("task.languages", language, WORDINGS)
    if not spec.depths or not spec.languages:
        raise ConfigError("task.depths and task.languages: at least one of each")
    most = min(len(WORDINGS[language].cities) for language in spec.languages)
    for key, low, high in (("per_cell", 1, 10**6), ("num_needles", 1, most), ("digits", 1, 12)):
        value = getattr(spec, key)
        if not low <= value <= high:
            raise ConfigError(f"task.{key}={value}: {low} to {high}")
    if spec.needle is not None and "{number}" not in spec.needle:
        raise ConfigError(f"task.needle={spec.needle}: must hold {{number}}, and {{city}} where it is asked for")
    if spec.subjects:
        raise ConfigError("task.subjects: needle has none; choose with task.lengths, task.depths, task.languages")
