"""What qwen-nano reads: rows of running text and rows of exercises, with a loss weight for every token."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from nano import generator, snippets
from nano.texts import Document as Text
from nano.texts import Passages, Texts
from qwen_eval.data import exercises as ex

SYSTEM = "You are a helpful assistant."
# loss weights in quarters: what only sets the scene, running text, what is asked for, its decisive token
PROMPT, PLAIN, ANSWER, DECISIVE = 2, 4, 16, 48
RESULT = re.compile(r"(?<==)( \d+)")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Shares of the tokens, by kind of text and of exercise, and the loss weight of a sum's result."""

    text: dict[str, float]
    exercises: dict[str, float]
    result: int = DECISIVE
    is_ragged: bool = False  # passages of recall that break off and keep line ends, as pieces of a haystack do


# First almost only exercises, dense in what is asked for: the circuits of copying, looking up and naming a letter form
# here or not at all. Then everything.
FIRST = Stage(
    text={"books": 0.04, "poetry": 0.01, "python": 0.01},
    exercises={
        "letters": 0.10, "echo": 0.18, "choice_stated": 0.18, "choice": 0.12, "choice_zh": 0.06, "fact": 0.14,
        "recall": 0.08, "recall_zh": 0.03, "pairs": 0.03, "arithmetic": 0.06, "drill": 0.02,
    },
    result=2 * PLAIN,
)  # fmt: skip
SECOND = Stage(
    text={"books": 0.26, "poetry": 0.13, "prose": 0.05, "latex": 0.01, "python": 0.03},
    exercises={
        "letters": 0.03, "echo": 0.04, "choice_stated": 0.12, "choice_told": 0.05, "fact": 0.04, "arithmetic": 0.07,
        "drill": 0.06, "recall": 0.03, "recall_zh": 0.02, "pairs": 0.005, "chat": 0.04, "tool": 0.005, "function": 0.01,
    },
)  # fmt: skip

# At the end what is soonest forgotten.
LAST = Stage(
    text={"books": 0.26, "poetry": 0.13, "prose": 0.03, "python": 0.03},
    exercises={
        "letters": 0.02, "choice_stated": 0.05, "choice_told": 0.02, "fact": 0.05, "arithmetic": 0.13, "drill": 0.02,
        "recall": 0.07, "recall_zh": 0.15, "chat": 0.03,
    },
    is_ragged=True,
)  # fmt: skip

Segment = tuple[str, int]  # text or the name of a special token, and its weight
Document = list[Segment]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """`tokens` [rows, T + 1] and the `weights` of the same shape: weights[:, i] is that of predicting tokens[:, i]."""

    tokens: Any
    weights: Any


