"""Captured and overlapped decode steps, and tokens drawn on the device, give the answers of plain steps."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from recorded_graph import record, recorded_graphs
from test_decode_step import SMALL
from test_native_engine import CONFIG, TRICKS, answers, engine_of, generations

from qwen_eval.core import Prompt, Sampling
from qwen_eval.engines.native.engine import NativeEngine
from qwen_eval.engines.native.sampling import NON_FINITE, Draw, TokenChoice, distribution, noise_key, uniform
from qwen_eval.models.graph import StepGraphs

SAMPLINGS = {
    "greedy": Sampling(),
    "greedy with a penalty": Sampling(repetition_penalty=1.2),
    "drawn": Sampling(temperature=0.9, top_p=0.9, top_k=50, repetition_penalty=1.1, seed=3),
}


def captured(engine: NativeEngine) -> NativeEngine:
    engine.generator.make_graphs = recorded_graphs
    return engine


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("trick", ["all", "windows"])
def test_captured_steps_give_the_same_texts(trick: str, sampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, **TRICKS[trick])
    requests = generations(12, sampling=SAMPLINGS[sampling])
    plain = answers(engine_of(config, prefix_sharing=False), requests)
    monkeypatch.setattr("qwen_eval.models.runner.buckets_for", lambda _: SMALL)
    engine = captured(engine_of(config, prefix_sharing=False, max_batch_size=5))
    assert answers(engine, requests) == plain
    assert "captured" in engine.info["decode_steps"]
    kept = engine.generator._kept
    assert kept is not None
    assert kept.graphs is not None
    assert kept.graphs.num_replays > 2 * kept.graphs.num_captured > 0
    before = kept.graphs.num_captured
    assert answers(engine, requests) == plain
    assert engine.generator._kept is kept  # a second run of the same shape captures little or nothing anew
    assert kept.graphs.num_captured <= before + 2


def test_rows_of_one_prefix_and_of_several_are_captured() -> None:
    several = generations(8)
    one = [replace(g, prompt=Prompt.raw("a head that all share, of more than sixty tokens. " * 3 + "xyz" * i))
           for i, g in enumerate(several)]  # fmt: skip
    for requests in (one, several):
        engine = captured(engine_of())
        engine.forward.decoding = partial(engine.forward.decoding, buckets=SMALL)  # type: ignore[method-assign]
        assert answers(engine, requests) == answers(engine_of(), requests)
        assert engine.generator._kept is not None
        assert engine.generator._kept.graphs is not None
        assert engine.generator._kept.graphs.num_replays > 10


def test_a_step_captured_with_one_prefix_serves_the_next() -> None:
    """Heads of about one length, asked one after another: what the first captured is replayed for all."""
    engine = captured(engine_of(max_batch_size=2))
    engine.forward.decoding = partial(engine.forward.decoding, buckets=SMALL)  # type: ignore[method-assign]
    requests = [
        replace(g, prompt=Prompt.raw(f"{'abcdefg'[i // 2] * 40}, a head of its own{i % 2}"), max_new_tokens=12)
        for i, g in enumerate(generations(12))
    ]
    assert answers(engine, requests) == answers(engine_of(max_batch_size=2), requests)
    assert engine.generator._kept is not None
    graphs = engine.generator._kept.graphs
    assert graphs is not None
    assert graphs.num_replays > 6 * graphs.num_captured


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_step_under_way_changes_no_text_and_wastes_one_step_at_most(sampling: str) -> None:
    free = answers(engine_of(), generations(12, sampling=SAMPLINGS[sampling]))
    letters = [re.findall(r"[ -~]", a.completions[0].text[3:]) for a in free]
    stop = tuple({found[0] for found in letters if found})
    requests = [replace(g, stop=stop) for g in generations(12, sampling=SAMPLINGS[sampling])]
    plain = answers(engine_of(max_batch_size=5), requests)
    engine = engine_of(max_batch_size=5)
    engine.generator.overlap = True
    fed, launch = [0], engine.forward.model.forward

    def counted(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        fed[0] += len(ids) if len(ids) <= 5 else 0
        return launch(ids, *rest)

    engine.forward.model.forward = counted  # type: ignore[method-assign]
    assert answers(engine, requests) == plain
    needed = sum(c.num_tokens - 1 for a in plain for c in a.completions)
    ended = sum(c.finish_reason != "length" for a in plain for c in a.completions)
    assert ended > 0
    assert needed <= fed[0] <= needed + ended + 5 * len(plain)  # short prefills are among what is counted


def test_what_cannot_be_captured_runs_plainly_and_says_why() -> None:
    def refuse(compute: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = engine_of(prefix_sharing=False)
    graphs: StepGraphs[Any] = StepGraphs(refuse)
    engine.generator.make_graphs = lambda _: graphs
    requests = [replace(g, max_new_tokens=20) for g in generations(1, sampling=SAMPLINGS["drawn"], n=2)]
    engine.forward.decoding = partial(engine.forward.decoding, buckets=SMALL)  # type: ignore[method-assign]
    assert answers(engine, requests) == answers(engine_of(), requests)
    assert graphs.num_captured == 0
    assert "not permitted" in engine.info["decode_steps"]


def test_captured_steps_keep_a_bounded_memory() -> None:
    used = [0]

    def growing(compute: Any) -> Any:
        used[0] += 100
        return record(compute)

    graphs: StepGraphs[torch.Tensor] = StepGraphs(growing, used_bytes=lambda: used[0], max_bytes=250)
    x = torch.zeros(3)
    for key in (1, 2, 3, 4, 5):
        for _ in range(3):
            graphs.run(key, lambda: x.add_(1).clone())
    assert x.tolist() == [15.0] * 3  # every step happened once
    assert graphs.num_captured == 3
    assert graphs.stopped is not None


# --- noise ----------------------------------------------------------------------------------------------------------


def test_the_noise_is_splitmix64() -> None:
    """First outputs of the reference implementation for seed 0 and seed 1234567."""
    found = uniform(torch.tensor([0, 1234567, 1234567]), torch.tensor([0, 0, 1]))
    wanted = [0xE220A8397B1DCDAF, 6457827717110365317, 3203168211198807973]
    assert found.tolist() == [(word >> 11) * 2.0**-53 for word in wanted]


@pytest.mark.parametrize("sampling", [
    Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=5), Sampling(temperature=1.3, top_p=0.6),
    Sampling(temperature=0.9, top_p=0.8, top_k=20, repetition_penalty=1.3, seed=9), Sampling(repetition_penalty=1.5),
])  # fmt: skip
def test_a_token_is_that_of_the_plain_distribution_whatever_is_chosen_beside_it(sampling: Sampling) -> None:
    others = [Sampling(), Sampling(temperature=2.0, top_k=3, repetition_penalty=1.1)]
    logits = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)) * 3
    prompts = [[5, 6], [1, 2, 3, 399], [7]]
    choice = TokenChoice([sampling, *others], 3, 400, torch.device("cpu"))
    choice.admit(0, [Draw(sampling=s, prompt=p) for s, p in zip((others[0], sampling, others[1]), prompts)])
    ids = list(prompts[1])
    for position in range(6):
        token = int(choice(logits)[1])
        probabilities = distribution(logits[1], ids, sampling)
        key = torch.tensor([noise_key(sampling, prompts[1], 0)])
        below = probabilities.double().cumsum(0)
        wanted = int(torch.searchsorted(below, uniform(key, torch.tensor([position])) * below[-1], right=True))
        if sampling.is_greedy:
            wanted = int(probabilities.argmax())
        assert token == wanted
        ids.append(token)


def test_drawn_tokens_come_as_often_as_they_are_likely() -> None:
    logits, sampling = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), Sampling(temperature=1.0)
    choice = TokenChoice([sampling], 1, 4, torch.device("cpu"))
    choice.admit(0, [Draw(sampling=sampling, prompt=[1])])
    counts = torch.bincount(torch.cat([choice(logits) for _ in range(4000)]), minlength=4)
    assert torch.allclose(counts / 4000, logits[0].softmax(0), atol=0.03)


def test_a_row_without_a_distribution_is_named_and_not_drawn() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.5)
    choice = TokenChoice([sampling], 2, 4, torch.device("cpu"))
    choice.admit(0, [Draw(sampling=sampling, prompt=[1])] * 2)
    found = choice(torch.tensor([[0.0, float("nan"), 0.0, 0.0], [0.0, 9.0, 0.0, 0.0]]))
    assert found.tolist() == [NON_FINITE, 1]
