"""`engine=openai` with hundreds of requests in flight, at a scripted server with faults: rate, memory, right answers.

    python tools/bench_endpoint.py --requests 1500 --in-flight 500 --faults 0.1

The server is `tools/fault_server.py`, in its own process. Prints one JSON object. Exit code 1 where a question has no
answer, two, or a wrong one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from fault_server import letters_of
from peers import ROOT

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import ChoiceLogprobs, Choose, Prompt
from qwen_eval.engines import open_engine
from qwen_eval.engines.openai.engine import OpenAiEngine

CHOICES = (" A", " B", " C", " D")
CLOSE = 1e-9


def memory_mib(what: str) -> float:
    """Of this process: VmRSS now, VmHWM at its peak."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, what
    return round(int(found[1]) / 1024, 1)


def is_right(index: int, answer: object) -> bool:
    assert isinstance(answer, ChoiceLogprobs), type(answer)
    tops = letters_of(f"q{index}")
    return all(abs(tops[choice] - value) < CLOSE for choice, value in zip(CHOICES, answer.logprobs, strict=True))


def measured(engine: OpenAiEngine, num_requests: int) -> dict[str, float]:
    asked = [Choose(prompt=Prompt.raw(f"q{i}"), choices=CHOICES) for i in range(num_requests)]
    before, start = memory_mib("VmRSS"), time.perf_counter()
    answers = list(engine.run(asked))
    seconds = time.perf_counter() - start
    return {
        "requests": num_requests,
        "answered": len(answers),
        "twice": len(answers) - len(dict(answers)),
        "right": sum(is_right(index, answer) for index, answer in answers),
        "failed": len(engine.failures),
        "most_in_flight": engine._client.pace.most_in_flight,
        "seconds": round(seconds, 1),
        "per_s": round(len(answers) / seconds),
        "memory_before_mib": before,
        "memory_peak_mib": memory_mib("VmHWM"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--in-flight", type=int, default=500)
    parser.add_argument("--faults", type=float, default=0.1, help="share of the requests that meet a fault")
    arguments = parser.parse_args()
    command = [sys.executable, str(ROOT / "tools" / "fault_server.py"), "--port", "0"]
    command += ["--faults", str(arguments.faults)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        spec = EngineSpec(
            name="openai",
            base_url=server.stdout.readline().strip(),
            concurrency=arguments.in_flight,
            timeout_s=3.0,
            retries=8,
        )
        engine = open_engine(spec, ModelSpec(name="scripted"))
        assert isinstance(engine, OpenAiEngine)
        found = measured(engine, arguments.requests)
        engine.close()
        server.communicate("")
    print(json.dumps(found, indent=1))
    return 0 if found["right"] == found["answered"] == arguments.requests and not found["twice"] else 1


if __name__ == "__main__":
    sys.exit(main())
