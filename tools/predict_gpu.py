"""How the native engine would keep a GPU busy: real benchmarks packed by its scheduler, with a model that only counts.

    python tools/predict_gpu.py [--mmlu DIR] [--ceval DIR] [--gsm8k FILE] [--documents 8] [--launch-us 4]

DIR and FILE hold the official rows (tests/data has a few). Each forward is noted, not computed. Beside what was packed
stands a prediction for a 7B shape in BF16 (`--hidden`, `--layers`: another): a forward takes the longest of its
launches, one after another, and its work on the device at the ceilings of one H200. A kernel that is slower than its
ceiling is not seen here. Texts of GSM8K are as long as the official answers, which the scheduler cannot foresee.
"""

from __future__ import annotations

import argparse
import random
import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qwen_eval.core import Choose, Generate
from qwen_eval.engines.native.engine import gpu_packing
from qwen_eval.engines.native.generation import Generator, Row
from qwen_eval.engines.native.scoring import Job, Scorer
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.cost import batch_limits, kv_token_bytes, num_linear_weights
from qwen_eval.models.decode import COARSE, Decoding, StepResult, StepShape
from qwen_eval.models.graph import StepGraphs
from qwen_eval.models.kv_cache import Prefix, Slots
from qwen_eval.models.runner import ModelRunner
from qwen_eval.models.tokenizer import QwenTokenizer, read_ranks
from qwen_eval.models.transformer import Transformer
from qwen_eval.tasks.ceval import Ceval
from qwen_eval.tasks.gsm8k import Gsm8k
from qwen_eval.tasks.mmlu import Mmlu
from qwen_eval.tasks.registry import TaskContext

VOCABULARY = Path(__file__).resolve().parents[1] / "tests" / "data" / "qwen.tiktoken"
GIB = 2**30
FREE_BYTES = 60 * GIB  # beside the weights, on a GPU of 80 GB
SLOTS = (64, 256)
SMALL = 2048  # tokens of a forward that hardly fills a GPU

GEMM_FLOPS, COPY_BYTES, READ_BYTES = 737e12, 4.21e12, 3.75e12  # of one H200, measured
ATTENTION_FLOPS = GEMM_FLOPS / 2  # the rest is assumed: of fused attention,
NODE_S = 1.5e-6  # the least time of a kernel in a captured step,
CAPTURE_S = 0.03  # recording a step,
# kernels of one layer in any forward, when sequences are packed, of one run of sequences after a prefix, of keeping the
# keys and values of a sequence, of copying those of the prefix before them; and those of a decode step.
PLAIN, PACKED, RUN, KEEP, COPY, STEP = 11, 8, 3, 2, 2, 12


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One packed forward. `runs`: tokens, and tokens of the prefix that they continue."""

    lengths: Sequence[int]
    runs: Sequence[tuple[int, int]]
    num_kept: int
    num_copied: int

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def padded(self) -> int:
        return max(self.lengths) * len(self.lengths)

    @property
    def layer_kernels(self) -> int:
        after_prefix = sum(past > 0 for _, past in self.runs)
        packed = PACKED * (len(self.lengths) > 1)
        return PLAIN + packed + RUN * after_prefix + KEEP * self.num_kept + COPY * self.num_copied


@dataclass(frozen=True, kw_only=True)
class Step:
    """One decode step. `prefix_tokens`: of distinct prefixes; `read_tokens`: by each row, unless all continue one."""

    num_rows: int
    shape: StepShape
    cached_tokens: int
    prefix_tokens: int
    read_tokens: int
    is_replayed: bool


@dataclass
class Log:
    forwards: list[Forward] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    num_captured: int = 0
    kept_tokens: int = 0  # of all prefixes at a time, at most


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Predicted seconds. E hidden size."""

    config: ModelConfig
    launch_s: float

    @property
    def weights(self) -> int:
        return num_linear_weights(self.config)

    @property
    def token_bytes(self) -> int:
        return kv_token_bytes(self.config, "auto", "bf16")

    def launched_s(self, forward: Forward) -> float:
        return (self.config.num_layers * forward.layer_kernels + 20) * self.launch_s

    def least_s(self, forward: Forward) -> float:
        """All products, those of attention included, at the peak of the matrix product."""
        own = sum(self._attention(n, n / 2) for n in forward.lengths)
        return (2.0 * self.weights * forward.num_tokens + own + self._past(forward)) / GEMM_FLOPS

    def forward_s(self, forward: Forward) -> float:
        size, is_packed = self.config.hidden_size, len(forward.lengths) > 1
        products = max(2.0 * self.weights * forward.num_tokens / GEMM_FLOPS, 2.0 * self.weights / READ_BYTES)
        attention = self._attention(forward.padded, max(forward.lengths) / 2) + self._past(forward)
        moved = forward.num_tokens * (14 * size + 3 * self.config.mlp_size) + 8 * size * forward.padded * is_packed
        moved += 17 * size * sum(n for n, past in forward.runs if past)
        others = 2.0 * self.config.num_layers * moved / COPY_BYTES
        return max(products + attention / ATTENTION_FLOPS + others, self.launched_s(forward))

    def least_step_s(self, step: Step) -> float:
        """Weights, head, the cache of each row and each prefix read once."""
        return self._read_s(step.cached_tokens + step.prefix_tokens)

    def step_s(self, step: Step) -> float:
        read_s, kernels = self._read_s(step.cached_tokens + step.read_tokens), self.config.num_layers * STEP
        return read_s + kernels * NODE_S if step.is_replayed else max(read_s, kernels * self.launch_s)

    def _attention(self, queries: int, keys: float) -> float:
        return 4.0 * self.config.num_layers * self.config.num_heads * self.config.head_dim * queries * keys

    def _past(self, forward: Forward) -> float:
        return sum(self._attention(n, past) for n, past in forward.runs)

    def _read_s(self, num_tokens: int) -> float:
        head = self.config.vocab_size * self.config.hidden_size
        return (2.0 * (self.weights + head) + num_tokens * self.token_bytes) / READ_BYTES


