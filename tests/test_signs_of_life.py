"""What a command shows while it works: a changing line on a terminal, whole lines in a log, nothing with quiet."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from terminal_run import OURS, PAGE, frames, in_log, in_terminal, kept, kind
from tiny_checkpoint import write_tiny_qwen2

from qwen_eval import activity
from qwen_eval.activity import Stage, stage, watched_by
from qwen_eval.runs import progress
from qwen_eval.runs.progress import LogDisplay, log_line, shown, terminal_line
from qwen_eval.terminal import text_width


def asking(*, done: int, read: int = 0, written: int = 0, before: int = 0) -> tuple[Stage, float]:
    """Fifty samples, and the time ten seconds after they were begun."""
    found = Stage(text="gsm8k · qwen-7b-chat", total=50, unit="samples", num_before=before)
    if done:
        found.advance(done, read=read, written=written)
    return found, found.start_s + 10


def test_a_line_of_a_log_has_what_is_done_the_rate_the_time_left_and_both_kinds_of_tokens() -> None:
    assert log_line(*asking(done=20, read=12_345, written=8_123)) == (
        "gsm8k · qwen-7b-chat: 20/50 samples, 2 samples/s, 0:15 left, read 12,345 tokens, wrote 8,123"
    )
    assert log_line(*asking(done=0)) == "gsm8k · qwen-7b-chat: 0/50 samples"


def test_what_an_earlier_session_did_is_no_part_of_the_rate() -> None:
    assert log_line(*asking(done=10, before=30)) == "gsm8k · qwen-7b-chat: 40/50 samples, 1 samples/s, 0:10 left"


def test_weights_are_read_in_bytes() -> None:
    reading = Stage(text="reading the weights", total=15.4e9, unit="bytes")
    reading.advance(3.2e9)
    now = reading.start_s + 4
    assert log_line(reading, now) == "reading the weights: 3.2/15.4 GB, 800 MB/s, 0:15 left"


def test_an_engine_that_counts_as_it_goes_shows_life_before_the_first_sample_is_done() -> None:
    waiting = Stage(text="t", total=2, unit="samples", tokens=lambda: (100, 7))
    assert log_line(waiting, waiting.start_s + 1) == "t: 0/2 samples, read 100 tokens, wrote 7"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_a_line_of_a_terminal_fits_it(width: int) -> None:
    long = Stage(text="数据集 · qwen2.5-7b-instruct", total=14_042, unit="samples")
    long.advance(13_000, read=12_345_678, written=912_345, note="a note that says more than there is room for")
    line = terminal_line([long], width, long.start_s + 100)
    assert text_width(line) <= max(width, text_width(long.text))
    assert line.startswith(long.text)


def test_eighty_columns_hold_bar_rate_time_and_tokens() -> None:
    stage_, now = asking(done=20, read=12_345, written=8_123)
    line = terminal_line([stage_], 80, now)
    assert re.fullmatch(r"gsm8k · qwen-7b-chat  ━+─+  20/50  2/s  0:15 left  read 12.3k wrote 8.1k", line)


def test_a_step_within_is_named_beside_the_bar_of_the_whole() -> None:
    whole, now = asking(done=20)
    assert terminal_line([whole, Stage(text="warming up")], 80, now).startswith("warming up  ━")


def test_a_log_gets_a_line_while_a_stage_lasts_and_none_for_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.3)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.3)
    out = io.StringIO()
    display = LogDisplay(out)
    with watched_by(display):
        with stage("short"):
            pass
        with stage("long"):
            wait_for(lambda: out.getvalue().count("\n") >= 3)
        with stage("brief", is_brief=True):
            pass
    display.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "long"
    assert all(re.fullmatch(r"long(: \d+ s)?", line) for line in lines)


def wait_for(is_so: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.02)


def test_nobody_watches_unless_a_command_asks_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(is_quiet=True), stage("work"):
        assert activity._watchers == []
    assert capsys.readouterr() == ("", "")


# --- whole commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    return in_terminal(tmp_path_factory.mktemp("terminal"))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    return in_log(tmp_path_factory.mktemp("log"))


def test_a_terminal_shows_every_stage_and_keeps_the_result_alone(drawn: str) -> None:
    lines = frames(drawn)
    stages = ["checking the configuration", "reading the rows of nano", "loading qwen-nano", "reading the weights",
              "nano · qwen-nano", "packing the prompts"]  # fmt: skip
    at = [[kind(line) for line in lines].index(stage) for stage in stages]
    assert at == sorted(at)
    assert max(map(text_width, lines)) <= 80
    assert kept(drawn).startswith("nano · qwen-nano · n=60")
    assert not any(stage in kept(drawn) for stage in stages[:4])


def test_a_log_has_whole_lines_and_standard_output_the_result_alone(log: subprocess.CompletedProcess[str]) -> None:
    assert log.returncode == 0, log.stderr
    assert "\r" not in log.stderr + log.stdout
    assert "loading qwen-nano" in log.stderr  # torch alone takes longer than a stage may without a line
    assert log.stdout.startswith("nano · qwen-nano · n=60")


def test_the_page_shows_what_a_run_shows(drawn: str, log: subprocess.CompletedProcess[str]) -> None:
    """Numbers differ by machine, and lines that come by the clock may be others; the stages and the table are these."""
    terminal, table, logged = re.findall(r"```text\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    assert {kind(line) for line in terminal.splitlines()} == {kind(line) for line in frames(drawn)}
    assert without_numbers(table) == without_numbers(kept(drawn))
    assert without_numbers(table) == without_numbers(log.stdout.strip())
    asking = r"nano · qwen-nano: \d+/60 samples(, .* samples/s, \d+:\d\d left)?(, read .*)?"
    known = re.compile(rf"(reading|loading|checking) .*|{asking}")
    assert all(known.fullmatch(line) for line in (*logged.splitlines(), *log.stderr.splitlines()))


def without_numbers(text: str) -> list[str]:
    """The words of a table: what stands before the first number of each line, without its warnings."""
    lines = text.partition("\n  ")[0].splitlines()
    return [re.split(r"\s{2,}|\d", line)[0] for line in lines]


@pytest.mark.slow
def test_quiet_is_quiet_whatever_libraries_have_to_say(tmp_path: Path) -> None:
    """In a process of its own, since libraries speak as they are imported: transformers, and its bar of the weights."""
    write_tiny_qwen2(tmp_path / "m")
    call = [sys.executable, "-m", "qwen_eval", "engine=hf", "model.path=m", "model.name=m", "task=nano", "limit=2",
            "task.max_new_tokens=2", "quiet=true"]  # fmt: skip
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, env=OURS)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"runs/eval/nano/m/default: .*\n", done.stdout)
