"""A run over several workers gives the records of a run in one process, whatever dies on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy
from tiny_checkpoint import write_tiny_qwen2

from qwen_eval.config import EngineSpec, EvalSpec, ModelSpec, TaskSpec, check
from qwen_eval.core import (
    Answer,
    ChoiceLogprobs,
    Choose,
    ConfigError,
    EngineError,
    Generate,
    Prompt,
    Record,
    Request,
    Score,
)
from qwen_eval.engines.fake import FakeEngine
from qwen_eval.engines.kinds import deciding_keys, open_engine
from qwen_eval.engines.workers.batches import BatchQueue
from qwen_eval.engines.workers.cluster import Cluster, connect
from qwen_eval.engines.workers.engine import WorkersEngine
from qwen_eval.engines.workers.handle import ActorHandle
from qwen_eval.engines.workers.worker import EngineWorker
from qwen_eval.runs.evaluate import evaluate
from qwen_eval.runs.run import Run
from qwen_eval.tasks.registry import task_class

TOY = [sys.executable, str(Path(toy.__file__))]
MMLU = Path(__file__).parent / "data" / "mmlu"
FAKE = EngineSpec(name="fake", workers=2)


# --- without Ray -----------------------------------------------------------------------------------------------------


def asked(text: str, **keys: Any) -> Generate:
    return Generate(prompt=Prompt.raw(text), max_new_tokens=8, **keys)


def emptied(queue: BatchQueue) -> list[list[int]]:
    batches = []
    while batch := queue.take():
        batches.append(batch)
    return batches


def test_each_request_is_in_one_batch_and_late_batches_are_small() -> None:
    batches = emptied(BatchQueue([asked(f"{i:04d}") for i in range(1000)], num_workers=2))
    assert sorted(index for batch in batches for index in batch) == list(range(1000))
    assert 200 < len(batches[0]) < 300  # half of a worker's share
    assert len(batches[-2]) <= 64
    assert len(batches) < 20


def test_a_batch_ends_between_two_groups_of_common_beginnings() -> None:
    groups = [f"{name} " * 50 for name in ("law", "art", "sea")]
    requests = [asked(f"{groups[i % 3]}{i}") for i in range(300)]
    batches = emptied(BatchQueue(requests, num_workers=1))
    assert {index % 3 for index in batches[0]} == {1}  # "art", all of it, though half of all was wanted
    assert len(batches[0]) == 100


def test_a_few_requests_are_shared_by_all_workers() -> None:
    assert [len(batch) for batch in emptied(BatchQueue([asked(str(i)) for i in range(6)], num_workers=3))] == [2, 2, 2]


def test_what_is_given_back_is_asked_next() -> None:
    queue = BatchQueue([asked(f"{i:03d}") for i in range(100)], num_workers=2)
    first = queue.take()
    queue.take()
    queue.give_back(first[3:])
    assert queue.take()[0] == first[3]


def test_what_a_worker_died_over_is_asked_apart_in_small_batches() -> None:
    queue = BatchQueue([asked(f"{i:03d}") for i in range(100)], num_workers=2)
    died_over, other = queue.take(), queue.take()
    queue.give_back(died_over, most=4)
    batches = emptied(queue)
    assert all(set(batch) <= set(died_over) or not set(batch) & set(died_over) for batch in batches)
    assert {len(batch) for batch in batches if batch[0] in died_over} <= {4, len(died_over) % 4}
    assert sorted(index for batch in [*batches, other] for index in batch) == list(range(100))


class Stumbling(FakeEngine):
    """Has no answer to the requests that say so."""

    failures: dict[int, str] = {}  # noqa: RUF012

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        self.failures = {i: "refused" for i, request in enumerate(requests) if request.prompt.text == "no"}
        return ((i, self._answer(request)) for i, request in enumerate(requests) if i not in self.failures)


def worker_with(engine: FakeEngine) -> EngineWorker:
    worker = EngineWorker(FAKE, ModelSpec(name="m"), "robust", 1)
    worker._engine = engine
    return worker


def test_requests_without_an_answer_come_back_with_their_reason() -> None:
    found = worker_with(Stumbling()).more(1, [(7, asked("yes")), (8, asked("no")), (9, asked("yes"))])
    assert [index for index, _ in found.answers] == [7, 9]
    assert found.failures == {8: "refused"}


def test_an_error_of_the_engine_comes_with_the_answers_before_it() -> None:
    found = worker_with(FakeEngine(fail_at=2)).more(1, [(i, asked(str(i))) for i in range(5)])
    assert [index for index, _ in found.answers] == [0, 1]
    assert isinstance(found.error, EngineError)


def test_a_new_run_gives_up_the_batches_of_the_last() -> None:
    worker = worker_with(FakeEngine(delay_s=0.3))
    worker.more(1, [(0, asked("a")), (1, asked("b"))])
    assert [index for index, _ in worker.more(2, [(5, asked("c"))]).answers] == [5]


def test_the_number_of_workers_decides_no_number() -> None:
    assert not {"workers", "ray"} & set(deciding_keys())


def test_one_worker_is_no_worker() -> None:
    code = (
        "import sys; from qwen_eval.config import *; from qwen_eval.engines.kinds import open_engine;"
        "open_engine(EngineSpec(name='fake'), ModelSpec(name='m')); print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install 'qwen_eval\[ray\]'"):
        open_engine(FAKE, ModelSpec(name="m"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ray": "cluster"}, "engine.ray=cluster"),
        ({"ray": "ray://head:10001"}, "HOST:PORT"),  # Ray's client, which is another thing
        ({"executor": "ray"}, "engine.executor=ray"),
    ],
)
def test_what_workers_cannot_do_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_engine(dataclasses.replace(FAKE, **changes), ModelSpec(name="m"))


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    pytest.importorskip("ray", reason="the package ray is not installed")
    with pytest.raises(EngineError, match=r"^engine.ray=127.0.0.1:1: cannot be joined from this machine"):
        open_engine(dataclasses.replace(FAKE, ray="127.0.0.1:1"), ModelSpec(name="m"))


# --- with Ray: one instance for all ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="the package ray is not installed")
    opened = connect("auto")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    path = write_tiny_qwen2(tmp_path_factory.mktemp("tiny"))
    return ModelSpec(name="tiny", path=str(path), dtype="fp32", chat=True)


@pytest.fixture(scope="module")
def engines(cluster: Cluster, tiny: ModelSpec) -> Iterator[dict[int, Any]]:
    """The native engine in this process, and in two workers."""
    opened = {num: open_engine(EngineSpec(workers=num, num_threads=1), tiny) for num in (1, 2)}
    yield opened
    for engine in opened.values():
        engine.close()


def run_of(engine: Any, task: TaskSpec, run_dir: Path, **keys: Any) -> Run:
    spec = check(EvalSpec(task=task, run_dir=str(run_dir), quiet=True, **keys))
    return evaluate(spec, lambda _: engine)


def by_id(run: Run) -> list[Record]:
    return sorted(run.records, key=lambda record: record.sample_id)


def same_within(a: Record, b: Record, largest: float) -> bool:
    """Equal but for the rounding of log-probabilities, which follows the batch."""
    for one, other in zip(a.answers, b.answers, strict=True):
        if isinstance(one, ChoiceLogprobs) and isinstance(other, ChoiceLogprobs):
            assert one.logprobs == pytest.approx(other.logprobs, abs=largest)
    return dataclasses.replace(a, answers=()) == dataclasses.replace(b, answers=())


def spec_of(name: str, **keys: Any) -> TaskSpec:
    return task_class(name).Spec(**{"name": name, **keys})  # type: ignore[attr-defined, no-any-return]


def test_every_port_is_on_the_loopback_interface(cluster: Cluster) -> None:
    """Whoever reaches a port of Ray runs code as its user."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(listening) > 3
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


