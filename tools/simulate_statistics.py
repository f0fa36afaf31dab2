"""How often the tests cry wolf and the intervals cover the truth, with few and uneven documents: docs/statistics.md.

    python tools/simulate_statistics.py                  # 10,000 draws a cell, some minutes
    python tools/simulate_statistics.py --draws 1000     # a short look
    python tools/simulate_statistics.py --correlations 0.7 -0.7

A draw is a benchmark of so many documents, their sizes log-normal with the given standard deviation of the logarithm
(about 0.7 in real collections), and the effect of a change on each: independent of its size, or correlated with the
logarithm of its size (0.5 and -0.5). The average effect over all tokens or questions that could be drawn is 0, so every
rejection is a false alarm, and intervals should hold 0.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from qwen_eval.core import Metric
from qwen_eval.metrics import cluster_variance, perplexity, share
from qwen_eval.report.paired import LEVEL, Difference, paired_share

Array = NDArray[np.float64]
NUM_DOCUMENTS = (5, 10, 25)
SIZE_SPREADS = (0.0, 0.7, 1.2)
CORRELATIONS = (0.0, 0.5, -0.5)
QUESTIONS = 6  # the median number of questions of a document
EFFECT = 0.02  # standard deviation of the effect on a document, nats per token


@dataclass(frozen=True, kw_only=True)
class Cell:
    documents: int
    size_spread: float
    correlation: float = 0.0
    has_giant: bool = False  # one document is as large as all the others together

    @property
    def sizes(self) -> str:
        if self.has_giant:
            return "one holds half"
        return f"sd {self.size_spread}" if self.size_spread else "equal"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """`errors`: rejections at the level of the tests, None where none was made. `covered`: 95 % intervals that hold."""

    errors: float | None
    covered: float


def cells(correlations: Sequence[float] = CORRELATIONS) -> Iterator[Cell]:
    for documents in NUM_DOCUMENTS:
        for spread in SIZE_SPREADS:
            for correlation in correlations if spread else (0.0,):
                yield Cell(documents=documents, size_spread=spread, correlation=correlation)
        yield Cell(documents=documents, size_spread=0.0, has_giant=True)


def drawn(rng: np.random.Generator, cell: Cell, draws: int) -> tuple[Array, Array]:
    """Relative sizes and standardised effects, [draws, documents]; the effects weighted by size are 0 in the mean."""
    logs = rng.normal(0.0, 1.0, (draws, cell.documents))
    noise = rng.normal(0.0, 1.0, (draws, cell.documents))
    # a log-normal size moves the weighted mean of its own logarithm by its variance
    common = logs - cell.size_spread
    effects = cell.correlation * common + math.sqrt(1 - cell.correlation**2) * noise
    sizes = np.exp(cell.size_spread * logs)
    if cell.has_giant:
        sizes[:, 0] = sizes[:, 1:].sum(-1)
    return sizes, effects


def perplexity_ratio(rng: np.random.Generator, cell: Cell, draws: int) -> Rates:
    """Two models, NLL of the same tokens: the t test over documents and its interval of the log ratio."""
    from scipy.special import stdtrit

    sizes, effects = drawn(rng, cell, draws)
    tokens = 1000.0 * sizes
    sums = EFFECT * effects * tokens + 0.2 * np.sqrt(tokens) * rng.normal(size=tokens.shape)
    variance, dof = cluster_variance(sums, tokens)
    t = np.abs(sums.sum(-1) / tokens.sum(-1)) / np.sqrt(variance)
    return Rates(
        errors=float(np.mean(t > stdtrit(dof, 1 - LEVEL / 2))), covered=float(np.mean(t <= stdtrit(dof, 0.975)))
    )


def one_perplexity(rng: np.random.Generator, cell: Cell, draws: int) -> Rates:
    """One model, 2.5 nats per token with a standard deviation of 0.4 between documents: the interval of perplexity."""
    sizes, effects = drawn(rng, cell, draws)
    truth, hits = math.exp(2.5), 0
    for tokens, nll in zip(1000.0 * sizes, 2.5 + 0.4 * effects):
        hits += _holds(perplexity((nll * tokens).tolist(), tokens.tolist()), truth)
    return Rates(errors=None, covered=hits / draws)


def questions(rng: np.random.Generator, cell: Cell, draws: int, scale: float) -> tuple[NDArray[np.int64], Array]:
    """Numbers of questions and shifts of the chance of each, [draws, documents]; over all questions the mean is 0."""
    return _questions(rng, cell, draws, scale, centre=_centre(cell, scale))


def _questions(
    rng: np.random.Generator, cell: Cell, draws: int, scale: float, *, centre: float
) -> tuple[NDArray[np.int64], Array]:
    sizes, effects = drawn(rng, cell, draws)
    numbers = np.maximum(1, np.rint(QUESTIONS * sizes)).astype(np.int64)
    return numbers, np.clip(scale * effects, -0.4, 0.4) - centre


@cache
def _centre(cell: Cell, scale: float) -> float:
    """What whole numbers of questions and the clipping move the mean by, from two million documents."""
    numbers, shifts = _questions(np.random.default_rng(5), cell, 2_000_000 // cell.documents, scale, centre=0.0)
    return float((numbers * shifts).sum() / numbers.sum())


def answers_compared(rng: np.random.Generator, cell: Cell, draws: int) -> Rates:
    """Two models, questions in documents: 5 % fall either way, a document moves by 0.1; sign flip, interval of Δ."""
    errors = tests = hits = 0
    for numbers, shifts in zip(*questions(rng, cell, draws, 0.1)):
        clusters = np.repeat(np.arange(len(numbers)), numbers)
        change, chance = shifts[clusters], rng.random(len(clusters))
        gained, lost = chance < 0.05 + np.maximum(change, 0.0), chance > 0.95 - np.maximum(-change, 0.0)
        found = paired_share((~gained).astype(float).tolist(), (~lost).astype(float).tolist(), clusters.tolist())
        tests += found.p_value is not None
        errors += found.p_value is not None and found.p_value <= LEVEL
        hits += _holds(found, 0.0)
    return Rates(errors=errors / draws if tests else None, covered=hits / draws)


def one_share(rng: np.random.Generator, cell: Cell, draws: int) -> Rates:
    """One model, 60 % right, documents easier or harder by 0.15: the interval of the share."""
    hits = 0
    for numbers, shifts in zip(*questions(rng, cell, draws, 0.15)):
        clusters = np.repeat(np.arange(len(numbers)), numbers)
        scores = (rng.random(len(clusters)) < np.clip(0.6 + shifts[clusters], 0.0, 1.0)).astype(float)
        hits += _holds(share(scores.tolist(), clusters.tolist()), 0.6)
    return Rates(errors=None, covered=hits / draws)


def _holds(found: Metric | Difference, truth: float) -> bool:
    return found.low is not None and found.high is not None and found.low <= truth <= found.high


STUDIES: dict[str, Callable[[np.random.Generator, Cell, int], Rates]] = {
    "perplexity ratio": perplexity_ratio, "answers compared": answers_compared, "one perplexity": one_perplexity,
    "one share": one_share,
}  # fmt: skip

TESTED = ("perplexity ratio", "answers compared")  # the others are intervals alone


def table(draws: int, seed: int, correlations: Sequence[float]) -> Iterator[str]:
    """Lines of Markdown: for each cell the false alarms of the tests and the coverage of the intervals, in per cent."""
    columns = ["perplexity ratio: errors", "covered", "answers compared: errors", "covered"]
    columns += ["one perplexity: covered", "one share: covered"]
    yield f"| documents | sizes | correlation | {' | '.join(columns)} |"
    yield "|---:|---|---:|" + "---:|" * len(columns)
    for number, cell in enumerate(cells(correlations)):
        found = [study(np.random.default_rng([seed, number]), cell, draws) for study in STUDIES.values()]
        shown = [part for name, rates in zip(STUDIES, found) for part in _shown(rates, name in TESTED)]
        yield f"| {cell.documents} | {cell.sizes} | {cell.correlation:+.1f} | {' | '.join(shown)} |"


def _shown(rates: Rates, is_tested: bool) -> list[str]:
    errors = "too few" if rates.errors is None else f"{rates.errors:.1%}"
    return [*([errors] if is_tested else []), f"{rates.covered:.1%}"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000, help="benchmarks drawn in each cell")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--correlations", type=float, nargs="+", default=CORRELATIONS, help="of effects and sizes")
    options = parser.parse_args(argv)
    for line in table(options.draws, options.seed, options.correlations):
        print(line, flush=True)


if __name__ == "__main__":
    main()
