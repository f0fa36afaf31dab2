"""One cell of a fine-tuning profile in a process of its own; started by finetune.py through grid.in_child."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import replace
from typing import Any

import torch

from qwen_eval.config import ModelSpec
from qwen_eval.core import JSON, QwenEvalError
from qwen_eval.engines.native.scheduler import is_out_of_memory
from qwen_eval.models.checkpoint import load, random_model
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.device import DTYPES, probe, synchroniser
from qwen_eval.models.fingerprint import model_fingerprint
from qwen_eval.models.hub import checkpoint_dir
from qwen_eval.models.load import choose_device, placement_of
from qwen_eval.models.lora import base_of
from qwen_eval.models.merged import open_tensors
from qwen_eval.models.overrides import read_config
from qwen_eval.models.training import Lora, Tuner, make_trainable
from qwen_eval.models.transformer import Transformer
from qwen_eval.profile.child import _die_with_parent
from qwen_eval.profile.finetune import FinetuneSpec, Tuning, cost_of, model_of, refuse, spec_from_json
from qwen_eval.profile.memory import PeakMemory, limit_memory, status_bytes, to_json


def main() -> int:
    """Read a job on standard input, write its row as the only line of standard output."""
    reply = os.dup(1)
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    _die_with_parent(job["parent"])
    with os.fdopen(reply, "w", encoding="utf-8") as out:
        json.dump(run(job), out, ensure_ascii=False)
    return 0


def run(job: dict[str, Any]) -> dict[str, JSON]:
    """The measured row, or a row with the `status` and the reason why there is none."""
    spec, tuning = spec_from_json(job["spec"]), Tuning(**job["cell"])
    try:
        return {"status": "ok", **measure(spec, tuning)}
    except QwenEvalError as error:
        return {"status": "failed", "reason": str(error), "error": type(error).__name__}
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return {"status": "oom", "reason": " ".join(str(error).split())[:300] or type(error).__name__}
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def measure(spec: FinetuneSpec, tuning: Tuning) -> dict[str, JSON]:
    """A step to warm up (it makes the optimizer's state too), then `repetitions` measured ones."""
    if spec.num_threads is not None:
        torch.set_num_threads(spec.num_threads)
    torch.manual_seed(spec.seed)
    device = choose_device(spec.model.device)
    limit_memory(device, spec.memory_gib)
    synchronise = synchroniser(device)
    if device.type == "cpu":
        _rouse()
    before = status_bytes("VmRSS") if device.type == "cpu" else 0
    memory = PeakMemory(device)
    model, facts = open_model(model_of(spec, tuning), tuning)
    lora = Lora(rank=spec.rank, alpha=spec.alpha, dropout=spec.dropout)
    parameters = make_trainable(model, tuning.method, lora)
    tuner = Tuner(model, parameters, checkpointing=spec.checkpointing)
    generator = torch.Generator().manual_seed(spec.seed)
    shape = (spec.accumulation, tuning.seq)
    batches = list(torch.randint(model.config.vocab_size, shape, generator=generator).to(device))
    losses, steps_s = [tuner.step(batches)], []
    memory.reset()
    for _ in range(spec.repetitions):
        synchronise()
        start = time.perf_counter()
        losses.append(tuner.step(batches))
        synchronise()
        steps_s.append(time.perf_counter() - start)
    peak = to_json(memory.read())
    dtype = next(name for name, known in DTYPES.items() if known == model.dtype)
    cost, probed = cost_of(spec, tuning, model.config, dtype), probe(device, dtype)
    return {
        "step_s": steps_s, "tok_per_s": [spec.accumulation * tuning.seq / s for s in steps_s], **peak,
        "baseline_bytes": before, "losses": losses,
        "num_trainable": sum(parameter.numel() for parameter in parameters),
        "predicted_bytes": cost.gpu_bytes, "flops": cost.step_flops,
        "prefill_share": None if probed.best_flops is None else cost.step_flops / probed.best_flops / min(steps_s),
        "engine": facts, "device": probed.to_json(),
    }  # fmt: skip


def open_model(spec: ModelSpec, tuning: Tuning) -> tuple[Transformer, dict[str, JSON]]:
    """The weights as they are trained: dense, or NF4 under adapters."""
    directory = checkpoint_dir(spec)
    base = base_of(directory)
    fields = read_config(base, spec)
    config = ModelConfig.from_hf(fields)
    placement = placement_of(spec, fields, base)
    refuse(tuning, "gptq" if placement.packed is not None else spec.quant)
    fingerprint = model_fingerprint(spec, directory)
    if spec.weights == "random":
        model = random_model(config, placement, spec.seed)
    else:
        model = load(open_tensors(directory), config, placement)[0]
    facts = {"weights": fingerprint, "dtype": str(model.dtype).removeprefix("torch."), "quant": spec.quant}
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    return model, {**facts, "device": device, "is_random": spec.weights == "random"}


def _rouse() -> None:
    """A step of a miniature, so that what the libraries load and keep is not taken for the model's memory."""
    spec = ModelSpec(name="miniature", asset="qwen-tiny", weights="random", dtype="fp32", device="cpu")
    model, _ = open_model(replace(spec), Tuning(method="lora", seq=4))
    Tuner(model, make_trainable(model, "lora", Lora(rank=2))).step([torch.arange(4)])


if __name__ == "__main__":
    sys.exit(main())
