"""Draws the exercises that qwen-nano is trained on, and its held-out test.

The two never meet: every exercise has a `key`, `is_heldout(key)` says on which side it falls, and
`Source(heldout=...)` only yields its own side. How an exercise is written is `qwen_eval.data.exercises`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwen_eval.data.exercises import CITIES, CITIES_ZH, LETTERS, Exercise, arithmetic_gold

FACTS_FILE = Path(__file__).parents[2] / "qwen_eval" / "assets" / "samples" / "nano" / "facts.json"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("Anna Ben Tom Mary John Lucy Jack Kate Sam Emma Paul Rose Peter Jane Max Nora")
ITEMS = _words("apples books coins cards eggs pens stones shells stamps cakes flowers nuts balls rings keys plums")
THINGS = _words("tea milk bread a_dog a_cat a_hat a_map a_knife a_lamp a_coat a_ring a_drum a_book a_key a_bell a_rope")
NAMES_ZH = _words("小明 小红 小刚 小丽 小华 小芳 小军 小美")
STATED = {  # what a question states, what it then asks, and the words that can stand there
    "en": (
        ("{name} lives in {answer}.", "Where does {name} live?", CITIES),
        ("{name} went to {answer}.", "Where did {name} go?", CITIES),
        ("{name} has {answer}.", "What does {name} have?", tuple(thing.replace("_", " ") for thing in THINGS)),
        ("{name} bought {answer}.", "What did {name} buy?", ITEMS),
    ),
    "zh": (
        ("{name}住在{answer}。", "{name}住在哪里？", CITIES_ZH),
        ("{name}去了{answer}。", "{name}去了哪里？", CITIES_ZH),
    ),
}


HELDOUT_SHARE = 0.1


def share_of(key: str) -> float:
    """A fixed number in [0, 1) for a key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def is_heldout(key: str) -> bool:
    return share_of(key) < HELDOUT_SHARE


@lru_cache(maxsize=1)
def facts() -> dict[str, list[dict[str, Any]]]:
    loaded: dict[str, list[dict[str, Any]]] = json.loads(FACTS_FILE.read_text(encoding="utf-8"))
    return loaded


def heldout_phrasing(topic: str, subject: str, num_phrasings: int) -> int:
    """The one phrasing of a fact that training never shows."""
    return int(share_of(f"phrasing|{topic}|{subject}") * num_phrasings)