# --- a model that counts ---------------------------------------------------------------------------------------------


class CountedPrefix(Prefix):
    """Known to `alive` while it lives."""

    __hash__ = object.__hash__

    def __init__(self, *args: Any, alive: weakref.WeakSet[Prefix]) -> None:
        super().__init__(*args)
        self.alive = alive
        alive.add(self)

    def fork(self) -> Prefix:
        twin = CountedPrefix(self.config, self.codec, self.dtype, self.layer_devices, alive=self.alive)
        twin.length = self.length
        return twin


class UnwrittenSlots(Slots):
    def put(self, row: int, prefix: Prefix) -> None: ...

    def move(self, source: int, target: int, num_tokens: int) -> None: ...


class CountedSteps(Decoding):
    log: Log

    def step(self) -> StepResult:
        shape, graphs = self.shape(), self.graphs
        assert graphs is not None
        before = graphs.num_replays
        result = super().step()
        prefixes = {id(row.prefix): row.prefix.length for row in self.rows if row.prefix}
        is_single = len(prefixes) == 1 and all(row.prefix for row in self.rows)
        distinct = sum(prefixes.values())
        by_row = sum(row.prefix.length for row in self.rows if row.prefix)
        self.log.steps.append(
            Step(
                num_rows=len(self.rows),
                shape=shape,
                cached_tokens=sum(self._own),
                prefix_tokens=distinct,
                read_tokens=distinct if is_single else by_row,
                is_replayed=graphs.num_replays > before,
            )
        )
        return result

    def _compute(self, shape: StepShape) -> StepResult:
        tokens = torch.zeros(shape.num_rows, dtype=torch.long)
        return tokens, tokens


class CountingModel(Transformer):
    def logits(self, hidden_RE: Tensor, out_RV: Tensor | None = None) -> Tensor:
        return torch.zeros(len(hidden_RE), self.config.vocab_size)


