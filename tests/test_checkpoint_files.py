"""Which files and tensors of a directory are used: as in transformers, with adapters merged, hostile ones refused."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_tiny_qwen2
from torch import Tensor

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import ModelError
from qwen_eval.engines.hf.engine import open_engine as open_hf
from qwen_eval.models.fingerprint import model_fingerprint
from qwen_eval.models.head import read_head
from qwen_eval.models.load import open_forward
from qwen_eval.models.weight_files import open_weights, weight_files

IDS = [1, 70, 9, 200, 33, 4, 258, 5]
SAFE, SAFE_INDEX, BIN, BIN_INDEX = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of a tiny Qwen2 checkpoint that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec(name="m", path=str(folder), dtype="fp32", device="cpu")


def stored_head(folder: Path) -> Tensor:
    return read_head(spec_of(folder), fingerprint=model_fingerprint(spec_of(folder)))


def our_logits(folder: Path) -> Tensor:
    forward = open_forward(spec_of(folder)).forward
    return forward.model.logits(forward.packed([IDS], [len(IDS)]))


@torch.inference_mode()
def their_logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits: Tensor = model(torch.tensor([IDS])).logits[0]
    return logits


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SAFE)
    edit(tensors)
    save_file(tensors, folder / SAFE, metadata={"format": "pt"})


def write_as(folder: Path, kind: str, tensors: dict[str, Tensor]) -> None:
    """The weights in one of the four layouts that transformers knows."""
    shard = {SAFE_INDEX: "model-00001-of-00001.safetensors", BIN_INDEX: "pytorch_model-00001-of-00001.bin"}
    file = folder / shard.get(kind, kind)
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file, metadata={"format": "pt"})
    if kind in shard:
        (folder / kind).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}))


# --- which file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "stale"),
    [(SAFE, SAFE_INDEX), (SAFE, BIN), (SAFE_INDEX, BIN), (SAFE_INDEX, BIN_INDEX), (BIN, BIN_INDEX)],
)
def test_of_two_sets_of_weights_the_one_that_transformers_reads_is_read(folder: Path, used: str, stale: str) -> None:
    new = load_file(folder / SAFE)
    (folder / SAFE).unlink()
    write_as(folder, used, new)
    write_as(folder, stale, {name: tensor * 1.5 for name, tensor in new.items()})
    assert (our_logits(folder) - their_logits(folder)).abs().max() <= 1e-4


def test_a_tensor_in_two_files_is_refused_by_name(folder: Path) -> None:
    tensors = load_file(folder / SAFE)
    (folder / SAFE).rename(folder / "part-1.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, folder / "part-2.safetensors")
    with pytest.raises(ModelError, match=r"lm_head\.weight is in both part-1\.safetensors and part-2\.safetensors"):
        our_logits(folder)


# --- tied embeddings -------------------------------------------------------------------------------------------------


def test_a_stored_head_that_differs_is_used_though_the_config_ties_it(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)  # the tiny model has a head of its own
    expected = their_logits(folder)
    assert (our_logits(folder) - expected).abs().max() <= 1e-4
    assert torch.equal(stored_head(folder), load_file(folder / SAFE)["lm_head.weight"])
    assert not open_forward(spec_of(folder)).forward.config.tie_embeddings


@pytest.mark.parametrize("dropped", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_may_be_stored_under_either_name(folder: Path, dropped: str) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda tensors: tensors.pop(dropped))
    assert (our_logits(folder) - their_logits(folder)).abs().max() <= 1e-4
    assert open_forward(spec_of(folder)).forward.config.tie_embeddings


def test_a_head_equal_to_the_embeddings_stays_tied(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = open_forward(spec_of(folder)).forward.model
    assert model.head.weight is model.embed.weight


# --- tokenizer and cache ---------------------------------------------------------------------------------------------


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(folder: Path) -> None:
    edit_config(folder, vocab_size=250)
    edit_tensors(folder, lambda t: t.update({n: t[n][:250].clone() for n in t if "embed" in n or "lm_head" in n}))
    with pytest.raises(ModelError, match="the tokenizer has 259 ids, the embedding only 250 rows"):
        our_logits(folder)


def test_the_int8_cache_that_a_config_asks_for_must_be_asked_for_here(folder: Path) -> None:
    edit_config(folder, use_cache_quantization=True)
    with pytest.raises(ModelError, match=r"pass model\.kv_cache=int8"):
        our_logits(folder)


# --- GPTQ ------------------------------------------------------------------------------------------------------------

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pack_rows(values_KN: Tensor, bits: int) -> Tensor:
    """Consecutive rows packed into int32, lowest bits first: written without the reader's code."""
    per_word = 32 // bits
    words = torch.zeros(len(values_KN) // per_word, values_KN.shape[1], dtype=torch.int64)
    for i in range(per_word):
        words += values_KN[i::per_word].long() << (bits * i)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def pack(
    folder: Path, *, stored_zero: int, bits: int = 4, skip: str = "-", head: bool = False, **settings: Any
) -> None:
    """Round every linear to groups of 16 inputs, symmetric; leave the exact dense model beside it in `exact`."""
    tensors = load_file(folder / SAFE)
    exact, half = dict(tensors), 2 ** (bits - 1)
    for name in [n for n in tensors if n.endswith(".weight")]:
        module = name.removesuffix(".weight")
        if (not module.endswith(LINEARS) or skip in module) and not (head and module == "lm_head"):
            continue
        weight = tensors.pop(name)
        grouped = weight.view(len(weight), -1, 16)
        scale = (grouped.abs().amax(2) / (half - 1)).half()
        codes = (grouped / scale.float()[..., None]).round()
        exact[name] = (codes * scale.float()[..., None]).view_as(weight)
        zeros = torch.full((len(weight), scale.shape[1]), stored_zero)
        tensors[f"{module}.qweight"] = pack_rows((codes + half).view_as(weight).t(), bits)
        tensors[f"{module}.qzeros"] = pack_rows(zeros, bits).t().contiguous()
        tensors[f"{module}.scales"] = scale.t().contiguous()
    shutil.copytree(folder, folder / "exact")
    save_file(exact, folder / "exact" / SAFE, metadata={"format": "pt"})
    save_file(tensors, folder / SAFE, metadata={"format": "pt"})
    packing = {"quant_method": "gptq", "bits": bits, "group_size": 16, "sym": True, "checkpoint_format": "gptq"}
    edit_config(folder, quantization_config={**packing, **settings})


@pytest.mark.parametrize(
    "packing",
    [
        {"stored_zero": 7},
        {"stored_zero": 8},  # marked v1, stored as v2
        {"stored_zero": 8, "checkpoint_format": "gptq_v2"},
        {"stored_zero": 7, "checkpoint_format": "gptq_v2"},  # marked v2, stored as v1
        {"stored_zero": 127, "bits": 8},
        {"stored_zero": 128, "bits": 8},
        {"stored_zero": 7, "head": True, "lm_head": True},
        {"stored_zero": 128, "bits": 8, "head": True},
        {"stored_zero": 7, "skip": "k_proj"},  # one of the three that we join stays dense
        {"stored_zero": 7, "skip": "layers.1."},
    ],
    ids=str,
)
def test_packed_weights_are_the_exact_ones_whatever_is_packed_and_marked(folder: Path, packing: dict[str, Any]) -> None:
    pack(folder, **packing)
    assert (our_logits(folder) - their_logits(folder / "exact")).abs().max() <= 1e-4


def test_a_packed_head_is_read_for_divergences_too_and_named_among_the_kernels(folder: Path) -> None:
    pack(folder, stored_zero=7, head=True)
    assert torch.equal(stored_head(folder), load_file(folder / "exact" / SAFE)["lm_head.weight"])
    assert open_forward(spec_of(folder)).facts["kernels"] == {"dequantized float32": 2 * 7 + 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stored_zero": 8, "sym": False}, r"qzeros: every zero point is stored as 8, which contradicts sym=false"),
        ({"stored_zero": 7, "new_rotation": 3}, "unknown quantization setting new_rotation=3"),
        ({"stored_zero": 7, "pack_dtype": "int64"}, "pack_dtype='int64' is not supported"),
        ({"stored_zero": 7, "sym": "yes"}, "sym='yes' must be true or false"),
    ],
)
def test_packing_that_contradicts_itself_is_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    pack(folder, **settings)
    with pytest.raises(ModelError, match=message):
        our_logits(folder)