@dataclass(kw_only=True)
class Source:
    """A seeded stream of exercises from one side of the split. `passage(rng, language, chars)` cuts haystack text."""

    rng: random.Random
    heldout: bool
    passage: Callable[[random.Random, str, int], str]

    def _until(self, make: Callable[[], Exercise]) -> Exercise:
        while True:
            exercise = make()
            if is_heldout(exercise.key) == self.heldout:
                return exercise

    # --- multiple choice -----------------------------------------------------------------------------------------

    def choice(self, language: str = "en", topic: str | None = None) -> Exercise:
        """A fact of the closed set; the held-out side asks it in the phrasing that training never uses for it."""
        relations = facts()[language]
        if topic is None:
            relation = self.rng.choices(relations, [len(r["pairs"]) for r in relations])[0]
        else:
            relation = next(r for r in relations if r["topic"] == topic)
        subject, right = self.rng.choice(relation["pairs"])
        phrasings = relation["phrasings"]
        hidden = heldout_phrasing(relation["topic"], subject, len(phrasings))
        allowed = [hidden] if self.heldout else [i for i in range(len(phrasings)) if i != hidden]
        question = phrasings[self.rng.choice(allowed)].format(s=subject)
        wrong = sorted({answer for _, answer in relation["pairs"]} - {right, subject})
        options = [right, *self.rng.sample(wrong, 3)]
        self.rng.shuffle(options)
        return Exercise(
            kind="choice", topic=relation["topic"], language=language, key=f"choice|{relation['topic']}|{question}",
            question=question, options=tuple(options), answer=LETTERS[options.index(right)],
        )  # fmt: skip

    def fact(self, language: str = "en") -> Exercise:
        """A fact of the closed set, asked without options; the answer in words."""
        exercise = self.choice(language)
        right = exercise.options[LETTERS.index(exercise.answer)]
        return replace(exercise, kind="fact", key=f"fact|{exercise.question}", options=(), answer=right)

    def choice_stated(self, language: str = "en") -> Exercise:
        """The fact is stated in the question, and no other option is named there."""
        return self._until(lambda: self._choice_stated(language))

    def _choice_stated(self, language: str) -> Exercise:
        statement, asked, words = self.rng.choice(STATED[language])
        name = self.rng.choice(NAMES if language == "en" else NAMES_ZH)
        options = self.rng.sample(words, 4)
        right = self.rng.choice(options)
        told, gap = statement.format(name=name, answer=right), " " if language == "en" else ""
        return Exercise(
            kind="choice", topic="what was said" if language == "en" else "说过的话", language=language,
            key=f"stated|{told}", question=told + gap + asked.format(name=name), options=tuple(options),
            answer=LETTERS[options.index(right)],
        )  # fmt: skip

    def choice_told(self) -> Exercise:
        """The question tells four facts and asks for one: who has what."""
        return self._until(self._choice_told)

    def _choice_told(self) -> Exercise:
        names, things = self.rng.sample(NAMES, 4), self.rng.sample(ITEMS, 4)
        told = " ".join(f"{name} has {thing}." for name, thing in zip(names, things))
        asked = self.rng.randrange(4)
        options = list(names)
        self.rng.shuffle(options)
        question = f"{told} Who has {things[asked]}?"
        return Exercise(
            kind="choice", topic="who has what", key=f"context|{told}", question=question, options=tuple(options),
            answer=LETTERS[options.index(names[asked])],
        )  # fmt: skip

    # --- arithmetic ----------------------------------------------------------------------------------------------

    def arithmetic(self, steps: int | None = None) -> Exercise:
        steps = steps or self.rng.choice((1, 1, 2))
        return self._until(self._one_step if steps == 1 else self._two_steps)

    def sum_or_difference(self) -> tuple[str, int, int, int]:
        """`("+", 12, 7, 19)`: both sides and the result within 50."""
        low, high = sorted((self.rng.randint(1, 49), self.rng.randint(1, 49)))
        if self.rng.random() < 0.5:
            a, b = self.rng.sample((low, high - low or 1), 2)
            return "+", a, b, a + b
        return "-", high + (high == low), low, high + (high == low) - low

    def _one_step(self) -> Exercise:
        name, item = self.rng.choice(NAMES), self.rng.choice(ITEMS)
        if self.rng.random() < 0.2:
            a, b = self.rng.randint(2, 9), self.rng.randint(2, 5)
            question = f"{name} has {a} bags with {b} {item} in each bag. How many {item} does {name} have?"
            step, result, key = f"{a} * {b} = {a * b}", a * b, f"*|{a}|{b}|{name}|{item}"
        else:
            sign, a, b, result = self.sum_or_difference()
            verb = self.rng.choice(("buys", "finds", "gets") if sign == "+" else ("sells", "loses", "gives away"))
            more, now = (" more", "now") if sign == "+" else (f" {item}", "left")
            question = f"{name} has {a} {item}. {name} {verb} {b}{more}. How many {item} does {name} have {now}?"
            step, key = f"{a} {sign} {b} = {result}", pair_key(sign, a, b)
        return Exercise(
            kind="arithmetic", topic="one step", key=key, question=question, answer=str(result),
            reasoning=f"{name} has {step} {item}.",
        )  # fmt: skip

    def _two_steps(self) -> Exercise:
        while True:
            made = self._try_two_steps()
            if made is not None:
                return made

    def _try_two_steps(self) -> Exercise | None:
        name, item = self.rng.choice(NAMES), self.rng.choice(ITEMS)
        sign, a, b, middle = self.sum_or_difference()
        second, c = self.rng.choice("+-"), self.rng.randint(1, 20)
        result = middle + c if second == "+" else middle - c
        if not 0 < result <= 50:
            return None
        if not self.heldout and (is_heldout(pair_key(sign, a, b)) or is_heldout(pair_key(second, middle, c))):
            return None  # a held-out sum must not be learnt from the inside of a longer problem
        verbs = {"+": ("buys", "finds", "gets"), "-": ("sells", "loses", "gives away")}
        first, then = self.rng.choice(verbs[sign]), self.rng.choice(verbs[second])
        question = (
            f"{name} has {a} {item}. {name} {first} {b} {item}. Then {name} {then} {c} {item}. "
            f"How many {item} does {name} have now?"
        )
        return Exercise(
            kind="arithmetic", topic="two steps", key=f"{sign}{second}|{a}|{b}|{c}", question=question,
            answer=str(result),
            reasoning=f"First {name} has {a} {sign} {b} = {middle} {item}.\n"
            f"Then {name} has {middle} {second} {c} = {result} {item}.",
        )  # fmt: skip

    def drill(self) -> str:
        """`"12 + 7 = 19"`, training only; held-out pairs are left out."""
        while True:
            sign, a, b, result = self.sum_or_difference()
            if not is_heldout(pair_key(sign, a, b)):
                return f"{a} {sign} {b} = {result}"

    # --- recall --------------------------------------------------------------------------------------------------

    def recall(self, language: str = "en", *, needles: int = 1, chars: int = 300, digits: int = 7) -> Exercise:
        """Numbers of cities hidden in a passage; the number of one of them is asked."""
        return self._until(lambda: self._recall(language, needles, chars, digits))

    def _recall(self, language: str, needles: int, chars: int, digits: int) -> Exercise:
        cities = self.rng.sample(CITIES if language == "en" else CITIES_ZH, needles)
        numbers = [str(self.rng.randrange(10 ** (digits - 1), 10**digits)) for _ in cities]
        context = hide(
            [needle(language, city, number) for city, number in zip(cities, numbers)],
            self.passage(self.rng, language, chars), language, self.rng,
        )  # fmt: skip
        question = (
            f"What is the special magic number of {cities[0]}?"
            if language == "en"
            else f"{cities[0]}的神奇数字是多少？"
        )
        return Exercise(
            kind="recall", topic=language, language=language, key=f"recall|{cities[0]}|{numbers[0]}",
            question=question, context=context, answer=numbers[0],
        )  # fmt: skip


