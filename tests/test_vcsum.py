"""VCSUM: ROUGE-L as LongBench computes it, the middle cut out of long meetings, every meeting scored."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from report_runs import said

from qwen_eval.core import ConfigError, DataError, Generate, Sample, Turn
from qwen_eval.models.tokenizer import load_tokenizer
from qwen_eval.tasks.registry import TaskContext
from qwen_eval.tasks.vcsum import Vcsum, VcsumSpec, rouge_l, without_middle

DATA = Path(__file__).parent / "data"


def vcsum(*, is_chat: bool = False, facts: dict[str, Any] | None = None, **keys: Any) -> Vcsum:
    context = TaskContext(is_chat=is_chat, tokenizer=load_tokenizer(DATA), model_facts=facts or {})
    return Vcsum(VcsumSpec(**{"data": "bundled", **keys}), context)


def f_of(common: int, of_reply: int, of_reference: int) -> float:
    precision, recall = common / of_reply, common / of_reference
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("reply", "reference", "score"),
    [
        # jieba: 会议 / 讨论 / 了 / 预算 / 问题 - all the same
        ("会议讨论了预算问题", "会议讨论了预算问题", 1.0),
        # 会议 / 讨论 / 了 / 预算 against 会议 / 通过 / 了 / 明年 / 预算: 会议 … 了 … 预算 are common
        ("会议讨论了预算", "会议通过了明年预算", f_of(3, 4, 5)),
        # 预算 / 和 / 会议 against 会议 / 和 / 预算: in another order only one word stays common in order
        ("预算和会议", "会议和预算", f_of(1, 3, 3)),
        ("", "会议讨论了预算", 0.0),
        ("。。。", "会议", 0.0),
    ],
)
def test_rouge_l_of_hand_worked_rows(reply: str, reference: str, score: float) -> None:
    assert rouge_l(reply, reference) == pytest.approx(score, abs=1e-6)


def test_the_english_package_would_give_identical_chinese_texts_nothing() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    text = "会议讨论了预算问题"
    assert RougeScorer(["rougeL"]).score(text, text)["rougeL"].fmeasure == 0
    assert rouge_l(text, text) == pytest.approx(1)


def test_a_long_reply_is_scored_and_leaves_the_interpreter_as_it_was() -> None:
    """The package walks its table by recursion: 1,500 words end in a RecursionError, and LongBench says 0."""
    before = sys.getrecursionlimit()
    reply = "会议讨论了预算。" * 300
    assert 0.5 < rouge_l(reply, "会议讨论了预算。" * 150) < 1.0 + 1e-9
    assert sys.getrecursionlimit() == before


def test_a_flood_is_read_in_bounds() -> None:
    flood = "".join(chr(0x4E00 + i % 3000) + "，" for i in range(40_000))
    assert 0.0 <= rouge_l(flood, "会议讨论了预算") < 0.1


# --- the middle ----------------------------------------------------------------------------------------------------


def test_a_long_prompt_loses_its_middle() -> None:
    task = vcsum(max_prompt_tokens=600)
    sample = task.samples()[0]
    text = task.prompt(sample).text or ""
    ids = task.context.tokenizer.encode(text) if task.context.tokenizer else []
    assert 590 <= len(ids) <= 602  # characters cut in two may cost a token or two more
    assert text.startswith("下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n")
    assert text.endswith("\n\n会议总结：")
    assert "meetings lost their middle to fit 600 tokens" in task.notes[0]


def test_halves_are_cut_from_the_tokens_of_the_whole() -> None:
    tokenizer = load_tokenizer(DATA)
    text = "一二三四五六七八九十" * 20
    ids = tokenizer.encode(text)
    assert without_middle(text, tokenizer, len(ids)) == text
    assert without_middle(text, tokenizer, 11) == tokenizer.decode(ids[:5]) + tokenizer.decode(ids[-5:])


def test_the_length_is_the_checkpoint_s_less_the_reply() -> None:
    assert vcsum(facts={"max_length": 8192}).limit == 8192 - 512
    assert vcsum(facts={"max_length": 8192}, max_prompt_tokens=1000).limit == 1000
    task = vcsum()
    assert task.limit is None
    assert "no length is known" in task.notes[0]
    assert len(task.prompt(task.samples()[0]).text or "") > 4000


def test_in_a_chat_the_template_is_part_of_the_limit() -> None:
    task = vcsum(is_chat=True, max_prompt_tokens=600)
    assert task.context.tokenizer is not None
    assert 580 <= len(task.context.tokenizer.render(task.prompt(task.samples()[0]))) <= 602


# --- grading -------------------------------------------------------------------------------------------------------


def test_the_robust_reading_leaves_thoughts_out() -> None:
    task = vcsum()
    sample = Sample(id="meeting/0", target=["会议讨论了预算"])
    request = Generate(prompt=task.prompt(task.samples()[0]), max_new_tokens=1)
    grade = task.grade(sample, [Turn(request=request, answer=said("<think>先想想看看吧</think>会议讨论了预算"))])
    assert grade.score == pytest.approx(1)
    assert grade.score_upstream is not None
    assert grade.score_upstream < 0.9


def test_rows_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vcsum.jsonl").write_text('{"context": "x", "answers": []}\n', encoding="utf-8")
    with pytest.raises(DataError, match="needs context and answers"):
        vcsum(path=str(tmp_path)).samples()
    with pytest.raises(ConfigError, match="max_prompt_tokens=1"):
        vcsum(max_prompt_tokens=1)