def test_settings_of_ray_do_not_stay_in_the_environment(cluster: Cluster) -> None:
    assert not [name for name in os.environ if name.startswith("RAY_AUTH")]  # generated code must not read a token


def test_ray_does_not_take_the_end_of_other_children_from_this_process(cluster: Cluster) -> None:
    """With SIGCHLD ignored, as one of its options does, the sandbox would wait for ever."""
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    assert subprocess.run(["sh", "-c", "exit 3"], timeout=10).returncode == 3


def test_sigterm_lets_a_run_end_its_workers(cluster: Cluster) -> None:
    """Ray's own handler ends the process at once, with a trace."""
    handler = signal.getsignal(signal.SIGTERM)
    assert callable(handler)
    with pytest.raises(SystemExit) as raised:
        handler(signal.SIGTERM, None)
    assert raised.value.code == 143


def test_choices_are_those_of_one_process(engines: dict[int, Any], tiny: ModelSpec, tmp_path: Path) -> None:
    task = spec_of("mmlu", path=str(MMLU), shots=0, subjects=["college_mathematics", "professional_law"])
    one, two = (run_of(engines[num], task, tmp_path / str(num), model=tiny) for num in (1, 2))
    assert len(one.records) > 4
    assert all(same_within(a, b, 1e-4) for a, b in zip(by_id(one), by_id(two), strict=True))
    assert one.metrics == two.metrics