def test_a_packed_linear_without_the_bias_of_its_architecture_is_refused(folder: Path) -> None:
    pack(folder, stored_zero=7)
    edit_tensors(folder, lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"))
    with pytest.raises(ModelError, match=r"q_proj\.bias is missing"):
        our_logits(folder)


def test_packed_tensors_without_settings_are_named(folder: Path) -> None:
    pack(folder, stored_zero=7)
    edit_config(folder, quantization_config=None)
    with pytest.raises(ModelError, match=r"qweight: packed, but neither config\.json"):
        our_logits(folder)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, base: str, tensors: dict[str, Tensor], **fields: Any) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 4, "lora_alpha": 6, "bias": "none", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def factors(module: str, rank: int, out_features: int, in_features: int) -> dict[str, Tensor]:
    torch.manual_seed(len(module))
    a, b = torch.randn(rank, in_features) * 0.3, torch.randn(out_features, rank) * 0.3
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("fields", "scales"),
    [
        ({}, (6 / 4, 6 / 2)),  # by the rank of the stored factors: rank_pattern is not needed
        ({"use_rslora": True}, (6 / 2, 6 / math.sqrt(2))),
        ({"alpha_pattern": {"down_proj": 10}, "rank_pattern": {"down_proj": 2}}, (6 / 4, 10 / 2)),
    ],
    ids=["plain", "rank-stabilised", "patterns"],
)
def test_an_adapter_is_merged_into_its_base(
    folder: Path, tmp_path: Path, fields: dict[str, Any], scales: tuple[float, float]
) -> None:
    changes = {**factors(QUERY, 4, 32, 32), **factors(DOWN, 2, 32, 64)}
    head = torch.randn(264, 32)
    adapter = write_adapter(tmp_path / "adapter", str(folder), {**changes, "lm_head.weight": head}, **fields)
    merged = Path(shutil.copytree(folder, tmp_path / "merged"))

    def merge(tensors: dict[str, Tensor]) -> None:
        for module, scale in zip((QUERY, DOWN), scales):
            tensors[f"{module}.weight"] += (
                scale * changes[f"{module}.lora_B.weight"] @ changes[f"{module}.lora_A.weight"]
            )
        tensors["lm_head.weight"] = head

    edit_tensors(merged, merge)
    assert (our_logits(adapter) - their_logits(merged)).abs().max() <= 1e-4
    assert torch.equal(stored_head(adapter), head)


