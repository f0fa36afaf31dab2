"""The native engine on CUDA devices that are not there (fake_cuda.py): a CPU's answers, and a host that never waits."""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import RUBBISH, fake_cuda
from test_gptq import LAYOUTS, made, relative
from test_native_engine import CONFIG, TOKENIZER, TRICKS, answers, engine_of, exam, generations
from test_spread import opened, requests
from tiny_checkpoint import write_tiny_qwen2
from torch import Tensor
from torch.nn import functional as F

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import ConfigError, EngineError, Prompt, Sampling, Score
from qwen_eval.engines.native.engine import NativeEngine, memory_limits, open_engine
from qwen_eval.engines.native.generation import Generator
from qwen_eval.engines.native.scheduler import is_out_of_memory
from qwen_eval.models import fused
from qwen_eval.models.attend import band
from qwen_eval.models.attention import partial
from qwen_eval.models.checkpoint import Placement, random_model
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.decode import COARSE
from qwen_eval.models.graph import cuda_graphs
from qwen_eval.models.kv_cache import Int8Codec, PlainCodec, Prefix
from qwen_eval.models.load import choose_dtype, open_forward
from qwen_eval.models.quant import gptq, kernels
from qwen_eval.models.rope import Rope, RowTables
from qwen_eval.models.runner import ModelRunner, choose_decode_kernel
from qwen_eval.models.transfer import Fetched
from qwen_eval.models.transformer import Transformer
from qwen_eval.profile.cells import cells
from qwen_eval.profile.child import _open, runner, warm_up
from qwen_eval.profile.config import ProfileSpec, check
from qwen_eval.profile.memory import limit_memory

GPU, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
DRAWN = Sampling(temperature=0.9, top_p=0.9, top_k=50, repetition_penalty=1.1, seed=3)
MIB = 2**20


def model_on(
    device: torch.device, config: ModelConfig = CONFIG, *, elsewhere: Mapping[str, torch.device] | None = None
) -> Transformer:
    """That of `engine_of`; some units on other devices: {"embed": SECOND}."""
    here = Placement(device=device, dtype=torch.float32)
    units = {name: replace(here, device=there) for name, there in (elsewhere or {}).items()}
    model = random_model(config, replace(here, elsewhere=units), 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(12.0 if "layers" in name else 50.0)
    return model


def work() -> list[Any]:
    """Shared heads, prompts beyond a chunk, rows that end and move, drawn tokens, a text to score."""
    text = Score(prompt=Prompt.raw("a text that is scored. " * 9))
    texts = [
        replace(ask, max_new_tokens=5 + i) for i, ask in enumerate([*generations(3), *generations(2, sampling=DRAWN)])
    ]
    return [*exam(4), *texts, text]


def plainly(found: list[Any]) -> list[Any]:
    """Texts and choices; log-probabilities differ by rounding."""
    return [a.best if hasattr(a, "best") else getattr(a, "completions", None) for a in found]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2(tmp_path_factory.mktemp("tiny"))


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trick", "codec"), [
    ("all", None), ("windows", None), ("windows", Int8Codec(upstream=False)),
])  # fmt: skip
def test_answers_on_cuda_are_those_of_a_cpu_and_the_host_waits_for_tables_only(trick: str, codec: Any) -> None:
    config = replace(CONFIG, **TRICKS[trick])
    wanted = answers(engine_of(config, codec=codec, chunk=150), work())
    with fake_cuda() as cuda:
        engine = NativeEngine(ModelRunner(model_on(GPU, config), codec=codec, prefill_chunk=150), TOKENIZER)
        cuda.waits.clear()
        found = answers(engine, work())
        assert "captured" in str(engine.info["decode_steps"])
    assert plainly(found) == plainly(wanted)
    for a, b in zip(found, wanted):
        if not hasattr(a, "completions"):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3, rel=1e-3)
    assert all(wait.endswith(("models/rope.py:_build", "models/rope.py:logn")) for wait in cuda.waits), cuda.waits


@pytest.mark.parametrize("device", ["auto", "cuda:1", "cuda:0+cuda:1"])
def test_a_checkpoint_answers_on_each_choice_of_devices(device: str, tiny: Path) -> None:
    wanted = answers(opened(tiny, "cpu"), requests())
    with fake_cuda(2):
        engine = opened(tiny, device)
        assert plainly(answers(engine, requests())) == plainly(wanted)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_obeys_the_rules_of_the_kernels(dtype: str, tiny: Path) -> None:
    with fake_cuda():
        spec = ModelSpec(name="tiny", path=str(tiny), dtype=dtype, device="cuda", window="24,4096")
        engine = open_engine(EngineSpec(max_batch_size=3, prefill_chunk=48), spec)
        found = answers(engine, requests())
    assert all(a.completions[0].finish_reason != "non-finite" for a in found if hasattr(a, "completions"))


