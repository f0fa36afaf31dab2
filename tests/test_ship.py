"""The ship certificate: it stops by itself, resumes, says what it does not know, and shows what was changed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import toy

from qwen_eval.report.runs import find_runs
from qwen_eval.ship.command import main
from qwen_eval.ship.config import arguments

NANO = Path(__file__).parent.parent / "qwen_eval" / "assets" / "qwen-nano"
SHIP = "import sys, toy; toy.register(); from qwen_eval.ship.command import main; sys.exit(main(sys.argv[1:]))"
TOY = ("reference=toy", "engine=fake", "tasks=toy", "task.num=900", "margin=2", "quiet=true")
# parity of the reply decides in the toy: "A" is right, "B" is wrong, on the third of the items that ask for a text
RIGHT, WRONG = "reference.fake_reply=A", "candidate.fake_reply=B"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Ship = Callable[..., Done]


@pytest.fixture
def ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ship:
    """Run the command in an empty directory, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")  # no sentence is wrapped
    toy.register()

    def call(*argv: str) -> Done:
        code = main(list(argv))
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return call


def directory(tmp_path: Path, tag: str = "default", names: str = "toy-vs-toy") -> Path:
    return tmp_path / "runs" / "ship" / names / tag


def certificate(tmp_path: Path, tag: str = "default", names: str = "toy-vs-toy") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory(tmp_path, tag, names) / "certificate.json").read_text())
    return found


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "provenance"}


# --- the three answers ------------------------------------------------------------------------------------------------


def test_equal_models_are_shipped_long_before_the_last_item(tmp_path: Path, ship: Ship) -> None:
    done = ship(*TOY, "two_sided=true")
    assert done.code == 0, done.err
    assert "ship: toy (unchanged) is equivalent to toy within 2 points on toy" in done.out
    found = certificate(tmp_path)["tasks"]["toy"]
    assert found["items"] < 450
    assert (found["delta"], found["lost"], found["gained"]) == (0.0, 0, 0)
    records = (directory(tmp_path) / "toy" / "candidate" / "records.jsonl").read_text().splitlines()
    assert len(records) == found["items"]  # nothing beyond the last block is asked
    assert (directory(tmp_path) / "certificate.html").read_text().count("ship: toy (unchanged) is equivalent") == 1


def test_a_worse_model_is_not_shipped_and_the_task_is_named(tmp_path: Path, ship: Ship) -> None:
    done = ship(*TOY, RIGHT, WRONG)
    assert done.code == 1
    assert "do not ship: toy (unchanged) is worse than toy by more than the margin on toy" in done.out
    assert certificate(tmp_path)["tasks"]["toy"]["items"] < 900


def test_a_better_model_is_shipped_but_not_called_equivalent(tmp_path: Path, ship: Ship) -> None:
    done = ship(*TOY, "reference.fake_reply=B", "candidate.fake_reply=A", "two_sided=true")
    assert done.code == 0
    assert "is not worse than toy within 2 points" in done.out
    assert certificate(tmp_path)["verdict"]["is_equivalent"] is False
    assert certificate(tmp_path)["tasks"]["toy"]["is_exact"]  # how much better was asked for until all were drawn


def test_too_few_items_are_not_decided_and_it_says_how_many_would(tmp_path: Path, ship: Ship) -> None:
    done = ship(*TOY, "max_items=40")
    assert done.code == 3
    found = certificate(tmp_path)["tasks"]["toy"]
    assert found["items"] == 40
    assert 40 < found["items_needed"] < 900
    assert f"toy has 40 of about {found['items_needed']:,} items that would decide" in done.out
    more = ship(*TOY)  # the same question with more room goes on from there
    assert more.code == 0
    assert certificate(tmp_path)["tasks"]["toy"]["items"] >= found["items_needed"] - 64


def test_no_time_at_all_is_not_decided(tmp_path: Path, ship: Ship) -> None:
    done = ship(*TOY, "max_minutes=0.000001")
    assert done.code == 3
    assert "not decided: toy was not begun" in done.out


