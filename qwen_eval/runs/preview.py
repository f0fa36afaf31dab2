"""What an evaluation would ask: prompts as the model reads them, stop strings, and how an answer would be read.

Of a checkpoint only the tokenizer and the configuration are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qwen_eval.config import EvalSpec, ModelSpec
from qwen_eval.core import (
    JSON,
    Answer,
    ChoiceLogprobs,
    Choose,
    Completion,
    Completions,
    Generate,
    GradesInBatches,
    Prompt,
    Rendered,
    Request,
    Sample,
    Task,
    Tokenizer,
    Turn,
    ids_sha256,
)
from qwen_eval.data.sources import draw
from qwen_eval.engines.kinds import kind, open_engine
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.generation_config import read_json, sampling_of
from qwen_eval.models.hub import texts_dir
from qwen_eval.models.lora import base_of, tokenizer_dir
from qwen_eval.models.overrides import read_config, with_overrides
from qwen_eval.models.tokenizer import ChatTokenizer, load_tokenizer
from qwen_eval.runs.evaluate import selected
from qwen_eval.runs.grading import grades
from qwen_eval.tasks.registry import TaskContext, build
from qwen_eval.terminal import plain_text

Render = Callable[[Prompt], Rendered]
OPEN, CLOSE = "⟦", "⟧"  # around a special token; text that only looks like one has none
LIKELY, UNLIKELY = -0.1, -5.0  # log-probabilities of a choice that is meant


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How prompts become tokens. `tokenizer` is None for an engine that sees none."""

    tokenizer: Tokenizer | None
    facts: Mapping[str, JSON]

    def text(self, rendered: Rendered) -> str:
        return rendered.text if self.tokenizer is None else marked(rendered.ids, self.tokenizer)


def preview_text(spec: EvalSpec, *, num_samples: int, reply: str | None) -> str:
    reader, render = _opened(spec)
    context = TaskContext(
        protocol=spec.protocol,
        is_chat=spec.model.chat if spec.task.mode == "auto" else spec.task.mode == "chat",
        tokenizer=reader.tokenizer,
        sandbox=spec.sandbox,
        model_facts=reader.facts,
    )
    task = build(spec.task, context)
    samples = selected(task, spec)
    shown = draw(samples, num_samples, spec.task.seed)
    parts = [f"{spec.task.name} · {spec.model.name}: {len(shown)} of {len(samples)} samples"]
    for sample in shown:
        request = task.request(sample, ())
        assert request is not None, sample.id
        parts.append(_sample_text(task, sample, request, reader, render(request.prompt), reply))
    return "\n\n".join(parts)


def _opened(spec: EvalSpec) -> tuple[Reader, Render]:
    """The reader and the function that renders: of the checkpoint's tokenizer, or of an engine without weights."""
    if kind(spec.engine.name).model_at != "checkpoint":
        engine = open_engine(spec.engine, spec.model, protocol=spec.protocol)
        return Reader(tokenizer=engine.tokenizer, facts=engine.info), engine.render
    tokenizer, facts = read_tokenizer(spec.model)

    def render(prompt: Prompt) -> Rendered:
        return Rendered(text=tokenizer.render_text(prompt), ids=tuple(tokenizer.render(prompt)))

    return Reader(tokenizer=tokenizer, facts=facts), render


def read_tokenizer(model: ModelSpec) -> tuple[ChatTokenizer, dict[str, JSON]]:
    """The tokenizer, and what a task may ask of the model: its lengths, its way to sample, whether it thinks."""
    directory = texts_dir(model)
    base = base_of(directory)
    tokenizer = load_tokenizer(tokenizer_dir(directory), system=model.system, thinking=model.thinking)
    config = with_overrides(ModelConfig.from_hf(read_config(base, model)), model)
    facts: dict[str, JSON] = dict(tokenizer.template.facts) if tokenizer.template else {}
    facts |= {"train_length": config.train_length, "max_length": config.max_length}
    facts |= {"dynamic_ntk": config.dynamic_ntk, "windows": list(config.windows) or None}
    facts["sampling"] = sampling_of(read_json(base / "generation_config.json"))
    return tokenizer, facts


