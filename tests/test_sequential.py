"""Evidence by betting without replacement: a martingale, exact at the end, seldom wrong, quick to decide."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from qwen_eval.core import Grade, Record, Sample
from qwen_eval.report.sequential import (
    NOT_WORSE,
    WORSE,
    Bet,
    Draws,
    block_ends,
    crossing,
    evidence,
    items_needed,
    log_evidence,
    lower_bound,
    upper_bound,
)
from qwen_eval.report.sequential import _capital as capital
from qwen_eval.ship.drawing import drawn_order, weights
from qwen_eval.tasks.registry import TaskContext, build, task_class

TOOL = Path(__file__).parents[1] / "tools" / "simulate_ship.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate_ship", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulate_ship"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def plain(*differences: float) -> Draws:
    return Draws(differences=np.array(differences, dtype=float), weights=np.ones(len(differences)))


@pytest.mark.parametrize("bet", [*NOT_WORSE, *WORSE])
@pytest.mark.parametrize("counts", [(1, 1, 1, 1, 1, 1, 1), (1.75, 1.75, 0.7, 0.7, 0.7, 0.7, 0.7)])
def test_over_all_orders_the_capital_is_one_where_the_mean_is_the_threshold(
    bet: Bet, counts: tuple[float, ...]
) -> None:
    values = np.array([-1.0, 0.0, 1.0, -1.0, 0.0, 0.5, 0.0])
    weight = np.array(counts)
    mean = float(values @ weight) / len(values)
    paths = []
    for order in itertools.permutations(range(len(values))):
        at = list(order)
        paths.append(np.exp(capital(Draws(differences=values[at], weights=weight[at]), mean, 0.05, bet)))
    assert np.mean(paths, axis=0) == pytest.approx(np.ones(len(values)), abs=1e-9)


def test_the_capital_is_that_of_a_gambler_who_bets_item_by_item() -> None:
    rng = np.random.default_rng(0)
    differences, bet, threshold, margin, size = rng.choice([-1.0, 0, 0, 0, 1], 60), NOT_WORSE[0], -0.02, 0.02, 80
    draws = Draws(differences=differences, weights=np.ones(size))
    wealth, total, squares, path = 1.0, 0.0, 0.0, []
    for seen, value in enumerate(differences):
        left = size - seen
        expected, edge = (size * threshold - total) / left, size * bet.gap * margin / left
        variance = (bet.prior_hits + squares) / (40 + seen)
        stake = 0.0 if expected <= -1 else min(edge / (variance + edge**2), 0.995 / (1 + expected))
        wealth *= 1 + stake * (value - expected)
        total, squares = total + value, squares + value**2
        path.append(math.log(wealth))
    assert capital(draws, threshold, margin, bet) == pytest.approx(path)


def test_evidence_is_of_the_items_drawn_so_far_and_of_no_later_ones() -> None:
    rng = np.random.default_rng(1)
    draws = Draws(differences=rng.choice([-1.0, 0, 0, 0, 1], 400), weights=np.ones(500))
    for n in (1, 128, 399):
        assert log_evidence(draws.head(n), -0.05, 0.05, NOT_WORSE) == pytest.approx(
            log_evidence(draws, -0.05, 0.05, NOT_WORSE)[:n]
        )


@pytest.mark.parametrize(
    ("differences", "not_worse", "worse", "not_better"),
    [
        ((0,) * 50, True, False, True),
        ((-1,) * 3 + (0,) * 47, False, True, True),
        ((1,) * 3 + (0,) * 47, True, False, False),
        ((-1,) + (0,) * 49, False, False, True),  # just at the margin: neither above nor below
    ],
)
def test_after_the_last_item_the_answer_is_known_for_certain(
    differences: tuple[float, ...], not_worse: bool, worse: bool, not_better: bool
) -> None:
    found = evidence(plain(*differences), 0.02)
    ends = (found.not_worse[-1], found.worse[-1], found.not_better[-1])
    assert [end == math.inf for end in ends] == [not_worse, worse, not_better]


def test_what_no_outcome_of_the_rest_can_change_is_certain_before_the_end() -> None:
    draws = Draws(differences=np.ones(60), weights=np.ones(100))
    assert log_evidence(draws, 0.15, 0.05, NOT_WORSE)[-1] == math.inf  # 60 gained, at most 40 can be lost
    assert log_evidence(draws, 0.25, 0.05, NOT_WORSE)[-1] < math.inf


def test_the_interval_agrees_with_the_answer_and_closes_on_the_mean() -> None:
    rng = np.random.default_rng(3)
    differences = rng.permutation(np.repeat([-1.0, 0.0, 1.0], [14, 672, 14]))
    for n in (64, 256, 512, 700):
        draws = Draws(differences=differences[:n], weights=np.ones(700))
        low, high = lower_bound(draws, 0.02), upper_bound(draws, 0.02)
        assert low <= 0.0 <= high
        is_not_worse = crossing(log_evidence(draws, -0.02, 0.02, NOT_WORSE)) is not None
        assert low >= -0.02 or not is_not_worse
    assert (low, high) == (0.0, 0.0)


def test_the_interval_of_a_worse_candidate_lies_beyond_the_margin() -> None:
    differences = np.random.default_rng(3).permutation(np.repeat([-1.0, 0.0, 1.0], [80, 580, 40]))
    for n in (256, 384, 512):
        draws = Draws(differences=differences[:n], weights=np.ones(700))
        is_worse = crossing(log_evidence(draws.mirrored(), 0.02, 0.02, WORSE)) is not None
        assert upper_bound(draws, 0.02) <= -0.02 or not is_worse
    assert is_worse


def test_the_items_needed_are_more_than_were_drawn_and_at_most_all() -> None:
    rng = np.random.default_rng(4)
    differences = rng.permutation(np.repeat([-1.0, 0.0, 1.0], [300, 9_400, 300]))
    draws = Draws(differences=differences[:200], weights=np.ones(10_000))
    needed = items_needed(draws, 0.02)
    assert 200 < needed < 10_000
    enough = Draws(differences=differences[: 3 * needed], weights=np.ones(10_000))
    assert crossing(log_evidence(enough, -0.02, 0.02, NOT_WORSE)) is not None


@pytest.mark.parametrize("size", [1, 31, 32, 164, 540, 1_319, 14_042])
def test_blocks_grow_and_end_with_the_benchmark(size: int) -> None:
    ends = block_ends(size)
    steps = np.diff([0, *ends])
    assert ends[-1] == size
    assert ends[0] <= 128
    assert all(a <= b for a, b in itertools.pairwise(steps[:-1]))


# --- how often it errs, and how soon it ends: a short run of tools/simulate_ship.py -----------------------------------


@pytest.mark.parametrize("margin", [0.01, 0.02])
def test_answers_are_wrong_as_seldom_as_they_say(tool: ModuleType, margin: float) -> None:
    num_runs = 100
    for is_beyond, answer in ((True, "ship"), (False, "worse")):
        for population in tool.at_the_margin(margin, is_beyond=is_beyond):
            assert (population.mean < -margin) == is_beyond
            rate = tool.error_rate(population, margin, num_runs, of=answer)
            assert rate <= tool.most_errors(num_runs), (population.name, answer, rate)


def test_it_decides_as_soon_as_promised_where_nothing_changed(tool: ModuleType) -> None:
    for size, margin, discordance, (median, ninety) in tool.SPEEDS:
        population, counts = tool.plain(size, discordance, 0), []
        for seed in range(60):
            order = np.random.default_rng(seed).permutation(size)
            found = evidence(Draws(differences=population.differences[order], weights=population.weights), margin)
            counts.append(max(crossing(found.not_worse) or size, crossing(found.not_better) or size))
        assert np.median(counts) <= 1.15 * median  # of 60 runs; 1,000 are in docs/decide.md
        assert np.quantile(counts, 0.9) <= 1.15 * ninety


def test_evidence_in_the_order_of_the_file_would_be_wrong_every_time(tool: ModuleType) -> None:
    population = tool.plain(1_319, 0.06, -30)  # the losses stand last
    in_file_order = Draws(differences=population.differences, weights=population.weights)
    assert crossing(log_evidence(in_file_order, -0.01, 0.01, NOT_WORSE)) is not None
    assert tool.error_rate(population, 0.01, 100, of="ship") <= tool.most_errors(100)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_the_order_is_of_the_seed_and_the_ids_not_of_the_file() -> None:
    samples = [Sample(id=f"q{i}") for i in range(200)]
    first = [sample.id for sample in drawn_order(samples, 1)]
    assert first == [sample.id for sample in drawn_order(samples[::-1], 1)]
    assert first != [sample.id for sample in drawn_order(samples, 2)]
    place = np.mean([[int(s.id[1:]) < 100 for s in drawn_order(samples, seed)[:50]] for seed in range(200)])
    assert place == pytest.approx(0.5, abs=0.03)


def graded(sample: Sample, score: float) -> Record:
    return Record(
        sample_id=sample.id, group=sample.group, cluster=sample.cluster, target=sample.target, prompts=("?",),
        prompt_sha256=("",), num_prompt_tokens=(1,), answers=(), grade=Grade(score=score, score_upstream=score),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["mmlu", "ceval", "cmmlu", "bbh", "gsm8k", "math", "nano"])
def test_the_weighted_mean_of_scores_is_the_headline_of_the_task(name: str) -> None:
    task = build(task_class(name).Spec(name=name, data="bundled"), TaskContext())
    samples = list(task.samples())[7:]  # subjects of unlike size
    scores = np.random.default_rng(5).integers(0, 2, len(samples)).astype(float)
    records = [graded(sample, score) for sample, score in zip(samples, scores)]
    headline = next(iter(task.summarise(records).values())).value
    assert float(weights(task, samples) @ scores) / len(samples) == pytest.approx(headline)
