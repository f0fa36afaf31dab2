"""Write a trained model as a published Qwen v1 checkpoint directory.

python -m nano.export build/nano qwen_eval/assets/qwen-nano      (in tools/)
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from nano import vocabulary
from nano.model import Qwen, Shape

FILES = ("config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken", "tokenizer_config.json")


def config_of(shape: Shape) -> dict[str, object]:
    """The fields of a Qwen v1 config.json."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 2 * shape.mlp_size,
        "kv_channels": shape.head_size,
        "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": 8 * shape.seq_length,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "onnx_safe": None,
        "rotary_emb_base": int(shape.rotary_base),
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": shape.seq_length,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": shape.vocab_size,
    }


def generation_config(num_ranks: int) -> dict[str, object]:
    end, start, stop = num_ranks, num_ranks + 1, num_ranks + 2
    return {
        "chat_format": "chatml",
        "do_sample": False,
        "eos_token_id": end,
        "max_new_tokens": 128,
        "max_window_size": 2048,
        "pad_token_id": end,
        "stop_words_ids": [[stop], [start]],
        "top_k": 0,
        "top_p": 0.8,
    }


def write_checkpoint(model: Qwen, vocabulary_file: Path, folder: Path) -> None:
    """bf16 weights under the original names, configuration, vocabulary and SHA256SUMS."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if vocabulary_file.resolve() != (folder / "qwen.tiktoken").resolve():
        shutil.copyfile(vocabulary_file, folder / "qwen.tiktoken")
    num_ranks = len(vocabulary.read(folder / "qwen.tiktoken"))
    settings = {"num_extra_tokens": vocabulary.NUM_EXTRA, "model_max_length": 8 * model.shape.seq_length}
    for name, content in (
        ("config.json", config_of(model.shape)),
        ("generation_config.json", generation_config(num_ranks)),
        ("tokenizer_config.json", {**settings, "tokenizer_class": "QWenTokenizer"}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sums = (f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES)
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def read_model(folder: Path, shape: Shape) -> Qwen:
    model = Qwen(shape)
    model.load_state_dict(torch.load(folder / "state.pt", weights_only=True)["model"])
    return model.eval()


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    shape = Shape(**json.loads((source / "shape.json").read_text()))
    write_checkpoint(read_model(source, shape), source / "qwen.tiktoken", target)


if __name__ == "__main__":
    main()
