"""Perplexity by length: each published way to cut a text, against a loop written from its description."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_eval.__main__ import main
from qwen_eval.core import ConfigError, DataError, Record, Request, Score, TokenLogprobs
from qwen_eval.engines.fake import ByteTokenizer, FakeEngine
from qwen_eval.models.tokenizer import QwenTokenizer
from qwen_eval.runs.evaluate import ask
from qwen_eval.tasks.long_ppl import LongPpl
from qwen_eval.tasks.long_ppl import LongPplSpec as Spec
from qwen_eval.tasks.registry import TaskContext

TOKENIZER = QwenTokenizer({bytes([i]): i for i in range(256)}, num_extra_tokens=4)
EOT = TOKENIZER.endoftext_id


def logprob(context: Sequence[int], token: int) -> float:
    """A language model that depends on all it has read; exact in fp32."""
    return -(1 + (sum((i + 1) * t for i, t in enumerate(context)) * 31 + token * 7) % 97) / 32


def scored(request: Request) -> TokenLogprobs:
    assert isinstance(request, Score)
    ids = request.prompt.ids or ()
    places = range(request.num_context, len(ids))
    return TokenLogprobs(
        token_ids=tuple(ids[p] for p in places), logprobs=tuple(logprob(ids[:p], ids[p]) for p in places)
    )


def text(num_tokens: int, seed: int = 0) -> str:
    """One token a character."""
    return "".join("abcdefg hij\n"[(i * i * 7 + i // 5 + seed) % 12] for i in range(num_tokens))


def task_of(
    folder: Path, texts: Sequence[str], facts: dict | None = None, protocol: str = "robust", **spec: object
) -> LongPpl:
    for i, content in enumerate(texts):
        (folder / f"doc{i}.txt").write_text(content)
    context = TaskContext(tokenizer=TOKENIZER, model_facts=facts or {}, protocol=protocol)
    return LongPpl(Spec(path=str(folder), **spec), context)  # type: ignore[arg-type]


def records_of(task: LongPpl) -> list[Record]:
    engine, records = FakeEngine(scored), []
    engine.tokenizer = TOKENIZER  # type: ignore[assignment]
    ask(engine, task, task.samples(), records.append)
    return records


def ppl(losses: Sequence[float]) -> float:
    return math.exp(math.fsum(losses) / len(losses))


# --- presets ---------------------------------------------------------------------------------------------------------


def test_the_arxiv_protocol_scores_all_but_the_first_token_of_chunks_side_by_side(tmp_path: Path) -> None:
    texts = [text(70), text(45, 3)]
    task = task_of(tmp_path, texts, lengths=[8, 16])
    records = records_of(task)
    metrics = task.summarise(records)
    for length in (8, 16):
        losses = []
        for content in texts:
            ids = TOKENIZER.encode(content)
            ids = ids[: len(ids) // 16 * 16]  # both lengths see the tokens that the longest can use
            for start in range(0, len(ids), length):
                chunk = ids[start : start + length]
                losses += [-logprob(chunk[:i], chunk[i]) for i in range(1, length)]
        assert metrics[f"ppl/{length}"].value == pytest.approx(ppl(losses), rel=1e-12)
        assert metrics[f"ppl/{length}"].n == len(losses)
        assert metrics[f"ppl/{length}"].num_clusters == 2
        assert metrics[f"bits_per_byte/{length}"].value == pytest.approx(
            math.fsum(losses) / len(losses) / math.log(2), rel=1e-12
        )
    assert next(iter(metrics)) == "ppl/16"  # the headline: one length, not several in one number


@pytest.mark.parametrize("protocol", ["robust", "upstream"])
@pytest.mark.parametrize(("num_tokens", "length", "stride"), [(50, 16, 8), (64, 16, 16), (10, 16, 4), (33, 16, 5)])
def test_the_strided_protocol_is_that_of_the_transformers_page(
    tmp_path: Path, protocol: str, num_tokens: int, length: int, stride: int
) -> None:
    task = task_of(tmp_path, [text(num_tokens)], protocol=protocol, preset="hf-stride", lengths=[length], stride=stride)
    ids = TOKENIZER.encode(text(num_tokens))
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + length, num_tokens)
        target_length = end - previous_end
        window = ids[begin:end]
        labels = [-100] * (len(window) - target_length) + window[len(window) - target_length :]
        losses = [-logprob(window[:i], labels[i]) for i in range(1, len(window)) if labels[i] != -100]
        valid = sum(label != -100 for label in labels)
        weight = valid - 1 if protocol == "upstream" else len(losses)
        if losses:
            total, count = total + math.fsum(losses) / len(losses) * weight, count + weight
        previous_end = end
        if end == num_tokens:
            break
    metric = task.summarise(records_of(task))[f"ppl/{length}"]
    assert metric.value == pytest.approx(math.exp(total / count), rel=1e-12)
    assert metric.n == count
    if protocol == "robust" and stride < length:
        assert count == num_tokens - 1  # every token but the first, once


def test_the_llama_cpp_protocol_scores_the_second_half_of_each_chunk(tmp_path: Path) -> None:
    task = task_of(tmp_path, [text(70)], preset="llama.cpp-512", lengths=[16])
    ids = TOKENIZER.encode(text(70))
    losses = []
    for i in range(70 // 16):
        chunk = ids[i * 16 : (i + 1) * 16]
        first = 16 // 2
        losses += [-logprob(chunk[: j + 1], chunk[j + 1]) for j in range(first, 16 - 1)]  # logits at j say token j + 1
    metric = task.summarise(records_of(task))["ppl/16"]
    assert (metric.value, metric.n) == (pytest.approx(ppl(losses), rel=1e-12), len(losses))
    assert LongPpl(Spec(path=str(tmp_path), preset="llama.cpp-512"), task.context).lengths == [512]


def rolling_pairs(ids: list[int], prefix: int, length: int) -> list[tuple[list[int], list[int]]]:
    """(tokens fed, tokens predicted), from the description of lm-evaluation-harness's rolling windows."""
    first = min(length, len(ids))
    pairs = [([prefix, *ids[: first - 1]], ids[:first])]
    predicted = first
    while predicted < len(ids):
        num = min(len(ids) - predicted, length)
        end = predicted + num
        pairs.append((ids[end - length - 1 : end - 1], ids[end - num : end]))
        predicted = end
    return pairs