def test_an_adapter_of_the_embeddings_is_merged_too(folder: Path, tmp_path: Path) -> None:
    a, b = torch.randn(4, 264) * 0.3, torch.randn(32, 4) * 0.3
    name = "model.embed_tokens"
    stored = {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    adapter = write_adapter(tmp_path / "adapter", str(folder), stored)
    merged = Path(shutil.copytree(folder, tmp_path / "merged"))
    edit_tensors(merged, lambda t: t[f"{name}.weight"].add_(1.5 * (b @ a).T))
    assert (our_logits(adapter) - their_logits(merged)).abs().max() <= 1e-4


def test_another_adapter_or_scale_gives_another_digest_of_the_weights(folder: Path, tmp_path: Path) -> None:
    changes = factors(QUERY, 4, 32, 32)
    same = [write_adapter(tmp_path / name, str(folder), changes) for name in ("a", "b")]
    other = write_adapter(tmp_path / "c", str(folder), {name: t * 2 for name, t in changes.items()})
    scaled = write_adapter(tmp_path / "d", str(folder), changes, lora_alpha=7)
    digests = [open_forward(spec_of(path)).facts["weights"] for path in (*same, other, scaled, folder)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_an_adapter_whose_base_is_not_at_hand_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    adapter = write_adapter(tmp_path / "adapter", "Qwen/Qwen3-0.6B-absent", factors(QUERY, 4, 32, 32))
    with pytest.raises(ModelError, match=r"a LoRA adapter of Qwen/Qwen3-0\.6B-absent, .* merge the adapter") as error:
        our_logits(adapter)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; only LORA is merged"),
        ({"use_dora": True}, "use_dora=True, which is not merged here"),
        ({"bias": "all"}, "bias='all', which is not merged here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which is not merged"),
        ({"alora_invocation_tokens": [1]}, r"unknown field alora_invocation_tokens=\[1\]"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern=.* by plain module names"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a positive number"),
        ({"base_model_name_or_path": None}, "names no base model"),
    ],
)
def test_an_adapter_that_would_not_be_merged_right_is_refused(
    folder: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", str(folder), factors(QUERY, 4, 32, 32), **fields)
    with pytest.raises(ModelError, match=message):
        our_logits(adapter)


def test_an_adapter_of_other_shapes_or_modules_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    wide = write_adapter(tmp_path / "wide", str(folder), factors(QUERY, 4, 48, 32))
    with pytest.raises(ModelError, match=r"changes model\.layers\.0\.self_attn\.q_proj\.weight by \[48, 32\]"):
        our_logits(wide)
    strange = write_adapter(tmp_path / "strange", str(folder), factors("model.layers.9.x", 4, 48, 32))
    with pytest.raises(ModelError, match=r"'model\.layers\.9\.x\.lora_B\.weight' changes a weight that the base"):
        our_logits(strange)
    lone = write_adapter(tmp_path / "lone", str(folder), {f"{QUERY}.lora_A.weight": torch.ones(4, 32)})
    with pytest.raises(ModelError, match=r"q_proj\.lora_B\.weight is missing"):
        our_logits(lone)


def test_an_adapter_beside_whole_weights_is_ambiguous(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds both adapter_config\.json and model\.safetensors"):
        our_logits(folder)


# --- hostile files ---------------------------------------------------------------------------------------------------


def zip_of(path: Path, entries: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def huge_view(path: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(10**6, 10**6)}, path)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a list": (lambda path: torch.save([torch.ones(2)], path), "holds a list, not tensors by name"),
    "a list in a raw pickle": (lambda path: path.write_bytes(pickle.dumps([1, 2])), "truncated or damaged"),
    "numbers for names": (lambda path: torch.save({1: torch.ones(2)}, path), "holds a dict, not tensors by name"),
    "a string for a tensor": (lambda path: torch.save({"x": "y"}, path), "'x' is a str, not a plain tensor"),
    "a sparse tensor": (lambda path: torch.save({"x": torch.eye(3).to_sparse()}, path), "not a plain tensor"),
    "a view of a trillion": (huge_view, "claims more numbers than the file has"),
    "a compressed pickle": (
        lambda path: zip_of(path, {"m/data.pkl": b"\0" * 10**8}, zipfile.ZIP_DEFLATED),
        "holds compressed entries",
    ),
    "the format before torch 1.6": (
        lambda path: torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
        "written by torch before 1.6, which cannot be mapped; read it with torch.load",
    ),
    "a pickle of lists": (lambda path: zip_of(path, {"m/data.pkl": b"]" * 10**8}), "a pickle of 100000000 bytes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_weight_file_ends_in_one_line_at_once(tmp_path: Path, kind: str) -> None:
    write, message = HOSTILE[kind]
    write(tmp_path / BIN)
    start = time.process_time()
    with pytest.raises(ModelError, match=message) as error:
        open_weights(tmp_path / BIN).get_tensor("x")
    assert time.process_time() - start < 2
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "../../etc/passwd.bin"}, "is not the name of a weight file beside it"),
        ({"x": "/etc/passwd"}, "is not the name of a weight file beside it"),
        ({"x": ["a.bin"]}, "is not the name of a weight file beside it"),
        ({"x": "config.json"}, "is not the name of a weight file beside it"),
        ({"x": "a\x1b[2J.bin"}, r"shard a\\x1b\[2J.bin is missing"),
        (["a.bin"], "not a shard index"),
        ({}, "not a shard index"),
    ],
)
def test_an_index_reaches_nothing_but_weight_files_beside_it(tmp_path: Path, weight_map: Any, message: str) -> None:
    (tmp_path / SAFE_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=message) as error:
        weight_files(tmp_path)
    assert str(error.value).isprintable()


