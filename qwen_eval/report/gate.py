"""The regression gate: every baseline against the run of today, one verdict a task, an exit code for CI.

Exit codes: 0 nothing got worse; 1 something did; 3 nothing did, but something could not be compared or is missing.
"Cannot tell" passes: it says that n is too small for the change at hand, and how large a change would have shown.
A damaged run or baseline is named and judged "not comparable"; the others are judged all the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from qwen_eval.core import StoreError
from qwen_eval.report.baseline import Accepted, Key, key_of, load_baselines
from qwen_eval.report.compare import adjusted, compare_runs
from qwen_eval.report.comparison import Comparison, Margins, Side
from qwen_eval.report.paired import Difference
from qwen_eval.report.runs import Unreadable, find_runs
from qwen_eval.report.verdict import Judgement, judge_all, shown
from qwen_eval.runs.integrity import damage
from qwen_eval.runs.run import Run
from qwen_eval.tables import Cell, Table, metric_cell, p_cell, text_cell

MAX_NAMED = 10  # changed samples of one kind that are named in text
TONES = {"worse": "bad", "better": "good", "not comparable": "bad", "cannot tell": "weak", "unchanged": ""}
WORDS = {
    "worse": "changed for the worse", "better": "changed for the better", "unchanged": "unchanged",
    "cannot tell": "cannot tell at this n", "not comparable": "not comparable",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """`new` runs have no baseline yet; `unreadable` directories were passed over and are named."""

    judgements: tuple[Judgement, ...]
    new: tuple[Run, ...]
    unreadable: tuple[Unreadable, ...]

    @property
    def exit_code(self) -> int:
        verdicts = {judgement.verdict for judgement in self.judgements}
        return 1 if "worse" in verdicts else 3 if "not comparable" in verdicts else 0

    @property
    def summary(self) -> str:
        counts: Counter[str] = Counter(judgement.verdict for judgement in self.judgements)
        text = ", ".join(f"{counts[verdict]} {word}" for verdict, word in WORDS.items() if counts[verdict])
        return f"{'FAILED' if self.exit_code else 'passed'}: {text}"


def gate(baselines: Path, runs: Sequence[str], margins: Margins | None = None) -> GateReport:
    """Compare each baseline with the run of the same kind, task, model and tag under `runs`."""
    margins = margins or Margins()
    found = find_runs(runs)
    by_key: dict[Key, list[Run]] = {}
    for run in found.runs:
        by_key.setdefault(key_of(run), []).append(run)
    stored = load_baselines(baselines)
    comparisons = [_unreadable_baseline(item) for item in stored.unreadable]
    for side in stored.sides:
        key = key_of(side.run)
        comparisons += _against(side, by_key.get(key, []), _at(key, found.unreadable), margins)
    known = {key_of(side.run) for side in stored.sides}
    return GateReport(
        judgements=tuple(judge_all(adjusted(comparisons))),
        new=tuple(run for key, members in by_key.items() if key not in known for run in members),
        unreadable=found.unreadable,
    )


def _against(
    baseline: Side, candidates: Sequence[Run], unreadable: Sequence[Unreadable], margins: Margins
) -> list[Comparison]:
    reasons = [f"{item.path}: {item.reason}" for item in unreadable]
    if len(candidates) > 1:
        reasons.append(f"{len(candidates)} runs of it: " + ", ".join(str(run.path) for run in candidates))
    reasons += [f"{run.path} is damaged: {found}" for run in candidates if (found := damage(run.path))]
    if not candidates and not reasons:
        reasons = ["no run of it was found"]
    if reasons:
        return [_not_comparable(baseline, reasons)]
    try:
        return compare_runs(baseline, Side(run=candidates[0]), margins)
    except StoreError as error:  # an unfinished run whose records cannot be read
        return [_not_comparable(baseline, [str(error)])]


def _not_comparable(baseline: Side, reasons: Sequence[str]) -> Comparison:
    head = baseline.run.headline
    return Comparison(
        task=baseline.run.task, label=f"{baseline.run.label} {baseline.run.variant}", family="share",
        metric=head[0] if head else "", first=head[1] if head else None, second=None, not_comparable=tuple(reasons),
        paths=(baseline.run.path,),
    )  # fmt: skip


def _unreadable_baseline(item: Unreadable) -> Comparison:
    parts = item.path.parts
    task, model = (parts[-3], parts[-2]) if len(parts) >= 3 else (item.path.name, "")
    return Comparison(
        task=task,
        label=model,
        family="share",
        first=None,
        second=None,
        not_comparable=(item.reason,),
        paths=(item.path,),
    )


def _at(key: Key, unreadable: Sequence[Unreadable]) -> list[Unreadable]:
    """Directories without a readable spec that lie where a run of this key would."""
    return [item for item in unreadable if item.path.parts[-4:] == key]


# --- what it looks like ----------------------------------------------------------------------------------------------


def gate_tables(report: GateReport, title: str = "Regression gate") -> list[Table]:
    tables = [judgement_table(report.judgements, title=f"{title} {report.summary}")]
    tables += changed_samples(report.judgements)
    others = [
        (text_cell(run.path), text_cell("no baseline yet", tone="weak"), text_cell("accept= it")) for run in report.new
    ]
    others += [
        (text_cell(item.path), text_cell("unreadable", tone="bad"), text_cell(item.reason))
        for item in report.unreadable
    ]
    if others:
        tables.append(
            Table(name="others", title="Not in the gate", columns=("directory", "state", "why"), rows=tuple(others))
        )
    return tables


def accepted_tables(accepted: Sequence[Accepted], margins: Margins) -> list[Table]:
    """What new baselines change against those that they replace, judged as the gate does."""
    pairs = [(item.before, item.now) for item in accepted if isinstance(item.before, Side)]
    judgements = judge_all(adjusted([c for before, now in pairs for c in compare_runs(before, now, margins)]))
    if not judgements:
        return []
    return [judgement_table(judgements, title="Against the baselines before"), *changed_samples(judgements)]


def judgement_table(
    judgements: Sequence[Judgement], *, title: str, sides: tuple[str, str] = ("before", "now")
) -> Table:
    """One row a comparison: both scores, Δ with its interval, p, flips both ways, what would show, the verdict."""
    columns = (
        "task", "what", "verdict", *sides, "Δ [95 %]", "p (Holm)", "lost / gained", "would show", "by the margin",
        "why",
    )  # fmt: skip
    rows = tuple(_row(judgement) for judgement in judgements)
    notes: tuple[str, ...] = (
        "would show: the smallest change for the worse found four times of five at this n and spread.",
    )
    notes += tuple(dict.fromkeys(f"{j.comparison.task}: {note}" for j in judgements for note in j.comparison.notes))
    optional = ("would show", "lost / gained", "p (Holm)", *sides)
    return Table(name="verdicts", title=title, columns=columns, rows=rows, notes=notes, optional=optional, num_keys=2)


def changed_samples(judgements: Sequence[Judgement]) -> list[Table]:
    """The first samples that were lost, gained or changed their text, by name."""
    rows = [
        (text_cell(j.comparison.task), text_cell(j.comparison.label), text_cell(change), text_cell(str(len(ids))),
         text_cell(named(ids)))
        for j in judgements
        for change, ids in changed_ids(j.comparison).items()
        if ids
    ]  # fmt: skip
    columns = ("task", "what", "change", "samples", f"the first {MAX_NAMED}")
    notes = ("changed text: other words with the same score. compare=[BEFORE,NOW] shows readings and gold answers.",)
    return [Table(name="changed", title="Changed samples", columns=columns, rows=tuple(rows), notes=notes)] * bool(rows)


def changed_ids(comparison: Comparison) -> Mapping[str, Sequence[str]]:
    return {
        "lost": [flip.id for flip in comparison.flips if not flip.is_gain],
        "gained": [flip.id for flip in comparison.flips if flip.is_gain],
        "changed text": comparison.rewritten,
    }


def named(ids: Sequence[str]) -> str:
    more = len(ids) - MAX_NAMED
    return ", ".join(ids[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _row(judgement: Judgement) -> tuple[Cell, ...]:
    c = judgement.comparison
    decision = judgement.decision
    flips = f"{c.losses} / {c.gains}" if c.flips or c.family == "share" else "–"
    return (
        text_cell(c.task), text_cell(c.label), text_cell(WORDS[judgement.verdict], tone=TONES[judgement.verdict]),
        metric_cell(c.first), metric_cell(c.second), delta_cell(c, c.difference), p_cell(c.p_adjusted),
        text_cell("–" if c.not_comparable else flips), text_cell(shown(c, judgement.mde)),
        text_cell(decision.text if decision else None), text_cell(judgement.why),
    )  # fmt: skip


def delta_cell(c: Comparison, d: Difference | None) -> Cell:
    """`-1.2 [-4.4, +1.9]` in the unit of the comparison; its values are fractions where that is per cent or points."""
    if d is None:
        return text_cell(None)
    text = shown(c, d.delta, sign=True).removesuffix(" points")
    if d.low is not None and d.high is not None:
        low, high = (shown(c, x, sign=True).removesuffix(" points").removesuffix(" %") for x in (d.low, d.high))
        text += f" [{low}, {high}]"
    is_ratio = c.family == "ppl"
    value, low_end, high_end = (math.expm1(x) if is_ratio and x is not None else x for x in (d.delta, d.low, d.high))
    title = f"{d.test}, n = {d.n:,}, {d.num_clusters:,} independent draws"
    return Cell(text=text, value=value, low=low_end, high=high_end, n=d.n, p=d.p_value, title=title)


def junit(report: GateReport) -> str:
    """JUnit XML: worse is a failure, not comparable an error, cannot tell a skipped test with its reason."""
    counts = Counter(judgement.verdict for judgement in report.judgements)
    suite = ElementTree.Element(
        "testsuite", name="qwen_eval gate", tests=str(len(report.judgements)), failures=str(counts["worse"]),
        errors=str(counts["not comparable"]), skipped=str(counts["cannot tell"]),
    )  # fmt: skip
    for judgement in report.judgements:
        c = judgement.comparison
        case = ElementTree.SubElement(suite, "testcase", classname=f"gate.{c.task}", name=_xml(c.label or c.task))
        kind = {"worse": "failure", "not comparable": "error", "cannot tell": "skipped"}.get(judgement.verdict)
        said = f"{WORDS[judgement.verdict]}: {judgement.why}"
        lines = [f"{change} ({len(ids)}): {named(ids)}" for change, ids in changed_ids(c).items() if ids]
        if kind is not None:
            ElementTree.SubElement(case, kind, message=_xml(said)).text = _xml("\n".join(lines)) or None
        else:
            ElementTree.SubElement(case, "system-out").text = _xml("\n".join([said, *lines]))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """XML 1.0 has no control characters, not even escaped; lone surrogates are no text at all."""
    return "".join(
        c if c in "\t\n" or (c >= " " and not 0xD800 <= ord(c) <= 0xDFFF and c not in "￾￿") else "?" for c in text
    )
