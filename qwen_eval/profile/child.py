"""One cell in a process of its own: load, warm up, measure, print one line of JSON. Started by grid.py.

Nothing of another cell (a cache, fragmentation, a broken CUDA context) can affect this one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import JSON, QwenEvalError, Sampling
from qwen_eval.engines.native.engine import memory_limits
from qwen_eval.engines.native.generation import Generator, Row
from qwen_eval.engines.native.scheduler import Counters, is_out_of_memory
from qwen_eval.models import fused
from qwen_eval.models.config import read_fields
from qwen_eval.models.cost import PREFILL_CHUNK
from qwen_eval.models.device import DTYPES, EnergyMeter, probe, synchroniser
from qwen_eval.models.hub import checkpoint_dir
from qwen_eval.models.load import Opened, choose_devices, open_forward
from qwen_eval.models.machine import Device
from qwen_eval.models.quant.kernels import has_packed
from qwen_eval.profile.cells import GridCell, cost_of, spec_from_json
from qwen_eval.profile.config import ProfileSpec
from qwen_eval.profile.measure import Recorder, Repetition, summary
from qwen_eval.profile.memory import PeakMemory, limit_memory, status_bytes, to_json
from qwen_eval.profile.plan import floor_s

PROMPT = "我"  # as in the published protocol: one token, repeated
PUBLISHED_SAMPLING = {"top_p": 0.8, "top_k": 0, "temperature": 1.0}  # of the Qwen v1 checkpoints
PUBLISHED_CHAT_PENALTY = 1.1
PR_SET_PDEATHSIG = 1


def main() -> int:
    """Read a job on standard input, write its row as the only line of standard output."""
    reply = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not ours
    job = json.load(sys.stdin)
    _die_with_parent(job["parent"])
    with os.fdopen(reply, "w", encoding="utf-8") as out:
        json.dump(run(job), out, ensure_ascii=False)
    return 0


def run(job: dict[str, Any]) -> dict[str, JSON]:
    """The measured row, or a row with the `status` and the reason why there is none."""
    spec, cell = spec_from_json(job["spec"]), GridCell(**job["cell"])
    try:
        return {"status": "ok", **measure_cell(spec, cell)}
    except QwenEvalError as error:
        return {"status": "failed", "reason": str(error), "error": type(error).__name__}
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return {"status": "oom", "reason": " ".join(str(error).split())[:300] or type(error).__name__}
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def measure_cell(spec: ProfileSpec, cell: GridCell) -> dict[str, JSON]:
    """Load the model, run the cell as `spec.method` says, and add the limits of the device."""
    if spec.num_threads is not None:
        torch.set_num_threads(spec.num_threads)
    devices = choose_devices(spec.model.device)
    device = devices[0]  # the ceilings are of one device: layers on several work one after another
    for each in devices:
        limit_memory(each, spec.memory_gib)
    if device.type == "cpu":
        _warm_up(spec)
    before, memory = status_bytes("VmRSS"), PeakMemory(*devices)
    start = time.perf_counter()
    opened = _open(spec, cell)
    synchroniser(opened.forward.head_device)()
    load_s, load_peak = time.perf_counter() - start, memory.read().allocated_bytes
    repeat = runner(opened, spec, cell)
    if spec.method == "measured":
        if spec.warmup_tokens:
            warm_up(repeat, spec, cell, is_captured=device.type == "cuda")
        memory.reset()
    energy = EnergyMeter(device)
    repetitions = [repeat(cell.new_tokens) for _ in range(spec.repetitions)]
    joules, peak = energy.joules(), memory.read()
    tokens = spec.repetitions * cell.batch * (cell.prompt_tokens if cell.mode == "encode" else cell.new_tokens)
    dtype = next(name for name, known in DTYPES.items() if known == opened.forward.model.dtype)
    del repeat
    return {
        **summary(cell, repetitions), **to_json(peak),
        "baseline_bytes": before if device.type == "cpu" else 0,
        "load_s": load_s, "load_peak_bytes": load_peak,
        "joules_per_token": None if joules is None else joules / tokens,
        "engine": {**opened.facts, **_kernels(opened)},
        **_ceilings(spec, cell, opened, probe(device, dtype), repetitions),
    }  # fmt: skip


def warm_up(repeat: Callable[..., Repetition], spec: ProfileSpec, cell: GridCell, *, is_captured: bool) -> None:
    """A few steps. Where steps are captured, in the memory that is measured next: else they would be captured anew."""
    most = min(cell.new_tokens, spec.warmup_tokens + 1)
    if not is_captured:
        repeat(most)
        return
    with contextlib.suppress(_Warm):
        repeat(cell.new_tokens, stop_after=most)


class _Warm(Exception):
    """Enough steps were taken."""


def _kernels(opened: Opened) -> dict[str, JSON]:
    """What computed, by name, beside the kernels of the linears."""
    forward = opened.forward
    return {
        "attention": forward.kernel,
        "decode_attention": forward.decode_kernel,
        "small_kernels": fused.name(forward.device, forward.model.dtype),
        "kv_cache": forward.codec.name,
    }


def _warm_up(spec: ProfileSpec) -> None:
    """Warm-up with a miniature, so that memory kept by the libraries is not counted as the model's."""
    miniature = ModelSpec(name="miniature", asset="qwen-tiny", weights="random", dtype=spec.model.dtype, device="cpu")
    cell = GridCell(mode="generate", seq=2, batch=2, prompt_tokens=2, new_tokens=2, kv_cache="auto", attention="auto")
    runner(_open(replace(spec, model=miniature, method="measured"), cell), spec, cell)(2)