def test_a_small_benchmark_is_known_exactly_at_its_end(tmp_path: Path, ship: Ship) -> None:
    done = ship(*TOY[:3], "task.num=30", "margin=1", "quiet=true")
    assert done.code == 0
    found = certificate(tmp_path)["tasks"]["toy"]
    assert (found["items"], found["is_exact"], found["low"], found["high"]) == (30, True, 0.0, 0.0)


def test_the_order_seed_changes_the_items_and_not_the_answer(tmp_path: Path, ship: Ship) -> None:
    for seed in (1, 2):
        assert ship(*TOY, RIGHT, WRONG, f"seed={seed}", f"tag=s{seed}").code == 1
    orders = [certificate(tmp_path, f"s{seed}")["tasks"]["toy"]["order_sha256"] for seed in (1, 2)]
    assert orders[0] != orders[1]


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_one_model_at_a_time_gives_the_certificate_of_both_together(tmp_path: Path, ship: Ship) -> None:
    ship(*TOY, RIGHT, "together=true", "tag=both")
    ship(*TOY, RIGHT, "together=false", "tag=one")
    assert timeless(certificate(tmp_path, "both")) == timeless(certificate(tmp_path, "one"))


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_certificate_but_for_times(tmp_path: Path, ship: Ship) -> None:
    argv = [*TOY, "two_sided=true"]
    assert ship(*argv, "tag=whole").code == 0
    command = [sys.executable, "-c", SHIP, *argv, "tag=killed"]
    num_kills = 0
    for side, goal in (("reference", 3_000), ("candidate", 3_000), ("candidate", 60_000)):
        records = directory(tmp_path, "killed") / "toy" / side / "records.jsonl"
        process = subprocess.Popen(
            [*command, "engine.fake_delay_s=0.005"], cwd=tmp_path, stdout=subprocess.DEVNULL,
            env={"PYTHONPATH": ":".join([str(Path(toy.__file__).parent), *sys.path]), "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        while process.poll() is None and not (records.exists() and records.stat().st_size > goal):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        num_kills += process.wait() == -signal.SIGKILL
    assert num_kills >= 2
    assert ship(*argv, "tag=killed").code == 0
    assert timeless(certificate(tmp_path, "killed")) == timeless(certificate(tmp_path, "whole"))


def test_another_question_does_not_go_on_from_the_same_records(tmp_path: Path, ship: Ship) -> None:
    ship(*TOY, "max_items=40")
    done = ship(*TOY[:4], "margin=3", "quiet=true")
    assert done.code == 2
    assert "margin: 2.0 → 3.0" in done.err
    assert "tag=NAME" in done.err


def test_certificates_are_no_runs_of_the_report(tmp_path: Path, ship: Ship) -> None:
    ship(*TOY, "max_items=40")
    assert (find_runs([tmp_path / "runs"]).runs, find_runs([tmp_path / "runs"]).unreadable) == ((), ())


# --- verifying --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of "do not ship", made once."""
    toy.register()
    root = tmp_path_factory.mktemp("made")
    assert main([*TOY, RIGHT, WRONG, f"runs_dir={root / 'runs'}"]) == 1
    return root


@pytest.fixture
def certified(made: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    return directory(tmp_path)


def edit_record(path: Path, change: Callable[[dict[str, Any]], None], at: int = 5) -> str:
    lines = path.read_text().splitlines()
    row = json.loads(lines[at])
    change(row)
    lines[at] = json.dumps(row, ensure_ascii=False)
    path.write_text("\n".join(lines) + "\n")
    return str(row["sample_id"])


def flip_score(row: dict[str, Any]) -> None:
    row["grade"]["score"] = 1.0 - row["grade"]["score"]


def test_an_untouched_certificate_holds(certified: Path, ship: Ship) -> None:
    done = ship(f"verify={certified / 'certificate.json'}")
    assert (done.code, done.err) == (0, "")
    assert "holds; do not ship" in done.out
    assert ship(f"verify={certified}").code == 0


@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_a_forged_score_is_named(certified: Path, ship: Ship, side: str) -> None:
    name = edit_record(certified / "toy" / side / "records.jsonl", flip_score)
    done = ship(f"verify={certified}")
    assert done.code == 1
    assert f"toy: the record of {name} of the {side} was changed" in done.out
    assert f"toy: the score of {name} of the {side}" in done.out


def test_a_changed_prompt_in_a_record_is_named(certified: Path, ship: Ship) -> None:
    name = edit_record(
        certified / "toy" / "candidate" / "records.jsonl",
        lambda row: row.update(prompts=["another question"]),
    )
    done = ship(f"verify={certified}")
    assert done.code == 1
    assert f"the record of {name} of the candidate was changed" in done.out


def test_prompts_that_the_task_no_longer_asks_are_named(
    certified: Path, ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = toy.Prompt.raw
    monkeypatch.setattr(toy.Prompt, "raw", staticmethod(lambda text: original("please: " + text)))
    done = ship(f"verify={certified}")
    assert done.code == 1
    assert "toy, reference: the prompts are others now than those that were asked" in done.out


def test_a_forger_of_record_and_evidence_meets_the_grader(certified: Path, ship: Ship) -> None:
    from qwen_eval.runs.record_json import record_from_json
    from qwen_eval.ship.certificate import record_sha256

    records = certified / "toy" / "candidate" / "records.jsonl"
    name = edit_record(records, flip_score)
    row = next(json.loads(line) for line in records.read_text().splitlines() if json.loads(line)["sample_id"] == name)
    evidence = certified / "toy" / "evidence.jsonl"
    lines = [json.loads(line) for line in evidence.read_text().splitlines()]
    line = next(line for line in lines if line["id"] == name)
    line.update(candidate=row["grade"]["score"], candidate_sha256=record_sha256(record_from_json(row)))
    evidence.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    done = ship(f"verify={certified}")
    assert done.code == 1
    assert "toy: evidence.jsonl was changed" in done.out
    assert f"toy: the score of {name} of the candidate" in done.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["verdict"].update(word="ship"), "certificate.json was edited"),
        (lambda c: c["tasks"]["toy"].update(delta=0.5), "toy: delta is 0.5, the records give"),
        (lambda c: c["tasks"]["toy"].update(items=c["tasks"]["toy"]["items"] - 1), "evidence.jsonl has"),
        (lambda c: c.update(order_seed=7), "toy: the order of items"),
        (lambda c: c["tasks"].clear(), "the verdict: do not ship in the certificate, not decided now"),
        (lambda c: c.pop("alpha"), "not a certificate that this version reads"),
    ],
)  # fmt: skip
def test_an_edited_certificate_does_not_hold(
    certified: Path, ship: Ship, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    path = certified / "certificate.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    done = ship(f"verify={path}")
    assert done.code == 1
    assert said in done.out


def test_a_score_that_no_answer_can_have_is_named(certified: Path, ship: Ship) -> None:
    records = certified / "toy" / "candidate" / "records.jsonl"
    name = edit_record(records, lambda row: row["grade"].update(score=40.0))
    done = ship(f"verify={certified}")
    assert done.code == 1
    assert f"toy: {name}: scores 40; a certificate needs scores between 0 and 1" in done.out


def test_a_missing_record_and_a_changed_setting_are_named(certified: Path, ship: Ship) -> None:
    folder = certified / "toy" / "reference"
    spec = json.loads((folder / "spec.json").read_text())
    spec["decides"]["protocol"] = "upstream"
    (folder / "spec.json").write_text(json.dumps(spec))
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[1:]))
    done = ship(f"verify={certified}")
    assert done.code == 1
    assert "toy, reference: spec.json was changed" in done.out
    assert f"toy: reference has no record of {json.loads(lines[0])['sample_id']}" in done.out


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"kind": "certificate", "format": 99}'])
def test_what_is_no_certificate_is_refused_in_one_line(tmp_path: Path, ship: Ship, content: str) -> None:
    (tmp_path / "c.json").write_text(content)
    done = ship("verify=c.json")
    assert done.code == 2
    assert done.err.count("\n") == 1


