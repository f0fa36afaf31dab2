"""vLLM offline: for models that need several GPUs, or for comparison. A thin layer over `vllm.LLM`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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

DTYPES = {"auto": "auto", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
BATCH = 512  # requests handed over at once: their answers are stored before the next ones are asked


class VllmEngine:
    """Answers requests with `llm` (a `vllm.LLM`). Choices and scores are read from the prompt's log-probabilities."""

    def __init__(self, llm: Any, tokenizer: HfTokenizer, make_sampling: Any, *, weights: str | None = None) -> None:
        self._llm, self._make_sampling, self._weights = llm, make_sampling, weights
        self.tokenizer = tokenizer
        self._chat_facts = self.tokenizer.facts

    @property
    def info(self) -> Mapping[str, JSON]:
        import vllm

        weights = {"weights": self._weights} if self._weights else {}
        return {"engine": "vllm", "version": vllm.__version__, **weights, **self._chat_facts}

    def render(self, prompt: Prompt) -> Rendered:
        ids = tuple(self.tokenizer.render(prompt))
        return Rendered(text=self.tokenizer.decode(ids), ids=ids)

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        for start in range(0, len(requests), BATCH):
            batch = requests[start : start + BATCH]
            rows = [self._rows(request) for request in batch]
            flat = [row for group in rows for row in group]
            outputs = iter(
                self._llm.generate(
                    [{"prompt_token_ids": ids} for ids, _ in flat], [sampling for _, sampling in flat], use_tqdm=False
                )
            )
            for index, (request, group) in enumerate(zip(batch, rows), start=start):
                yield index, self._answer(request, [next(outputs) for _ in group])

    def close(self) -> None:
        self._llm = None

    def _rows(self, request: Request) -> list[tuple[list[int], Any]]:
        """What is handed to vLLM for one request: token ids with sampling parameters, one row a choice."""
        ids = self.tokenizer.render(request.prompt)
        if isinstance(request, Generate):
            return [(ids, self._sampling(request))]
        scored = self._make_sampling(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        if isinstance(request, Score):
            return [(ids, scored)]
        ids = list(request.kept(tuple(ids)))
        return [(ids + self.tokenizer.encode(choice), scored) for choice in request.choices]

    def _sampling(self, request: Generate) -> Any:
        sampling = request.sampling
        return self._make_sampling(
            max_tokens=request.max_new_tokens,
            stop=list(request.stop) or None,
            n=request.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            repetition_penalty=sampling.repetition_penalty,
            seed=None if sampling.is_greedy else sampling.seed,
            logprobs=0,  # of the drawn tokens alone: their sum shows NaN, which the text does not
        )

    def _answer(self, request: Request, outputs: Sequence[Any]) -> Answer:
        if isinstance(request, Generate):
            return Completions(completions=tuple(_completion(item, request) for item in outputs[0].outputs))
        if isinstance(request, Score):
            first = max(1, request.num_context)
            ids = list(outputs[0].prompt_token_ids)[first:]
            rows = outputs[0].prompt_logprobs[first:]
            num_greedy = sum(row[token].rank == 1 for row, token in zip(rows, ids))
            logprobs = tuple(float(row[token].logprob) for row, token in zip(rows, ids))
            return TokenLogprobs(token_ids=tuple(ids), logprobs=logprobs, num_greedy=num_greedy)
        assert isinstance(request, Choose), type(request)
        num_tokens = tuple(len(self.tokenizer.encode(choice)) for choice in request.choices)
        sums = tuple(_tail_logprob(output, num) for output, num in zip(outputs, num_tokens))
        return ChoiceLogprobs(logprobs=sums, num_tokens=num_tokens)


def _tail_logprob(output: Any, num_tokens: int) -> float:
    ids, rows = output.prompt_token_ids[-num_tokens:], output.prompt_logprobs[-num_tokens:]
    return sum(float(row[token].logprob) for row, token in zip(rows, ids))


def _completion(item: Any, request: Generate) -> Completion:
    reason: FinishReason = "length"
    if item.finish_reason == "stop":
        reason = "stop" if item.stop_reason in request.stop else "eos"
    if item.cumulative_logprob is not None and not math.isfinite(item.cumulative_logprob):
        reason = "non-finite"
    ids = tuple(item.token_ids)
    return Completion(text=item.text, finish_reason=reason, num_tokens=len(ids), token_ids=ids)


def open_engine(spec: EngineSpec, model: ModelSpec, *, protocol: str = "robust") -> VllmEngine:
    """Start vLLM on `model.path` or the hub id; remote code is never run."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise EngineError("engine=vllm needs the package vllm: pip install 'qwen_eval[vllm]'") from error
    if model.path is not None:
        refuse_adapter(Path(model.path), "vllm")
    where = model.path or model.hub_id
    if where is None:
        raise EngineError(f"model={model.name}: engine=vllm needs model.path=DIR or model.hub_id=ORGANISATION/NAME")
    options: dict[str, Any] = {"dtype": DTYPES[model.dtype], "gpu_memory_utilization": spec.memory_fraction}
    options |= {"tensor_parallel_size": spec.tensor_parallel, "seed": model.seed, "trust_remote_code": False}
    if model.path is None:
        options["revision"] = model.revision
    if spec.max_batch_size is not None:
        options["max_num_seqs"] = spec.max_batch_size
    if quant_format(model.quant).is_made_here:
        raise EngineError(f"model.quant={model.quant}: not offered by engine=vllm; use engine=native or hf")
    llm = LLM(model=where, **options)
    tokenizer = HfTokenizer(llm.get_tokenizer(), system=model.system, thinking=model.thinking)
    return VllmEngine(llm, tokenizer, SamplingParams, weights=_fingerprint(model))


def _fingerprint(model: ModelSpec) -> str:
    try:
        return model_fingerprint(model)
    except ModelError:  # loaded from a store of vLLM's own; by its name alone no finished run is recalled
        return f"{model.hub}:{model.hub_id}@{model.revision or 'main'}"
