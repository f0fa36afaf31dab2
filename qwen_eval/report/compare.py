"""Two runs of one benchmark, sample by sample: are they comparable, what changed, and is it more than chance.

The first is the reference, Δ is second minus first. Speed is compared as a ratio on one device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

from qwen_eval.core import ConfigError, Metric
from qwen_eval.corpus import Segment
from qwen_eval.metrics import mean
from qwen_eval.report.comparability import lost_numbers, not_comparable
from qwen_eval.report.comparison import Agreement, Comparison, Divergence, Family, Flip, Margins, Side
from qwen_eval.report.items import Item, choice_kl
from qwen_eval.report.paired import Difference, holm, paired_corpus, paired_mean, paired_perplexity, paired_share
from qwen_eval.report.runs import RunSet, find_runs
from qwen_eval.report.speed import compare_speed
from qwen_eval.runs.run import Run
from qwen_eval.runs.store import HIDDEN

MAX_GROUPS = 40


# --- pairing ---------------------------------------------------------------------------------------------------------


def compare_paths(paths: Sequence[str], margins: Margins | None = None) -> list[Comparison]:
    """`compare=[A,B]`: two run directories, or two trees of them whose runs are paired by task. Holm over all pairs."""
    if len(paths) != 2:
        raise ConfigError(f"compare={list(paths)}: give two run directories, compare=[reference,other]")
    first, second = (find_runs([path]) for path in paths)
    for path, found in zip(paths, (first, second)):
        if not found.runs:
            why = f" ({found.unreadable[0].path}: {found.unreadable[0].reason})" if found.unreadable else ""
            raise ConfigError(f"compare: no run under {path}{why}")
    pairs = _pairs(first, second, paths)
    margins = margins or Margins()
    return adjusted([found for a, b in pairs for found in compare_runs(Side(run=a), Side(run=b), margins)])


def adjusted(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """The same with Holm's p-values over all of them; speed is judged by its margin and takes part in no test."""
    items = list(comparisons)
    p_values = holm([None if c.difference is None or c.family == "speed" else c.difference.p_value for c in items])
    return [replace(c, p_adjusted=p) for c, p in zip(items, p_values)]


def _pairs(first: RunSet, second: RunSet, paths: Sequence[str]) -> list[tuple[Run, Run]]:
    if len(first.runs) == len(second.runs) == 1:
        return [(first.runs[0], second.runs[0])]
    sides: list[dict[tuple[str, str], Run]] = []
    for path, found in zip(paths, (first, second)):
        by_task: dict[tuple[str, str], Run] = {}
        for run in found.runs:
            if (run.kind, run.task) in by_task:
                raise ConfigError(
                    f"compare: {path} holds two runs of {run.task}, {by_task[run.kind, run.task].path} and {run.path}; "
                    "name the run directories themselves"
                )
            by_task[run.kind, run.task] = run
        sides.append(by_task)
    shared = [key for key in sides[0] if key in sides[1]]
    if not shared:
        raise ConfigError(f"compare: {paths[0]} and {paths[1]} share no task")
    return [(sides[0][key], sides[1][key]) for key in shared]


# --- one pair --------------------------------------------------------------------------------------------------------


def compare_runs(first: Side, second: Side, margins: Margins) -> list[Comparison]:
    """One comparison of two runs; of perplexities one for each length, the headline's first; of two profiles one for
    each cell and quantity."""
    if first.run.kind == second.run.kind == "profile":
        return compare_speed(first.run, second.run, margins, _label(first.run, second.run))
    found = compare_sides(first, second, margins)
    if not all(f"ppl/{group}" in first.run.metrics for group, _ in found.by_group) or not found.by_group:
        return [found]
    rows = [_of_length(found, first.run, second.run, group, d) for group, d in found.by_group]
    rows.sort(key=lambda row: row.metric != found.metric)
    return [replace(rows[0], kld=found.kld), *rows[1:]]


def _of_length(c: Comparison, first: Run, second: Run, group: str, difference: Difference) -> Comparison:
    name = f"ppl/{group}"
    return replace(
        c, metric=name, label=f"{c.label}, {group} tokens", first=first.metrics.get(name),
        second=second.metrics.get(name), difference=difference, kld=None,
    )  # fmt: skip


