"""The vLLM engine: what it hands over, and, where QWEN_EVAL_VLLM_PYTHON names an environment with vLLM, live."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_checkpoint import write_tiny_qwen2

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import Completions, EngineError, Generate, Prompt
from qwen_eval.engines.hf_tokenizer import HfTokenizer
from qwen_eval.engines.vllm.engine import VllmEngine, _guard, _options

ROOT = Path(__file__).parent.parent
PYTHON = os.environ.get("QWEN_EVAL_VLLM_PYTHON")
live = pytest.mark.skipif(PYTHON is None, reason="QWEN_EVAL_VLLM_PYTHON names no environment with vLLM")


class DyingCore:
    """Takes requests as `LLMEngine` does, answers `num_answers` of them, and is dead then."""

    def __init__(self, num_answers: int) -> None:
        self.num_answers, self.names = num_answers, list[str]()

    def add_request(self, name: str, prompt: dict[str, Any], sampling: Any) -> None:
        if len(prompt["prompt_token_ids"]) > 50:
            raise ValueError("longer than max_model_len")
        self.names.append(name)

    def step(self) -> list[Any]:
        if not self.num_answers:
            raise OSError("EngineCore encountered an issue.\nSee stack trace.")
        self.num_answers -= 1
        text = SimpleNamespace(
            text="x", token_ids=[1], finish_reason="length", stop_reason=None, cumulative_logprob=-1.0
        )
        return [SimpleNamespace(finished=True, request_id=self.names.pop(0), prompt_logprobs=None, outputs=[text])]

    def abort_request(self, names: list[str]) -> None:
        if not self.num_answers:
            raise OSError("dead")
        self.names = [name for name in self.names if name not in names]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    from transformers import AutoTokenizer

    folder = write_tiny_qwen2(tmp_path_factory.mktemp("tiny"))
    return HfTokenizer(AutoTokenizer.from_pretrained(folder))


def engine_on(core: DyingCore, tokenizer: HfTokenizer) -> VllmEngine:
    return VllmEngine(SimpleNamespace(llm_engine=core), tokenizer, lambda **words: SimpleNamespace(**words))


def test_parallel_options_are_handed_over_in_the_words_of_vllm() -> None:
    spec = EngineSpec(name="vllm", tensor_parallel=4, pipeline_parallel=2, executor="ray", max_batch_size=7)
    options = _options(spec, ModelSpec(name="m", path="DIR"))
    assert (options["tensor_parallel_size"], options["pipeline_parallel_size"]) == (4, 2)
    assert (options["distributed_executor_backend"], options["max_num_seqs"]) == ("ray", 7)
    assert "distributed_executor_backend" not in _options(EngineSpec(name="vllm"), ModelSpec(name="m", path="DIR"))


def test_a_dead_vllm_is_one_line_and_what_it_answered_before_is_had(tokenizer: HfTokenizer) -> None:
    asked = [Generate(prompt=Prompt.raw(f"q{i}"), max_new_tokens=4) for i in range(5)]
    answers = engine_on(DyingCore(2), tokenizer).run(asked)
    assert [next(answers)[0], next(answers)[0]] == [0, 1]
    with pytest.raises(
        EngineError, match=r"^vLLM has ended \(OSError: EngineCore encountered an issue\. See .* resumes"
    ):
        next(answers)


class KilledCore(DyingCore):
    """Waits for answers that nobody will send, as vLLM's client does whose core is killed, until it is told."""

    def __init__(self) -> None:
        super().__init__(1)
        self.engine_core = SimpleNamespace(
            resources=SimpleNamespace(engine_dead=False), outputs_queue=queue.Queue[Exception]()
        )

    def step(self) -> list[Any]:
        self.engine_core.resources.engine_dead = True  # by vLLM's own monitor
        raise self.engine_core.outputs_queue.get(timeout=20)


