"""Play a new user: the wheel in an empty environment and an empty directory, then docs/first_hour.md word by word.

    python tools/new_user.py [--python PYTHON] [--here] [--keep DIR]

Builds the wheel, installs it with the pins of constraints.txt into a fresh environment, writes the files that the page
shows, runs its commands, and fails where one fails or does not print what the page says it prints. The README may show
the output of a command of that page, under `$ COMMAND`: it is compared, too. `--here` uses the package of the running
interpreter instead: quick, for writing the page; `--keep DIR` leaves what the commands printed in DIR/printed.md.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "first_hour.md"
README = ROOT / "README.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"`([\w./-]+\.\w+)`:$")
COMMAND_S = 180
INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Step:
    """One block of the page."""

    kind: Literal["file", "command", "interrupted", "printed"]
    text: str
    name: str = ""


def steps(page: str) -> Iterator[Step]:
    """The blocks of the page in their order; a block after `<!-- Ctrl-C -->` is interrupted while it runs."""
    end = 0
    for found in BLOCK.finditer(page):
        before, language, body = page[end : found.start()].strip().rpartition("\n")[2], found[1], found[2]
        end = found.end()
        name = FILE_NAME.search(before)
        if language == "text":
            yield Step(kind="printed", text=body)
        elif language and name:
            yield Step(kind="file", text=body, name=name[1])
        elif not language:
            kind: Literal["command", "interrupted"] = "interrupted" if before == "<!-- Ctrl-C -->" else "command"
            for line in body.splitlines():
                if not line.startswith("pip "):  # installing is what `install` does, from the wheel
                    yield Step(kind=kind, text=line)


def play(directory: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Every step of the page in `directory`: command -> output. SystemExit names the first that fails."""
    output, outputs = "", {}
    for step in steps(PAGE.read_text(encoding="utf-8")):
        if step.kind == "file":
            path = directory / step.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.text, encoding="utf-8")
        elif step.kind == "printed":
            compare(step.text, output)
        else:
            start = time.perf_counter()
            run = _interrupt if step.kind == "interrupted" else _run
            output = outputs[step.text] = run(step.text, directory, environment)
            print(f"{time.perf_counter() - start:6.1f} s  {step.text}", flush=True)
    return outputs


def shown_in_readme(outputs: Mapping[str, str]) -> None:
    """SystemExit where a block of the README that begins with `$ COMMAND` is not what the command printed."""
    for step in steps(README.read_text(encoding="utf-8")):
        command, _, text = step.text.removeprefix("$ ").partition("\n")
        if step.kind == "printed":
            compare(text, outputs[command])


def compare(shown: str, output: str) -> None:
    missing = [line for line in shown.splitlines() if _plain(line) not in _plain(output)]
    if missing:
        raise SystemExit(f"{output}\nnot printed: {missing}")


def _plain(text: str) -> str:
    """Without runs of blanks and with every number as 0."""
    return re.sub(r"\d[\d,]*(?:\.\d+)?", "0", " ".join(text.split()))


def _run(command: str, directory: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-c", command], cwd=directory, env=environment, capture_output=True, text=True, timeout=COMMAND_S
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\n{command}: exit code {done.returncode}")
    return done.stdout


def _interrupt(command: str, directory: Path, environment: Mapping[str, str]) -> str:
    """Ctrl-C as a terminal sends it, once a first answer is recorded."""
    known = set(directory.rglob("records.jsonl"))
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=directory, env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + COMMAND_S
        while process.poll() is None and time.monotonic() < deadline:
            if any(path.stat().st_size for path in set(directory.rglob("records.jsonl")) - known):
                os.killpg(process.pid, signal.SIGINT)
                break
            time.sleep(0.05)
        code = process.wait(COMMAND_S)
        log.seek(0)
        output = log.read()
    if code != INTERRUPTED or "Traceback" in output:
        raise SystemExit(f"{output}\n{command}: exit code {code} after Ctrl-C, wanted {INTERRUPTED} and no traceback")
    return output


def install(directory: Path, python: str) -> Path:
    """A fresh environment that has the wheel and what it asks for; returns its bin directory."""
    subprocess.run([python, "-m", "venv", str(directory / "venv")], check=True)
    bin_ = directory / "venv" / "bin"
    pip = [str(bin_ / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(directory / "dist"), str(ROOT)], check=True)
    (wheel,) = (directory / "dist").glob("qwen_eval-*.whl")
    done = subprocess.run([*pip, "install", *constraints, str(wheel)], check=True, capture_output=True, text=True)
    if "does not provide the extra" in done.stderr:
        raise SystemExit(done.stderr)
    return bin_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the fresh environment")
    parser.add_argument("--here", action="store_true", help="use the package of this interpreter")
    parser.add_argument("--keep", type=Path, help="work in this directory and leave it")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background job children would ignore it
    with tempfile.TemporaryDirectory() as scratch:
        place = (options.keep or Path(scratch)).resolve()
        home, work = place / "home", place / "work"
        for directory in (home, work):
            directory.mkdir(parents=True)
        start = time.perf_counter()
        bin_ = Path(sys.executable).parent if options.here else install(place, options.python)
        print(f"{time.perf_counter() - start:6.1f} s  installed", flush=True)
        outputs = play(work, {"PATH": f"{bin_}:/usr/bin:/bin", "HOME": str(home), "COLUMNS": "100", "LANG": "C.UTF-8"})
        printed = "".join(f"```text\n$ {command}\n{output}```\n\n" for command, output in outputs.items())
        (place / "printed.md").write_text(printed, encoding="utf-8")
        shown_in_readme(outputs)
        print(f"{time.perf_counter() - start:6.1f} s  in all")


if __name__ == "__main__":
    main()
