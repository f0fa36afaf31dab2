"""Any causal language model of transformers: the engine for models that the native one does not support.

Legend: B batch, T tokens, V vocabulary. Prompts are padded on the left, so that the last positions are the wanted ones.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

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
    QwenEvalError,
    Rendered,
    Request,
    Score,
    TokenLogprobs,
)
from qwen_eval.engines.hf.calls import (
    Drawn,
    Extras,
    Overflow,
    Padded,
    StopStrings,
    first_stop,
    is_stretched,
    named_ends,
)
from qwen_eval.engines.hf_tokenizer import HfTokenizer
from qwen_eval.models.fingerprint import model_fingerprint
from qwen_eval.models.generation_config import sampling_of
from qwen_eval.models.hub import checkpoint_dir, local_dir
from qwen_eval.models.lora import refuse_adapter
from qwen_eval.models.naming import check_shape
from qwen_eval.models.quant.bnb import allow_fused
from qwen_eval.models.quant.formats import quant_format

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 8
SCORE_CHUNK = 512  # tokens whose logits over the whole vocabulary are held at once
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ATTENTION = {"auto": None, "sdpa": "sdpa", "flash": "flash_attention_2", "eager": "eager"}

Item = TypeVar("Item", bound="tuple[int, object] | tuple[int, object, object]")


class HfEngine:
    """Answers requests with `model` (a transformers causal LM) and its tokenizer."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: HfTokenizer,
        *,
        batch_size: int = BATCH_SIZE,
        weights: str | None = None,
    ) -> None:
        from transformers import GenerationConfig

        self.tokenizer = tokenizer
        self._chat_facts = self.tokenizer.facts
        self._held: PreTrainedModel | None = model.eval()
        self._batch_size = batch_size
        self._weights = weights
        self._takes = set(inspect.signature(model.forward).parameters)
        self._named_ends = named_ends(model)
        own = (tokenizer.inner.pad_token_id, tokenizer.inner.eos_token_id, *sorted(self._named_ends), 0)
        self._pad_id = next(i for i in own if i is not None)
        self._is_stretched = is_stretched(model)
        self._sampling = sampling_of(model.generation_config.to_diff_dict()) if model.generation_config else None
        # the checkpoint's own defaults (a repetition penalty of 1.05 in Qwen2.5) would fill what requests leave at 1.0
        model.generation_config = GenerationConfig()

    @property
    def _model(self) -> PreTrainedModel:
        assert self._held is not None, "the engine is closed"
        return self._held

    @property
    def info(self) -> Mapping[str, JSON]:
        parameter = next(self._model.parameters())
        return {
            "engine": "hf",
            "architecture": type(self._model).__name__,
            "device": str(parameter.device),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "attention": getattr(self._model.config, "_attn_implementation", None),
            "max_length": getattr(self._model.config, "max_position_embeddings", None),
            **self._chat_facts,
            "sampling": self._sampling,
            **({"weights": self._weights} if self._weights else {}),
        }

    def render(self, prompt: Prompt) -> Rendered:
        ids = tuple(self.tokenizer.render(prompt))
        return Rendered(text=self.tokenizer.decode(ids), ids=ids)

    def close(self) -> None:
        self._held = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        chooses = [(i, request) for i, request in enumerate(requests) if isinstance(request, Choose)]
        scores = [(i, request) for i, request in enumerate(requests) if isinstance(request, Score)]
        generates = [(i, request) for i, request in enumerate(requests) if isinstance(request, Generate)]
        yield from self._choose_all(chooses)
        yield from self._in_batches(scores, lambda batch: [self._score(batch[0][1])], most=1)
        yield from self._generate_all(generates)

    # --- choices -----------------------------------------------------------------------------------------------------

    def _choose_all(self, requests: Sequence[tuple[int, Choose]]) -> Iterator[tuple[int, Answer]]:
        asked = [(index, *self._choice_ids(request)) for index, request in requests]
        asked.sort(key=lambda item: -len(item[1]))  # long ones first: what does not fit in memory shows at once
        single = [item for item in asked if all(len(choice) == 1 for choice in item[2])]
        yield from self._in_batches(single, self._choose_single)
        long = [item for item in asked if not all(len(choice) == 1 for choice in item[2])]
        yield from self._in_batches(long, lambda batch: [self._choose_long(*batch[0][1:])], most=1)

    def _choice_ids(self, request: Choose) -> tuple[list[int], list[list[int]]]:
        ids = list(request.kept(tuple(self.tokenizer.render(request.prompt))))
        choices = [self.tokenizer.encode(choice) for choice in request.choices]
        if not ids or not all(choices):
            raise EngineError(f"a prompt and every choice need at least one token: {request.choices!r}")
        return ids, choices

    def _choose_single(self, batch: Sequence[tuple[int, list[int], list[list[int]]]]) -> list[Answer]:
        logits_BV = self._last_logits([prompt for _, prompt, _ in batch], 1)[:, -1]
        sums_B = logits_BV.logsumexp(-1)
        answers: list[Answer] = []
        for row, (_, _, choices) in enumerate(batch):
            logits = logits_BV[row, [choice[0] for choice in choices]].tolist()
            logsumexp = float(sums_B[row])
            logprobs = tuple(logit - logsumexp for logit in logits)
            answers.append(
                ChoiceLogprobs(
                    logprobs=logprobs,
                    num_tokens=(1,) * len(choices),
                    logits=tuple(logits),
                    logsumexp=logsumexp,
                    dtype=str(self._model.dtype).removeprefix("torch."),
                )
            )
        return answers

    def _choose_long(self, prompt: list[int], choices: list[list[int]]) -> Answer:
        keep = max(len(choice) for choice in choices)
        logprobs_BTV = self._last_logits([prompt + choice[:-1] for choice in choices], keep).log_softmax(-1)
        sums = [
            float(logprobs_BTV[row, range(keep - len(choice), keep), choice].sum())
            for row, choice in enumerate(choices)
        ]
        return ChoiceLogprobs(logprobs=tuple(sums), num_tokens=tuple(len(choice) for choice in choices))

    @torch.inference_mode()
    def _last_logits(self, rows: Sequence[list[int]], keep: int) -> torch.Tensor:
        """Logits [B, keep, V] in fp32 of the last `keep` positions of each row."""
        inputs, extras = self._padded(rows), Extras()
        if "position_ids" in self._takes:
            extras["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in self._takes:
            extras["logits_to_keep"] = keep
        return self._model(**inputs, **extras, use_cache=False).logits[:, -keep:].float()

    # --- scores ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _score(self, request: Score) -> Answer:
        ids = self.tokenizer.render(request.prompt)
        first = max(1, request.num_context)
        logprobs: list[float] = []
        num_greedy = 0
        cache: Cache | None = None
        num_fed, size = len(ids) - 1, SCORE_CHUNK  # the last token predicts nothing that is asked
        if self._is_stretched:
            num_fed = size = request.num_fed or len(ids)
        for start in range(0, num_fed, size):
            chunk = ids[start : min(start + size, num_fed)]
            out = self._model(input_ids=self._tensor([chunk]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            begin = max(0, first - 1 - start)  # rows before it predict context
            wanted_T = self._tensor(ids[start + begin + 1 : start + len(chunk) + 1])
            logits_TV = out.logits[0, begin : begin + len(wanted_T)].float()
            if len(wanted_T):
                logprobs += logits_TV.log_softmax(-1).gather(1, wanted_T[:, None])[:, 0].tolist()
                num_greedy += int((logits_TV.argmax(-1) == wanted_T).sum())
        return TokenLogprobs(token_ids=tuple(ids[first:]), logprobs=tuple(logprobs), num_greedy=num_greedy)

    # --- texts -------------------------------------------------------------------------------------------------------

    def _generate_all(self, requests: Sequence[tuple[int, Generate]]) -> Iterator[tuple[int, Answer]]:
        """Greedy requests in batches, so that a text depends only on its request and seed: sampled ones are drawn
        alone, and with a penalty transformers counts the padding as text.
        """
        groups: dict[tuple[object, ...], list[tuple[int, Generate]]] = defaultdict(list)
        alone: list[tuple[int, Generate]] = []
        for index, request in requests:
            key = (request.max_new_tokens, request.stop, request.sampling, self._ends(request))
            is_alone = not request.sampling.is_greedy or request.sampling.repetition_penalty != 1
            (alone if is_alone else groups[key]).append((index, request))
        yield from self._in_batches(alone, lambda batch: self._drawn(batch[0][1]), most=1)
        for group in groups.values():
            yield from self._in_batches(group, lambda batch: self._greedy([request for _, request in batch]))

    def _ends(self, request: Generate) -> frozenset[int]:
        return self.tokenizer.end_ids(request.prompt, self._named_ends)

    def _greedy(self, batch: Sequence[Generate]) -> list[Answer]:
        completions = self._generate(batch)
        return [Completions(completions=(item,) * request.n) for item, request in zip(completions, batch)]

    def _drawn(self, request: Generate) -> list[Answer]:
        if request.sampling.is_greedy:
            return self._greedy([request])
        return [Completions(completions=tuple(self._sample(request, draw) for draw in range(request.n)))]

    def _sample(self, request: Generate, draw: int) -> Completion:
        torch.manual_seed(request.sampling.seed * 1_000_003 + draw)
        return self._generate([request])[0]

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Generate]) -> list[Completion]:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        inputs = self._padded([self.tokenizer.render(request.prompt) for request in batch])
        width = inputs["input_ids"].shape[1]
        overflow = Overflow(len(batch), self._model.device)
        stops = [StopStrings(self.tokenizer, batch[0].stop, width)] if batch[0].stop else []
        out = self._model.generate(
            **inputs,
            generation_config=self._generation_config(batch[0]),
            logits_processor=LogitsProcessorList([overflow]),
            stopping_criteria=StoppingCriteriaList([*stops, overflow.ends]),
        )
        completions = [self._completion(row[width:], request) for row, request in zip(out.tolist(), batch)]
        return [
            replace(item, finish_reason="non-finite") if has_overflowed else item
            for item, has_overflowed in zip(completions, overflow.rows_B.tolist())
        ]

    def _generation_config(self, request: Generate) -> GenerationConfig:
        from transformers import GenerationConfig

        sampling = request.sampling
        drawn: Drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        return GenerationConfig(
            max_new_tokens=request.max_new_tokens,
            do_sample=not sampling.is_greedy,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=sorted(self._ends(request)) or None,
            pad_token_id=self._pad_id,
            **(Drawn() if sampling.is_greedy else drawn),
        )

    def _completion(self, tokens: list[int], request: Generate) -> Completion:
        """Cut a generated row, which is padded once its text has ended, at what ended it."""
        reason: FinishReason = "length"
        end_ids = self._ends(request)
        ends = [at for at, token in enumerate(tokens) if token in end_ids]
        if ends:
            tokens, reason = tokens[: ends[0] + 1], "eos"
        text = self.tokenizer.decode(tokens[:-1] if ends else tokens)
        found = first_stop(text, request.stop)
        if found is not None:
            text, reason = text[:found], "stop"
            tokens = self._until_stop(tokens, request.stop)
        return Completion(text=text, finish_reason=reason, num_tokens=len(tokens), token_ids=tuple(tokens))

    def _until_stop(self, tokens: list[int], stop: tuple[str, ...]) -> list[int]:
        low, high = 1, len(tokens)  # the fewest tokens whose text has a stop string: having one is monotone
        while low < high:
            middle = (low + high) // 2
            has_stop = first_stop(self.tokenizer.decode(tokens[:middle]), stop) is not None
            low, high = (low, middle) if has_stop else (middle + 1, high)
        return tokens[:low]

    # --- batches -----------------------------------------------------------------------------------------------------

    def _in_batches(
        self, items: Sequence[Item], answer: Callable[[Sequence[Item]], list[Answer]], *, most: int | None = None
    ) -> Iterator[tuple[int, Answer]]:
        """Items are (index, ...), at most `most` at a time. A batch that does not fit in memory is halved and tried
        again.
        """
        at = 0
        while at < len(items):
            batch = items[at : at + (most or self._batch_size)]
            try:
                answers = answer(batch)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise EngineError(f"out of memory with one request at a time ({_line(error)})") from error
                self._batch_size = len(batch) // 2
                torch.cuda.empty_cache()
                continue
            yield from ((item[0], result) for item, result in zip(batch, answers))
            at += len(batch)

    def _padded(self, rows: Sequence[list[int]]) -> Padded:
        width = max(len(row) for row in rows)
        ids_BT = self._tensor([[self._pad_id] * (width - len(row)) + row for row in rows])
        mask_BT = self._tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids_BT, "attention_mask": mask_BT}

    def _tensor(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._model.device)


