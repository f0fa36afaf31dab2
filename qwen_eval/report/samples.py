"""The samples an HTML report carries: compact rows that its script unpacks, safe to embed in a script element."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from qwen_eval.core import JSON, Answer, ChoiceLogprobs, Completions, Record
from qwen_eval.report.comparison import Comparison
from qwen_eval.report.formulas import formulas
from qwen_eval.runs.run import Run

HEAD_CHARS, TAIL_CHARS = 6_000, 6_000  # of a long prompt: 32K tokens of haystack help nobody in a browser
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
# lone surrogates, control characters, overrides of the writing direction, invisible tags
OBEYED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")


def sample_data(runs: Sequence[Run], *, max_samples: int, comparisons: Sequence[Comparison] = ()) -> dict[str, JSON]:
    """`{"runs": [...], "left_out": n, "start": key}`; each run keeps its first when there are over `max_samples`.

    A run that was compared names its `reference` by key. A baseline has no texts: it comes as a run of its changed
    samples alone, with reading and score. `start` is the run that lost most.
    `formulas` are those of prompts and answers.
    """
    kept = [run for run in runs if run.kind == "eval" and run.records]
    share = _share([len(run.records) for run in kept], max_samples)
    left_out = sum(max(0, len(run.records) - share) for run in kept)
    keys = run_keys(kept)
    found = {keys[run.path]: {"key": keys[run.path], **_run(run, share)} for run in kept}
    for comparison in comparisons:
        if len(comparison.paths) == 2 and (key := keys.get(comparison.paths[1])):
            reference = keys.get(comparison.paths[0])
            if reference is None and (comparison.flips or comparison.rewritten):
                reference = f"{key}.baseline"
                found[reference] = _baseline(comparison, reference)
            found[key]["reference"] = reference
    texts = (text for run in kept for record in run.records[:share] for text in _texts(record))
    most = max(comparisons, key=lambda c: (c.losses, c.gains), default=None)
    start = keys.get(most.paths[1]) if most and most.flips and len(most.paths) == 2 else None
    return {"runs": list(found.values()), "left_out": left_out, "start": start, "formulas": formulas(texts)}


def _texts(record: Record) -> list[str]:
    answers = [item.text for answer in record.answers if isinstance(answer, Completions) for item in answer.completions]
    return [elided(record.prompts[0] if record.prompts else "")[-TAIL_CHARS:], *map(elided, answers)]


def run_keys(runs: Sequence[Run]) -> dict[Path, str]:
    """What names a run in a link: `"gsm8k.qwen-7b-chat.default"`, with a number where that repeats."""
    keys: dict[Path, str] = {}
    for run in runs:
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{run.task}.{run.model}.{run.tag}")
        others = sum(key.partition("~")[0] == name for key in keys.values())
        keys[run.path] = f"{name}~{others + 1}" if others else name
    return keys


def _baseline(comparison: Comparison, key: str) -> dict[str, JSON]:
    items = [flip.first for flip in comparison.flips]
    rows: list[JSON] = [
        [x.id, x.group, _text(x.target), 0, "", [], _text(x.extracted), None, _number(x.score), None, [], []]
        for x in items
    ]
    rows += [[name, "", None, 0, "", [], None, None, None, None, ["rewritten"], []] for name in comparison.rewritten]
    return {
        "key": key, "label": "baseline of", "variant": comparison.pair.partition(" → ")[0], "task": comparison.task,
        "state": "", "rows": rows, "is_baseline": True,
    }  # fmt: skip


def _share(sizes: Sequence[int], room: int) -> int:
    """The most samples of one run so that all fit: what short runs leave is the long ones' to use. At least 1."""
    share = room
    for i, size in enumerate(sorted(sizes)):
        share = room // (len(sizes) - i)
        if size > share:
            break
        room -= size
        share = size
    return max(1, share)


def embeddable(value: JSON) -> str:
    """JSON that cannot end a script element, open a comment or an entity, whatever text is in it."""
    text = json.dumps(_harmless(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029]", lambda match: ESCAPES[match[0]], text)


def _harmless(value: JSON) -> JSON:
    """The same with U+FFFD for every character that a reader would not see but a browser would obey."""
    if isinstance(value, str):
        return value if value.isprintable() else OBEYED.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {str(_harmless(key)): _harmless(item) for key, item in value.items()}
    return [_harmless(item) for item in value] if isinstance(value, (list, tuple)) else value


def _run(run: Run, limit: int) -> dict[str, JSON]:
    rows, before = [], ""
    for record in run.records[:limit]:
        prompt = elided(record.prompts[0] if record.prompts else "")
        shared = _shared(before, prompt)
        rows.append(_row(record, shared, prompt[shared:]))
        before = prompt
    return {"label": run.label, "variant": run.variant, "task": run.task, "state": run.status_note, "rows": rows}


def _row(record: Record, shared: int, rest: str) -> list[JSON]:
    grade = record.grade
    answers = [
        [elided(prompt) if turn else "", _answer(answer)]
        for turn, (prompt, answer) in enumerate(zip(record.prompts, record.answers))
    ]
    return [
        record.sample_id, record.group, _text(record.target), shared, rest, answers, _text(grade.extracted),
        _text(grade.extracted_upstream), _number(grade.score), _number(grade.score_upstream), list(grade.flags),
        list(record.num_prompt_tokens),
    ]  # fmt: skip


def _answer(answer: Answer) -> JSON:
    if isinstance(answer, Completions):
        return {"texts": [[item.text, item.finish_reason, item.num_tokens] for item in answer.completions]}
    if isinstance(answer, ChoiceLogprobs):
        return {"choices": [_number(x) for x in answer.logprobs]}
    nll = -math.fsum(answer.logprobs)
    return {"nll": _number(nll), "num_tokens": len(answer.logprobs), "num_greedy": answer.num_greedy}


def elided(text: str) -> str:
    """The text, or its two ends with the number of characters between them."""
    hidden = len(text) - HEAD_CHARS - TAIL_CHARS
    if hidden <= 0:
        return text
    return f"{text[:HEAD_CHARS]}\n\n[… {hidden:,} characters left out …]\n\n{text[-TAIL_CHARS:]}"


def needle_cells(records: Iterable[Record]) -> dict[tuple[int, float], list[float]]:
    """Scores by (context length, depth in per cent) where the grades say them; empty for other benchmarks."""
    cells: dict[tuple[int, float], list[float]] = {}
    for record in records:
        values = record.grade.values
        length = next((values[k] for k in ("context_tokens", "length", "num_tokens") if k in values), None)
        depth = next((values[k] for k in ("depth_percent", "depth") if k in values), None)
        if isinstance(length, (int, float)) and isinstance(depth, (int, float)) and record.grade.score is not None:
            cells.setdefault((int(length), float(depth)), []).append(record.grade.score)
    return cells


def _text(value: JSON) -> str | None:
    return value if isinstance(value, str) or value is None else json.dumps(value, ensure_ascii=False)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _shared(first: str, second: str) -> int:
    """Characters both begin with; never half of a surrogate pair in JavaScript, whose strings count UTF-16 units."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low if first[:low].isascii() else _utf16(first, low)


def _utf16(text: str, length: int) -> int:
    # beyond the first character outside the BMP JavaScript's indices differ from Python's: stop before it
    beyond = next((i for i, c in enumerate(text[:length]) if ord(c) > 0xFFFF), None)
    return length if beyond is None else beyond
