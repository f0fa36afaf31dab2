"""What comparisons need of a graded sample: its score, reading, prompt and fingerprints. Also the baseline row."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qwen_eval.core import JSON, ChoiceLogprobs, Completions, Record, TokenLogprobs


@dataclass(frozen=True, kw_only=True)
class Item:
    """One sample of one run. `nll` and `num_tokens` are set for scored text, `choices` (log-probabilities) for choices.

    `answer_sha256` is of the answer before anything was read from it: equal answers with other scores were graded
    otherwise, and no chance is in that. `prompt` is the first turn's: later turns depend on the answers.
    """

    id: str
    group: str = ""
    cluster: str = ""
    score: float | None = None
    extracted: JSON = None
    target: JSON = None
    prompt: str = ""
    prompt_sha256: str = ""
    answer_sha256: str = ""
    nll: float | None = None
    num_tokens: int = 0
    choices: tuple[float, ...] = ()

    @property
    def draw(self) -> str:
        """What is drawn as one: its cluster, or itself."""
        return f"cluster {self.cluster}" if self.cluster else f"item {self.id}"


def item_of(record: Record) -> Item:
    scored = [answer for answer in record.answers if isinstance(answer, TokenLogprobs)]
    chosen = [answer for answer in record.answers if isinstance(answer, ChoiceLogprobs)]
    num_scored = sum(len(answer.logprobs) for answer in scored)
    weight = int(record.grade.values.get("weight", num_scored))  # tokens a window counts for, in official strided loops
    nll = -math.fsum(x for answer in scored for x in answer.logprobs)
    return Item(
        id=record.sample_id,
        group=record.group,
        cluster=record.cluster,
        score=record.grade.score,
        extracted=record.grade.extracted,
        target=record.target,
        prompt=record.prompts[0] if record.prompts else "",
        prompt_sha256=record.prompt_sha256[0] if record.prompt_sha256 else "",
        answer_sha256=_answer_sha256(record),
        nll=nll / num_scored * weight if num_scored else None,
        num_tokens=weight if num_scored else 0,
        choices=chosen[0].logprobs if chosen else (),
    )


def items_of(records: Iterable[Record]) -> dict[str, Item]:
    return {record.sample_id: item_of(record) for record in records}


def choice_kl(first: Sequence[float], second: Sequence[float]) -> float:
    """KL(first || second) in nats of the two distributions over the choices, each normalised over the choices."""
    p, q = _log_softmax(first), _log_softmax(second)
    return max(0.0, math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q) if a > -math.inf))


# --- baseline rows ---------------------------------------------------------------------------------------------------


def items_to_rows(items: Iterable[Item]) -> list[dict[str, JSON]]:
    """JSON rows; a prompt is stored as [characters shared with the one before, the rest]: few-shot texts repeat."""
    rows, before = [], ""
    for item in items:
        shared = _common_prefix(before, item.prompt)
        row: dict[str, JSON] = {"id": item.id, "score": item.score, "extracted": item.extracted}
        optional = {
            "target": item.target, "group": item.group, "cluster": item.cluster, "num_tokens": item.num_tokens,
            "nll": None if item.nll is None else round(item.nll, 6), "choices": [round(x, 5) for x in item.choices],
        }  # fmt: skip
        row |= {key: value for key, value in optional.items() if value not in (None, "", [], 0)}
        row |= {"answer": item.answer_sha256, "tokens": item.prompt_sha256, "prompt": [shared, item.prompt[shared:]]}
        rows.append(row)
        before = item.prompt
    return rows


def items_from_rows(rows: Iterable[Mapping[str, JSON]]) -> dict[str, Item]:
    items, before = {}, ""
    for row in rows:
        shared, rest = row["prompt"]
        before = before[:shared] + rest
        items[row["id"]] = Item(
            id=row["id"], group=row.get("group", ""), cluster=row.get("cluster", ""), score=row["score"],
            extracted=row["extracted"], target=row.get("target"), prompt=before, prompt_sha256=row["tokens"],
            answer_sha256=row["answer"], nll=row.get("nll"), num_tokens=row.get("num_tokens", 0),
            choices=tuple(row.get("choices", ())),
        )  # fmt: skip
    return items


def _answer_sha256(record: Record) -> str:
    parts: list[str] = []
    for answer in record.answers:
        if isinstance(answer, Completions):
            parts += [completion.text for completion in answer.completions]
        elif isinstance(answer, ChoiceLogprobs):
            parts.append(" ".join(f"{x:.4f}" for x in answer.logprobs))
        else:
            parts.append(f"{math.fsum(answer.logprobs):.3f}")
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _log_softmax(logprobs: Sequence[float]) -> list[float]:
    top = max(logprobs)
    total = top + math.log(math.fsum(math.exp(x - top) for x in logprobs))
    return [x - total for x in logprobs]


def _common_prefix(first: str, second: str) -> int:
    """Length of the shared beginning, by halving: prompts run to many thousand characters."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low