def test_a_safetensors_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / SAFE).write_bytes((10**10).to_bytes(8, "little") + b"{")
    with pytest.raises(ModelError, match="a header of more than 16777216 bytes"):
        open_weights(tmp_path / SAFE)


IMPOSSIBLE: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9}, {"rms_norm_eps": math.nan}, {"vocab_size": 10**6, "hidden_size": 10**6},
]  # fmt: skip


def test_a_config_that_asks_for_the_impossible_takes_neither_time_nor_memory(folder: Path, tmp_path: Path) -> None:
    """One after the other in a process of its own, which has the peak of its memory for itself."""
    copies = [Path(shutil.copytree(folder, tmp_path / f"impossible-{i}")) for i in range(len(IMPOSSIBLE))]
    for copy, fields in zip(copies, IMPOSSIBLE):
        edit_config(copy, **fields)
    code = """
        import resource, sys, time
        from qwen_eval.config import ModelSpec
        from qwen_eval.core import ModelError
        from qwen_eval.models.load import open_forward
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sys.argv[1:]:
            start = time.process_time()
            try:
                open_forward(ModelSpec(name="m", path=path, dtype="fp32", device="cpu"))
            except ModelError:
                took_s = time.process_time() - start
                print(took_s, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
    """
    run = [sys.executable, "-c", textwrap.dedent(code), *map(str, copies)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    rows = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(rows) == len(IMPOSSIBLE), "each is refused"
    for took_s, grown_gib in rows:
        assert took_s < 2
        assert grown_gib < 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", []),
        ("tokenizer_config.json", []),
        ("tokenizer_config.json", {"eos_token": 7}),
        ("generation_config.json", None),
        ("generation_config.json", {"eos_token_id": [[1]]}),
    ],
)
def test_whatever_a_file_of_wrong_types_makes_transformers_raise_is_one_line(
    folder: Path, name: str, content: Any
) -> None:
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ModelError) as caught:
        open_hf(EngineSpec(), spec_of(folder))
    assert str(caught.value).startswith(f"{folder}: transformers cannot load it: ")
    assert str(caught.value).isprintable()
