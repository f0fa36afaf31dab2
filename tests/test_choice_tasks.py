"""The exams as tasks: which rows, asked how, graded and averaged as their authors and Qwen's scripts do."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exams import EXAMS

from qwen_eval.config import EvalSpec, ModelSpec
from qwen_eval.core import (
    ChoiceLogprobs,
    Choose,
    Completion,
    Completions,
    ConfigError,
    DataError,
    Generate,
    Grade,
    Record,
    Turn,
)
from qwen_eval.data.hub import DatasetSource
from qwen_eval.data.sources import SAMPLES
from qwen_eval.engines.fake import FakeEngine
from qwen_eval.runs.evaluate import evaluate
from qwen_eval.runs.record_json import answers_from_json, answers_to_json
from qwen_eval.tasks.ceval import Ceval
from qwen_eval.tasks.choice import ChoiceTask, official_letter, official_probs
from qwen_eval.tasks.cmmlu import Cmmlu
from qwen_eval.tasks.mmlu import Mmlu
from qwen_eval.tasks.registry import TaskContext, task_class


def exam(name: str, *, protocol: str = "robust", is_chat: bool = False, **spec: Any) -> ChoiceTask:
    cls = task_class(name)
    where = {} if "path" in spec or "data" in spec else {"data": "bundled"}
    return cls(cls.Spec(name=name, **where, **spec), TaskContext(protocol=protocol, is_chat=is_chat))


def mmlu_folder(folder: Path, test: str, *, dev: str = 'D?,1,2,3,4,A\n"D, too?",5,6,7,8,B\n') -> Path:
    for split, text in (("dev", dev), ("test", test)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / f"anatomy_{split}.csv").write_bytes(text.encode())
    return folder


def letters(*logits: float, lse: float = 0.0) -> ChoiceLogprobs:
    return ChoiceLogprobs(
        logprobs=tuple(x - lse for x in logits), num_tokens=(1,) * len(logits), logits=logits, logsumexp=lse
    )


def reply(text: str, finish: Any = "eos") -> Completions:
    return Completions(completions=(Completion(text=text, finish_reason=finish, num_tokens=len(text)),))


def graded(task: ChoiceTask, answer: Any, index: int = 0) -> Grade:
    sample = task.samples()[index]
    request = task.request(sample, ())
    assert request is not None
    return task.grade(sample, [Turn(request=request, answer=answer)])


def record(group: str, score: float | None, i: int = 0, **grade: Any) -> Record:
    return Record(
        sample_id=f"{group}/{i}",
        group=group,
        cluster="",
        target=None if score is None else "A",
        prompts=("",),
        prompt_sha256=("",),
        num_prompt_tokens=(1,),
        answers=(reply("A"),),
        grade=Grade(score=score, score_upstream=score, **grade),
    )


# --- the official tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "num_subjects", "sizes"),
    [
        (Mmlu, 57, {"stem": 19, "humanities": 13, "social_science": 12, "other": 13}),
        (Ceval, 52, {"stem": 20, "social_science": 10, "humanities": 11, "other": 11, "hard": 8}),
        (Cmmlu, 67, {"stem": 17, "humanities": 13, "social_science": 22, "other": 15, "china_specific": 15}),
    ],
)
def test_subjects_and_categories_are_the_official_ones(
    cls: type[ChoiceTask], num_subjects: int, sizes: dict[str, int]
) -> None:
    assert {name: len(subjects) for name, subjects in cls.categories.items()} == sizes
    overlapping = {"hard", "china_specific"}
    parts = Counter(s for name, subjects in cls.categories.items() if name not in overlapping for s in subjects)
    assert len(cls.all_subjects()) == num_subjects == len(parts)
    assert set(parts.values()) == {1}


def test_anatomy_counts_as_stem() -> None:
    assert "anatomy" in Mmlu.categories["stem"]


# --- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMS)
def test_the_bundled_sample_runs_in_both_forms(name: str) -> None:
    for is_chat, kind in ((False, Choose), (True, Generate)):
        task = exam(name, is_chat=is_chat)
        samples = task.samples()
        assert len(samples) >= 40
        assert len({s.group for s in samples}) >= 5
        assert {s.target for s in samples} == set("ABCD")
        assert len({s.id for s in samples}) == len(samples)
        assert all(isinstance(task.request(s, ()), kind) for s in samples)
        assert task.describe()["origin"] == f"bundled:{name}"
    assert (SAMPLES / "README.md").is_file()


@pytest.mark.parametrize("name", ["ceval", "cmmlu"])
def test_bundled_chinese_rows_have_four_different_options_and_no_question_twice(name: str) -> None:
    task = exam(name)
    shots = [row for subject in task.subjects for row in task.read(subject, "dev")]
    rows = [s.data for s in task.samples()] + [row.cells for row in shots]
    assert all(len({row[x] for x in "ABCD"}) == 4 for row in rows)
    assert len({row["question"] for row in rows}) == len(rows)


def test_rows_are_read_as_they_stand_or_as_the_scripts_do(tmp_path: Path) -> None:
    folder = mmlu_folder(tmp_path, "Q?,None,007,1.50,,C\n")
    data = exam("mmlu", path=str(folder), shots=2).samples()[0].data
    assert [data[x] for x in "ABCD"] == ["None", "007", "1.50", ""]
    data = exam("mmlu", path=str(folder), shots=2, protocol="upstream").samples()[0].data
    assert [data[x] for x in "ABCD"] == ["nan", "7", "1.5", "nan"]


@pytest.mark.parametrize(
    ("test", "says"),
    [
        ("", "anatomy_test.csv: empty"),
        ("Q?,1,2,3,4,E\n", "anatomy_test.csv line 1: answer 'E', one of A, B, C, D expected"),
        ("Q?,1,2,3,4,A\nQ?,1,2,3,A\n", "anatomy_test.csv line 2: 5 columns, 6 expected"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(tmp_path: Path, test: str, says: str) -> None:
    with pytest.raises(DataError, match=r"^[^\n]*$") as error:
        exam("mmlu", path=str(mmlu_folder(tmp_path, test))).samples()
    assert says in str(error.value)


def test_a_column_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "law_val.csv").write_text("id,question,A,B,C,answer\n0,Q?,1,2,3,A\n")
    with pytest.raises(DataError, match=r"law_val.csv: no column D; found id, question, A, B, C, answer"):
        exam("ceval", path=str(tmp_path)).samples()


def test_a_folder_without_the_exam_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no subject of cmmlu there, such as test/anatomy.csv"):
        exam("cmmlu", path=str(tmp_path)).samples()


def test_too_few_shots_are_refused(tmp_path: Path) -> None:
    task = exam("mmlu", path=str(mmlu_folder(tmp_path, "Q?,1,2,3,4,A\n")))
    with pytest.raises(DataError, match="2 dev rows of anatomy, 5 shots asked for"):
        task.request(task.samples()[0], ())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"subjects": ["astrnomy"]}, "task.subjects=astrnomy: not a subject of mmlu; did you mean astronomy?"),
        ({"mode": "chta"}, "task.mode=chta: one of auto, base, chat; did you mean chat?"),
        ({"shots": 6}, "task.shots=6: 0 to 5, or -1 for the official number"),
        ({"shots": -2}, "task.shots=-2: 0 to 5, or -1 for the official number"),
        ({"split": "val"}, "task.split=val: mmlu is scored on test"),
    ],
)
def test_a_wrong_option_is_one_line(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as error:
        exam("mmlu", **spec).samples()
    assert str(error.value) == says


def test_subjects_may_be_named_by_category() -> None:
    task = exam("mmlu", subjects=["formal_logic", "humanities"], path=str(SAMPLES / "mmlu"))
    assert task.subjects == ("formal_logic", *(s for s in Mmlu.categories["humanities"] if s != "formal_logic"))


class RecordedHub(DatasetSource):
    """Rows as `datasets` returns them, without a network."""

    def __init__(self) -> None:
        super().__init__("cais/mmlu", None, is_offline=True, how="")

    def hub_rows(self, config: str | None, split: str) -> list[dict[str, Any]]:
        row = {"question": f"{config} {split}?", "subject": config, "choices": ["None", "2", "3", "4"], "answer": 2}
        return [row] * 5


@pytest.mark.parametrize(("protocol", "option"), [("robust", "None"), ("upstream", "nan")])
def test_hub_rows_become_official_rows(protocol: str, option: str) -> None:
    task = exam("mmlu", protocol=protocol, subjects=["anatomy"])
    task.source = RecordedHub()
    sample = task.samples()[0]
    assert (sample.id, sample.target, sample.data["A"]) == ("anatomy/0", "C", option)
    request = task.request(sample, ())
    assert isinstance(request, Choose)
    assert request.prompt.text is not None
    assert "Question: anatomy dev?" in request.prompt.text


# --- asking --------------------------------------------------------------------------------------------------------


def test_base_form_of_mmlu(tmp_path: Path) -> None:
    task = exam("mmlu", path=str(mmlu_folder(tmp_path, "Q?,w,x,y,z,D\n")), shots=1)
    request = task.request(task.samples()[0], ())
    assert isinstance(request, Choose)
    assert request.choices == (" A", " B", " C", " D")
    assert request.max_prompt_tokens is None  # nothing is cut for a model that can read it
    upstream = exam("mmlu", path=str(mmlu_folder(tmp_path, "Q?,w,x,y,z,D\n")), shots=1, protocol="upstream")
    asked = upstream.request(upstream.samples()[0], ())
    assert isinstance(asked, Choose)
    assert asked.max_prompt_tokens == 2047  # as the official script does
    assert request.prompt.text == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Question: D?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\nQuestion: Q?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert task.request(task.samples()[0], [Turn(request=request, answer=letters(0, 0, 0, 0))]) is None


@pytest.mark.parametrize("name", ["ceval", "cmmlu"])
def test_chinese_letters_follow_the_colon_directly(name: str) -> None:
    task = exam(name)
    request = task.request(task.samples()[0], ())
    assert isinstance(request, Choose)
    assert request.choices == ("A", "B", "C", "D")
    assert request.max_prompt_tokens is None
    assert request.prompt.text is not None
    assert request.prompt.text.endswith("\n答案：")
    assert request.prompt.text.count("问题：") == 6


def test_special_tokens_in_a_question_stay_text_except_under_upstream() -> None:
    for protocol, parsed in (("robust", False), ("upstream", True)):
        task = exam("mmlu", protocol=protocol)
        request = task.request(task.samples()[0], ())
        assert request is not None
        assert request.prompt.parse_special is parsed


@pytest.mark.parametrize(
    ("mode", "is_chat", "kind"), [("auto", True, Generate), ("base", True, Choose), ("chat", False, Generate)]
)
def test_the_form_follows_the_model_unless_it_is_forced(mode: str, is_chat: bool, kind: type) -> None:
    task = exam("mmlu", mode=mode, is_chat=is_chat)
    assert isinstance(task.request(task.samples()[0], ()), kind)


@pytest.mark.parametrize("shots", range(6))
def test_any_number_of_shots_to_five(shots: int) -> None:
    task = exam("cmmlu", shots=shots, is_chat=True, mode="base")
    request = task.request(task.samples()[0], ())
    assert request is not None
    assert (request.prompt.text or "").count("问题：") == shots + 1
    chat = exam("cmmlu", shots=shots, is_chat=True)
    request = chat.request(chat.samples()[0], ())
    assert request is not None
    assert len(request.prompt.messages) == 2 * shots + 1


# --- grading -------------------------------------------------------------------------------------------------------


def test_the_likeliest_letter_is_the_answer_and_equals_go_to_the_earlier() -> None:
    task = exam("mmlu")
    target = task.samples()[0].target
    assert graded(task, letters(*[5.0 if x == target else 1.0 for x in "ABCD"])).score == 1.0
    assert graded(task, letters(1.0, 3.0, 3.0, 0.0)).extracted == "B"
    assert graded(task, letters(1.0, 3.0, 3.0, 0.0)).extracted_upstream == "B"


def test_values_hold_calibrated_and_official_probabilities() -> None:
    values = graded(exam("mmlu"), letters(*(math.log(p) for p in (0.4, 0.2, 0.1, 0.1)))).values
    assert values["p"] == pytest.approx({"A": 0.5, "B": 0.25, "C": 0.125, "D": 0.125})
    assert values["mass"] == pytest.approx(0.8)
    again = [math.exp(p) for p in (0.4, 0.2, 0.1, 0.1)]
    assert values["official_prob"] == pytest.approx([p / sum(again) for p in again], abs=1e-6)


def test_letters_without_mass_are_told_apart_by_us_but_not_by_the_scripts() -> None:
    answer = letters(1.0, 2.0, 4.0, 3.0, lse=30.0)  # e^-26: softmaxed twice in fp32, all four are 0.25
    grade = graded(exam("mmlu"), answer)
    assert (grade.extracted, grade.extracted_upstream) == ("C", "A")
    target = exam("mmlu").samples()[0].target
    assert (grade.score, grade.score_upstream) == (float(target == "C"), float(target == "A"))
    assert graded(exam("mmlu", protocol="upstream"), answer) == grade


def test_a_chat_reply_is_read_both_ways() -> None:
    task = exam("ceval", is_chat=True)
    grade = graded(task, reply("答案不是A，而是C。"))
    assert (grade.extracted, grade.extracted_upstream) == ("C", "A")
    target = task.samples()[0].target
    assert (grade.score, grade.score_upstream) == (float(target == "C"), float(target == "A"))
    assert graded(exam("ceval", is_chat=True, protocol="upstream"), reply("答案不是A，而是C。")) == grade


def test_symptoms_of_a_bad_reply_are_flagged() -> None:
    task = exam("mmlu", is_chat=True)
    assert graded(task, reply("The answer is B.")).flags == ()
    assert graded(task, reply("Well, let me think", "length")).flags == ("truncated", "no_answer")
    assert set(graded(task, reply("")).flags) == {"empty", "no_answer"}
    assert graded(task, reply("")).score == 0.0


# --- averages ------------------------------------------------------------------------------------------------------


def test_mmlu_averages_questions_and_the_others_subjects() -> None:
    records = [record("anatomy", 1.0, i) for i in range(3)] + [record("virology", 0.0)]
    assert exam("mmlu").summarise(records)["accuracy"].value == 0.75
    metrics = exam("cmmlu").summarise(records)
    assert metrics["accuracy"].value == metrics["accuracy/stem"].value == 0.5
    assert (metrics["accuracy/anatomy"].value, metrics["accuracy/anatomy"].n) == (1.0, 3)
    assert next(iter(metrics)) == "accuracy"


def test_the_interval_of_the_letter_mass_lies_between_none_and_all() -> None:
    records = [record("anatomy", 1.0, i, values={"mass": mass}) for i, mass in enumerate((0.98, 0.6))]
    mass = exam("mmlu").summarise(records)["letter_mass"]
    assert mass.value == pytest.approx(0.79)
    assert mass.low is not None
    assert mass.high is not None
    assert 0 <= mass.low < 0.79 < mass.high <= 1


def test_hard_and_china_specific_overlap_the_other_groups() -> None:
    metrics = exam("ceval").summarise([record("college_physics", 1.0), record("logic", 0.0)])
    assert [metrics[f"accuracy/{c}"].value for c in ("stem", "hard", "humanities")] == [1.0, 1.0, 0.0]
    metrics = exam("cmmlu").summarise([record("ethnology", 1.0)])
    assert metrics["accuracy/china_specific"].value == metrics["accuracy/social_science"].value == 1.0


def test_averages_are_those_the_official_scripts_print(golden: Path) -> None:
    file = golden / "eval" / "aggregates.jsonl"
    if not file.is_file():
        pytest.skip(f"no eval/aggregates.jsonl in {golden}")
    for line in file.read_text().splitlines():
        row = json.loads(line)
        metrics = exam(row["which"].removeprefix("chat_")).summarise(_records(row["input"]))
        printed = re.findall(r"^(.+?) acc: ?([\d.]+)", row["stdout"], re.IGNORECASE | re.MULTILINE)
        assert len(printed) >= 5, row["stdout"]
        for name, value in printed:
            assert f"{100 * metrics[_metric(name)].value:.2f}" == value, (row["which"], name)


def _records(scores: dict[str, Any]) -> list[Record]:
    """Right and wrong answers a subject (MMLU), or each subject's accuracy in per cent as one item."""
    items = {s: v if isinstance(v, Sequence) else [v / 100] for s, v in scores.items()}
    return [record(subject, float(score), i) for subject, part in items.items() for i, score in enumerate(part)]


