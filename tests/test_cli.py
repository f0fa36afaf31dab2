"""A mistake on the command line costs a second and a line; lists and grids mean what they look like."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import toy
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException
from unhurried import SAYS_NO_STAGES

from qwen_eval import __version__
from qwen_eval.__main__ import main
from qwen_eval.cli import bracket_lists, compose, conf_dir, list_keys, model_first, text_keys
from qwen_eval.cli.mistakes import explain
from qwen_eval.config import EvalSpec
from qwen_eval.quantize.__main__ import main as quantize
from qwen_eval.quantize.config import QuantizeSpec
from qwen_eval.report.__main__ import main as report
from qwen_eval.report.config import ReportSpec


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in an empty directory, in this process: starting one takes longer than most of the tests."""
    monkeypatch.chdir(tmp_path)
    toy.register()

    def call(*arguments: str) -> Done:
        code = main(list(arguments))
        said = capfd.readouterr()
        return Done(code, said.out, said.err)

    return call


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["task=mmlv"], 'task=mmlv: unknown; did you mean "mmlu"?'),
        (["modle=x"], 'modle: no such key; did you mean "model"?'),
        (["model.dtype=fp17"], 'model.dtype=fp17: unknown; did you mean "fp16"? one of auto, bf16, fp16, fp32'),
        (["model.dtyp=fp16"], 'model.dtyp: no such key; did you mean "model.dtype"?'),
        (["task.max_new_token=3"], 'task.max_new_token: no such key; did you mean "task.max_new_tokens"?'),
        (["experiment=x"], "experiment=x: unknown; one of bnb_table, long_context_ablation, quantization_table"),
        (["+tricks=x"], "tricks=x: unknown; one of ntk, ntk_logn, ntk_logn_window, plain"),
        (["precision=x"], "precision=x: unknown; one of "),
        (["engine=~x"], "engine=~x: unknown; one of "),
        (["experimnt=x"], 'experimnt: no such key; did you mean "experiment"?'),
        (
            ["tag=a,b"],
            "tag=a,b: several values; add -m to run each of them. One value with a comma is written \"tag='a,b'\"",
        ),
        (["engine=nativ"], 'engine=nativ: unknown; did you mean "native"?'),
        (["engine.max_batch_size=0"], "engine.max_batch_size=0: must be at least 1"),
        (["limit=many"], "task.limit=many: a number of samples, at least 1, or a share"),
        (["limit=0"], "task.limit=0: a number of samples, at least 1"),
        (["protocol=upsteam"], 'did you mean "upstream"?'),
        (["tag=../x"], "must be a plain file name"),
        (["task.num"], "task.num: not of the form key=value"),
        (["--limit", "3"], "options are written key=value"),
    ],
)
def test_a_mistake_is_one_line_with_the_way_out(
    tmp_path: Path, command: Command, arguments: list[str], said: str
) -> None:
    done = command("task=toy", "model=toy", "engine=fake", *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("launcher", "package"), [("submitit_slurm", "'qwen_eval[submitit]'"), ("ray", "hydra-ray-launcher")]
)
def test_a_launcher_that_is_not_installed_is_told_with_its_package(launcher: str, package: str) -> None:
    error = MissingConfigException("", missing_cfg_file=f"hydra/launcher/{launcher}", options=["basic"])
    said = f"hydra/launcher={launcher} needs a package that is not here: pip install {package}"
    assert explain(error, EvalSpec) == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["+trick=ntk"], 'trick: no such key; did you mean "tricks"?'),
        (["+expirement=long_context_ablation"], 'expirement: no such key; did you mean "experiment"?'),
        (["+modle.dtype=fp32"], 'modle: no such key; did you mean "model"?'),
        (
            ["++model.rope.dynamic_ntkk=true"],
            'model.rope.dynamic_ntkk: no such key; did you mean "model.rope.dynamic_ntk"?',
        ),
        (["+task._target_=os.system"], "task._target_: no such key"),
        (["+engine.max_batch=3"], 'engine.max_batch: no such key; did you mean "engine.max_batch_size"?'),
        (["++limits=3"], 'limits: no such key; did you mean "limit"?'),
        (["task=toy"], "task= is given twice: toy and toy; give it once, or sweep both with -m"),
        (["limit=3", "++limit=4"], "limit= is given twice: 3 and 4"),
        (["limit=3", "task.limit=4"], "limit=3 and task.limit=4: two values for one setting"),
        (
            ["task.path=${oc.env:HOME}/data"],
            "task.path=${oc.env:HOME}/data: not filled in, since every setting is recorded",
        ),
        (["task.subjects=[a,'${oc.env:HOME}']"], "task.subjects.1=${oc.env:HOME}: not filled in"),
    ],
)
def test_what_hydra_lets_pass_is_an_error_too(
    tmp_path: Path, command: Command, arguments: list[str], said: str
) -> None:
    done = command("task=toy", "model=toy", "engine=fake", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_of_an_experiment_is_an_error(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "short.yaml").write_text("# @package _global_\ntask:\n  nmu: 3\n")
    done = command("hydra.searchpath=[file://conf]", "task=toy", "model=toy", "engine=fake", "+experiment=short")
    assert done.returncode == 2
    assert 'task.nmu: no such key; did you mean "task.num"?' in done.stderr


def test_a_known_key_may_be_written_with_a_plus(tmp_path: Path, command: Command) -> None:
    arguments = ["++task.num=3", "+model.arch.hidden_size=64", "+tricks=ntk", "run_dir=r"]
    done = command("task=toy", "model=toy", "engine=fake", *arguments)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "r" / "spec.json").read_text())["config"]
    assert (config["task"]["num"], config["model"]["arch"]) == (3, {"hidden_size": 64})