def test_rows_of_different_alphas_are_looked_up_without_a_wait() -> None:
    with fake_cuda() as cuda:
        rope, positions = Rope(CONFIG, GPU), torch.arange(3, device=GPU)
        for waits in (True, False):  # the first makes tables
            cuda.waits.clear()
            rope.rotations(positions, [10, 100, 300], 4)
            assert bool(cuda.waits) == waits


# --- quantized weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS[:9], ids=str)
def test_packed_layers_multiply_like_the_exact_weight_with_any_number_of_rows(layout: dict[str, Any]) -> None:
    """No rows come from the last layer of a shared prefix: CUDA launches no empty grid."""
    tensors, config, weight = made(**layout)
    with fake_cuda():
        linear = gptq.build_linear(tensors, config, dtype=torch.bfloat16, device=GPU)
        assert isinstance(linear, kernels.PackedLinear)
        linear.use(8)
        for rows in (0, 1, 9):
            x = torch.randn(rows, weight.shape[1]).bfloat16()
            found = linear(x.to(GPU)).cpu()
            assert found.shape == (rows, len(weight))
            exact = F.linear(x.float(), weight, tensors["bias"].float())
            assert rows == 0 or relative(found, exact) < 6e-3


def test_dequantizing_for_many_rows_takes_a_few_bytes_a_weight() -> None:
    tensors, config, weight = made(bits=4, group_size=128, in_features=1024, out_features=512)
    with fake_cuda() as cuda:
        linear = gptq.build_linear(tensors, config, dtype=torch.bfloat16, device=GPU)
        assert isinstance(linear, kernels.PackedLinear)
        x = torch.ones(1, 1024, dtype=torch.bfloat16).to(GPU)
        linear._dense(x)  # the layout is learnt
        cuda.empty_cache()
        before = cuda.reserved[0]
        linear._dense(x)
        assert cuda.reserved[0] - before < 6 * weight.numel()


def test_a_layer_is_timed_on_its_own_device() -> None:
    tensors, config, _ = made(bits=4, group_size=128, in_features=256, out_features=64)
    with fake_cuda(2) as cuda:
        linear = gptq.build_linear(tensors, config, dtype=torch.bfloat16, device=SECOND)
        assert isinstance(linear, kernels.PackedLinear)
        assert kernels._cuda_seconds(linear, True, 8) > 0
        assert cuda.current == 0


# --- captured steps --------------------------------------------------------------------------------------------------


def test_captured_steps_keep_no_more_than_granted_whatever_lies_free_in_the_allocator() -> None:
    with fake_cuda():
        graphs: Any = cuda_graphs(GPU, max_bytes=3 * MIB)
        for key in range(6):
            passing = torch.zeros(64 * MIB, dtype=torch.uint8, device=GPU)
            del passing  # a capture gives it back to the driver
            for _ in range(2):
                graphs.run(key, lambda: torch.zeros(MIB, dtype=torch.uint8, device=GPU))
        assert (graphs.num_captured, graphs.num_bytes) == (3, 3 * MIB)
        assert graphs.stopped == "captured steps keep 3 MiB"


def test_a_capture_that_fails_leaves_the_stream_as_it_was() -> None:
    def reads_back() -> Tensor:
        x = torch.ones(2, device=GPU)
        if torch.cuda.current_stream(GPU) != 0:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    with fake_cuda():
        graphs: Any = cuda_graphs(GPU)
        for _ in range(3):
            assert graphs.run("a step", reads_back).cpu().tolist() == [1.0, 1.0]
        assert "not permitted" in graphs.stopped
        assert torch.cuda.current_stream(GPU) == 0


def test_no_step_is_captured_where_the_embeddings_lie_on_another_device() -> None:
    asks = [replace(ask, max_new_tokens=5) for ask in generations(2)]
    with fake_cuda(2):
        engine = NativeEngine(ModelRunner(model_on(SECOND, elsewhere={"embed": GPU})), TOKENIZER)
        assert plainly(answers(engine, asks)) == plainly(answers(engine_of(), asks))
        assert engine.info["decode_steps"] == "plain: the model lies on 2 devices"