def _metric(name: str) -> str:
    group = name.lower().replace(" ", "_")
    return "accuracy" if group == "average" else f"accuracy/{'social_science' if group == 'social' else group}"


def test_no_subject_no_metric() -> None:
    assert exam("mmlu").summarise([])["answered"].value == 0.0


# --- splits without answers ----------------------------------------------------------------------------------------


def ceval_test_split(folder: Path) -> Path:
    (folder / "test").mkdir()
    (folder / "test" / "law_test.csv").write_text("id,question,A,B,C,D\n0,Q?,1,2,3,4\n7,R?,1,2,3,4\n")
    return folder


def test_a_split_without_answers_leaves_a_submission_and_no_accuracy(tmp_path: Path) -> None:
    task = exam("ceval", path=str(ceval_test_split(tmp_path)), split="test", shots=0, is_chat=True)
    grades = [graded(task, reply(text), i) for i, text in enumerate(("选B。", "不知道"))]
    assert [(g.score, g.extracted) for g in grades] == [(None, "B"), (None, None)]
    records = [dataclasses.replace(record("law", None, i), grade=g) for i, g in enumerate(grades)]
    assert isinstance(task, Ceval)
    assert task.artifacts(records) == {"submission.json": {"law": {"0": "B", "7": ""}}}
    assert {name: m.value for name, m in task.summarise(records).items()} == {"answered": 2.0}


