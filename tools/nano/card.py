"""Measure the embedded checkpoint with qwen_eval and write its model card.

python -m nano.card build/nano                (in tools/; the folder of the training run)
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]
from nano import mixture  # noqa: E402
from nano.counting import Trigram  # noqa: E402
from qwen_eval.config import ModelSpec, RopeSpec  # noqa: E402
from qwen_eval.core import Metric, Prompt, Record, Score, TokenLogprobs, Turn  # noqa: E402
from qwen_eval.engines.native.engine import NativeEngine  # noqa: E402
from qwen_eval.metrics import perplexity  # noqa: E402
from qwen_eval.models.load import open_forward  # noqa: E402
from qwen_eval.tasks.nano import Nano  # noqa: E402
from qwen_eval.tasks.nano import NanoSpec as Spec  # noqa: E402
from qwen_eval.tasks.registry import TaskContext  # noqa: E402

ASSET = ROOT / "qwen_eval" / "assets" / "qwen-nano"
TEXT = ROOT / "qwen_eval" / "assets" / "samples" / "text"
TOKENS = 8192  # of each document
TRICKS = {  # name: NTK, LogN, windows
    "none": ("false", "false", "none"),
    "NTK": ("true", "false", "none"),
    "NTK + LogN": ("true", "true", "none"),
    "NTK + LogN + window": ("true", "true", "layerwise"),
}


def engine(ntk: str = "auto", logn: str = "auto", window: str = "none") -> NativeEngine:
    spec = ModelSpec(name="qwen-nano", asset="qwen-nano", dtype="fp32", logn=logn, window=window)
    spec.rope = RopeSpec(dynamic_ntk=ntk)
    opened = open_forward(spec)
    return NativeEngine(opened.forward, opened.tokenizer, facts=opened.facts)


def documents(tokenizer: Any, languages: Sequence[str]) -> dict[str, list[int]]:
    meta = json.loads((TEXT / "META.json").read_text("utf-8"))
    files = [entry["file"] for entry in meta if entry["language"] in languages]
    return {file: tokenizer.encode((TEXT / file).read_text("utf-8"))[:TOKENS] for file in files}


def text_perplexity(model: NativeEngine, length: int, languages: Sequence[str]) -> Metric:
    """Non-overlapping chunks of exactly `length` tokens, every token but the first of a chunk; clusters: documents."""
    requests, clusters = [], []
    for file, ids in documents(model.tokenizer, languages).items():
        for start in range(0, len(ids) - length + 1, length):
            requests.append(Score(prompt=Prompt(ids=tuple(ids[start : start + length]))))
            clusters.append(file)
    sums, counts = [0.0] * len(requests), [0] * len(requests)
    for index, answer in model.run(requests):
        assert isinstance(answer, TokenLogprobs)
        sums[index], counts[index] = -sum(answer.logprobs), len(answer.logprobs)
    return perplexity(sums, counts, clusters)


def exercise_scores(mode: str) -> dict[str, Metric]:
    task, model = Nano(Spec(mode=mode, data="bundled"), TaskContext()), engine()
    samples = list(task.samples())
    requests = [task.request(sample, []) for sample in samples]
    asked = [request for request in requests if request is not None]
    records = []
    for index, answer in model.run(asked):
        sample = samples[index]
        grade = task.grade(sample, [Turn(request=asked[index], answer=answer)])
        records.append(
            Record(
                sample_id=sample.id, group=sample.group, cluster="", target=sample.target, prompts=(),
                prompt_sha256=(), num_prompt_tokens=(), answers=(answer,), grade=grade,
            )
        )  # fmt: skip
    return task.summarise(records)


def baselines(run: Path, num_tokens: int, languages: Sequence[str]) -> tuple[float, float]:
    """Perplexities of a unigram and a trigram model of the running text that the model itself read."""
    rows = mixture.load(run)
    seen = num_tokens // (rows.tokens.shape[1] - 1)
    is_text = (rows.weights[:seen] == mixture.PLAIN).all(axis=1)
    training = rows.tokens[:seen][is_text][:, :-1].ravel().tolist()
    model = engine()
    held = [i for ids in documents(model.tokenizer, languages).values() for i in ids]
    trigram = Trigram(training, 4096)
    return trigram.unigram_perplexity(held), trigram.perplexity(held)


def figures(run: Path) -> dict[str, Any]:
    curve = list(csv.DictReader((run / "loss.csv").open()))
    out: dict[str, Any] = {"curve": curve, "tokens": int(curve[-1]["tokens"]), "seconds": float(curve[-1]["seconds"])}
    out["exercises"] = {mode: exercise_scores(mode) for mode in ("base", "chat")}
    every = ("en", "zh", "python")
    groups = {"English": ("en",), "Chinese": ("zh",), "Python": ("python",), "all": every}
    out["text"] = {name: text_perplexity(engine(), 256, languages) for name, languages in groups.items()}
    out["baselines"] = {name: baselines(run, out["tokens"], languages) for name, languages in groups.items()}
    out["lengths"] = {
        name: {length: text_perplexity(engine(*switches), length, every) for length in (256, 512, 1024, 2048)}
        for name, switches in TRICKS.items()
    }
    return out


def _interval(metric: Metric) -> str:
    scale = 100 if metric.kind == "share" else 1
    if metric.low is None or metric.high is None or (metric.kind == "ppl" and metric.high > 10 * metric.value):
        return f"{scale * metric.value:.1f} (too few documents for an interval)"
    return f"{scale * metric.value:.1f} [{scale * metric.low:.1f}, {scale * metric.high:.1f}]"


def tables(out: dict[str, Any]) -> Iterator[str]:
    n = out["exercises"]["base"]["accuracy"].n
    yield f"### Exercises (`task=nano`, {n} held-out items, % and 95 % interval)\n"
    yield "| kind | n | raw text | ChatML |\n|---|---|---|---|"
    base, chat = out["exercises"]["base"], out["exercises"]["chat"]
    for name in base:
        yield f"| {name} | {base[name].n} | {_interval(base[name])} | {_interval(chat[name])} |"
    yield "\n### Held-out text (perplexity per token of this vocabulary, chunks of 256)\n"
    yield "| text | qwen-nano [95 % over documents] | trigram (Kneser-Ney) | unigram |\n|---|---|---|---|"
    for name, metric in out["text"].items():
        unigram, trigram = out["baselines"][name]
        yield f"| {name} | {_interval(metric)} | {trigram:.1f} | {unigram:.1f} |"
    yield "\n### Longer than training (perplexity, the same documents in chunks of each length)\n"
    yield "| tricks | 256 | 512 | 1024 | 2048 |\n|---|---|---|---|---|"
    for name, row in out["lengths"].items():
        yield f"| {name} | " + " | ".join(f"{metric.value:.1f}" for metric in row.values()) + " |"
    plain, ntk, best = (out["lengths"][name][2048].value for name in ("none", "NTK", "NTK + LogN + window"))
    start = out["lengths"]["none"][256].value
    yield f"\nAt 2048 tokens, 8 times the training length: none / NTK = {plain / ntk:.2f};"
    yield f"all tricks / none at 256 = {best / start:.2f}."
    yield "\n### Loss curve (mean of 20 steps; all rows: `loss.csv`)\n"
    yield "| tokens | weighted loss | running text, nats/token | asked-for tokens, nats/token |\n|---|---|---|---|"
    for i in np.unique(np.linspace(0, len(out["curve"]) - 1, 14).astype(int)):
        row = out["curve"][i]
        yield f"| {int(row['tokens']) / 1e6:.2f} M | {row['loss']} | {row['text_nll']} | {row['answer_nll']} |"


def main() -> None:
    run = Path(sys.argv[1])
    out = figures(run)
    template = (ROOT / "tools" / "nano" / "card.md").read_text("utf-8")
    settings = json.loads((run / "settings.json").read_text())
    filled = template.replace("{tables}", "\n".join(tables(out)))
    filled = filled.replace("{tokens}", f"{out['tokens'] / 1e6:.1f}").replace("{minutes}", f"{out['seconds'] / 60:.0f}")
    threads = "one thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    arguments = f"--tokens {settings['tokens']:.10g} --threads {settings['threads']}"
    filled = filled.replace("{threads}", threads).replace("{arguments}", arguments)
    (ASSET / "MODEL_CARD.md").write_text(filled, encoding="utf-8")
    shutil.copyfile(run / "loss.csv", ASSET / "loss.csv")
    print(filled)


if __name__ == "__main__":
    main()
