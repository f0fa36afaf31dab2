"""An OpenAI-compatible HTTP API: a server of vLLM, SGLang, llama.cpp or `transformers serve`, or a hosted model.

Texts from both endpoints; choices where the server gives log-probabilities; scores of given text where it echoes them.
Every request ends: with an answer, or as one of `failures`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import (
    JSON,
    Answer,
    ChoiceLogprobs,
    Choose,
    EngineError,
    Generate,
    Message,
    Prompt,
    Rendered,
    Request,
    Tokenizer,
)
from qwen_eval.engines.api.account import Account, read_prices
from qwen_eval.engines.api.faults import Fault, RequestFailed
from qwen_eval.engines.api.loop import Crew, LoopThread
from qwen_eval.engines.api.replies import (
    Echo,
    Reply,
    choice_bounds,
    completions_of,
    read_echo,
    read_reply,
    scored,
    top_logprobs,
)
from qwen_eval.engines.api.selfcheck import Check
from qwen_eval.engines.api.servers import SERVERS, Server, api_key, base_url, required_key, server_of
from qwen_eval.engines.endpoint import endpoint_identity, public_url
from qwen_eval.models.segments import Chat
from qwen_eval.models.template import THINKING_SWITCH, with_system
from qwen_eval.models.tokenizer import load_tokenizer

NEEDS = "engine=openai needs the package httpx2: pip install 'qwen_eval[api]'"
HOPELESS = 8  # failures one after the other, and nothing answered between: the rest would fare no better
FEW_LOGPROBS = 5  # what OpenAI's own completions name at most
Kind: TypeAlias = tuple[type, bool]  # of a request, and whether it continues a message


class OpenAiEngine:
    """Asks `model` at `client` (an `EndpointClient`), with as many requests in flight as its limits say."""

    def __init__(
        self,
        client: Any,
        thread: Any,
        model: str,
        *,
        concurrency: int = 16,
        server: Server = SERVERS["openai"],
        key: str | None = None,
        system: str | None = None,
        thinking: str = "auto",
        tokenizer: Tokenizer | None = None,
        account: Account | None = None,
    ) -> None:
        self._client, self._thread, self._api_model, self._concurrency = client, thread, model, concurrency
        self._server, self._key, self._system, self._thinking = server, key, system, thinking
        self._account, self._checked, self._warnings = account or Account(), set[Kind](), list[str]()
        self._num_top = server.top_logprobs
        self._has_echo = self._repeats_prefill = False  # until it has been tried
        self.tokenizer = tokenizer
        self.failures: dict[int, str] = {}

    @cached_property
    def _identity(self) -> str:
        return endpoint_identity(self._client.url, self._api_model, self._key)

    @property
    def may_echo(self) -> bool:
        """Whether it is worth trying."""
        return self._server.has_completions and self._server.has_echo is not False

    @property
    def info(self) -> Mapping[str, JSON]:
        return {
            "engine": "openai",
            "base_url": public_url(self._client.url),
            "api_model": self._api_model,
            "weights": self._identity,
            "not_applied": [] if self.tokenizer else ["max_prompt_tokens"],  # only the server can count tokens
            "thinks": {"on": True, "off": False}.get(self._thinking),  # None: as the server's template does
            "usage": self._account.facts | {"num_retries": self._client.num_retries},
            "warnings": list(self._warnings),
        }

    def render(self, prompt: Prompt) -> Rendered:
        """What is sent. Without `engine.tokenizer` the server's own rendering and token ids are not known."""
        if self.tokenizer is not None:
            ids = tuple(self.tokenizer.render(prompt))
            return Rendered(text=self.tokenizer.decode(ids), ids=ids)
        if prompt.ids is not None:
            raise EngineError("engine=openai takes text or messages; for token ids pass engine.tokenizer=DIR")
        if prompt.text is not None:
            return Rendered(text=prompt.text, ids=())
        messages = with_system(prompt.messages, self._system)
        parts = [f"[{message.role}]\n{message.content}" for message in messages]
        return Rendered(text="\n".join([*parts, f"[assistant]\n{prompt.prefill}"]), ids=())

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Answers as they come; what has none stands in `failures`. EngineError where going on makes no sense."""
        self.failures = {}
        self._check(requests)
        in_a_row = 0
        crew: Crew[Request, Answer] = Crew(self._thread, self._answer, self._concurrency)
        for index, answer in crew.answers(requests):
            if not isinstance(answer, RequestFailed):
                in_a_row = 0
                yield index, answer
                continue
            self.failures[index], in_a_row = str(answer), in_a_row + 1
            if in_a_row >= min(HOPELESS, len(requests)):
                raise EngineError(
                    f"{self._client.public_url}: {answer}; {in_a_row} requests failed one after the other"
                )

    def close(self) -> None:
        if self._thread.is_closed:
            return
        self._thread.call(self._client.close())
        self._thread.close()

    def _check(self, requests: Sequence[Request]) -> None:
        """Once for each kind of request, before the first of it: whether the server can be believed."""
        examples = {kind_of(request): request for request in reversed(requests)}
        kinds = examples.keys() - self._checked
        if kinds:
            check = Check(self)
            self._thread.call(check.run([examples[kind] for kind in kinds]))
            self._has_echo = self._has_echo or check.has_echo
            self._repeats_prefill = self._repeats_prefill or check.repeats_prefill
            self._warnings += [warning for warning in check.warnings if warning not in self._warnings]
        self._checked |= kinds

    async def _answer(self, request: Request) -> Answer:
        if isinstance(request, Generate):
            return completions_of(await self.generated(request), request, repeated=self._repeated(request))
        if isinstance(request, Choose):
            return await self._choose(request)
        ids = self.render(request.prompt).ids
        return scored(await self.echo(list(ids)), ids, request.num_context)

    # --- texts -------------------------------------------------------------------------------------------------------

    async def generated(self, request: Generate) -> Reply:
        sampling = request.sampling
        options: dict[str, JSON] = {"max_tokens": request.max_new_tokens, "temperature": sampling.temperature}
        options |= {"top_p": sampling.top_p, "n": request.n}
        if request.stop:
            options["stop"] = list(request.stop)
        if not sampling.is_greedy:
            options["seed"] = sampling.seed
        if sampling.top_k:  # this and the next are no part of OpenAI's own API: a server that lacks them says so
            options["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1.0:
            options["repetition_penalty"] = sampling.repetition_penalty

        def read(found: JSON) -> Reply:
            reply = read_reply(found, request.n)
            completions_of(reply, request, repeated=self._repeated(request))  # while it can be asked again
            return reply

        reply: Reply = await self._ask(request.prompt, options, read)
        return reply

    def _repeated(self, request: Generate) -> str:
        return request.prompt.prefill if self._repeats_prefill else ""

    async def _ask(self, prompt: Prompt, options: Mapping[str, JSON], read: Any, *, ids: Sequence[int] = ()) -> Any:
        """`ids`: what is sent for raw text instead of it."""
        if prompt.messages:
            return await self._post("/chat/completions", {**self._chat(prompt), **options}, read)
        if not self._server.has_completions:
            raise EngineError("this server takes no raw text; ask in chat form with task.mode=chat")
        return await self._post("/completions", {"prompt": list(ids) or self.render(prompt).text, **options}, read)

    async def _post(self, path: str, body: Mapping[str, JSON], read: Any) -> Any:
        def counted(found: JSON) -> Any:
            self._account.add(read_reply(found).usage)
            return read(found)

        return await self._client.ask(path, {"model": self._api_model, **body}, counted)

    def _chat(self, prompt: Prompt) -> dict[str, Any]:
        body: dict[str, Any] = {"messages": api_messages(with_system(prompt.messages, self._system))}
        if self._thinking != "auto":
            body |= self._server.thinking_body(THINKING_SWITCH, self._thinking == "on")
        if prompt.tools:
            body["tools"] = [json.loads(tool) for tool in prompt.tools]
        if prompt.prefill:
            begun = {"role": "assistant", "content": prompt.prefill, **self._server.prefill_message}
            body["messages"].append(begun)
            body |= self._server.prefill_body
        return body

    # --- choices and scores ------------------------------------------------------------------------------------------

    async def _choose(self, request: Choose) -> Answer:
        """The first token's log-probabilities, exact for the likeliest tokens. What the server does not name is scored
        by an echo, and where there is none has a bound.
        """
        found = await self.first_logprobs(request)
        values, bounded = choice_bounds(found, request)
        nums = [1] * len(values)
        if bounded and self._has_echo and not request.prompt.messages:
            scores = [await self._continued(request, request.choices[index]) for index in bounded]
            values = tuple(scores[bounded.index(i)][0] if i in bounded else value for i, value in enumerate(values))
            nums = [scores[bounded.index(i)][1] if i in bounded else 1 for i in range(len(values))]
            bounded = ()
        return ChoiceLogprobs(logprobs=values, num_tokens=tuple(nums), bounded=bounded)

    async def first_logprobs(self, request: Choose, *, max_tokens: int = 1, has_any: bool = True) -> dict[str, float]:
        """Of the likeliest first tokens. `has_any`: the server has given some, so that a reply without is a fault."""
        is_chat = bool(request.prompt.messages)
        wanted = {"logprobs": True, "top_logprobs": self._num_top} if is_chat else {"logprobs": self._num_top}
        options = {"max_tokens": max_tokens, "temperature": 0.0, **wanted}

        def read(reply: JSON) -> dict[str, float]:
            named = top_logprobs(read_reply(reply).choices[0])
            if has_any and not named:
                raise Fault("a reply without log-probabilities")
            return named

        try:
            found: dict[str, float] = await self._ask(request.prompt, options, read, ids=self._kept(request))
        except RequestFailed as refused:
            if "logprobs" not in str(refused) or self._num_top <= FEW_LOGPROBS:
                raise
            self._num_top = FEW_LOGPROBS
            return await self.first_logprobs(request, max_tokens=max_tokens, has_any=has_any)
        return found

    def _kept(self, request: Choose) -> tuple[int, ...]:
        return request.kept(self.render(request.prompt).ids) if self.tokenizer and not request.prompt.messages else ()

    async def _continued(self, request: Choose, choice: str) -> tuple[float, int]:
        """(log-probability of `choice` after the prompt, its number of tokens)."""
        ids = self._kept(request)
        if ids and self.tokenizer is not None:
            tail = self.tokenizer.encode(choice)
            echo = await self.echo([*ids, *tail])
            answer = scored(echo, [*ids, *tail], len(ids))
            return sum(answer.logprobs), len(tail)
        text = self.render(request.prompt).text
        return tail_logprob(await self.echo(text + choice), len(text), len(text + choice))

    async def echo(self, text: str | list[int]) -> Echo:
        """The log-probabilities of a given text. One token is generated: some servers refuse to generate none."""
        found: Echo = await self._post("/completions", echo_body(text), _echo)
        return found

    async def echo_if_any(self, text: str) -> Echo | None:
        """None where the server refuses, or replies without one."""

        def read(reply: JSON) -> Echo | None:
            with suppress(Fault):
                return _echo(reply)
            return None

        try:
            found: Echo | None = await self._post("/completions", echo_body(text), read)
        except RequestFailed:
            return None
        return found


def kind_of(request: Request) -> Kind:
    return type(request), bool(request.prompt.prefill)


def echo_body(text: str | list[int]) -> dict[str, JSON]:
    return {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0.0}


def _echo(reply: JSON) -> Echo:
    return read_echo(read_reply(reply).choices[0])


def tail_logprob(echo: Echo, start: int, end: int) -> tuple[float, int]:
    """Of the tokens between two characters; RequestFailed where no token begins at `start`."""
    inside = [value for value, at in zip(echo.logprobs, echo.offsets) if start <= at < end]
    if start not in echo.offsets or None in inside:
        raise RequestFailed(
            "no token ends where the prompt ends, so that a choice cannot be scored; pass engine.tokenizer=DIR"
        )
    return sum(value for value in inside if value is not None), len(inside)


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


def open_engine(spec: EngineSpec, model: ModelSpec, *, protocol: str = "robust") -> OpenAiEngine:
    """A client for `engine.base_url`; the key is read from the environment and never stored."""
    try:
        from qwen_eval.engines.api.client import EndpointClient, Limits
    except ImportError as error:
        raise EngineError(NEEDS) from error
    url, key, name = base_url(spec), required_key(spec), api_model(spec, model)
    limits = Limits(
        concurrency=spec.concurrency, timeout_s=spec.timeout_s, retries=spec.retries, retry_share=spec.retry_share
    )
    prices = read_prices(spec.prices, name) if spec.prices else None
    return OpenAiEngine(
        EndpointClient(url, key, limits),
        LoopThread(),
        name,
        concurrency=spec.concurrency,
        server=server_of(spec),
        key=key,
        system=model.system,
        thinking=model.thinking,
        tokenizer=_tokenizer(spec, model),
        account=Account(prices=prices),
    )


def _tokenizer(spec: EngineSpec, model: ModelSpec) -> Tokenizer | None:
    if spec.tokenizer is None:
        return None
    return load_tokenizer(Path(spec.tokenizer), system=model.system, thinking=model.thinking)


def api_model(spec: EngineSpec, model: ModelSpec) -> str:
    """The name by which the server is asked for the model."""
    return spec.api_model or model.hub_id or model.name


def identity_of(spec: EngineSpec, model: ModelSpec) -> str:
    return endpoint_identity(base_url(spec), api_model(spec, model), api_key(spec))