@pytest.mark.parametrize("typo", ["task=mmlv", "modle=x", "model.dtype=fp17"])
def test_a_typo_loads_nothing_heavy(tmp_path: Path, typo: str) -> None:
    code = SAYS_NO_STAGES + (
        "import sys, time; from qwen_eval.__main__ import main; main(sys.argv[1:]);"
        "print(time.process_time(), *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, typo], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    cpu_s, *modules = done.stdout.split()
    heavy = {"torch", "transformers", "datasets", "pandas", "scipy", "matplotlib", "numpy"}
    assert not heavy & set(modules)
    assert done.stderr.count("\n") == 1
    assert float(cpu_s) < 2.5  # half a second on an idle machine; a busy one slows even the processor's time


def test_a_run_leaves_only_its_run_directory(tmp_path: Path, command: Command) -> None:
    done = command("task=toy", "model=toy", "engine=fake", "limit=8", "seed=3")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "accuracy" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    run = tmp_path / "runs" / "eval" / "toy" / "toy" / "default"
    assert sorted(path.name for path in run.iterdir()) == [".lock", "records.jsonl", "result.json", "spec.json"]
    spec = json.loads((run / "spec.json").read_text())
    assert (spec["config"]["task"]["limit"], spec["config"]["task"]["seed"]) == (8, 3)


def test_a_list_needs_no_brackets(tmp_path: Path, command: Command) -> None:
    done = command("task=toy", "model=toy", "engine=fake", "task.levels=1,2", "task.subjects=甲", "run_dir=r")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "r" / "spec.json").read_text())["config"]
    assert (config["task"]["levels"], config["task"]["subjects"]) == ([1, 2], ["甲"])


def test_a_switch_is_written_plainly(tmp_path: Path, command: Command) -> None:
    done = command(
        "task=toy", "model=toy", "engine=fake", "model.logn=false", "model.rope.dynamic_ntk=true", "run_dir=r"
    )
    assert done.returncode == 0, done.stderr
    model = json.loads((tmp_path / "r" / "spec.json").read_text())["config"]["model"]
    assert (model["logn"], model["rope"]["dynamic_ntk"]) == ("false", "true")


@pytest.mark.parametrize(
    "text", ["You're terse, and count.", "Answer in \\\\boxed{}, [x]", 'Say "\\\\', "null", "你好 = 1"]
)
def test_a_system_message_is_a_sentence_and_no_grammar(tmp_path: Path, command: Command, text: str) -> None:
    done = command("task=toy", "model=toy", "engine=fake", f"model.system={text}", "model.thinking=off", "run_dir=r")
    assert done.returncode == 0, done.stderr
    model = json.loads((tmp_path / "r" / "spec.json").read_text())["config"]["model"]
    assert (model["system"], model["thinking"]) == (None if text == "null" else text, "off")


TEXTS = ("a=b", "a b", "a$x", "a[1]", "[1]x", "a(1)", "数据/ü", "-x", "it's", 'a"b', "a\\b", "#a", "~x", "1e5", "1.10",
         "007", "true", "inf", "a;b|c&d", "<a>", "{a}")  # fmt: skip


