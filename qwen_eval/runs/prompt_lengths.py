"""The part of a prompt that the model read, and warnings about prompts that were cut or exceed the training length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qwen_eval.core import Choose, Engine, Record, Rendered, Request, TokenLogprobs

CUT_PROMPT = "cut_prompt"  # a flag of a record


def read_by_model(engine: Engine, request: Request) -> Rendered:
    """The rendered prompt, or its end where the request cuts it."""
    rendered = engine.render(request.prompt)
    kept = request.kept(rendered.ids) if isinstance(request, Choose) else rendered.ids
    if len(kept) == len(rendered.ids):
        return rendered
    text = rendered.text if engine.tokenizer is None else engine.tokenizer.decode(kept)
    return Rendered(text=text, ids=kept)


def is_cut(engine: Engine, request: Request) -> bool:
    ids = engine.render(request.prompt).ids
    return isinstance(request, Choose) and len(request.kept(ids)) < len(ids)


def length_warnings(records: Iterable[Record], info: Mapping[str, Any]) -> list[str]:
    """For choices and generations only: tasks that score texts choose the lengths themselves."""
    rows = [row for row in records if not any(isinstance(answer, TokenLogprobs) for answer in row.answers)]
    found = []
    if num_cut := sum(CUT_PROMPT in row.grade.flags for row in rows):
        found.append(f"{num_cut} of {len(rows)} prompts were cut to their end, as the official script does")
    limit = info.get("train_length") or info.get("max_length")
    if limit and not (info.get("dynamic_ntk") or info.get("windows")):
        num_long = sum(max(row.num_prompt_tokens, default=0) > limit for row in rows)
        if num_long:
            found.append(f"{num_long} of {len(rows)} prompts are longer than the {limit} tokens the model was made for")
    return found
