"""How many items a certificate takes, and how often it is wrong: `python tools/simulate_ship.py [runs a cell]`.

Each run draws a benchmark of known mean difference in random order and decides block by block, as
`python -m qwen_eval.ship` does. The first table counts items where nothing changed. The second counts false answers:
the candidate is just beyond the margin (ship) or just within it (do not ship).
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_eval.report.sequential import (
    ALPHA,
    NOT_WORSE,
    WORSE,
    Array,
    Draws,
    block_ends,
    crossing,
    evidence,
    log_evidence,
)


@dataclass(frozen=True, kw_only=True)
class Population:
    """All differences of a benchmark in the task's order, and their weights."""

    name: str
    differences: Array
    weights: Array

    @property
    def mean(self) -> float:
        return float(self.differences @ self.weights) / len(self.weights)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Items until each answer was certain, None where it never was; whole blocks count."""

    ship: int | None
    worse: int | None
    equivalent: int | None


def decide(population: Population, margin: float, rng: np.random.Generator) -> Counted:
    order = rng.permutation(len(population.weights))
    found = evidence(Draws(differences=population.differences[order], weights=population.weights[order]), margin)
    ends = block_ends(len(order))
    ship, worse, not_better = (crossing(path) for path in (found.not_worse, found.worse, found.not_better))
    both = max(ship, not_better) if ship and not_better else None
    return Counted(ship=_block(ship, ends), worse=_block(worse, ends), equivalent=_block(both, ends))


def _block(n: int | None, ends: Sequence[int]) -> int | None:
    return None if n is None else ends[int(np.searchsorted(ends, n))]


# --- benchmarks ------------------------------------------------------------------------------------------------------


def flips(size: int, num_differ: int, net: int) -> Array:
    """`num_differ` items that differ (or one more), gains less losses being `net`; gains first, losses last."""
    num_losses = max(0, -(-(num_differ - net) // 2))
    num_gains = max(0, num_losses + net)
    num_losses = num_gains - net
    found = np.zeros(size)
    found[:num_gains] = 1.0
    found[size - num_losses :] = -1.0
    return found


def plain(size: int, discordance: float, net: int, name: str = "") -> Population:
    found = flips(size, round(size * discordance), net)
    return Population(name=name or f"{size:,}, {discordance:.0%} differ", differences=found, weights=np.ones(size))


def clustered(size: int, discordance: float, net: int) -> Population:
    """Items come in clusters of ten that change together, all but one cluster, which makes up `net`."""
    found = np.repeat(flips(size // 10, round(size // 10 * discordance), net // 10), 10)
    found[np.flatnonzero(found == 0)[: net % 10]] = 1.0
    return Population(name=f"{size:,} in clusters of 10", differences=found, weights=np.ones(len(found)))


def duplicated(size: int, discordance: float, net: int) -> Population:
    """Every loss and some other rows stand twice."""
    half = flips(size // 2, round(size * discordance / 2), net // 2)
    found = np.concatenate([half, half, np.zeros(size % 2)])
    found[np.flatnonzero(found == 0)[: net % 2]] = 1.0
    return Population(name=f"{size:,}, each twice", differences=found, weights=np.ones(size))


def macro(discordance: float, mean: float) -> Population:
    """52 subjects of 11 to 49 items as in C-Eval; the losses stand in the last, smallest subjects."""
    sizes = np.linspace(49, 11, 52).round().astype(int)
    size = int(sizes.sum())
    weights = np.repeat(size / (len(sizes) * sizes), sizes)
    found = np.zeros(size)
    found[: round(size * discordance / 2)] = 1.0
    at = size - 1
    while float(found @ weights) > mean * size:  # whole subjects are lost, from the end
        found[at], at = -1.0, at - 1
    if float(found @ weights) < mean * size:  # the last one in part
        found[at + 1] += (mean * size - float(found @ weights)) / weights[at + 1]
    return Population(name=f"{size:,}, macro average, last subjects lost", differences=found, weights=weights)


def partial_credit(size: int, mean: float, rng: np.random.Generator) -> Population:
    """Scores between 0 and 1, such as pass@1 over ten draws."""
    found = rng.integers(-3, 4, size) / 10 * (rng.random(size) < 0.3)
    found = found + (mean - found.mean())
    return Population(name=f"{size:,}, partial credit", differences=found, weights=np.ones(size))


def at_the_margin(margin: float, *, is_beyond: bool) -> list[Population]:
    """Benchmarks whose mean lies just beyond the margin or just within it, by one item."""

    def net(size: int) -> int:
        return -(math.floor(margin * size) + 1) if is_beyond else -(math.ceil(margin * size) - 1)

    sizes = ((14_042, 0.02), (14_042, 0.06), (1_319, 0.06), (540, 0.10), (164, 0.20))
    mean = -margin - 1e-6 if is_beyond else -margin + 1e-6
    return [
        *(plain(size, discordance, net(size)) for size, discordance in sizes),
        plain(14_042, 0.0, net(14_042), "14,042, losses alone"),
        clustered(1_320, 0.06, net(1_320)),
        duplicated(1_319, 0.06, net(1_319)),
        macro(0.06, mean),
        partial_credit(1_000, mean, np.random.default_rng(7)),
    ]


# --- tables ----------------------------------------------------------------------------------------------------------

SPEEDS = (
    (14_042, 0.01, 0.02, (1_658, 3_125)),
    (14_042, 0.01, 0.06, (3_788, 6_147)),
    (14_042, 0.02, 0.06, (1_326, 2_484)),
    (1_319, 0.02, 0.06, (734, 947)),
    (1_319, 0.01, 0.06, (1_083, 1_210)),
)


def speeds(num_runs: int) -> None:
    print("| items | margin | differ | ship: median / 90 % | equivalent: median / 90 % | before whole blocks |")
    print("|---:|---:|---:|---:|---:|---:|")
    for size, margin, discordance, _ in SPEEDS:
        population = plain(size, discordance, 0)
        runs = [decide(population, margin, np.random.default_rng(seed)) for seed in range(num_runs)]
        ship, equivalent = ([getattr(run, key) or size for run in runs] for key in ("ship", "equivalent"))
        exact = _before_blocks(population, margin, num_runs)
        print(f"| {size:,} | {margin:.0%} | {discordance:.0%} | {_spread(ship)} | {_spread(equivalent)} | {exact} |")


def _before_blocks(population: Population, margin: float, num_runs: int) -> str:
    found = []
    for seed in range(num_runs):
        order = np.random.default_rng(seed).permutation(len(population.weights))
        draws = Draws(differences=population.differences[order], weights=population.weights)
        paths = evidence(draws, margin)
        found.append(max(crossing(paths.not_worse) or draws.size, crossing(paths.not_better) or draws.size))
    return _spread(found)


def _spread(counts: Sequence[int]) -> str:
    return f"{np.median(counts):,.0f} / {np.quantile(counts, 0.9):,.0f}"


def error_rate(population: Population, margin: float, num_runs: int, *, of: str) -> float:
    """Share of runs that certify `of` ("ship" or "worse") at any look."""
    cell = zlib.crc32(f"{population.name} {margin} {of}".encode())
    rngs = (np.random.default_rng((cell, run)) for run in range(num_runs))
    return sum(is_certified(population, margin, rng, of) for rng in rngs) / num_runs


def is_certified(population: Population, margin: float, rng: np.random.Generator, of: str) -> bool:
    order = rng.permutation(len(population.weights))
    draws = Draws(differences=population.differences[order], weights=population.weights[order])
    if of == "ship":
        return crossing(log_evidence(draws, -margin, margin, NOT_WORSE)) is not None
    return crossing(log_evidence(draws.mirrored(), margin, margin, WORSE)) is not None


def most_errors(num_runs: int) -> float:
    """The share that α with the noise of so many runs does not exceed, one time in a thousand."""
    return ALPHA + 3.1 * math.sqrt(ALPHA * (1 - ALPHA) / num_runs)


def errors(num_runs: int) -> bool:
    print(
        f"\nAnswers that are wrong, of {num_runs:,} runs: at most {ALPHA:.0%}, "
        f"which chance may show as up to {most_errors(num_runs):.1%}.\n"
    )
    print("| benchmark | margin | ships a worse one | refuses a good one |\n|---|---:|---:|---:|")
    is_held = True
    for margin in (0.01, 0.02):
        for worse, good in zip(at_the_margin(margin, is_beyond=True), at_the_margin(margin, is_beyond=False)):
            rates = (error_rate(worse, margin, num_runs, of="ship"), error_rate(good, margin, num_runs, of="worse"))
            is_held &= max(rates) <= most_errors(num_runs)
            print(f"| {worse.name} | {margin:.0%} | {rates[0]:.1%} | {rates[1]:.1%} |", flush=True)
    return is_held


def main() -> int:
    num_runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000
    speeds(num_runs)
    return 0 if errors(num_runs) else 1


if __name__ == "__main__":
    sys.exit(main())