@pytest.mark.parametrize("key", ["model.name", "model.path", "model.revision", "engine.base_url", "task.hub_id"])
def test_a_text_arrives_as_it_was_written(key: str) -> None:
    lists, texts = list_keys(EvalSpec), text_keys(EvalSpec)
    parser = OverridesParser.create()
    for text in TEXTS:
        (word,) = bracket_lists([f"{key}={text}"], lists, texts)
        assert parser.parse_override(word).value() == text, word


def test_a_comma_in_a_path_is_part_of_it_and_parts_two_in_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "x,y").mkdir()
    for command, key, given, expected in (
        ("quantize", "out", "a,b", "a,b"),
        ("report", "out", "a.md,b.md", ["a.md", "b.md"]),
        ("report", "out", "'a,b.md'", ["a,b.md"]),
        ("report", "out", '"a,b.md"', ["a,b.md"]),
        ("report", "out", "'a,b.md',c.xml", ["a,b.md", "c.xml"]),
        ("report", "runs", "x,y", ["x,y"]),  # the directory that is there
        ("report", "compare", "~/a,b c", ["/home/me/a", "b c"]),
        ("report", "gate", "~/a=b", "/home/me/a=b"),
        ("report", "title", "So, it's done", "So, it's done"),
    ):
        schema = {"quantize": QuantizeSpec, "report": ReportSpec}[command]
        assert getattr(compose([f"{key}={given}"], config_name=command, schema=schema), key) == expected


def test_a_grid_parts_paths_at_commas_but_for_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x,y").touch()
    given = ["-m", "task.path=x,y", "run_dir=a b,c", "model.name=m,n o"]
    expected = ["-m", "task.path='x,y'", "run_dir='a b',c", "model.name=m,'n o'"]
    assert bracket_lists(given, list_keys(EvalSpec), text_keys(EvalSpec)) == expected


def test_a_report_tells_how_one_file_with_a_comma_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["out=a,b.md"]) == 2
    assert capsys.readouterr().err.endswith("one file with a comma is written \"out='a,b.md'\"\n")


def test_a_group_of_another_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["model=qwen-nano"]) == 2
    assert capsys.readouterr().err.startswith("model: no such key; one of runs, compare")
    assert report(["experiment=bnb_table"]) == 2
    assert capsys.readouterr().err == "experiment=bnb_table: sets task=, which this command does not have\n"


def test_an_experiment_needs_no_plus(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "short.yaml").write_text("# @package _global_\ntask:\n  num: 3\n")
    done = command("hydra.searchpath=[file://conf]", "task=toy", "model=toy", "engine=fake", "experiment=short")
    assert "n=3" in done.stdout, done.stderr


def test_a_grid_is_every_cell_in_a_directory_of_its_own(tmp_path: Path, command: Command) -> None:
    grid = ["-m", "task=toy", "task.levels=1,2", "protocol=robust,upstream", "model=toy,toy-chat", "engine=fake"]
    done = command(*grid)
    assert done.returncode == 0, done.stderr
    results = sorted((tmp_path / "runs" / "eval").glob("*/*/*/result.json"))
    assert [str(path.parent.relative_to(tmp_path / "runs" / "eval")) for path in results] == [
        f"toy/{model}/protocol={protocol}" for model in ("toy", "toy-chat") for protocol in ("robust", "upstream")
    ]


def test_one_cell_has_the_settings_that_it_has_in_a_grid_with_a_file_or_with_a_flag(
    tmp_path: Path, command: Command
) -> None:
    """Hydra's own command composes the last three, ours the first."""
    (tmp_path / "conf").mkdir()
    asked = ["task=toy", "model=toy-chat", "engine=fake", "limit=3", "task.levels=1,2", "model.system=It's [x]"]
    found = []
    for i, more in enumerate(([], ["-m"], ["hydra.searchpath=[file://conf]"], ["--config-dir", "conf"])):
        assert command(*more, *asked, f"run_dir=r{i}").returncode == 0
        config = json.loads((tmp_path / f"r{i}" / "spec.json").read_text())["config"]
        assert config.pop("run_dir") == f"r{i}"
        found.append(config)
    assert found[0]["task"]["levels"] == [1, 2]
    assert found[1:] == found[:1] * 3


