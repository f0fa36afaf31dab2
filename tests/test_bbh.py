"""BIG-Bench Hard: the authors' prompts, an answer of the right kind, an unweighted mean over tasks."""

from __future__ import annotations

import pytest

from qwen_eval.core import Completion, Completions, Generate, Grade, Record, Sample, Turn
from qwen_eval.extraction.short_answers import canonical, concluded_choice
from qwen_eval.tasks.bbh import Bbh, upstream_answer, upstream_target
from qwen_eval.tasks.bbh import BbhSpec as Spec
from qwen_eval.tasks.registry import TaskContext

TASK = Bbh(Spec(data="bundled"), TaskContext())


def replied(text: str) -> list[Turn]:
    completion = Completion(text=text, finish_reason="stop", num_tokens=9)
    request = Generate(prompt=TASK.prompt(TASK.samples()[0]), max_new_tokens=9)
    return [Turn(request=request, answer=Completions(completions=(completion,)))]


def test_all_27_tasks_are_there_each_with_three_worked_examples() -> None:
    groups = {sample.group: sample for sample in TASK.samples()}
    assert len(groups) == 27
    for sample in groups.values():
        prompt = TASK.prompt(sample).text or ""
        assert prompt.startswith("Follow the given examples and answer the question.\n")
        assert prompt.count("So the answer is") >= 3
        assert "canary" not in prompt
        assert prompt.endswith(f"Q: {sample.data['input']}\nA: ")


def test_chats_are_asked_to_think_step_by_step() -> None:
    prompt = Bbh(Spec(data="bundled"), TaskContext(is_chat=True)).prompt(TASK.samples()[0])
    assert prompt.messages[-1].content.endswith("A: Let's think step by step.")


@pytest.mark.parametrize(
    "form",
    [
        "Not (C), 3 no.\nSo the answer is {}.",
        "So the answer is **{}**.",
        "Answer: {}\n\nQ: another\nSo the answer is no.",
        "Having thought about it:\n{}",
    ],
)
def test_every_gold_answer_is_read_back(form: str) -> None:
    for sample in TASK.samples():
        text = form.format(sample.target)
        assert concluded_choice(text, sample.target, sample.data["input"]) == canonical(sample.target), text


def test_official_conclusions_are_right_for_both_readers() -> None:
    for sample in TASK.samples():
        text = f"We think.\nSo the answer is {sample.target}."
        assert upstream_answer(text, sample.target) == upstream_target(sample.target)


@pytest.mark.parametrize(
    ("reply", "target", "answer"),
    [
        ("The answer is (B), not (A).", "(C)", "B"),
        ("A is wrong. I choose (D).", "(C)", "D"),
        ("So the answer is the blue one.", "(A)", "B"),  # the option by its words
        ("So the answer is not plausible, so no.", "yes", "no"),
        ("The argument is invalid.", "valid", "invalid"),
        ("So the answer is 1,024.", "7", "1024"),
        ("So the answer is ] ) >", "]", "])>"),
        ("So the answer is alpha, beta, gamma.", "alpha beta", "alpha beta gamma"),
        ("", "(A)", None),
    ],
)
def test_the_answer_has_the_kind_of_the_question(reply: str, target: str, answer: str | None) -> None:
    assert concluded_choice(reply, target, "Options:\n(A) red\n(B) the blue one") == answer


SORT = "Sort the following words alphabetically: List: cherry banana apple"
DYCK = "Complete the rest of the sequence. Input: [ { ("


@pytest.mark.parametrize(
    ("reply", "target", "question", "answer"),
    [
        ("The argument does not appear to be valid.", "valid", "", "invalid"),
        ("I would not say that it is invalid.", "valid", "", "valid"),
        ("Is it valid or invalid? It does not follow, so it is invalid.", "valid", "", "invalid"),
        ("You do not return to the start.\n\nNo", "Yes", "", "no"),
        ("True and not False = True and True = True", "False", "", "true"),
        ("The statement is not true.", "False", "", "false"),
        ("1) apple\n2) banana\n3) cherry\n", "apple", SORT, "apple banana cherry"),
        (
            "The original list:\ncherry\nbanana\n\nThe sorted list:\napple\nbanana\ncherry",
            "a",
            SORT,
            "apple banana cherry",
        ),
        ("So the answer is apple apricot banana cherry.", "apple", SORT, "apple apricot banana cherry"),  # invented
        ("[ { ( ) } ]", ")", DYCK, ")}]"),  # the whole sequence
        ("\\boxed{\\text{) \\} ]}}", ")", DYCK, ")}]"),
        ("`)` closes `(`.\n\nSo, the answer is: ) } ] (three brackets).", ")", DYCK, ")}]"),
        ("You have eight instruments.", "3", "", "8"),
        ("<think>The answer is 3.</think>8", "3", "", "8"),
    ],
)
def test_answers_are_read_in_the_forms_models_give_them(reply: str, target: str, question: str, answer: str) -> None:
    assert concluded_choice(reply, target, question) == answer


def test_protocols_are_both_graded() -> None:
    sample = Sample(id="x/0", group="snarks", data={"input": "?"}, target="(B)")
    grade = TASK.grade(sample, replied("Not (A).\nAnswer: (B)"))
    assert (grade.score, grade.score_upstream) == (1.0, 0.0)


def test_every_task_counts_the_same() -> None:
    def record(group: str, i: int, score: float) -> Record:
        return Record(
            sample_id=f"{group}/{i}", group=group, cluster="", target=None, prompts=(), prompt_sha256=(),
            num_prompt_tokens=(), answers=(), grade=Grade(score=score, score_upstream=score),
        )  # fmt: skip

    records = [record("a", i, 1.0) for i in range(3)] + [record("b", 0, 0.0)]
    metrics = TASK.summarise(records)
    assert next(iter(metrics)) == "accuracy"
    assert metrics["accuracy"].value == 0.5
    assert metrics["accuracy/a"].value == 1.0
