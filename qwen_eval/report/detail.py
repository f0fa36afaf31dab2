"""Tables of what changed between two runs: the samples that flipped, and what became of the distributions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from qwen_eval.core import JSON
from qwen_eval.report.comparison import Agreement, Comparison
from qwen_eval.report.gate import judgement_table
from qwen_eval.report.verdict import joint, judge_all
from qwen_eval.tables import Cell, Table, number_cell, text_cell

MAX_TEXT = 60


def compare_tables(comparisons: Sequence[Comparison], *, num_flips: int = 20) -> list[Table]:
    judgements = judge_all(list(comparisons))
    verdicts = judgement_table(judgements, title="What changed", sides=("first", "second"))
    if sum(judgement.decision is not None for judgement in judgements) > 1:
        verdicts = replace(verdicts, notes=(*verdicts.notes, f"All tasks: {joint(judgements)}."))
    tables = [verdicts]
    tables += what_was_compared(comparisons)
    tables += distributions(comparisons)
    for comparison in comparisons:
        tables += flips(comparison, num_flips)
    return tables


def what_was_compared(comparisons: Sequence[Comparison]) -> list[Table]:
    """How many samples agree in what: the same answer is more than the same reading of it, and that than its score."""
    rows = []
    for c in comparisons:
        found = c.agreement
        if found is not None:
            counts = (found.num_samples, found.same_answers, found.same_readings, found.same_scores)
            numbers = [number_cell(n, 0) for n in counts]
            rows.append((text_cell(c.task), text_cell(c.label), *numbers, text_cell(finding(found))))
    columns = ("task", "what", "samples", "same answer", "same reading", "same score", "finding")
    notes = (
        "same answer: character for character, of choices and scored text the log-probabilities to four decimals.",
        "same reading: what was extracted from the answer. A finding is of these samples, not of others.",
    )
    title = "What was compared"
    table = Table(name="compared", title=title, columns=columns, rows=tuple(rows), notes=notes, num_keys=2)
    return [table] if rows else []


def finding(found: Agreement) -> str:
    """`identical` only where every answer is; else the first of reading and score that has no difference."""
    n = found.num_samples
    if found.same_answers == n and found.same_readings in (n, None) and found.same_scores in (n, None):
        return "identical"
    what = "in other words" if found.is_text else "with other log-probabilities"
    if found.same_scores is None or found.same_readings is None:
        return f"{n - found.same_answers:,} of {n:,} {what}"
    if found.same_scores < n:
        return f"{n - found.same_scores:,} of {n:,} scores differ"
    if found.same_readings < n:
        return f"no difference in the scores, {n - found.same_readings:,} of {n:,} answers were read differently"
    return f"no difference in what was read, {n - found.same_answers:,} of {n:,} answers {what}"


def distributions(comparisons: Sequence[Comparison]) -> list[Table]:
    """KL of the choice distribution; KLD, its percentiles and top-1 agreement where both runs keep hidden states."""
    kept = [c for c in comparisons if c.choice_kl is not None or c.kld is not None]
    if not kept:
        return []
    columns = ("task", "choice KL (nats)", "KLD (nats)", "median", "99 %", "99.9 %", "max", "same top token", "n")
    rows = []
    for c in kept:
        kld = c.kld
        percentiles = [Cell(text="–")] * 4
        if kld is not None:
            percentiles = [number_cell(kld.percentiles[key], 4) for key in ("50", "99", "99.9", "100")]
        choice = c.choice_kl
        rows.append((
            text_cell(c.task), _nats(choice.value, choice.low, choice.high, choice.n) if choice else text_cell(None),
            _nats(kld.mean, kld.low, kld.high, kld.num_tokens) if kld else text_cell(None), *percentiles,
            Cell(text=f"{kld.top1_agreement:.2%}", value=kld.top1_agreement) if kld else text_cell(None),
            number_cell(kld.num_tokens if kld else choice.n if choice else None, 0),
        ))  # fmt: skip
    notes = ("choice KL: of the distributions over the choices; KLD: over the whole vocabulary, per token.",)
    optional = ("median", "99.9 %")
    return [Table(name="kl", title="Distributions", columns=columns, rows=tuple(rows), notes=notes, optional=optional)]


def flips(comparison: Comparison, limit: int) -> list[Table]:
    """Samples whose score changed, losses first, at most `limit` of each direction."""
    if not comparison.flips:
        return []
    lost = [flip for flip in comparison.flips if not flip.is_gain]
    gained = [flip for flip in comparison.flips if flip.is_gain]
    rows = []
    for flip in [*lost[:limit], *gained[:limit]]:
        first, second = (f"{_short(item.extracted)} ({item.score:g})" for item in (flip.first, flip.second))
        note = "same words, read differently" if flip.is_reread else ""
        tone = "good" if flip.is_gain else "bad"
        rows.append((
            text_cell(flip.id), text_cell(flip.first.group), text_cell("gained" if flip.is_gain else "lost", tone=tone),
            text_cell(_short(flip.first.target)), text_cell(first), text_cell(second), text_cell(note),
        ))  # fmt: skip
    columns = ("sample", "group", "direction", "gold", "first (score)", "second (score)", "note")
    hidden = len(comparison.flips) - len(rows)
    notes = (f"{hidden} more; num_flips= shows them.",) if hidden else ()
    title = f"{comparison.task}: {len(lost)} lost, {len(gained)} gained"
    name, optional = f"flips-{comparison.task}", ("note", "group")
    return [Table(name=name, title=title, columns=columns, rows=tuple(rows), notes=notes, optional=optional)]


def _nats(value: float, low: float | None, high: float | None, n: int) -> Cell:
    interval = "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"
    return Cell(text=f"{value:.4f}{interval}", value=value, low=low, high=high, n=n)


def _short(value: JSON) -> str:
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
