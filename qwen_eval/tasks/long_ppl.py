"""Perplexity by context length (the long-context table of the Qwen cards) and the other usual ways to measure it.

Every length is scored over the same tokens, also under `limit`, so that a difference between two lengths is the
length's. The intervals are over documents.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

from qwen_eval.config import TaskSpec, not_one_of
from qwen_eval.core import (
    JSON,
    ConfigError,
    DataError,
    Grade,
    Metric,
    Prompt,
    Record,
    Request,
    Sample,
    Score,
    TokenLogprobs,
    Turn,
)
from qwen_eval.data.sources import draw
from qwen_eval.metrics import perplexity
from qwen_eval.tasks.benchmark import Benchmark
from qwen_eval.tasks.documents import Stream, end_of_text, read_documents, token_streams
from qwen_eval.tasks.registry import TaskContext
from qwen_eval.tasks.text_windows import PRESETS, Window, usable_tokens

PACKINGS = ("document", "stream")
AUTO_FACTORS = (0.5, 1, 2, 4, 8)  # of the training length: 1024 … 16384 for Qwen-7B, as published
AUTO_LONGEST = 32768
TRAIN_LENGTH = 2048  # where an engine does not say

Stretch: TypeAlias = tuple[int, int]  # first token, number of tokens


@dataclass(kw_only=True)
class LongPplSpec(TaskSpec):
    """`lengths` empty: half to eight times the training length, as far as half of the documents reach.

    `limit` draws, and `max_chunks` bounds, chunks of the longest length; shorter lengths cover the same tokens (with
    `same_tokens`).
    """

    name: str = "long_ppl"
    split: str = "test"
    preset: str = "qwen-arxiv"  # qwen-arxiv | hf-stride | llama.cpp-512 | lm-eval-rolling
    packing: str = "document"  # document | stream: all documents as one stream of tokens
    lengths: list[int] = field(default_factory=list)
    stride: int | None = None  # hf-stride: tokens between windows; None: half the length
    max_chunks: int | None = None
    same_tokens: bool = True  # false: each length uses every chunk that fits
    text_key: str = "text"  # of jsonl, parquet and hub rows
    hub_config: str | None = None


class LongPpl(Benchmark[LongPplSpec]):
    Spec = LongPplSpec
    version = 2  # the headline is the longest length's, and `limit` draws chunks of the longest length
    bundled = "text"
    draws_limit: Literal[True] = True

    def __init__(self, spec: LongPplSpec, context: TaskContext):
        self.tokenizer = context.required_tokenizer(spec.name, " and gives no log-probabilities of given text")
        super().__init__(spec, context)
        _check(spec)
        if spec.sampling != "task":
            raise ConfigError(f"task.sampling={spec.sampling}: {spec.name} scores text and draws none")
        self.preset = PRESETS[spec.preset]
        self.prefix = end_of_text(self.tokenizer)
        if self.preset.needs_prefix and self.prefix is None:
            raise ConfigError(f"task.preset={spec.preset}: the vocabulary has no <|endoftext|> to begin with")

    # --- the text ---

    @cached_property
    def streams(self) -> list[Stream]:
        spec = self.spec
        documents = read_documents(self.source, text_key=spec.text_key, hub_config=spec.hub_config, split=spec.split)
        return token_streams(documents, self.tokenizer, as_one=spec.packing == "stream")

    @cached_property
    def lengths(self) -> list[int]:
        if self.spec.lengths:
            return sorted(set(self.spec.lengths))
        if self.preset.lengths:
            return list(self.preset.lengths)
        train_length = self.context.model_facts.get("train_length") or TRAIN_LENGTH
        reach = sorted(len(stream.ids) for stream in self.streams)[len(self.streams) // 2]
        wanted = [int(train_length * factor) for factor in AUTO_FACTORS]
        kept = [length for length in wanted if 2 <= length <= min(reach, AUTO_LONGEST)]
        return kept or [max(2, min(reach, wanted[0]))]

    @cached_property
    def plan(self) -> dict[int, list[int]]:
        """Length -> tokens used of each stream."""
        nums = [len(stream.ids) for stream in self.streams]
        plan = {}
        for length in self.lengths:
            unit = self.lengths[-1] if self.spec.same_tokens else length
            used = usable_tokens(nums, unit, is_whole=self.preset.is_whole, max_chunks=self.spec.max_chunks)
            if not any(num > 1 for num in used):
                raise DataError(
                    f"task.lengths={unit}: no {self.spec.packing} of {self.source.origin} is that long, the longest "
                    f"has {max(nums)} tokens; use shorter task.lengths, task.packing=stream or longer texts"
                )
            plan[length] = used
        return plan

    @cached_property
    def stretches(self) -> dict[int, list[list[Stretch]]]:
        """Length -> what is read of each stream: all that the plan uses, or the part that `limit` draws."""
        found = {}
        for length in self.lengths:
            unit = self.lengths[-1] if self.spec.same_tokens else length
            used = self.plan[length]
            if self.spec.limit is None:
                found[length] = [[(0, num)] if num else [] for num in used]
            else:
                found[length] = self._drawn(used, unit)
        return found

    def _drawn(self, used: Sequence[int], unit: int) -> list[list[Stretch]]:
        """`limit` chunks of `unit` tokens, every text in proportion to its size. Where a protocol reads whole texts,
        as many chunks of a text are read from its beginning.
        """
        chunks = [
            Sample(id=f"{self.streams[i].id}/{start}", group=self.streams[i].id, data={"stream": i, "start": start})
            for i, num in enumerate(used)
            for start in range(0, num, unit)
        ]
        starts: list[list[int]] = [[] for _ in used]
        for chunk in draw(chunks, self.spec.limit, self.spec.seed):
            starts[chunk.data["stream"]].append(chunk.data["start"])
        if self.preset.is_whole:
            return [[(0, min(len(drawn) * unit, num))] if drawn else [] for drawn, num in zip(starts, used)]
        return [[(start, unit) for start in drawn] for drawn in starts]

    def samples(self) -> Sequence[Sample]:
        return [
            Sample(id=f"{length}/{stream.id}/{w.start}", group=str(length), cluster=stream.document_at(w.start),
                   data={"stream": i, "window": w})
            for length in self.lengths
            for i, stream in enumerate(self.streams)
            for stretch in self.stretches[length][i]
            for w in self._windows(length, stretch)
        ]  # fmt: skip

    def _windows(self, length: int, stretch: Stretch) -> list[Window]:
        first, num_tokens = stretch
        found = self.preset.windows(num_tokens, length, self._stride(length))
        return [replace(w, start=w.start + first, end=w.end + first) for w in found if w.num_scored > 0]

    # --- asking and grading ---

    def request(self, sample: Sample, turns: Sequence[Turn]) -> Request | None:
        if turns:
            return None
        window: Window = sample.data["window"]
        ids = self.streams[sample.data["stream"]].ids[window.start : window.end]
        num_context = window.num_context
        if window.is_prefixed:
            assert self.prefix is not None
            ids, num_context = (self.prefix, *ids), num_context + 1
        num_fed = None if self.preset.feeds_last else len(ids) - 1
        hidden = self.context.hidden_dir
        return Score(prompt=Prompt(ids=ids), num_context=num_context, num_fed=num_fed, keep_hidden=hidden)

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        """Sums over the scored tokens; `by_position[k]` = [loss, tokens] at positions 2**k to 2**(k+1) - 1."""
        request, answer = turns[0].request, turns[0].answer
        assert isinstance(request, Score), type(request)
        assert isinstance(answer, TokenLogprobs), type(answer)
        by_position: dict[int, list[float]] = defaultdict(lambda: [0.0, 0])
        for position, logprob in enumerate(answer.logprobs, request.num_context):
            row = by_position[position.bit_length() - 1]
            row[0] -= logprob
            row[1] += 1
        return Grade(
            score=None,
            values={
                "length": int(sample.group),
                "nll": -math.fsum(answer.logprobs),
                "num_tokens": len(answer.logprobs),
                "num_bytes": sum(len(self.tokenizer.token_bytes(i)) for i in answer.token_ids),
                "weight": self._weight(int(sample.group), sample.data["window"]),
                "by_position": {str(k): by_position[k] for k in sorted(by_position)},
            },
        )

    def _weight(self, length: int, window: Window) -> int:
        """Tokens it counts for. The official strided loop always takes one off, as if nothing came before a window."""
        is_official = self.context.protocol == "upstream" and self.spec.preset == "hf-stride"
        overlaps = window.start > 0 and self._stride(length) < length
        return window.num_scored - 1 if is_official and overlaps else window.num_scored

    def _stride(self, length: int) -> int:
        return self.spec.stride or max(1, length // 2)

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        """`ppl/1024`, `bits_per_byte/1024` of each length. The longest comes first, it is the headline."""
        by_length: dict[int, list[Record]] = defaultdict(list)
        for record in records:
            by_length[record.grade.values["length"]].append(record)
        lengths = sorted(by_length)
        metrics = {f"ppl/{length}": _ppl(by_length[length]) for length in [*lengths[-1:], *lengths[:-1]]}
        metrics |= {f"bits_per_byte/{length}": _bits_per_byte(by_length[length]) for length in lengths}
        if self.spec.preset == "lm-eval-rolling":
            for length in lengths:
                metrics |= self._by_text(length, by_length[length])
        return metrics

    def _by_text(self, length: int, records: Sequence[Record]) -> dict[str, Metric]:
        """lm-evaluation-harness's perplexities of a word (split at white space) and a byte of the original text."""
        nll: dict[str, float] = defaultdict(float)
        scored: dict[str, int] = defaultdict(int)
        for record in records:
            name = record.sample_id.split("/", 1)[1].rpartition("/")[0]
            nll[name] += record.grade.values["nll"]
            scored[name] += record.grade.values["num_tokens"]
        texts = {
            stream.id: self._used_text(stream, num)
            for stream, stretches in zip(self.streams, self.stretches[length])
            for _, num in stretches
            if scored[stream.id] == num
        }
        sums = [nll[name] for name in texts]
        words = perplexity(sums, [len(re.split(r"\s+", text)) for text in texts.values()])
        size = perplexity(sums, [len(text.encode("utf-8", "surrogatepass")) for text in texts.values()])
        # not "word_perplexity/1024": a name that ends so is a perplexity per token of that length
        return {
            f"word_perplexity@{length}": replace(words, unit=""),
            f"byte_perplexity@{length}": replace(size, unit=""),
        }

    def _used_text(self, stream: Stream, num_tokens: int) -> str:
        return stream.text if num_tokens == len(stream.ids) else self.tokenizer.decode(stream.ids[:num_tokens])

    # --- what is said of it ---

    @property
    def notes(self) -> list[str]:
        found = []
        if not self.preset.is_whole and self.spec.packing == "document":
            unit = self.lengths[-1]
            short = sum(len(stream.ids) < unit for stream in self.streams)
            if short:
                found.append(f"{short} of {len(self.streams)} documents have fewer than {unit} tokens and are skipped")
        odd = [length for length in self.lengths if self.lengths[-1] % length] if not self.preset.is_whole else []
        if odd and self.spec.same_tokens:
            found.append(
                f"lengths {', '.join(map(str, odd))} do not divide {self.lengths[-1]}: fewer than {max(odd)} tokens at "
                "the end of a text or drawn chunk are left out there"
            )
        facts = self.context.model_facts
        has_trick = facts.get("dynamic_ntk") or facts.get("logn") or facts.get("windows")
        beyond = [length for length in self.lengths if length > (facts.get("train_length") or math.inf)]
        if beyond and not has_trick:
            found.append(
                f"lengths {', '.join(map(str, beyond))} are beyond the training length of {facts['train_length']} "
                "tokens, with dynamic NTK, LogN and windows all off"
            )
        return found

    def artifacts(self, records: Iterable[Record]) -> dict[str, JSON | str | bytes]:
        """`loss_by_position.json`: {length: [{from, to, loss, num_tokens}]}, bins doubling."""
        totals: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0]))
        for record in records:
            for k, (loss, num) in record.grade.values["by_position"].items():
                row = totals[record.group][int(k)]
                row[0] += loss
                row[1] += num
        table = {
            length: [
                {"from": 2**k, "to": 2 ** (k + 1) - 1, "loss": loss / num, "num_tokens": num}
                for k, (loss, num) in sorted(bins.items())
            ]
            for length, bins in totals.items()
        }
        return {"loss_by_position.json": table}

    def describe(self) -> Mapping[str, JSON]:
        window, first_token, bos = self.preset.rules
        stride = self.spec.stride or "half the length" if self.spec.preset == "hf-stride" else None
        return {
            "preset": self.spec.preset,
            "window": window,
            "stride": stride,
            "first_token": first_token,
            "bos": bos,
            "separator": "<|endoftext|>" if self.spec.packing == "stream" and self.prefix is not None else None,
            "lengths": self.lengths,
            "num_documents": sum(len(stream.names) for stream in self.streams),
            "num_skipped": {str(length): used.count(0) for length, used in self.plan.items()},
            "num_tokens": {
                str(length): sum(num for stretches in of_streams for _, num in stretches)
                for length, of_streams in self.stretches.items()
            },
            **super().describe(),
        }