def test_a_cell_that_fails_does_not_take_the_grid_with_it(tmp_path: Path, command: Command) -> None:
    done = command("-m", "task=toy", "model=toy", "engine=fake", "model.dtype=fp17,fp16")
    assert done.returncode == 2
    assert done.stderr.startswith("model.dtype=fp17: model.dtype=fp17: unknown")  # the cell, then its mistake
    assert done.stderr.count("\n") == 1
    assert len(list((tmp_path / "runs" / "eval").glob("*/*/*/result.json"))) == 1


def test_cells_in_other_processes_keep_their_directories_and_their_mistakes(tmp_path: Path, command: Command) -> None:
    pytest.importorskip("cloudpickle")
    grid = [
        "-m",
        "hydra.launcher._target_=hydra_plugins.sent_cells.SendingLauncher",
        "task=toy",
        "model=toy",
        "engine=fake",
    ]
    assert command(*grid, "protocol=robust,upstream").returncode == 0
    names = {path.name for path in (tmp_path / "runs" / "eval" / "toy" / "toy").iterdir()}
    assert names == {"protocol=robust", "protocol=upstream"}
    done = command(*grid, "model.dtype=fp16,fp17")
    assert done.returncode == 2
    assert "model.dtype=fp17: model.dtype=fp17: unknown" in done.stderr


def test_an_error_names_its_cell_of_a_grid_and_the_tag_stays(tmp_path: Path, command: Command) -> None:
    grid = ["-m", "task=toy", "model=toy", "engine=fake", "task.seed=1,2", "engine.fake_delay_s=0,0.001", "tag=mine"]
    done = command(*grid, "task.mode=auto,foo")
    assert done.stderr.count("\n") == 4
    assert "task.seed=2 engine.fake_delay_s=0.001 task.mode=foo: task.mode=foo: unknown" in reordered(done.stderr)
    names = {path.name for path in (tmp_path / "runs" / "eval" / "toy" / "toy").iterdir()}
    assert len(names) == 4
    assert all(name.startswith("mine+") and "," not in name for name in names)


def reordered(text: str) -> str:
    """Swept keys in the order of the test, whatever that of the grid."""
    lines = []
    for line in text.splitlines():
        cell, _, said = line.partition(": ")
        order = ["task.seed", "engine.fake_delay_s", "task.mode"]
        lines.append(" ".join(sorted(cell.split(), key=lambda item: order.index(item.split("=")[0]))) + f": {said}")
    return "\n".join(lines)


def test_keys_of_one_end_are_told_apart_in_a_directory_name(tmp_path: Path, command: Command) -> None:
    done = command("-m", "task=toy", "model=toy", "engine=fake", "task.seed=1,2", "model.seed=3,4")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "runs" / "eval" / "toy" / "toy").iterdir()}
    assert names == {f"model.seed={a}+task.seed={b}" for a in (3, 4) for b in (1, 2)}


def test_quiet_prints_one_line_that_names_the_directory(command: Command) -> None:
    done = command("task=toy", "model=toy", "engine=fake", "quiet=true")
    assert done.returncode == 0
    assert done.stdout.startswith("runs/eval/toy/toy/default: ")
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_the_version_is_that_of_this_package(command: Command) -> None:
    done = command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"qwen_eval {__version__}\n", "")


@pytest.mark.parametrize("arguments", ["--help", "--cfg job"])
def test_a_reader_that_leaves_brings_no_traceback(arguments: str) -> None:
    script = f"{sys.executable} -m qwen_eval {arguments} | true"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1]
    )
    assert not {"Traceback", "BrokenPipeError"} & set(re.findall(r"\w+", done.stderr)), done.stderr


