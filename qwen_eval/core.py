"""The shared types of the project: prompts, requests, answers, samples, grades, records, metrics, engines and tasks.

Everything here is plain data: no torch, no Hydra, no import from this package. A request's type fixes the type of its
answer: `Choose -> ChoiceLogprobs`, `Score -> TokenLogprobs`, `Generate -> Completions`.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"
Protocol_: TypeAlias = Literal["robust", "upstream"]
MetricKind: TypeAlias = Literal["share", "ppl", "mean", "count"]
FinishReason: TypeAlias = Literal["stop", "eos", "length", "non-finite", "filtered"]


class QwenEvalError(Exception):
    """A mistake of the user or a problem of the machine, in one line: the value, the rule, the way out. Exit code 2."""


class ConfigError(QwenEvalError):
    """A key, value or combination of options that cannot work."""


class DataError(QwenEvalError):
    """A benchmark file that is missing, damaged or not in its official format."""


class ModelError(QwenEvalError):
    """A checkpoint that is missing, damaged or not what its config says."""


class EngineError(QwenEvalError):
    """An engine that is not available, does not support a request, or failed permanently."""


class StoreError(QwenEvalError):
    """A run directory that cannot be written, is damaged, or holds another run."""


# --- requests -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A function that the model calls. `arguments` is the JSON text it wrote."""

    name: str
    arguments: str = "{}"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat. `tool_calls` go with the assistant; a message of the role "tool" is what a call gave back."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Exactly one of: raw `text`, a chat (`messages`), or exact token `ids`.

    Never a pre-rendered chat string: ChatML is tokenised piecewise, so that text that looks like a special token stays
    text. `prefill` is the beginning of the assistant's reply (chat only). `tools` are the JSON schemas, as text, of the
    functions that a chat offers; the checkpoint's template says how they are shown. `parse_special` lets surface forms
    of special tokens in raw text become special tokens, as Qwen v1's default `tokenizer(text)` does.
    """

    text: str | None = None
    messages: tuple[Message, ...] = ()
    ids: tuple[int, ...] | None = None
    prefill: str = ""
    parse_special: bool = False
    tools: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = (self.text is not None) + bool(self.messages) + (self.ids is not None)
        assert given == 1, f"a prompt is text, messages or ids, exactly one of them; {given} given"
        assert self.messages or not (self.prefill or self.tools), "prefill and tools go with messages"

    @property
    def has_tools(self) -> bool:
        return bool(self.tools) or any(message.role == "tool" or message.tool_calls for message in self.messages)

    @staticmethod
    def raw(text: str, *, parse_special: bool = False) -> Prompt:
        return Prompt(text=text, parse_special=parse_special)

    @staticmethod
    def user(content: str, *, system: str | None = None, prefill: str = "") -> Prompt:
        """One user turn. Without `system` the checkpoint's own default system message stands, where it has one."""
        asked = Message(role="user", content=content)
        messages = (asked,) if system is None else (Message(role="system", content=system), asked)
        return Prompt(messages=messages, prefill=prefill)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Order of the original: repetition penalty, temperature, top-k, top-p.

    `temperature=0` is greedy. `seed` belongs to the request: the same request gives the same text in any batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, kw_only=True)
