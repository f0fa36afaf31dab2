"""The recorded multiple-choice questions and the rows they were asked about, for the golden tests of exams.

Rows come from QWEN_EVAL_DATA (a folder with mmlu, ceval, cmmlu in their official layout), else from the `data` folder
beside the golden one; for MMLU, whose licence allows it, also from the bundled sample. C-Eval and CMMLU may not be
redistributed: without QWEN_EVAL_DATA their tests are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_eval.core import Sample
from qwen_eval.data.sources import SAMPLES
from qwen_eval.tasks.choice import ChoiceTask
from qwen_eval.tasks.registry import TaskContext, task_class

EXAMS = ("mmlu", "ceval", "cmmlu")
Asked = tuple[dict[str, Any], ChoiceTask, Sample]


def asked(golden: Path, file: str, exam: str, *, mode: str, protocol: str = "upstream") -> list[Asked]:
    """Recorded questions of `file` whose rows are at hand, each with the task that asks it; skips where none is."""
    path = golden / "eval" / file
    if not path.is_file():
        pytest.skip(f"no eval/{file} in {golden}")
    recorded = [json.loads(line) for line in path.read_text().splitlines()]
    recorded = [row for row in recorded if row.get("bench", f"chat_{exam}") == f"chat_{exam}"]
    places = {sample.id: (task, sample) for task in _tasks(golden, exam, mode, protocol) for sample in task.samples()}
    ids = [f"{row['subject']}/{row['row']}" for row in recorded]
    found: list[Asked] = [(row, *places[i]) for row, i in zip(recorded, ids) if i in places]
    if not found:
        pytest.skip(f"no rows of {exam} at hand; QWEN_EVAL_DATA=<folder with {exam}/ in its official layout> runs this")
    return found


def _tasks(golden: Path, exam: str, mode: str, protocol: str) -> Iterator[ChoiceTask]:
    data = Path(os.environ.get("QWEN_EVAL_DATA") or golden.parent / "data")
    cls = task_class(exam)
    for folder in (SAMPLES / exam, data / exam):
        if folder.is_dir() and (folder != SAMPLES / exam or exam == "mmlu"):  # the bundled Chinese rows are our own
            yield cls(cls.Spec(name=exam, path=str(folder), mode=mode), TaskContext(protocol=protocol))


def sha256_of_ids(ids: Sequence[int]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()


def build_checkpoint(spec: dict[str, Any], folder: Path) -> None:
    """The checkpoint the letter logits were recorded with: integer arithmetic alone, so the same bits everywhere."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for index, (name, shape) in enumerate(_shapes(spec["config"])):
        weight = _weight(spec, name, shape, key=spec["seed"] * 1000 + index)
        tensors[name] = torch.from_numpy(weight).to(torch.bfloat16)
        digest = hashlib.sha256(tensors[name].view(torch.int16).numpy().tobytes()).hexdigest()
        assert spec["sha256"][name] == digest, name
    (folder / "config.json").write_text(json.dumps(spec["config"]))
    (folder / "generation_config.json").write_text(json.dumps(spec["generation_config"]))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _shapes(config: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, half, vocab = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    yield "transformer.wte.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in (
            ("ln_1.weight", (hidden,)),
            ("attn.c_attn.weight", (3 * hidden, hidden)),
            ("attn.c_attn.bias", (3 * hidden,)),
            ("attn.c_proj.weight", (hidden, hidden)),
            ("ln_2.weight", (hidden,)),
            ("mlp.w1.weight", (half, hidden)),
            ("mlp.w2.weight", (half, hidden)),
            ("mlp.c_proj.weight", (hidden, half)),
        ):
            yield f"transformer.h.{layer}.{name}", shape
    yield "transformer.ln_f.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _weight(spec: dict[str, Any], name: str, shape: tuple[int, ...], *, key: int) -> Any:
    """Uniform noise, but for channel 0: the embedding's constant that no block writes to and that favours letters."""
    import numpy

    scales = spec["scales"]
    scale = next(value for part, value in scales.items() if part in name)
    weight = _uniform(key, int(numpy.prod(shape))).reshape(shape) * numpy.float32(scale)
    if "ln_" in name:
        weight += numpy.float32(1)
    elif "wte" in name:
        weight[:, 0] = scales["const_channel"]
    elif name.endswith("c_proj.weight"):
        weight[0, :] = 0
    elif "lm_head" in name:
        weight[:, 0] = 0
        for letter in spec["letter_ids"]:
            weight[letter] *= numpy.float32(scales["letter_gain"])
            weight[letter, 0] = scales["letter_boost"]
        weight[spec["first_unused_id"] :, 0] = -scales["letter_boost"]
    return weight


def _uniform(key: int, n: int) -> Any:
    """n float32 in [-1, 1), multiples of 2^-23, by splitmix64 of the element's index and the tensor's key."""
    import numpy

    u64 = numpy.uint64
    with numpy.errstate(over="ignore"):
        start = _splitmix64(numpy.array([key], dtype=u64))[0]
        mixed = _splitmix64(numpy.arange(n, dtype=u64) * u64(0xD1342543DE82EF95) + start)
    return ((mixed >> u64(40)).astype(numpy.int64) - (1 << 23)).astype(numpy.float32) * numpy.float32(2.0**-23)


def _splitmix64(x: Any) -> Any:
    import numpy

    x = x + numpy.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return x ^ (x >> numpy.uint64(31))
