"""Letter logits of the native engine against those the official scripts got from the original model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from exams import EXAMS, Asked, asked, build_checkpoint

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import ChoiceLogprobs, Engine, Turn

TOLERANCE = 5e-4
MARGIN = 1e-3  # closer letters may change places by rounding alone
VOCABULARY = Path(__file__).parent / "data" / "qwen.tiktoken"


@pytest.fixture(scope="module")
def seq_length(golden: Path) -> int:
    return int(_spec(golden)["config"]["seq_length"])


@pytest.fixture(scope="module")
def engine(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    native = pytest.importorskip("qwen_eval.engines.native.engine")
    folder = tmp_path_factory.mktemp("checkpoint")
    build_checkpoint(_spec(golden), folder)
    (folder / "qwen.tiktoken").symlink_to(VOCABULARY)
    opened = native.open_engine(EngineSpec(), ModelSpec(name="golden", path=str(folder), dtype="fp32", device="cpu"))
    yield opened
    opened.close()


def _spec(golden: Path) -> dict:
    file = golden / "eval" / "checkpoint_spec.json"
    if not file.is_file():
        pytest.skip(f"no eval/checkpoint_spec.json in {golden}")
    return json.loads(file.read_text())


def is_padded_long(row: dict, seq_length: int) -> bool:
    """The original let padding change rows of batches longer than seq_length; ours does not."""
    return row["batch_size"] > 1 and row["padded_length"] > seq_length


@pytest.mark.parametrize("exam", EXAMS)
def test_letter_logits_are_those_of_the_original(
    golden: Path, exam: str, engine: Engine, seq_length: int, record_property: Callable[[str, object], None]
) -> None:
    rows = asked(golden, f"{exam}_base.jsonl", exam, mode="base")
    kept = [(row, task, sample) for row, task, sample in rows if not is_padded_long(row, seq_length)]
    record_property("num_excepted", len(rows) - len(kept))
    assert kept
    requests = [task.request(sample, ()) for _, task, sample in kept]
    for index, answer in engine.run(requests):
        assert isinstance(answer, ChoiceLogprobs)
        _check(kept[index], requests[index], answer)


def _check(question: Asked, request: object, answer: ChoiceLogprobs) -> None:
    row, task, sample = question
    assert answer.logits == pytest.approx(row["logits"], abs=TOLERANCE), sample.id
    assert answer.logsumexp == pytest.approx(row["logsumexp"], abs=TOLERANCE), sample.id
    grade = task.grade(sample, [Turn(request=request, answer=answer)])  # type: ignore[arg-type]
    assert grade.values["official_prob"] == pytest.approx(row["official_prob"], abs=TOLERANCE), sample.id
    if row["logit_margin"] > MARGIN:
        assert grade.extracted_upstream == row["pred"], sample.id
        assert grade.extracted == row["logit_argmax"], sample.id
        assert grade.score_upstream == row["correct"], sample.id
