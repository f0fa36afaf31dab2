"""What comparisons need of a graded sample: its score, reading and fingerprints; and its row in a baseline."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_eval.core import JSON, ChoiceLogprobs, Completions, Record, TokenLogprobs

MAX_READING = 48  # characters of a reading or gold answer; a longer one is its beginning and a digest
TOKENS_DIGITS = 8  # hex digits of a prompt's token ids that a baseline keeps
BaselineRow = list[JSON]
SCORE_DIGITS = 6  # of a score, here as in a baseline: else a third of a point would differ from itself


@dataclass(frozen=True, kw_only=True)
class Item:
    """One sample of one run. `nll` and `num_tokens` are set for scored text, `choices` (log-probabilities) for choices,
    `counts` where the score is one of the whole corpus (`corpus` names it: BLEU).

    `answer_sha256` is of the answer before anything was read from it: equal answers with other scores were graded
    otherwise, and no chance is in that. `prompt` is the first turn's (later turns depend on the answers), empty where
    only its `prompt_digest` was kept. Long readings and gold answers are shortened by `short_value`.
    """

    id: str
    group: str = ""
    cluster: str = ""
    score: float | None = None
    extracted: JSON = None
    target: JSON = None
    prompt: str = ""
    prompt_digest: str = ""
    prompt_sha256: str = ""
    answer_sha256: str = ""
    nll: float | None = None
    num_tokens: int = 0
    choices: tuple[float, ...] = ()
    corpus: str = ""
    counts: tuple[int, ...] = ()

    @property
    def draw(self) -> str:
        """What is drawn as one: its cluster, or itself."""
        return f"cluster {self.cluster}" if self.cluster else f"item {self.id}"

    @property
    def is_text(self) -> bool:
        """The answer is a text, so that another fingerprint is other words and not the last digit of a number."""
        return self.nll is None and not self.choices

    @property
    def tokens_digest(self) -> str:
        return self.prompt_sha256[:TOKENS_DIGITS]

    @property
    def not_finite(self) -> str:
        """`"score is nan"`: the first number of this sample that is none; empty when all are.

        A choice without any chance (-inf) is a number here: a masked token has that.
        """
        if self.score is not None and not math.isfinite(self.score):
            return f"score is {self.score}"
        if self.nll is not None and not math.isfinite(self.nll):
            return f"log-probability is {-self.nll}"
        odd = next((x for x in self.choices if math.isnan(x) or x == math.inf), None)
        return "" if odd is None else f"log-probability of a choice is {odd}"


def item_of(record: Record) -> Item:
    scored = [answer for answer in record.answers if isinstance(answer, TokenLogprobs)]
    chosen = [answer for answer in record.answers if isinstance(answer, ChoiceLogprobs)]
    num_scored = sum(len(answer.logprobs) for answer in scored)
    weight = int(record.grade.values.get("weight", num_scored))  # tokens a window counts for, in official strided loops
    nll = -_total([x for answer in scored for x in answer.logprobs])
    prompt = record.prompts[0] if record.prompts else ""
    return Item(
        id=record.sample_id,
        group=record.group,
        cluster=record.cluster,
        score=None if record.grade.score is None else round(record.grade.score, SCORE_DIGITS),
        extracted=short_value(record.grade.extracted),
        target=short_value(record.target),
        prompt=prompt,
        prompt_digest=_digest([prompt], 8),
        prompt_sha256=record.prompt_sha256[0] if record.prompt_sha256 else "",
        answer_sha256=_answer_sha256(record),
        nll=nll / num_scored * weight if num_scored else None,
        num_tokens=weight if num_scored else 0,
        choices=chosen[0].logprobs if chosen else (),
        corpus=record.grade.values.get("corpus", ""),
        counts=tuple(record.grade.values.get(record.grade.values.get("corpus", ""), ())),
    )


def items_of(records: Iterable[Record]) -> dict[str, Item]:
    return {record.sample_id: item_of(record) for record in records}


def short_value(value: JSON) -> JSON:
    """The value, or for a long one its beginning and a digest: two values are equal when their short forms are."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return value if len(text) <= MAX_READING else f"{text[: MAX_READING - 10]}… {_digest([text], 8)}"


