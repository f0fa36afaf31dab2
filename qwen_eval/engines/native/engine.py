"""The native engine: our own Qwen transformer, prefix-shared scoring, continuously batched generation."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from qwen_eval.activity import stage
from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import (
    JSON,
    Answer,
    ChoiceLogprobs,
    Choose,
    Completion,
    Completions,
    EngineError,
    Generate,
    ModelError,
    Prompt,
    Rendered,
    Request,
    Score,
    TokenLogprobs,
    ids_sha256,
)
from qwen_eval.engines.native.generation import Generator, Row, completion_of, refuse_empty
from qwen_eval.engines.native.scheduler import Packing, is_out_of_memory
from qwen_eval.engines.native.scoring import Job, Scorer, Scores
from qwen_eval.engines.native.workspace import MakeGraphs
from qwen_eval.models import fused
from qwen_eval.models.cost import CUDA_HEAD_BYTES, PREFILL_CHUNK, BatchLimits, spread_limits
from qwen_eval.models.device import memory_bytes
from qwen_eval.models.graph import cuda_graphs
from qwen_eval.models.hidden import HiddenStates
from qwen_eval.models.load import DTYPES, open_forward
from qwen_eval.models.runner import ModelRunner
from qwen_eval.models.tokenizer import ChatTokenizer

RENDER_CACHE = 4096  # prompts: the loop renders each again when it stores the record


class NativeEngine:
    """Answers requests with a `ModelRunner` and its tokenizer. `facts` go into `info` (digest, device, kernels ...)."""

    def __init__(
        self,
        forward: ModelRunner,
        tokenizer: ChatTokenizer,
        *,
        facts: Mapping[str, JSON] | None = None,
        prefix_sharing: bool = True,
        max_batch_tokens: int = 4096,
        max_batch_size: int | None = None,
        max_cached_tokens: int | None = None,
        token_bytes: int | None = None,
        protocol: str = "robust",
        make_graphs: MakeGraphs = cuda_graphs,
        packing: Packing | None = None,
    ) -> None:
        self.forward = forward
        self._tokenizer = tokenizer
        self._facts = dict(facts or {})
        dtype = forward.model.dtype if protocol == "upstream" else torch.float32
        self._logits_dtype = str(dtype).removeprefix("torch.")
        self.scorer = Scorer(
            forward,
            share=prefix_sharing,
            max_batch_tokens=max_batch_tokens,
            max_batch_size=max_batch_size,
            model_dtype_logits=protocol == "upstream",
            packing=packing,
        )
        self.generator = Generator(
            forward,
            tokenizer,
            share=prefix_sharing,
            max_slots=max_batch_size or (256 if forward.device.type == "cuda" else 64),
            prefill_tokens=max_batch_tokens,
            max_cached_tokens=max_cached_tokens,
            token_bytes=token_bytes,
            make_graphs=make_graphs,
            packing=packing,
        )
        self._render_ids = lru_cache(maxsize=RENDER_CACHE)(lambda prompt: tuple(tokenizer.render(prompt)))
        self._busy_s = 0.0

    @property
    def info(self) -> Mapping[str, JSON]:
        """What was really used, and how much was computed so far."""
        scored, generated = self.scorer.counters, self.generator.counters
        return {
            **self._facts,
            "engine": "native",
            "kv_cache": self.forward.codec.name,
            "attention": self.forward.kernel,
            "computed_tokens": scored.computed_tokens + generated.computed_tokens + generated.generated_tokens,
            "prompt_tokens": scored.prompt_tokens + generated.prompt_tokens,
            "generated_tokens": generated.generated_tokens,
            "busy_s": self._busy_s,
            "small_kernels": fused.name(self.forward.device, self.forward.model.dtype),
            "decode_attention": self.forward.decode_kernel,
            "decode_steps": self.generator.steps,
            "num_oom": scored.num_oom + generated.num_oom,
        }

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self._tokenizer

    def render(self, prompt: Prompt) -> Rendered:
        return Rendered(text=self._tokenizer.render_text(prompt), ids=self._render_ids(prompt))

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        start = time.perf_counter()
        answers: Iterator[tuple[int, Answer]] = itertools.chain(
            self._choose([(i, r) for i, r in enumerate(requests) if isinstance(r, Choose)]),
            self._score([(i, r) for i, r in enumerate(requests) if isinstance(r, Score)]),
            self._generate([(i, r) for i, r in enumerate(requests) if isinstance(r, Generate)]),
        )
        for index, answer in _within_memory(answers):
            self._busy_s += time.perf_counter() - start
            yield index, answer
            start = time.perf_counter()

    def locate_non_finite(self, request: Request) -> str:
        return self.forward.first_non_finite(self._render_ids(request.prompt))

    def close(self) -> None:
        self.generator.release()
        del self.forward, self.scorer.forward, self.generator.forward
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _choose(self, requests: Sequence[tuple[int, Choose]]) -> Iterator[tuple[int, ChoiceLogprobs]]:
        jobs: list[Job] = []
        owners: list[tuple[int, int]] = []  # (request, choice) of each job; choice -1 for all at once
        parts: dict[int, dict[int, Scores]] = {}
        for index, request in _packed(requests):
            choices = [tuple(self._tokenizer.encode(choice)) for choice in request.choices]
            prompt = request.kept(self._render_ids(request.prompt))
            refuse_empty(prompt)
            if all(len(choice) == 1 for choice in choices):
                jobs.append(Job(ids=prompt, choices=tuple(choice[0] for choice in choices)))
                owners.append((index, -1))
                continue
            parts[index] = {}
            for c, continuation in enumerate(choices):
                jobs.append(Job(ids=(*prompt, *continuation), first=len(prompt)))
                owners.append((index, c))
        wanted = {index: len(request.choices) for index, request in requests}
        if jobs:
            self.generator.release()
        for j, scores in self.scorer.run(jobs):
            index, c = owners[j]
            if c < 0:
                yield index, _letters(scores, self._logits_dtype)
                continue
            parts[index][c] = scores
            if len(parts[index]) == wanted[index]:
                yield index, _continuations([parts[index][i] for i in range(wanted[index])])

    def _score(self, requests: Sequence[tuple[int, Score]]) -> Iterator[tuple[int, TokenLogprobs]]:
        jobs = []
        for _, request in requests:
            ids = self._render_ids(request.prompt)
            first = max(1, request.num_context)
            if len(ids) <= first:
                raise ModelError(f"a text of {len(ids)} tokens has nothing to score after {first} of context")
            jobs.append(Job(ids=ids, first=first, num_fed=request.num_fed))
        if jobs:
            self.generator.release()
        on_hidden = _keeper([request for _, request in requests], jobs)
        for j, scores in self.scorer.run(jobs, on_hidden=on_hidden):
            yield (
                requests[j][0],
                TokenLogprobs(
                    token_ids=jobs[j].ids[jobs[j].first :],
                    logprobs=tuple(scores.logprobs.tolist()),
                    num_greedy=scores.num_greedy,
                ),
            )

    def _generate(self, requests: Sequence[tuple[int, Generate]]) -> Iterator[tuple[int, Completions]]:
        with stage("packing the prompts", is_brief=True):
            rows = [row for index, request in requests for row in self._rows(index, request)]
        wanted = {index: request.n for index, request in requests}
        done: dict[int, dict[int, Completion]] = {index: {} for index in wanted}
        for row in self.generator.run(rows):
            done[row.index][row.k] = completion_of(row, self._tokenizer)
            if len(done[row.index]) == wanted[row.index]:
                finished = done.pop(row.index)
                yield row.index, Completions(completions=tuple(finished[k] for k in range(wanted[row.index])))

    def _rows(self, index: int, request: Generate) -> Iterator[Row]:
        prompt = self._render_ids(request.prompt)
        refuse_empty(prompt)
        for k in range(request.n):
            yield Row(
                index=index,
                prompt=prompt,
                max_new_tokens=request.max_new_tokens,
                end_ids=self._tokenizer.end_ids(request.prompt),
                stop=tuple(s.encode() for s in request.stop),
                sampling=request.sampling,
                k=k,
            )


def _within_memory(answers: Iterator[tuple[int, Answer]]) -> Iterator[tuple[int, Answer]]:
    """EngineError where not even one sequence at a time fits: what can be halved has been by then."""
    try:
        yield from answers
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EngineError(
            "out of memory with a single sequence; use model.kv_cache=int8, a smaller engine.prefill_chunk, quantized "
            "weights or a larger device"
        ) from None


def _packed(requests: Sequence[tuple[int, Choose]]) -> Iterator[tuple[int, Choose]]:
    """The requests, while their prompts are tokenised: of a whole benchmark that takes a while."""
    with stage("packing the prompts", is_brief=True):
        yield from requests


def _keeper(requests: Sequence[Score], jobs: Sequence[Job]) -> Callable[[int, Tensor], None] | None:
    """What keeps the rows [n,E] of job j where its request asks for it; None where none does."""
    stores = {name: HiddenStates(Path(name)) for name in {request.keep_hidden for request in requests} if name}

    def keep(j: int, rows_RE: Tensor) -> None:
        name, job = requests[j].keep_hidden, jobs[j]
        if name:
            stores[name].add(ids_sha256(job.ids), len(job.ids) - job.first, rows_RE)

    return keep if stores else None


def _letters(scores: Scores, dtype: str) -> ChoiceLogprobs:
    return ChoiceLogprobs(
        dtype=dtype,
        logprobs=tuple(scores.logprobs.tolist()),
        num_tokens=(1,) * len(scores.logits),
        logits=tuple(scores.logits.tolist()),
        logsumexp=float(scores.logsumexp),
    )


def _continuations(parts: Sequence[Scores]) -> ChoiceLogprobs:
    return ChoiceLogprobs(
        logprobs=tuple(float(part.logprobs.sum()) for part in parts),
        num_tokens=tuple(len(part.logits) for part in parts),
    )


def open_engine(spec: EngineSpec, model: ModelSpec, *, protocol: str = "robust") -> NativeEngine:
    """Load the checkpoint of `model`; ModelError, ConfigError or EngineError in one line where that cannot be."""
    if spec.num_threads is not None:
        torch.set_num_threads(spec.num_threads)
    fused.choose(spec.kernels)
    opened = open_forward(model, protocol=protocol, prefill_chunk=spec.prefill_chunk or PREFILL_CHUNK)
    limits = memory_limits(opened.forward, spec, model.kv_cache)
    opened.forward.pool_bytes = limits.pool_bytes
    if spec.prefill_chunk is None:
        opened.forward.use_long_chunk(limits.chunk_tokens)
    return NativeEngine(
        opened.forward,
        opened.tokenizer,
        facts=opened.facts,
        prefix_sharing=spec.prefix_sharing,
        max_batch_tokens=spec.max_batch_tokens or limits.packed_tokens,
        max_batch_size=spec.max_batch_size,
        max_cached_tokens=None if spec.max_batch_size else limits.cached_tokens,
        protocol=protocol,
        token_bytes=limits.token_bytes,
        packing=packing_for(opened.forward, limits),
        make_graphs=(lambda _: None) if spec.kernels == "plain" else partial(cuda_graphs, max_bytes=limits.graph_bytes),
    )


def packing_for(forward: ModelRunner, limits: BatchLimits) -> Packing:
    """Half of the cache is for the prefixes of a wave, the rest for those of sequences that wait and for parents."""
    if forward.device.type == "cpu":
        return Packing(kept_tokens=max(1, limits.cached_tokens // 2))
    return gpu_packing(forward, limits)


def gpu_packing(forward: ModelRunner, limits: BatchLimits) -> Packing:
    """Fewer and larger forwards, each after few prefixes: tools/predict_gpu.py says what that gives."""
    return Packing(
        wave_tokens=forward.long_chunk,
        kept_tokens=max(1, limits.cached_tokens // 2),
        min_saved=256,
        fills_batches=True,
        by_prefix=True,
        free_slots=1 / 12,
    )


def memory_limits(forward: ModelRunner, spec: EngineSpec, kv_cache: str) -> BatchLimits:
    """What fits beside the loaded weights, by the cost model; of several devices, on the fullest."""
    dtype = next(name for name, known in DTYPES.items() if known == forward.model.dtype)
    is_cuda = forward.device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()  # what loading has left in the allocator is free too
    options = {
        "max_tokens": 16384 if is_cuda else 4096,
        "head_bytes": CUDA_HEAD_BYTES if is_cuda else 0,
        "is_captured": is_cuda and spec.kernels != "plain" and not forward.is_spread,
    }
    free = {device: int(memory_bytes(device)[0] * spec.memory_fraction) for device in forward.devices}
    rooms = [(num_layers, free[device]) for device, num_layers in Counter(forward.layer_devices).items()]
    return spread_limits(forward.config, kv_cache, dtype, rooms, **options)