def test_the_submission_stands_beside_the_result(tmp_path: Path) -> None:
    (tmp_path / "exam").mkdir()
    task = Ceval.Spec(name="ceval", path=str(ceval_test_split(tmp_path / "exam")), split="test", shots=0, mode="chat")
    spec = EvalSpec(task=task, model=ModelSpec(name="any"), run_dir=str(tmp_path / "run"))
    outcome = evaluate(spec, lambda _: FakeEngine(reply="答案是C。"))
    assert outcome.metrics["answered"].value == 2
    assert outcome.partial == {}
    assert json.loads((tmp_path / "run" / "submission.json").read_text()) == {"law": {"0": "C", "7": "C"}}


def test_a_result_of_the_bundled_sample_is_marked(tmp_path: Path) -> None:
    task = Mmlu.Spec(name="mmlu", data="bundled", limit=5)
    spec = EvalSpec(task=task, model=ModelSpec(name="any"), run_dir=str(tmp_path / "run"))
    outcome = evaluate(spec, lambda _: FakeEngine())
    assert outcome.partial == {"limit": 5, "data": "bundled sample"}
    assert not (tmp_path / "run" / "submission.json").exists()


def test_a_split_with_answers_leaves_none() -> None:
    task = exam("ceval")
    assert isinstance(task, Ceval)
    assert task.artifacts([record("law", 1.0)]) == {}


