"""WMT22: the scores of official systems, two scales told apart, shots as the harness draws them, paired bootstraps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import said

from qwen_eval import corpus
from qwen_eval.config import EngineSpec, EvalSpec, ModelSpec, check
from qwen_eval.core import Completions, ConfigError, DataError, Generate, Grade, Record, Sample, Turn
from qwen_eval.engines.fake import FakeEngine
from qwen_eval.report.baseline import accept
from qwen_eval.report.compare import compare_paths
from qwen_eval.report.gate import gate
from qwen_eval.report.paired import paired_corpus
from qwen_eval.runs.evaluate import evaluate
from qwen_eval.runs.run import Run
from qwen_eval.tasks.registry import TaskContext
from qwen_eval.tasks.wmt22 import TOKENIZERS, Wmt22, harness_shots, translation_in
from qwen_eval.tasks.wmt22 import Wmt22Spec as Spec


def wmt22(*, is_chat: bool = False, name: str = "wmt22", **keys: Any) -> Wmt22:
    return Wmt22(Spec(**{"name": name, "data": "bundled", **keys}), TaskContext(is_chat=is_chat))


def graded(task: Wmt22, sample: Sample, reply: str) -> Grade:
    request = task.request(sample, ())
    assert isinstance(request, Generate)
    return task.grade(sample, [Turn(request=request, answer=said(reply))])


def record_of(sample: Sample, grade: Grade) -> Record:
    return Record(
        sample_id=sample.id, group=sample.group, cluster=sample.cluster, target=sample.target, prompts=("",),
        prompt_sha256=("",), num_prompt_tokens=(0,), answers=(said("x"),), grade=grade,
    )  # fmt: skip


# --- scores --------------------------------------------------------------------------------------------------------

SYSTEMS = [  # pair, system, BLEU of the shared task's own table, BLEU as the Qwen cards have it
    ("en-zh", "Online-W", 44.799, 32.37),
    ("en-zh", "LanguageX", 54.346, 43.52),
    ("zh-en", "Online-W", 23.961, 23.961),
    ("zh-en", "JDExploreAcademy", 33.511, 33.511),
]


@pytest.mark.parametrize(("pair", "system", "own", "cards"), SYSTEMS)
def test_official_systems_have_their_official_scores(
    official: Path, pair: str, system: str, own: float, cards: float
) -> None:
    language = pair.partition("-")[2]
    folder = official / "wmt22"
    translations = (folder / f"generaltest2022.{pair}.hyp.{system}.{language}").read_text(encoding="utf-8").splitlines()
    for name, expected in (("wmt22_sacrebleu", own), ("wmt22", cards)):
        task = wmt22(name=name, path=str(folder), subjects=[pair])
        samples = task.samples()
        assert len(samples) == len(translations)
        metrics = task.summarise(record_of(s, graded(task, s, t)) for s, t in zip(samples, translations))
        assert metrics[f"bleu/{pair}"].value == pytest.approx(expected, abs=0.005 if expected == cards else 0.0005)
        assert metrics["bleu"].value == metrics[f"bleu/{pair}"].value
        low, high = metrics["bleu"].low, metrics["bleu"].high
        assert low is not None
        assert high is not None
        assert 0.5 < high - low < 4


def test_scores_from_counts_are_those_of_sacrebleu() -> None:
    import sacrebleu

    task = wmt22(subjects=["en-zh"])
    references = [sample.target for sample in task.samples()]
    replies = [reference[2:] + "啊" for reference in references]
    segments = [corpus.bleu_counts(a, b, tokenize="zh") for a, b in zip(replies, references)]
    expected = sacrebleu.corpus_bleu(replies, [references], tokenize="zh").score
    assert corpus.corpus_score(corpus.BLEU_SACREBLEU, np.sum(segments, axis=0).tolist()) == pytest.approx(expected)
    characters = [corpus.chrf_counts(a, b) for a, b in zip(replies, references)]
    expected = sacrebleu.corpus_chrf(replies, [references]).score
    assert corpus.corpus_score(corpus.CHRF, np.sum(characters, axis=0).tolist()) == pytest.approx(expected)


def test_two_scales_have_two_names_and_differ_on_chinese_alone() -> None:
    task = wmt22()
    chinese, english = ("en-zh", "zh-en")
    by_pair = {sample.group: sample for sample in task.samples()}
    for pair, is_same in ((chinese, False), (english, True)):
        grade = graded(task, by_pair[pair], by_pair[pair].target[:-3])
        scales = [grade.values[name] for name in TOKENIZERS]
        assert (scales[0] == scales[1]) is is_same
    assert wmt22().headline == corpus.BLEU_QWEN
    assert wmt22(name="wmt22_sacrebleu").headline == corpus.BLEU_SACREBLEU


def test_a_gold_translation_scores_100_and_the_mean_is_over_both_directions() -> None:
    task = wmt22()
    records = [
        record_of(sample, graded(task, sample, sample.target if sample.group == "zh-en" else "无"))
        for sample in task.samples()
    ]
    metrics = task.summarise(records)
    assert metrics["bleu/zh-en"].value == pytest.approx(100)
    assert metrics["bleu/en-zh"].value < 1
    assert metrics["bleu"].value == pytest.approx((metrics["bleu/zh-en"].value + metrics["bleu/en-zh"].value) / 2)
    assert metrics["bleu"].num_clusters == 8  # documents


@pytest.mark.parametrize(
    ("reply", "is_chat", "read"),
    [
        (" The tea is hot.\nChinese phrase: 茶", False, "The tea is hot."),
        ("\nThe tea is hot.", False, ""),  # the harness stops at the first line break
        ("<think>hm</think>\nThe tea\nis hot.", True, "The tea is hot."),
    ],
)
def test_what_counts_as_the_translation(reply: str, is_chat: bool, read: str) -> None:
    assert translation_in(reply, is_chat=is_chat) == read


# --- asking --------------------------------------------------------------------------------------------------------


def test_prompts_are_the_harness_s() -> None:
    sample = wmt22().samples()[0]
    text = wmt22().prompt(sample).text or ""
    blocks = text.split("\n\n")
    assert len(blocks) == 6
    assert blocks[-1] == "Chinese phrase: 早市六点开门，七点以前最热闹。\nEnglish phrase:"
    assert all(block.startswith("Chinese phrase: ") and "\nEnglish phrase: " in block for block in blocks[:-1])
    assert sample.target not in text
    request = wmt22().request(sample, ())
    assert isinstance(request, Generate)
    assert (request.stop, request.max_new_tokens, request.sampling.is_greedy) == (("\n",), 256, True)


def test_chats_get_the_shots_as_turns() -> None:
    task = wmt22(is_chat=True, shots=2)
    messages = task.prompt(task.samples()[0]).messages
    assert [message.role for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[-1].content.endswith("\n\n早市六点开门，七点以前最热闹。")


def test_shots_are_drawn_as_the_harness_draws_them() -> None:
    """Its loop, written out: documents are shuffled, and every document draws from the same generator in turn."""
    rows = [(f"s{i}", f"t{i}") for i in range(30)]
    draw = random.Random()
    draw.seed(42)
    asked = list(rows)
    draw.shuffle(asked)
    expected = {}
    for row in asked:
        drawn = draw.sample(rows, 6)
        expected[row] = [other for other in drawn if other != row][:5]
    found = harness_shots(rows, 5, "here")
    assert [[rows[k] for k in shots] for shots in found] == [expected[row] for row in rows]


def test_more_shots_than_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task.shots=16: bundled:wmt22 zh-en has 16 rows"):
        wmt22(shots=16).samples()


def test_files_of_another_length_are_refused(tmp_path: Path) -> None:
    (tmp_path / "generaltest2022.zh-en.src.zh").write_text("甲\n乙\n", encoding="utf-8")
    (tmp_path / "generaltest2022.zh-en.ref.A.en").write_text("a\n", encoding="utf-8")
    with pytest.raises(DataError, match="2 sources, 1 references"):
        wmt22(path=str(tmp_path), shots=0).samples()


def test_without_document_ids_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "generaltest2022.zh-en.src.zh").write_text("甲\n乙\n", encoding="utf-8")
    (tmp_path / "generaltest2022.zh-en.ref.A.en").write_text("a\nb\n", encoding="utf-8")
    assert "every segment counts as independent" in wmt22(path=str(tmp_path), shots=0).notes[0]
    assert wmt22().notes == []


# --- intervals and comparisons -------------------------------------------------------------------------------------


def drawn_counts(rng: np.random.Generator, num: int, quality: float) -> list[tuple[int, ...]]:
    """Segments of 20 words, of whose n-grams a share is matched; segments of a document are alike."""
    found = []
    for i in range(num):
        level = min(0.95, max(0.05, quality + 0.1 * np.sin(i // 4)))
        matched = [int(rng.binomial(21 - n, level**n)) for n in (1, 2, 3, 4)]
        found.append((20, 20, *matched, 20, 19, 18, 17))
    return found


def segments(counts: Sequence[tuple[int, ...]]) -> list[corpus.Segment]:
    return [corpus.Segment(counts=row, group="zh-en", cluster=i // 4) for i, row in enumerate(counts)]


@pytest.mark.parametrize("sizes", ["equal", "uneven"])
def test_the_interval_covers_the_corpus_it_was_drawn_from(sizes: str) -> None:
    """Documents of 4 segments, or of 1 to 20: a few draws of them, with the share of intervals that hold the truth."""
    rng = np.random.default_rng(1)
    lengths = np.full(1000, 4) if sizes == "equal" else np.clip(rng.lognormal(1.2, 0.7, 1000), 1, 20).astype(int)
    population = [drawn_counts(rng, int(n), 0.6 + 0.15 * rng.standard_normal()) for n in lengths]
    everything = np.sum([row for document in population for row in document], axis=0)
    truth = corpus.corpus_score(corpus.BLEU_QWEN, everything.tolist())
    hits = 0
    for _ in range(80):
        drawn = rng.choice(len(population), size=20, replace=False)
        rows = [corpus.Segment(counts=row, cluster=int(d)) for d in drawn for row in population[d]]
        metric = corpus.corpus_metric(corpus.BLEU_QWEN, rows)
        assert metric.low is not None
        assert metric.high is not None
        hits += metric.low <= truth <= metric.high
    assert hits >= 71  # of 76 expected at 95 %: fewer have a chance of 2 %


def test_nothing_that_matches_has_no_interval() -> None:
    rows = [corpus.Segment(counts=(5, 5, 0, 0, 0, 0, 5, 4, 3, 2), cluster=i) for i in range(20)]
    metric = corpus.corpus_metric(corpus.BLEU_QWEN, rows)
    assert (metric.value, metric.low, metric.high) == (0.0, None, None)


def test_a_paired_difference_is_far_narrower_than_two_intervals() -> None:
    rng = np.random.default_rng(2)
    first = drawn_counts(rng, 200, 0.6)
    second = [(a, b, max(0, m - (i % 5 == 0)), *rest) for i, (a, b, m, *rest) in enumerate(first)]
    found = paired_corpus(corpus.BLEU_QWEN, segments(first), segments(second))
    assert found.test == "paired bootstrap"
    assert found.delta < 0
    assert found.p_value is not None
    assert found.p_value < 1e-6
    whole = corpus.corpus_metric(corpus.BLEU_QWEN, segments(first))
    assert whole.low is not None
    assert whole.high is not None
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < (whole.high - whole.low) / 5


def test_few_documents_allow_no_test() -> None:
    first, second = (drawn_counts(np.random.default_rng(seed), 16, 0.6) for seed in (3, 4))
    found = paired_corpus(corpus.BLEU_QWEN, segments(first), segments(second))
    assert found.p_value is None
    assert "too few" in found.test


class Translator(FakeEngine):
    """Answers with the gold translation, but for a share of the samples."""

    def __init__(self, worse_each: int):
        super().__init__()
        task = wmt22(shots=0)
        self._gold = {task.prompt(s).text: s.target for s in task.samples()}
        self._bad = {text for i, text in enumerate(self._gold) if i % worse_each == 0}

    def run(self, requests: Any) -> Any:
        for i, request in enumerate(requests):
            text = request.prompt.text
            gold = self._gold[text]
            reply = gold[: len(gold) // 2] if text in self._bad else gold
            yield i, Completions(completions=(said(" " + reply).completions[0],))


def run_with(tmp_path: Path, name: str, engine: FakeEngine) -> Run:
    spec = EvalSpec(
        task=Spec(name="wmt22", data="bundled", shots=0), model=ModelSpec(name="m"), engine=EngineSpec(name="fake"),
        runs_dir=str(tmp_path / name),
    )  # fmt: skip
    return evaluate(check(spec), lambda _: engine)


def test_compare_and_gate_draw_the_bootstrap(tmp_path: Path) -> None:
    good, bad = (run_with(tmp_path, name, Translator(each)) for name, each in (("good", 10**6), ("bad", 2)))
    assert good.metrics["bleu"].value > bad.metrics["bleu"].value + 10
    (compared,) = compare_paths([str(good.path), str(bad.path)])
    assert compared.difference is not None
    assert compared.family == "mean"
    assert compared.difference.delta == pytest.approx(bad.metrics["bleu"].value - good.metrics["bleu"].value)
    baselines = tmp_path / "baselines"
    accept([str(tmp_path / "good")], baselines)
    (same,) = gate(baselines, [str(tmp_path / "good")]).judgements
    assert same.verdict == "unchanged", same.why
    (judged,) = gate(baselines, [str(tmp_path / "bad")]).judgements
    assert judged.comparison.difference == compared.difference  # the baseline keeps the counts