def test_texts_and_programs_are_those_of_one_process(engines: dict[int, Any], tiny: ModelSpec, tmp_path: Path) -> None:
    gsm8k = spec_of("gsm8k", data="bundled", shots=0, max_new_tokens=12)
    humaneval = spec_of("humaneval", data="bundled", limit=4, max_new_tokens=12)
    for task in (gsm8k, humaneval):
        runs = [run_of(engines[num], task, tmp_path / f"{task.name}{num}", model=tiny) for num in (1, 2)]
        for one, two in zip(*map(by_id, runs), strict=True):
            assert one.answers == two.answers
            assert dataclasses.replace(one, grade=two.grade) == two
            assert one.grade.score == two.grade.score  # why a program fails may depend on the load of the machine
        assert runs[0].metrics == runs[1].metrics


def test_counts_are_the_sums_over_the_workers(engines: dict[int, Any]) -> None:
    """No prefix is shared here, so that the split does not change how much is computed."""
    requests = [asked(f"{i:03d} is a number") for i in range(40)]
    grown = {}
    for num, engine in engines.items():
        before = dict(engine.info)
        assert len(list(engine.run(requests))) == 40
        grown[num] = {key: engine.info[key] - before[key] for key in ("prompt_tokens", "generated_tokens")}
    assert grown[1] == grown[2]
    assert engines[2].info["workers"]["num"] == 2
    assert engines[2].info["weights"] == engines[1].info["weights"]