def _sample_text(
    task: Task, sample: Sample, request: Request, reader: Reader, rendered: Rendered, reply: str | None
) -> str:
    ids = request.kept(rendered.ids) if isinstance(request, Choose) else rendered.ids
    text = reader.text(Rendered(text=rendered.text, ids=ids))
    num = f"{len(ids)} tokens, sha256 {ids_sha256(ids)[:12]}" if ids else "tokens unknown: this engine sees none"
    cut = f" (cut from {len(rendered.ids)} to their end)" if len(ids) < len(rendered.ids) else ""
    lines = [f"=== sample {sample.id}: prompt of {num}{cut}", *text.split("\n"), "===", *_asked(request, reader)]
    lines += [f"target: {_short(sample.target)}", *_read(task, sample, request, reply)]
    return "\n".join(plain_text(line) for line in lines)


def marked(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of token ids, special tokens between marks."""
    parts: list[str] = []
    plain: list[int] = []
    special = {token: text for token in set(ids) if (text := special_text(token, tokenizer)) is not None}
    for token in ids:
        if token not in special:
            plain.append(token)
            continue
        parts += [tokenizer.decode(plain), f"{OPEN}{special[token]}{CLOSE}"]
        plain = []
    return "".join([*parts, tokenizer.decode(plain)])


def special_text(token: int, tokenizer: Tokenizer) -> str | None:
    """What a special token is called; None for one of ordinary text: that is what its own text is made of."""
    text = tokenizer.decode([token])
    is_name = re.fullmatch(r"<\S+>", text) is not None
    return text if is_name and token not in tokenizer.encode(text) else None


def _asked(request: Request, reader: Reader) -> list[str]:
    if isinstance(request, Choose):
        tokens = [reader.tokenizer.encode(choice) if reader.tokenizer else [] for choice in request.choices]
        choices = [f"{choice!r} {ids or ''}".rstrip() for choice, ids in zip(request.choices, tokens)]
        return [f"choices, by their log-probability: {', '.join(choices)}"]
    if isinstance(request, Generate):
        stops = ", ".join(map(repr, request.stop)) or "none but the end of the text"
        how = "greedy" if request.sampling.is_greedy else f"drawn: {request.sampling}"
        return [f"stop strings: {stops}", f"at most {request.max_new_tokens} new tokens, {how}, n={request.n}"]
    return [f"scored: every token but the first {request.num_context}"]


def _read(task: Task, sample: Sample, request: Request, reply: str | None) -> list[str]:
    """How the right answer, or the reply that was given, would be graded."""
    answer = example_answer(task, sample, request, reply)
    if answer is None:
        return [] if reply is None else ["reply=: has no effect here, no text is generated"]
    grade = grades(task, [(sample, [Turn(request=request, answer=answer)])])[0]
    said = answer.text if isinstance(answer, Completions) else sample.target
    flags = f", flags: {', '.join(grade.flags)}" if grade.flags else ""
    lines = [f"the answer {_short(said)} would be read as {_short(grade.extracted)}: score {grade.score}{flags}"]
    if grade.score_upstream is not None:
        lines.append(f"by the official script as {_short(grade.extracted_upstream)}: score {grade.score_upstream}")
    return lines


def example_answer(task: Task, sample: Sample, request: Request, reply: str | None) -> Answer | None:
    """`reply`, or without it the right answer; None where neither says what a model would write."""
    if isinstance(request, Choose):
        named = [i for i, choice in enumerate(request.choices) if choice.strip() == sample.target]
        return None if reply is not None or not named else _chosen(named[0], len(request.choices))
    if not isinstance(request, Generate):
        return None
    if reply is None and not isinstance(task, GradesInBatches):  # the target of a program is its tests
        target = sample.target[0] if isinstance(sample.target, (list, tuple)) and sample.target else sample.target
        reply = target if isinstance(target, str) else None
    if reply is None:
        return None
    completion = Completion(text=reply, finish_reason="eos", num_tokens=len(reply))
    return Completions(completions=(completion,) * request.n)


def _chosen(best: int, num: int) -> ChoiceLogprobs:
    logprobs = tuple(LIKELY if i == best else UNLIKELY for i in range(num))
    return ChoiceLogprobs(logprobs=logprobs, num_tokens=(1,) * num, logits=logprobs, logsumexp=0.0)


def _short(value: JSON) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
