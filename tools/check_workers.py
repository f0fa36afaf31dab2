"""Two workers against one process: equal records, speed, or killed workers. Prints one JSON object.

    python tools/check_workers.py --mmlu DIR --gsm8k DIR --humaneval DIR --rounds 5
    python tools/check_workers.py --gsm8k DIR --kills 10 [--fake]

The model is the packaged miniature, in fp32, with one thread a process. The directories hold the official files;
without them the packaged samples are asked. Nothing else should run on the machine: `load` says whether something did.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from qwen_eval.config import EngineSpec, EvalSpec, ModelSpec, check
from qwen_eval.core import ChoiceLogprobs, Engine, Metric, Record, Request
from qwen_eval.engines.kinds import open_engine
from qwen_eval.engines.workers.engine import WorkersEngine
from qwen_eval.runs.evaluate import evaluate, selected, task_context
from qwen_eval.runs.run import Run
from qwen_eval.tasks.registry import build, task_class

NUM_CORES = 2
MODEL = ModelSpec(name="qwen-nano", asset="qwen-nano", dtype="fp32")
NATIVE = EngineSpec(num_threads=1)
FAKE = EngineSpec(name="fake", fake_delay_s=0.2)  # answers are hashes of the prompts, which take their time
CHECKED = {
    "mmlu": {"limit": 100},
    "gsm8k": {"limit": 256, "max_new_tokens": 64},
    "humaneval": {"limit": 24, "max_new_tokens": 48},
}
PAUSE_S = (5.0, 15.0)  # between two kills: a worker that dies three times without an answer ends the run


def spec_of(task: str, place: str | None, run_dir: Path, **keys: Any) -> EvalSpec:
    where = {"path": place} if place else {"data": "bundled"}
    spec: Any = task_class(task).Spec
    return check(EvalSpec(task=spec(name=task, **where, **keys), model=MODEL, run_dir=str(run_dir), quiet=True))


def compared(a: Run, b: Run) -> dict[str, Any]:
    """Records by id. Log-probabilities follow the batch in their last digits; nothing else may differ."""
    sides = [sorted(run.records, key=lambda record: record.sample_id) for run in (a, b)]
    pairs = list(zip(*sides, strict=True))
    return {
        "n": len(pairs),
        "equal": sum(_apart_from_rounding(x) == _apart_from_rounding(y) for x, y in pairs),
        "to the last bit": sum(x == y for x, y in pairs),
        "largest difference": max((d for x, y in pairs for d in _differences(x, y)), default=0.0),
        "metrics equal": a.metrics.keys() == b.metrics.keys()
        and all(_alike(a.metrics[k], b.metrics[k]) for k in a.metrics),
    }


def _alike(x: Metric, y: Metric) -> bool:
    """Equal but for rounding: the mass of the letters is a mean of probabilities."""
    pairs = zip(dataclasses.astuple(x), dataclasses.astuple(y))
    return all(
        math.isclose(a, b, rel_tol=1e-5) if isinstance(a, float) and isinstance(b, float) else a == b for a, b in pairs
    )


def _apart_from_rounding(record: Record) -> Record:
    answers = tuple(answer.best if isinstance(answer, ChoiceLogprobs) else answer for answer in record.answers)
    return dataclasses.replace(record, answers=answers, grade=dataclasses.replace(record.grade, values={}))  # type: ignore[arg-type]


def _differences(x: Record, y: Record) -> Iterator[float]:
    """Of the numbers that `_apart_from_rounding` leaves out."""
    yield from _apart(x.grade.values, y.grade.values)
    for a, b in zip(x.answers, y.answers, strict=True):
        if isinstance(a, ChoiceLogprobs) and isinstance(b, ChoiceLogprobs):
            yield from _apart(a.logprobs, b.logprobs)


def _apart(a: Any, b: Any) -> Iterator[float]:
    if isinstance(a, (int, float)):
        yield abs(a - b)
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys(), f"{a} and {b}"
        yield from _apart(list(a.values()), [b[key] for key in a])
    elif isinstance(a, (list, tuple)):
        for one, other in zip(a, b, strict=True):
            yield from _apart(one, other)
    else:
        assert a == b, f"{a} and {b}"


def killed(engine: WorkersEngine, spec: EvalSpec, num: int, seed: int) -> tuple[Run, int]:
    """A run during which so many workers are killed that hold unanswered requests, at random moments."""
    draw, is_over, kills = random.Random(seed), threading.Event(), [0]

    def kill() -> None:
        while kills[0] < num and not is_over.wait(draw.uniform(*PAUSE_S)):
            holding = [pid for pid, held in engine.holding.items() if held]
            if holding:
                os.kill(draw.choice(holding), signal.SIGKILL)
                kills[0] += 1

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        return evaluate(spec, lambda _: engine), kills[0]
    finally:
        is_over.set()
        thread.join()


def requests_of(spec: EvalSpec, engine: Engine) -> list[Request]:
    task = build(spec.task, task_context(spec, engine))
    return [request for s in selected(task, spec) if (request := task.request(s, ())) is not None]


def seconds(engine: Engine, requests: Sequence[Request]) -> tuple[float, float]:
    """Of the clock; and of the CPU, which other load on the machine leaves alone: the process that computes longest, or
    half of what this process, the workers and Ray take together, since there are two cores."""
    wall_s, cpu_s = time.perf_counter(), _cpu_s()
    num = sum(1 for _ in engine.run(requests))
    assert num == len(requests), f"{num} answers to {len(requests)} requests"
    time.sleep(1)  # for the tick of the clock of the CPU
    spent = [end - cpu_s[pid] for pid, end in _cpu_s().items() if pid in cpu_s]
    return time.perf_counter() - wall_s - 1, max(*spent, sum(spent) / NUM_CORES)


def _cpu_s() -> dict[int, float]:
    """CPU seconds so far of this process and all below it."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return {process.pid: sum(process.cpu_times()[:2]) for process in processes}


