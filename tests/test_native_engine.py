"""The native engine: whatever is shared, batched or reordered, fp32 answers stay those of the plain twin."""

from __future__ import annotations

import gc
import random
import re
import weakref
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_eval.core import Choose, Generate, Prompt, Sampling, Score
from qwen_eval.engines.native.engine import NativeEngine
from qwen_eval.engines.native.scoring import Scorer
from qwen_eval.models.checkpoint import Placement, random_model
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.kv_cache import Int8Codec
from qwen_eval.models.runner import ModelRunner
from qwen_eval.models.tokenizer import QwenTokenizer
from qwen_eval.models.transformer import Transformer

CONFIG = ModelConfig(
    family="qwen",
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_size=96,
    vocab_size=300,
    norm_eps=1e-6,
    rope_base=10000.0,
    rotary_dim=16,
    train_length=64,
    dynamic_ntk=True,
    logn=True,
)
TOKENIZER = QwenTokenizer({bytes([i]): i for i in range(256)}, num_extra_tokens=4)
TRICKS: dict[str, Any] = {
    "plain": {"dynamic_ntk": False, "logn": False},
    "ntk": {"logn": False},
    "logn": {"dynamic_ntk": False},
    "all": {},
    "windows": {"windows": (24, 64, 150)},
    "windows without tricks": {"dynamic_ntk": False, "logn": False, "windows": (24, 64, None)},
}


def model_of(config: ModelConfig, seed: int = 0) -> Transformer:
    """Random weights wide enough that answers differ by more than rounding."""
    model = random_model(config, Placement(device=torch.device("cpu"), dtype=torch.float32), seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(12.0 if "layers" in name else 50.0)
    return model


def engine_of(
    config: ModelConfig = CONFIG, *, codec: object = None, chunk: int = 2048, **options: object
) -> NativeEngine:
    forward = ModelRunner(model_of(config), codec=codec, prefill_chunk=chunk)  # type: ignore[arg-type]
    return NativeEngine(forward, TOKENIZER, **options)  # type: ignore[arg-type]


def exam(num: int = 40, seed: int = 0) -> list[Choose]:
    """Questions of unequal length after one of three long shared heads, some of them beyond the training length."""
    draw = random.Random(seed)
    heads = ["".join(draw.choices("abcdef ", k=n)) for n in (30, 55, 200)]
    tails = ["".join(draw.choices("ghij ", k=draw.randint(1, 60))) for _ in range(num)]
    return [Choose(prompt=Prompt.raw(draw.choice(heads) + tail), choices=("A", "B", "C", "D")) for tail in tails]


def answers(engine: NativeEngine, requests: list) -> list:
    found = dict(engine.run(requests))
    return [found[i] for i in range(len(requests))]


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("batch", [1, 300, 5000])
def test_sharing_batching_and_order_change_no_choice(trick: str, batch: int) -> None:
    config = replace(CONFIG, **TRICKS[trick])
    plain = answers(engine_of(config, prefix_sharing=False, max_batch_tokens=1), exam())
    questions = exam()
    order = random.Random(1).sample(range(len(questions)), len(questions))
    engine = engine_of(config, max_batch_tokens=batch)
    shuffled = answers(engine, [questions[i] for i in order])
    assert engine.scorer.counters.computed_tokens < 0.6 * engine.scorer.counters.prompt_tokens
    for i, ours in zip(order, shuffled):
        assert ours.best == plain[i].best
        assert torch.allclose(torch.tensor(ours.logprobs), torch.tensor(plain[i].logprobs), atol=2e-4)


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("chunk", [64, 500])
@pytest.mark.parametrize("length", [50, 64, 130, 512])
def test_chunked_scores_equal_one_whole_pass(trick: str, chunk: int, length: int) -> None:
    config = replace(CONFIG, **TRICKS[trick])
    text = "".join(random.Random(2).choices("abcdefghij ", k=length))
    requests = [Score(prompt=Prompt.raw(text)), Score(prompt=Prompt.raw(text), num_context=40)]
    whole = answers(engine_of(config), requests)
    parts = answers(engine_of(config, chunk=chunk), requests)
    for a, b in zip(whole, parts):
        assert a.token_ids == b.token_ids
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)
    assert whole[1].logprobs == pytest.approx(whole[0].logprobs[39:], abs=1e-4)


def test_a_choice_of_several_tokens_is_the_sum_over_its_tokens() -> None:
    engine, prompt = engine_of(), Prompt.raw("the head of a question: ")
    (answer,) = answers(engine, [Choose(prompt=prompt, choices=("xyz", "q"))])
    (scored,) = answers(engine, [Score(prompt=Prompt.raw("the head of a question: xyz"), num_context=24)])
    assert answer.num_tokens == (3, 1)
    assert answer.logprobs[0] == pytest.approx(sum(scored.logprobs), abs=1e-4)


def generations(num: int, **options: object) -> list[Generate]:
    return [
        Generate(prompt=request.prompt, max_new_tokens=24 + i % 9, **options)  # type: ignore[arg-type]
        for i, request in enumerate(exam(num))
    ]


@cache
def texts_alone(trick: str) -> list[tuple[int, ...]]:
    """The tokens of 24 texts, each by an engine that has written nothing else: the same for every batch size."""
    config = replace(CONFIG, **TRICKS[trick])
    alone = [answers(engine_of(config, prefix_sharing=False, max_batch_size=1), [g])[0] for g in generations(24)]
    return [answer.completions[0].token_ids for answer in alone]