def test_the_device_of_a_model_is_the_current_one_where_auto_passes_over_a_full_one(tiny: Path) -> None:
    with fake_cuda(2) as cuda:
        cuda.live[0] = cuda.reserved[0] = cuda.total_bytes - 1000
        engine = opened(tiny, "auto")
        assert {*engine.forward.layer_devices} == {SECOND}
        assert torch.cuda.current_device() == 1
        answers(engine, requests())  # a capture fails where the current device is another
        assert "captured" in str(engine.info["decode_steps"])


def test_models_on_two_devices_take_turns() -> None:
    """Captures and Triton are of the current device: each forward makes it that of its layers."""
    asks = [replace(ask, max_new_tokens=5) for ask in generations(2)]
    wanted = plainly(answers(engine_of(), asks))
    with fake_cuda(2):
        engines = [NativeEngine(ModelRunner(model_on(device)), TOKENIZER) for device in (GPU, SECOND)]
        for turn in (0, 1, 0):
            assert plainly(answers(engines[turn], asks)) == wanted
            assert torch.cuda.current_device() == turn
            assert "captured" in str(engines[turn].info["decode_steps"])


def test_heads_that_flash_attention_does_not_take_go_to_the_other_kernel() -> None:
    with fake_cuda() as cuda:
        q = torch.randn(1, 2, 3, 12).bfloat16().to(GPU)
        found, _ = partial(q, q, q, causal=True, kernel="fused")
        wanted, _ = partial(q.cpu(), q.cpu(), q.cpu(), causal=True, kernel="eager")
        assert torch.allclose(found.cpu().float(), wanted.float(), atol=2e-2)
        assert cuda.kernels == {"_scaled_dot_product_efficient_attention"}


