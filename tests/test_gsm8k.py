"""GSM8K: official prompts token for token, official readings with their quirks, and a reader that is right."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from qwen_eval.core import Completion, Completions, ConfigError, Generate, Sample, Turn
from qwen_eval.extraction.numbers import (
    concluded_number,
    upstream_base_gold,
    upstream_base_number,
    upstream_chat_equal,
    upstream_chat_number,
    written,
)
from qwen_eval.extraction.symptoms import cut, flags, is_looping
from qwen_eval.models.tokenizer import load_tokenizer
from qwen_eval.tasks.gsm8k import STOPS, UPSTREAM_CUTS, Gsm8k
from qwen_eval.tasks.gsm8k import Gsm8kSpec as Spec
from qwen_eval.tasks.registry import TaskContext

DATA = Path(__file__).parent / "data"
ROWS = DATA / "gsm8k_test.jsonl.gz"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def golden_rows(golden: Path, name: str) -> list[dict[str, Any]]:
    path = golden / "eval" / name
    if not path.is_file():
        pytest.skip(f"no {name} among the goldens")
    return rows_of(path)


def ids_sha256(ids: Sequence[int]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()


def gsm8k(*, protocol: str = "robust", is_chat: bool = False, **keys: Any) -> Gsm8k:
    return Gsm8k(Spec(path=str(ROWS), **keys), TaskContext(protocol=protocol, is_chat=is_chat))


def replied(text: str, finish_reason: Any = "eos") -> list[Turn]:
    completion = Completion(text=text, finish_reason=finish_reason, num_tokens=1)
    prompt = gsm8k().prompt(Sample(id="x", data={"question": "?"}))
    return [Turn(request=Generate(prompt=prompt, max_new_tokens=1), answer=Completions(completions=(completion,)))]


@pytest.fixture(scope="module")
def golds() -> list[str]:
    with gzip.open(ROWS, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["answer"].rpartition("#### ")[2].replace(",", "") for line in lines]


# --- official prompts and readings ----------------------------------------------------------------------------------

BENCHES = {
    "gsm8k_base": {"is_chat": False},
    "chat_gsm8k_0shot": {"is_chat": True},
    "chat_gsm8k_4shot": {"is_chat": True, "shots": 4},
}


@pytest.mark.parametrize("bench", BENCHES)
def test_prompts_are_the_official_ones_token_for_token(golden: Path, bench: str) -> None:
    tokenizer = load_tokenizer(DATA)
    task = gsm8k(**BENCHES[bench])
    samples = task.samples()
    rows = [row for row in golden_rows(golden, "prompts.jsonl") if row["bench"] == bench]
    assert rows, f"no {bench} rows"
    for row in rows:
        ids = tokenizer.render(task.prompt(samples[row["row"]]))
        assert (len(ids), ids_sha256(ids)) == (row["n_tokens"], row["prompt_ids_sha256"]), row["row"]


def test_official_golds_are_read_as_upstream_reads_them(golden: Path) -> None:
    samples = gsm8k().samples()
    rows = [row for row in golden_rows(golden, "prompts.jsonl") if "gold_chat" in row]
    for row in rows:
        answer = samples[row["row"]].data["answer"]
        assert (upstream_base_gold(answer), upstream_chat_number(answer)) == (row["gold"], row["gold_chat"])


def test_upstream_readings_equal_the_recorded_ones(golden: Path) -> None:
    for row in golden_rows(golden, "extraction/gsm8k.jsonl"):
        base, chat = upstream_base_number(row["completion"]), upstream_chat_number(row["completion"])
        gold_base, gold_chat = upstream_base_gold(row["gold_answer"]), upstream_chat_number(row["gold_answer"])
        assert (base, chat) == (row["base_extract"], row["chat_extract"]), row["completion"]
        assert (gold_base, gold_chat) == (row["gold_base"], row["gold_chat"]), row["gold_answer"]
        assert (base == gold_base) == row["base_correct"], row["completion"]
        assert upstream_chat_equal(chat, gold_chat) == row["chat_correct"], row["completion"]


def test_completions_are_cut_where_upstream_cuts_them(golden: Path) -> None:
    tokenizer = load_tokenizer(DATA)
    for row in golden_rows(golden, "extraction/gsm8k.jsonl"):
        text = tokenizer.decode(row["decode_ids"][row["decode_raw_text_len"] :])
        assert cut(text, UPSTREAM_CUTS) == row["decode_text"]


# --- the reader that is right ---------------------------------------------------------------------------------------


def grouped(gold: str) -> str:
    return f"{int(gold):,}" if gold.lstrip("-").isdigit() else gold


def full_width(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if c in "0123456789,.-" else c for c in text)


REWRITINGS: dict[str, Callable[[str], str]] = {
    "plain": lambda gold: gold,
    "1,234": grouped,
    "$X.00.": lambda gold: f"${grouped(gold)}.00.",
    "**X**": lambda gold: f"**{grouped(gold)}**",
    "boxed": lambda gold: f"$\\boxed{{{grouped(gold)}}}$",
    "X dollars": lambda gold: f"{gold} dollars",
    "= X": lambda gold: f"= {grouped(gold)}",
    "full width": lambda gold: full_width(gold),
    "full width, grouped": lambda gold: full_width(grouped(gold)),
    "The answer is X.": lambda gold: f"The answer is {gold}.",
    "The answer is **$X**.": lambda gold: f"The answer is **${grouped(gold)}**.",
    "答案": lambda gold: f"答案是{gold}元。",
    "LaTeX groups": lambda gold: "\\[ " + grouped(gold).replace(",", "{,}") + " \\]",
    "####": lambda gold: f"#### {gold}",
}
SETTINGS = [
    "",
    "Janet has 3 + 4 = 7 eggs on 2 days.\nSo she makes ",
    "First, 12 * 3 = 36 (not 35).\n\nSo the total is ",
]


@pytest.mark.parametrize("name", REWRITINGS)
def test_every_gold_answer_is_read_however_it_is_written(golds: list[str], name: str) -> None:
    assert len(golds) == 1319
    for setting in SETTINGS:
        for gold in golds:
            text = setting + REWRITINGS[name](gold)
            assert concluded_number(text) == Fraction(gold), text


@pytest.mark.parametrize("form", ["-{}", "-${}", "= -{}", "\\boxed{{-{}}}", "−{}", "The answer is -{}."])
def test_the_sign_of_every_gold_answer_is_kept(golds: list[str], form: str) -> None:
    for gold in golds:
        if not gold.startswith("-"):
            text = "He pays 5-3 = 2.\nSo it is " + form.format(gold)
            assert concluded_number(text) == -Fraction(gold), text


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("The answer is 18 (not 20).", "18"),
        ("The answer is not 20 but 18.", "18"),
        ("12 - 5 = 7, not 10", "7"),
        ("The answer is 5.\n\nQuestion: Tom has 7 apples?", "5"),
        ("The answer is 5. Wait, that is wrong. The answer is 6.", "6"),
        ("The answer is 12. He did it in 3 days, on July 4.", "12"),  # concluded, not last
        ("So she makes **$18** on each of 5 days.", "18"),
        ("I think it is 12. The answer is correct.", "12"),
        ("The answer is x = 9*2 = 18 apples", "18"),
        ("The answer to 3 + 4 is 7.", "7"),
        ("Answer:\n**42**", "42"),
        ("The final answer is: 3 hours and 30 minutes", "3"),
        ("The answer is 20%.", "20"),
        ("The answer is 3/4.", "0.75"),
        ("$\\frac{1}{3}$", "1/3"),
        ("3 1/2 cups", "3.5"),
        ("1.5 million dollars", "1500000"),
        ("一共3万元", "30000"),
        ("5-3", "3"),
        ("\\boxed{18\\text{ dollars}}", "18"),
        ("The answer is 1/0", "1"),
        ("The answer is 5 more than 13, so 18.", "18"),
        ("Answer: 42 = 18 + 24", "42"),
        ("After 3 days, there are 40 left; after 5 days, there are 20 left.", "20"),
        ("So Tina earns $990 in total over the 5 days.", "990"),
        ("The answer is 20... no wait, that's wrong. It's 22.", "22"),
        ("The answer is 18.\n\nI forgot to mention the 3 friends of hers.", "18"),  # takes nothing back
        ("The answer is 18.<|im_end|>\n<|im_start|>user\nAnd 5?", "18"),
        ("- 5 apples", "5"),  # a list, not a debt
        ("2 \\frac{1}{2}", "2.5"),
        ("2 3/2", "1.5"),  # no mixed number
        ("The answer is seven.", "7"),
        ("9 * 3 = 27, minus 2. The answer is twenty-five.", "25"),
        ("", None),
        ("9" * 100_000, None),  # a stuck model is not asked for its number
    ],
)
def test_the_concluded_number_is_the_one_meant(reply: str, number: str | None) -> None:
    assert written(concluded_number(reply)) == number


def test_a_huge_exponent_costs_nothing() -> None:
    assert concluded_number("The answer is 1e999999999999") is not None


# --- the task -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "is_chat", "robust", "upstream"),
    [
        ("She makes 9 * 2 = $18.\nThe answer is 18\n\nQuestion: 5?", False, 1.0, 1.0),
        ("The answer is $18.00", False, 1.0, 0.0),  # the official base reader sees 00
        ("The answer is $18.00", True, 1.0, 1.0),
        ("The answer is 18, in 2023", True, 1.0, 0.0),
        ("The answer is 19", True, 0.0, 0.0),
    ],
)
def test_both_readings_are_graded_whatever_the_protocol(
    reply: str, is_chat: bool, robust: float, upstream: float
) -> None:
    sample = gsm8k().samples()[0]
    assert sample.target == "18"
    for protocol in ("robust", "upstream"):
        grade = gsm8k(protocol=protocol, is_chat=is_chat).grade(sample, replied(reply))
        assert (grade.score, grade.score_upstream) == (robust, upstream)


def test_stopping_early_changes_no_answer(golds: list[str]) -> None:
    """What the stop strings keep from being generated is what the reader does not look at, and upstream cuts away."""
    assert set(STOPS) <= set(UPSTREAM_CUTS)
    for gold in golds[:200]:
        for rest in ("\n\nQuestion: Tom has 7?\nThe answer is 7", " Question: 8?", "\n\n\nThe answer is off by 2"):
            text = f"So it is {gold}.\nThe answer is {gold}{rest}"
            assert concluded_number(cut(text, STOPS)) == Fraction(gold)


def test_stop_strings_are_for_robust_base_generation_only() -> None:
    sample = gsm8k().samples()[0]
    stops = {
        (protocol, is_chat): gsm8k(protocol=protocol, is_chat=is_chat).request(sample, [])
        for protocol in ("robust", "upstream")
        for is_chat in (False, True)
    }
    assert {key: bool(request.stop) for key, request in stops.items() if isinstance(request, Generate)} == {
        ("robust", False): True,
        ("robust", True): False,
        ("upstream", False): False,
        ("upstream", True): False,
    }


def test_fewer_shots_are_the_first_examples_and_more_are_refused() -> None:
    sample = gsm8k().samples()[0]
    two = gsm8k(shots=2).prompt(sample).text or ""
    assert two.count("Question:") == 3
    assert two.endswith("step by step\n")
    assert "\n\n\n" not in two
    with pytest.raises(ConfigError, match="8 examples"):
        gsm8k(shots=9, is_chat=True).prompt(sample)
    with pytest.raises(ConfigError, match="8 examples"):
        gsm8k(shots=9).prompt(sample)


def test_the_bundled_sample_is_the_beginning_of_the_official_rows() -> None:
    bundled = Gsm8k(Spec(data="bundled"), TaskContext()).samples()
    assert [s.data for s in bundled] == [s.data for s in gsm8k().samples()[: len(bundled)]]


# --- symptoms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So it is. " + "and so on " * 20, True),
        ("x" * 200, True),
        ("I am sorry, I cannot. " * 4 + "I am sorry", True),  # the last repetition is cut short
        ("1000000000", False),
        (", ".join(str(i) for i in range(300)), False),  # counting is no loop
        ("-" * 60, False),
        ("ha ha ha ha", False),
        ("again and again " * 30 + "but then it ended well, and everybody went home happily after all of that", False),
        ("", False),
    ],
)
def test_a_loop_is_a_tail_that_repeats(text: str, expected: bool) -> None:
    assert is_looping(text) == expected


def test_symptoms_are_flagged() -> None:
    cut_off = Completion(text="and so on " * 40, finish_reason="length", num_tokens=512)
    assert flags(cut_off, has_answer=False) == ("truncated", "looping", "no_answer")
    assert flags(Completion(text=" \n", finish_reason="eos", num_tokens=1), has_answer=False) == ("empty", "no_answer")
    assert flags(Completion(text="The answer is 5", finish_reason="stop", num_tokens=5), has_answer=True) == ()


def test_a_chat_gets_eight_shots_as_turns() -> None:
    """The cards' 8-shot rows of chat models are OpenCompass's, which asks each example in a turn of its own."""
    task = gsm8k(shots=8, is_chat=True)
    sample = task.samples()[0]
    messages = task.prompt(sample).messages
    assert [message.role for message in messages] == ["user", "assistant"] * 8 + ["user"]
    assert messages[0].content.startswith("Question: In 2004, there were 60 kids at a cookout.")
    assert all(message.content.endswith("\nLet's think step by step\nAnswer:") for message in messages[::2])
    assert [message.content.splitlines()[-1] for message in messages[1::2]][:2] == [
        "The answer is 20", "The answer is 817",
    ]  # fmt: skip
    assert sample.data["question"] in messages[-1].content
    assert task.describe()["shots"] == 8
    assert len(gsm8k(shots=4, is_chat=True).prompt(sample).messages) == 1  # the official script's, in one message