def speed(one: Engine, two: Engine, requests: Sequence[Request], num_rounds: int) -> dict[str, Any]:
    """Rounds in turn, the first for warming up."""
    rounds = [(seconds(one, requests), seconds(two, requests)) for _ in range(num_rounds + 1)][1:]
    found: dict[str, Any] = {"n": len(requests)}
    for number, name in enumerate(("clock", "CPU")):
        ratios = [a[number] / b[number] for a, b in rounds]
        found[f"seconds of the {name}"] = [[a[number], b[number]] for a, b in rounds]
        found[f"speed-up by the {name}"] = {"median": statistics.median(ratios), "of": [min(ratios), max(ratios)]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    for option in ("--mmlu", "--gsm8k", "--humaneval"):
        parser.add_argument(option)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fake", action="store_true", help="no model: what is killed is not the machine's to compute")
    given = parser.parse_args()
    places = {task: getattr(given, task) for task in CHECKED}
    found: dict[str, Any] = {"load before": os.getloadavg()}
    spec = FAKE if given.fake else NATIVE
    one, two = open_engine(spec, MODEL), open_engine(dataclasses.replace(spec, workers=2), MODEL)
    assert isinstance(two, WorkersEngine)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for task, keys in CHECKED.items() if not given.kills else ():
                specs = [spec_of(task, places[task], Path(folder) / f"{task}-{num}", **keys) for num in (1, 2)]
                found[task] = compared(evaluate(specs[0], lambda _: one), evaluate(specs[1], lambda _: two))
            for task in ("mmlu", "gsm8k") if given.rounds else ():
                spec = spec_of(task, places[task], Path(folder) / "speed", **CHECKED[task])
                found[f"speed of {task}"] = speed(one, two, requests_of(spec, one), given.rounds)
            if given.kills:
                keys = {"limit": 1000 if given.fake else 300, "max_new_tokens": 96}
                specs = [spec_of("gsm8k", places["gsm8k"], Path(folder) / f"kills-{n}", **keys) for n in (1, 2)]
                run, num = killed(two, specs[1], given.kills, given.seed)
                found["kills"] = {"num": num, "restarts": two.num_restarts}
                found["kills"] |= compared(evaluate(specs[0], lambda _: one), run)
    finally:
        two.close()
    print(json.dumps({**found, "load after": os.getloadavg()}, indent=1))


if __name__ == "__main__":
    main()
