"""A decode step reads nothing back from the device, and its padded shapes change no answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_native_engine import CONFIG, TOKENIZER, TRICKS, answers, engine_of, exam, generations, model_of
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_eval.core import Prompt, Score
from qwen_eval.engines.native.engine import NativeEngine
from qwen_eval.engines.native.sampling import greedy_tokens
from qwen_eval.models.attend import DecodeAttend
from qwen_eval.models.decode import COARSE, EXACT, Buckets, Decoding, RunningRow
from qwen_eval.models.heads import Heads
from qwen_eval.models.hidden import HiddenStates
from qwen_eval.models.kv_cache import Int8Codec, KvCodec
from qwen_eval.models.prefix_pool import PrefixPools
from qwen_eval.models.rope import Rotation
from qwen_eval.models.runner import ModelRunner
from qwen_eval.models.transformer import Transformer

SMALL = Buckets(num_keys=8, is_exact_rows=False)  # pads rows and keys even in a test
HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item")
CODECS: dict[str, KvCodec | None] = {"plain": None, "int8": Int8Codec(upstream=False)}


class NoHostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on every operation that makes the host wait for a value of the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert not name.startswith(HOST_READS), f"{func} reads a value back from the device"
        if name in ("index", "index_put", "index_put_"):
            indices = [index for index in args[1] if index is not None]
            assert all(index.dtype != torch.bool for index in indices), f"{func} with a mask counts on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("read", [
    lambda x: x[0].item(), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: int(x.max()),
])  # fmt: skip
def test_the_guard_sees_reads_and_masks(read: Any) -> None:
    with NoHostReads(), pytest.raises(AssertionError, match=r"device|host"):
        read(torch.ones(3))


def running(runner: ModelRunner, buckets: Buckets, *, is_pooled: bool = False) -> Decoding:
    """Five rows under way: two after one prefix, one after another, two alone, one of them of another alpha."""
    prefixes = [runner.grown(None, list(range(1, n + 1)), 60) for n in (30, 11)]
    prompts = [[7, 8, 9], [5] * 6, [3, 1, 2], [2] * 40, [9] * 70]
    owners = [prefixes[0], prefixes[0], prefixes[1], None, None]
    slots = runner.slots(8, 128)
    totals = [len(p) + (o.length if o else 0) for p, o in zip(prompts, owners)]
    runner.packed(prompts, totals, prefixes=owners, last_only=True, sink=(slots, range(5)))

    def finish(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = runner.model.logits(hidden)
        return logits, greedy_tokens(logits)

    decoding = runner.decoding(
        slots, prefill_lengths=totals, num_positions=200, finish=finish, buckets=buckets, is_pooled=is_pooled
    )
    rows = [RunningRow(prefill_tokens=t, own_tokens=len(p), prefix=o) for t, p, o in zip(totals, prompts, owners)]
    decoding.arrange(rows, [1, 2, 3, 4, 5])
    return decoding


def steps(decoding: Decoding, count: int) -> list[torch.Tensor]:
    return [decoding.step()[0].clone() for _ in range(count)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("buckets", [EXACT, SMALL], ids=["exact", "padded"])
@pytest.mark.parametrize("is_pooled", [False, True], ids=["in place", "pooled"])
def test_a_step_reads_nothing_back(trick: str, codec: str, buckets: Buckets, is_pooled: bool) -> None:
    runner = ModelRunner(model_of(replace(CONFIG, **TRICKS[trick])), codec=CODECS[codec])
    decoding = running(runner, buckets, is_pooled=is_pooled)
    with NoHostReads():
        steps(decoding, 3)
        decoding.arrange(decoding.rows[:2], [1, 2])  # rows of one prefix are left
        steps(decoding, 1)


@pytest.mark.parametrize("trick", ["all", "windows"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("is_pooled", [False, True], ids=["in place", "pooled"])
def test_a_step_runs_without_values_at_all(trick: str, codec: str, is_pooled: bool) -> None:
    """On the meta device there is nothing to read: every way to read a value raises."""
    config = replace(CONFIG, **TRICKS[trick])
    with torch.device("meta"):
        model = Transformer(config)
    decoding = running(ModelRunner(model, codec=CODECS[codec], attention="eager"), SMALL, is_pooled=is_pooled)
    logits, *_ = steps(decoding, 3)
    assert logits.shape == (5, config.vocab_size)


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("codec", CODECS)
def test_padded_rows_and_keys_change_no_logit(trick: str, codec: str) -> None:
    model = model_of(replace(CONFIG, **TRICKS[trick]))
    exact, padded = (running(ModelRunner(model, codec=CODECS[codec]), b) for b in (EXACT, SMALL))
    for a, b in zip(steps(exact, 12), steps(padded, 12)):
        assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))


def test_upstreams_int8_cache_has_a_scale_for_each_row_of_a_step() -> None:
    """The original decodes one sequence a call, and a call has one scale: a row beside it must not widen its range."""
    runner = ModelRunner(model_of(CONFIG), codec=Int8Codec(upstream=True))
    width = CONFIG.num_heads + 2 * CONFIG.num_kv_heads
    qkv = (
        torch.randn(2, width, CONFIG.head_dim, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1, 100])[:, None, None]
    )

    def step(rows: list[int]) -> torch.Tensor:
        slots, count = runner.slots(2, 4), len(rows)
        own, turns = torch.zeros(count, dtype=torch.long), torch.zeros(count, CONFIG.rotary_dim // 2)
        heads = Heads(
            qkv_NHD=qkv[rows],
            num_queries=CONFIG.num_heads,
            num_keys=CONFIG.num_kv_heads,
            rotation=Rotation(cos=turns + 1, sin=turns, logn=None),
            norms=None,
        )
        return DecodeAttend(slots, own, own, 1, is_full=True, kernel="eager")(0, heads)

    assert torch.equal(step([0, 1]), torch.cat([step([0]), step([1])]))


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("codec", CODECS)
def test_prefixes_as_data_change_no_logit(trick: str, codec: str) -> None:
    """Rows of two prefixes and of none; then other rows, among them those of one prefix alone."""
    model = model_of(replace(CONFIG, **TRICKS[trick]))
    in_place, pooled = (running(ModelRunner(model, codec=CODECS[codec]), SMALL, is_pooled=p) for p in (False, True))
    rows = [decoding.rows for decoding in (in_place, pooled)]
    for members in (slice(0, 5), slice(0, 2), slice(2, 3), slice(3, 5), slice(0, 4)):
        for decoding, all_rows in zip((in_place, pooled), rows):
            decoding.arrange(all_rows[members], [1, 2, 3, 4, 5][members])
        assert pooled.shape().key is not None
        assert (in_place.shape().key is None) == (members != slice(3, 5))
        for a, b in zip(steps(in_place, 3), steps(pooled, 3)):
            assert torch.allclose(a, b, atol=1e-5 * float(a.abs().max()))


def test_a_pool_is_made_for_each_size_and_no_larger_than_is_granted() -> None:
    runner = ModelRunner(model_of(CONFIG))
    prefixes = [runner.grown(None, list(range(1, n)), 60) for n in (5, 9, 30)]
    pools = PrefixPools(runner.slots, SMALL.rows, SMALL.keys, max_tokens=100)
    first = pools.pool(2, 8, 5)
    assert first is not None
    assert first.take(prefixes[:2]) == [0, 1]
    assert first.take(prefixes[1:2]) == [0]  # the only one comes first
    assert first.take([prefixes[1], prefixes[0]]) == [0, 1]
    assert pools.pool(1, 6, 0) is first
    second = pools.pool(1, 29, 0)
    assert second is not None
    assert (second.slots.num_slots, second.slots.capacity) == (1, 32)
    assert pools.pool(2, 29, 5) is None  # 16 + 32 + 64 tokens
    few = PrefixPools(runner.slots, SMALL.rows, SMALL.keys, max_tokens=1000, max_gathered=100)
    assert few.pool(2, 29, 3) is not None
    assert few.pool(2, 29, 4) is None  # 4 x 32 tokens would be gathered


@pytest.mark.parametrize("trick", ["all", "windows"])
def test_packed_forwards_read_nothing_back(trick: str) -> None:
    runner = ModelRunner(model_of(replace(CONFIG, **TRICKS[trick])))
    prompts = [tuple(TOKENIZER.render(job.prompt)) for job in exam(6)]
    lengths = [len(prompt) for prompt in prompts]
    with NoHostReads():
        prefixes = runner.grown_together([None] * 6, prompts, lengths)
        runner.packed(prompts, lengths, prefixes=prefixes, last_only=True)
    assert [prefix.length for prefix in prefixes] == lengths


@pytest.mark.parametrize("needed", [1, 255, 256, 257, 2048, 2049, 5000, 32768])
def test_buckets_hold_what_is_needed_in_few_sizes(needed: int) -> None:
    assert EXACT.keys(needed) == EXACT.rows(needed) == needed
    assert needed <= COARSE.keys(needed) <= max(256, needed * 2)
    assert needed <= COARSE.rows(needed) < needed + max(8, needed / 4)
    assert len({COARSE.keys(n) for n in range(1, 32769)}) <= 40
    assert len({COARSE.rows(n) for n in range(1, 257)}) <= 20


def test_prefixes_side_by_side_equal_prefixes_one_by_one() -> None:
    runner = ModelRunner(model_of(CONFIG))
    parent = runner.grown(None, list(range(1, 21)), 60)
    parts = [[4, 5, 6], list(range(30, 70)), [9]]
    together = runner.grown_together([parent, parent, None], parts, [60] * 3)
    for prefix, start, ids in zip(together, (parent, parent, None), parts):
        alone = runner.grown(start, ids, 60)
        assert prefix.length == alone.length
        for layer in range(CONFIG.num_layers):
            for mine, wanted in zip(prefix.read(layer)[:2], alone.read(layer)[:2]):  # type: ignore[index]
                assert torch.allclose(mine, wanted, atol=1e-5 * float(wanted.abs().max()))
    assert parent.length == 20


def test_hidden_states_reach_their_text_whatever_is_packed_together(tmp_path: Path) -> None:
    texts = ["a text that is scored, number one", "and another", "a text that is scored, number two"]
    engine = NativeEngine(ModelRunner(model_of(CONFIG)), TOKENIZER)
    answers(engine, [Score(prompt=Prompt.raw(text), keep_hidden=str(tmp_path)) for text in texts])
    kept = HiddenStates(tmp_path)
    assert sorted(len(kept.read(key)) for key in kept.keys()) == sorted(len(t) - 1 for t in texts)  # noqa: SIM118


def test_greedy_texts_do_not_depend_on_the_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = answers(engine_of(chunk=150), generations(16))
    monkeypatch.setattr("qwen_eval.models.runner.buckets_for", lambda _: SMALL)
    assert answers(engine_of(chunk=150, max_batch_size=7), generations(16)) == plain