def _open(spec: ProfileSpec, cell: GridCell) -> Opened:
    model = replace(spec.model, kv_cache=cell.kv_cache, attention=cell.attention)
    protocol = "upstream" if spec.method == "readme" else "robust"
    opened = open_forward(model, protocol=protocol, prefill_chunk=spec.prefill_chunk or PREFILL_CHUNK)
    if spec.prefill_chunk is None:
        limits = memory_limits(opened.forward, EngineSpec(), model.kv_cache)
        opened.forward.use_long_chunk(limits.chunk_tokens)
    return opened


def runner(
    opened: Opened, spec: ProfileSpec, cell: GridCell, clock: Callable[[], float] = time.perf_counter
) -> Callable[..., Repetition]:
    """`run(new_tokens)`: the whole batch once through the engine's own generator; nothing ends a sequence early.

    `run(new_tokens, stop_after=n)` raises after n steps of all sequences.
    """
    recorder = Recorder(cell.batch, clock=clock, synchronise=synchroniser(opened.forward.head_device))

    def step(num_rows: int, counters: Counters) -> None:
        if counters.num_oom:  # the engine would go on with fewer sequences at a time; a cell is its batch or nothing
            raise MemoryError(f"{cell.batch} sequences do not fit at once")
        recorder.step(num_rows)
        if recorder.num_whole_steps == recorder.most_steps:
            raise _Warm

    generator = Generator(
        opened.forward,
        opened.tokenizer,
        share=False,
        max_slots=cell.batch,
        prefill_tokens=spec.max_batch_tokens,
        on_step=step,
    )
    prompt = tuple(opened.tokenizer.encode(PROMPT)[:1]) * cell.prompt_tokens
    sampling = published_sampling(spec) if spec.method == "readme" else Sampling()

    def once(new_tokens: int, *, stop_after: int | None = None) -> Repetition:
        rows = [
            Row(index=i, prompt=prompt, max_new_tokens=new_tokens, end_ids=frozenset(), sampling=sampling, k=i)
            for i in range(cell.batch)
        ]
        recorder.start(most_steps=stop_after)
        deque(generator.run(rows), maxlen=0)
        return recorder.stop()

    return once


def published_sampling(spec: ProfileSpec) -> Sampling:
    """As the checkpoint's generation_config.json says; random weights sample as the published ones do."""
    fields: dict[str, Any] = dict(PUBLISHED_SAMPLING)
    fields["repetition_penalty"] = PUBLISHED_CHAT_PENALTY if spec.model.chat else 1.0
    path = checkpoint_dir(spec.model) / "generation_config.json"
    if spec.model.weights != "random" and path.is_file():
        said = read_fields(path)
        fields |= {key: said[key] for key in fields if said.get(key) is not None}
        if said.get("do_sample") is False:
            fields["temperature"] = 0.0
    return Sampling(**fields, seed=spec.seed)


def _ceilings(
    spec: ProfileSpec, cell: GridCell, opened: Opened, device: Device, repetitions: Sequence[Repetition]
) -> dict[str, JSON]:
    """What the cost model predicts, and which share of the device's bandwidth or FLOP/s each phase reached."""
    is_packed = has_packed(opened.forward.model.dtype, opened.forward.device)
    is_copied = opened.forward.decode_kernel != "triton"
    cost = cost_of(
        spec, cell, opened.forward.config, dtype=device.dtype, is_packed=is_packed, is_copied=is_copied,
        prefill_chunk=opened.forward.long_chunk,
    )  # fmt: skip
    copied = opened.facts.get("head_copy_bytes", 0)
    assert isinstance(copied, int), copied
    cost = replace(cost, head_copy_bytes=copied)
    prefill_s, step_s = floor_s(cost, cell, device)
    steps = [step for repetition in repetitions for step in repetition.steps_s]
    ttft_s = sorted(repetition.ttft_s for repetition in repetitions)[len(repetitions) // 2]
    return {
        "predicted_bytes": cost.peak_bytes(cell.batch, cell.prompt_tokens, cell.new_tokens),
        "prefill_share": None if prefill_s is None else prefill_s / ttft_s,
        "decode_share": None if step_s is None or not steps else step_s * len(steps) / sum(steps),
        "device": device.to_json(),
    }


def _die_with_parent(parent: int) -> None:
    """A child whose parent was killed must not go on using the device. Linux only; elsewhere it finishes its cell."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed while this process was still importing
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