class CountingRunner(ModelRunner):
    """Schedules as on a GPU; forwards are noted."""

    def __init__(self, config: ModelConfig) -> None:
        narrow = replace(config, hidden_size=8, mlp_size=8, vocab_size=8)
        model = CountingModel(narrow).to(torch.bfloat16).settled()
        super().__init__(model, decode_kernel="triton")
        limits = batch_limits(config, "auto", "bf16", FREE_BYTES, max_tokens=16384, is_captured=True)
        self.long_chunk, self.max_batch_tokens = limits.chunk_tokens, limits.packed_tokens
        self.packing = gpu_packing(self, limits)
        self.log = Log()
        self._alive: weakref.WeakSet[Prefix] = weakref.WeakSet()

    def _run(self, ids: Any, lengths: Any, attends: Any, rows: Tensor | None) -> Tensor:
        (attend,) = attends.values()
        self.log.kept_tokens = max(self.log.kept_tokens, sum(prefix.length for prefix in self._alive))
        self.log.forwards.append(
            Forward(
                lengths=attend.lengths,
                runs=[
                    (run.tokens.stop - run.tokens.start, run.prefix.length if run.prefix else 0) for run in attend.runs
                ],
                num_kept=len(attend.sinks) + (attend.slots is not None),
                num_copied=sum(sink.length > 0 for sink in attend.sinks),
            )
        )
        return torch.zeros(len(ids) if rows is None else len(rows), self.config.hidden_size)

    def empty_prefix(self) -> Prefix:
        return CountedPrefix(self.config, self.codec, self.model.dtype, self.layer_devices, alive=self._alive)

    def slots(self, num_slots: int, capacity: int) -> Slots:
        return UnwrittenSlots(self.config, self.codec, self.model.dtype, num_slots, capacity)

    def decoding(self, *args: Any, **options: Any) -> Decoding:
        made = super().decoding(*args, **{**options, "buckets": COARSE})
        made.__class__ = CountedSteps
        assert isinstance(made, CountedSteps)
        made.log = self.log
        return made


