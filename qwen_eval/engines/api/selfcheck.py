"""Whether a server's numbers can be believed, tried before the first sample: a few requests of one token each.

A known text is scored in two ways, which must agree; a server that finds every token equally likely is refused; its
count of a prompt's tokens is compared with ours where a tokenizer is at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qwen_eval.core import Choose, EngineError, Generate, Prompt, Rendered, Request, Score, Tokenizer
from qwen_eval.engines.api.faults import RequestFailed
from qwen_eval.engines.api.replies import Echo, Reply, text_of

KNOWN = "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is"
BEGUN = "one two three four"
TOLERANCE = 0.3  # nats: a 16-bit server that batches differently moves a log-probability by less


class Askable(Protocol):
    """What a check asks of the engine."""

    tokenizer: Tokenizer | None

    @property
    def may_echo(self) -> bool: ...

    def render(self, prompt: Prompt) -> Rendered: ...

    async def first_logprobs(
        self, request: Choose, *, max_tokens: int = 1, has_any: bool = True
    ) -> dict[str, float]: ...

    async def echo_if_any(self, text: str) -> Echo | None: ...

    async def generated(self, request: Generate) -> Reply: ...


class Check:
    """`has_echo`: the server gives the log-probabilities of a given text, and they are real. `repeats_prefill`: a reply
    begins with the message that it continues.
    """

    def __init__(self, engine: Askable) -> None:
        self._engine = engine
        self.has_echo = self.repeats_prefill = False
        self.warnings: list[str] = []

    async def run(self, examples: Sequence[Request]) -> None:
        """One example of each kind that will be asked. EngineError in one line where the server cannot be used."""
        try:
            for example in examples:
                if isinstance(example, Choose):
                    await self._choices(example)
                elif isinstance(example, Score):
                    await self._scores()
                else:
                    await self._texts(example)
        except RequestFailed as failed:
            raise EngineError(f"the check of the server failed: {failed}") from None

    async def _choices(self, example: Choose) -> None:
        is_chat = bool(example.prompt.messages)
        known = Choose(prompt=Prompt.user(KNOWN) if is_chat else Prompt.raw(KNOWN), choices=())
        first = await self._engine.first_logprobs(known, has_any=False)
        if not first:
            raise EngineError("the server gives no log-probabilities; ask for text with task.mode=chat")
        refuse_constant(first)
        again = await self._engine.first_logprobs(known, max_tokens=2)
        refuse_contradiction(first, again, "asked for one token and for two")
        if not is_chat and self._engine.may_echo:
            self.has_echo = await self._is_real_echo(first)

    async def _scores(self) -> None:
        known = Choose(prompt=Prompt.raw(KNOWN), choices=())
        first = await self._engine.first_logprobs(known, has_any=False) if self._engine.may_echo else {}
        if not first or not await self._is_real_echo(first):
            raise EngineError(
                "the server gives no log-probabilities of a given text (echo), or they are not its own; "
                "use engine=native, hf or vllm, or a server of vLLM or SGLang"
            )
        if self._engine.tokenizer is None:
            raise EngineError("given texts are scored as token ids: pass engine.tokenizer=DIR, the model's tokenizer")
        self.has_echo = True

    async def _is_real_echo(self, first: dict[str, float]) -> bool:
        """Whether the likeliest next token, put behind the known text, is echoed with the log-probability it had."""
        token = max(first, key=lambda text: first[text])
        echo = await self._engine.echo_if_any(KNOWN + token)
        if echo is None:
            return False
        value = _last_of_the_text(echo, len(KNOWN))
        return value is not None and abs(value - first[token]) <= TOLERANCE and not _is_constant(echo)

    async def _texts(self, example: Generate) -> None:
        if example.prompt.prefill:
            begun = Prompt.user("Count to nine.", prefill=BEGUN)
            reply = await self._engine.generated(Generate(prompt=begun, max_new_tokens=1))
            self.repeats_prefill = text_of(reply).startswith(BEGUN)
        if self._engine.tokenizer is not None:
            await self._template(example)

    async def _template(self, example: Generate) -> None:
        """A prompt of another length is another prompt: another template, system message or BOS."""
        asked = Generate(prompt=example.prompt, max_new_tokens=1)
        theirs = (await self._engine.generated(asked)).usage.prompt_tokens
        ours = len(self._engine.render(example.prompt).ids)
        if theirs and theirs != ours:
            self.warnings.append(
                f"the server's prompt has {theirs} tokens, by engine.tokenizer it has {ours}: "
                "another chat template, system message or beginning"
            )


def refuse_constant(found: dict[str, float]) -> None:
    if len(found) > 1 and max(found.values()) - min(found.values()) < 1e-6:
        raise EngineError(
            f"the server gives the same log-probability to {len(found)} tokens: no real ones; ask with task.mode=chat"
        )


def refuse_contradiction(first: dict[str, float], again: dict[str, float], how: str) -> None:
    """EngineError where the likeliest token differs in value between two ways to ask."""
    token = max(first, key=lambda text: first[text])
    if token not in again or abs(first[token] - again[token]) > TOLERANCE:
        raise EngineError(
            f"the server contradicts itself: the same text, {how}, gives {token!r} the log-probabilities "
            f"{first[token]:.3f} and {again.get(token, float('-inf')):.3f}; its numbers cannot be used"
        )


def _last_of_the_text(echo: Echo, at: int) -> float | None:
    """Of the token that begins `at`; where the server gives no offsets, of the last one before what it generated."""
    if echo.offsets:
        return next((value for value, offset in zip(echo.logprobs, echo.offsets) if offset == at), None)
    return echo.logprobs[-2] if len(echo.logprobs) > 1 else None


def _is_constant(echo: Echo) -> bool:
    values = {value for value in echo.logprobs if value is not None}
    return len(values) < 2