def compare_sides(first: Side, second: Side, margins: Margins) -> Comparison:
    family = _family(first)
    head, other = first.run.headline, second.run.headline
    base = Comparison(
        task=first.run.task,
        label=_label(first.run, second.run),
        family=family,
        metric=head[0] if head else "",
        first=head[1] if head else None,
        second=other[1] if other else None,
        higher_is_better=head[1].higher_is_better if head else True,
        paths=(first.run.path, second.run.path),
        pair=_label(first.run, second.run),
    )
    failures = lost_numbers(first.items, second.items)
    if failures:
        return replace(base, failures=tuple(failures), flips=_flips(first.items, second.items))
    found = not_comparable(first, second, family)
    if found:
        return replace(base, not_comparable=tuple(found))
    return _compare_answers(base, first, second, margins)


def _compare_answers(base: Comparison, first: Side, second: Side, margins: Margins) -> Comparison:
    ids = list(first.items)
    a, b = [first.items[key] for key in ids], [second.items[key] for key in ids]
    difference, notes = _difference(base, a, b)
    flips = _flips(first.items, second.items)
    same = [flip for flip in flips if flip.is_reread]
    gains = sum(flip.is_gain for flip in same)
    if _differs_in_tokens(a, b):
        notes.append("token ids of the prompts differ though their text does not: another tokenizer or special tokens")
    if first.run.is_bundled_sample:
        notes.append("of the sample in the package, not of the whole benchmark")
    kld, why_not = _divergence(first, second)
    return replace(
        base,
        difference=difference,
        by_group=_perplexity_by_group(a, b) if base.family == "ppl" else (),
        margin=_margin(base, margins),
        flips=flips,
        regraded=(gains, len(same) - gains),
        without_rereads=_difference(base, a, _with_old_scores(a, b, same))[0] if gains else None,
        rewritten=tuple(x.id for x, y in zip(a, b) if _is_rewritten(x, y)),
        agreement=_agreement(a, b),
        is_identical=all(_is_identical(x, y) for x, y in zip(a, b)),
        choice_kl=_mean_choice_kl(a, b),
        kld=kld,
        notes=(*notes, *why_not),
    )


def _difference(base: Comparison, a: Sequence[Item], b: Sequence[Item]) -> tuple[Difference | None, list[str]]:
    """The paired test that fits; None where the benchmark has no score per sample (a corpus score)."""
    if base.family == "ppl":
        length = base.metric.rpartition("/")[2]  # the headline is one length's: other lengths are `by_group`
        rows = [(x, y) for x, y in zip(a, b) if x.group == length] or list(zip(a, b))
        return _perplexity([x for x, _ in rows], [y for _, y in rows]), []
    if (name := a[0].corpus if a else "") and all(x.corpus == name for x in (*a, *b)):
        return paired_corpus(name, [_segment(x) for x in a], [_segment(x) for x in b]), []
    pairs = [(x, y) for x, y in zip(a, b) if x.score is not None and y.score is not None]
    if not pairs:
        return None, ["no score per sample: only identical answers can be told"]
    weights, notes = _weights(base.first, [x for x, _ in pairs])
    scores = [[float(x.score or 0) for x, _ in pairs], [float(y.score or 0) for _, y in pairs]]
    clusters: list[Hashable] = [x.draw for x, _ in pairs]
    if base.family == "share" and weights is None:
        return paired_share(scores[0], scores[1], clusters), notes
    factors = weights or [1.0] * len(pairs)
    weighted = [[w * s for w, s in zip(factors, side)] for side in scores]
    return paired_mean(weighted[0], weighted[1], clusters), notes


def _segment(item: Item) -> Segment:
    return Segment(counts=item.counts, group=item.group, cluster=item.draw)


def _margin(base: Comparison, margins: Margins) -> float:
    """On the scale of the difference: points of a share, log of a ratio of perplexities, parts of another mean."""
    margin = margins.of(base.family)
    if base.family == "ppl":
        return math.log1p(margin)
    return margin * (abs(base.first.value) if base.family == "mean" and base.first else 1.0)


def _perplexity(a: Sequence[Item], b: Sequence[Item]) -> Difference:
    rows = [(x, y) for x, y in zip(a, b) if x.nll is not None and y.nll is not None and x.num_tokens]
    first_nll, second_nll = [x.nll or 0.0 for x, _ in rows], [y.nll or 0.0 for _, y in rows]
    return paired_perplexity(first_nll, second_nll, [x.num_tokens for x, _ in rows], [x.draw for x, _ in rows])


