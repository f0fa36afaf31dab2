"""What the benchmarks against other harnesses share: one random Qwen2 checkpoint with Qwen's real vocabulary, one
set of questions, workers in their own environments, and the machine's measured ceilings."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

Clock: TypeAlias = Callable[[], float]
ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = ROOT / "tests" / "data" / "qwen.tiktoken"
PRETOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LM_EVAL_HEAD = """
import json, os, sys, time
os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
request = json.load(open(sys.argv[1]))
import torch
torch.set_num_threads(request["threads"])
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
lm = HFLM(pretrained=request["checkpoint"], dtype={"bf16": "bfloat16", "fp32": "float32"}[request["dtype"]],
          device=request["device"], batch_size=request["batch_size"])

def now():
    if request["device"] != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()
"""  # of a worker in lm-evaluation-harness's environment: `lm` is the model, `Instance` one request, `now` the clock


def write_checkpoint(folder: Path, *, vocab_size: int = 151936, hidden: int = 512, layers: int = 8) -> Path:
    """A random Qwen2 (hidden 512, 8 layers, grouped heads) with Qwen's tokenizer, loadable by every harness."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.convert_slow_tokenizer import TikTokenConverter

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    converter = TikTokenConverter(vocab_file=str(VOCABULARY), pattern=PRETOKEN, extra_special_tokens=specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), eos_token=specials[0], pad_token=specials[0], chat_template=None
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=151643,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def run_worker(python: str, source: str, payload: dict[str, Any], *, timeout_s: float = 3600) -> dict[str, Any]:
    """Run `source` in its own interpreter: it reads `payload` and writes a JSON result file that this returns."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        request = Path(scratch) / "request.json"
        request.write_text(json.dumps({**payload, "result": str(result)}))
        program = Path(scratch) / "worker.py"
        program.write_text(source)
        done = subprocess.run(
            [python, str(program), str(request)], capture_output=True, text=True, timeout=timeout_s, cwd=scratch
        )
        if not result.exists():
            sys.exit(f"worker failed ({done.returncode}):\n{done.stderr[-3000:]}")
        answer: dict[str, Any] = json.loads(result.read_text())
        return answer


def in_turns(
    workers: dict[str, tuple[str, str]], payload: dict[str, Any], *, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Each worker (interpreter, source) once a round, so that a busy machine slows all. Returns results by name."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, (python, source) in workers.items():
            results[name].append(run_worker(python, source, payload))
            print(f"{name}: {results[name][-1]['seconds']:.2f} s", flush=True)
    return results


def add_options(parser: argparse.ArgumentParser, *, dtype: str) -> None:
    """What both benchmarks take: where both harnesses run and on what."""
    parser.add_argument("--peer", help="python of an environment with lm_eval[hf]")
    parser.add_argument("--device", default="cpu", help="of both: cpu or cuda")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=dtype)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", default="8", help="of lm-eval; auto: what it finds the memory to hold")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)


def common_payload(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": options.device,
        "dtype": options.dtype,
        "threads": options.threads,
        "batch_size": options.batch_size if options.batch_size.startswith("auto") else int(options.batch_size),
    }


def peak_flops(device: str, dtype: str, clock: Clock = time.perf_counter) -> float:
    """FLOP/s of a matrix product on the device that is measured."""
    if device == "cpu":
        return gemm_peak(dtype, clock)
    import torch

    from qwen_eval.models.device import measured_flops

    return measured_flops(str(torch.device(device)), dtype)


def peak_bandwidth(device: str, clock: Clock = time.perf_counter) -> float:
    """Bytes per second of reading its memory."""
    if device == "cpu":
        return read_bandwidth(3, clock)
    import torch

    from qwen_eval.models.device import measured_bandwidth

    return measured_bandwidth(str(torch.device(device)))


def gemm_peak(dtype_name: str, clock: Clock = time.perf_counter) -> float:
    """FLOP/s of a 2048-cubed product on this CPU, best of seven; in bf16 also with a prepacked weight."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype_name]
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best = best_time(lambda: a @ b, clock=clock)
    if dtype == torch.bfloat16:
        from qwen_eval.models.dense import PREPACKED, Linear, can_prepack

        if can_prepack():
            linear = Linear(2048, 2048, bias=False, dtype=dtype).requires_grad_(False)
            linear.use(PREPACKED)
            best = min(best, best_time(lambda: linear(a), clock=clock))
    return 2 * 2048**3 / best


def read_bandwidth(repeats: int = 7, clock: Clock = time.perf_counter) -> float:
    """Bytes per second of reading a gibibyte from memory, best of `repeats`.

    The block is larger than any cache and read from its start each time, so what the cache kept of the last pass, its
    end, is gone before it is reached. `sum` is the fastest plain read of torch: a dot product or a copy are slower.
    """
    import torch

    block = torch.ones(2**28)  # fp32
    return block.numel() * 4 / best_time(block.sum, repeats, clock)


def best_time(action: Any, repeats: int = 7, clock: Clock = time.perf_counter) -> float:
    times = []
    for _ in range(repeats):
        start = clock()
        action()
        times.append(clock() - start)
    return min(times)


def clock_name(threads: int, workers: dict[str, Any]) -> str:
    """The clock of `time` for our worker: alone on one thread, that of the thread, which other processes slow less."""
    return "thread_time" if threads == 1 and len(workers) == 1 else "perf_counter"
