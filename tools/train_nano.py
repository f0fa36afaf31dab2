"""Train qwen-nano, a miniature Qwen v1, from scratch on a CPU.

    python tools/train_nano.py --texts FOLDER --out build/nano --threads 2

Deterministic from `--seed` (same machine, same number of threads). A killed run goes on where its last checkpoint
stands when the same command is given again. The learning rate is constant until the last `--decay` share of
`--tokens`, falls to zero, and in the `--last` tokens once more from `--last-lr` of it. The data does not depend on
`--tokens`, so runs of different lengths share their beginning.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from nano import mixture, texts, vocabulary  # noqa: E402
from nano.model import Qwen, Shape  # noqa: E402
from nano.optimizer import optimizers  # noqa: E402
from nano.structure import structured  # noqa: E402

LOG_EVERY, SAVE_EVERY = 20, 250
COLUMNS = ("step", "tokens", "loss", "text_nll", "answer_nll", "lr_scale", "seconds")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--texts", type=Path, help="folder of *.jsonl.gz texts; without it only Python's own library is read")
    add("--out", type=Path, required=True)
    add("--tokens", type=float, default=20e6, help="length of the run")
    add(
        "--pool",
        type=float,
        default=23e6,
        help="tokens of prepared data of the second stage; part of what decides the numbers",
    )
    add("--first", type=float, default=1.8e6, help="tokens of the first stage of the mixture")
    add("--last", type=float, default=0.6e6, help="tokens of the last stage, after --tokens, at --last-lr")
    add("--last-lr", type=float, default=0.25, help="share of the learning rates at the beginning of the last stage")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=8, help="rows of one step")
    add("--lr", type=float, default=1.5e-3, help="of AdamW")
    add("--muon-lr", type=float, default=0.016, help="of Muon, for the matrices in the second stage; 0: AdamW for all")
    add("--warmup", type=int, default=40, help="steps")
    add("--decay", type=float, default=0.4, help="share of the run in which the learning rate falls to zero")
    add("--threads", type=int, default=1)
    add("--no-compile", action="store_true")
    add("--stop-after", type=float, default=0.0, help="seconds; saves and stops, to be resumed")
    add("--smoke", action="store_true", help="a few steps of a toy model")
    options = parser.parse_args(argv)
    if options.smoke:
        options.tokens = options.pool = 40 * 4 * 64
        options.first, options.last = 30 * 4 * 64, 16 * 4 * 64
        options.batch, options.no_compile, options.warmup, options.lr = 4, True, 5, 4e-3
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
            source, vocabulary.encoding(ranks), num_tokens=int(options.pool), first_tokens=int(options.first),
            last_tokens=int(options.last), length=shape.seq_length, seed=options.seed,
        )  # fmt: skip
        mixture.save(rows, options.out)
    return mixture.load(options.out)


def lr_scale(step: int, main_steps: int, num_steps: int, options: argparse.Namespace) -> float:
    if step >= main_steps:
        return float(options.last_lr) * (num_steps - step) / (num_steps - main_steps)
    return min((step + 1) / options.warmup, (main_steps - step) / (options.decay * main_steps), 1.0)


def batch_of(rows: mixture.Rows, step: int, size: int, main_steps: int, num_steps: int) -> tuple[Tensor, ...]:
    """Inputs, targets and target weights, each [B, T]. The pool is read round and round, the last stage once."""
    if step < main_steps:
        num_last = (num_steps - main_steps) * size
        index = np.arange(step * size, (step + 1) * size) % (len(rows.tokens) - num_last)
    else:
        index = np.arange(size) - (num_steps - step) * size
    tokens = torch.from_numpy(rows.tokens[index].astype(np.int64))
    weights = torch.from_numpy(rows.weights[index].astype(np.float32))
    return tokens[:, :-1], tokens[:, 1:], weights[:, 1:]


def make_step(model: Qwen, *, compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def losses(inputs: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted mean, and the unweighted loss of each token (detached)."""
        nll = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
        return (nll * weights.flatten()).sum() / weights.sum(), nll.detach()

    return torch.compile(losses) if compiled else losses


