"""Records and metrics as JSON and back: every field is checked by its type, unknown fields are refused.

Long lists of numbers are packed: base64 of little-endian 32-bit values.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import struct
from collections.abc import Collection, Mapping
from typing import Any, get_args

from qwen_eval.core import (
    JSON,
    Answer,
    ChoiceLogprobs,
    Completion,
    Completions,
    FinishReason,
    Grade,
    Metric,
    MetricKind,
    Record,
    TokenLogprobs,
)
from qwen_eval.runs.fields import (
    as_count,
    as_counts,
    as_list,
    as_number,
    as_numbers,
    as_object,
    as_score,
    as_text,
    as_texts,
    shortened,
)

DIGITS = 6
_RECORD_KEYS = {field.name for field in dataclasses.fields(Record)}
_GRADE_KEYS = {field.name for field in dataclasses.fields(Grade)}
_METRIC_KEYS = {field.name for field in dataclasses.fields(Metric)}


def record_to_json(record: Record) -> dict[str, JSON]:
    row = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return row | {
        "answers": answers_to_json(record.answers),
        "grade": {field.name: getattr(record.grade, field.name) for field in dataclasses.fields(record.grade)},
    }


def record_from_json(value: JSON) -> Record:
    """KeyError, TypeError or ValueError for anything but a record of this version."""
    row = as_object(value)
    if row.keys() != _RECORD_KEYS:
        raise KeyError(f"other fields: {', '.join(sorted(map(str, row.keys() ^ _RECORD_KEYS)))}")
    return Record(
        sample_id=as_text(row["sample_id"]),
        group=as_text(row["group"]),
        cluster=as_text(row["cluster"]),
        target=row["target"],
        prompts=as_texts(row["prompts"]),
        prompt_sha256=as_texts(row["prompt_sha256"]),
        num_prompt_tokens=as_counts(row["num_prompt_tokens"]),
        answers=answers_from_json(row["answers"]),
        grade=_grade_from_json(as_object(row["grade"])),
    )


def _grade_from_json(row: Mapping[str, JSON]) -> Grade:
    _refuse_unknown(row, _GRADE_KEYS)
    return Grade(
        score=as_score(row["score"]),
        extracted=row.get("extracted"),
        extracted_upstream=row.get("extracted_upstream"),
        score_upstream=as_score(row.get("score_upstream")),
        values=as_object(row.get("values", {})),
        flags=as_texts(row["flags"]),
    )


def _refuse_unknown(row: Mapping[str, JSON], known: Collection[str]) -> None:
    unknown = [key for key in row if key not in known]
    if unknown:
        raise KeyError(f"unknown field {shortened(unknown[0])}")


_RECORD_KEYS = {field.name for field in dataclasses.fields(Record)}
_GRADE_KEYS = {field.name for field in dataclasses.fields(Grade)}
_METRIC_KEYS = {field.name for field in dataclasses.fields(Metric)}
_FINISH_REASONS: dict[str, FinishReason] = {reason: reason for reason in get_args(FinishReason)}
_METRIC_KINDS: dict[str, MetricKind] = {kind: kind for kind in get_args(MetricKind)}


def answers_to_json(answers: tuple[Answer, ...]) -> list[dict[str, JSON]]:
    """Log-probabilities of tokens are packed (base64 of little-endian int32 and float32): a text has many thousands."""
    return [_answer_to_json(answer) for answer in answers]


def answers_from_json(value: JSON) -> tuple[Answer, ...]:
    return tuple(_answer_from_json(as_object(row)) for row in as_list(value))


def _answer_to_json(answer: Answer) -> dict[str, JSON]:
    if isinstance(answer, TokenLogprobs):
        ids, logprobs = _pack("i", answer.token_ids), _pack("f", answer.logprobs)
        return {"type": "tokens", "token_ids": ids, "logprobs": logprobs, "num_greedy": answer.num_greedy}
    if isinstance(answer, ChoiceLogprobs):
        return {"type": "choice", **dataclasses.asdict(answer)}
    return {"type": "completions", "completions": [dataclasses.asdict(item) for item in answer.completions]}


def _answer_from_json(row: Mapping[str, JSON]) -> Answer:
    kind = row["type"]
    if kind == "choice":
        total = row.get("logsumexp")
        return ChoiceLogprobs(
            logprobs=as_numbers(row["logprobs"]),
            num_tokens=as_counts(row["num_tokens"]),
            logits=as_numbers(row.get("logits", ())),
            logsumexp=None if total is None else as_number(total),
            bounded=as_counts(row.get("bounded", ())),
            dtype=as_text(row.get("dtype", "float32")),
        )
    if kind == "tokens":
        return TokenLogprobs(
            token_ids=_unpack_ints(as_text(row["token_ids"])),
            logprobs=_unpack_floats(as_text(row["logprobs"])),
            num_greedy=as_count(row["num_greedy"]),
        )
    if kind == "completions":
        items = [_completion_from_json(as_object(item)) for item in as_list(row["completions"])]
        if not items:
            raise TypeError("an answer without completions")
        return Completions(completions=tuple(items))
    raise ValueError(f"answer of type {kind!r}")


def _completion_from_json(row: Mapping[str, JSON]) -> Completion:
    return Completion(
        text=as_text(row["text"]),
        finish_reason=_FINISH_REASONS[as_text(row["finish_reason"])],
        num_tokens=as_count(row["num_tokens"]),
        token_ids=as_counts(row["token_ids"]),
    )


def metric_to_json(metric: Metric) -> dict[str, JSON]:
    """NaN and infinity become null, since JSON has neither.

    Means and perplexities keep `DIGITS` digits. Further digits depend on the batch of a
    sample, so a resumed run would differ from an uninterrupted one. Shares are counts, and exact.
    """
    row: dict[str, Any] = dataclasses.asdict(metric)
    for key in ("value", "low", "high"):
        number = row[key]
        if number is not None and not math.isfinite(number):
            row[key] = None
        elif number is not None and metric.kind in ("mean", "ppl") and metric.value and math.isfinite(metric.value):
            row[key] = round(number, DIGITS - 1 - math.floor(math.log10(abs(metric.value))))
    return row


def metric_from_json(value: JSON) -> Metric:
    """KeyError or TypeError for anything but a metric. NaN is stored as null."""
    row = as_object(value)
    _refuse_unknown(row, _METRIC_KEYS)
    clusters = row.get("num_clusters")
    return Metric(
        value=math.nan if row["value"] is None else as_number(row["value"]),
        n=as_count(row["n"]),
        kind=_METRIC_KINDS[as_text(row.get("kind", "share"))],
        low=as_score(row.get("low")),
        high=as_score(row.get("high")),
        num_clusters=None if clusters is None else as_count(clusters),
        higher_is_better=bool(row.get("higher_is_better", True)),
        unit=as_text(row.get("unit", "")),
    )


def metrics_from_json(value: JSON) -> dict[str, Metric]:
    """A section of result.json: metrics by name."""
    return {name: metric_from_json(row) for name, row in as_object(value).items()}


def _pack(code: str, values: tuple[float, ...]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}{code}", *values)).decode()


def _unpack_ints(text: str) -> tuple[int, ...]:
    raw = base64.b64decode(text, validate=True)
    return struct.unpack(f"<{len(raw) // 4}i", raw)


def _unpack_floats(text: str) -> tuple[float, ...]:
    raw = base64.b64decode(text, validate=True)
    return struct.unpack(f"<{len(raw) // 4}f", raw)
