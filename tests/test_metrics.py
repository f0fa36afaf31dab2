"""Metrics: agreement with scipy and statsmodels, coverage of the intervals by simulation, and the traps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from qwen_eval.core import Answer, ChoiceLogprobs, Completion, Completions, Grade, Metric, Record
from qwen_eval.metrics import macro, mean, pass_at_k, perplexity, rates, ratio_variance, share

RNG = np.random.default_rng(7)


def covers(metric: Metric, truth: float) -> bool:
    return metric.low is not None and metric.high is not None and metric.low <= truth <= metric.high


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (0, 9), (3, 9), (9, 9), (57, 164), (1319, 1319)])
def test_a_share_of_independent_items_is_the_exact_binomial_interval(hits: int, n: int) -> None:
    metric = share([1.0] * hits + [0.0] * (n - hits))
    exact = stats.binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert metric.value == pytest.approx(hits / n)
    assert (metric.low, metric.high) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_a_mean_of_equal_clusters_has_the_standard_error_of_statsmodels() -> None:
    regression = pytest.importorskip("statsmodels.api")
    for _ in range(20):
        clusters = RNG.permutation(np.repeat(np.arange(12), 7))
        values = RNG.normal(size=84) + clusters * 0.3
        fit = regression.OLS(values, np.ones(84)).fit(
            cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": True, "df_correction": True}, use_t=True
        )
        # statsmodels multiplies by (n-1)/(n-p), which is 1 with one regressor
        metric = mean(values.tolist(), clusters.tolist())
        assert (metric.low, metric.high) == pytest.approx(tuple(fit.conf_int()[0]), rel=1e-9)


def cr2_by_matrices(means: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Bell and McCaffrey's variance and Satterthwaite's degrees of freedom from their definitions: the regression of
    cluster means on a constant, weighted by size, where the working model gives every cluster the same variance.
    """
    num = len(sizes)
    ones, weights = np.ones((num, 1)), np.diag(sizes)
    bread = np.linalg.inv(ones.T @ weights @ ones)
    rest = np.eye(num) - ones @ bread @ ones.T @ weights  # residuals = rest @ means
    adjustments = 1 / np.sqrt(np.diag(rest @ rest.T))
    parts = [bread @ ones[[g]].T * sizes[g] * adjustments[g] @ rest[[g]] for g in range(num)]
    variance = sum(float(((part @ means)[0]) ** 2) for part in parts)
    gram = np.array([[float((a @ b.T).item()) for b in parts] for a in parts])
    return variance, float(np.trace(gram) ** 2 / np.trace(gram @ gram))


@pytest.mark.parametrize("spread", [0.0, 0.7, 1.2])
@pytest.mark.parametrize("num", [2, 5, 25])
def test_the_cluster_variance_is_that_of_its_definition(num: int, spread: float) -> None:
    rng = np.random.default_rng(3)
    sizes, means = np.exp(rng.normal(6, spread, num)), rng.normal(size=num)
    variance, dof = ratio_variance((means * sizes).tolist(), sizes.tolist(), None)
    assert (variance, dof) == pytest.approx(cr2_by_matrices(means, sizes), rel=1e-9)
    assert 1 <= dof <= num - 1 + 1e-9


def test_one_cluster_with_nearly_everything_leaves_one_degree_of_freedom() -> None:
    even, lopsided = [100.0] * 10, [100_000.0, *[100.0] * 9]
    sums = [0.1 * i for i in range(10)]
    assert ratio_variance(sums, even, None)[1] == pytest.approx(9)
    assert ratio_variance(sums, lopsided, None)[1] == pytest.approx(1, abs=0.01)


