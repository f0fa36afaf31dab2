"""Needle in a haystack: lengths and depths are exact to the token, answers are read whatever their wording."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from nano import generator

from qwen_eval.__main__ import main
from qwen_eval.core import ConfigError, DataError, Generate, Metric, Prompt, Record, Request
from qwen_eval.data import exercises
from qwen_eval.engines.fake import FakeEngine
from qwen_eval.models.tokenizer import QwenTokenizer
from qwen_eval.runs.evaluate import ask
from qwen_eval.tasks.haystack import Frame, bury
from qwen_eval.tasks.needle import WORDINGS, Needle, begins_with, says
from qwen_eval.tasks.needle import NeedleSpec as Spec
from qwen_eval.tasks.registry import TaskContext

TOKENIZER = QwenTokenizer({bytes([i]): i for i in range(256)}, num_extra_tokens=4)
HAY = {
    "en": "The grass grew tall that year, and nobody cut it. " * 12,
    "zh": "参差荇菜，左右流之。窈窕淑女，寤寐求之。" * 14,
}


def task_of(folder: Path, *, is_chat: bool = False, facts: dict | None = None, **spec: object) -> Needle:
    for language, hay in HAY.items():
        (folder / f"{language}.txt").write_text(hay, encoding="utf-8")
    context = TaskContext(tokenizer=TOKENIZER, is_chat=is_chat, model_facts=facts or {})
    return Needle(Spec(path=str(folder), **spec), context)  # type: ignore[arg-type]


def records_of(task: Needle, reply: object) -> list[Record]:
    engine, records = FakeEngine(reply), []  # type: ignore[arg-type]
    engine.tokenizer = TOKENIZER  # type: ignore[assignment]
    ask(engine, task, task.samples(), records.append)
    return records


# --- the prompt ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("num_needles", [1, 3])
def test_every_cell_has_its_exact_length_and_its_needle_at_the_exact_depth(
    tmp_path: Path, is_chat: bool, num_needles: int
) -> None:
    depths = [0.0, 12.5, 33.0, 50.0, 99.0, 100.0]
    task = task_of(tmp_path, is_chat=is_chat, lengths=[400, 513, 1500], depths=depths, num_needles=num_needles)
    assert len(task.samples()) == 3 * 6 * 2 * 2
    for sample in task.samples():
        ids, data = task.buried(sample).ids, sample.data
        language, cities = data["language"], data["cities"]
        assert len(ids) == data["length"]
        needles = [
            TOKENIZER.encode(WORDINGS[language].needle.replace("{city}", city).replace("{number}", key))
            for city, key in zip(cities, sample.target)
        ]
        rest = list(ids)
        for start, needle in sorted(zip(task.buried(sample).starts, needles), reverse=True):
            assert rest[start : start + len(needle)] == needle
            del rest[start : start + len(needle)]
        hay = TOKENIZER.encode(HAY[language]) * 9
        head = next(i for i in range(len(rest)) if rest[i : i + 40] == hay[:40])
        room = next(n for n in range(len(rest) - head) if rest[head + n] != hay[n])  # where the question begins
        assert room >= task.buried(sample).room  # a first letter of the question may be the haystack's next one
        room = task.buried(sample).room
        before = sum(len(n) for n, d in zip(needles, data["depths"]) if d < data["depths"][0])
        assert task.buried(sample).starts[0] == head + before + round(data["depths"][0] / 100 * room)
        asked = TOKENIZER.decode(rest[head + room :])
        assert all(city in asked for city in cities)
        assert not any(key in asked for key in sample.target)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_chat_cell_is_the_rendering_of_its_own_text(tmp_path: Path, language: str) -> None:
    task = task_of(tmp_path, is_chat=True, lengths=[600], depths=[40.0], languages=[language])
    sample = task.samples()[0]
    ids = task.buried(sample).ids
    first = TOKENIZER.im_start_id
    users = [i for i, token in enumerate(ids) if token == first][1]
    end = [i for i, token in enumerate(ids) if token == TOKENIZER.im_end_id][1]
    content = TOKENIZER.decode(ids[users + 1 + len("user\n") : end])
    if "�" not in content:  # a haystack may be cut inside a character; then its text is another
        assert list(ids) == TOKENIZER.render(Prompt.user(content))
    empty = TOKENIZER.render(Prompt.user(""))
    assert list(ids[: users + 6]) == empty[: users + 6]
    assert list(ids[end:]) == empty[users + 6 :]
    assert TOKENIZER.end_ids(Prompt(ids=ids)) == TOKENIZER.eos_ids


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_question_is_the_one_that_the_miniature_has_learnt(tmp_path: Path, language: str) -> None:
    task = task_of(tmp_path, lengths=[500], depths=[100.0], languages=[language])
    sample = task.samples()[0]
    (city,), (key,) = sample.data["cities"], sample.target
    text = TOKENIZER.decode(task.buried(sample).ids)
    question = {"en": f"What is the special magic number of {city}?", "zh": f"{city}的神奇数字是多少？"}[language]
    exercise = exercises.Exercise(
        kind="recall", topic=language, key="", question=question, answer=key, language=language, context="|"
    )
    assert text.endswith(generator.needle(language, city, key) + exercises.recall_block(exercise)[1:])


def test_cells_of_one_length_share_the_haystack_up_to_the_needle(tmp_path: Path) -> None:
    task = task_of(tmp_path, lengths=[800], depths=[50.0], languages=["en"], per_cell=3)
    prompts = [task.buried(sample) for sample in task.samples()]
    shared = min(p.starts[0] for p in prompts)
    assert shared > 300
    assert len({p.ids[:shared] for p in prompts}) == 1
    assert len({tuple(sample.target) for sample in task.samples()}) == 3


def test_needles_are_drawn_by_the_seed(tmp_path: Path) -> None:
    cells = {"lengths": [400], "depths": [10.0], "languages": ["en"]}
    first, again, other = (task_of(tmp_path, seed=seed, **cells).samples()[0] for seed in (1, 1, 2))
    assert (first.target, first.data) == (again.target, again.data)
    assert first.target != other.target
    assert len(first.target[0]) == 7


def test_a_short_haystack_is_repeated_and_that_is_said(tmp_path: Path) -> None:
    task = task_of(tmp_path, lengths=[400, 2000], languages=["en"])
    num = len(TOKENIZER.encode(HAY["en"]))
    assert task.notes == [f"the en haystack of {num} tokens is repeated to reach 2000"]
    ids = bury([1, 2, 3], [[9]], [50], Frame(tail=(7,)), 10).ids
    assert ids == (1, 2, 3, 1, 9, 2, 3, 1, 2, 7)


def test_a_special_token_written_in_the_haystack_stays_text(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "book.txt").write_text("a <|im_end|> b " * 40)
    context = TaskContext(tokenizer=TOKENIZER, is_chat=True)
    task = Needle(Spec(path=str(tmp_path / "own"), lengths=[500], languages=["zh"]), context)
    ids = task.buried(task.samples()[0]).ids
    assert sum(token == TOKENIZER.im_end_id for token in ids) == 2  # of the system and of the user turn


# --- reading the answer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "found"), [
    (" 1234567", True),
    ("The special magic number of Paris is 1,234,567.", True),
    ("答案是１２３４５６７。", True),
    ("1 234 567", True),
    ("**1234567**", True),
    ("12345678", False),  # a longer number is another number
    ("91234567", False),
    ("123456", False),
    ("1234 and 567", False),
    ("7654321", False),
    ("", False),
])  # fmt: skip
def test_the_key_is_found_in_any_wording(text: str, found: bool) -> None:
    assert says(text, "1234567") is found


def test_strict_means_that_the_answer_begins_with_the_key() -> None:
    assert begins_with(" 1234567.", "1234567")
    assert not begins_with("It is 1234567.", "1234567")
    assert not begins_with("12345678", "1234567")


def test_several_needles_score_the_share_found(tmp_path: Path) -> None:
    task = task_of(tmp_path, lengths=[600], depths=[10.0], languages=["en"], num_needles=4, per_cell=1)
    sample = task.samples()[0]
    records = records_of(task, f" {sample.target[0]}, {sample.target[2]} and 5.")
    assert records[0].grade.score == 0.5
    assert records[0].grade.extracted == [sample.target[0], sample.target[2]]
    assert records[0].grade.values["strict"] == 0.0
    assert "What are the special magic numbers of" in TOKENIZER.decode(task.buried(sample).ids)


def finder(task: Needle, misses: set) -> object:
    """Answers with the key of the cell, except in `misses` (length, depth)."""
    cells = {task.buried(sample).ids: sample for sample in task.samples()}

    def reply(request: Request) -> str:
        assert isinstance(request, Generate)
        sample = cells[request.prompt.ids or ()]
        is_missed = (sample.data["length"], sample.data["depths"][0]) in misses
        return " I do not know" if is_missed else f" {sample.target[0]}"

    return reply


@pytest.mark.parametrize(("misses", "effective"), [
    (set(), 1200),
    ({(1200, 0.0)}, 600),
    ({(600, 0.0)}, 400),  # 1200 is whole again, but a shorter one is not
    (set(product([400], [0.0, 50.0])), 0),
])  # fmt: skip
def test_effective_length_is_the_longest_without_a_gap_below(tmp_path: Path, misses: set, effective: int) -> None:
    task = task_of(tmp_path, lengths=[400, 600, 1200], depths=[0.0, 50.0, 100.0])
    metrics = task.summarise(records_of(task, finder(task, misses)))
    assert metrics["effective_length"].value == effective
    cells = [name for name in metrics if "@" in name]
    assert len(cells) == 9
    for length, depth in product([400, 600, 1200], [0.0, 50.0, 100.0]):
        metric = metrics[f"accuracy/{length}@{depth:g}"]
        assert metric.value == (0.0 if (length, depth) in misses else 1.0)
        assert metric.n == 4
        assert metric.low is not None
        assert metric.high is not None
    assert metrics["accuracy"].value == pytest.approx(1 - len(misses) / 9)
    assert metrics["accuracy_strict"].value == metrics["accuracy"].value


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "message"), [
    ({"depths": [101.0]}, "task.depths=101: a depth is a percentage, 0 to 100"),
    ({"depths": [-1.0]}, "task.depths=-1"),
    ({"languages": ["fr"]}, "task.languages=fr: unknown"),
    ({"per_cell": 0}, "task.per_cell=0"),
    ({"num_needles": 40}, "task.num_needles=40"),
    ({"needle": "Eat a sandwich."}, r"must hold \{number\}"),
    ({"subjects": ["400"]}, "choose with task.lengths"),
])  # fmt: skip
def test_a_bad_value_is_one_line(tmp_path: Path, spec: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(tmp_path, **spec)


def test_a_length_too_short_for_its_own_question_is_refused(tmp_path: Path) -> None:
    task = task_of(tmp_path, lengths=[40])
    with pytest.raises(ConfigError, match=r"task\.lengths=40: question and needles alone take \d+ tokens"):
        task.request(task.samples()[0], ())


def test_an_empty_or_missing_haystack_is_one_line(tmp_path: Path) -> None:
    context = TaskContext(tokenizer=TOKENIZER)
    (tmp_path / "en.txt").write_text("  \n")
    with pytest.raises(DataError, match="the texts are empty"):
        Needle(Spec(path=str(tmp_path)), context).samples()
    (tmp_path / "en.txt").write_text("Some text.")
    with pytest.raises(DataError, match=r"no haystack for zh; add zh\.txt"):
        Needle(Spec(path=str(tmp_path)), context).samples()


def test_lengths_beyond_training_without_tricks_are_warned_of(tmp_path: Path) -> None:
    facts = {"train_length": 128, "dynamic_ntk": False, "logn": False, "windows": None}
    assert "beyond 128 tokens" in task_of(tmp_path, facts=facts, lengths=[300]).notes[-1]
    assert task_of(tmp_path, facts={**facts, "dynamic_ntk": True}, lengths=[300]).notes == []
    assert task_of(tmp_path, facts=facts).lengths == [64, 128, 256, 512, 1024]


# --- the whole -------------------------------------------------------------------------------------------------------


def test_one_command_writes_the_heat_map(tmp_path: Path) -> None:
    task_of(tmp_path)
    command = ["task=needle", "engine=fake", f"task.path={tmp_path}", "task.lengths=400,600", "task.depths=0,100"]
    assert main([*command, f"run_dir={tmp_path}/run", "quiet=true"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["accuracy"]["value"] == 0.0
    assert "accuracy/600@100" in result["metrics"]
    svg = (tmp_path / "run" / "needle.svg").read_text()
    assert "<svg" in svg
    assert "100 %" in svg
    assert (tmp_path / "run" / "needle.png").read_bytes().startswith(b"\x89PNG")


def test_the_heat_map_is_the_same_bytes_each_time() -> None:
    from qwen_eval.figures import heat_map

    cells = {(400, 0.0): Metric(value=1.0, n=4, low=0.5, high=1.0), (400, 100.0): Metric(value=0.25, n=4)}
    assert heat_map(cells, "svg") == heat_map(cells, "svg")
