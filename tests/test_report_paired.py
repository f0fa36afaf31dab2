"""Paired tests against scipy, statsmodels and brute force; coverage and power by simulation; exact KLD."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qwen_eval.core import DataError
from qwen_eval.report.paired import (
    holm,
    mcnemar,
    mcnemar_power,
    paired_mean,
    paired_perplexity,
    paired_share,
    share_mde,
    sign_flip,
    speed_ratio,
)


@pytest.mark.parametrize(("gains", "losses"), [(0, 0), (0, 1), (3, 9), (9, 3), (5, 5), (40, 71), (0, 30)])
def test_mcnemar_is_the_exact_binomial_test(gains: int, losses: int) -> None:
    expected = stats.binomtest(gains, gains + losses).pvalue if gains + losses else 1.0
    assert mcnemar(gains, losses) == pytest.approx(expected)


def test_mcnemar_agrees_with_statsmodels() -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    rng = np.random.default_rng(1)
    for _ in range(20):
        gains, losses = map(int, rng.integers(0, 60, 2))
        assert mcnemar(gains, losses) == pytest.approx(
            float(tables.mcnemar([[9, gains], [losses, 9]], exact=True).pvalue)
        )


def test_holm_agrees_with_statsmodels() -> None:
    multi = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(2)
    for _ in range(20):
        p_values = list(rng.random(rng.integers(1, 9)) ** 3)
        assert holm(p_values) == pytest.approx(list(multi.multipletests(p_values, method="holm")[1]))
    assert holm([0.01, None, 0.03]) == [0.02, None, 0.03]


def test_sign_flips_are_all_counted_for_few_clusters_and_drawn_for_many() -> None:
    sums = np.array([1.0, -2.0, 0.0, 3.0, 0.5, 4.0])
    kept = [1.0, -2.0, 3.0, 0.5, 4.0]
    every = [abs(sum(s * x for s, x in zip(signs, kept))) for signs in itertools.product((1, -1), repeat=5)]
    expected = sum(x >= abs(sum(kept)) - 1e-9 for x in every) / 32
    assert sign_flip(sums) == (pytest.approx(expected), "sign flip of clusters, exact")
    assert sign_flip(sums * math.pi + np.array([0, 0, 0, 0, 1e-3, 0]))[0] == pytest.approx(expected)  # no whole steps
    many = np.random.default_rng(3).normal(0.25, 1, 60)
    found, test = sign_flip(many)
    assert found == pytest.approx(float(stats.ttest_1samp(many, 0).pvalue), abs=0.02)
    assert test == "sign flip of clusters, 4,999 drawn"


def test_a_mean_difference_has_the_interval_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=40), rng.normal(0.3, 1, 40)
    found, expected = paired_mean(a.tolist(), b.tolist()), stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_speed_is_compared_by_welch_on_logarithms() -> None:
    rng = np.random.default_rng(5)
    a, b = np.exp(rng.normal(3, 0.1, 9)), np.exp(rng.normal(3.2, 0.2, 7))
    found = speed_ratio(a.tolist(), b.tolist())
    assert found.delta == pytest.approx(np.log(b).mean() - np.log(a).mean())
    assert found.p_value == pytest.approx(
        float(stats.ttest_ind(np.log(b), np.log(a), equal_var=False).pvalue), rel=1e-6
    )
    assert speed_ratio([1.0], [2.0]).p_value is None


def test_clusters_that_move_together_are_one_draw() -> None:
    """Four documents got worse with all their 25 questions: 4 draws of one direction prove nothing at 5 %."""
    first, clusters = [1.0] * 100 + [1.0] * 100, [f"d{i // 25}" for i in range(200)]
    second = [0.0] * 100 + [1.0] * 100
    assert paired_share(first, second).p_value == pytest.approx(mcnemar(0, 100))
    clustered = paired_share(first, second, clusters)
    assert clustered.num_clusters == 8
    assert clustered.p_value == pytest.approx(2 / 16)


def test_duplicates_are_tested_exactly_as_clusters_of_two() -> None:
    """MMLU asks some questions twice: the test is exact, has no floor, and is McNemar's where none is."""
    n, lost, gained = 14_042, 90, 20
    first = [1.0] * lost + [0.0] * gained + [1.0] * (n - lost - gained)
    second = [0.0] * lost + [1.0] * gained + [1.0] * (n - lost - gained)
    twice = [0, 0, *range(2, n)]  # one pair of duplicates, both lost
    found, alone = paired_share(first, second, twice), paired_share(first, second)
    assert (alone.test, found.test) == ("exact McNemar", "sign flip of clusters, exact")
    assert found.num_clusters == n - 1
    # 88 single losses, one double, 20 gains: of the 2^109 patterns those that lie as far out
    heads = stats.binom(108, 0.5)
    expected = sum(heads.pmf(k) for k in range(109) for double in (-2, 2) if abs(2 * k - 108 + double) >= 70) / 2
    assert found.p_value == pytest.approx(expected)
    assert found.p_value is not None
    assert found.p_value < 1e-9
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=2e-4)


def test_a_small_p_of_uneven_weights_is_drawn_until_it_is_seen() -> None:
    """A macro average weighs items by their subject: no whole steps. 150 tasks of Holm need p below 0.0002."""
    weights = np.random.default_rng(10).uniform(0.5, 2.0, 60)
    diffs = np.where(np.arange(60) < 47, -1.0, 1.0) * weights
    found = paired_mean([0.0] * 60, diffs.tolist())
    assert found.p_value is not None
    assert found.p_value < 0.0002
    assert found.p_value == pytest.approx(float(stats.norm.sf(-diffs.sum() / np.sqrt((diffs**2).sum()))) * 2, rel=0.9)
    assert int(found.test.split()[4].replace(",", "")) > 100_000