@pytest.mark.parametrize("num_tokens", [7, 16, 17, 32, 45])
def test_the_rolling_protocol_feeds_and_scores_the_harness_windows(tmp_path: Path, num_tokens: int) -> None:
    content = text(num_tokens)
    task = task_of(tmp_path, [content], preset="lm-eval-rolling", lengths=[16])
    pairs = rolling_pairs(TOKENIZER.encode(content), EOT, 16)
    requests = [task.request(sample, ()) for sample in task.samples()]
    for request, (fed, predicted) in zip(requests, pairs, strict=True):
        assert isinstance(request, Score)
        ids = list(request.prompt.ids or ())
        assert ids[:-1] == fed
        assert ids[request.num_context :] == predicted
        assert request.num_fed == len(fed)
    nll = -math.fsum(
        logprob((fed + predicted[-1:])[: len(fed) + 1 - len(predicted) + i], token)
        for fed, predicted in pairs
        for i, token in enumerate(predicted)
    )
    metrics = task.summarise(records_of(task))
    assert metrics["ppl/16"].n == num_tokens
    assert metrics["word_perplexity@16"].value == pytest.approx(math.exp(nll / len(re.split(r"\s+", content))))
    assert metrics["byte_perplexity@16"].value == pytest.approx(math.exp(nll / len(content.encode())))
    assert metrics["bits_per_byte/16"].value == pytest.approx(nll / len(content.encode()) / math.log(2))


def test_the_record_says_window_stride_and_first_token(tmp_path: Path) -> None:
    described = task_of(tmp_path, [text(40)], preset="hf-stride", lengths=[16], stride=4).describe()
    assert described["stride"] == 4
    assert "not scored" in described["first_token"]
    assert "no beginning-of-text" in described["bos"]
    assert described["origin"] == f"path:{tmp_path}"
    assert len(described["data_sha256"]) == 64


# --- which tokens ----------------------------------------------------------------------------------------------------


def test_every_length_covers_the_same_tokens_and_max_chunks_bounds_them(tmp_path: Path) -> None:
    task = task_of(tmp_path, [text(100), text(40, 1), text(90, 2)], lengths=[8, 16, 32], max_chunks=4)
    covered: dict[str, set] = {}
    for sample in task.samples():
        window = sample.data["window"]
        covered.setdefault(sample.group, set()).update((sample.cluster, i) for i in range(window.start, window.end))
    assert covered["8"] == covered["16"] == covered["32"]
    assert len(covered["32"]) == 4 * 32
    assert {name for name, _ in covered["8"]} == {"doc0.txt", "doc1.txt", "doc2.txt"}  # each before any twice


def tokens_read(task: LongPpl) -> dict[str, set[tuple[int, int]]]:
    """Length -> (document, token) of everything that its windows read."""
    read: dict[str, set[tuple[int, int]]] = {}
    for sample in task.samples():
        window = sample.data["window"]
        places = {(sample.data["stream"], i) for i in range(window.start, window.end)}
        read.setdefault(sample.group, set()).update(places)
    return read


