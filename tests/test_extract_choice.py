"""The letter of a reply: what is concluded counts, not the first capital."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_eval.extraction import official_letters as extract
from qwen_eval.extraction.letters import concluded_letter
from qwen_eval.extraction.math import concluded_answer
from qwen_eval.extraction.numbers import concluded_number
from qwen_eval.extraction.official_letters import official_ceval_letter, official_mmlu_letter
from qwen_eval.extraction.short_answers import concluded_choice

CITIES = ("Paris", "London", "Berlin", "Madrid")
ACIDS = ("Ascorbic acid", "Acid", "A and B only", "None of the above")
AUTHORS = ("曹雪芹", "罗贯中", "施耐庵", "吴承恩")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        # the letter and nothing else
        ("B", "B"),
        ("b", "B"),
        ("(C)", "C"),
        ("D.", "D"),
        ("'C'", "C"),
        ("**B**", "B"),
        (" `A` \n", "A"),
        ("Ａ", "A"),
        ("（Ｄ）。", "D"),
        ("\\boxed{C}", "C"),
        ("$\\boxed{\\text{(B)}}$", "B"),
        ("E", None),
        # said to be the answer
        ("The answer is (D).", "D"),
        ("the answer is B", "B"),
        ("Answer: C", "C"),
        ("Answer: **C**. Paris", "C"),
        ("The correct answer is: B. 42", "B"),
        ("The best choice would be option C because it holds.", "C"),
        ("The answer to this question about Chemistry is D.", "D"),
        ("I would choose option B.", "B"),
        ("I'll go with (A).", "A"),
        ("My answer is therefore C", "C"),
        ("C is the answer.", "C"),
        ("Option B is the most suitable answer.", "B"),
        ("Final answer: \\(\\boxed{A}\\)", "A"),
        ("The answer is b.", "B"),
        ("option d", "D"),
        ("答案是B。", "B"),
        ("答案：C", "C"),
        ("【答案】D", "D"),
        ("正确答案为（A）。", "A"),
        ("本题的正确选项应该是“C”", "C"),
        ("故选：B．", "B"),
        ("因此应选D。", "D"),
        ("我选择Ｂ。", "B"),
        ("所以答案选A项", "A"),
        ("C是正确答案。", "C"),
        ("B选项符合题意。", "B"),
        # the last conclusion wins
        ("The answer is A. Wait, on reflection the answer is C.", "C"),
        ("At first sight the answer is B.\n\nLet me check.\n\nD", "D"),
        ("答案是A。不对，答案应该是D。", "D"),
        ("B. That was hasty: the answer is C.", "C"),
        ("<think>The answer is A? Surely the answer is B.</think>\n\nThe answer is D.", "D"),
        ("<think>The answer is A", None),  # still thinking when it was cut off
        # what is denied is not the answer
        ("A is wrong, so C", "C"),
        ("The answer is not B. It is C.", "C"),
        ("The answer isn't D, it's B.", "B"),
        ("The answer cannot be A. Choose D.", "D"),
        ("not A", None),
        ("A is not correct. B is incorrect. C is correct. D does not fit.", "C"),
        ("The answer is C, not A.", "C"),
        ("The answer is B rather than D.", "B"),
        ("I would rule out A and B. The answer must be D.", "D"),
        ("Neither A nor B is right; therefore C.", "C"),
        ("选项A和B都不对，选C", "C"),
        ("答案不是C，而是B。", "B"),
        ("不能选A，应选B", "B"),
        ("排除A、B、D，故选C。", "C"),
        ("A项错误，B项错误，C项正确，D项错误。", "C"),
        ("A是错误的", None),
        ("选B不选C", "B"),
        # several letters are no answer, unless one is concluded
        ("A or B", None),
        ("The answer is A or B.", None),
        ("C and A are both right", None),
        ("正确的是B和C", None),
        ("答案是AB", None),
        ("Between A and C, I choose C.", "C"),
        # which statement is wrong: the letter asked for, not the one called correct
        ("A选项正确。B选项正确。C选项说法错误。D选项正确。所以答案是C。", "C"),
        ("A is correct. B is correct. D is correct. The false statement, and so the answer, is C.", "C"),
        ("下列说法不正确的是C。", "C"),
        # letters that are no choices
        ("Because of this, none", None),
        ("A dog barks at night.", None),
        ("Coding in C++ or C# is fun.", None),
        ("D'Alembert's principle", None),
        ("As a language model, I can't decide.", None),
        ("", None),
        ("   \n", None),
        ("A good question. The answer is D", "D"),
        ("Let A = 3 and b = 4. Then the answer is D.", "D"),
        # only supposed
        ("If the answer is A, then x = 2, which is absurd. So B.", "B"),
        ("Is the answer A? No, D.", "D"),
        ("如果选A，则矛盾。因此选C。", "C"),
        # opening with the letter
        ("C. Berlin\n\nBerlin is the capital of Germany. A is in France.", "C"),
        ("B: because the sum is even", "B"),
        ("(B) 12\nSince 3 + 9 = 12.", "B"),
        ("D，因为其余三项都不成立。", "D"),
        ("A. x\nB. y\nC. z\nD. w", None),  # the options again, no conclusion
        ("A. x\nB. y\nC. z\nD. w\nThe answer is B.", "B"),
        ("A. Paris B. London C. Berlin D. Madrid", None),
        # nothing but a mention
        ("I believe B fits best here", "B"),
        ("It is option C, I think", "C"),
        ("Definitely C!", "C"),
    ],
)
def test_the_letter_is_the_one_concluded(reply: str, letter: str | None) -> None:
    assert concluded_letter(reply) == letter


@pytest.mark.parametrize(
    ("reply", "choices", "letter"),
    [
        ("Paris", CITIES, "A"),
        ("The capital of Spain is Madrid.", CITIES, "D"),
        ("The answer is London. Paris and Berlin are larger.", CITIES, "B"),
        ("Paris, London or Berlin", CITIES, None),
        ("It is not Paris but London", CITIES, "B"),
        ("I don't know", CITIES, None),
        ("Parisian life", CITIES, None),  # no option's whole words
        ("It is ascorbic acid.", ACIDS, "A"),  # holds "acid", which is option B
        ("The answer is A and B only.", ACIDS, "C"),
        ("C. A and B only", ACIDS, "C"),
        ("None of the above.", ACIDS, "D"),
        ("It could be A and B only or None of the above.", ACIDS, None),
        ("I think $1.50 is correct.", ("$1.50", "$15", "nan", "5.0"), "A"),
        ("The result is 15.", ("1", "5", "15", "155"), "C"),
        ("作者是曹雪芹。", AUTHORS, "A"),
        ("不是罗贯中，是施耐庵。", AUTHORS, "C"),
        ("可能是施耐庵，也可能是曹雪芹", AUTHORS, None),
        ("答案是吴承恩，而曹雪芹写了《红楼梦》。", AUTHORS, "D"),
        ("B. Paris", CITIES, "B"),  # the letter outweighs the words
        ("The answer is AB", ("A", "B", "AB", "O"), "C"),  # blood groups
        ("the same", ("the same", "the same", "x", "y"), None),
        ("anything", ("", "", "", ""), None),
    ],
)
def test_an_option_may_be_named_by_its_words(reply: str, choices: tuple[str, ...], letter: str | None) -> None:
    assert concluded_letter(reply, choices) == letter


@pytest.mark.parametrize("tail", ["A" * 20_000, "A and " * 5_000, "the answer " * 3_000, "选" * 20_000, "(" * 20_000])
def test_hostile_replies_are_read_in_a_moment(tail: str) -> None:
    import time

    start = time.perf_counter()
    concluded_letter(tail, CITIES)
    assert time.perf_counter() - start < 2.0


CELL = ("mitochondria", "nucleus", "ribosome", "cilia")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A. mitochondria: Incorrect\nB. nucleus: Correct\nC. ribosome: Incorrect\nD. cilia: Incorrect", "B"),
        ("(A) mitochondria – False\n(B) nucleus – True\n(C) ribosome – False\n(D) cilia – False", "B"),
        ("A) mitochondria: This is incorrect.\nB) nucleus: This is the correct answer.", "B"),
        ("A is incorrect, B is correct, C is incorrect, D is incorrect.", "B"),
        ("- A: mitochondria → ✗\n- B: nucleus → ✓\n- C: ribosome → ✗", "B"),
        ("mitochondria - wrong\nnucleus - correct\nribosome - wrong\ncilia - wrong", "B"),
        ("A. mitochondria - correct\nB. nucleus - correct\nC. ribosome - wrong", None),  # two are right
        ("A. mitochondria - correct\nB. nucleus - wrong\nSo the answer is B.", "B"),  # the conclusion outweighs them
        ("Let us look at each option:\nA. mitochondria: wrong\nB. nucleus: right", "B"),
        ("B) nucleus is not correct. C) ribosome is.", "C"),
        ("A：对；B：错；C：错；D：错", "A"),
        ("A.甲 ×\nB.乙 ×\nC.丙 √\nD.丁 ×", "C"),
    ],
)
def test_a_list_that_judges_its_options_names_the_right_one(reply: str, letter: str | None) -> None:
    choices = CELL if reply.isascii() or "mito" in reply else ("甲", "乙", "丙", "丁")
    assert concluded_letter(reply, choices) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A正确；C正确；D正确。B项说法错误，当选。", "B"),
        ("A、C、D项说法正确，不当选；B项说法错误，当选。", "B"),
        ("故B项不当选，D项当选。", "D"),
        ("B选项错误，为本题的正确答案。", "B"),
        ("A、B、D三项均正确，C项错误，符合题意。", "C"),
        ("A不符合题意，B符合题意。", "B"),
        ("甲公司由A当选人大代表的乙设立。", "A"),  # no verdict, and the only letter
    ],
)
def test_the_key_of_a_chinese_exam_may_choose_a_wrong_statement(reply: str, letter: str) -> None:
    assert concluded_letter(reply) == letter


def test_questions_of_the_models_own_are_not_answered() -> None:
    assert concluded_letter("Answer: C\n\nQuestion: What is 2+3?\nAnswer: A") == "C"
    assert concluded_letter("C\n\n交换机工作在____。\nA. 物理层\nB. 数据链路层\n答案：B") == "C"
    assert concluded_letter("Question: 2+3?\nAnswer: B") == "B"  # the question asked, repeated


def test_the_official_reader_of_mmlu_chats(golden: Path) -> None:
    for row in _rows(golden, "chat_mmlu"):
        assert extract.mmlu_processed(row["completion"], row["choices"]) == row["processed"], row
        assert official_mmlu_letter(row["completion"], row["choices"]) == row["pred"], row


def test_the_official_reader_of_ceval_chats(golden: Path) -> None:
    for row in _rows(golden, "chat_ceval"):
        args = row["completion"], row["question"], row["choices"]
        assert extract.ceval_processed(*args) == row["processed"], row
        assert official_ceval_letter(*args) == row["pred"], row


def _rows(golden: Path, name: str) -> list[dict[str, object]]:
    file = golden / "eval" / "extraction" / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"no {file.name} in {golden}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows
    return rows


@pytest.mark.parametrize(
    ("reply", "options", "letter"),
    [
        ("答案是乙。", "甲乙丙丁", "B"),
        ("乙", "甲乙丙丁", "B"),
        ("甲不对，故答案为丙", "甲乙丙丁", "C"),
        ("答案是B。", "是否有无", "B"),  # a letter is a letter, though 是 is an option
        ("The answer is y.", "xyzw", "B"),
        ("The answer is A.", "BADC", "A"),  # the letter, not the words of option B
    ],
)
def test_an_option_of_one_character_is_named_by_it_behind_a_cue(reply: str, options: str, letter: str) -> None:
    assert concluded_letter(reply, tuple(options)) == letter


@pytest.mark.parametrize("mark", ["\u200b", "\ufeff", "\u202e", "\u2060"])
def test_what_nobody_sees_changes_no_reading(mark: str) -> None:
    assert concluded_letter(f"B{mark}") == concluded_letter(f"The answer is {mark}B") == "B"
    assert concluded_number(f"#### {mark}18{mark}") == 18
    assert concluded_answer(f"The answer is {mark}5.") == "5"
    assert concluded_choice(f"So the answer is {mark}yes{mark}.", "No") == "yes"