def test_a_change_of_every_answer_is_not_no_difference() -> None:
    clusters = [i // 2 for i in range(40)]
    found = paired_share([1.0] * 40, [0.0] * 40, clusters)
    assert found.p_value == pytest.approx(2 / 2**20)
    assert found.low == -1.0
    assert found.high is not None
    assert -1.0 < found.high < -0.6


def test_no_difference_is_not_certainty() -> None:
    found = paired_share([1.0, 0.0] * 20, [1.0, 0.0] * 20)
    assert found.p_value == 1.0
    assert found.low is not None
    assert found.high is not None
    assert found.low < -0.02 < 0.02 < found.high
    clustered = paired_share([1.0, 0.0] * 20, [1.0, 0.0] * 20, [i // 10 for i in range(40)])
    assert clustered.high is not None
    assert clustered.high > 0.2


@pytest.mark.parametrize("discordance", [0.02, 0.1, 0.4])
def test_paired_intervals_cover_and_the_test_keeps_its_level(discordance: float) -> None:
    rng, runs, covered = np.random.default_rng(6), 500, 0
    for _ in range(runs):
        first = rng.random(150) < 0.6
        second = np.where(rng.random(150) < discordance, rng.random(150) < 0.5, first)
        found = paired_share(first.astype(float).tolist(), second.astype(float).tolist())
        truth = discordance * (0.5 - 0.6)
        covered += found.low is not None and found.high is not None and found.low <= truth <= found.high
    totals = rng.binomial(150, discordance, runs)
    alarms = sum(mcnemar(int(g), int(t - g)) <= 0.05 for g, t in zip(rng.binomial(totals, 0.5), totals))
    assert covered / runs >= 0.93
    assert alarms / runs <= 0.06


def test_perplexity_ratio_covers_the_truth() -> None:
    rng, runs, covered = np.random.default_rng(7), 400, 0
    for _ in range(runs):
        tokens = rng.integers(300, 900, 30)
        base = rng.normal(2.2, 0.4, 30)  # documents differ much; the shift within a document little
        first, second = base * tokens, (base + 0.02 + rng.normal(0, 0.02, 30)) * tokens
        found = paired_perplexity(first.tolist(), second.tolist(), tokens.tolist())
        covered += found.low is not None and found.high is not None and found.low <= 0.02 <= found.high
        assert found.p_value is not None
    assert covered / runs >= 0.93


def test_a_perplexity_is_compared_by_the_log_of_the_ratio() -> None:
    found = paired_perplexity([20.0, 11.0], [22.0, 11.0], [10, 10])
    assert found.delta == pytest.approx(math.log(math.exp(33 / 20) / math.exp(31 / 20)))
    assert found.n == 20


@pytest.mark.parametrize(("n", "discordance"), [(60, 0.0), (164, 0.1), (1000, 0.05), (1000, 0.3)])
def test_the_minimum_detectable_effect_is_found_four_times_of_five(n: int, discordance: float) -> None:
    effect = share_mde(n, discordance)
    assert effect is not None
    rate = discordance + effect
    rng = np.random.default_rng(8)
    totals = rng.binomial(n, rate, 2000)
    losses = rng.binomial(totals, (1 + effect / rate) / 2)
    few = np.minimum(losses, totals - losses)
    found = np.mean(np.minimum(1, 2 * stats.binom.cdf(few, totals, 0.5)) <= 0.05)
    assert 0.77 <= found <= 0.9
    assert mcnemar_power(n, effect * 0.7, discordance) < 0.8


def test_five_pairs_can_show_nothing() -> None:
    assert share_mde(5, 0.2) is None


def test_kld_agrees_with_scipy_and_does_not_depend_on_the_chunk(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from qwen_eval.models.hidden import HiddenStates
    from qwen_eval.report.kld import divergence, divergence_of_texts

    torch.manual_seed(0)
    hidden, head = torch.randn(23, 8), torch.randn(50, 8)
    other, other_head = hidden + 0.3 * torch.randn(23, 8), head + 0.1 * torch.randn(50, 8)
    p, q = (hidden @ head.T).double().softmax(-1).numpy(), (other @ other_head.T).double().softmax(-1).numpy()
    expected = stats.entropy(p, q, axis=1)
    documents = [i // 6 for i in range(23)]
    whole = divergence(hidden, head, other, other_head, documents=documents)
    assert whole.mean == pytest.approx(expected.mean(), rel=1e-5)
    assert whole.percentiles["99"] == pytest.approx(np.percentile(expected, 99), rel=1e-5)
    assert whole.top1_agreement == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert whole.low is not None
    assert whole.low < whole.mean
    pieces = divergence(hidden, head, other, other_head, documents=documents, chunk=5)
    assert pieces.mean == pytest.approx(whole.mean)
    assert divergence(hidden, head, hidden, head).mean == pytest.approx(0.0, abs=1e-6)

    kept = [HiddenStates(tmp_path / name) for name in "ab"]
    for states, rows in zip(kept, (hidden, other)):
        for key, start in (("first", 0), ("second", 12)):
            part = rows[start : start + 12]
            states.add(key, len(part), part)
    texts = divergence_of_texts(kept[0], kept[1], (head, other_head), [("first", 0), ("second", 1)])
    assert (texts.mean, texts.num_tokens) == (pytest.approx(whole.mean), 23)
    with pytest.raises(DataError, match="same text"):
        divergence(hidden, head, other[:3], other_head)
    with pytest.raises(DataError, match="same tokenizer"):
        divergence(hidden, head, other, torch.randn(3000, 8))
