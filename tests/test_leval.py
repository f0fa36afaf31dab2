"""L-Eval: official predictions have their official scores, documents are read once, both readings stand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import said

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import Completions, ConfigError, DataError, Generate, Grade, Record, Request, Sample, Turn
from qwen_eval.engines.native.engine import NativeEngine, open_engine
from qwen_eval.extraction import leval as reading
from qwen_eval.models.tokenizer import load_tokenizer
from qwen_eval.tasks.leval import Leval, LevalSpec, cut_from_right
from qwen_eval.tasks.registry import TaskContext

DATA = Path(__file__).parent / "data"


def leval(*, protocol: str = "robust", is_chat: bool = True, tokenizer: Any = None, **keys: Any) -> Leval:
    facts = keys.pop("facts", {})
    context = TaskContext(protocol=protocol, is_chat=is_chat, tokenizer=tokenizer, model_facts=facts)
    return Leval(LevalSpec(**{"data": "bundled", **keys}), context)


def graded(sample: Sample, *replies: str) -> Grade:
    task = leval()
    turns: list[Turn] = []
    for reply in replies:
        request = task.request(sample, turns)
        assert isinstance(request, Generate)
        turns.append(Turn(request=request, answer=said(reply)))
    assert task.request(sample, turns) is None
    return task.grade(sample, turns)


# --- the official scorer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exam", "score"), [("tpo", 84.39), ("quality", 82.18), ("coursera", 75.58), ("gsm100", 96.00)]
)
def test_official_predictions_have_their_official_score(official: Path, exam: str, score: float) -> None:
    task = leval(path=str(official / "leval"), subjects=[exam])
    samples = task.samples()
    with gzip.open(official / "leval" / "oracle" / "gpt4-32k" / f"{exam}.pred.jsonl.gz", "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    assert [sample.data["question"] for sample in samples] == [row["query"] for row in rows]
    scores = []
    for sample, row in zip(samples, rows):
        request = Generate(prompt=task.prompt(sample), max_new_tokens=1)
        scores.append(task.grade(sample, [Turn(request=request, answer=said(row["gpt4-x_pred"]))]))
    upstream = 100 * sum(grade.score_upstream or 0 for grade in scores) / len(scores)
    assert upstream == pytest.approx(score, abs=0.005)
    robust = 100 * sum(grade.score or 0 for grade in scores) / len(scores)
    assert abs(robust - score) < 3  # of "A, B, C" the official reading takes the A alone


@pytest.mark.parametrize(
    ("reply", "several", "letters"),
    [
        ("B", False, "B"),
        ("The correct option is C.", False, "C"),
        ("As the text says, C.", False, "A"),  # the first capital, as the official scorer has it
        ("none", False, "A"),
        ("", False, ""),
        ("BDA because", True, "ABD"),
        ("A. one\nC. two", True, "AC"),
        ("B, C and D are right.", True, "BCD"),  # the run, then the capitals before a space
        ("B, C", True, "B"),  # nothing stands behind the C
        ("no idea", True, "A"),
    ],
)
def test_official_letters(reply: str, several: bool, letters: str) -> None:
    assert reading.official_letters(reply, several=several) == letters


@pytest.mark.parametrize(
    ("reply", "letters"),
    [
        ("ACD", "ACD"),
        ("A, C and D", "ACD"),
        ("The answers are (A) and (C).", "AC"),
        ("The correct answers are: A, B", "AB"),
        ("A. Its author\nC. Its time\nD. The commit before it", "ACD"),
        ("Answer: B", "B"),
        ("**B**", "B"),
        ("答案是A、C", "AC"),
        ("As far as I know, that is open.", ""),
        ("<think>A? B?</think>C", "C"),
    ],
)
def test_all_letters_that_are_concluded(reply: str, letters: str) -> None:
    assert reading.concluded_letters(reply) == letters


@pytest.mark.parametrize(
    ("read", "gold", "robust", "upstream"),
    [("BD", "BD", 1, 1), ("B", "BD", 0.25, 0.25), ("BC", "BD", 0, 0), ("", "BD", 0, 0.25), ("BD", "DB", 0, 0.25)],
)
def test_a_part_of_the_letters_is_worth_a_quarter(read: str, gold: str, robust: float, upstream: float) -> None:
    assert reading.letters_score(read, gold) == robust
    assert reading.official_letters_score(read, gold) == upstream


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("so she makes 9 * $2 = $18 per day.\nThe answer is 18", "18"),
        ("The answer is $1,234.50", "1234"),  # the point ends it
        ("It is 12 apples, or -7 in all", "7"),  # the last word of the first paragraph with a digit, without its sign
        ("no number", ""),
    ],
)
def test_official_numbers(reply: str, number: str) -> None:
    assert reading.official_number(reply) == number


def test_truth_is_read_from_words() -> None:
    assert reading.official_truth("Untrue! Or false.") == "true"  # a piece of a word is enough
    assert reading.concluded_truth("Untrue! Or false.") == "false"
    assert reading.concluded_truth("That is not true.") == "false"
    assert reading.concluded_truth("No idea.") == ""
    assert reading.gold_truths("True [fact: False]") == ("true", "false")


def test_hostile_replies_are_read_in_bounds() -> None:
    for reply in ("A" * 10**6, "A, " * 300_000, "9" * 10**6, "answer " * 200_000, "(A) " * 100_000):
        for read in (reading.concluded_letters, reading.official_number, reading.concluded_truth):
            read(reply)
        reading.official_letters(reply, several=True)
        reading.official_number_score(reading.official_number(reply), "18")


# --- asking --------------------------------------------------------------------------------------------------------


def test_prompts_are_the_official_ones() -> None:
    samples = {sample.id: sample for sample in leval().samples()}
    user = leval().prompt(samples["tpo/0/0"]).messages
    assert [message.role for message in user] == ["system", "user"]
    assert user[0].content.endswith("please directly give the concise and accurate answer. ")
    assert user[1].content.startswith("Document is as follows. Good morning, everyone.")
    assert user[1].content.endswith("D. how to read a tide table  \nAnswer:")
    examples = leval().prompt(samples["gsm100/0/0"]).messages[1].content
    assert examples.count("Let's think step by step") == 9
    base = leval(is_chat=False).prompt(samples["sci_fi/0/0"]).text or ""
    assert base.startswith("Now you are given a scientific fiction.")


def test_the_fact_question_is_asked_without_the_document() -> None:
    sample = next(s for s in leval().samples() if s.group == "sci_fi")
    first = leval().request(sample, ())
    assert isinstance(first, Generate)
    second = leval().request(sample, [Turn(request=first, answer=said("True"))])
    assert isinstance(second, Generate)
    content = second.prompt.messages[0].content
    assert content.endswith("up until your last training\nAnswer:")
    assert "THE SLOW COLONY" not in content


def test_science_fiction_is_the_mean_of_loyalty_and_fact() -> None:
    sample = next(s for s in leval().samples() if s.group == "sci_fi")
    assert sample.target == ["true", "false"]
    assert graded(sample, "True", "False").score == 1
    assert graded(sample, "True", "True").score == 0.5
    assert graded(sample, "I cannot say", "Maybe").score == 0
    assert "no_answer" in graded(sample, "I cannot say", "Maybe").flags


def test_the_protocol_chooses_the_reading() -> None:
    sample = next(s for s in leval().samples() if s.id == "tpo/0/0")
    grade = graded(sample, "As the professor says, the answer is B.")
    assert (grade.extracted, grade.score) == ("B", 1)
    assert (grade.extracted_upstream, grade.score_upstream) == ("A", 0)  # the A of "As"
    record = Record(
        sample_id=sample.id, group="tpo", cluster=sample.cluster, target=sample.target, prompts=("",),
        prompt_sha256=("",), num_prompt_tokens=(0,), answers=(said("x"),), grade=grade,
    )  # fmt: skip
    for protocol, score in (("robust", 1), ("upstream", 0)):
        metrics = leval(protocol=protocol).summarise([record.under(protocol)])
        assert metrics["accuracy"].value == metrics["accuracy/tpo"].value == score


def test_a_long_document_loses_its_end_for_all_its_questions_alike() -> None:
    tokenizer = load_tokenizer(DATA)
    task = leval(tokenizer=tokenizer, max_prompt_tokens=400)
    samples = [s for s in task.samples() if s.group == "quality"]
    assert len({s.data["document"] for s in samples}) == 1
    assert all(len(tokenizer.render(task.prompt(s))) <= 400 for s in samples)
    whole = next(s for s in leval().samples() if s.group == "quality").data["document"]
    assert whole.startswith(samples[0].data["document"])
    assert any("documents lost their end to fit 400 tokens" in note for note in task.notes)
    with pytest.raises(ConfigError, match=r"a question of .* alone takes"):
        leval(tokenizer=tokenizer, max_prompt_tokens=20).samples()


def test_words_are_dropped_in_official_steps() -> None:
    tokenizer = load_tokenizer(DATA)
    document = " ".join(["antidisestablishmentarianism"] * 9000)  # six tokens a word
    kept = cut_from_right(document, tokenizer, 4000)
    assert len(kept.split(" ")) == 500  # 4,000 words, then 3,750 ... until 500 x 6 tokens fit
    assert len(tokenizer.encode(kept)) <= 4000


def test_the_average_says_of_how_many_it_is() -> None:
    task = leval()
    task.samples()
    assert task.notes[0].startswith("the average is over 5 exams")
    task = leval(subjects=["tpo"])
    assert {s.group for s in task.samples()} == {"tpo"}


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="leval is asked without examples"):
        leval(shots=5)


def test_room_to_think_leaves_room_for_the_document() -> None:
    assert leval(facts={"max_length": 32768}).limit == 32768 - 512
    assert leval(facts={"max_length": 32768, "thinks": True}).limit == 16384


def test_odd_rows_are_refused(tmp_path: Path) -> None:
    row = {"instructions": ["q"], "outputs": ["True"], "input": "x"}
    (tmp_path / "sci_fi.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="'True' is no answer of sci_fi"):
        leval(path=str(tmp_path)).samples()


# --- the document is read once -------------------------------------------------------------------------------------


def nano(*, share: bool) -> NativeEngine:
    model = ModelSpec(name="qwen-nano-chat", asset="qwen-nano", chat=True, dtype="fp32", device="cpu")
    return open_engine(EngineSpec(name="native", prefix_sharing=share), model)


def answers(engine: NativeEngine, requests: list[Request]) -> list[str]:
    found = dict(engine.run(requests))
    texts = []
    for i in range(len(requests)):
        answer = found[i]
        assert isinstance(answer, Completions)
        texts.append(answer.text)
    return texts


def requests_of(task: Leval) -> list[Request]:
    found = [task.request(sample, ()) for sample in task.samples()]
    return [request for request in found if request is not None]


def test_the_questions_of_a_document_share_its_computation() -> None:
    shared, alone = nano(share=True), nano(share=False)
    keys: dict[str, Any] = {"max_new_tokens": 6, "max_prompt_tokens": 1500, "subjects": ["quality", "tpo"]}
    task = leval(tokenizer=shared.tokenizer, **keys)
    requests = requests_of(task)
    assert answers(shared, requests) == answers(alone, requests)
    asked, computed = shared.info["prompt_tokens"], shared.info["computed_tokens"] - shared.info["generated_tokens"]
    assert alone.info["computed_tokens"] - alone.info["generated_tokens"] >= asked
    assert asked > 2.5 * computed  # four questions a document


def test_quality_is_read_at_least_three_times_less(official: Path) -> None:
    engine = nano(share=True)
    keys: dict[str, Any] = {"max_new_tokens": 4, "max_prompt_tokens": 1500, "subjects": ["quality"]}
    task = leval(path=str(official / "leval"), tokenizer=engine.tokenizer, **keys)
    requests = requests_of(task)
    assert len(requests) == 202
    answers(engine, requests)
    asked, computed = engine.info["prompt_tokens"], engine.info["computed_tokens"] - engine.info["generated_tokens"]
    print(f"QuALITY: {asked:,} tokens asked, {computed:,} computed, {asked / computed:.1f} times fewer")
    assert asked >= 3 * computed
    first = requests[:16]  # the questions of the first document
    assert answers(nano(share=False), first) == answers(engine, first)