class CountingScorer(Scorer):
    def _exact(self, hidden_BE: Tensor, choices_BC: Tensor) -> Tensor:
        return torch.zeros(choices_BC.shape)

    def _token_scores(self, hidden_RE: Tensor, targets: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        nothing = torch.zeros(len(targets))
        return nothing, nothing, nothing


@dataclass(kw_only=True)
class ScriptedRow(Row):
    num_wanted: int

    def accept(self, token: int, piece: bytes) -> None:
        self.tokens.append(token)
        self.finish_reason = "stop" if len(self.tokens) >= self.num_wanted else None


# --- benchmarks ------------------------------------------------------------------------------------------------------


def tokenizer() -> QwenTokenizer:
    return QwenTokenizer(read_ranks(VOCABULARY))


def choices(task: Any) -> Iterator[Job]:
    encode = tokenizer().encode
    for sample in task.samples():
        request = task.request(sample, ())
        assert isinstance(request, Choose)
        yield Job(ids=request.kept(tuple(encode(request.prompt.text or ""))), choices=(1, 2, 3, 4))


def documents(count: int, length: int = 32768) -> list[Job]:
    draw = random.Random(0)
    return [Job(ids=tuple(draw.randrange(100) for _ in range(length))) for _ in range(count)]


def texts(path: str) -> list[ScriptedRow]:
    encode, task, rows = tokenizer().encode, Gsm8k(Gsm8k.Spec(path=path), TaskContext()), []
    for i, sample in enumerate(task.samples()):
        request = task.request(sample, ())
        assert isinstance(request, Generate)
        prompt, wanted = tuple(encode(request.prompt.text or "")), len(encode(str(sample.data["answer"]))) + 3
        rows.append(
            ScriptedRow(index=i, prompt=prompt, max_new_tokens=512, end_ids=frozenset(), num_wanted=min(511, wanted))
        )
    return rows


def scored(jobs: Sequence[Job], config: ModelConfig) -> Log:
    runner = CountingRunner(config)
    scorer = CountingScorer(runner, max_batch_tokens=runner.max_batch_tokens, packing=runner.packing)
    assert len(list(scorer.run(jobs))) == len(jobs)
    return runner.log


def generated(rows: Sequence[ScriptedRow], num_slots: int, config: ModelConfig) -> Log:
    runner = CountingRunner(config)
    graphs: StepGraphs[StepResult] = StepGraphs(lambda compute: (lambda: None, compute()))
    generator = Generator(
        runner, tokenizer(), max_slots=num_slots, prefill_tokens=runner.max_batch_tokens, overlap=True,
        make_graphs=lambda _: graphs, packing=runner.packing,
    )  # fmt: skip
    fresh = [replace(row, tokens=[], text=bytearray()) for row in rows]
    assert len(list(generator.run(fresh))) == len(rows)
    runner.log.num_captured = graphs.num_captured
    return runner.log


# --- tables ----------------------------------------------------------------------------------------------------------

Line: TypeAlias = dict[str, str]


def packing(log: Log, gpu: Gpu) -> Line:
    forwards, slow = log.forwards, replace(gpu, launch_s=5 * gpu.launch_s)
    tokens, least_s = sum(f.num_tokens for f in forwards), sum(map(gpu.least_s, forwards))
    seconds = sum(map(gpu.forward_s, forwards))
    return {
        "tokens": f"{tokens:,}",
        "forwards": f"{len(forwards):,}",
        "tokens each": f"{tokens / len(forwards):,.0f}",
        f"below {SMALL:,}": f"{sum(f.num_tokens < SMALL for f in forwards):,}",
        "padding": f"{1 - tokens / sum(f.padded for f in forwards):.0%}",
        "runs each": f"{statistics.mean(len(f.runs) for f in forwards):.1f}",
        "thousand launches": f"{sum(map(gpu.launched_s, forwards)) / gpu.launch_s / 1e3:,.0f}",
        "GiB of prefixes": f"{log.kept_tokens * gpu.token_bytes / GIB:.1f}",
        "seconds": f"{seconds:.1f}",
        "of the peak": f"{least_s / seconds:.0%}",
        "launches 5 x": f"{least_s / sum(map(slow.forward_s, forwards)):.0%}",
    }


def stepping(log: Log, num_slots: int, gpu: Gpu) -> Line:
    steps, rows = log.steps, sum(step.num_rows for step in log.steps)
    seconds = sum(map(gpu.step_s, steps)) + log.num_captured * CAPTURE_S
    return {
        "steps": f"{len(steps):,}",
        "slots in use": f"{rows / len(steps) / num_slots:.0%}",
        "shapes": str(len({step.shape for step in steps})),
        "captured": str(log.num_captured),
        "plain steps": str(sum(not step.is_replayed for step in steps)),
        "tokens/s": f"{rows / seconds:,.0f}",
        "seconds": f"{seconds:.1f}",
        "of the bandwidth": f"{sum(map(gpu.least_step_s, steps)) / seconds:.0%}",
    }


def shown(lines: dict[str, Line]) -> str:
    names = list(next(iter(lines.values())))
    head = [f"| predicted | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    return "\n".join(head + [f"| {name} | {' | '.join(line.values())} |" for name, line in lines.items()]) + "\n"


def shape(hidden: int, layers: int) -> ModelConfig:
    return ModelConfig(
        family="qwen", hidden_size=hidden, num_layers=layers, num_heads=hidden // 128, num_kv_heads=hidden // 128,
        head_dim=128, mlp_size=hidden * 43 // 16, vocab_size=151936, norm_eps=1e-6, rope_base=10000.0, rotary_dim=128,
        train_length=8192, dynamic_ntk=True, logn=True, qkv_bias=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mmlu", help="folder with dev/ and test/ in the official layout")
    parser.add_argument("--ceval", help="folder with dev/ and val/ in the official layout")
    parser.add_argument("--gsm8k", help="the official test.jsonl")
    parser.add_argument("--documents", type=int, default=8, help="of 32,768 random tokens, for perplexity")
    parser.add_argument("--launch-us", type=float, default=4.0, help="of one kernel")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    config = shape(options.hidden, options.layers)
    gpu = Gpu(config=config, launch_s=options.launch_us * 1e-6)
    works: dict[str, Callable[[], Log]] = {}
    context = TaskContext()
    if options.mmlu:
        works["MMLU 5-shot"] = lambda: scored(list(choices(Mmlu(Mmlu.Spec(path=options.mmlu), context))), config)
    if options.ceval:
        works["C-Eval 5-shot"] = lambda: scored(list(choices(Ceval(Ceval.Spec(path=options.ceval), context))), config)
    works["perplexity of 32,768"] = lambda: scored(documents(options.documents), config)
    logs = {name: work() for name, work in works.items()}
    rows = texts(options.gsm8k) if options.gsm8k else []
    running = {size: generated(rows, size, config) for size in SLOTS if rows}
    logs |= {f"GSM8K prompts, {size} slots": log for size, log in running.items()}
    print(shown({name: packing(log, gpu) for name, log in logs.items()}))
    if running:
        print(shown({f"GSM8K, {size} slots": stepping(log, size, gpu) for size, log in running.items()}))


if __name__ == "__main__":
    main()
