"""The trainer of the embedded miniature: deterministic, resumable, and what it writes is an ordinary Qwen v1."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import train_nano  # noqa: E402
from nano import export, mixture, texts, vocabulary  # noqa: E402
from nano.counting import Trigram  # noqa: E402
from nano.model import Qwen, Shape, ntk_alpha  # noqa: E402
from nano.optimizer import orthogonalise  # noqa: E402
from nano.structure import structured  # noqa: E402

from qwen_eval.config import ModelSpec  # noqa: E402
from qwen_eval.core import ModelError, Prompt, Score, TokenLogprobs  # noqa: E402
from qwen_eval.data.exercises import CITIES_ZH  # noqa: E402
from qwen_eval.engines.native.engine import NativeEngine  # noqa: E402
from qwen_eval.models.hub import asset_dir  # noqa: E402
from qwen_eval.models.load import open_forward  # noqa: E402


def smoke(out: Path, *more: str) -> Any:
    return train_nano.arguments(["--smoke", "--out", str(out), *more])


def copied(prepared: Path, to: Path) -> Path:
    """A run folder with the data ready and nothing trained."""
    to.mkdir()
    for name in ("qwen.tiktoken", "tokens.npy", "weights.npy"):
        shutil.copy(prepared / name, to)
    return to


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nano") / "run"
    train_nano.train(smoke(out))
    return out


def column(run: Path, name: str) -> list[float]:
    head, *rows = [line.split(",") for line in (run / "loss.csv").read_text().splitlines()]
    return [float(row[head.index(name)]) for row in rows]


def test_a_short_run_learns(run: Path) -> None:
    loss = column(run, "loss")
    assert len(loss) == 2
    assert loss[1] < loss[0] - 0.3


def test_the_same_seed_gives_the_same_run(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    train_nano.train(smoke(again))
    assert (again / "qwen.tiktoken").read_bytes() == (run / "qwen.tiktoken").read_bytes()
    assert np.array_equal(np.load(again / "tokens.npy"), np.load(run / "tokens.npy"))
    assert column(again, "loss") == pytest.approx(column(run, "loss"), abs=1e-3)


def test_a_stopped_run_goes_on_to_the_same_end(run: Path, tmp_path: Path) -> None:
    out = copied(run, tmp_path / "stopped")
    train_nano.train(smoke(out, "--stop-after", "1e-9"))
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 1
    train_nano.train(smoke(out))
    assert column(out, "loss") == pytest.approx(column(run, "loss"), abs=1e-4)
    ends = [torch.load(folder / "state.pt", weights_only=True)["model"] for folder in (run, out)]
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> tuple[Path, Qwen]:
    """An exported directory, and the training model with the weights that were written (rounded to bf16)."""
    shape = Shape(**json.loads((run / "shape.json").read_text()))
    model = export.read_model(run, shape)
    folder = run.parent / "assets" / "mini"
    export.write_checkpoint(model, run / "qwen.tiktoken", folder)
    model.load_state_dict({name: t.bfloat16().float() for name, t in model.state_dict().items()})
    return folder, model


@pytest.mark.parametrize("length", [40, 64, 65, 200, 512])
def test_the_engine_computes_what_the_trainer_computes(checkpoint: tuple[Path, Qwen], length: int) -> None:
    folder, model = checkpoint
    opened = open_forward(ModelSpec(name="mini", path=str(folder), dtype="fp32"))
    ids = torch.randint(0, 500, (1, length), generator=torch.Generator().manual_seed(length))
    prompt = Prompt(ids=tuple(ids[0].tolist()))
    ((_, answer),) = NativeEngine(opened.forward, opened.tokenizer).run([Score(prompt=prompt)])
    assert isinstance(answer, TokenLogprobs)
    with torch.inference_mode():
        logits = model(ids, alpha=ntk_alpha(length, model.shape.seq_length), logn=True)
    expected = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=2e-4, rtol=0)


def test_training_and_evaluation_tokenise_alike(checkpoint: tuple[Path, Qwen]) -> None:
    folder, _ = checkpoint
    theirs = open_forward(ModelSpec(name="mini", path=str(folder), dtype="fp32")).tokenizer
    ours = vocabulary.encoding(vocabulary.read(folder / "qwen.tiktoken"))
    for text in (
        "def f(x):\n    return 12 + x\n",
        "问题：天是什么颜色？\n答案：A\n\n",
        "Answer: C\n\nQuestion:",
        "   \n\n x",
    ):
        assert theirs.encode(text) == ours.encode_ordinary(text)
    document = mixture.chat("What is 2 + 2?", "4")
    ids, _ = mixture.encode(document, ours)
    prompt = theirs.render(Prompt.user("What is 2 + 2?"))
    assert ids[: len(prompt)] == prompt
    assert theirs.decode(ids[len(prompt) :]) == "4<|im_end|><|endoftext|>"


def test_a_flipped_byte_in_the_weights_is_refused(checkpoint: tuple[Path, Qwen], tmp_path: Path) -> None:
    folder, _ = checkpoint
    assert asset_dir("mini", folder.parent) == folder
    damaged = tmp_path / "assets" / "mini"
    shutil.copytree(folder, damaged)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: sha256"):
        asset_dir("mini", damaged.parent)


def test_no_token_joins_a_mark_and_the_letter_of_an_answer(run: Path) -> None:
    encoding = vocabulary.encoding(vocabulary.read(run / "qwen.tiktoken"))
    for mark, letter in (("答案：", "A"), ("Answer:", " B"), ("step by step\n", "Tom")):
        assert encoding.encode_ordinary(mark + letter) == [
            *encoding.encode_ordinary(mark),
            *encoding.encode_ordinary(letter),
        ]


def test_a_chinese_city_is_one_token_in_a_statement_and_one_in_an_option() -> None:
    ranks = vocabulary.read(asset_dir("qwen-nano") / "qwen.tiktoken")
    encoding, twins = vocabulary.encoding(ranks), set(vocabulary.twins(ranks))
    for city in CITIES_ZH:
        (bare,) = (t for t in encoding.encode_ordinary(f"小明住在{city}。") if city in encoding.decode([t]))
        (spaced,) = encoding.encode_ordinary(f"A. {city}")[2:]
        assert encoding.decode([bare]) == city
        assert (spaced, bare) in twins


def test_a_chinese_word_begins_with_one_code_with_and_without_a_space() -> None:
    shape = Shape(vocab_size=64, hidden_size=192, num_layers=4, head_size=32, mlp_size=64, seq_length=32)
    model = Qwen(shape)
    structured(model, seed=0, twins=[(5, 6)])
    codes = model.transformer["wte"].weight[:, : 192 - 4 * 32]
    assert torch.equal(codes[5], codes[6])
    assert not torch.equal(codes[5], codes[7])


def test_every_kind_of_document_is_written_and_answers_weigh_most() -> None:
    writer = mixture.Writer(texts.read(None), seed=3)
    for kind in mixture.SECOND.exercises:
        document = writer.write(kind)
        weights = {weight for _, weight in document}
        assert max(weights) >= mixture.PLAIN, kind
        assert all(text for text, _ in document), kind


def test_rows_begin_with_a_document_and_are_full(run: Path) -> None:
    rows = mixture.load(run)
    assert rows.tokens.shape == rows.weights.shape
    assert rows.tokens.shape[1] == 65
    assert rows.weights.min() > 0


def test_the_last_stage_is_read_once_at_the_end_and_the_pool_around_it() -> None:
    rows = mixture.Rows(tokens=np.repeat(np.arange(10, dtype=np.uint16)[:, None], 5, 1), weights=np.ones((10, 5)))
    read = [train_nano.batch_of(rows, step, 2, 5, 7)[0][:, 0].tolist() for step in range(7)]
    assert read == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [6, 7], [8, 9]]


def test_the_learning_rate_falls_to_zero_and_again_from_a_part_of_it_in_the_last_stage() -> None:
    options = train_nano.arguments(["--out", "-", "--warmup", "2", "--decay", "0.5", "--last-lr", "0.25"])
    scales = [train_nano.lr_scale(step, 8, 10, options) for step in range(10)]
    assert scales == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.25, 0.125])


def test_passages_of_the_last_stage_break_off_and_keep_their_lines() -> None:
    def contexts(*, is_ragged: bool) -> list[str]:
        writer = mixture.Writer(texts.read(None), seed=3, is_ragged=is_ragged)
        asked = (writer.write("recall")[0][0] for _ in range(60))
        return [text.rsplit("\n\n", 1)[0] for text in asked if not text.startswith("<|im_start|>")]

    assert all(text.endswith(".") and "\n" not in text for text in contexts(is_ragged=False))
    ragged = contexts(is_ragged=True)
    assert any(not text.endswith(".") for text in ragged)
    assert any("\n" in text for text in ragged)


def test_text_kept_out_of_training_is_in_no_training_passage() -> None:
    library = texts.read(None)
    training, heldout = (texts.Texts(documents=[d for d in library.documents if d.heldout is h]) for h in (False, True))
    assert training.documents
    assert not {d.id for d in training.documents} & {d.id for d in heldout.documents}
    passage = texts.Passages(library, heldout=False)(random.Random(0), "en", 200)
    assert 100 < len(passage) <= 400


def test_muon_steps_are_nearly_orthogonal() -> None:
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrices))
    assert singular.min() > 0.4
    assert singular.max() < 1.4


def test_the_trigram_baseline_is_a_distribution_and_knows_its_text() -> None:
    ids = [1, 2, 3, 1, 2, 4, 1, 2, 3, 0] * 3
    model = Trigram(ids, num_tokens=6)
    assert sum(model.probability(1, 2, c) for c in range(6)) == pytest.approx(1.0)
    assert sum(model.probability(5, 5, c) for c in range(6)) == pytest.approx(1.0)  # a context never seen
    assert model.perplexity(ids) < model.unigram_perplexity(ids)