@pytest.mark.parametrize("limit", ["0", "1.0", "1.5", "0%", "200%", "-3", "true"])
def test_a_limit_is_a_number_of_samples_or_a_share(command: Command, limit: str) -> None:
    done = command("task=toy", "model=toy", "engine=fake", f"limit={limit}")
    assert done.returncode == 2
    assert "a number of samples, at least 1, or a share such as 10% or 0.1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (" --help >/dev/full", 2, "", "standard output: No space left on device\n"),
        (" --help >&-", 0, "", ""),
        (".list tasks mmlu 2>&- | head -n 1", 0, "tasks\n", ""),
        (".list engines native | head -n 3 | tail -n 1 | tr -d '?'", 0, "\n", ""),  # a rule that ASCII does not have
    ],
)
def test_an_output_that_takes_not_everything_brings_no_traceback(arguments: str, code: int, out: str, err: str) -> None:
    if "/dev/full" in arguments and not Path("/dev/full").exists():
        pytest.skip("a device of Linux")
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m qwen_eval{arguments}"], capture_output=True, text=True, timeout=60,
        cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_a_folder_that_cannot_be_made_is_one_line_with_the_way_out(tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").touch()
    for key, way_out in (("runs_dir=file", "runs_dir=DIR"), ("run_dir=file/run", "run_dir=DIR")):
        done = command("task=toy", "model=toy", "engine=fake", key)
        assert done.returncode == 2
        assert done.stderr.endswith(f"Not a directory; pass {way_out} that can be written\n")
        assert done.stderr.count("\n") == 1


def test_an_error_of_the_system_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert quantize(["model=qwen-nano", f"out={tmp_path}/file/q"]) == 2
    assert capsys.readouterr().err == f"{tmp_path}/file/q.partial: Not a directory\n"


def test_a_run_directory_that_cannot_be_is_one_line(tmp_path: Path, command: Command) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    for grid in ([], ["-m"]):
        done = command(*grid, "task=toy", "model=toy", "engine=fake")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "runs" in done.stderr


def test_experiments_are_yaml_diffs(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "short.yaml").write_text("# @package _global_\ndefaults:\n  - override /engine: fake\ntask:\n  num: 3\n")
    done = command("hydra.searchpath=[file://conf]", "task=toy", "model=toy", "+experiment=short")
    assert done.returncode == 0, done.stderr
    assert "n=3" in done.stdout
    typo = command("hydra.searchpath=[file://conf]", "task=toy", "model=toy", "+experiment=shirt")
    assert 'experiment=shirt: unknown; did you mean "short"?' in typo.stderr


def test_help_lists_the_choices(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "qwen_eval", "--help"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "task=mmlu" in done.stdout
    assert "engine: dashscope, fake, hf, llama-server, native, openai, sglang, vllm, vllm-server" in done.stdout


@dataclass
class Inner:
    levels: list[int] | None = None
    name: str = ""


@dataclass
class Outer:
    seq: list[int] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None


def test_list_keys_come_from_the_types() -> None:
    assert list_keys(Outer) == {"seq", "inner.levels", "maybe.levels"}
    assert "task.subjects" in list_keys(EvalSpec)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("seq=2048,8192", "seq=[2048,8192]"),
        ("seq=2048", "seq=[2048]"),
        ("+seq=1,2", "+seq=[1,2]"),
        ("seq=[1,2],[3]", "seq=[1,2],[3]"),  # a sweep over lists
        ("seq=choice([1],[2])", "seq=choice([1],[2])"),
        ("seq=甲,b c", "seq=['甲','b c']"),  # Hydra's grammar is ASCII
        ("task.path=数据/ceval", "task.path='数据/ceval'"),
        ("task.path=a=b", "task.path='a=b'"),
        ("task.path='数据'", "task.path='数据'"),
        ("seq=", "seq="),
        ("seq=null", "seq=null"),
        ("task=a,b", "task=a,b"),  # a sweep over a group
        ("-m", "-m"),
        ("model.window=2048,4096", "model.window='2048,4096'"),  # one value: tokens per group of layers
        ("model.window=none,layerwise", "model.window=none,layerwise"),
    ],
)
def test_a_bare_comma_is_a_list_where_the_key_is_one(given: str, meant: str) -> None:
    assert bracket_lists([given], {"seq"}) == [meant]


def test_a_grid_loads_each_model_once() -> None:
    given = ["task=a,b", "-m", "model.dtype=bf16,fp16", "limit=3", "--config-dir", "dir", "model=x,y"]
    assert model_first(given) == [
        "-m",
        "--config-dir",
        "dir",
        "model.dtype=bf16,fp16",
        "model=x,y",
        "task=a,b",
        "limit=3",
    ]


def test_every_yaml_of_the_engines_composes(tmp_path: Path, command: Command) -> None:
    for path in (conf_dir() / "engine").glob("*.yaml"):
        done = command(f"engine={path.stem}", "task=toy", "model=toy", "--cfg", "job")
        assert done.returncode == 0, done.stderr
        said = path.read_text().partition("engine_schema\n")[2].splitlines()  # a preset names its engine and its server
        assert f"name: {path.stem}" in said or any(line.startswith("server: ") for line in said)
        assert all(f"\n  {line}\n" in done.stdout for line in said)
