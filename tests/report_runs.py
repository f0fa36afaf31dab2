"""Run directories for the tests of the report, written with the store's own functions, from a few plain values."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_eval.core import Answer, ChoiceLogprobs, Completion, Completions, Grade, Metric, Record, TokenLogprobs
from qwen_eval.metrics import perplexity, rates, share
from qwen_eval.runs.record_json import metric_to_json, record_to_json
from qwen_eval.runs.store import FORMAT
from qwen_eval.tasks.registry import TASKS, task_class


def said(text: str, *, reason: Any = "stop") -> Completions:
    return Completions(completions=(Completion(text=text, finish_reason=reason, num_tokens=len(text.split())),))


def chose(index: int, *, confidence: float = 2.0, noise: float = 0.0) -> ChoiceLogprobs:
    weights = [confidence * (i == index) + noise * (i + 1) for i in range(4)]
    total = math.log(sum(map(math.exp, weights)))
    return ChoiceLogprobs(logprobs=tuple(w - total for w in weights), num_tokens=(1, 1, 1, 1))


def scored(nll: float, num_tokens: int) -> TokenLogprobs:
    return TokenLogprobs(token_ids=tuple(range(num_tokens)), logprobs=(-nll / num_tokens,) * num_tokens)


def record(name: str, answer: Answer, score: float | None, *, prompt: str = "", **more: Any) -> Record:
    prompt = prompt or f"Question: {name}?\nAnswer:"
    grade = {
        k: more.pop(k) for k in ("extracted", "extracted_upstream", "score_upstream", "flags", "values") if k in more
    }
    return Record(
        sample_id=name, group=more.pop("group", ""), cluster=more.pop("cluster", ""), target=more.pop("target", "A"),
        prompts=(prompt,), prompt_sha256=(hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest(),),
        num_prompt_tokens=(len(prompt),), answers=(answer,), grade=Grade(score=score, **grade), **more,
    )  # fmt: skip


def answered(scores: Sequence[float], **more: Any) -> list[Record]:
    """Generative records: right says "A", wrong says "B"."""
    return [
        record(f"q{i}", said(f"The answer is {'A' if s else 'B'}."), float(s), extracted="A" if s else "B", **more)
        for i, s in enumerate(scores)
    ]


def documents(nll_per_token: Sequence[float], num_tokens: int = 200) -> list[Record]:
    return [record(f"d{i}", scored(x * num_tokens, num_tokens), None, target=None) for i, x in enumerate(nll_per_token)]


OTHER_VERSION = -1  # of runs with metrics that their records do not give: they are not computed again


def current_version(task: str) -> int:
    return int(task_class(task).version) if task in TASKS else 1


def write_run(
    root: Path,
    records: Sequence[Record],
    *,
    task: str = "gsm8k",
    model: str = "qwen-7b-chat",
    tag: str = "default",
    metrics: dict[str, Metric] | None = None,
    result: dict[str, Any] | None = None,
    finished: bool = True,
    benchmark: dict[str, Any] | None = None,
    protocol: str = "robust",
    version: int | None = None,  # the task's own
    limit: int | None = None,
    decides: dict[str, Any] | None = None,
    **model_keys: Any,
) -> Path:
    path = root / "eval" / task / model / tag
    path.mkdir(parents=True)
    facts = {"split": "test", "shots": 0, "data_sha256": "abc", **(benchmark or {})}
    spec = {
        "format": FORMAT, "kind": "eval",
        "config": {
            "task": {"name": task, "path": None, "shots": 0, "mode": "auto", "limit": limit, "seed": 1234},
            "model": {"name": model, "chat": True, "quant": "none", "kv_cache": "auto", **model_keys},
            "protocol": protocol, "tag": tag, "runs_dir": "runs",
        },
        "decides": {
            "task_version": version or (OTHER_VERSION if metrics else current_version(task)),
            "benchmark": facts, "num_samples": len(records),
            **(decides or {}),
        },
        "provenance": {"time": "2026-01-01", "argv": ["secret-place"], "git": None, "packages": {}},
    }  # fmt: skip
    write(path / "spec.json", spec)
    lines = [json.dumps(record_to_json(item), ensure_ascii=False) + "\n" for item in records]
    (path / "records.jsonl").write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
    if finished:
        found = metrics or headline(records)
        value = {
            "metrics": {name: metric_to_json(metric) for name, metric in found.items()},
            "rates": {name: metric_to_json(metric) for name, metric in rates(records).items()},
            "n": len(records), "partial": {"limit": limit} if limit else {}, "engine": {"dtype": "bfloat16"},
            **(result or {}),
        }  # fmt: skip
        write(path / "result.json", value)
    return path


def write_profile(
    root: Path, speeds: Sequence[float], *, device: str = "Test CPU", model: str = "qwen-7b-chat"
) -> Path:
    path = root / "profile" / "decode" / model / "default"
    path.mkdir(parents=True)
    spec = {
        "format": 1,
        "kind": "profile",
        "config": {"task": {"name": "decode"}, "model": {"name": model}, "tag": "default"},
    }
    cell = {
        "name": "decode", "batch": 1, "prompt_tokens": 1, "new_tokens": 2048, "tok_per_s": list(speeds),
        "peak_bytes": 18 * 2**30, "ttft_s": [0.02],
    }  # fmt: skip
    write(path / "spec.json", spec)
    write(path / "result.json", {"cells": [cell], "device": {"name": device}, "engine": {"dtype": "bfloat16"}})
    return path


def headline(records: Sequence[Record]) -> dict[str, Metric]:
    if all(isinstance(answer, TokenLogprobs) for item in records for answer in item.answers):
        answers = [answer for item in records for answer in item.answers if isinstance(answer, TokenLogprobs)]
        return {"ppl": perplexity([-sum(a.logprobs) for a in answers], [len(a.logprobs) for a in answers])}
    return {"accuracy": share([item.grade.score for item in records])}


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