def pair_key(sign: str, a: int, b: int) -> str:
    """`a + b` and `b + a` are one key."""
    if sign == "+":
        a, b = min(a, b), max(a, b)
    return f"{sign}|{a}|{b}"


def needle(language: str, city: str, number: str) -> str:
    if language == "zh":
        return f"{city}的神奇数字是{number}。"
    return f"The special magic number of {city} is {number}."


def hide(needles: list[str], passage: str, language: str, rng: random.Random) -> str:
    """The passage with the needles between its sentences, at random depths."""
    mark, gap = ("。", "") if language == "zh" else (". ", " ")
    sentences = [s if s.endswith(mark.strip()) else s + mark.strip() for s in passage.split(mark) if s.strip()]
    for sentence in needles:
        sentences.insert(rng.randint(0, len(sentences)), sentence)
    return gap.join(sentences)


def chat_answer(exercise: Exercise) -> str:
    if exercise.kind == "choice":
        return f"答案是{exercise.answer}。" if exercise.language == "zh" else f"The answer is {exercise.answer}."
    if exercise.kind == "arithmetic":
        return arithmetic_gold(exercise)
    if exercise.kind == "fact":
        return exercise.answer
    return f"答案是{exercise.answer}。" if exercise.language == "zh" else f"The answer is {exercise.answer}."
