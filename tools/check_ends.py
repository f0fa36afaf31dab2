"""What a run of engine=vllm leaves behind, however it ends: interrupted, its engine killed, itself killed, done.

    python tools/nano_as_qwen2.py DIR
    python tools/check_ends.py --vllm PYTHON --model DIR

One run directory: each end but the last comes in the middle, and the next start resumes. Prints one JSON object: per
end the exit code, what was said of it, the stored samples, and the processes and shared memory that are left
half a minute later; then whether each sample is stored once. Exit code 1 where something is left, lost or doubled.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from leftovers import left, mapped, members
from peers import ROOT

START_S, END_S = 900, 120
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "400"}
OURS = ("vLLM", "interrupted")
FEW = 20  # samples that are stored before an end

Stop = Callable[[subprocess.Popen[str]], None]


def interrupt(driver: subprocess.Popen[str]) -> None:
    """As Ctrl-C does: every process of the terminal gets it."""
    os.killpg(driver.pid, signal.SIGINT)


def kill_engine(driver: subprocess.Popen[str]) -> None:
    """vLLM's core, a child of the driver."""
    (core,) = [pid for pid, name in members(driver.pid).items() if "EngineCor" in name]  # cut at 15 characters
    os.kill(core, signal.SIGKILL)


def kill_driver(driver: subprocess.Popen[str]) -> None:
    driver.kill()


ENDS: dict[str, Stop | None] = {
    "interrupted": interrupt, "engine killed": kill_engine, "driver killed": kill_driver, "done": None,
}  # fmt: skip


def num_stored(run_dir: Path) -> int:
    file = run_dir / "records.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def exit_code(driver: subprocess.Popen[str], timeout_s: float) -> int | None:
    """None where it hangs."""
    with suppress(subprocess.TimeoutExpired):
        return driver.wait(timeout=timeout_s)
    return None


def ended(command: list[str], run_dir: Path, stop: Stop | None) -> dict[str, Any]:
    memory, stored = set[str](), num_stored(run_dir)
    with tempfile.TemporaryFile("w+") as said:
        driver = subprocess.Popen(
            command, stdout=said, stderr=said, text=True, env=os.environ | QUIET, start_new_session=True
        )
        until = time.monotonic() + START_S
        while driver.poll() is None and time.monotonic() < until:
            memory |= mapped(driver.pid)
            if stop is not None and num_stored(run_dir) >= stored + FEW:
                stop(driver)
                break
            time.sleep(0.1)
        code = exit_code(driver, END_S if stop else START_S)
        remains = left(driver.pid, memory)
        said.seek(0)
        lines = [line.strip() for line in said if line.strip() and not line.startswith(" ")]
    row: dict[str, Any] = {
        "exit_code": code,
        "lines": len(lines),
        "said": [line for line in lines if line.startswith(OURS)],
        "stored": num_stored(run_dir),
        "mapped": len(memory),  # pieces of shared memory that were seen
        "left": remains,
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    for pid in members(driver.pid):
        os.kill(pid, signal.SIGKILL)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="python of an environment with vllm")
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--limit", type=int, default=400, help="samples")
    parser.add_argument("--ends", nargs="+", choices=list(ENDS), default=list(ENDS))
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background job children would ignore it
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        model = ["model=qwen-nano", "model.name=nano", f"model.path={arguments.model}", "model.dtype=fp32"]
        command = [arguments.vllm, "-m", "qwen_eval", "engine=vllm", "engine.memory_fraction=0.2", *model]
        command += ["engine.max_batch_size=2", "task=nano", f"limit={arguments.limit}", f"run_dir={run_dir}"]
        rows = {name: ended(command, run_dir, ENDS[name]) for name in arguments.ends}
        records = [json.loads(line)["sample_id"] for line in (run_dir / "records.jsonl").read_text().splitlines()]
    whole = len(records) == len(set(records)) == arguments.limit
    print(json.dumps({**rows, "each_sample_once": whole}, indent=1))
    return 0 if whole and not any(any(row["left"].values()) for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
