"""VCSUM: summaries of Chinese meetings, ROUGE-L, as LongBench asks and scores it (https://arxiv.org/abs/2308.14508)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from qwen_eval.config import TaskSpec
from qwen_eval.core import JSON, ConfigError, DataError, Grade, Metric, Prompt, Record, Sample, Tokenizer, Turn
from qwen_eval.corpus import MAX_CHARACTERS, cut_words
from qwen_eval.data.rows import Source
from qwen_eval.extraction.symptoms import answer_part, completions_of, flags
from qwen_eval.metrics import share
from qwen_eval.tasks.generation import GenerativeTask
from qwen_eval.tasks.registry import TaskContext

if TYPE_CHECKING:
    from rouge import Rouge

TEMPLATE = "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结："
FILES = ("vcsum.jsonl", "data/vcsum.jsonl", "vcsum.jsonl.gz", "vcsum_test_longbench_form.jsonl.gz")
MAX_WORDS = 2_000  # of a summary that are compared: gold ones have some 200, and the table of both must fit in memory


@dataclass(kw_only=True)
class VcsumSpec(TaskSpec):
    name: str = "vcsum"
    hub_id: str | None = "THUDM/LongBench"
    split: str = "test"
    max_new_tokens: int = 512
    max_prompt_tokens: int | None = None  # longer prompts lose their middle; null: what the checkpoint states


class Vcsum(GenerativeTask[VcsumSpec]):
    Spec = VcsumSpec
    version = 1

    def __init__(self, spec: VcsumSpec, context: TaskContext):
        super().__init__(spec, context)
        if spec.shots:
            raise ConfigError(f"task.shots={spec.shots}: vcsum is asked without examples")
        if spec.max_prompt_tokens is not None and spec.max_prompt_tokens < 2:
            raise ConfigError(f"task.max_prompt_tokens={spec.max_prompt_tokens}: at least 2, or null")
        self.limit = context.prompt_limit(spec.max_prompt_tokens, self.reply_tokens)
        self._num_cut: dict[str, bool] = {}

    def rows(self, source: Source) -> list[Sample]:
        samples = []
        for i, row in enumerate(source.jsonl(*FILES)):
            if (
                not isinstance(row.get("context"), str)
                or not isinstance(row.get("answers"), list)
                or not row["answers"]
            ):
                raise DataError(f"{source.origin} row {i + 1}: needs context and answers, as LongBench has them")
            samples.append(Sample(id=f"meeting/{i}", data={"context": row["context"]}, target=row["answers"]))
        return samples

    # --- asking ---

    def prompt(self, sample: Sample) -> Prompt:
        text = TEMPLATE.replace("{context}", sample.data["context"])
        if self.limit is not None and self.context.tokenizer is not None:
            kept = without_middle(text, self.context.tokenizer, self.limit - self._frame)
            self._num_cut[sample.id] = kept != text
            text = kept
        return Prompt.user(text) if self.is_chat else Prompt.raw(text)

    @property
    def _frame(self) -> int:
        """Tokens that the chat template puts around the text."""
        tokenizer = self.context.tokenizer
        return len(tokenizer.render(Prompt.user(""))) if self.is_chat and tokenizer is not None else 0

    # --- grading ---

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        completion = completions_of(turns[0])[0]
        text = answer_part(completion.text).strip()
        robust, upstream = (best_rouge_l(reply, sample.target) for reply in (text, completion.text))
        return Grade(
            score=robust,
            extracted=text,
            extracted_upstream=completion.text,
            score_upstream=upstream,
            flags=flags(completion, has_answer=bool(text)),
        )

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        rows = list(records)
        metrics = {"rouge_l": share([row.grade.score for row in rows])}
        if not self.is_upstream:
            metrics["rouge_l_upstream"] = share([row.grade.score_upstream for row in rows])
        return metrics

    @property
    def notes(self) -> list[str]:
        if self.limit is None or self.context.tokenizer is None:
            return ["no length is known of this model, so no meeting was cut; task.max_prompt_tokens= sets one"]
        num_cut = sum(self._num_cut.values())
        return [f"{num_cut} of {len(self._num_cut)} meetings lost their middle to fit {self.limit} tokens"] * (
            num_cut > 0
        )

    def describe(self) -> Mapping[str, JSON]:
        return {**super().describe(), "max_prompt_tokens": self.limit}


def without_middle(text: str, tokenizer: Tokenizer, limit: int) -> str:
    """The text, or its first and its last `limit // 2` tokens, decoded apart and joined: LongBench's truncation."""
    ids = tokenizer.encode(text)
    if len(ids) <= limit:
        return text
    half = limit // 2
    if half < 1:
        raise ConfigError(f"task.max_prompt_tokens: {limit} tokens are left for the text, at least 2 are needed")
    return tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])


def best_rouge_l(reply: str, references: Sequence[str]) -> float:
    return max(rouge_l(reply, reference) for reference in references)


def rouge_l(reply: str, reference: str) -> float:
    """ROUGE-L F of the package `rouge` over words cut by jieba; 0 where one of the texts has none."""
    hypothesis, gold = (_first_words(text) for text in (reply, reference))
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 2 * MAX_WORDS + 2_000))  # the package walks its table by recursion
    try:
        return float(_rouge().get_scores([hypothesis], [gold], avg=True)["rouge-l"]["f"])
    except ValueError:  # its word for an empty text; an error is 0 in LongBench
        return 0.0
    finally:
        sys.setrecursionlimit(before)


def _first_words(text: str) -> str:
    return " ".join(cut_words(text[:MAX_CHARACTERS]).split(" ")[:MAX_WORDS])


@cache
def _rouge() -> Rouge:
    from rouge import Rouge

    return Rouge(metrics=["rouge-l"])
