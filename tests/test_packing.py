"""How work is packed for a GPU: fewer forwards and prefixes within a bound, and the same answers."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from predict_gpu import Gpu, generated, scored, shape, texts
from test_native_engine import CONFIG, answers, engine_of, exam, generations, model_of

from qwen_eval.engines.native.prefix_tree import Node, build
from qwen_eval.engines.native.scheduler import Counters, Packing, walk
from qwen_eval.engines.native.scoring import Job
from qwen_eval.models.kv_cache import Prefix
from qwen_eval.models.runner import ModelRunner

DATA = Path(__file__).parent / "data"
GPU = Packing(wave_tokens=700, kept_tokens=900, min_saved=8, fills_batches=True, by_prefix=True, free_slots=0.5)
SUBJECTS = [[subject] * 40 for subject in range(1, 13)]  # heads of 40 tokens


def ends(node: Node) -> list[int]:
    return [node.end, *(end for child in node.children for end in ends(child))]


def test_choices_and_texts_are_the_same_however_they_are_packed() -> None:
    plain, packed = engine_of(), engine_of(packing=GPU, max_batch_tokens=600, max_batch_size=6)
    for a, b in zip(answers(plain, exam()), answers(packed, exam()), strict=True):
        assert a.best == b.best
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=2e-4)
    assert answers(packed, generations(16)) == answers(plain, generations(16))


def test_a_beginning_is_a_prefix_where_it_saves_enough_and_adds_enough_to_what_it_continues() -> None:
    head = [1] * 160
    questions = [[*head, *([2] * 12), 10 + i] for i in range(20)] + [[*head, *([3] * 30), 40 + i] for i in range(20)]
    limits = [len(question) - 1 for question in questions]
    assert sorted(ends(build(questions, limits))) == [0, 160, 172, 190]
    assert sorted(ends(build(questions, limits, min_part=1 / 8))) == [0, 160, 190]  # 12 tokens are less than 160 / 8
    assert sorted(ends(build(questions, limits, min_saved=300))) == [0, 160, 190]  # 12 tokens 19 times are 228


def waves(packing: Packing, wave_tokens: int) -> list[int]:
    """Tokens of the prefixes of each wave: 12 subjects, 4 questions each."""
    sequences = [[*head, question] for head in SUBJECTS for question in range(100, 104)]
    runner = ModelRunner(model_of(CONFIG))
    found = walk(
        runner, sequences, limits=[40] * 48, lengths=[41] * 48, counters=Counters(), packing=packing,
        wave_tokens=wave_tokens,
    )  # fmt: skip
    return [sum(branch.depth for branch in wave) for wave in found]


def test_a_wave_holds_as_many_prefixes_as_may_be_computed_and_kept() -> None:
    assert [n for n in waves(Packing(wave_tokens=200), 4096) if n] == [200, 200, 80]
    assert [n for n in waves(Packing(wave_tokens=200), 100) if n] == [80] * 6
    assert [n for n in waves(Packing(wave_tokens=200, kept_tokens=130), 4096) if n] == [120] * 4


def test_a_batch_that_a_wave_does_not_fill_waits_for_the_next_one() -> None:
    """Twelve waves of one subject each, whose questions fill less than half a batch."""
    packing = Packing(wave_tokens=40, fills_batches=True)
    jobs = [
        Job(ids=(*head, *range(100, 110 + i), 7), choices=(1, 2)) for head in SUBJECTS for i in range(8)
    ]  # 88 to 144 tokens a subject, padding not counted
    sizes: list[int] = []
    engine = engine_of(packing=packing, max_batch_tokens=400)
    packed = engine.forward.packed

    def counted(sequences: list[Any], *rest: object, **options: object) -> torch.Tensor:
        sizes.append(len(sequences))
        return packed(sequences, *rest, **options)  # type: ignore[arg-type]

    engine.forward.packed = counted  # type: ignore
    found = dict(engine.scorer.run(jobs))
    assert len(found) == len(jobs) == sum(sizes)
    assert len(sizes) <= 5
    assert min(sizes[:-1]) >= 20  # only the last may be small


@pytest.mark.parametrize(("per_wave", "waiting"), [(1, 1), (5, 2)])
def test_prefixes_are_freed_with_the_last_sequence_that_continues_them(per_wave: int, waiting: int) -> None:
    packing = Packing(wave_tokens=40 * per_wave, kept_tokens=100 * waiting, fills_batches=True)
    engine = engine_of(packing=packing, max_batch_tokens=400)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    empty = engine.forward.empty_prefix
    most = [0]

    class Known(Prefix):
        __hash__ = object.__hash__

    def made() -> Prefix:
        prefix = empty()
        prefix.__class__ = Known
        alive.add(prefix)
        most[0] = max(most[0], len(alive))
        return prefix

    engine.forward.empty_prefix = made  # type: ignore[method-assign]
    gc.disable()
    try:
        jobs = [Job(ids=(*head, *[100 + i] * (5 + i), 7), choices=(1, 2)) for head in SUBJECTS for i in range(4)]
        assert len(dict(engine.scorer.run(jobs))) == len(jobs)
    finally:
        gc.enable()
    assert most[0] <= per_wave + waiting + 1  # the one in use last
    assert not alive


# --- the prediction --------------------------------------------------------------------------------------------------


def test_questions_after_one_head_run_with_that_head_alone_and_are_admitted_together() -> None:
    rows = texts(str(DATA / "gsm8k_test.jsonl.gz"))[:60]
    log = generated(rows, 24, shape(4096, 32))
    assert all(step.read_tokens == step.prefix_tokens for step in log.steps)
    assert sum(step.num_rows for step in log.steps) >= sum(row.num_wanted - 1 for row in rows)
    admitted = [len(forward.lengths) for forward in log.forwards[1:]]
    assert sum(admitted) == 60
    assert min(admitted[:-1]) >= 2  # a twelfth of the slots
    assert sum(step.is_replayed for step in log.steps) > 0.9 * len(log.steps)


def test_a_prediction_is_never_better_than_the_least() -> None:
    config = shape(2048, 4)
    gpu = Gpu(config=config, launch_s=4e-6)
    jobs = [
        Job(ids=(*head, *range(100 * i, 100 * i + 60 + i), 7), choices=(1, 2)) for head in SUBJECTS for i in range(50)
    ]
    log = scored(jobs, config)
    assert sum(forward.num_tokens for forward in log.forwards) == 12 * (40 + sum(61 + i for i in range(50)))
    assert all(0 < gpu.least_s(forward) < gpu.forward_s(forward) for forward in log.forwards)
