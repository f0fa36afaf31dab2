"""The certificate in words: one sentence, one table, one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_eval.ship.config import ShipSpec
from qwen_eval.ship.standing import ShipVerdict, Standing
from qwen_eval.tables import Cell, Table, p_cell, text_cell

TONES = {"ship": "good", "do not ship": "bad", "not decided": "weak"}


def sentence(verdict: ShipVerdict, standings: Sequence[Standing], spec: ShipSpec) -> str:
    """The answer with its margin: `"ship: qwen-nano in bf16 is not worse than ... by more than 1 point on nano"`."""
    known = {standing.task: standing for standing in standings}
    names = f"{spec.candidate.name}{variant(spec)}"
    if verdict.word == "do not ship":
        broken = [task for task, word in verdict.by_task.items() if word == "do not ship"]
        return (
            f"do not ship: {names} is worse than {spec.reference.name} by more than the margin on {', '.join(broken)}"
        )
    if verdict.word == "ship":
        word = "equivalent to" if verdict.is_equivalent else "not worse than"
        return f"ship: {names} is {word} {spec.reference.name} within {margins(standings)} on {', '.join(known)}"
    left = [task for task, word in verdict.by_task.items() if word == "not decided"]
    return f"not decided: {'; '.join(_missing(task, known.get(task)) for task in left)}"


def variant(spec: ShipSpec) -> str:
    """What is told apart by its keys where both sides have one name: `" (dtype=bf16)"`."""
    if spec.reference.name != spec.candidate.name:
        return ""
    changed = [
        f"{key}={_flat(value)}" for key, value in vars(spec.candidate).items() if value != getattr(spec.reference, key)
    ]
    return f" ({', '.join(changed)})" if changed else " (unchanged)"


def _flat(value: Any) -> str:
    return ",".join(f"{key}={item}" for key, item in vars(value).items()) if hasattr(value, "__dict__") else str(value)


def _missing(task: str, standing: Standing | None) -> str:
    if standing is None:
        return f"{task} was not begun"
    if standing.kind == "texts":
        return f"{task} needs more texts than it has"
    if standing.needed is None:
        return f"{task} needs more items"
    return f"{task} has {standing.num_items:,} of about {standing.needed:,} items that would decide"


def margins(standings: Sequence[Standing]) -> str:
    return " and ".join(dict.fromkeys(margin_text(standing) for standing in standings))


def margin_text(standing: Standing) -> str:
    if standing.kind == "texts":
        return f"{math.expm1(standing.margin) * 100:.3g} % of perplexity"
    points = standing.margin * 100
    return f"{points:.3g} point{'s' * (points != 1)}"


def change_text(standing: Standing, value: float) -> str:
    """`"-0.4"` points of a score; `"+0.3 %"` of a perplexity."""
    if math.isinf(value):
        return "–"
    if standing.kind == "texts":
        return f"{math.expm1(-value) * 100:+.2f} %"
    return f"{value * 100 + 0.0:+.2f}"  # no -0.00


def certificate_tables(
    verdict: ShipVerdict, standings: Sequence[Standing], spec: ShipSpec, notes: Sequence[str]
) -> list[Table]:
    rows = tuple(_row(verdict, standing, spec.alpha) for standing in standings)
    columns = (
        "task",
        "answer",
        "items",
        "change",
        "at least",
        "at most",
        "lost",
        "gained",
        "not worse",
        "worse",
        "not better",
    )
    certain = f"{100 * (1 - spec.alpha):g} %"
    said = (
        "Change: candidate less reference, points of a score or per cent of a perplexity.",
        f"At least, at most: each is sure to {certain}.",
        "Not worse, worse, not better: p-values against the margin, valid whenever one looks.",
        *notes,
    )
    head = Table(name="certificate", title=sentence(verdict, standings, spec), columns=columns, rows=rows, notes=said,
                 optional=("not better", "worse", "not worse", "gained", "lost"))  # fmt: skip
    return [head]


def look_tables(standings: Sequence[Standing]) -> list[Table]:
    """The evidence at every look, a table a task."""
    columns = ("items", "change", "not worse", "worse", "not better")
    return [
        Table(
            name=f"looks-{standing.task}",
            title=f"{standing.task}: the evidence at every look",
            columns=columns,
            rows=tuple(
                (_count(look.items), text_cell(change_text(standing, look.delta)), p_cell(look.not_worse),
                 p_cell(look.worse), p_cell(look.not_better))
                for look in standing.looks
            ),
        )
        for standing in standings
    ]  # fmt: skip


def _row(verdict: ShipVerdict, standing: Standing, alpha: float) -> tuple[Cell, ...]:
    word = verdict.by_task[standing.task]
    text = "ship, equivalent" if word == "ship" and standing.is_equivalent(alpha) else word
    ends = [standing.low, standing.high]
    if standing.kind == "texts":
        ends.reverse()  # a perplexity is better when it is lower
    return (
        text_cell(standing.task),
        text_cell(text, tone=TONES[word]),
        text_cell(f"{standing.num_items:,} of {standing.size:,}"),
        *(text_cell(change_text(standing, value)) for value in (standing.delta, *ends)),
        _count(standing.num_lost),
        _count(standing.num_gained),
        *(p_cell(value) for value in (standing.last.not_worse, standing.last.worse, standing.last.not_better)),
    )


def _count(value: int) -> Cell:
    return Cell(text=f"{value:,}", value=float(value))


def failed_notes(failed: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    """`failed`: task -> side -> ids of items whose numbers were not finite."""
    return [
        f"{task}: {len(ids)} item{'s' * (len(ids) > 1)} of the {side} failed on numbers that are not finite and "
        f"score 0, such as {ids[0]}"
        for task, sides in failed.items()
        for side, ids in sides.items()
        if ids
    ]
