"""MATH: Minerva's prompt, the concluded answer, equality by meaning and by the official normalisation."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from readers import replied

from qwen_eval.core import Completion, Completions, Generate, Turn
from qwen_eval.extraction import math_verifier
from qwen_eval.extraction.math import (
    boxed,
    concluded_answer,
    is_same,
    is_same_upstream,
    minerva_normalised,
    normalised,
    sub_in_lines,
    upstream_answer,
)
from qwen_eval.runs.grading import GradingTimeout, time_limit
from qwen_eval.tasks.math import STOPS, Math
from qwen_eval.tasks.math import MathSpec as Spec
from qwen_eval.tasks.registry import TaskContext

GOLDS = [
    r"\left( 3, \frac{\pi}{2} \right)", "p - q", r"\frac{14}{3}", "9", r"\text{Evelyn}", "42", "27", r"90^\circ",
    r"3\sqrt{13}", "4", "2220", r"\frac{3}{56}", "284", "5", r"\sqrt{51}", "6 - 5i", "-50", r"\pi", "28", "3",
    r"6+9i", "13535", "10,\\!080", r"x^3+3x-6", r"\frac{1}{2}", r"\$32,\!348", "2k+2", "58,500", r"\text{(B)}",
    r"(-\infty,2)\cup(3,\infty)", "3R^2", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "0.15", "1,-2", "11\\sqrt2",
]  # fmt: skip

REWRITINGS: dict[str, Callable[[str], str]] = {
    "as it is": lambda gold: gold,
    "dfrac": lambda gold: gold.replace(r"\frac", r"\dfrac"),
    "spaces": lambda gold: re.sub(r"(?<!\\)([+=,-])", r" \1 ", gold),
    "dollars around": lambda gold: f"${gold}$",
    "full stop": lambda gold: f"{gold}.",
    "text": lambda gold: rf"\text{{{gold}}}" if gold.isalnum() else gold,
    "left, right": lambda gold: gold if r"\left" in gold else gold.replace("(", r"\left(").replace(")", r"\right)"),
}


@pytest.mark.parametrize("name", REWRITINGS)
def test_an_answer_equals_itself_however_it_is_written(name: str) -> None:
    for gold in GOLDS:
        assert is_same(REWRITINGS[name](gold), gold), (REWRITINGS[name](gold), gold)


def test_an_answer_does_not_equal_another() -> None:
    for one, other in pairwise(GOLDS[:12]):
        assert not is_same(one, other), (one, other)
        assert normalised(one) != normalised(other)


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("0.5", r"\frac{1}{2}", True),
        (r"\frac{2}{4}", r"\frac{1}{2}", True),
        ("2(x+1)", "2x+2", True),
        ("x = 5", "5", True),
        ("[2,5]", "[2,5)", False),
        ("-3", "3", False),
        (r"50\%", "50", True),
        ("0.5", r"50\%", False),
        ("2516_9", "2516_8", False),
        ("2516_{8}", "2516_8", True),
        (r"101_{\text{two}}", "101_2", True),
        (r"0.1\overline{6}", r"\frac{1}{6}", True),
        (r"0.\overline{16}", r"\frac{1}{6}", False),
        ("11 5/6", r"\frac{71}{6}", True),
        ("-3 1/2", r"-\frac{7}{2}", True),
        ("4 10/3", "10", False),
        (r"12 \text{ cm}^2", "12", True),
        ("90 degrees", r"90^\circ", True),
        ("2xyz", "2", False),  # letters behind a number without a blank are no unit
        ("10^{-30}", "10^{-31}", False),
        ("0", "10^{-30}", False),
        (r"\frac{1}{2004!}", r"\frac{1}{2004!}", True),
        ("1:00", "12:00", False),
        ("3√2", r"3\sqrt{2}", True),
        ("", "3", False),
        ("9" * 5000, "3", False),
        ("__import__('os').system('true')", "3", False),
    ],
)
def test_meaning_decides(answer: str, gold: str, same: bool) -> None:
    assert is_same(answer, gold) == same


def test_answers_are_compared_in_any_thread() -> None:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(is_same("0.25", r"\frac14")))
    thread.start()
    thread.join(60)
    assert results == [True]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So.\nFinal Answer: The final answer is $[2,5)$. I hope it is correct.\n\nProblem:\nFind $3$.", "[2,5)"),
        (r"Hence \boxed{\frac{1}{2}} is it.", r"\frac{1}{2}"),
        (r"First \boxed{1}, no: \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"**Answer:** \(\sqrt{2}\)", r"\sqrt{2}"),
        (r"The final answer is $\$18.90$. I hope it is correct.", r"\$18.90"),
        ("The answer is 12.", "12"),
        ("Thus $x = 3$ and $y = 4$", "y = 4"),
        ("so we get 1,234", "1,234"),
        (r"cut off at \boxed{\frac{1}{", None),
        (r"<think>\boxed{7}?</think> The answer is 5.", "5"),
        ("The answer is $1$, $2$ and $3$.", "1, 2, 3"),
        ("The answer is 2, because $x = 3$ is no root.", "2"),
        ("The value of $x$ is 5.", "5"),
        ("最终答案为：42。", "42"),
        ("答案是 $\\frac{1}{2}$。", r"\frac{1}{2}"),
        ("### Final Answer\n7", "7"),
        ("Thus\n\\[\nx = 5\n\\]", "x = 5"),
        (r"\boxed{20}. That is wrong: the answer is 18.", "18"),
        (r"\boxed{20}. I forgot to say that $x > 0$.", "20"),  # takes nothing back
        ("no idea", None),
    ],
)
def test_the_concluded_answer_is_found(text: str, answer: str | None) -> None:
    assert concluded_answer(text) == answer


def test_upstream_reads_boxes_and_final_answers() -> None:
    assert boxed(r"\boxed{a{b}c} and \fbox{d}") == "d"
    assert upstream_answer("Final Answer: The final answer is $24$. I hope it is correct.") == "24"
    assert upstream_answer(r"It is \boxed{\dfrac{1}{2}}.") == r"\dfrac{1}{2}"
    assert upstream_answer("The final answer is $1.25$.") == "1"  # its sentences end at any full stop
    assert minerva_normalised("10,080") == "10080"
    assert is_same_upstream(r"\dfrac12", r"\frac{1}{2}")
    assert is_same_upstream("x=5", "5")
    assert not is_same_upstream("2(x+1)", "2x+2")


@pytest.mark.parametrize(
    ("pattern", "end"),
    [
        (r"(\\text\{)\((.*?)\)(\})", ")}"),
        (r"(\\(?:text|textbf|overline)\{)(.*?)(\})", "}"),
        (r"(\\boxed\{)(.*)(\})", "}"),
    ],
)
def test_a_linear_substitution_gives_what_the_plain_one_gives(pattern: str, end: str) -> None:
    pieces = ["\\text{", "(", ")", "}", "\\overline{", "\\boxed{", "x", "{", "\n", "1"]
    draw = random.Random(5)
    for _ in range(10_000):
        text = "".join(draw.choices(pieces, k=draw.randint(0, 12)))
        assert sub_in_lines(pattern, end, text) == re.sub(pattern, r"\2", text), text


ENDLESS = "9^{9^{9^{9}}}"
EIGENVECTORS = r"\begin{pmatrix} 1/\sqrt{2} & 1/\sqrt{2} \\ -1/\sqrt{2} & 1/\sqrt{2} \end{pmatrix}"


@pytest.fixture(scope="module")
def brief() -> math_verifier.Verifier:
    """Gives each comparison one second of processor."""
    return math_verifier.Verifier(cpu_s=1)


def test_a_comparison_that_takes_too_long_is_stopped_and_the_next_one_works(brief: math_verifier.Verifier) -> None:
    assert brief.same("2(x+1)", "2x+2")
    begin = time.monotonic()
    with pytest.raises(math_verifier.ComparisonStopped):
        brief.same(ENDLESS, "3")
    assert time.monotonic() - begin < 30  # a second of processor, on a busy machine
    assert brief.same("2(x+1)", "2x+2")


def test_a_comparison_that_gets_no_processor_is_stopped_by_the_clock() -> None:
    verifier = math_verifier.Verifier(limit_s=0.2)
    os.kill(verifier.pid, signal.SIGSTOP)
    with pytest.raises(math_verifier.ComparisonStopped):
        verifier.same("2(x+1)", "2x+2")


def test_a_comparison_that_waits_for_the_processor_keeps_its_answer(brief: math_verifier.Verifier) -> None:
    pid = brief.pid
    threading.Timer(0.03, os.kill, (pid, signal.SIGSTOP)).start()
    threading.Timer(1.5, os.kill, (pid, signal.SIGCONT)).start()
    assert brief.same(EIGENVECTORS, EIGENVECTORS.replace(r"\\", r"\\ "))
    assert brief.pid == pid


def test_an_answer_whose_comparison_is_stopped_is_wrong_and_flagged(
    brief: math_verifier.Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_eval.extraction.math.verifier", brief)
    sample = replace(math().samples()[0], target="3")
    grade = math().grade(sample, replied(rf"\boxed{{{ENDLESS}}}"))
    assert (grade.score, grade.score_upstream, grade.extracted) == (0.0, 0.0, ENDLESS)
    assert "grading_timeout" in grade.flags


def test_a_comparison_that_is_interrupted_leaves_no_answer_to_the_next_question(brief: math_verifier.Verifier) -> None:
    assert brief.same("2(x+1)", "2x+2")
    with pytest.raises(GradingTimeout), time_limit(0.5):
        brief.same(ENDLESS, "3")
    assert brief.same("2(x+1)", "2x+2")


def test_a_verifier_that_is_killed_from_outside_is_started_again(brief: math_verifier.Verifier) -> None:
    assert brief.same("2(x+1)", "2x+2")
    os.kill(brief.pid, signal.SIGKILL)
    assert brief.same("2(x+1)", "2x+2")


# --- the task -------------------------------------------------------------------------------------------------------


def math(*, protocol: str = "robust", is_chat: bool = False) -> Math:
    return Math(Spec(data="bundled"), TaskContext(protocol=protocol, is_chat=is_chat))


def test_base_prompts_hold_four_worked_problems_and_chats_ask_for_a_box() -> None:
    sample = math().samples()[0]
    prompt = math().prompt(sample).text or ""
    assert prompt.count("I hope it is correct.") == 4
    assert prompt.endswith(f"Problem:\n{sample.data['problem']}\nSolution:\n")
    assert "{{" not in prompt
    assert "\\boxed{}" in math(is_chat=True).prompt(sample).messages[-1].content


def test_official_solutions_are_graded_right_and_by_subject_and_level() -> None:
    task = math()
    for sample in task.samples():
        completion = Completion(text=sample.data["solution"], finish_reason="eos", num_tokens=9)
        request = Generate(prompt=task.prompt(sample), max_new_tokens=9)
        grade = task.grade(sample, [Turn(request=request, answer=Completions(completions=(completion,)))])
        assert (grade.score, grade.score_upstream) == (1.0, 1.0), sample.id
        assert grade.values["level"] in "12345"
    assert len({sample.group for sample in task.samples()}) == 7


def test_generation_stops_behind_the_conclusion() -> None:
    text = "Final Answer: The final answer is $24$. I hope it is correct.\n\nProblem:\nAnother"
    for stop in STOPS:
        assert concluded_answer(text.partition(stop)[0]) == "24"
