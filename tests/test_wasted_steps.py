"""A step that was launched before a stop string was read is wasted for the row that ended, and for no other row.

Rows of every kind run side by side: greedy, penalised and drawn ones, after three shared heads, more rows than slots.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from recorded_graph import recorded_graphs
from test_captured_steps import SAMPLINGS
from test_decode_step import CODECS, SMALL
from test_native_engine import CONFIG, TRICKS, answers, engine_of, generations

from qwen_eval.core import Completion, Completions, Generate
from qwen_eval.engines.native import generation
from qwen_eval.engines.native.engine import NativeEngine
from qwen_eval.engines.native.generation import Row
from qwen_eval.models.runner import ModelRunner

NUM_SLOTS = 4
KINDS = list(SAMPLINGS.values())


def mixed(num: int) -> list[Generate]:
    """Neighbours are chosen in different ways, so a freed slot serves another kind of row than before."""
    return [replace(ask, sampling=KINDS[i % len(KINDS)]) for i, ask in enumerate(generations(num))]


def stopped(asks: Sequence[Generate], free: Sequence[Completions]) -> list[Generate]:
    """Three of four with a letter of their own text as stop string: where it ends the row, nobody can foresee."""
    letters = [re.findall(r"[!-~]", answer.completions[0].text[2 + i % 7 :]) for i, answer in enumerate(free)]
    return [replace(ask, stop=tuple(found[:1]) if i % 4 else ()) for i, (ask, found) in enumerate(zip(asks, letters))]


def overlapped(engine: NativeEngine, is_captured: bool, monkeypatch: pytest.MonkeyPatch) -> NativeEngine:
    engine.generator.overlap = True
    if is_captured:
        engine.generator.make_graphs = recorded_graphs
        monkeypatch.setattr("qwen_eval.models.runner.buckets_for", lambda _: SMALL)
    return engine


def own_cache(runner: ModelRunner, row: Row) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer for the tokens in a row's slot, computed anew by one forward."""
    depth = row.prefix.length if row.prefix else 0
    ids = (*row.prompt, *row.tokens[:-1])[depth:]
    slots = runner.slots(1, len(ids))
    runner.packed([ids], [len(row.prompt)], prefixes=[row.prefix], last_only=True, sink=(slots, [0]))
    return [slots.read(layer, 1, len(ids)) for layer in range(runner.config.num_layers)]


class Watched:
    """Looks at every slot whenever rows are about to get new slots, and counts what it looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_rows = 0
        admitted = generation._Batch._admitted

        def look_and_admit(batch: generation._Batch) -> list[generation._Flight]:
            assert batch.flight is None, "a step is under way while slots change hands"
            for slot, row in enumerate(batch.active):
                self.look(batch, slot, row)
            return admitted(batch)

        monkeypatch.setattr(generation._Batch, "_admitted", look_and_admit)

    def look(self, batch: generation._Batch, slot: int, row: Row) -> None:
        self.num_rows += len(row.tokens) > 1
        choice, runner = batch.choice, batch.forward
        assert int(choice.counts_S[slot]) == len(row.tokens), "noise was drawn that belongs to no token"
        assert choice.seen_SV[slot].nonzero().flatten().tolist() == sorted({*row.prompt, *row.tokens})
        for layer, wanted in enumerate(own_cache(runner, row)):
            for held, fresh in zip(batch.slots.read(layer, slot + 1, row.cached), wanted, strict=True):
                step = 1e-4 if runner.codec.is_exact else 0.02  # of eight bits, a value may round the other way
                assert (held[slot] - fresh[0]).abs().max() <= step * fresh.abs().max()


def ids_of(found: Sequence[Completions]) -> list[tuple[tuple[int, ...], str]]:
    completions: list[Completion] = [answer.completions[0] for answer in found]
    return [(completion.token_ids, completion.finish_reason) for completion in completions]


@pytest.mark.parametrize(("trick", "codec", "is_captured"), [
    ("all", "plain", False), ("all", "int8", True), ("windows", "plain", True),
])  # fmt: skip
def test_a_wasted_step_neither_advances_a_rows_noise_nor_writes_into_a_reassigned_slot(
    trick: str, codec: str, is_captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, **TRICKS[trick])
    options: dict[str, Any] = {"codec": CODECS[codec]}
    asks = stopped(mixed(15), answers(engine_of(config, **options), mixed(15)))
    alone = answers(engine_of(config, **options, max_batch_size=1, prefix_sharing=False), asks)
    watched = Watched(monkeypatch)
    engine = overlapped(engine_of(config, **options, max_batch_size=NUM_SLOTS), is_captured, monkeypatch)
    num_runs = 2 if is_captured and codec == "plain" else 1  # the second finds the slots of the first
    together = [answers(engine, asks) for _ in range(num_runs)]
    reasons = [answer.completions[0].finish_reason for answer in alone]
    assert {"stop", "length"} <= set(reasons)
    assert watched.num_rows > len(asks), "few rows were under way when slots changed hands"
    for found in together:
        differing = [i for i, (a, b) in enumerate(zip(ids_of(found), ids_of(alone), strict=True)) if a != b]
        assert len(differing) <= (0 if codec == "plain" else 1)  # a code that rounds the other way may turn a token


def test_a_step_is_wasted_only_where_the_end_could_not_be_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end by their length alone are never fed once more."""
    engine = overlapped(engine_of(max_batch_size=NUM_SLOTS), False, monkeypatch)
    asks = mixed(12)
    fed = [0]
    step = engine.forward.model.forward

    def counted(ids: torch.Tensor, rotations: Any, attend: Any, *rest: Any) -> torch.Tensor:
        fed[0] += len(ids) if type(attend).__name__ == "DecodeAttend" else 0
        return step(ids, rotations, attend, *rest)

    engine.forward.model.forward = counted  # type: ignore
    found = answers(engine, asks)
    assert all(answer.completions[0].finish_reason == "length" for answer in found)
    assert fed[0] == sum(answer.completions[0].num_tokens - 1 for answer in found)
