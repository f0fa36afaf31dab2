"""The records of a run as a pandas table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwen_eval.core import ChoiceLogprobs, Completions, Record, TokenLogprobs

if TYPE_CHECKING:
    import pandas

COLUMNS = {
    "sample_id": "unique within the task",
    "group": "subject, category or length",
    "score": "1.0 or 0.0 for right or wrong, None where the task scores no single sample",
    "extracted": "the answer extracted from the reply",
    "target": "the gold answer",
    "reply": "the generated text of the last turn; None for scored texts and choices",
    "choice_logprobs": "log-probabilities of the choices, in nats",
    "logprob": "total log-probability of a scored text, in nats",
    "num_scored_tokens": "of a scored text",
    "prompt": "the rendered prompt of the first turn",
    "num_prompt_tokens": "over all turns",
    "flags": "truncated, empty, looping, no_answer ...",
    "score_upstream": "the score with the official script's extraction",
    "extracted_upstream": "what the official script would extract",
}


def frame_of(records: Sequence[Record]) -> pandas.DataFrame:
    import pandas  # takes longer than the rest of a start

    rows = [_row(record) for record in records]
    names = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
    frame: pandas.DataFrame = pandas.DataFrame(rows, columns=list(names))
    return frame


def _row(record: Record) -> dict[str, Any]:
    grade, answer = record.grade, record.answers[-1] if record.answers else None
    scored = answer if isinstance(answer, TokenLogprobs) else None
    return {
        "sample_id": record.sample_id,
        "group": record.group,
        "score": grade.score,
        "extracted": grade.extracted,
        "target": record.target,
        "reply": answer.text if isinstance(answer, Completions) else None,
        "choice_logprobs": answer.logprobs if isinstance(answer, ChoiceLogprobs) else None,
        "logprob": None if scored is None else math.fsum(scored.logprobs),
        "num_scored_tokens": None if scored is None else len(scored.logprobs),
        "prompt": record.prompts[0] if record.prompts else "",
        "num_prompt_tokens": sum(record.num_prompt_tokens),
        "flags": grade.flags,
        "score_upstream": grade.score_upstream,
        "extracted_upstream": grade.extracted_upstream,
        **{f"values.{name}": value for name, value in grade.values.items()},
    }
