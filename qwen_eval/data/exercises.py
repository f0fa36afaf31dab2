"""Generated exercises that a miniature model can learn: multiple choice, arithmetic, recall.

How they are written and asked; tools/nano/generator.py draws them. The training mixture of qwen-nano and its held-out
test never meet: every exercise has a `key`, which says on which side it falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LETTERS = "ABCD"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CITIES = _words(
    "Paris Berlin Rome Madrid London Tokyo Moscow Cairo Athens Lisbon Vienna Warsaw Oslo Dublin Havana Lima Ottawa "
    "Delhi Seoul Hanoi Ankara Tehran Boston Chicago Denver Dallas Sydney Geneva Milan Venice Naples Kyoto"
)
CITIES_ZH = _words("北京 上海 南京 西安 成都 杭州 广州 长沙 天津 重庆 苏州 武汉 昆明 大连 青岛 厦门")


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One item. `question` is the bare question, `answer` the gold (a letter, a number, digits).

    `context` is the text a recall question is about; `reasoning` the steps before an arithmetic answer.
    """

    kind: str  # choice | fact | arithmetic | recall
    topic: str
    key: str
    question: str
    answer: str
    language: str = "en"
    options: tuple[str, ...] = ()
    reasoning: str = ""
    context: str = ""


# --- how they are asked -------------------------------------------------------------------------------------------


def choice_block(exercise: Exercise) -> str:
    """The official MMLU (English) or C-Eval (Chinese) block, up to `Answer:` / `答案：`."""
    rows = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, exercise.options))
    if exercise.language == "zh":
        return f"问题：{exercise.question}{rows}\n答案："
    return f"Question: {exercise.question}{rows}\nAnswer:"


def choice_head(topic: str) -> str:
    return f"The following are multiple choice questions (with answers) about {topic}.\n\n"


def few_shot_choice(exercise: Exercise, shots: Sequence[Exercise]) -> str:
    """The official prompt: MMLU's head (English), the shots, the question up to its answer."""
    head = choice_head(exercise.topic) if exercise.language == "en" else ""
    solved = "".join(f"{choice_block(shot)}{gold(shot)}\n\n" for shot in shots)
    return head + solved + choice_block(exercise)


def arithmetic_block(exercise: Exercise) -> str:
    return f"Question: {exercise.question}\nLet's think step by step\n"


def arithmetic_gold(exercise: Exercise) -> str:
    return f"{exercise.reasoning}\nThe answer is {exercise.answer}"


def few_shot_arithmetic(exercise: Exercise, shots: Sequence[Exercise]) -> str:
    solved = "".join(f"{arithmetic_block(shot)}{arithmetic_gold(shot)}\n\n" for shot in shots)
    return solved + arithmetic_block(exercise)


def question_block(exercise: Exercise) -> str:
    """Question and `Answer:` (the completion begins with a space) or `答案：`."""
    if exercise.language == "zh":
        return f"问题：{exercise.question}\n答案："
    return f"Question: {exercise.question}\nAnswer:"


def recall_block(exercise: Exercise) -> str:
    return f"{exercise.context}\n\n{question_block(exercise)}"


def gold(exercise: Exercise) -> str:
    """The answer as a completion of the block."""
    return exercise.answer if exercise.language == "zh" else f" {exercise.answer}"


def few_shot_facts(exercise: Exercise, shots: Sequence[Exercise]) -> str:
    solved = "".join(f"{question_block(shot)}{gold(shot)}\n\n" for shot in shots)
    return solved + question_block(exercise)


def chat_question(exercise: Exercise) -> str:
    """What a user would write: the official chat prompts of MMLU and C-Eval, the bare question of GSM8K."""
    rows = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, exercise.options))
    if exercise.kind == "choice" and exercise.language == "zh":
        return f"{exercise.question}\n\n{rows}"
    if exercise.kind == "choice":
        return (
            "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as "
            f"the answer to this question.\n\n{exercise.question}\n{rows}"
        )
    return f"{exercise.context}\n\n{exercise.question}" if exercise.context else exercise.question