class Writer:
    """Makes exercise documents; the kinds are the keys of `Stage.exercises`."""

    def __init__(
        self, texts: Texts, *, seed: int, heldout: bool = False, result: int = DECISIVE, is_ragged: bool = False
    ) -> None:
        self.result, self.is_ragged = result, is_ragged
        self.rng = random.Random(seed)
        self.source = generator.Source(
            rng=self.rng, heldout=heldout, passage=Passages(texts, heldout=heldout, keeps_lines=is_ragged)
        )

    def write(self, kind: str) -> Document:
        make: Callable[[], Document] = getattr(self, f"_{kind}")
        return make()

    def _choice(self, language: str = "en") -> Document:
        """A few questions in a row, mostly of one topic, as in a few-shot prompt."""
        topic = None
        document: Document = []
        if self.rng.random() < 0.75:
            topic = self.rng.choice(generator.facts()[language])["topic"]
        if language == "en" and self.rng.random() < 0.8:
            document.append((ex.choice_head(topic or "general knowledge"), PROMPT))
        for _ in range(self.rng.choice((1, 3, 6, 6, 6))):
            document += self._solved(self.source.choice(language, topic))
        return document

    def _choice_zh(self) -> Document:
        return self._choice("zh")

    def _choice_stated(self) -> Document:
        language = self.rng.choice(("en", "en", "zh"))
        head = language == "en" and self.rng.random() < 0.8
        document: Document = [(ex.choice_head("what was said"), PROMPT)] if head else []
        exercises = (self.source.choice_stated(language) for _ in range(self.rng.choice((1, 3, 6, 6))))
        return document + [segment for exercise in exercises for segment in self._solved(exercise)]

    def _choice_told(self) -> Document:
        document: Document = [(ex.choice_head("who has what"), PROMPT)]
        for _ in range(self.rng.choice((1, 3, 3))):
            document += self._solved(self.source.choice_told())
        return document

    def _echo(self) -> Document:
        """The question is the right option itself: a choice without the knowledge."""
        language = self.rng.choice(("en", "en", "zh"))
        document: Document = []
        for _ in range(self.rng.choice((3, 5, 6))):
            exercise, letter = self.source.choice(language), self.rng.choice(ex.LETTERS)
            named = exercise.options[ex.LETTERS.index(letter)] + ("?" if language == "en" else "？")
            document += self._solved(replace(exercise, question=named, answer=letter))
        return document

    def _solved(self, exercise: ex.Exercise) -> Document:
        return [(ex.choice_block(exercise), PROMPT), (ex.gold(exercise), DECISIVE), ("\n\n", PROMPT)]

    def _letters(self) -> Document:
        """Options, then the letter of each asked in turn, in the words of a choice."""
        language = self.rng.choice(("en", "en", "zh"))
        document: Document = []
        for _ in range(self.rng.choice((1, 2, 3))):
            exercise = self.source.choice(language)
            rows = "".join(f"{letter}. {option}\n" for letter, option in zip(ex.LETTERS, exercise.options))
            document.append((rows, PROMPT))
            for i in self.rng.sample(range(4), 4):
                asked = ("Question: ", "?\nAnswer:", " ") if language == "en" else ("问题：", "？\n答案：", "")
                document += [
                    (f"{asked[0]}{exercise.options[i]}{asked[1]}", PROMPT),
                    (asked[2] + ex.LETTERS[i], DECISIVE),
                    ("\n", PROMPT),
                ]
            document.append(("\n", PROMPT))
        return document

    def _fact(self) -> Document:
        """Bare questions and their answers in words."""
        language = self.rng.choice(("en", "en", "zh"))
        document: Document = []
        for _ in range(8):
            exercise = self.source.fact(language)
            document += [(ex.question_block(exercise), PROMPT), (ex.gold(exercise), ANSWER), ("\n\n", PROMPT)]
        return document

    def _arithmetic(self) -> Document:
        document: Document = []
        for _ in range(self.rng.choice((1, 2, 4))):
            exercise = self.source.arithmetic()
            document += [(ex.arithmetic_block(exercise), PROMPT), *self._worked(ex.arithmetic_gold(exercise))]
            document.append(("\n\n", PLAIN))
        return document

    def _worked(self, text: str) -> Document:
        """A calculation, and the weight of what stands behind each `=`."""
        return [(part, self.result if i % 2 else 2 * PLAIN) for i, part in enumerate(RESULT.split(text))]

    def _drill(self) -> Document:
        rows = (RESULT.split(self.source.drill())[:2] for _ in range(20))
        return [
            segment for asked, result in rows for segment in ((asked, PROMPT), (result, self.result), ("\n", PROMPT))
        ]

    def _recall(self, language: str = "en") -> Document:
        needles, chars = self.rng.choice(((1, 600), (1, 300), (2, 450), (3, 300), (4, 60)))
        exercise = self.source.recall(language, needles=needles, chars=chars, digits=self.rng.choice((4, 5, 7, 7, 7)))
        if self.is_ragged and self.rng.random() < 0.7:
            begun = self.source.passage(self.rng, language, chars)[: self.rng.randint(1, 40)].rstrip()
            gap = " " if language == "en" else ""
            exercise = replace(exercise, context=f"{exercise.context}{gap}{begun}")
        if self.rng.random() < 0.25:
            return self._as_chat(exercise)
        return [(ex.recall_block(exercise), PROMPT), (ex.gold(exercise), ANSWER), ("\n", PROMPT)]

    def _recall_zh(self) -> Document:
        return self._recall("zh")

    def _pairs(self) -> Document:
        """Keys and values, then the same again in another order: pure copying, dense."""
        digits = self.rng.choice((3, 4, 7))
        pairs = [(c, self.rng.randrange(10 ** (digits - 1), 10**digits)) for c in self.rng.sample(ex.CITIES, 6)]
        told = "".join(f"{city}: {number}\n" for city, number in pairs)
        self.rng.shuffle(pairs)
        document: Document = [(told + "\n", PROMPT)]
        for city, number in pairs:
            document += [(f"{city}:", PROMPT), (f" {number}", 2 * PLAIN), ("\n", PROMPT)]
        return document

    def _chat(self) -> Document:
        """The exercises as a user would ask them, and the bare facts."""
        roll, language = self.rng.random(), self.rng.choice(("en", "en", "zh"))
        if roll < 0.35:
            return self._as_chat(self.source.choice_stated(language))
        if roll < 0.5:
            return self._as_chat(self.source.choice_told())
        if roll < 0.75:
            return self._as_chat(self.source.arithmetic())
        if roll < 0.82:
            signature, doc, body = snippets.function(self.rng)
            prompt = f'{signature}\n    """{doc}"""\n'
            asked = f"Write a Python function `{signature[4:-1]}` to solve the following problem:\n{doc}\n{prompt}"
            return chat(asked, f"```python\n{prompt}{body}```")
        return self._as_chat(self.source.fact(language))

    def _as_chat(self, exercise: ex.Exercise) -> Document:
        return chat(ex.chat_question(exercise), generator.chat_answer(exercise))

    def _tool(self) -> Document:
        question, reply = snippets.tool_choice(self.rng)
        return (
            chat(question, reply, system="")
            if self.rng.random() < 0.5
            else [(question + "\n", PROMPT), (reply, 2 * PLAIN)]
        )

    def _function(self) -> Document:
        document: Document = []
        for _ in range(4):
            signature, doc, body = snippets.function(self.rng)
            document += [(f'{signature}\n    """{doc}"""\n', PLAIN), (f"{body}\n\n", 2 * PLAIN)]
        return document


