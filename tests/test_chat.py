"""Chat turns against the original's outputs, and what the default protocol does better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_eval.models.chat import decode_reply, fitting_history, is_forced_to_end, make_context, stop_words
from qwen_eval.models.tokenizer import QwenTokenizer, read_ranks


@pytest.fixture(scope="module")
def qwen() -> QwenTokenizer:
    return QwenTokenizer(read_ranks(Path(__file__).parent / "data" / "qwen.tiktoken"))


def golden_rows(golden: Path, name: str) -> list[dict[str, Any]]:
    file = golden / "tokenizer" / name
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_contexts_equal_the_original(golden: Path, qwen: QwenTokenizer) -> None:
    for row in golden_rows(golden, "make_context.jsonl"):
        raw_text, ids = row.pop("raw_text"), row.pop("context_tokens")
        query = row.pop("query")
        text, tokens = make_context(qwen, query, **{**row, "history": row["history"] or []})
        assert tokens == ids
        assert text == raw_text


def test_upstream_decoding_equals_the_original(golden: Path, qwen: QwenTokenizer) -> None:
    for row in golden_rows(golden, "decode_tokens.jsonl"):
        expected = (row.pop("text"), row.pop("end_reason"))
        assert decode_reply(qwen, row.pop("tokens"), **row, protocol="upstream") == expected


def test_stop_words_equal_the_original(golden: Path, qwen: QwenTokenizer) -> None:
    for row in golden_rows(golden, "stop_words.jsonl"):
        forced = [is_forced_to_end(ids, row["stop_words_ids"], eos_id=row["eos_token_id"]) for ids in row["input_ids"]]
        assert forced == row["forced_eos"]


def test_stop_words_of_both_formats(golden: Path, qwen: QwenTokenizer) -> None:
    file = golden / "tokenizer" / "special.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    for chat_format, ids in json.loads(file.read_text())["stop_words_ids"].items():
        assert stop_words(qwen, chat_format) == ids


def reply_of(qwen: QwenTokenizer, question: str, reply: list[int], protocol: Any) -> str:
    text, context = make_context(qwen, question)
    tokens = [*context, *reply]
    kwargs = {"context_length": len(context), "raw_text_len": len(text), "protocol": protocol}
    return decode_reply(qwen, tokens, **kwargs)[0]


def test_a_reply_cut_by_the_length_limit_keeps_its_last_token(qwen: QwenTokenizer) -> None:
    reply = qwen.encode("The answer is 42")
    assert reply_of(qwen, "Q", reply, "robust") == "The answer is 42"
    assert reply_of(qwen, "Q", reply, "upstream") == "The answer is 4"


def test_a_question_that_nfc_shortens_does_not_eat_the_reply(qwen: QwenTokenizer) -> None:
    reply = [*qwen.encode("Yes."), qwen.im_end_id, qwen.endoftext_id]
    assert reply_of(qwen, "cafe\u0301?", reply, "robust") == "Yes."
    assert reply_of(qwen, "cafe\u0301?", reply, "upstream") == "es."


def test_a_reply_ends_at_endoftext_too(qwen: QwenTokenizer) -> None:
    reply = [*qwen.encode("Yes."), qwen.endoftext_id, *qwen.encode("Noise")]
    assert reply_of(qwen, "Q", reply, "robust") == "Yes."


def test_padding_ids_in_a_reply_do_not_lose_it(qwen: QwenTokenizer) -> None:
    reply = [*qwen.encode("Yes"), 151900, qwen.im_end_id]
    assert reply_of(qwen, "Q", reply, "robust") == "Yes"
    with pytest.raises(KeyError):
        reply_of(qwen, "Q", reply, "upstream")


def test_why_a_reply_ended(qwen: QwenTokenizer) -> None:
    assert decode_reply(qwen, [5, 32, qwen.im_end_id], context_length=1) == ("A", "Gen '<|im_end|>'")
    assert decode_reply(qwen, [5, 32, 33], context_length=1) == ("AB", "Gen length 3")
    assert decode_reply(qwen, [5], context_length=1) == ("", "Gen length 1")


def test_the_newest_history_is_kept_strictly_under_the_window(qwen: QwenTokenizer) -> None:
    history = [("a", "b"), ("c", "d")]
    # system 5 = <|im_start|> system \n x <|im_end|>; an exchange 2 * 5 + 2 line breaks
    sizes = {17: [], 18: [("c", "d")], 29: [("c", "d")], 30: history}
    for window, kept in sizes.items():
        assert list(fitting_history(qwen, history, system="x", max_window_size=window)) == kept