def open_engine(spec: EngineSpec, model: ModelSpec, *, protocol: str = "robust") -> HfEngine:
    """Load a checkpoint with transformers, or its shape with random weights; remote code is never run."""
    from transformers import AutoTokenizer

    if spec.num_threads is not None:
        torch.set_num_threads(spec.num_threads)
    where, revision = _where(model)
    fingerprint = model_fingerprint(model, Path(where) if model.weights != "random" else None)
    if model.weights != "random":
        check_shape(model, Path(where))
    with one_line(where):
        loaded = _load(model, where, revision)
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
        check_vocabulary(loaded, tokenizer, where)
        size = spec.max_batch_size or BATCH_SIZE
        chat = HfTokenizer(tokenizer, system=model.system, thinking=model.thinking)
        return HfEngine(loaded, chat, batch_size=size, weights=fingerprint)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """ModelError where the tokenizer has ids that the embedding has no rows for."""
    num_rows, num_ids = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values()) + 1
    if num_ids > num_rows:
        raise ModelError(
            f"{where}: the tokenizer has {num_ids} ids, the embedding only {num_rows} rows "
            "(vocab_size in config.json); use the tokenizer that belongs to these weights"
        )


def _where(model: ModelSpec) -> tuple[str, str | None]:
    """(a directory, None), or (id, revision) of the hub for the shape of random weights, which needs no weight file."""
    if model.path is not None:
        refuse_adapter(Path(model.path), "hf")
        return str(local_dir(model.path)), None
    if model.hub == "modelscope":
        raise ModelError("engine=hf reads the Hugging Face hub or model.path=DIR; for ModelScope use engine=native")
    if model.hub_id is None:
        raise ModelError(f"model={model.name}: engine=hf needs model.path=DIR or model.hub_id=ORGANISATION/NAME")
    if model.weights == "random":
        return model.hub_id, model.revision
    return str(checkpoint_dir(replace(model, asset=None))), None