def chat(user: str, assistant: str, *, system: str = SYSTEM) -> Document:
    """ChatML piece by piece, as Qwen tokenises it. An empty `system` stands for the default one."""
    document: Document = []
    for role, content, weight in (
        ("system", system or SYSTEM, PROMPT),
        ("user", user, PROMPT),
        ("assistant", assistant, ANSWER),
    ):
        document += [("<|im_start|>", PROMPT), (role, PROMPT), ("\n", PROMPT), (content, weight)]
        document += [("<|im_end|>", weight), ("\n", PROMPT)]
    return document[:-1]


def encode(document: Document, vocabulary: tiktoken.Encoding) -> tuple[list[int], list[int]]:
    """Token ids and weights, ended by `<|endoftext|>`."""
    ids: list[int] = []
    weights: list[int] = []
    for text, weight in [*_joined(document), ("<|endoftext|>", PLAIN)]:
        special = text in vocabulary.special_tokens_set
        piece = [vocabulary.encode_single_token(text)] if special else vocabulary.encode_ordinary(text)
        ids += piece
        weights += [weight] * len(piece)
    return ids, weights


def _joined(document: Document) -> Iterator[Segment]:
    yield from (segment for segment in document if segment[0])


# of use even when the end of a row cuts them
CUTTABLE = ("choice", "choice_zh", "choice_stated", "choice_told", "drill")


def exercise_rows(
    writer: Writer, kinds: dict[str, float], vocabulary: tiktoken.Encoding, num_rows: int, length: int
) -> Rows:
    """Rows that begin with a document. What does not fit begins the next row; something cuttable fills this one."""
    tokens = np.zeros((num_rows, length + 1), dtype=np.uint16)
    weights = np.zeros((num_rows, length + 1), dtype=np.uint8)
    fillers = [kind for kind in CUTTABLE if kind in kinds]
    made = dict.fromkeys(kinds, 1)  # tokens so far: documents differ in length, shares are of tokens
    waiting: tuple[list[int], list[int]] | None = None

    def document(names: Sequence[str]) -> tuple[str, list[int], list[int]]:
        kind = max(names, key=lambda name: kinds[name] / made[name] * writer.rng.uniform(0.5, 1.5))
        for _ in range(8):  # one that fits into a row, if this kind has any so short
            ids, marks = encode(writer.write(kind), vocabulary)
            if len(ids) <= length + 1 or kind in CUTTABLE:
                break
        made[kind] += len(ids)
        return kind, ids[: length + 1], marks[: length + 1]

    for row in range(num_rows):
        ids, marks = waiting or document(list(kinds))[1:]
        waiting = None
        while len(ids) <= length:
            kind, more, more_marks = document(list(kinds) if waiting is None else fillers)
            if len(ids) + len(more) <= length + 1 or kind in CUTTABLE:
                ids, marks = ids + more, marks + more_marks
            else:
                waiting = more, more_marks
        tokens[row], weights[row] = ids[: length + 1], marks[: length + 1]
    return Rows(tokens=tokens, weights=weights)