@pytest.mark.parametrize("preset", ["qwen-arxiv", "hf-stride", "llama.cpp-512", "lm-eval-rolling"])
def test_a_limit_draws_the_same_tokens_for_every_length(tmp_path: Path, preset: str) -> None:
    texts = [text(2048 + 300 * i, i) for i in range(8)]
    reads = {}
    for limit in (2, 6, 12, None):
        task = task_of(tmp_path, texts, preset=preset, lengths=[256, 512, 1024], limit=limit)
        reads[limit] = tokens_read(task)
        assert reads[limit]["256"] == reads[limit]["512"] == reads[limit]["1024"]
        if limit:
            assert 0 <= limit * 1024 - len(reads[limit]["1024"]) < (1024 if preset.startswith("l") else 1)
            assert task.describe()["num_tokens"] == dict.fromkeys(("256", "512", "1024"), len(reads[limit]["1024"]))
    assert reads[2]["1024"] < reads[6]["1024"] < reads[12]["1024"] < reads[None]["1024"]
    assert len({document for document, _ in reads[6]["1024"]}) > 1


def test_a_limit_draws_other_chunks_for_another_seed_and_none_twice(tmp_path: Path) -> None:
    texts = [text(2048 + 300 * i, i) for i in range(8)]
    drawn = []
    for seed in (1, 1, 2):
        task = task_of(tmp_path, texts, lengths=[256, 1024], limit=6, seed=seed)
        ids = [sample.id for sample in task.samples()]
        assert len(ids) == len(set(ids)) == 6 * (1 + 4)
        drawn.append(ids)
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_length_that_does_not_divide_the_longest_is_named(tmp_path: Path) -> None:
    task = task_of(tmp_path, [text(400)], lengths=[24, 32, 64])
    assert [note for note in task.notes if "lengths 24 do not divide 64" in note] == task.notes


def test_one_stream_joins_documents_with_the_end_of_text_and_keeps_their_names(tmp_path: Path) -> None:
    task = task_of(tmp_path, [text(10), text(21, 1)], lengths=[11], packing="stream")
    requests = [task.request(sample, ()) for sample in task.samples()]
    first, second, _ = (r.prompt.ids for r in requests if r is not None)
    assert first == (*TOKENIZER.encode(text(10)), EOT)
    assert second == tuple(TOKENIZER.encode(text(21, 1))[:11])
    assert [sample.cluster for sample in task.samples()] == ["doc0.txt", "doc1.txt", "doc1.txt"]


def test_without_lengths_they_follow_the_training_length_as_far_as_the_documents_reach(tmp_path: Path) -> None:
    task = task_of(tmp_path, [text(300), text(140, 1), text(20, 2)], facts={"train_length": 32})
    assert task.lengths == [16, 32, 64, 128]


def test_short_documents_are_skipped_said_and_counted(tmp_path: Path) -> None:
    task = task_of(tmp_path, [text(40), text(10, 1)], lengths=[32])
    assert task.notes == ["1 of 2 documents have fewer than 32 tokens and are skipped"]
    assert task.describe()["num_skipped"] == {"32": 1}
    with pytest.raises(DataError, match=r"64: no document .* longest has 40 tokens; .*task\.packing=stream"):
        task_of(tmp_path, [], lengths=[64]).samples()


@pytest.mark.parametrize(("facts", "is_warned"), [
    ({"dynamic_ntk": False, "logn": False, "windows": None}, True),
    ({"dynamic_ntk": True, "logn": False, "windows": None}, False),
    ({"dynamic_ntk": False, "logn": False, "windows": [16, 32]}, False),
])  # fmt: skip
def test_lengths_beyond_training_without_tricks_are_warned_of_once(
    tmp_path: Path, facts: dict, is_warned: bool
) -> None:
    task = task_of(tmp_path, [text(40)], facts={"train_length": 16, **facts}, lengths=[8, 16, 32])
    assert [note for note in task.notes if "beyond the training length of 16" in note] == task.notes[: int(is_warned)]
    assert len(task.notes) == int(is_warned)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_texts_come_from_jsonl_and_parquet_under_a_key(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [{"body": text(20)}, {"body": "  "}, {"body": text(30, 1)}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "b.parquet")
    task = task_of(tmp_path, [], lengths=[8], text_key="body")
    assert [stream.id for stream in task.streams] == ["a.jsonl#0", "a.jsonl#2", "b.parquet#0", "b.parquet#2"]
    assert task.streams[0].text == task.streams[2].text == text(20)
    one_file = LongPpl(Spec(path=str(tmp_path / "b.parquet"), lengths=[8], text_key="body"), task.context)
    assert len(one_file.streams) == 2
    with pytest.raises(DataError, match=r"a\.jsonl row 1: no text under 'text'; it has body; pass task\.text_key="):
        task_of(tmp_path, [], lengths=[8]).samples()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.txt", "  \n", "the texts are empty"),
    ("a.pdf", "x", "no file that ends in .txt"),
    ("a.parquet", "x", "a.parquet: not parquet"),
])  # fmt: skip
def test_a_source_without_text_is_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        task_of(tmp_path, [], lengths=[8]).samples()


