"""Train qwen-nano, a miniature Qwen v1, from scratch on a CPU.

    python tools/train_nano.py --texts FOLDER --out build/nano --tokens 14e6

Deterministic from `--seed` (same machine, same number of threads). A killed run goes on where its last checkpoint
stands when the same command is given again. The learning rate is constant until the last `--decay` share of the run;
the data does not depend on `--tokens`, so runs of different lengths share their beginning.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from nano import mixture, texts, vocabulary  # noqa: E402
from nano.model import Qwen, Shape  # noqa: E402
from nano.optimizer import optimizers  # noqa: E402

LOG_EVERY, SAVE_EVERY = 20, 250
COLUMNS = ("step", "tokens", "loss", "text_nll", "answer_nll", "lr_scale", "seconds")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--texts", type=Path, help="folder of *.jsonl.gz texts; without it only Python's own library is read")
    add("--out", type=Path, required=True)
    add("--tokens", type=float, default=14e6, help="length of the run")
    add("--pool", type=float, default=24e6, help="tokens of prepared data; part of what decides the numbers")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=16, help="rows of one step")
    add("--lr", type=float, default=4e-3, help="of AdamW: embedding, head, norms, biases")
    add("--muon-lr", type=float, default=0.02, help="of Muon: the matrices; 0: AdamW for all")
    add("--warmup", type=int, default=40, help="steps")
    add("--decay", type=float, default=0.4, help="share of the run in which the learning rate falls to zero")
    add("--threads", type=int, default=1)
    add("--no-compile", action="store_true")
    add("--stop-after", type=float, default=0.0, help="seconds; saves and stops, to be resumed")
    add("--smoke", action="store_true", help="a few steps of a toy model")
    options = parser.parse_args()
    if options.smoke:
        options.tokens, options.pool, options.batch, options.no_compile = 40 * 4 * 64, 40 * 4 * 64, 4, True
    return options


def shape_of(options: argparse.Namespace) -> Shape:
    if options.smoke:
        return Shape(vocab_size=520, hidden_size=64, num_layers=2, head_size=32, mlp_size=64, seq_length=64)
    return Shape(vocab_size=4096, hidden_size=192, num_layers=4, head_size=32, mlp_size=384, seq_length=256)


def prepare(options: argparse.Namespace, shape: Shape) -> mixture.Rows:
    """Vocabulary and rows, made once for an output folder."""
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "weights.npy").exists():
        source = texts.read(options.texts)
        num_ranks = shape.vocab_size - len(vocabulary.SPECIALS)
        chars = 200_000 if options.smoke else 6_000_000
        ranks = vocabulary.train_ranks(vocabulary.corpus(source, chars=chars, seed=options.seed), num_ranks)
        vocabulary.write(ranks, options.out / "qwen.tiktoken")
        rows = mixture.build(
            source, vocabulary.encoding(ranks), num_tokens=int(options.pool), length=shape.seq_length, seed=options.seed
        )
        mixture.save(rows, options.out)
    return mixture.load(options.out)


def lr_scale(step: int, num_steps: int, options: argparse.Namespace) -> float:
    return min((step + 1) / options.warmup, (num_steps - step) / (options.decay * num_steps), 1.0)


def batch_of(rows: mixture.Rows, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and target weights, each [B, T]. Past the end of the pool it begins again."""
    index = np.arange(step * size, (step + 1) * size) % len(rows.tokens)
    tokens = torch.from_numpy(rows.tokens[index].astype(np.int64))
    weights = torch.from_numpy(rows.weights[index].astype(np.float32))
    return tokens[:, :-1], tokens[:, 1:], weights[:, 1:]


def make_step(model: Qwen, *, compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def losses(inputs: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted mean, and the unweighted loss of each token (detached)."""
        nll = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
        return (nll * weights.flatten()).sum() / weights.sum(), nll.detach()

    return torch.compile(losses) if compiled else losses


def save_state(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


class Log:
    """`loss.csv` and a line on the terminal, every LOG_EVERY steps."""

    def __init__(self, path: Path, step: int) -> None:
        kept = path.read_text().splitlines() if step and path.exists() else [",".join(COLUMNS)]
        kept = [kept[0], *(row for row in kept[1:] if int(row.split(",")[0]) <= step)]
        path.write_text("\n".join(kept) + "\n")
        self.path, self.sums = path, np.zeros(5)
        self.seconds = float(kept[-1].split(",")[-1]) if len(kept) > 1 else 0.0
        self.began, self.first_step = time.perf_counter(), step

    def add(self, loss: Tensor, nll: Tensor, weights: Tensor) -> None:
        plain, answer = weights.flatten() == mixture.PLAIN, weights.flatten() == mixture.ANSWER
        self.sums += [loss.item(), nll[plain].sum(), plain.sum(), nll[answer].sum(), answer.sum()]

    def write(self, step: int, tokens: int, num_steps: int, scale: float) -> None:
        loss, text, num_text, answer, num_answer = self.sums
        elapsed = time.perf_counter() - self.began
        row = (step, tokens, loss / LOG_EVERY, text / max(num_text, 1), answer / max(num_answer, 1), scale)
        line = [*(f"{v:.5g}" if isinstance(v, float) else str(v) for v in row), f"{self.seconds + elapsed:.1f}"]
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(line)
        left = elapsed / (step - self.first_step) * (num_steps - step)
        rate = tokens / step * (step - self.first_step) / elapsed
        print(
            f"step {step}/{num_steps}  loss {row[2]:.3f}  text {row[3]:.3f}  answers {row[4]:.3f}  "
            f"{rate:.0f} tok/s  {left / 60:.1f} min left",
            flush=True,
        )
        self.sums[:] = 0


def train(options: argparse.Namespace) -> Path:
    """Runs (or resumes) and returns the path of the final state."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    shape = shape_of(options)
    rows = prepare(options, shape)
    model = Qwen(shape)
    optims = optimizers(model, lr=options.lr, muon_lr=options.muon_lr)
    path, step = options.out / "state.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optimizers"]):
            optim.load_state_dict(saved)
        step = state["step"]
    num_steps = int(options.tokens) // (options.batch * shape.seq_length)
    run_step = make_step(model, compiled=not options.no_compile)
    peaks = [[group["lr"] for group in optim.param_groups] for optim in optims]
    if step:
        peaks = [[options.lr] * 2, [options.muon_lr]][: len(optims)]
    log, began = Log(options.out / "loss.csv", step), time.perf_counter()

    def save() -> None:
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optims], "step": step}
        save_state(path, state)

    while step < num_steps:
        scale = lr_scale(step, num_steps, options)
        for optim, lrs in zip(optims, peaks):
            for group, lr in zip(optim.param_groups, lrs):
                group["lr"] = lr * scale
        inputs, targets, weights = batch_of(rows, step, options.batch)
        loss, nll = run_step(inputs, targets, weights)
        loss.backward()
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        step += 1
        log.add(loss.detach(), nll, weights)
        if step % LOG_EVERY == 0:
            log.write(step, step * options.batch * shape.seq_length, num_steps, scale)
        if step % SAVE_EVERY == 0:
            save()
        if options.stop_after and time.perf_counter() - began > options.stop_after:
            break
    save()
    return path


def main() -> None:
    options = arguments()
    began = time.perf_counter()
    train(options)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("texts", "out")}
    (options.out / "settings.json").write_text(json.dumps(settings, indent=1))
    print(f"done in {(time.perf_counter() - began) / 60:.1f} min")


if __name__ == "__main__":
    main()
