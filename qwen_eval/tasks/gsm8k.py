"""GSM8K: grade-school arithmetic, exact match on the final number (https://arxiv.org/abs/2110.14168).

Base models get the official eight worked examples; chat models the bare question, up to four examples in one message
(`shots=4`, the official script's), or up to eight as earlier turns (`shots=8`, as OpenCompass asks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from qwen_eval.config import TaskSpec
from qwen_eval.core import ConfigError, DataError, Grade, Message, Prompt, Sample, Turn
from qwen_eval.data.rows import Source
from qwen_eval.extraction.numbers import (
    UPSTREAM_GOLD,
    concluded_number,
    upstream_base_gold,
    upstream_base_number,
    upstream_chat_equal,
    upstream_chat_number,
    written,
)
from qwen_eval.extraction.symptoms import completions_of, cut, flags
from qwen_eval.tasks.generation import GenerativeTask, prompt_text

BASE_QUERY = "\nQuestion: {question}\nLet's think step by step\n"
CHAT_QUERY = "Question: {question}\nLet's think step by step"
TURN_QUERY = CHAT_QUERY + "\nAnswer:"  # OpenCompass's, whose examples are turns
OFFICIAL_CHAT_SHOTS = 4  # of the official chat script, in one message
UPSTREAM_CUTS = ("<|endoftext|>", "\n\n\n", "\n\n", "Question:")
STOPS = ("Question:", "\n\n\n")  # both are among the official cuts, so the official reading stays the same


@dataclass(kw_only=True)
class Gsm8kSpec(TaskSpec):
    name: str = "gsm8k"
    hub_id: str | None = "openai/gsm8k"
    split: str = "test"
    shots: int = -1  # -1: the official number, 8 for base models and 0 in chats; chats take up to 8
    max_new_tokens: int = 512


class Gsm8k(GenerativeTask[Gsm8kSpec]):
    Spec = Gsm8kSpec
    version = 2

    @property
    def shots(self) -> int:
        return self.spec.shots if self.spec.shots >= 0 else (0 if self.is_chat else 8)

    def rows(self, source: Source) -> list[Sample]:
        split = self.spec.split
        rows = source.hub_rows("main", split) if source.is_hub else source.jsonl(f"{split}.jsonl", f"{split}.jsonl.gz")
        samples = []
        for i, row in enumerate(rows):
            gold = UPSTREAM_GOLD.search(str(row.get("answer")))
            if "question" not in row or not gold:
                raise DataError(f"{source.origin} row {i + 1}: no question with an answer that ends in '#### number'")
            target = gold[1].replace(",", "").rstrip(".")
            samples.append(Sample(id=f"{split}/{i}", data=row, target=target))
        return samples

    def prompt(self, sample: Sample) -> Prompt:
        question = sample.data["question"]
        if not self.is_chat:
            return Prompt.raw(_examples("gsm8k_8shot.txt", self.shots) + BASE_QUERY.replace("{question}", question))
        if self.shots == 0:
            return Prompt.user(question)
        if self.shots > OFFICIAL_CHAT_SHOTS:
            return Prompt(messages=(*_turns(self.shots), Message(role="user", content=_asked(question))))
        return Prompt.user(_examples("gsm8k_4shot.txt", self.shots) + CHAT_QUERY.replace("{question}", question))

    def stops(self) -> tuple[str, ...]:
        return STOPS

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        completion = completions_of(turns[0])[0]
        answer = concluded_number(completion.text)
        is_right = answer == Fraction(sample.target)
        read_upstream, is_right_upstream = self._upstream(sample, completion.text)
        return Grade(
            score=float(is_right),
            extracted=written(answer),
            extracted_upstream=read_upstream,
            score_upstream=float(is_right_upstream),
            flags=flags(completion, has_answer=answer is not None),
        )

    def _upstream(self, sample: Sample, text: str) -> tuple[str | None, bool]:
        """What the official script reads, and whether it counts as right."""
        if self.is_chat:
            read = upstream_chat_number(text)
            return read, upstream_chat_equal(read, upstream_chat_number(sample.data["answer"]))
        number = upstream_base_number(cut(text, UPSTREAM_CUTS))
        return str(number), number == upstream_base_gold(sample.data["answer"])


def _asked(question: str) -> str:
    return TURN_QUERY.replace("{question}", question)


def _turns(shots: int) -> list[Message]:
    """The first `shots` of the official eight examples, each asked and answered in a turn."""
    turns: list[Message] = []
    for example in _examples("gsm8k_8shot.txt", shots).strip().split("\n\nQuestion:"):
        question, _, answer = example.removeprefix("Question:").partition("\nLet's think step by step\n")
        turns.append(Message(role="user", content=_asked(question.strip())))
        turns.append(Message(role="assistant", content=answer.strip()))
    return turns


def _examples(file: str, shots: int) -> str:
    """The first `shots` worked examples of an official file, as they stand there."""
    examples = prompt_text(file).split("\n\nQuestion:")
    if shots > len(examples):
        raise ConfigError(f"task.shots={shots}: the official prompt has {len(examples)} examples")
    if shots == len(examples):
        return prompt_text(file)
    end = "\n\n" if file == "gsm8k_4shot.txt" else "\n"
    return "\n\nQuestion:".join(examples[:shots]) + end if shots else ""