def text_rows(stream: Any, rng: Any, num_rows: int, length: int) -> Rows:
    """Slices of a token stream at random offsets of a shifted grid: nothing is read twice before all is read once."""
    per_pass = (len(stream) - length - 1) // length
    assert per_pass > 0, f"{len(stream)} tokens of text are too few for rows of {length}"
    starts = []
    while len(starts) < num_rows:
        starts += (rng.permutation(per_pass) * length + rng.integers(length)).tolist()
    index = np.array(starts[:num_rows])[:, None] + np.arange(length + 1)
    return Rows(tokens=stream[index], weights=np.full(index.shape, PLAIN, dtype=np.uint8))


def stream_of(texts: list[str], vocabulary: tiktoken.Encoding) -> Any:
    end = vocabulary.encode_single_token("<|endoftext|>")
    pieces = (np.array([*ids, end], dtype=np.uint16) for ids in vocabulary.encode_ordinary_batch(texts, num_threads=1))
    return np.concatenate(list(pieces))


def build(
    texts: Texts,
    vocabulary: tiktoken.Encoding,
    *,
    num_tokens: int,
    first_tokens: int,
    last_tokens: int,
    length: int,
    seed: int,
) -> Rows:
    """The whole training run, in reading order: `first_tokens`, a pool of `num_tokens`, `last_tokens` at the end."""
    first = build_stage(FIRST, texts, vocabulary, num_tokens=first_tokens, length=length, seed=seed)
    second = build_stage(SECOND, texts, vocabulary, num_tokens=num_tokens, length=length, seed=seed + 1)
    last = build_stage(LAST, texts, vocabulary, num_tokens=last_tokens, length=length, seed=seed + 2)
    num_first = first_tokens // length
    return Rows(
        tokens=np.concatenate([first.tokens[:num_first], second.tokens, last.tokens]),
        weights=np.concatenate([first.weights[:num_first], second.weights, last.weights]),
    )


def build_stage(
    stage: Stage, texts: Texts, vocabulary: tiktoken.Encoding, *, num_tokens: int, length: int, seed: int
) -> Rows:
    num_rows = num_tokens // length
    rng = np.random.default_rng(seed)
    shares = {kind: share for kind, share in stage.text.items() if kind in texts.kinds}
    scale = sum(stage.text.values()) / sum(shares.values())
    parts = []
    for kind, share in shares.items():
        needed = int(num_rows * share * scale)
        stream = stream_of(_enough(texts.of(kind), rng, needed * length * 6), vocabulary)
        parts.append(text_rows(stream, rng, needed, length))
    rest = num_rows - sum(len(part.tokens) for part in parts)
    writer = Writer(texts, seed=seed, result=stage.result, is_ragged=stage.is_ragged)
    parts.append(exercise_rows(writer, stage.exercises, vocabulary, rest, length))
    order = rng.permutation(num_rows)
    return Rows(
        tokens=np.concatenate([part.tokens for part in parts])[order],
        weights=np.concatenate([part.weights for part in parts])[order],
    )


def _enough(documents: list[Text], rng: Any, num_chars: int) -> list[str]:
    """Texts in random order, no more than the run can read."""
    chosen, chars = [], 0
    for i in rng.permutation(len(documents)):
        if chars < num_chars:
            chosen.append(documents[i].text)
            chars += len(documents[i].text)
    return chosen


def save(rows: Rows, folder: Path) -> None:
    np.save(folder / "tokens.npy", rows.tokens)
    np.save(folder / "weights.npy", rows.weights)


def load(folder: Path) -> Rows:
    return Rows(
        tokens=np.load(folder / "tokens.npy", mmap_mode="r"), weights=np.load(folder / "weights.npy", mmap_mode="r")
    )
