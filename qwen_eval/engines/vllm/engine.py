"""vLLM offline: for models that need several GPUs, or for comparison. A thin layer over `vllm.LLM`."""

from __future__ import annotations

import gc
import itertools
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import (
    JSON,
    Answer,
    ChoiceLogprobs,
    Choose,
    Completion,
    Completions,
    EngineError,
    FinishReason,
    Generate,
    ModelError,
    Prompt,
    Rendered,
    Request,
    Score,
    TokenLogprobs,
)
from qwen_eval.engines.hf_tokenizer import HfTokenizer
from qwen_eval.models.fingerprint import model_fingerprint
from qwen_eval.models.lora import refuse_adapter
from qwen_eval.models.quant.formats import quant_format

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, LLMEngine, Logprob, RequestOutput, SamplingParams

DTYPES = {"auto": "auto", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
MAX_OPEN = 512  # requests handed over and not answered yet; answers come one by one, so that a killed run loses few
MAX_OPEN_SCORED = 65_536  # tokens with log-probabilities among them: each is a small object of Python
# Tokens of one forward. vLLM's own 8,192 make 5 GB of fp32 logits where a whole prompt is scored, which it does not
# count when it divides the memory.
BATCH_TOKENS = 2048
WATCH_S = 0.5
GUARD = """
import os, sys
if not sys.stdin.buffer.read(1):  # who started this has ended without a word
    for pid in map(int, sys.argv[1:]):
        try:
            os.kill(pid, 9)
        except OSError:
            pass
"""
BY_IDS = "logprob_token_ids"  # of SamplingParams since vLLM 0.11: log-probabilities of given tokens
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, kw_only=True)
class _VllmPrompt:
    """One prompt for vLLM. `num_scored`: tokens of the prompt whose log-probabilities come back."""

    ids: list[int]
    sampling: SamplingParams
    num_scored: int = 0


@dataclass
class _Open:
    """A request whose rows are not all answered."""

    index: int
    outputs: dict[int, RequestOutput]  # by the number of the row
    num_left: int


