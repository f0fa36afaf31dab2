"""The nano exercises: split, rows, prompts, grading."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from nano import generator

from qwen_eval.core import ChoiceLogprobs, Choose, Completion, Completions, Generate, Sample, Turn
from qwen_eval.data import exercises as ex
from qwen_eval.tasks import nano
from qwen_eval.tasks.registry import TaskContext

SAMPLES = Path(nano.__file__).parent.parent / "assets" / "samples"
ROWS = [json.loads(line) for line in (SAMPLES / "nano" / "test.jsonl").read_text("utf-8").splitlines()]


def passage(rng: random.Random, language: str, chars: int) -> str:
    return "The door was open. A lamp burned. Nobody spoke." if language == "en" else "门开着。灯亮着。没有人说话。"


def source(*, heldout: bool, seed: int = 0) -> generator.Source:
    return generator.Source(rng=random.Random(seed), heldout=heldout, passage=passage)


def stream(side: generator.Source, n: int) -> list[ex.Exercise]:
    makers = (
        side.choice,
        side.choice_stated,
        lambda: side.choice_stated("zh"),
        side.choice_told,
        side.arithmetic,
        side.recall,
    )
    return [make() for make in makers for _ in range(n)]


def task(mode: str = "base", **fields: object) -> nano.Nano:
    spec = nano.NanoSpec(mode=mode, data="bundled", **fields)  # type: ignore[arg-type]
    return nano.Nano(spec, TaskContext())


def sample(kind: str) -> Sample:
    return next(s for s in task().samples() if s.data["kind"] == kind)


def reply(text: str) -> list[Turn]:
    completion = Completion(text=text, finish_reason="stop", num_tokens=3)
    request = task("chat").request(sample("recall"), [])
    assert request is not None
    return [Turn(request=request, answer=Completions(completions=(completion,)))]


def test_training_and_heldout_exercises_never_share_a_key() -> None:
    training = {e.key for e in stream(source(heldout=False), 500)}
    heldout = {e.key for e in stream(source(heldout=True, seed=1), 500)}
    assert len(training) > 400
    assert len(heldout) > 150
    assert not training & heldout


def test_a_heldout_question_asks_a_known_fact_in_words_training_never_uses_for_it() -> None:
    training = source(heldout=False)
    asked = {training.choice().question for _ in range(3000)}
    heldout = source(heldout=True)
    for _ in range(200):
        assert heldout.choice().question not in asked


def test_heldout_sums_are_not_learnt_from_drills_or_from_the_inside_of_longer_problems() -> None:
    training = source(heldout=False)
    texts = [training.drill() for _ in range(2000)]
    texts += [line for _ in range(2000) for line in training.arithmetic(2).reasoning.splitlines()]
    for text in texts:
        words = text.rstrip(".").split()
        at = next(i for i, word in enumerate(words) if word in "+-")
        key = generator.pair_key(words[at], int(words[at - 1]), int(words[at + 1]))
        assert not generator.is_heldout(key), text


@pytest.mark.parametrize("heldout", [False, True])
def test_answers_are_right(heldout: bool) -> None:
    for exercise in stream(source(heldout=heldout), 200):
        if exercise.kind == "arithmetic":
            expression = exercise.reasoning.splitlines()[-1].split(" has ")[1]
            left, sign, right, _, result = expression.split()[:5]
            total = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right))
            assert str(total) == result == exercise.answer
        elif exercise.kind == "recall":
            city = exercise.question.removeprefix("What is the special magic number of ").rstrip("?")
            assert f"number of {city} is {exercise.answer}." in exercise.context
        else:
            assert len(set(exercise.options)) == 4


def test_a_fact_has_its_own_answer_among_the_options() -> None:
    pairs = {(r["topic"], s): a for language in generator.facts().values() for r in language for s, a in r["pairs"]}
    for _, exercise in zip(range(300), iter(source(heldout=True).choice, None)):
        subject = next(
            s for (topic, s) in pairs if topic == exercise.topic and any(
                p.format(s=s) == exercise.question
                for r in generator.facts()["en"] if r["topic"] == topic for p in r["phrasings"]
            )
        )  # fmt: skip
        assert exercise.options[ex.LETTERS.index(exercise.answer)] == pairs[exercise.topic, subject]


def test_bundled_rows_are_all_held_out_and_balanced() -> None:
    assert Counter(row["kind"] for row in ROWS) == {"choice": 180, "fact": 100, "arithmetic": 140, "recall": 120}
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    relations = {r["topic"]: r for language in generator.facts().values() for r in language}
    for row in ROWS:
        if row["kind"] != "fact":
            assert generator.is_heldout(row["key"]), row["id"]
            continue
        relation = relations[row["topic"]]
        hidden = [
            relation["phrasings"][generator.heldout_phrasing(row["topic"], s, 3)].format(s=s)
            for s, _ in relation["pairs"]
        ]
        assert row["question"] in hidden, row["id"]
    letters = Counter(row["answer"] for row in ROWS if row["kind"] == "choice")
    assert max(letters.values()) < 0.35 * 180  # always saying one letter is near chance


def test_no_shot_gives_the_answer_away() -> None:
    for row in ROWS:
        if row["kind"] == "fact":
            assert row["answer"] not in {shot["answer"] for shot in row["shots"]}, row["id"]


def test_choices_are_asked_as_mmlu_and_ceval_ask_them() -> None:
    request = task(shots=1).request(sample("choice"), [])
    assert isinstance(request, Choose)
    text = request.prompt.text or ""
    assert text.startswith("The following are multiple choice questions (with answers) about ")
    assert text.endswith("\nAnswer:")
    assert text.count("\nAnswer: ") == 1
    assert request.choices == (" A", " B", " C", " D")
    chinese = next(s for s in task().samples() if s.group == "choice/stated_zh")
    request = task(shots=0).request(chinese, [])
    assert isinstance(request, Choose)
    assert (request.prompt.text or "").startswith("问题：")
    assert (request.prompt.text or "").endswith("\n答案：")
    assert request.choices == ("A", "B", "C", "D")


def test_sums_are_asked_in_the_form_of_gsm8k() -> None:
    request = task().request(sample("arithmetic"), [])
    assert isinstance(request, Generate)
    assert (request.prompt.text or "").count("Let's think step by step\n") == 3
    assert request.stop == ("\n\n", "Question:")


def test_chat_models_are_asked_without_shots_and_generate() -> None:
    for kind in nano.KINDS:
        request = task("chat").request(sample(kind), [])
        assert isinstance(request, Generate)
        assert request.prompt.messages[-1].role == "user"
        assert request.stop == ()


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("choice", "The answer is C.", "C"),
        ("choice", "答案是B。", "B"),
        ("arithmetic", "Tom has 12 + 7 = 19 coins.\nThe answer is 19", "19"),
        ("arithmetic", "no idea", None),
        ("recall", " 4829173", "4829173"),
        ("recall", "答案是4829173。", "4829173"),
        ("recall", "482917", "482917"),  # a digit short is another number
        ("recall", "", None),
        ("fact", " Paris.\n\nQuestion: And", "Paris"),
        ("fact", "法国。", "法国"),
        ("fact", "\n", None),
    ],
)
def test_reading_a_reply(kind: str, text: str, found: str | None) -> None:
    assert nano.read(kind, text) == found


def test_grading_and_summary() -> None:
    asked = sample("recall")
    right = task().grade(asked, reply(f" {asked.target}"))
    wrong = task().grade(asked, reply(" 1"))
    assert (right.score, wrong.score) == (1.0, 0.0)
    choice = sample("choice")
    best = "ABCD".index(choice.target)
    logprobs = tuple(0.0 if i == best else -1.0 for i in range(4))
    request = task().request(choice, [])
    assert request is not None
    turn = Turn(request=request, answer=ChoiceLogprobs(logprobs=logprobs, num_tokens=(1, 1, 1, 1)))
    assert task().grade(choice, [turn]).score == 1.0


@pytest.mark.parametrize("folder", ["text", "haystack"])
def test_every_bundled_text_states_its_source_and_licence(folder: str) -> None:
    meta = json.loads((SAMPLES / folder / "META.json").read_text("utf-8"))
    assert {m["file"] for m in meta} == {p.name for p in (SAMPLES / folder).glob("*.txt")}
    for entry in meta:
        assert entry["licence"] in ("public domain", "MIT", "Apache-2.0", "PSF-2.0")
        assert len((SAMPLES / folder / entry["file"]).read_text("utf-8")) == entry["chars"]