def test_a_killed_core_is_not_waited_for(tokenizer: HfTokenizer) -> None:
    engine = engine_on(KilledCore(), tokenizer)
    with pytest.raises(EngineError, match=r"^vLLM has ended \(RuntimeError: its core process has ended\)"):
        next(engine.run([Generate(prompt=Prompt.raw("q"), max_new_tokens=4)]))


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_the_core_of_a_killed_run_is_ended_and_that_of_a_closed_one_is_left_to_vllm(end: str) -> None:
    with subprocess.Popen(["sleep", "60"]) as core:
        manager = SimpleNamespace(processes=[core])
        client = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
        guard = _guard(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=client)))
        assert guard is not None
        guard.communicate(b"" if end == "killed" else b"done")  # the pipe of a killed process is closed
        if end == "killed":
            assert core.wait(timeout=20) == -9
        else:
            assert core.poll() is None
            core.kill()


def test_a_prompt_that_vllm_refuses_is_a_failed_sample_and_the_others_go_on(tokenizer: HfTokenizer) -> None:
    asked = [Generate(prompt=Prompt.raw(text), max_new_tokens=4) for text in ("a", "b" * 60, "c")]
    engine = engine_on(DyingCore(2), tokenizer)
    found = dict(engine.run(asked))
    assert sorted(found) == [0, 2]
    assert isinstance(found[0], Completions)
    assert engine.failures == {1: "vLLM refuses the prompt: longer than max_model_len"}


# --- live ------------------------------------------------------------------------------------------------------------


def told(tool: str, *arguments: str, timeout_s: float = 1200) -> dict[str, Any]:
    """What a tool prints; it fails where one of its own checks does."""
    assert PYTHON is not None
    command = [sys.executable, f"tools/{tool}", "--vllm", PYTHON, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def nano(folder: Path) -> str:
    subprocess.run([sys.executable, "tools/nano_as_qwen2.py", str(folder)], cwd=ROOT, check=True, capture_output=True)
    return str(folder)


@live
@pytest.mark.slow
def test_vllm_answers_as_the_native_engine_and_leaves_nothing_behind() -> None:
    """Every letter of every question, choices of several tokens, scored texts and generated ones, in fp32."""
    small = ["--hidden", "128", "--layers", "2", "--rounds", "1"]
    found = told("check_vllm.py", "--questions", "8", "--texts", "4", *small)
    assert (found["choices"]["n"], found["choices"]["compared"]) == (8, 32)
    assert all(row["equal"] == row["n"] for name, row in found.items() if name not in ("vllm", "left")), found
    assert max(found[name]["largest_difference"] for name in ("choices", "long choices", "scores")) < 1e-3
    assert found["left"] == {"processes": [], "shared_memory": []}


@live
@pytest.mark.slow
def test_however_a_run_ends_nothing_is_left_lost_or_doubled(tmp_path: Path) -> None:
    """Ctrl-C, kill -9 of vLLM's core and of the run itself, each in the middle; then the run is finished."""
    found = told("check_ends.py", "--model", nano(tmp_path), "--limit", "200", timeout_s=3000)
    assert found["interrupted"]["exit_code"] == 130
    assert found["engine killed"]["exit_code"] == 2
    assert found["engine killed"]["said"][0].startswith("vLLM has ended")
    assert found["done"]["exit_code"] == 0
    nothing: dict[str, list[str]] = {"processes": [], "shared_memory": []}
    assert found["done"]["mapped"] > 0  # there was something to be left
    assert [row["left"] for name, row in found.items() if name != "each_sample_once"] == [nothing] * 4
    assert found["each_sample_once"]


@live
@pytest.mark.slow
def test_vllm_itself_takes_the_parallel_options(tmp_path: Path) -> None:
    """Its own check of a configuration for four GPUs; nothing is started."""
    assert PYTHON is not None
    options = _options(
        EngineSpec(name="vllm", tensor_parallel=2, pipeline_parallel=2, executor="mp"),
        ModelSpec(name="m", dtype="fp32"),
    )
    program = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        f"args = EngineArgs(model={nano(tmp_path)!r}, **{options!r})\n"
        "found = args.create_engine_config().parallel_config\n"
        "print(found.tensor_parallel_size, found.pipeline_parallel_size, found.world_size)"
    )
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([PYTHON, "-c", program], env=quiet, capture_output=True, text=True, timeout=600)
    assert done.stdout.split()[-3:] == ["2", "2", "4"], done.stderr