class VllmEngine:
    """Answers requests with `llm` (a `vllm.LLM`), whose engine is stepped here so that answers are had as they come.

    Single-token choices: one generated token, with the log-probabilities of the wanted ids, so that the prefix cache
    serves the prompts. Longer choices and scored texts: the prompt's log-probabilities, one prompt a choice.
    """

    def __init__(
        self, llm: LLM, tokenizer: HfTokenizer, make_sampling: type[SamplingParams], *, weights: str | None = None
    ) -> None:
        self._llm: LLM | None = llm
        self._make_sampling, self._weights = make_sampling, weights
        self._by_ids = hasattr(make_sampling(), BY_IDS)
        _watch(llm)
        self._guard = _guard(llm)
        self.tokenizer = tokenizer
        self._chat_facts = self.tokenizer.facts
        self._ids = itertools.count()
        self.failures: dict[int, str] = {}

    @property
    def _engine(self) -> LLMEngine:
        assert self._llm is not None, "the engine is closed"
        return self._llm.llm_engine

    @property
    def info(self) -> Mapping[str, JSON]:
        import vllm

        weights = {"weights": self._weights} if self._weights else {}
        choices = BY_IDS if self._by_ids else f"prompt_logprobs, one prompt a choice: no {BY_IDS} in this vLLM, slower"
        return {"engine": "vllm", "version": vllm.__version__, "choices": choices, **weights, **self._chat_facts}

    def render(self, prompt: Prompt) -> Rendered:
        ids = tuple(self.tokenizer.render(prompt))
        return Rendered(text=self.tokenizer.decode(ids), ids=ids)

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        self.failures = {}
        opened: dict[str, tuple[_Open, int]] = {}  # of vLLM's request id: the request and the number of its row
        waiting = iter(enumerate(requests))
        num_scored = 0
        try:
            while True:
                while len(opened) < MAX_OPEN and num_scored < MAX_OPEN_SCORED and (item := next(waiting, None)):
                    num_scored += self._hand_over(*item, opened)
                if not opened:
                    return
                with _alive():
                    stepped = self._engine.step()
                for output in stepped:
                    if not output.finished:
                        continue
                    entry, number = opened.pop(output.request_id)
                    num_scored -= len(output.prompt_logprobs or ())
                    entry.outputs[number], entry.num_left = output, entry.num_left - 1
                    if entry.num_left == 0:
                        outputs = [entry.outputs[row] for row in sorted(entry.outputs)]
                        yield entry.index, self._answer(requests[entry.index], outputs)
        finally:
            self._abort(list(opened))  # where the caller stopped early

    def _abort(self, names: Sequence[str]) -> None:
        with suppress(Exception):  # vLLM may be dead, which is known by then
            self._engine.abort_request(list(names))

    def close(self) -> None:
        """End vLLM's processes and free their shared memory: by itself it does so only when Python collects it."""
        llm, self._llm = self._llm, None
        if llm is not None:
            _shut_down(llm)
        if self._guard is not None:
            self._guard.communicate(b"done")
            self._guard = None

    def _hand_over(self, index: int, request: Request, opened: dict[str, tuple[_Open, int]]) -> int:
        """Returns the number of scored tokens; a prompt that vLLM refuses (too long) is one of `failures`."""
        rows = self._rows(request)
        entry = _Open(index, {}, len(rows))
        names = [str(next(self._ids)) for _ in rows]
        engine = self._engine
        for number, (name, row) in enumerate(zip(names, rows, strict=True)):
            try:
                with _alive(passes=ValueError):
                    engine.add_request(name, {"prompt_token_ids": row.ids}, row.sampling)
            except ValueError as error:
                self.failures[index] = f"vLLM refuses the prompt: {' '.join(str(error).split())[:200]}"
                for given in names[:number]:
                    del opened[given]
                self._abort(names[:number])
                return 0
            opened[name] = (entry, number)
        return sum(row.num_scored for row in rows)

    def _rows(self, request: Request) -> list[_VllmPrompt]:
        """What is handed to vLLM for one request."""
        ids = self.tokenizer.render(request.prompt)
        if isinstance(request, Generate):
            return [_VllmPrompt(ids=ids, sampling=self._sampling(request))]
        scored = self._make_sampling(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        if isinstance(request, Score):
            return [_VllmPrompt(ids=ids, sampling=scored, num_scored=len(ids))]
        ids = list(request.kept(tuple(ids)))
        tails = [self.tokenizer.encode(choice) for choice in request.choices]
        if self._is_by_ids(tails):
            wanted = list(dict.fromkeys(tail[0] for tail in tails))
            choosing = self._make_sampling(max_tokens=1, temperature=0.0, detokenize=False, logprob_token_ids=wanted)
            return [_VllmPrompt(ids=ids, sampling=choosing)]
        return [_VllmPrompt(ids=ids + tail, sampling=scored, num_scored=len(ids + tail)) for tail in tails]

    def _is_by_ids(self, tails: Sequence[Sequence[int]]) -> bool:
        return self._by_ids and all(len(tail) == 1 for tail in tails)

    def _sampling(self, request: Generate) -> SamplingParams:
        sampling = request.sampling
        return self._make_sampling(
            max_tokens=request.max_new_tokens,
            stop=list(request.stop) or None,
            stop_token_ids=sorted(self.tokenizer.end_ids(request.prompt, frozenset())),  # and those it knows itself
            n=request.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            repetition_penalty=sampling.repetition_penalty,
            seed=None if sampling.is_greedy else sampling.seed,
            logprobs=0,  # of the drawn tokens alone: their sum shows NaN, which the text does not
        )

    def _answer(self, request: Request, outputs: Sequence[RequestOutput]) -> Answer:
        if isinstance(request, Generate):
            return Completions(completions=tuple(_completion(item, request) for item in outputs[0].outputs))
        if isinstance(request, Score):
            first = max(1, request.num_context)
            ids, rows = _scored(outputs[0], first)
            num_greedy = sum(row[token].rank == 1 for row, token in zip(rows, ids))
            logprobs = tuple(float(row[token].logprob) for row, token in zip(rows, ids))
            return TokenLogprobs(token_ids=tuple(ids), logprobs=logprobs, num_greedy=num_greedy)
        assert isinstance(request, Choose), type(request)
        tails = [self.tokenizer.encode(choice) for choice in request.choices]
        num_tokens = tuple(map(len, tails))
        if self._is_by_ids(tails):
            generated = outputs[0].outputs[0].logprobs
            assert generated is not None, "asked for and not given"
            row = generated[0]
            return ChoiceLogprobs(logprobs=tuple(float(row[i].logprob) for (i,) in tails), num_tokens=num_tokens)
        sums = tuple(_tail_logprob(output, num) for output, num in zip(outputs, num_tokens))
        return ChoiceLogprobs(logprobs=sums, num_tokens=num_tokens)


@contextmanager
def _alive(passes: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """EngineError where vLLM's processes have ended: the error that says so has had several names."""
    try:
        yield
    except passes:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise EngineError(
            f"vLLM has ended ({reason}); VLLM_LOGGING_LEVEL=INFO shows why, the same command resumes the run"
        ) from error


def _watch(llm: LLM) -> None:
    """Wake who waits for the answers of a core that was killed: vLLM's client (0.32) would let them wait for ever."""
    core: Any = getattr(llm.llm_engine, "engine_core", None)
    if not (hasattr(core, "outputs_queue") and hasattr(core, "resources")):
        return  # another client than that of a core in a process of its own
    resources, answers = core.resources, core.outputs_queue

    def wait() -> None:
        while not resources.engine_dead:  # also set when it is shut down
            time.sleep(WATCH_S)
        answers.put_nowait(RuntimeError("its core process has ended"))

    threading.Thread(target=wait, name="vllm-watch", daemon=True).start()


def _guard(llm: LLM) -> subprocess.Popen[bytes] | None:
    """A process that ends vLLM's core when this one is killed: by itself it would go on (0.32), and hold its memory."""
    core: Any = getattr(llm.llm_engine, "engine_core", None)
    manager = getattr(getattr(core, "resources", None), "engine_manager", None)
    pids = [str(process.pid) for process in getattr(manager, "processes", ())]
    if not pids:
        return None
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", GUARD, *pids], stdin=subprocess.PIPE, start_new_session=True
    )


def _shut_down(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _scored(output: RequestOutput, first: int) -> tuple[list[int], list[dict[int, Logprob]]]:
    """The prompt's tokens from `first` on, and what vLLM says of each; of the very first token it says nothing."""
    ids, rows = output.prompt_token_ids, output.prompt_logprobs
    assert ids is not None, "the prompt has no ids"
    assert rows is not None, "asked for and not given"
    return list(ids)[first:], [row for row in rows[first:] if row is not None]


def _tail_logprob(output: RequestOutput, num_tokens: int) -> float:
    ids, rows = _scored(output, -num_tokens)
    return sum(float(row[token].logprob) for row, token in zip(rows, ids))


def _completion(item: CompletionOutput, request: Generate) -> Completion:
    reason: FinishReason = "length"
    if item.finish_reason == "stop":
        reason = "stop" if item.stop_reason in request.stop else "eos"
    if item.cumulative_logprob is not None and not math.isfinite(item.cumulative_logprob):
        reason = "non-finite"
    ids = tuple(item.token_ids)
    return Completion(text=item.text, finish_reason=reason, num_tokens=len(ids), token_ids=ids)


def open_engine(spec: EngineSpec, model: ModelSpec, *, protocol: str = "robust") -> VllmEngine:
    """Start vLLM on `model.path` or the hub id; remote code is never run."""
    if quant_format(model.quant).is_made_here:
        raise EngineError(f"model.quant={model.quant}: not offered by engine=vllm; use engine=native or hf")
    for name, value in QUIET.items():  # read when vLLM is imported, and by its processes
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise EngineError("engine=vllm needs the package vllm: pip install 'qwen_eval[vllm]'") from error
    if model.path is not None:
        refuse_adapter(Path(model.path), "vllm")
    where = model.path or model.hub_id
    if where is None:
        raise EngineError(f"model={model.name}: engine=vllm needs model.path=DIR or model.hub_id=ORGANISATION/NAME")
    try:
        llm = LLM(model=where, **_options(spec, model))
    except (RuntimeError, ValueError, OSError, ImportError) as error:  # the reason stands in the log of its processes
        raise EngineError(f"{where}: vLLM does not start ({' '.join(str(error).split())[:200]})") from error
    tokenizer = HfTokenizer(llm.get_tokenizer(), system=model.system, thinking=model.thinking)
    return VllmEngine(llm, tokenizer, SamplingParams, weights=_fingerprint(model))


def _options(spec: EngineSpec, model: ModelSpec) -> dict[str, Any]:
    """The words of `vllm.LLM` for our keys."""
    options: dict[str, Any] = {"dtype": DTYPES[model.dtype], "gpu_memory_utilization": spec.memory_fraction}
    options |= {"tensor_parallel_size": spec.tensor_parallel, "pipeline_parallel_size": spec.pipeline_parallel}
    options |= {"seed": model.seed, "trust_remote_code": False, "enable_prefix_caching": spec.prefix_sharing}
    options |= {"max_num_batched_tokens": spec.max_batch_tokens or BATCH_TOKENS, "enable_chunked_prefill": True}
    if model.path is None:
        options["revision"] = model.revision
    if spec.max_batch_size is not None:
        options["max_num_seqs"] = spec.max_batch_size
    if spec.executor != "auto":
        options["distributed_executor_backend"] = spec.executor
    return options


def _fingerprint(model: ModelSpec) -> str:
    try:
        return model_fingerprint(model)
    except ModelError:  # loaded from a store of vLLM's own; by its name alone no finished run is recalled
        return f"{model.hub}:{model.hub_id}@{model.revision or 'main'}"
