"""The checkpoint of `tools/nano_as_qwen2.py` as a GGUF file in fp32, for llama.cpp.

    pip install gguf safetensors
    python tools/nano_as_gguf.py DIR FILE

Only for that checkpoint: for others llama.cpp has its own converter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
from safetensors.numpy import load_file

ARCHITECTURE = "qwen2"


def write_facts(writer: Any, config: dict[str, Any]) -> None:
    writer.add_name("qwen-nano")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def write_tokenizer(writer: Any, folder: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    special = {row["id"]: row["content"] for row in found["added_tokens"]}
    named = {i: token for token, i in found["model"]["vocab"].items()} | special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([named[i] for i in range(len(named))])
    types = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(named))]
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in found["model"]["merges"]])
    ids = {token: i for i, token in special.items()}
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_eot_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def write_gguf(folder: Path, file: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    write_facts(writer, config)
    write_tokenizer(writer, folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for name, value in load_file(folder / "model.safetensors").items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("file", metavar="FILE")
    arguments = parser.parse_args()
    write_gguf(Path(arguments.folder), Path(arguments.file))


if __name__ == "__main__":
    main()
