"""A deterministic engine without a model, for tests of tasks, loops and stores: answers are hashes of the prompt."""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

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
    Prompt,
    Rendered,
    Request,
    Score,
    TokenLogprobs,
)
from qwen_eval.engines.kinds import MODEL_OPTIONS, EngineKind

IM_START, IM_END = 256, 257
MARKS = {"<|im_start|>": IM_START, "<|im_end|>": IM_END}


class ByteTokenizer:
    """Token ids are UTF-8 bytes, ChatML's two marks are 256 and 257: reversible, and obvious in a test."""

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        if parse_special:
            for mark, token_id in MARKS.items():
                if mark in text:
                    left, _, right = text.partition(mark)
                    return [*self.encode(left, parse_special=True), token_id, *self.encode(right, parse_special=True)]
        return list(text.encode("utf-8", "surrogatepass"))

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def decode(self, ids: Sequence[int]) -> str:
        names = {token_id: mark for mark, token_id in MARKS.items()}
        data = b"".join(names[i].encode() if i in names else bytes([i]) for i in ids)
        return data.decode("utf-8", "replace")

    def render_text(self, prompt: Prompt) -> str:
        return self.decode(self.render(prompt))

    def render(self, prompt: Prompt) -> list[int]:
        if prompt.ids is not None:
            return list(prompt.ids)
        if prompt.text is not None:
            return self.encode(prompt.text, parse_special=prompt.parse_special)
        ids: list[int] = []
        for message in prompt.messages:
            ids += [IM_START, *self.encode(f"{message.role}\n{message.content}"), IM_END, *self.encode("\n")]
        return [*ids, IM_START, *self.encode(f"assistant\n{prompt.prefill}")]


class FakeEngine:
    """Answers from `reply(request)` (a text or a whole answer), or from a hash of the prompt's ids where it is None.

    A text reply is the completion of a `Generate` and the winning choice of a `Choose`. `calls` holds every request
    in the order it was answered. Request number `fail_at` (from 0) raises EngineError. `delay_s` is slept per request.
    """

    def __init__(
        self,
        reply: Callable[[Request], str | Answer | None] | str | None = None,
        *,
        fail_at: int | None = None,
        delay_s: float = 0.0,
    ) -> None:
        self.tokenizer = ByteTokenizer()
        self.calls: list[Request] = []
        self.is_closed = False
        self._reply = (lambda _: reply) if isinstance(reply, str) else reply
        self._fail_at = fail_at
        self._delay_s = delay_s

    @property
    def info(self) -> Mapping[str, JSON]:
        return {"engine": "fake", "weights": "fake"}

    def render(self, prompt: Prompt) -> Rendered:
        ids = tuple(self.tokenizer.render(prompt))
        return Rendered(text=self.tokenizer.decode(ids), ids=ids)

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        for index, request in enumerate(requests):
            if len(self.calls) == self._fail_at:
                raise EngineError(f"the fake engine fails at request {self._fail_at}, as it was told to")
            if self._delay_s:  # a sleep of nothing hands the processor to another process
                time.sleep(self._delay_s)
            self.calls.append(request)
            yield index, self._answer(request)

    def close(self) -> None:
        self.is_closed = True

    def _answer(self, request: Request) -> Answer:
        reply = self._reply(request) if self._reply else None
        if reply is not None and not isinstance(reply, str):
            return reply
        ids = self.tokenizer.render(request.prompt)
        if isinstance(request, Choose):
            return self._choose(request, ids, reply)
        if isinstance(request, Score):
            scored = tuple(ids[request.num_context :])
            logprobs = tuple(_f32(-8 * _fraction(ids[: request.num_context + i], "score")) for i in range(len(scored)))
            return TokenLogprobs(token_ids=scored, logprobs=logprobs, num_greedy=sum(lp > -1 for lp in logprobs))
        return Completions(completions=tuple(self._complete(request, ids, reply, draw) for draw in range(request.n)))

    def _choose(self, request: Choose, ids: list[int], reply: str | None) -> ChoiceLogprobs:
        ids = list(request.kept(tuple(ids)))
        num_tokens = tuple(len(self.tokenizer.encode(choice)) for choice in request.choices)
        logits = tuple(4 * _fraction(ids, choice) + 4 * (choice == reply) for choice in request.choices)
        logsumexp = math.log(sum(math.exp(logit) for logit in logits)) + 0.5
        logprobs = tuple(logit - logsumexp for logit in logits)
        if set(num_tokens) != {1}:
            return ChoiceLogprobs(logprobs=logprobs, num_tokens=num_tokens)
        return ChoiceLogprobs(logprobs=logprobs, num_tokens=num_tokens, logits=logits, logsumexp=logsumexp)

    def _complete(self, request: Generate, ids: list[int], reply: str | None, draw: int) -> Completion:
        seed = "" if request.sampling.is_greedy else f"{request.sampling.seed}/{draw}"
        fraction = _fraction(ids, f"generate{seed}")
        text = reply if reply is not None else f"The answer is {'ABCD'[int(4 * fraction)]}, or {int(100 * fraction)}."
        tokens = self.tokenizer.encode(text)
        reason: FinishReason = "length" if len(tokens) > request.max_new_tokens else "eos"
        tokens = tokens[: request.max_new_tokens]
        text = self.tokenizer.decode(tokens)
        ends = [at for at in (text.find(stop) for stop in request.stop) if at >= 0]
        if ends:
            text, reason = text[: min(ends)], "stop"
        return Completion(text=text, finish_reason=reason, num_tokens=len(tokens), token_ids=tuple(tokens))


def _fraction(ids: Sequence[int], salt: str) -> float:
    """A number in [0, 1) that depends only on the tokens."""
    data = salt.encode("utf-8", "surrogatepass") + b"\0" + b"".join(i.to_bytes(4, "little") for i in ids)
    return int.from_bytes(hashlib.sha256(data).digest()[:6], "little") / (1 << 48)


def _f32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def open_engine(spec: EngineSpec, model: ModelSpec, *, protocol: str = "robust") -> FakeEngine:
    return FakeEngine(spec.fake_reply or None, delay_s=spec.fake_delay_s)


def identity(spec: EngineSpec, model: ModelSpec) -> str:
    return "fake"


ENGINE = EngineKind(
    name="fake",
    opens="qwen_eval.engines.fake:open_engine",
    honours=MODEL_OPTIONS,  # has no model: nothing to dishonour
    tuned_by=("fake_reply", "fake_delay_s", "workers", "ray"),
    decides=("fake_reply",),
    model_at="nowhere",
    identity="qwen_eval.engines.fake:identity",
)