class Log:
    """`loss.csv` and a line on the terminal, every LOG_EVERY steps."""

    def __init__(self, path: Path, step: int, sums: Sequence[float] | None = None) -> None:
        kept = path.read_text().splitlines() if step and path.exists() else [",".join(COLUMNS)]
        kept = [kept[0], *(row for row in kept[1:] if int(row.split(",")[0]) <= step)]
        path.write_text("\n".join(kept) + "\n")
        self.path, self.sums = path, np.array(sums or [0.0] * 5)
        self.seconds = float(kept[-1].split(",")[-1]) if len(kept) > 1 else 0.0
        self.began, self.first_step = time.perf_counter(), step

    def add(self, loss: Tensor, nll: Tensor, weights: Tensor) -> None:
        plain, answer = weights.flatten() == mixture.PLAIN, weights.flatten() >= mixture.ANSWER
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


class Run:
    """Model, optimisers and the place reached: everything that a resumed run needs to give the same numbers."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads)
        self.options, self.shape = options, shape_of(options)
        self.rows = prepare(options, self.shape)
        self.model = Qwen(self.shape)
        structured(self.model, options.seed, vocabulary.twins(vocabulary.read(options.out / "qwen.tiktoken")))
        tokens_a_step = options.batch * self.shape.seq_length
        self.main_steps = int(options.tokens) // tokens_a_step
        self.num_steps = self.main_steps + int(options.last) // tokens_a_step
        self.second_stage = int(options.first) // tokens_a_step
        self.path, self.step, sums = options.out / "state.pt", 0, None
        state = torch.load(self.path, weights_only=True) if self.path.exists() else None
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.step, sums = state["step"], state.get("sums")
        self.open_optimizers(self.step > self.second_stage)
        if state is not None:
            for optim, saved in zip(self.optims, state["optimizers"]):
                optim.load_state_dict(saved)
        self.log = Log(options.out / "loss.csv", self.step, sums)
        self.losses = make_step(self.model, compiled=not options.no_compile)

    def open_optimizers(self, is_second_stage: bool) -> None:
        """AdamW alone while the circuits settle, then Muon, which reads running text better, for the matrices."""
        options = self.options
        self.optims = optimizers(self.model, lr=options.lr, muon_lr=options.muon_lr if is_second_stage else 0.0)
        self.peaks = [[group["lr"] for group in optim.param_groups] for optim in self.optims]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optim.state_dict() for optim in self.optims],
            "step": self.step,
            "sums": self.log.sums.tolist(),
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def advance(self) -> None:
        """One step: learning rate, losses, update, log."""
        if self.step == self.second_stage:
            self.open_optimizers(True)
        scale = lr_scale(self.step, self.main_steps, self.num_steps, self.options)
        for optim, peaks in zip(self.optims, self.peaks):
            for group, peak in zip(optim.param_groups, peaks):
                group["lr"] = peak * scale
        inputs, targets, weights = batch_of(self.rows, self.step, self.options.batch, self.main_steps, self.num_steps)
        loss, nll = self.losses(inputs, targets, weights)
        loss.backward()
        for optim in self.optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        self.step += 1
        self.log.add(loss.detach(), nll, weights)
        if self.step % LOG_EVERY == 0:
            self.log.write(self.step, self.step * inputs.numel(), self.num_steps, scale)


def train(options: argparse.Namespace) -> Path:
    """Runs (or resumes) and returns the path of the final state."""
    run, began = Run(options), time.perf_counter()
    (options.out / "shape.json").write_text(json.dumps(asdict(run.shape)))
    while run.step < run.num_steps:
        run.advance()
        if run.step % SAVE_EVERY == 0:
            run.save()
        if options.stop_after and time.perf_counter() - began > options.stop_after:
            break
    run.save()
    return run.path


def main() -> None:
    options = arguments()
    began = time.perf_counter()
    torch.use_deterministic_algorithms(True)  # compiled threads add up the gradients of embeddings in any order else
    train(options)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("texts", "out")}
    (options.out / "settings.json").write_text(json.dumps(settings, indent=1))
    print(f"done in {(time.perf_counter() - began) / 60:.1f} min")


if __name__ == "__main__":
    main()
