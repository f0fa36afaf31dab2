"""Whether two engines gave the same answers to the same requests: what `check_vllm.py` and `check_server.py` print."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from qwen_eval.core import Answer, ChoiceLogprobs, Completions, Engine, Request

CLOSE = 1e-3  # nats in fp32

Pair: TypeAlias = tuple[dict[str, Any], dict[str, Any]]  # an answer as JSON, and the other engine's


def cpu_s() -> float:
    """Processor seconds of this process and all that descend from it."""
    ticks, parents = {}, {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = entry.read_text().rsplit(")", 1)[1].split()
            parents[int(entry.parent.name)] = int(fields[1])
            ticks[int(entry.parent.name)] = int(fields[11]) + int(fields[12])
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")


def timed(engine: Engine, requests: Sequence[Request], *, rounds: int = 1, before: Any = None) -> dict[str, Any]:
    """The answers of the last round as JSON, and the seconds of each; `before` is called before each of them."""
    seconds, cpu = [], []
    for _ in range(rounds):
        if before is not None:
            before()
        start, used = time.perf_counter(), cpu_s()
        found = dict(engine.run(requests))
        seconds.append(round(time.perf_counter() - start, 3))
        cpu.append(round(cpu_s() - used, 2))
    return {"seconds": seconds, "cpu_s": cpu, "answers": [plain(found[i]) for i in range(len(requests))]}


def plain(answer: Answer) -> dict[str, Any]:
    if isinstance(answer, Completions):
        return {
            "texts": [item.text for item in answer.completions],
            "ids": [item.token_ids for item in answer.completions],
        }
    if isinstance(answer, ChoiceLogprobs):
        return {"logprobs": answer.logprobs, "best": answer.best, "bounded": answer.bounded}
    return {"logprobs": answer.logprobs, "best": answer.num_greedy, "bounded": ()}


def compared(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every number is compared: a bound with what it bounds, all others with each other. None is left out."""
    pairs = list(zip(ours, theirs, strict=True))
    return _texts_compared(pairs) if "texts" in ours[0] else _numbers_compared(pairs)


def _texts_compared(pairs: Sequence[Pair]) -> dict[str, Any]:
    unequal = [(a["texts"], b["texts"]) for a, b in pairs if _whole(a["texts"]) != _whole(b["texts"])]
    tokens = sum(len(ids) for a, _ in pairs for ids in a["ids"])
    return {"n": len(pairs), "equal": len(pairs) - len(unequal), "tokens": tokens, "unequal": unequal[:2]}


def _numbers_compared(pairs: Sequence[Pair]) -> dict[str, Any]:
    """`undecided`: the best of the second is a bound, which counts as no answer."""
    numbers = [
        (p, q, i in b["bounded"])
        for a, b in pairs
        for i, (p, q) in enumerate(zip(a["logprobs"], b["logprobs"], strict=True))
    ]
    exact = [abs(p - q) for p, q, is_bound in numbers if not is_bound]
    row = {"n": len(pairs), "equal": sum(a["best"] == b["best"] for a, b in pairs), "compared": len(exact)}
    row |= {"largest_difference": max(exact, default=0.0)}
    if len(exact) < len(numbers):
        undecided = [(a, b) for a, b in pairs if b["best"] in b["bounded"]]
        row |= {"undecided": len(undecided), "equal": row["equal"] - sum(a["best"] == b["best"] for a, b in undecided)}
        row |= {"bounds": len(numbers) - len(exact)}
        row |= {"wrong_bounds": sum(q < p - CLOSE for p, q, is_bound in numbers if is_bound)}
    return row


def is_right(rows: dict[str, Any]) -> bool:
    return all(
        row["n"] == row["equal"] + row.get("undecided", 0)
        and row.get("largest_difference", 0.0) <= CLOSE
        and not row.get("wrong_bounds")
        for row in rows.values()
    )


def _whole(texts: Sequence[str]) -> list[str]:
    """Without a character cut at the limit of new tokens: a replacement mark natively, left out by vLLM."""
    return [text.rstrip("\ufffd") for text in texts]