class Choose:
    """Which of `choices` continues the prompt best. Each choice is tokenised by itself and appended.

    `max_prompt_tokens`: keep only the last so many tokens of the prompt (the official MMLU script keeps 2047).
    """

    prompt: Prompt
    choices: tuple[str, ...]
    max_prompt_tokens: int | None = None

    def kept(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The token ids of the rendered prompt that the model reads."""
        return ids if self.max_prompt_tokens is None else ids[-self.max_prompt_tokens :]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probability of every token of a text given all before it.

    `num_context` leading tokens are attended to but not scored. The very first token has nothing before it: it is
    scored only when the prompt begins with a token the protocol put there (BOS / endoftext), so at least 1.

    `num_fed`: how many tokens the protocol feeds the model, which decides dynamic NTK: all of them (None), or one less
    where it leaves out the last, which is only a target.

    `keep_hidden`: a directory for the final hidden states of the scored positions. It changes no answer, so it is no
    part of what a request is known by.
    """

    prompt: Prompt
    num_context: int = 1
    num_fed: int | None = None
    keep_hidden: str | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue the prompt. The stop string itself is not part of the returned text.

    `stop` strings are matched across token boundaries. The end-of-text token and, in chats, `<|im_end|>` always end a
    completion. `n` completions are drawn (with different derived seeds).
    """

    prompt: Prompt
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1


Request: TypeAlias = Choose | Score | Generate


# --- answers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ChoiceLogprobs:
    """Per choice: the sum of log-probabilities (full vocabulary, fp32) and its number of tokens.

    `logits`: for single-token choices the raw fp32 logits, else (). `logsumexp` is that of the whole row (single-token
    choices), so `logprobs[i] == logits[i] - logsumexp`. `bounded` are the indexes of choices that are at most this
    likely: an API names only the likeliest tokens. `dtype` is that of the model's own logits where `logits` are
    rounded to it, as the official scripts see them.
    """

    logprobs: tuple[float, ...]
    num_tokens: tuple[int, ...]
    logits: tuple[float, ...] = ()
    logsumexp: float | None = None
    bounded: tuple[int, ...] = ()
    dtype: str = "float32"

    @property
    def best(self) -> int:
        """Index of the most likely choice; the earliest of equals, as in the original scripts."""
        return max(range(len(self.logprobs)), key=lambda i: (self.logprobs[i], i not in self.bounded, -i))

    @property
    def is_decided(self) -> bool:
        """False where the best one is known by a bound only, so that any of the bounded ones may be the best."""
        return self.best not in self.bounded


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """`logprobs[i]` is the log-probability (nats, fp32) of `token_ids[i]` given all before it; scored ones only."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    num_greedy: int = 0  # how many scored tokens were the most likely one


@dataclass(frozen=True, kw_only=True)
class Completion:
    """`text` is cut before the stop string; `token_ids` are all generated tokens, including what ended it.

    `finish_reason` "non-finite": the logits held NaN or an infinity, so the sample failed. "filtered": an API held the
    text back or refused to answer.
    """

    text: str
    finish_reason: FinishReason
    num_tokens: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completions:
    completions: tuple[Completion, ...]

    @property
    def text(self) -> str:
        return self.completions[0].text


def ids_sha256(ids: Sequence[int]) -> str:
    """sha256 of token ids as little-endian int32: what records and golden files name a tokenised prompt by."""
    return hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()


Answer: TypeAlias = ChoiceLogprobs | TokenLogprobs | Completions


def is_finite(answer: Answer) -> bool:
    """False where NaN or an infinity is among the numbers, or ended a text: such an answer is not usable."""
    if isinstance(answer, Completions):
        return all(item.finish_reason != "non-finite" for item in answer.completions)
    if isinstance(answer, TokenLogprobs):
        return all(map(math.isfinite, answer.logprobs))
    return all(map(math.isfinite, (*answer.logprobs, *answer.logits, answer.logsumexp or 0.0)))


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A request and its answer."""

    request: Request
    answer: Answer


# --- samples, grades, metrics ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One item of a benchmark. `id` is unique and stable within the task; `group` is its subject (or document).

    `cluster` names what is not independent of it (a document, a base problem); items of one cluster share one draw in
    every interval. `data` holds the official row, `target` the gold answer as plain data.
    """

    id: str
    group: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)  # its task has read it and knows its types
    target: Any = None
    cluster: str = ""


GRADING_TIMEOUT = "grading_timeout"  # a flag: reading the reply was stopped, and it counts as wrong


@dataclass(frozen=True, kw_only=True)
class Grade:
    """The score of one sample (1.0 / 0.0 for right / wrong) and the extracted answer.

    `extracted` is our extraction and `score` the score with it; `extracted_upstream` and `score_upstream` are those of
    the official script. Both are recorded under either protocol, which chooses when metrics are made (`Record.under`).
    `values` holds further numbers that
    `summarise` needs (sums of log-probabilities, counts, Rouge-L ...). `flags`: "truncated", "empty", "looping",
    "no_answer", "overlong" (only its end was read), "grading_timeout", "cut_prompt", "filtered" (by an API).
    """

    score: float | None
    extracted: JSON = None
    extracted_upstream: JSON = None
    score_upstream: float | None = None
    values: Mapping[str, Any] = field(default_factory=dict)  # its task knows their types
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Record:
    """One graded sample as it stands in records.jsonl. `prompts` are the rendered texts, one a turn.

    Text, hash and number of tokens are those of what the model read: of a cut prompt, its end.
    """

    sample_id: str
    group: str
    cluster: str
    target: JSON
    prompts: tuple[str, ...]
    prompt_sha256: tuple[str, ...]  # of the token ids as little-endian int32, one a turn
    num_prompt_tokens: tuple[int, ...]
    answers: tuple[Answer, ...]
    grade: Grade

    def under(self, protocol: str) -> Record:
        """With the score of that protocol: the official reader's under "upstream", where there is one."""
        if protocol != "upstream" or self.grade.score_upstream is None:
            return self
        return replace(self, grade=replace(self.grade, score=self.grade.score_upstream))