def _perplexity_by_group(a: Sequence[Item], b: Sequence[Item]) -> tuple[tuple[str, Difference], ...]:
    groups = list(dict.fromkeys(item.group for item in a))
    if not 1 < len(groups) <= MAX_GROUPS:
        return ()
    parts = {g: [(x, y) for x, y in zip(a, b) if x.group == g] for g in groups}
    return tuple((g, _perplexity([x for x, _ in rows], [y for _, y in rows])) for g, rows in parts.items())


def _weights(headline: Metric | None, items: Sequence[Item]) -> tuple[list[float] | None, list[str]]:
    """Weights of mean 1 that make the mean of scores the headline: None if it is, 1 / group size for a macro mean."""
    groups: dict[str, list[float]] = defaultdict(list)
    for item in items:
        groups[item.group].append(item.score or 0.0)
    plain = math.fsum(item.score or 0.0 for item in items) / len(items)
    macro = math.fsum(math.fsum(g) / len(g) for g in groups.values()) / len(groups)
    if headline is None or math.isclose(plain, headline.value, abs_tol=1e-6):
        return None, []
    if math.isclose(macro, headline.value, abs_tol=1e-6):
        return [len(items) / (len(groups) * len(groups[item.group])) for item in items], []
    return None, ["Δ is over samples; the headline is put together otherwise"]


# --- pieces ----------------------------------------------------------------------------------------------------------


def _family(side: Side) -> Family:
    head = side.run.headline
    if head is not None and head[1].kind == "ppl":
        return "ppl"
    scores = [item.score for item in side.items.values() if item.score is not None]
    is_share = head is None or head[1].kind == "share"
    return "share" if is_share and all(0.0 <= score <= 1.0 for score in scores) else "mean"


def _label(first: Run, second: Run) -> str:
    names = [f"{run.label} {run.variant}" for run in (first, second)]
    return names[0] if names[0] == names[1] else f"{names[0]} → {names[1]}"


def _flips(first: Mapping[str, Item], second: Mapping[str, Item]) -> tuple[Flip, ...]:
    pairs = [(item, second[key]) for key, item in first.items() if key in second]
    return tuple(Flip(id=x.id, first=x, second=y) for x, y in pairs if _flipped(x, y))


def _with_old_scores(first: Sequence[Item], second: Sequence[Item], flips: Sequence[Flip]) -> list[Item]:
    """The second side as if what was read otherwise had kept its score."""
    ids = {flip.id for flip in flips}
    return [replace(y, score=x.score, counts=x.counts) if y.id in ids else y for x, y in zip(first, second)]


def _is_rewritten(first: Item, second: Item) -> bool:
    return first.is_text and first.answer_sha256 != second.answer_sha256 and first.score == second.score


def _flipped(first: Item, second: Item) -> bool:
    return first.score is not None and second.score is not None and first.score != second.score


def _is_identical(first: Item, second: Item) -> bool:
    if first.nll is not None and second.nll is not None:
        return math.isclose(first.nll, second.nll, rel_tol=1e-6, abs_tol=1e-5)
    return first.score == second.score and first.extracted == second.extracted


def _agreement(first: Sequence[Item], second: Sequence[Item]) -> Agreement:
    pairs = list(zip(first, second))
    has_scores = any(item.score is not None for item in first)
    return Agreement(
        num_samples=len(pairs),
        same_answers=sum(x.answer_sha256 == y.answer_sha256 for x, y in pairs),
        same_readings=sum(x.extracted == y.extracted for x, y in pairs) if has_scores else None,
        same_scores=sum(x.score == y.score for x, y in pairs) if has_scores else None,
        is_text=not any(item.choices or item.nll is not None for item in first),
    )


def _differs_in_tokens(first: Sequence[Item], second: Sequence[Item]) -> bool:
    return any(x.tokens_digest != y.tokens_digest for x, y in zip(first, second))


def _mean_choice_kl(first: Sequence[Item], second: Sequence[Item]) -> Metric | None:
    rows = [(x, choice_kl(x.choices, y.choices)) for x, y in zip(first, second) if len(x.choices) == len(y.choices) > 1]
    if not rows:
        return None
    draws = [x.draw for x, _ in rows]
    return mean([value for _, value in rows], draws, unit="nats", higher_is_better=False, is_positive=True)


def _divergence(first: Side, second: Side) -> tuple[Divergence | None, list[str]]:
    """Exact KLD where both runs kept hidden states; torch is not imported for others."""
    if not all((side.run.path / HIDDEN).is_dir() for side in (first, second)):
        return None, []
    from qwen_eval.report.kld import divergence_of_runs

    return divergence_of_runs(first, second)
