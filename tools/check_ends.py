"""What a run of engine=vllm leaves behind, however it ends: interrupted, its engine killed, itself killed, done.

    python tools/nano_as_qwen2.py DIR
    python tools/check_ends.py --vllm PYTHON --model DIR

One run directory: each end but the last comes in the middle, and the next start resumes. Prints one JSON object: per
end the exit code, the last line that was said, the stored samples, and the processes and shared memory that are left
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
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import ROOT

SHARED_MEMORY = Path("/dev/shm")
START_S, END_S, LEFT_S = 900, 120, 30
FEW = 20  # samples that are stored before an end

Stop = Callable[[subprocess.Popen[str], "Family"], None]


class Family:
    """The processes of one start: they inherit a word in their environment."""

    def __init__(self) -> None:
        self.word = f"QWEN_EVAL_CHECK={uuid.uuid4().hex}"
        self.shared_before = set(os.listdir(SHARED_MEMORY))

    @property
    def environment(self) -> dict[str, str]:
        name, value = self.word.split("=")
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "400"}
        return {**os.environ, **quiet, name: value}

    def members(self) -> dict[int, str]:
        """Command line by process id; a process that has ended and is not waited for is none."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.word.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "comm").read_text().strip()
            except OSError:
                continue
        return found

    def left(self) -> dict[str, list[str]]:
        """After waiting for the last of them."""
        until = time.monotonic() + LEFT_S
        while True:
            shared = sorted(set(os.listdir(SHARED_MEMORY)) - self.shared_before)
            members = self.members()
            if not (members or shared) or time.monotonic() > until:
                return {"processes": sorted(members.values()), "shared_memory": shared}
            time.sleep(0.5)


def interrupt(driver: subprocess.Popen[str], family: Family) -> None:
    """As Ctrl-C does: every process of the terminal gets it."""
    os.killpg(driver.pid, signal.SIGINT)


def kill_engine(driver: subprocess.Popen[str], family: Family) -> None:
    """vLLM's core, a child of the driver."""
    (core,) = [pid for pid, name in family.members().items() if "EngineCore" in name]
    os.kill(core, signal.SIGKILL)


def kill_driver(driver: subprocess.Popen[str], family: Family) -> None:
    driver.kill()


ENDS: dict[str, Stop | None] = {
    "interrupted": interrupt, "engine killed": kill_engine, "driver killed": kill_driver, "done": None,
}  # fmt: skip


def num_stored(run_dir: Path) -> int:
    file = run_dir / "records.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def ended(command: list[str], run_dir: Path, stop: Stop | None) -> dict[str, Any]:
    family, stored = Family(), num_stored(run_dir)
    with tempfile.TemporaryFile("w+") as said:
        driver = subprocess.Popen(
            command, stdout=said, stderr=said, text=True, env=family.environment, start_new_session=True
        )
        until = time.monotonic() + START_S
        while stop is not None and driver.poll() is None and time.monotonic() < until:
            if num_stored(run_dir) >= stored + FEW:
                stop(driver, family)
                break
            time.sleep(0.05)
        code = driver.wait(timeout=END_S if stop else START_S)
        left = family.left()
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
    row = {"exit_code": code, "lines": len(lines), "said": lines[-1:], "stored": num_stored(run_dir), "left": left}
    for pid in family.members():
        os.kill(pid, signal.SIGKILL)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="python of an environment with vllm")
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--limit", type=int, default=400, help="samples")
    parser.add_argument("--ends", nargs="+", choices=list(ENDS), default=list(ENDS))
    arguments = parser.parse_args()
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