def _load(model: ModelSpec, where: str, revision: str | None) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    device = _device(model.device)
    options: dict[str, object] = {"dtype": _dtype(model.dtype, device)}
    if (attention := ATTENTION[model.attention]) is not None:
        options["attn_implementation"] = attention
    if model.weights == "random":
        torch.manual_seed(model.seed)
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, **options).to(device)
    quantization = _quantization(model.quant)
    if quantization is not None:
        options["quantization_config"] = quantization
    loaded = AutoModelForCausalLM.from_pretrained(
        where, revision=revision, trust_remote_code=False, device_map=device, **options
    )
    for layer in loaded.modules():
        allow_fused(layer, loaded.dtype)
    return loaded


def _quantization(quant: str) -> BitsAndBytesConfig | None:
    from transformers import BitsAndBytesConfig

    arguments = quant_format(quant).transformers  # a stored format says so in its own config
    return BitsAndBytesConfig(**arguments) if arguments else None


def _device(name: str) -> str:
    if "+" in name:
        raise EngineError(f"model.device={name}: engine=hf takes one device; only engine=native spreads a model")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError(f"model.device={name}: this machine shows no CUDA device; use model.device=cpu")
    return name


def _dtype(name: str, device: str) -> torch.dtype | str:
    if name != "auto":
        return DTYPES[name]
    if device != "cpu":
        return "auto"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if has_bf16() else torch.float32


@contextmanager
def one_line(where: str) -> Iterator[None]:
    """The first line of whatever a damaged or hostile checkpoint makes transformers raise."""
    try:
        yield
    except QwenEvalError:
        raise
    except Exception as error:
        raise ModelError(f"{where}: transformers cannot load it: {_line(error)}") from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