def test_a_few_duplicates_among_many_items_change_little() -> None:
    scores = (RNG.random(2000) < 0.7).astype(float)
    scores[1:200:2] = scores[0:200:2]  # a hundred questions are asked twice
    clusters = [i // 2 if i < 200 else i for i in range(2000)]
    alone, found = share(scores.tolist()), share(scores.tolist(), clusters)
    assert found.num_clusters == 1900
    assert alone.low is not None
    assert found.low is not None
    assert 1.0 < (found.value - found.low) / (alone.value - alone.low) < 1.1
    groups = {"a": scores[:1000].tolist(), "b": scores[1000:].tolist()}
    by_group = {"a": clusters[:1000], "b": clusters[1000:]}
    plain, clustered = macro(groups), macro(groups, by_group)
    assert plain.low is not None
    assert clustered.low is not None
    assert 1.0 < (clustered.value - clustered.low) / (plain.value - plain.low) < 1.1
    assert macro(groups, {"a": list(range(1000)), "b": list(range(1000, 2000))}).low == pytest.approx(plain.low)


def test_a_positive_mean_has_a_positive_interval() -> None:
    values = [0.01, 0.02, 0.9]
    plain, positive = mean(values), mean(values, is_positive=True)
    assert plain.low is not None
    assert positive.low is not None
    assert plain.low < 0 < positive.low < positive.value
    assert mean([0.0, 0.0, 0.0], is_positive=True).low == 0.0


def test_an_unclustered_mean_has_the_t_interval_of_scipy() -> None:
    values = RNG.normal(size=17)
    metric = mean(values.tolist(), unit="s")
    low, high = stats.t.interval(0.95, 16, loc=values.mean(), scale=stats.sem(values))
    assert (metric.low, metric.high) == pytest.approx((low, high))
    assert (metric.kind, metric.unit) == ("mean", "s")


def test_fully_dependent_clusters_count_once() -> None:
    """Ten copies of each of eight items say no more than the eight items, and much less than eighty."""
    scores, clusters = [float(i % 2) for i in range(8) for _ in range(10)], [i for i in range(8) for _ in range(10)]
    copied, eighty = share(scores, clusters), share(scores)
    assert copied.num_clusters == 8
    assert copied.high is not None
    assert eighty.high is not None
    assert copied.high - copied.value > 2.5 * (eighty.high - eighty.value)


def test_one_cluster_alone_gives_the_interval_within_it() -> None:
    assert share([1.0, 0.0, 1.0], ["a"] * 3).low == share([1.0, 0.0, 1.0]).low
    assert mean([1.0, 2.0, 3.0], ["a"] * 3).low is None


def test_all_right_is_not_certain() -> None:
    clustered = share([1.0] * 40, [i // 4 for i in range(40)])
    assert clustered.low == pytest.approx(stats.binomtest(10, 10).proportion_ci(0.95).low)
    assert macro({"a": [1.0] * 5, "b": [1.0] * 5}).low == pytest.approx(stats.binomtest(10, 10).proportion_ci().low)


def test_macro_weighs_subjects_and_not_items() -> None:
    metric = macro({"big": [1.0] * 90 + [0.0] * 10, "small": [0.0, 1.0, 0.0, 0.0]})
    assert metric.value == pytest.approx((0.9 + 0.25) / 2)
    assert metric.n == 104
    assert metric.low is not None
    assert metric.low < 0.5


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.97])
def test_shares_cover_the_truth_95_times_of_100(rate: float, clustered: bool) -> None:
    rng, runs, hits = np.random.default_rng(11), 400, 0
    for _ in range(runs):
        if clustered:  # 25 documents of 8 questions, each document easier or harder than the rate
            chances = rng.beta(rate * 6, (1 - rate) * 6, 25)
            scores, groups = (rng.random((25, 8)) < chances[:, None]).astype(float).ravel(), np.repeat(np.arange(25), 8)
            hits += covers(share(scores.tolist(), groups.tolist()), rate)
        else:
            hits += covers(share((rng.random(60) < rate).astype(float).tolist()), rate)
    assert hits / runs >= 0.93


def test_macro_and_perplexity_cover_the_truth_95_times_of_100() -> None:
    rng, runs = np.random.default_rng(12), 400
    chances = rng.uniform(0.3, 0.9, 20)
    macros = sum(
        covers(
            macro({str(i): (rng.random(12) < p).astype(float).tolist() for i, p in enumerate(chances)}), chances.mean()
        )
        for _ in range(runs)
    )
    hits = 0
    for _ in range(runs):  # document NLL per token varies, and long documents are easier: the ratio matters
        tokens = rng.integers(200, 2000, 40)
        nll = 2.5 - 0.0002 * tokens + rng.normal(0, 0.3, 40)
        hits += covers(perplexity((nll * tokens).tolist(), tokens.tolist()), _true_perplexity())
    assert macros / runs >= 0.93
    assert hits / runs >= 0.92


def _true_perplexity() -> float:
    tokens = np.arange(200, 2000)
    return math.exp(float(((2.5 - 0.0002 * tokens) * tokens).sum() / tokens.sum()))


def test_perplexity_is_weighted_by_tokens_and_has_no_interval_for_one_document() -> None:
    metric = perplexity([30.0, 10.0], [10, 10])
    assert metric.value == pytest.approx(math.exp(2.0))
    assert (metric.n, metric.kind, metric.higher_is_better) == (20, "ppl", False)
    assert perplexity([30.0, 10.0], [10, 10], ["one", "one"]).low is None
    assert perplexity([30.0, math.nan], [10, 10]).n == 10


@pytest.mark.parametrize(("n", "c", "k"), [(10, 3, 1), (10, 3, 5), (200, 17, 100), (5, 0, 5), (5, 5, 1)])
def test_pass_at_k_counts_subsets(n: int, c: int, k: int) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k))


def test_nothing_and_nan_are_survived() -> None:
    for metric in (share([]), mean([]), macro({}), macro({"a": []}), perplexity([], []), share([None, math.nan])):
        assert math.isnan(metric.value)
        assert (metric.n, metric.low, metric.high) == (0, None, None)
    assert share([1.0, None, math.nan, 0.0]).n == 2
    assert mean([3.0]).low is None


def record(answer: Answer, **grade: Any) -> Record:
    return Record(
        sample_id="s", group="", cluster="", target=None, prompts=("p",), prompt_sha256=("0",), num_prompt_tokens=(1,),
        answers=(answer,), grade=Grade(**grade),
    )  # fmt: skip


def test_rates_count_flags_and_disagreeing_extractors() -> None:
    said = Completions(completions=(Completion(text="4", finish_reason="stop", num_tokens=1),))
    rows = [
        record(said, score=1.0, extracted="4", extracted_upstream="4", score_upstream=1.0),
        record(said, score=0.0, extracted="5", extracted_upstream=None, score_upstream=0.0, flags=("truncated",)),
        record(said, score=0.0, flags=("truncated", "looping", "no_answer")),
    ]
    found = rates(rows)
    assert found["truncated"].value == pytest.approx(2 / 3)
    assert (found["empty"].value, found["no_answer"].n) == (0.0, 3)
    assert (found["extractor_disagreement"].value, found["extractor_disagreement"].n) == (0.5, 2)
    assert not found["truncated"].higher_is_better


def test_choice_records_have_no_truncation_rate() -> None:
    chosen = ChoiceLogprobs(logprobs=(-1.0, -2.0), num_tokens=(1, 1))
    assert rates([record(chosen, score=1.0)]) == {}
    assert rates([]) == {}
    assert list(rates([record(chosen, score=0.0, flags=("no_answer",)), record(chosen, score=1.0)])) == ["no_answer"]