# --- the command line -------------------------------------------------------------------------------------------------


def test_short_keys_become_those_of_a_side() -> None:
    assert arguments(["reference=a", "candidate=b", "candidate.kv_cache=int8", "candidate.num_threads=2"]) == [
        "model@reference=a", "model@candidate=b", "candidate.kv_cache=int8", "candidate_engine.num_threads=2",
    ]  # fmt: skip
    assert arguments(["engine=hf", "candidate.engine=vllm", "candidate.engine.name=x"]) == [
        "engine@reference_engine=hf", "engine@candidate_engine=hf", "engine@candidate_engine=vllm",
        "candidate_engine.name=x",
    ]  # fmt: skip
    assert arguments(["tasks=mmlu,bbh", "task.data=bundled", "tasks.mmlu.subjects=a,b"]) == [
        "+task@tasks.mmlu=mmlu", "+task@tasks.bbh=bbh", "tasks.mmlu.data=bundled", "tasks.bbh.data=bundled",
        "tasks.mmlu.subjects=[a,b]",
    ]  # fmt: skip


def test_a_candidate_without_a_name_is_the_reference_with_its_own_keys() -> None:
    found = arguments(["reference=a", "reference.path=DIR", "reference.dtype=fp32", "candidate.dtype=bf16"])
    assert found[-2:] == ["model@candidate=a", "candidate.path=DIR"]
    assert "candidate.dtype=fp32" not in found
    named = arguments(["reference=a", "reference.path=DIR", "candidate=b"])
    assert "candidate.path=DIR" not in named


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["tasks=toy"], "reference=: none given"),
        (["reference=toy"], "tasks=: none given"),
        (["reference=toy", "tasks=toy,toy"], "toy stands twice"),
        (["reference=toy", "tasks=mmlv"], 'did you mean "mmlu"?'),
        (["reference=toy", "tasks=toy", "candidate.dtype=fp17"], 'candidate.dtype=fp17: unknown; did you mean "fp16"?'),
        (["reference=toy", "tasks=toy", "candidate.dtyp=fp16"], 'did you mean "candidate.dtype"?'),
        (["reference=toy", "tasks=toy", "task.nums=3"], 'did you mean "tasks.toy.num"?'),
        (["reference=toy", "tasks=toy", "margin=0"], "margin=0.0: points of a score between 0 and 100"),
        (["reference=toy", "tasks=toy", "alpha=0.5"], "alpha=0.5: a chance of error"),
        (["reference=toy", "tasks=toy", "max_items=0"], "max_items=0: must be positive"),
        (["reference=toy", "tasks=toy", "spot=5"], "spot=5: has an effect with verify=FILE only"),
        (["verify=x", "spot=5"], "spot=5: pass reference= and candidate= as well"),
        (["verify=nowhere.json"], "verify=nowhere.json: no such file"),
        (["reference=toy", "tasks=toy", "together=maybe"], "together=maybe: unknown"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_way_out(tmp_path: Path, ship: Ship, argv: list[str], said: str) -> None:
    done = ship(*argv)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_typo_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from qwen_eval.ship.command import main; "
        "c = main(['reference=qwen-nano', 'tasks=nano', 'candidate.dtype=fp17']); print(c, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "False"]


# --- real checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the miniature: `noisy` is 10 % off in every matrix, `swapped` a little, `broken` overflows in fp16."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    if not NANO.is_dir():
        pytest.skip("the miniature is not in this checkout")
    root = tmp_path_factory.mktemp("checkpoints")

    def copy(name: str, change: Callable[[str, Any], Any]) -> None:
        shutil.copytree(NANO, root / name)
        torch.manual_seed(0)
        weights = load_file(root / name / "model.safetensors")
        changed = {key: change(key, w).to(w.dtype).contiguous() for key, w in weights.items()}
        save_file(changed, root / name / "model.safetensors", metadata={"format": "pt"})

    copy("noisy", lambda key, w: w.float() + 0.10 * w.float().std() * torch.randn(w.shape) if w.ndim == 2 else w)
    copy("swapped", lambda key, w: w.float() + 0.01 * (w.ndim == 2))
    copy("broken", lambda key, w: w.float() * (300 if "h.2.mlp" in key else 1))
    return root


FP32 = ("reference=qwen-nano", "engine.num_threads=1", "reference.dtype=fp32", "quiet=true")
CHOICES = ("tasks=nano", "task.data=bundled", "task.subjects=choice/stated,choice/stated_zh,choice/told")


def test_the_miniature_in_bf16_is_equivalent_and_its_certificate_is_of_these_checkpoints(
    tmp_path: Path, ship: Ship, checkpoints: Path
) -> None:
    done = ship(*FP32, *CHOICES, "candidate.dtype=bf16", "margin=4", "two_sided=true")
    assert done.code == 0, done.err
    assert "qwen-nano (dtype=bf16) is equivalent to qwen-nano within 4 points on nano" in done.out
    path = directory(tmp_path, names="qwen-nano-vs-qwen-nano")
    models = ("reference=qwen-nano", "candidate=qwen-nano", "reference.dtype=fp32", "candidate.dtype=bf16")
    assert ship(f"verify={path}", *models, "spot=4", "quiet=true").code == 0
    other = ship(f"verify={path}", *models, f"candidate.path={checkpoints / 'swapped'}")
    assert other.code == 1
    assert "candidate: the checkpoint of qwen-nano is sample:" in other.out


def test_weights_ten_per_cent_off_are_not_shipped(tmp_path: Path, ship: Ship, checkpoints: Path) -> None:
    noisy = (f"candidate.path={checkpoints / 'noisy'}", "candidate=qwen-nano", "candidate.name=noisy")
    done = ship(*FP32, *CHOICES[:2], "task.subjects=recall/one", *noisy, "candidate.dtype=fp32", "margin=1")
    assert done.code == 1, done.out
    assert certificate(tmp_path, names="qwen-nano-vs-noisy")["verdict"]["is_equivalent"] is False


def test_items_that_fail_score_nothing_and_are_named(tmp_path: Path, ship: Ship, checkpoints: Path) -> None:
    broken = (f"candidate.path={checkpoints / 'broken'}", "candidate=qwen-nano", "candidate.name=broken")
    done = ship(*FP32, *CHOICES, *broken, "candidate.dtype=fp16", "margin=5")
    assert done.code == 1
    assert "of the candidate failed on numbers that are not finite and score 0, such as" in done.out
    found = certificate(tmp_path, names="qwen-nano-vs-broken")["tasks"]["nano"]
    assert len(found["candidate"]["failed"]) == found["items"]
    assert ship(f"verify={directory(tmp_path, names='qwen-nano-vs-broken')}").code == 0


def test_perplexity_is_tested_once_over_all_texts(tmp_path: Path, ship: Ship, checkpoints: Path) -> None:
    text = ("tasks=long_ppl", "task.data=bundled", "task.lengths=128", "task.max_chunks=24")
    same = ship(*FP32, *text, "candidate.dtype=fp32", "candidate.kv_cache=int8")
    assert same.code == 0, same.out
    assert "within 1 % of perplexity on long_ppl" in same.out
    noisy = (f"candidate.path={checkpoints / 'noisy'}", "candidate=qwen-nano", "candidate.name=noisy")
    assert ship(*FP32, *text, *noisy, "candidate.dtype=fp32").code == 1
    found = certificate(tmp_path, names="qwen-nano-vs-noisy")["tasks"]["long_ppl"]
    assert found["kind"] == "texts"
    assert "paired t test over documents" in found["estimand"]
    assert ship(f"verify={directory(tmp_path, names='qwen-nano-vs-noisy')}").code == 0
