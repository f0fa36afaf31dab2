"""qwen-nano as a Qwen2 checkpoint of transformers, for servers and engines that read no Qwen v1.

    python tools/nano_as_qwen2.py DIR

The same weights, vocabulary and ChatML. Qwen2 has neither dynamic NTK nor LogN, so that texts beyond the training
length of 256 tokens are scored differently from `model=qwen-nano`: compare engines on DIR itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peers import PRETOKEN, ROOT
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import TikTokenConverter

NANO = ROOT / "qwen_eval" / "assets" / "qwen-nano"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(5)))
END_OF_TEXT, IM_END = 4088, 4090
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLACES = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.ln_f.": "model.norm.",
    "transformer.h.": "model.layers.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".mlp.c_proj.": ".mlp.down_proj.",
    ".mlp.w1.": ".mlp.up_proj.",
    ".mlp.w2.": ".mlp.gate_proj.",  # Qwen v1 computes w1(x) * silu(w2(x))
}


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        for theirs, ours in PLACES.items():
            name = name.replace(theirs, ours)
        if ".attn.c_attn." not in name:
            found[name] = value
            continue
        for part, rows in zip("qkv", value.chunk(3), strict=True):
            found[name.replace(".attn.c_attn.", f".self_attn.{part}_proj.")] = rows.contiguous()
    return found


def config_of(raw: dict[str, Any]) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"] // 2,
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw["num_attention_heads"],
        max_position_embeddings=raw["max_position_embeddings"],
        rms_norm_eps=raw["layer_norm_epsilon"],
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=[END_OF_TEXT, IM_END],
    )


def write_nano(folder: Path) -> Path:
    converter = TikTokenConverter(vocab_file=str(NANO / "qwen.tiktoken"), pattern=PRETOKEN,
                                  extra_special_tokens=list(SPECIALS))  # fmt: skip
    PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    ).save_pretrained(folder)
    model = Qwen2ForCausalLM(config_of(json.loads((NANO / "config.json").read_text())))
    model.load_state_dict(renamed(load_file(NANO / "model.safetensors")))
    model.save_pretrained(folder)  # in fp32: every program has that
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR")
    print(write_nano(Path(parser.parse_args().folder)))


if __name__ == "__main__":
    main()