def test_hidden_states_are_kept_in_the_directory_of_the_run(
    engines: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the workers are in another one
    texts = [Score(prompt=Prompt.raw(f"a text {i}"), keep_hidden="hidden") for i in range(20)]
    assert len(list(engines[2].run(texts))) == 20
    assert len(list((tmp_path / "hidden").glob("*.safetensors"))) == 20


def test_a_place_of_non_finite_numbers_is_looked_for_by_a_worker(engines: dict[int, Any]) -> None:
    """There is none in this text, which the engine itself says."""
    assert engines[2].locate_non_finite(asked("fine")) == engines[1].locate_non_finite(asked("fine"))


def test_a_run_that_is_stopped_early_leaves_the_workers_ready(engines: dict[int, Any]) -> None:
    requests = [asked(f"question {i}") for i in range(64)]
    answers = engines[2].run(requests)
    next(answers)
    answers.close()
    again = [Choose(prompt=Prompt.raw(f"choose {i}"), choices=("A", "B")) for i in range(20)]
    assert sorted(index for index, _ in engines[2].run(again)) == list(range(20))


def test_more_workers_than_cpus_are_refused(cluster: Cluster) -> None:
    with pytest.raises(EngineError, match=r"^engine.workers=5000: this machine has \d+ CPUs; use fewer$"):
        open_engine(dataclasses.replace(FAKE, workers=5000), ModelSpec(name="m", device="cpu"))


def test_what_a_worker_refuses_is_one_line(cluster: Cluster) -> None:
    with pytest.raises(EngineError, match=r"^model.quant=nf4: not offered by engine=vllm"):
        open_engine(EngineSpec(name="vllm", workers=2), ModelSpec(name="m", quant="nf4"))


@pytest.fixture
def fakes(cluster: Cluster) -> Iterator[WorkersEngine]:
    engine = open_engine(dataclasses.replace(FAKE, fake_delay_s=0.02), ModelSpec(name="m"))
    assert isinstance(engine, WorkersEngine)
    yield engine
    engine.close()


def test_what_a_killed_worker_held_is_asked_again(fakes: WorkersEngine) -> None:
    requests: list[Request] = [asked(f"question {i}") for i in range(200)]
    expected = dict(FakeEngine().run(requests))
    found: list[tuple[int, Answer]] = []
    killed: list[int] = []
    for number, item in enumerate(fakes.run(requests)):
        found.append(item)
        if number in (20, 90):
            killed += [next(pid for pid in fakes.holding if pid not in killed)]  # the first may not be missed yet
            os.kill(killed[-1], signal.SIGKILL)
    assert len(found) == len(dict(found)) == 200  # nothing lost, nothing doubled
    assert dict(found) == expected
    assert fakes.num_restarts == 2
    assert "2 workers died" in fakes.info["warnings"][-1]  # type: ignore[index]


@contextmanager
def killing(engine: WorkersEngine, is_due: Callable[[ActorHandle], bool]) -> Iterator[list[int]]:
    """Kill each worker that has loaded its model and `is_due`; the processes that were killed."""
    killed: list[int] = []
    is_over = threading.Event()

    def kill() -> None:
        while not is_over.wait(0.02):
            for handle in engine._handles:
                if (opened := handle.opened) and opened.pid not in killed and is_due(handle):
                    killed.append(opened.pid)
                    os.kill(opened.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        is_over.set()
        thread.join()


@pytest.fixture
def slow_fakes(cluster: Cluster) -> Iterator[WorkersEngine]:
    """Longer for an answer than `killing` needs to see what they hold."""
    engine = open_engine(dataclasses.replace(FAKE, fake_delay_s=0.1), ModelSpec(name="m"))
    assert isinstance(engine, WorkersEngine)
    yield engine
    engine.close()


def test_workers_that_are_killed_before_a_large_batch_is_done_finish_with_small_ones(slow_fakes: WorkersEngine) -> None:
    requests: list[Request] = [asked(f"question {i}") for i in range(40)]
    with killing(slow_fakes, lambda handle: len(handle.held) > 4) as killed:
        found = dict(slow_fakes.run(requests))
    assert found == dict(FakeEngine().run(requests))
    assert killed
    assert not slow_fakes.failures


def test_a_request_that_kills_its_worker_has_no_answer_and_the_others_have(slow_fakes: WorkersEngine) -> None:
    requests: list[Request] = [asked(f"question {i}") for i in range(20)]
    with killing(slow_fakes, lambda handle: 13 in handle.held) as killed:
        found = dict(slow_fakes.run(requests))
    expected = dict(FakeEngine().run(requests))
    assert found == {index: answer for index, answer in expected.items() if index != 13}
    assert slow_fakes.failures == {13: "3 workers died while they answered it alone"}
    assert len(killed) <= 5


def test_a_worker_that_always_dies_ends_the_run_in_one_line(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_eval.engines.workers.handle.MAX_DEATHS", 3)
    engine = open_engine(EngineSpec(name="fake", workers=2, fake_delay_s=30.0), ModelSpec(name="m"))
    assert isinstance(engine, WorkersEngine)
    with (
        killing(engine, lambda handle: handle.number == 0 and bool(handle.held)) as killed,
        pytest.raises(EngineError, match=r'^worker 0 died 3 times .*, at last over the request that ends on "\d"'),
    ):
        list(engine.run([asked(str(i)) for i in range(8)]))
    engine.close()
    assert len(killed) == 3


def test_workers_that_die_while_they_load_the_model_end_the_run(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_eval.engines.workers.handle.MAX_STARTS", 2)
    is_over = threading.Event()

    def kill() -> None:
        while not is_over.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.cmdline()[:1] in (["ray::EngineWorker.__init__"], ["ray::EngineWorker.open"]):
                        process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with pytest.raises(EngineError, match=r"^worker \d died 2 times in a row while it loaded the model"):
            open_engine(EngineSpec(name="fake", workers=2), ModelSpec(name="m"))
    finally:
        is_over.set()
        thread.join()


# --- whole processes -------------------------------------------------------------------------------------------------


def processes_of(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            continue
    return found


def started_run(run_dir: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run over two workers with some records, and the processes below it."""
    pytest.importorskip("ray", reason="the package ray is not installed")
    command = [*TOY, "task=toy", "engine=fake", "engine.fake_delay_s=0.05", "task.num=2000", f"run_dir={run_dir}"]
    child = subprocess.Popen([*command, "engine.workers=2"], start_new_session=True, stderr=subprocess.PIPE, text=True)
    records = run_dir / "records.jsonl"
    deadline = time.monotonic() + 90
    while not (records.exists() and records.stat().st_size > 2000):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(child.pid).children(recursive=True)
    assert len(started) > 4
    return child, started


def check_ended(started: Sequence[psutil.Process]) -> None:
    deadline = time.monotonic() + 10
    while alive := [process.pid for process in started if psutil.pid_exists(process.pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


@pytest.mark.slow  # starts Ray in a process of its own
def test_an_interrupted_run_leaves_no_process_and_is_resumed(tmp_path: Path) -> None:
    child, started = started_run(tmp_path / "run")
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.strip().splitlines()[-1].startswith("interrupted; graded samples are kept")
    check_ended(started)
    records = tmp_path / "run" / "records.jsonl"
    num_kept = len(records.read_text().splitlines())
    assert 0 < num_kept < 2000
    ids = [json.loads(line)["sample_id"] for line in records.read_text().splitlines()]
    assert len(set(ids)) == num_kept


@pytest.mark.slow  # starts Ray in a process of its own
def test_a_run_whose_ray_has_died_ends_in_one_line(tmp_path: Path) -> None:
    child, started = started_run(tmp_path / "run")
    (helper,) = [process for process in started if "DashboardAgent" in " ".join(process.cmdline())]
    helper.kill()  # as the kernel does where memory is short: Ray's raylet ends itself with it, and its workers
    _, said = child.communicate(timeout=60)
    assert child.returncode == 2
    assert said.strip().splitlines()[-1].startswith("Ray's process raylet has died (killed, or out of memory); what is")
    check_ended(started)