def test_the_decode_kernel_is_tried_on_the_device_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, also where the tensors lie on another: an illegal access."""
    tried = []
    twin = types.ModuleType("qwen_eval.models.gpu.check")
    twin.flaw = lambda device, *_, **__: tried.append((device, torch.cuda.current_device()))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qwen_eval.models.gpu.check", twin)
    with fake_cuda(2):
        model = model_on(GPU, elsewhere={"layers.2": SECOND, "norm": SECOND, "head": SECOND})
        monkeypatch.setattr(fused, "_has_triton", lambda: True)
        assert choose_decode_kernel(model, "fused", PlainCodec(model.dtype)) == "triton"
    assert tried == [(GPU, 0), (SECOND, 1)]


def test_factors_that_a_captured_step_reads_stay_when_longer_tables_are_made() -> None:
    rope = Rope(CONFIG)
    tables = RowTables(rope, [10], 100)
    tables.rotations(torch.tensor([70]), None, 100)
    read = weakref.ref(rope._logn_tables[None])
    rope.logn(None, 5000)
    assert read() is not None
    assert read() is not rope._logn_tables[None]


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "room", "rows"), [
    (64, 9, 8), (64, 17, 16), (3, 3, 2), (64, 64, 64), (3, 4, 3), (5, 100, 5), (64, 1, 1),
])  # fmt: skip
def test_rows_of_padding_fit_the_memory_too(wanted: int, room: int, rows: int) -> None:
    assert COARSE.rows_within(wanted, room) == rows
    assert COARSE.rows(rows) <= room


def test_slots_take_no_more_than_the_cached_tokens_that_are_granted() -> None:
    with fake_cuda():
        forward = ModelRunner(model_on(GPU))
        slots, made_slots = forward.slots, []
        forward.slots = lambda num, capacity: (made_slots.append(num * capacity), slots(num, capacity))[1]  # type: ignore
        engine = NativeEngine(forward, TOKENIZER, max_cached_tokens=3000, prefix_sharing=False)
        answers(engine, [replace(ask, max_new_tokens=6) for ask in generations(12)])
    assert 0 < made_slots[0] <= 3000


def test_a_band_is_held_once_for_all_heads() -> None:
    with fake_cuda() as cuda:
        q = torch.zeros(1, 8, 256, 16, device=GPU)
        mask = band(256, 32, GPU)
        before = cuda.reserved[0]
        out, lse = partial(q, q, q, mask=mask, kernel="fused")
        assert cuda.reserved[0] - before - out.nbytes - lse.nbytes < 2 * 256 * 256 * 4


def test_memory_that_the_allocator_keeps_free_is_free(tiny: Path) -> None:
    with fake_cuda(total_bytes=1 << 30):
        forward = opened(tiny, "cuda").forward
        limits = memory_limits(forward, EngineSpec(), "auto")
        passing = torch.zeros(512 * MIB, dtype=torch.uint8, device=GPU)
        del passing  # as after packing weights on the device
        assert memory_limits(forward, EngineSpec(), "auto") == limits


def test_running_out_of_memory_while_a_batch_is_made_halves_it_too() -> None:
    engine, planted = engine_of(), [True]
    grown = engine.forward.grown

    def small_memory(*args: Any) -> Prefix:
        if planted:
            planted.pop()
            raise torch.OutOfMemoryError("planted")
        return grown(*args)

    heads = [replace(ask, prompt=Prompt.raw(f"a head that all share, {i}")) for i, ask in enumerate(generations(4))]
    asks = [replace(ask, max_new_tokens=4) for ask in heads]
    engine.forward.grown = small_memory  # type: ignore
    assert answers(engine, asks) == answers(engine_of(), asks)
    assert engine.info["num_oom"] == 1


@pytest.mark.parametrize("asks", [generations(1), exam(1), [Score(prompt=Prompt.raw("some text"))]], ids=repr)
def test_a_single_sequence_that_does_not_fit_is_an_error_of_one_line(asks: list[Any]) -> None:
    with fake_cuda() as cuda:
        engine = NativeEngine(ModelRunner(model_on(GPU)), TOKENIZER)
        cuda.empty_cache()
        cuda.total_bytes = cuda.reserved[0] + 8192
        with pytest.raises(EngineError, match="out of memory with a single sequence"):
            answers(engine, asks)


@pytest.mark.parametrize(("text", "is_memory"), [
    ("CUDA error: out of memory", True),  # of the driver, past torch's allocator
    ("Triton Error [CUDA]: out of memory", True),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
    ("out of resource: shared memory, Required: 262144, Hardware limit: 232448", False),
    ("CUDA error: an illegal memory access was encountered", False),
])  # fmt: skip
def test_every_way_to_say_that_memory_ended_is_known(text: str, is_memory: bool) -> None:
    assert is_out_of_memory(RuntimeError(text)) == is_memory


# --- precision -------------------------------------------------------------------------------------------------------


def test_fp32_is_fp32_where_a_container_has_switched_tf32_on(tiny: Path) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        open_forward(ModelSpec(name="tiny", path=str(tiny), dtype="fp32", device="cpu"))
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_gpu_without_bf16_takes_fp16_and_the_kernel_that_it_has(tiny: Path) -> None:
    with fake_cuda(capability=(7, 5)) as cuda:
        assert choose_dtype("auto", {"torch_dtype": "bfloat16"}, GPU) == torch.float16
        with pytest.raises(ConfigError, match=r"model\.dtype=bf16.*fp16"):
            choose_dtype("bf16", {}, GPU)
        q = torch.zeros(1, 2, 3, 16, device=GPU, dtype=torch.float16)
        partial(q, q, q, causal=True, kernel="fused")
        assert cuda.kernels == {"_scaled_dot_product_efficient_attention"}


# --- profile ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [
    {"mode": ["generate"], "seq": [12], "batch": [2]},
    {"mode": ["serve"], "seq": [8], "new_tokens": 8, "batch": [6], "max_batch_tokens": 8},  # prefilled one by one
], ids=["together", "one by one"])  # fmt: skip
def test_what_is_measured_was_captured_while_warming_up(sizes: dict[str, Any]) -> None:
    model = ModelSpec(name="tiny", asset="qwen-tiny", weights="random", device="cuda", dtype="bf16")
    spec = check(ProfileSpec(model=model, warmup_tokens=4, **sizes))
    (cell,) = cells(spec)
    with fake_cuda() as cuda:
        repeat = runner(_open(spec, cell), spec, cell)
        warm_up(repeat, spec, cell, is_captured=True)
        captured = cuda.num_captures
        measured = repeat(cell.new_tokens)
        assert (captured, cuda.num_captures) == (1, 1)
    assert len(measured.steps_s) == cell.new_tokens - 1


def test_a_limit_of_memory_holds_for_a_device_without_a_number() -> None:
    with fake_cuda() as cuda:
        limit_memory(torch.device("cuda"), 0.5)
        assert cuda.total_bytes == 1 << 29


@pytest.mark.parametrize(("asked", "device", "long"), [(None, "cuda", 8192), (None, "cpu", 1024), (512, "cuda", 512)])
def test_a_profile_reads_long_prompts_as_the_engine_does(asked: int | None, device: str, long: int) -> None:
    model = ModelSpec(name="tiny", asset="qwen-tiny", weights="random", device=device, dtype="fp32")
    spec = check(ProfileSpec(model=model, mode=["encode"], seq=[4096], prefill_chunk=asked))
    with fake_cuda():
        assert _open(spec, cells(spec)[0]).forward.long_chunk == long


# --- the stand-in itself ---------------------------------------------------------------------------------------------


def test_a_copy_under_way_is_not_there_before_its_event() -> None:
    with fake_cuda():
        fetched = Fetched(torch.arange(3, device=GPU))
        assert fetched._host.tolist() == [RUBBISH] * 3
        assert fetched.wait().tolist() == [0, 1, 2]


@pytest.mark.parametrize("read", [
    lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any()), lambda x: x.cpu(),
    lambda x: torch.tensor([1], device=GPU),
])  # fmt: skip
def test_what_makes_the_host_wait_is_counted_and_not_captured(read: Any) -> None:
    with fake_cuda() as cuda:
        x = torch.ones(3, device=GPU)
        read(x)
        assert cuda.waits.total() == 1
        with pytest.raises(AssertionError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            read(x)


def test_a_replay_reads_the_memory_that_was_captured_also_when_it_was_freed() -> None:
    with fake_cuda():
        graphs: Any = cuda_graphs(GPU)
        tables = {"cos": torch.ones(3, device=GPU)}
        for _ in range(2):
            assert graphs.run("a step", lambda: tables["cos"][1:] * 2).cpu().tolist() == [2.0, 2.0]
        tables["cos"].fill_(5)
        assert graphs.run("a step", lambda: torch.zeros(1)).cpu().tolist() == [10.0, 10.0]
        tables["cos"] = torch.ones(9, device=GPU)  # has grown
        with pytest.raises(AssertionError, match="memory that was freed"):
            graphs.run("a step", lambda: tables["cos"] * 2)


def test_two_devices_do_not_meet_and_memory_ends() -> None:
    with fake_cuda(2, total_bytes=MIB) as cuda:
        with pytest.raises(AssertionError, match="cuda:0"):
            torch.ones(2, device=GPU) + torch.ones(2, device=SECOND)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(2 * MIB, device=GPU)
        half = torch.zeros(MIB // 2, dtype=torch.uint8, device=GPU)
        assert cuda.live[0] == half.nbytes
        del half
        torch.zeros(MIB, dtype=torch.uint8, device=GPU)  # what is free is given back first


@pytest.mark.parametrize("length", [1, 5, 40])
def test_the_twins_give_what_torch_says_of_the_kernels(length: int) -> None:
    """Shapes and dtypes of torch's own description of them."""
    ops = torch.ops.aten
    with fake_cuda():
        q = torch.zeros(2, 4, length, 16, device=GPU, dtype=torch.bfloat16)
        calls: list[tuple[Any, tuple[Any, ...]]] = [
            (ops._scaled_dot_product_flash_attention, (q, q, q, 0.0, True, False)),
            (ops._scaled_dot_product_efficient_attention, (q, q, q, None, True, 0.0, True)),
            (ops._convert_weight_to_int4pack, (torch.zeros(16, 32, dtype=torch.uint8, device=GPU), 4)),
        ]
        found = [call(*args) for call, args in calls]
    for (call, args), mine in zip(calls, found):
        said = call(*(torch.empty(a.shape, dtype=a.dtype, device="meta") if isinstance(a, Tensor) else a for a in args))
        for a, b in zip(mine[:2], said[:2]) if isinstance(said, tuple) else [(mine, said)]:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_generation_runs_ahead_of_the_host() -> None:
    """The next step is launched before the tokens of the one before it are read."""
    with fake_cuda() as cuda:
        forward = ModelRunner(model_on(GPU))
        ahead: list[int] = []
        generator = Generator(forward, TOKENIZER, on_step=lambda *_: ahead.append(len(cuda.pending)))
        engine = NativeEngine(forward, TOKENIZER)
        rows = [row for ask in [replace(generations(1)[0], max_new_tokens=10)] for row in engine._rows(0, ask)]
        list(generator.run(rows))
    assert max(ahead) > 0