def _check(spec: LongPplSpec) -> None:
    for key, words in (("preset", PRESETS), ("packing", PACKINGS)):
        if getattr(spec, key) not in words:
            raise not_one_of(f"task.{key}", getattr(spec, key), words)
    for key, values in (("lengths", spec.lengths), ("stride", [spec.stride]), ("max_chunks", [spec.max_chunks])):
        low = 2 if key == "lengths" else 1
        for value in values:
            if value is not None and value < low:
                raise ConfigError(f"task.{key}={value}: at least {low}")
    if spec.stride is not None and spec.lengths and spec.stride > min(spec.lengths):
        raise ConfigError(f"task.stride={spec.stride}: at most the shortest of task.lengths, or tokens are left out")
    if spec.subjects:
        raise ConfigError("task.subjects: long_ppl has none; choose with task.lengths and task.path")


def _ppl(records: Sequence[Record]) -> Metric:
    values = [record.grade.values for record in records]
    # a window's mean loss, times the tokens it counts for
    sums = [v["nll"] / v["num_tokens"] * v["weight"] if v["num_tokens"] else 0.0 for v in values]
    return perplexity(sums, [v["weight"] for v in values], [record.cluster for record in records])


def _bits_per_byte(records: Sequence[Record]) -> Metric:
    """Comparable between tokenizers. Its interval is that of the ratio of sums over documents."""
    values = [record.grade.values for record in records]
    clusters = [record.cluster for record in records]
    nats = perplexity([v["nll"] for v in values], [v["num_bytes"] for v in values], clusters)

    def bits(value: float | None) -> float | None:
        return None if value is None else math.log2(value)

    return Metric(
        value=math.log2(nats.value) if nats.n else math.nan, n=nats.n, kind="mean", low=bits(nats.low),
        high=bits(nats.high), num_clusters=nats.num_clusters, higher_is_better=False, unit="bit/byte",
    )  # fmt: skip