@pytest.mark.parametrize(("spec", "message"), [
    ({"preset": "qwen-arxif"}, 'did you mean "qwen-arxiv"'),
    ({"packing": "files"}, "one of document, stream"),
    ({"lengths": [1]}, "task.lengths=1: at least 2"),
    ({"stride": 9, "lengths": [8]}, "task.stride=9: at most"),
    ({"max_chunks": 0}, "task.max_chunks=0: at least 1"),
    ({"subjects": ["8"]}, "choose with task.lengths"),
])  # fmt: skip
def test_a_bad_value_is_one_line(tmp_path: Path, spec: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(tmp_path, [], **spec)


def test_an_engine_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        LongPpl(Spec(), TaskContext())
    with pytest.raises(ConfigError, match=r"has no <\|endoftext\|>"):
        LongPpl(Spec(preset="lm-eval-rolling"), TaskContext(tokenizer=ByteTokenizer()))


# --- the whole -------------------------------------------------------------------------------------------------------


def test_loss_by_position_adds_up_to_the_perplexity(tmp_path: Path) -> None:
    task = task_of(tmp_path, [text(64)], lengths=[16, 32])
    records = records_of(task)
    table = task.artifacts(records)["loss_by_position.json"]
    assert [(row["from"], row["to"], row["num_tokens"]) for row in table["16"]] == [
        (1, 1, 4), (2, 3, 8), (4, 7, 16), (8, 15, 32),
    ]  # fmt: skip
    total = math.fsum(row["loss"] * row["num_tokens"] for row in table["32"])
    num = sum(row["num_tokens"] for row in table["32"])
    assert math.exp(total / num) == pytest.approx(task.summarise(records)["ppl/32"].value)


def test_an_interval_of_a_perplexity_stays_above_one_and_of_bits_above_zero(tmp_path: Path) -> None:
    """Two texts of very different difficulty: half the interval is wider than the value."""
    task = task_of(tmp_path, ["a" * 64, text(64, 5)], lengths=[16])
    records = [
        replace(record, grade=replace(record.grade, values={**record.grade.values, "nll": 1.0 + 40.0 * (i > 3)}))
        for i, record in enumerate(records_of(task))
    ]
    metrics = task.summarise(records)
    ppl, bits = metrics["ppl/16"], metrics["bits_per_byte/16"]
    assert ppl.low is not None
    assert bits.low is not None
    assert bits.high is not None
    assert 1.0 < ppl.low < ppl.value
    assert 0.0 < bits.low < bits.value < bits.high
    assert math.log2(ppl.low) * ppl.n / bits.n == pytest.approx(bits.low)


def test_one_command_writes_numbers_and_files(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text(200))
    (tmp_path / "note.txt").write_text(text(20))
    command = ["task=long_ppl", "engine=fake", f"task.path={tmp_path}", "task.lengths=32,64", f"run_dir={tmp_path}/run"]
    assert main([*command, "quiet=true"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert list(result["metrics"]) == ["ppl/64", "ppl/32", "bits_per_byte/32", "bits_per_byte/64"]
    assert any("1 of 2 documents have fewer than 64 tokens" in warning for warning in result["warnings"])
    assert set(json.loads((tmp_path / "run" / "loss_by_position.json").read_text())) == {"32", "64"}


def test_a_limited_command_scores_as_many_tokens_of_every_length(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"doc{i}.txt").write_text(text(300 + 70 * i, i))
    command = ["task=long_ppl", "engine=fake", f"task.path={tmp_path}", "task.lengths=32,64,128", "limit=5"]
    assert main([*command, f"run_dir={tmp_path}/run", "quiet=true"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["partial"] == {"limit": 5}
    ns = {name: metric["n"] for name, metric in result["metrics"].items() if name.startswith("ppl/")}
    assert ns == {"ppl/128": 5 * 127, "ppl/64": 5 * 126, "ppl/32": 5 * 124}  # each chunk's first token is not scored