def choice_kl(first: Sequence[float], second: Sequence[float]) -> float:
    """KL(first || second) in nats of the two distributions over the choices, each normalised over the choices."""
    p, q = _log_softmax(first), _log_softmax(second)
    return max(0.0, math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q) if a > -math.inf))


# --- baseline rows ---------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Item], JSON]] = {
    "id": lambda item: item.id,
    "score": lambda item: _number(item.score, SCORE_DIGITS),
    "read": lambda item: item.extracted,
    "gold": lambda item: item.target,
    "group": lambda item: None if item.group == _folder(item.id) else item.group,  # null: what the id says
    "cluster": lambda item: item.cluster,
    "nll": lambda item: _number(item.nll, 6),
    "num_tokens": lambda item: item.num_tokens,
    "choices": lambda item: [_number(x, 4) for x in item.choices],
    "corpus": lambda item: item.corpus,
    "counts": lambda item: list(item.counts),
    "answer": lambda item: item.answer_sha256,
    "prompt": lambda item: item.prompt_digest,
    "tokens": lambda item: item.tokens_digest,
}


def items_to_rows(items: Iterable[Item]) -> tuple[dict[str, JSON], list[BaselineRow]]:
    """A head and rows of JSON values, sorted by id with numbers as numbers.

    The head is `{"columns": names, "constants": {name: value}}`: a column that is equal everywhere is in no row.
    """
    ordered = sorted(items, key=lambda item: _natural(item.id))
    table = {name: [value(item) for item in ordered] for name, value in COLUMNS.items()}
    constants = {name: column[0] for name, column in table.items() if name != "id" and column and _is_constant(column)}
    names = [name for name in COLUMNS if name not in constants]
    rows = [list(row) for row in zip(*(table[name] for name in names))]
    return {"columns": names, "constants": constants}, rows


def items_from_rows(head: Mapping[str, Any], rows: Iterable[list[Any]]) -> dict[str, Item]:
    """ValueError for a row of another length than the head's columns, or for an id that is there twice."""
    items: dict[str, Item] = {}
    for row in rows:
        cells = {**head["constants"], **dict(zip(head["columns"], row, strict=True))}
        group = _folder(cells["id"]) if cells["group"] is None else cells["group"]
        if cells["id"] in items:
            raise ValueError(f"two rows of {cells['id']}")
        items[cells["id"]] = Item(
            id=cells["id"], group=group, cluster=cells["cluster"], score=_float(cells["score"]),
            extracted=cells["read"], target=cells["gold"], prompt_digest=cells["prompt"], prompt_sha256=cells["tokens"],
            answer_sha256=cells["answer"], nll=_float(cells["nll"]), num_tokens=cells["num_tokens"],
            choices=tuple(-math.inf if x is None else float(x) for x in cells["choices"]),
            corpus=cells.get("corpus", ""), counts=tuple(cells.get("counts", ())),  # older baselines have neither
        )  # fmt: skip
    return items


def _number(value: float | None, digits: int) -> JSON:
    """Rounded, whole numbers without a point; None stays None, and so does what has no chance (-inf)."""
    if value is None or value == -math.inf:
        return None
    return int(value) if value.is_integer() else round(value, digits)


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _natural(sample_id: str) -> list[str | int]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", sample_id))]


def _folder(sample_id: str) -> str:
    return sample_id.rpartition("/")[0]


def _is_constant(column: Sequence[JSON]) -> bool:
    return all(type(value) is type(column[0]) and value == column[0] for value in column)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def _answer_sha256(record: Record) -> str:
    parts: list[str] = []
    for answer in record.answers:
        if isinstance(answer, Completions):
            parts += [completion.text for completion in answer.completions]
        elif isinstance(answer, ChoiceLogprobs):
            parts.append(" ".join(f"{x:.4f}" for x in answer.logprobs))
        else:
            parts.append(f"{_total(answer.logprobs):.3f}")
    return _digest(parts, 12)


def _digest(parts: Sequence[str], digits: int) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:digits]


def _total(values: Sequence[float]) -> float:
    """The sum; NaN when a value is not finite (fsum raises for infinities of both signs)."""
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


def _log_softmax(logprobs: Sequence[float]) -> list[float]:
    top = max(logprobs)
    total = top + math.log(math.fsum(math.exp(x - top) for x in logprobs))
    return [x - total for x in logprobs]