# --- what decides the numbers --------------------------------------------------------------------------------------


def test_the_digest_covers_rows_and_shots(tmp_path: Path) -> None:
    def digest(name: str, test: str, dev: str) -> Any:
        folder = mmlu_folder(tmp_path / name, test, dev=dev)
        return exam("mmlu", path=str(folder), shots=1).describe()["data_sha256"]

    test, dev = "Q?,1,2,3,4,A\n", "D?,1,2,3,4,A\n"
    first = digest("a", test, dev)
    assert digest("b", test, dev) == first
    assert digest("c", test.replace("Q", "P"), dev) != first
    assert digest("d", test, dev.replace("D?", "E?")) != first


def test_describe_names_form_shots_and_coverage() -> None:
    facts = exam("mmlu").describe()
    assert (facts["format"], facts["shots"], facts["average"], facts["split"]) == ("base", 5, "micro", "test")
    assert facts["num_subjects"] < facts["num_subjects_official"] == 57
    assert exam("ceval", is_chat=True).describe()["shots"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_official_letter_is_that_of_two_softmaxes_in_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_ties = 0
    for spread in (0.5, 2.0, 6.0) * 30:
        logits_V = (12 + spread * torch.randn(4_000)).to(dtype)
        logits_V[:4] += 6  # the letters hold some of the mass
        twice = logits_V.softmax(-1)[:4].softmax(-1)
        lse = float(logits_V.float().logsumexp(-1))
        answer = dataclasses.replace(letters(*logits_V[:4].tolist(), lse=lse), dtype=str(dtype).removeprefix("torch."))
        assert official_probs(answer) == pytest.approx(twice.tolist(), abs=1e-6 if dtype == torch.float32 else 0)
        assert official_letter(answer) == "ABCD"[int(twice.argmax())]
        num_ties += int((twice == twice.max()).sum() > 1)
    assert (num_ties > 10) == (dtype != torch.float32)  # where the first of equals is the official answer


def test_a_stored_choice_keeps_the_dtype_of_its_logits_and_which_letters_are_bounds() -> None:
    answer = dataclasses.replace(letters(1.0, 2.0), dtype="bfloat16", bounded=(0,))
    assert answers_from_json(answers_to_json((answer,))) == (answer,)
