"""An OpenAI-compatible HTTP API: a server of vLLM, SGLang, llama.cpp or `transformers serve`, or a hosted model.

Texts from both endpoints; choices where the server gives log-probabilities; no scoring, for which token ids are needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import cached_property
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
    Message,
    Prompt,
    Rendered,
    Request,
    Score,
)
from qwen_eval.engines.endpoint import endpoint_identity
from qwen_eval.models.segments import Chat
from qwen_eval.models.template import THINKING_SWITCH, with_system

OPENAI_URL = "https://api.openai.com/v1"
MAX_RETRIES = 5  # of connection errors, 408, 409, 429 and 5xx, with growing pauses
TIMEOUT_S = 600.0
TOP_LOGPROBS = 20  # the most a server gives


class OpenAiEngine:
    """Asks `model` at `client` (an `openai.OpenAI`), `concurrency` requests in flight."""

    def __init__(
        self, client: Any, model: str, *, concurrency: int = 16, system: str | None = None, thinking: str = "auto"
    ) -> None:
        self._client, self._api_model, self._concurrency = client, model, concurrency
        self._system, self._thinking = system, thinking

    tokenizer = None  # the server keeps it to itself

    @cached_property
    def _identity(self) -> str:
        return endpoint_identity(str(self._client.base_url), self._api_model)

    @property
    def info(self) -> Mapping[str, JSON]:
        url = str(self._client.base_url)
        return {
            "engine": "openai",
            "base_url": url,
            "api_model": self._api_model,
            "weights": self._identity,
            "not_applied": ["max_prompt_tokens"],  # only the server can count tokens
            "thinks": {"on": True, "off": False}.get(self._thinking),  # None: as the server's template does
        }

    def render(self, prompt: Prompt) -> Rendered:
        """What is sent; the server's own rendering and token ids are not known."""
        if prompt.ids is not None:
            raise EngineError("engine=openai takes text or messages, not token ids; use engine=native, hf or vllm")
        if prompt.text is not None:
            return Rendered(text=prompt.text, ids=())
        messages = with_system(prompt.messages, self._system)
        parts = [f"[{message.role}]\n{message.content}" for message in messages]
        return Rendered(text="\n".join([*parts, f"[assistant]\n{prompt.prefill}"]), ids=())

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            futures: dict[Future[Answer], int] = {pool.submit(self._answer, r): i for i, r in enumerate(requests)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # after an error nothing more is asked: requests cost money
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        self._client.close()

    def _answer(self, request: Request) -> Answer:
        import openai

        try:
            if isinstance(request, Generate):
                return self._generate(request)
            if isinstance(request, Choose):
                return self._choose(request)
        except openai.APIConnectionError as error:
            raise EngineError(f"{self._client.base_url}: no server answers ({_line(error)})") from error
        except openai.OpenAIError as error:
            raise EngineError(f"{self._client.base_url}: {_line(error)}") from error
        assert isinstance(request, Score), type(request)
        raise EngineError("engine=openai cannot score text: an API gives no token ids; use engine=native, hf or vllm")

    # --- texts -------------------------------------------------------------------------------------------------------

    def _generate(self, request: Generate) -> Answer:
        sampling = request.sampling
        options: dict[str, Any] = {"max_tokens": request.max_new_tokens, "temperature": sampling.temperature}
        options |= {"top_p": sampling.top_p, "n": request.n}
        if request.stop:
            options["stop"] = list(request.stop)
        if not sampling.is_greedy:
            options["seed"] = sampling.seed
        extra: dict[str, float] = {"top_k": sampling.top_k} if sampling.top_k else {}
        if sampling.repetition_penalty != 1.0:
            extra["repetition_penalty"] = sampling.repetition_penalty
        if extra:
            options["extra_body"] = extra  # no part of OpenAI's own API: a server that lacks them says so
        return self._completions(self._ask(request.prompt, options), request)

    def _completions(self, reply: Any, request: Generate) -> Answer:
        num_tokens = reply.usage.completion_tokens // max(1, len(reply.choices)) if reply.usage else 0
        if len(reply.choices) < request.n:
            raise EngineError(f"the server sent {len(reply.choices)} of {request.n} completions; use another server")
        return Completions(completions=tuple(_completion(choice, request, num_tokens) for choice in reply.choices))

    def _ask(self, prompt: Prompt, options: Mapping[str, Any]) -> Any:
        if prompt.messages:
            messages = api_messages(with_system(prompt.messages, self._system))
            if self._thinking != "auto":
                options = with_body(options, chat_template_kwargs={THINKING_SWITCH: self._thinking == "on"})
            if prompt.tools:
                options = {**options, "tools": [json.loads(tool) for tool in prompt.tools]}
            if prompt.prefill:  # vLLM's and SGLang's words for "continue this message"
                messages.append({"role": "assistant", "content": prompt.prefill})
                options = with_body(options, add_generation_prompt=False, continue_final_message=True)
            return self._client.chat.completions.create(model=self._api_model, messages=messages, **options)
        text = self.render(prompt).text
        return self._client.completions.create(model=self._api_model, prompt=text, **options)

    # --- choices -----------------------------------------------------------------------------------------------------

    def _choose(self, request: Choose) -> Answer:
        """The first token's log-probabilities: choices must be single tokens among the likeliest the server names."""
        chat = bool(request.prompt.messages)
        options = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if chat else {"logprobs": TOP_LOGPROBS}
        reply = self._ask(request.prompt, {"max_tokens": 1, "temperature": 0.0, **options})
        found = _top_logprobs(reply.choices[0], is_chat=chat)
        if not found:
            raise EngineError("the server gives no log-probabilities; ask for text with task.mode=chat")
        missing = [choice for choice in request.choices if choice not in found]
        if missing:
            raise EngineError(
                f"{missing[0]!r} is not among the {len(found)} likeliest tokens that the server names; "
                "ask for text with task.mode=chat, or use engine=native, hf or vllm"
            )
        return ChoiceLogprobs(
            logprobs=tuple(found[choice] for choice in request.choices), num_tokens=(1,) * len(request.choices)
        )


def api_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form, where a call has an id and what it gave back names it; results come in order."""
    rows = Chat.of(messages).with_argument_text().rows
    open_ids: list[str] = []
    for i, row in enumerate(rows):
        if row["role"] == "tool" and open_ids:
            row["tool_call_id"] = open_ids.pop(0)
        for j, call in enumerate(row.get("tool_calls", ())):
            call["id"] = f"call_{i}_{j}"
            open_ids.append(call["id"])
    return rows


def with_body(options: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """Words that are no part of OpenAI's own API; vLLM's and SGLang's servers know them."""
    return {**options, "extra_body": {**options.get("extra_body", {}), **fields}}


def _completion(choice: Any, request: Generate, num_tokens: int) -> Completion:
    text = choice.text if hasattr(choice, "text") else choice.message.content
    text = text or ""
    reasons: dict[str, FinishReason] = {"length": "length"}
    reason = reasons.get(choice.finish_reason, "eos")
    ends = [at for at in (text.find(stop) for stop in request.stop) if at >= 0]
    if ends:  # some servers leave the stop string in
        text, reason = text[: min(ends)], "stop"
    return Completion(text=text, finish_reason=reason, num_tokens=num_tokens)


def _top_logprobs(choice: Any, *, is_chat: bool) -> dict[str, float]:
    if choice.logprobs is None:
        return {}
    if is_chat:
        content = choice.logprobs.content or []
        return {item.token: item.logprob for item in content[0].top_logprobs} if content else {}
    tops = choice.logprobs.top_logprobs or []
    return dict(tops[0]) if tops else {}


def open_engine(spec: EngineSpec, model: ModelSpec, *, protocol: str = "robust") -> OpenAiEngine:
    """A client for `engine.base_url`; the key is read from OPENAI_API_KEY and never stored."""
    try:
        import openai
    except ImportError as error:
        raise EngineError("engine=openai needs the package openai: pip install 'qwen_eval[api]'") from error
    key = os.environ.get("OPENAI_API_KEY")
    if spec.base_url is None and key is None:
        raise EngineError("engine=openai: pass engine.base_url=http://HOST:PORT/v1, or set OPENAI_API_KEY")
    make: Callable[..., Any] = openai.OpenAI
    client = make(base_url=base_url(spec), api_key=key or "none", max_retries=MAX_RETRIES, timeout=TIMEOUT_S)
    name = api_model(spec, model)
    return OpenAiEngine(client, name, concurrency=spec.concurrency, system=model.system, thinking=model.thinking)


def identity(spec: EngineSpec, model: ModelSpec) -> str:
    """The endpoint, and what it says of the model asked for; EngineError when nobody answers."""
    return endpoint_identity(base_url(spec), api_model(spec, model))


def api_model(spec: EngineSpec, model: ModelSpec) -> str:
    """The name by which the server is asked for the model."""
    return spec.api_model or model.hub_id or model.name


def base_url(spec: EngineSpec) -> str:
    return spec.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
