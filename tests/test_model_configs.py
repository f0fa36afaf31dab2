"""Every conf/model/*.yaml composes into a ModelSpec that tells the truth; and where checkpoints are found."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qwen_eval.config import ModelSpec
from qwen_eval.core import ConfigError, ModelError, Prompt
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.hub import ASSETS, FILES, asset_dir, checkpoint_dir, wanted_files
from qwen_eval.models.quant.formats import FORMATS
from qwen_eval.models.tokenizer import load_tokenizer

CONF = Path(__file__).parent.parent / "conf"
NAMES = sorted(file.stem for file in (CONF / "model").glob("*.yaml"))

NUM_PARAMETERS = {  # of the published weights
    "qwen-1.8b": 1_836_828_672,
    "qwen-7b": 7_721_324_544,
    "qwen-7b-chat-original": 7_721_324_544,
    "qwen-14b-chat": 14_167_290_880,
    "qwen-72b": 72_287_920_128,
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-7b-chat": 7_721_324_544,
    "qwen1.5-14b": 14_167_290_880,
    "qwen1.5-32b": 32_512_218_112,
    "qwen1.5-72b": 72_287_920_128,
    "qwen1.5-110b": 111_209_914_368,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b-instruct": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b-instruct": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b-instruct": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b-base": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b-base": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


@pytest.fixture(scope="module")
def specs() -> dict[str, ModelSpec]:
    """All in one composition, each under its own key: composing one by one takes several times as long."""
    overrides = [f"+model@model_{i}={name}" for i, name in enumerate(NAMES)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(overrides=overrides)
    schema = OmegaConf.structured(ModelSpec)
    nodes = {name: OmegaConf.merge(schema, composed[f"model_{i}"]) for i, name in enumerate(NAMES)}
    objects: dict[str, Any] = {name: OmegaConf.to_object(node) for name, node in nodes.items()}
    return objects


def num_parameters(arch: dict[str, Any]) -> int:
    """By hand, from the shapes: embeddings, then per layer attention, MLP and norms, the last norm, the head."""
    hidden, layers, vocabulary = arch["hidden_size"], arch["num_hidden_layers"], arch["vocab_size"]
    heads = arch["num_attention_heads"]
    head_dim = arch.get("head_dim", hidden // heads)
    kv_heads = arch.get("num_key_value_heads", heads)
    query, key_value = heads * head_dim, kv_heads * head_dim
    branch = arch["intermediate_size"] // (2 if arch["model_type"] == "qwen" else 1)
    has_bias = arch["model_type"] != "qwen3"
    attention = hidden * (query + 2 * key_value) + has_bias * (query + 2 * key_value) + query * hidden
    head_norms = 0 if has_bias else 2 * head_dim
    layer = attention + head_norms + 3 * hidden * branch + 2 * hidden
    return int(vocabulary * hidden * (1 if arch["tie_word_embeddings"] else 2) + layers * layer + hidden)


def test_every_file_composes_under_its_own_name(specs: dict[str, ModelSpec]) -> None:
    assert len(specs) >= 60
    for name, spec in specs.items():
        assert isinstance(spec, ModelSpec)
        assert spec.name == name
        assert spec.quant in FORMATS
        assert (spec.hub_id is None) != (spec.asset is None)


def test_a_hub_id_belongs_to_one_row(specs: dict[str, ModelSpec]) -> None:
    rows = [(spec.hub_id, spec.revision) for spec in specs.values() if spec.hub_id]
    assert len(set(rows)) == len(rows)
    for spec in specs.values():
        squeezed = spec.name.replace("-original", "").replace("qwen-1.8b", "qwen-1_8b")
        assert spec.hub_id is None or spec.hub_id.lower() == f"qwen/{squeezed}"
        assert spec.modelscope_id in (None, (spec.hub_id or "").replace("Qwen/", "qwen/"))


def test_chat_and_quantized_checkpoints_say_so(specs: dict[str, ModelSpec]) -> None:
    for name, spec in specs.items():
        is_qwen3_chat = name.startswith("qwen3") and not name.endswith("-base")
        assert spec.chat == ("chat" in name or "instruct" in name or is_qwen3_chat), name
        bits = {"gptq-int4": 4, "gptq-int8": 8}.get(spec.quant)
        assert spec.arch.get("quantization_config", {}).get("bits") == bits
        assert name.endswith(f"-int{bits}") == (bits is not None)


def test_every_size_of_the_model_cards_is_there() -> None:
    v1 = [f"qwen-{size}{kind}" for size in ("1.8b", "7b", "14b", "72b") for kind in V1_KINDS]
    assert not {*v1, "qwen-7b-original", "qwen-7b-chat-original", "qwen-tiny", *NUM_PARAMETERS} - set(NAMES)
    assert not {f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")} - set(NAMES)


V1_KINDS = ("", "-chat", "-chat-int4", "-chat-int8")


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_the_shapes_have_the_published_number_of_parameters(specs: dict[str, ModelSpec], name: str) -> None:
    assert num_parameters(specs[name].arch) == NUM_PARAMETERS[name]


def test_variants_have_the_shape_of_their_base(specs: dict[str, ModelSpec]) -> None:
    for name, spec in specs.items():
        base = name
        for ending in ("-int4", "-int8", "-original", "-chat", "-instruct", "-base"):
            base = base.removesuffix(ending)
        assert num_parameters(spec.arch) == num_parameters(specs[base].arch), name


def test_facts_that_differ_within_a_family(specs: dict[str, ModelSpec]) -> None:
    assert specs["qwen-72b-chat"].arch["rotary_emb_base"] == 1_000_000
    assert not specs["qwen-72b"].arch["use_dynamic_ntk"]
    assert specs["qwen-14b-chat-int4"].arch["seq_length"] == 2048
    assert specs["qwen-7b-original"].arch["seq_length"] == 2048
    assert specs["qwen-7b-chat"].arch["seq_length"] == 8192
    assert specs["qwen1.5-4b"].arch["rope_theta"] == 5_000_000
    assert specs["qwen2.5-14b"].arch["rms_norm_eps"] == 1e-5
    assert specs["qwen2.5-14b-instruct"].arch["rms_norm_eps"] == 1e-6


def test_the_native_model_reads_every_shape(specs: dict[str, ModelSpec]) -> None:
    for spec in specs.values():
        config = ModelConfig.from_hf(spec.arch)
        assert config.num_layers == spec.arch["num_hidden_layers"]


@pytest.mark.parametrize("name", ["qwen-1.8b", "qwen1.5-0.5b", "qwen2.5-0.5b", "qwen3-0.6b", "qwen-tiny"])
def test_the_native_model_has_these_many_parameters(specs: dict[str, ModelSpec], name: str) -> None:
    import torch

    from qwen_eval.models.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(ModelConfig.from_hf(specs[name].arch))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(specs[name].arch)


# --- where checkpoints are -------------------------------------------------------------------------------------------


def test_the_tiny_model_needs_nothing_but_the_package(specs: dict[str, ModelSpec]) -> None:
    folder = checkpoint_dir(specs["qwen-tiny"])
    tokenizer = load_tokenizer(folder)
    text = "Question: 什么是 1,234?\n\nAnswer:"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size <= specs["qwen-tiny"].arch["vocab_size"]
    assert len(tokenizer.encode("the answer")) < len("the answer")


@pytest.mark.parametrize("name", ["qwen-7b-chat", "qwen3-8b"])
def test_random_weights_of_any_shape_need_no_hub(specs: dict[str, ModelSpec], name: str) -> None:
    from qwen_eval.models.load import open_forward

    narrow = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 128}
    narrow |= {"kv_channels": 16} if name.startswith("qwen-") else {"head_dim": 16, "num_key_value_heads": 2}
    spec = replace(specs[name], weights="random", dtype="fp32", device="cpu", arch={**specs[name].arch, **narrow})
    opened = open_forward(spec)
    assert opened.forward.config.vocab_size == 151_936
    assert opened.tokenizer.decode(opened.tokenizer.render(Prompt.raw("x y"))) == "x y"


def test_the_tiny_models_config_is_its_yamls(specs: dict[str, ModelSpec]) -> None:
    import json

    config = json.loads((ASSETS / "qwen-tiny" / "config.json").read_text())
    arch = specs["qwen-tiny"].arch
    assert {key: config[key] for key in arch} == arch


def test_one_flipped_bit_of_an_asset_is_refused(tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "qwen-tiny", tmp_path / "qwen-tiny")
    assert asset_dir("qwen-tiny", tmp_path) == tmp_path / "qwen-tiny"
    file = tmp_path / "qwen-tiny" / "qwen.tiktoken"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ModelError, match=r"qwen\.tiktoken: sha256 \w{12}, expected \w{12}"):
        asset_dir("qwen-tiny", tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        asset_dir("qwen-tiny", tmp_path)


@pytest.mark.parametrize("name", ["no-such", "../assets/qwen-tiny", ""])
def test_an_unknown_asset_names_the_known_ones(name: str) -> None:
    with pytest.raises(ModelError, match=r"one of .*qwen-tiny"):
        asset_dir(name)


def test_a_path_wins_and_must_be_a_checkpoint(tmp_path: Path) -> None:
    spec = ModelSpec(name="x", hub_id="Qwen/Qwen-7B", path=str(tmp_path))
    with pytest.raises(ModelError, match=r"no config\.json there"):
        checkpoint_dir(spec)
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint_dir(spec) == tmp_path
    with pytest.raises(ModelError, match="not a directory"):
        checkpoint_dir(ModelSpec(name="x", path=str(tmp_path / "absent")))


def test_neither_path_nor_hub_id_nor_a_known_hub() -> None:
    with pytest.raises(ModelError, match=r"neither model\.path"):
        checkpoint_dir(ModelSpec(name="x"))
    with pytest.raises(ConfigError, match=r"model\.hub=hugging: not a hub"):
        checkpoint_dir(ModelSpec(name="x", hub_id="Qwen/Qwen-7B", hub="hugging"))


def test_no_code_is_ever_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    names = ["config.json", "modeling_qwen.py", "a.safetensors", "qwen.tiktoken", "x.so", "cpp_kernels.py", "y.bin"]
    kept = list(filter_repo_objects(names, allow_patterns=wanted_files(names)))
    assert kept == ["config.json", "a.safetensors", "qwen.tiktoken"]
    assert list(filter_repo_objects(["y.bin"], allow_patterns=wanted_files(["y.bin"]))) == ["y.bin"]
    assert not any(pattern.endswith((".py", "*")) for pattern in FILES)


def ask_hub(endpoint: str, tmp_path: Path, timeout_s: float = 8.0) -> str:
    """What `checkpoint_dir` says in a fresh process whose hub is `endpoint` (read once, at import)."""
    code = f"""
        import qwen_eval.models.hub as hub
        from qwen_eval.config import ModelSpec
        from qwen_eval.core import ModelError
        hub.TIMEOUT_S = {timeout_s}
        try:
            print(hub.checkpoint_dir(ModelSpec(name="x", hub_id="Qwen/Qwen-7B", revision="main")))
        except ModelError as error:
            print(error)
    """
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "PYTHONPATH": str(CONF.parent), "NO_PROXY": "*"}
    run = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(run, env=env, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def test_a_dead_hub_says_how_to_go_on_without_it(tmp_path: Path) -> None:
    said = ask_hub("http://127.0.0.1:9", tmp_path)
    assert said.startswith("model.hub_id=Qwen/Qwen-7B model.revision=main: the Hugging Face hub cannot be reached")
    assert said.endswith("pass model.path=DIR")


@pytest.mark.slow
def test_a_silent_hub_is_given_up_in_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        start = time.perf_counter()
        said = ask_hub(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path, timeout_s=0.5)
        took_s = time.perf_counter() - start
    assert "cannot be reached" in said
    assert took_s < 20


def test_modelscope_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(ModelError, match=r"pip install qwen_eval\[modelscope\]"):
        checkpoint_dir(ModelSpec(name="x", hub_id="Qwen/Qwen-7B", hub="modelscope"))