@dataclass(frozen=True, kw_only=True)
class Metric:
    """`value` in [`low`, `high`] (95 % interval) over `n` items. Shares are fractions in 0..1, shown as per cent.

    `kind`: "share" (0..1), "ppl", "mean" or "count". `num_clusters` when items are not independent.
    """

    value: float
    n: int
    kind: MetricKind = "share"
    low: float | None = None
    high: float | None = None
    num_clusters: int | None = None
    higher_is_better: bool = True
    unit: str = ""


# --- engines and tasks -----------------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """The methods of a tokenizer that tasks may use."""

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; b"" for ids that mean nothing."""
        ...

    def render(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, ChatML built piecewise."""
        ...


@runtime_checkable
class GradesInBatches(Protocol):
    """A task that grades many samples faster than one by one (it runs their programs side by side)."""

    def grade_many(self, items: Sequence[tuple[Sample, Sequence[Turn]]]) -> list[Grade]: ...


@runtime_checkable
class GradesElsewhere(Protocol):
    """A task whose grading waits for another process, such as one that compares formulas."""

    grades_elsewhere: Literal[True]


@runtime_checkable
class RunsPrograms(Protocol):
    """A task that runs what a model writes: the version of Python decides which programs can be run."""

    runs_programs: Literal[True]


@runtime_checkable
class DrawsLimit(Protocol):
    """A task whose `samples()` are already those of `limit`: its samples are not to be drawn one by one."""

    draws_limit: Literal[True]


@runtime_checkable
class AveragesGroups(Protocol):
    """A task that says whether its headline is the mean over samples ("micro") or over the means of its groups."""

    average: Literal["micro", "macro"]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A prompt as the engine sees it. `ids` is empty for engines that never see token ids (remote APIs)."""

    text: str
    ids: tuple[int, ...]


class Engine(Protocol):
    """Answers requests. `info` is recorded with the result: kernel, dtypes really used, device, fallbacks."""

    @property
    def info(self) -> Mapping[str, Any]: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def render(self, prompt: Prompt) -> Rendered: ...

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Yield (index into `requests`, its answer) in any order, each index exactly once."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class MayFail(Protocol):
    """An engine whose requests can fail one by one: `run` then leaves them out."""

    @property
    def failures(self) -> Mapping[int, str]:
        """Of the last `run`: index into its requests -> why there is no answer, in one line."""
        ...


@runtime_checkable
class LocatesNonFinite(Protocol):
    """An engine that can look into its model for where numbers overflow."""

    def locate_non_finite(self, request: Request) -> str:
        """Where NaN or infinity first arises in this request's forward, with the dtype: "layers.3 in float16"."""
        ...


class Task(Protocol):
    """A benchmark: its items, how to ask, how to grade, how to summarise. Pure: re-grading needs no model."""

    name: str
    version: int  # raise it when prompts, grading or aggregation change

    def samples(self) -> Sequence[Sample]: ...

    def request(self, sample: Sample, turns: Sequence[Turn]) -> Request | None:
        """What to ask next, None when done. One-turn tasks return None when `turns` is not empty."""
        ...

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade: ...

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        """Metrics by name, the headline first; groups are named "accuracy/stem", subjects "accuracy/anatomy"."""
        ...

    def describe(self) -> Mapping[str, JSON]:
        """What decides the numbers: split, shots, data sha256, prompt format ... Goes into spec.json."""
        ...


@runtime_checkable
class HasNotes(Protocol):
    """A task with remarks about its data (skipped documents, repeated text), added to the result's warnings."""

    @property
    def notes(self) -> Sequence[str]: ...


@runtime_checkable
class HasArtifacts(Protocol):
    """A task that writes files beside result.json: plots, submissions."""

    def artifacts(self, records: Iterable[Record]) -> Mapping[str, JSON | bytes]:
        """File name -> content: text, bytes, or an object for JSON."""
        ...
