"""How often the host waits for the device: once a batch of scores, a round of admissions or a decode step.

The device is a stand-in, so its values can be read; every operation by which a value gets to the host is noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_spread import opened
from tiny_checkpoint import write_tiny_qwen2
from two_devices import FIRST, Elsewhere, TwoDevices, _Literals, _tensors

from qwen_eval.core import Choose, Generate, Prompt, Request, Sampling, Score
from qwen_eval.engines.native.engine import NativeEngine
from qwen_eval.engines.native.scheduler import Packing
from qwen_eval.engines.native.scoring import BATCHES_UNDER_WAY

COUNTING = ("aten::nonzero", "aten::masked_select", "aten::unique")  # the size of their output is a value
DRAWN = Sampling(temperature=0.9, top_p=0.9, top_k=20, repetition_penalty=1.2, seed=3)


class HostWaits(TwoDevices):  # type: ignore[no-untyped-call]
    """`events`: "forward" of each packed forward, and the name of each operation that brings a value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = super().__torch_dispatch__(func, types, args, kwargs), func._schema.name
        there = [x for x in (*_tensors(args), *_tensors((kwargs or {}).values())) if isinstance(x, Elsewhere)]
        is_read = bool(there) and not any(isinstance(x, Elsewhere) for x in _tensors([result]))
        is_masked = name.startswith("aten::index") and any(x.dtype == torch.bool for x in there[1:])
        if is_read or (there and name in COUNTING) or is_masked:
            self.events.append(name)
        return result


@contextmanager
def watched(path: Path) -> Iterator[tuple[NativeEngine, list[str]]]:
    with HostWaits() as waits, _Literals():
        engine = opened(path, str(FIRST))
        packed = engine.forward.packed

        def noted(*args: Any, **options: Any) -> torch.Tensor:
            waits.events.append("forward")
            return packed(*args, **options)

        engine.forward.packed = noted  # type: ignore[method-assign]
        waits.events.clear()
        yield engine, waits.events


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2(tmp_path_factory.mktemp("plain"))


def choices(num: int) -> list[Request]:
    return [
        Choose(prompt=Prompt.raw(f"a head that all share, {'x' * (i % 5)}{i}"), choices=("A", "B")) for i in range(num)
    ]


@pytest.mark.parametrize("kind", ["choices", "choices of several tokens", "texts"])
def test_a_batch_of_scores_is_fetched_once_and_right_behind_it(kind: str, path: Path) -> None:
    requests: dict[str, list[Request]] = {
        "choices": choices(24),
        "choices of several tokens": [Choose(prompt=r.prompt, choices=("one", "two")) for r in choices(12)],
        "texts": [Score(prompt=Prompt.raw(f"a short text {i}")) for i in range(24)],
    }
    with watched(path) as (engine, events):
        assert len(list(engine.run(requests[kind]))) == len(requests[kind])
    assert events == ["forward", "aten::copy_"] * 8  # of three sequences each


def test_scores_are_awaited_a_few_batches_later(path: Path) -> None:
    with watched(path) as (engine, events):
        answers = engine.run(choices(24))
        next(answers)
        assert events.count("forward") == BATCHES_UNDER_WAY + 1
        assert len(list(answers)) == 23


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_rows_of_several_prefixes_are_admitted_before_the_first_token_is_awaited(
    sampling: Sampling, path: Path
) -> None:
    heads = ("0123456789" * 4, "9876543210" * 4)
    requests: list[Request] = [
        Generate(prompt=Prompt.raw(f"{heads[i % 2]}{i}"), max_new_tokens=3, sampling=sampling) for i in range(6)
    ]
    with watched(path) as (engine, events):
        engine.generator.max_slots, engine.generator.packing = 6, Packing()
        engine.generator.on_step = lambda num_rows, _: events.append(f"{num_rows} tokens")
        assert len(list(engine.run(requests))) == 6
    fetched = "aten::copy_"
    assert events == ["forward", fetched] * 2 + ["3 tokens"] * 2 + [fetched] * 2 + ["6 tokens"] * 2


@pytest.mark.parametrize("read", [
    lambda x: x[0].item(), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x.cpu(),
    lambda x: torch.empty(3).copy_(x),
])  # fmt: skip
def test_every_way_to_read_a_value_is_noted(read: Any) -> None:
    with HostWaits() as waits, _Literals():
        x = torch.ones(3).to(FIRST) * 2
        assert not waits.events
        read(x)
        assert waits.events