@pytest.mark.parametrize("trick", ["all", "windows"])
@pytest.mark.parametrize(("slots", "share"), [(1, False), (64, True), (7, True), (7, False)])
def test_batch_composition_changes_no_greedy_text(trick: str, slots: int, share: bool) -> None:
    config = replace(CONFIG, **TRICKS[trick])
    engine = engine_of(config, prefix_sharing=share, max_batch_size=slots, chunk=150)
    together = answers(engine, list(reversed(generations(24))))
    assert [a.completions[0].token_ids for a in reversed(together)] == texts_alone(trick)


def test_a_sampled_text_belongs_to_its_request_not_to_its_batch() -> None:
    sampling = Sampling(temperature=0.9, top_p=0.9, top_k=50, repetition_penalty=1.1, seed=3)
    requests = generations(8, sampling=sampling, n=2)
    together = answers(engine_of(), requests)
    alone = [answers(engine_of(max_batch_size=1), [r])[0] for r in requests]
    assert together == alone
    assert together[0].completions[0].text != together[0].completions[1].text


def test_a_stop_string_is_found_across_tokens_and_is_not_part_of_the_text() -> None:
    request = generations(1)[0]
    (free,) = answers(engine_of(), [request])
    text = free.completions[0].text
    found = re.search(r"[ -~]{2,}", text)
    assert found is not None, "no readable stop string in this random text"
    stop = found.group()[:3]
    (stopped,) = answers(engine_of(), [replace(request, stop=(stop, "never there"))])
    assert stopped.completions[0].text == text[: text.index(stop)]
    assert stopped.completions[0].finish_reason == "stop"


def test_int8_cache_is_used_in_scoring_and_generation_and_is_said() -> None:
    plain, packed = engine_of(), engine_of(codec=Int8Codec(upstream=False))
    questions = exam(6)
    a, b = answers(plain, questions), answers(packed, questions)
    differences = [abs(x - y) for p, q in zip(a, b) for x, y in zip(p.logprobs, q.logprobs)]
    assert 0 < max(differences) < 1.5
    assert "int8" in packed.info["kv_cache"]
    assert answers(packed, generations(3))[0].completions[0].num_tokens > 0


def test_int8_cache_answers_do_not_depend_on_sharing_or_chunks() -> None:
    alone = engine_of(codec=Int8Codec(upstream=False), prefix_sharing=False, max_batch_tokens=1)
    shared = engine_of(codec=Int8Codec(upstream=False), chunk=50)
    for a, b in zip(answers(alone, exam(12)), answers(shared, exam(12))):
        # a flipped code is 1/255 of a head's range, and how many flip depends on the CPU's kernels (8e-3 with AVX2)
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-2)


@pytest.mark.parametrize("codec", [None, Int8Codec(upstream=False)])
def test_forks_of_a_cache_grow_apart_and_leave_it_as_it_was(codec: Int8Codec | None) -> None:
    forward = ModelRunner(model_of(replace(CONFIG, windows=(None, 8, None))), codec=codec, prefill_chunk=5)
    draw = random.Random(0)
    stem, first, second = (draw.choices(range(256), k=k) for k in (12, 13, 7))
    parent = forward.grown(None, stem, 40)
    forks = [forward.grown(parent, ids, 40) for ids in (first, second)]
    forks.append(forward.grown(forks[0], second, 40))
    alone = [forward.grown(None, ids, 40) for ids in (stem, stem + first, stem + second, stem + first + second)]
    for grown, wanted in zip((parent, *forks), alone, strict=True):
        assert grown.length == wanted.length
        for layer in range(3):
            kept, same = grown.read(layer), wanted.read(layer)
            assert kept is not None
            assert same is not None
            assert kept[2] == same[2]
            for mine, other in zip(kept[:2], same[:2]):
                step = 1e-5 if codec is None else 1 / 100  # of eight bits, a value may round the other way
                assert (mine - other).abs().max() <= step * other.abs().max()


def test_a_batch_size_bounds_scoring_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run_batch = Scorer._run_batch

    def counted(self: Scorer, chosen: list, *rest: object) -> object:
        sizes.append(len(chosen))
        return run_batch(self, chosen, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Scorer, "_run_batch", counted)
    alone = answers(engine_of(max_batch_size=1, max_batch_tokens=4096), exam())
    assert set(sizes) == {1}
    sizes.clear()
    together = answers(engine_of(max_batch_size=7, max_batch_tokens=4096), exam())
    assert max(sizes) == 7
    assert [a.best for a in alone] == [b.best for b in together]


def test_running_out_of_memory_halves_the_batch_and_loses_nothing() -> None:
    engine = engine_of(max_batch_tokens=4000)
    plain = answers(engine_of(), exam())
    packed = engine.forward.packed
    refused: list[int] = []

    def small_memory(sequences: list, *rest: object, **options: object) -> Tensor:
        if len(sequences) > 3:
            refused.append(len(sequences))
            raise torch.OutOfMemoryError("planted")
        return packed(sequences, *rest, **options)  # type: ignore[arg-type]

    engine.forward.packed = small_memory  # type: ignore[method-assign]
    found = answers(engine, exam())
    assert refused
    assert engine.info["num_oom"] == len(refused)
    assert [a.best for a in found] == [a.best for a in plain]


def test_the_eager_twin_agrees_with_the_fused_kernel() -> None:
    forward = ModelRunner(model_of(CONFIG), attention="eager")
    plain = answers(NativeEngine(forward, TOKENIZER), exam())
    for a, b in zip(plain, answers(engine_of(), exam())):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)


def test_a_finished_run_keeps_no_slots() -> None:
    """Freed at once, without a garbage collection: a cycle would hold the cache of a whole batch through the next."""
    engine, alive = engine_of(), []
    slots = engine.forward.slots
    engine.forward.slots = lambda *size: (made := slots(*size), alive.append(weakref.ref(made)))[0]  # type: ignore
    gc.disable()
    try:
        answers(engine, generations(3))
        assert [ref() for ref in alive] == [None]
    finally:
        gc.enable()
