"""Windows, NTK and LogN in any combination equal a dense reference with explicit masks; windowed caches stay small."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from test_native_engine import CONFIG, TOKENIZER, answers
from torch import Tensor

from qwen_eval.core import ConfigError, Generate, Prompt, Score
from qwen_eval.engines.native.engine import NativeEngine
from qwen_eval.models.checkpoint import Placement, random_model
from qwen_eval.models.config import ModelConfig
from qwen_eval.models.overrides import layer_windows
from qwen_eval.models.runner import ModelRunner
from qwen_eval.models.transformer import Transformer

TRAIN = CONFIG.train_length
WINDOWS = (24, TRAIN, 3 * TRAIN)
COMBINATIONS = {
    f"{'ntk ' if ntk else ''}{'logn ' if logn else ''}{'windows' if windows else ''}".strip() or "plain": replace(
        CONFIG, dynamic_ntk=ntk, logn=logn, windows=windows
    )
    for ntk in (False, True)
    for logn in (False, True)
    for windows in ((), WINDOWS)
}


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """Random weights, wide enough that the tricks change answers by more than one nat, no wider: rounding grows too."""
    model = random_model(config, Placement(device=torch.device("cpu"), dtype=torch.float32), 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(6.0 if "layers" in name else 25.0)
    return model.to(dtype)


@cache
def engine_of(config: ModelConfig, chunk: int = 2048) -> NativeEngine:
    return NativeEngine(ModelRunner(model_of(config), prefill_chunk=chunk), TOKENIZER)


@cache
def exact_model() -> Transformer:
    return model_of(CONFIG, torch.float64)


# --- the slow twin --------------------------------------------------------------------------------------------------


def dense_logits(config: ModelConfig, ids: list[int], num_fed: int) -> Tensor:
    """[T, V]: one layer after another, every position and mask written out, nothing cached, all in fp64."""
    model, num = exact_model(), len(ids)
    x = model.embed(torch.tensor(ids))
    far = torch.arange(num)[:, None] - torch.arange(num)[None, :]
    for i, block in enumerate(model.layers):
        window = config.windows[i] if config.windows else 10**9
        mixed = dense_attention(config, block.attn.qkv(block.attn_norm(x)), window, min(num_fed, window), far)
        x = x + block.attn.o(mixed)
        x = x + block.mlp(block.mlp_norm(x))
    logits: Tensor = model.head(model.norm(x))
    return logits.detach()


def dense_attention(config: ModelConfig, qkv: Tensor, window: int, span: int, far: Tensor) -> Tensor:
    """`span`: tokens this layer can see of the prompt as it was fed; decides its NTK alpha."""
    num = len(qkv)
    heads, kv_heads = config.num_heads, config.num_kv_heads
    q, k, v = qkv.view(num, -1, config.head_dim).split((heads, kv_heads, kv_heads), dim=1)
    alpha = 1
    if config.dynamic_ntk and span > TRAIN:
        alpha = 2 ** math.ceil(math.log2(span / TRAIN) + 1) - 1
    base = config.rope_base * alpha ** (config.rotary_dim / (config.rotary_dim - 2))
    q, k = _turned(q, base), _turned(k, base)
    if config.logn:
        seen = [min(p + 1, window) for p in range(num)]
        q = q * torch.tensor([math.log(n) / math.log(TRAIN) if n > TRAIN else 1.0 for n in seen])[:, None, None]
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(config.head_dim)
    scores[:, (far < 0) | (far >= window)] = -math.inf
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1)


def _turned(x: Tensor, base: float) -> Tensor:
    """Each pair (j, j + half) of channels as a complex number, multiplied by exp(i * position / base**(2j / dim))."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * base ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[-1])
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def text_ids(num: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.choice(b"abcdefghij klmnop") for _ in range(num)]


def logprobs(config: ModelConfig, ids: list[int], num_fed: int | None = None) -> Tensor:
    table = dense_logits(config, ids, num_fed or len(ids)).log_softmax(-1)
    return table[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


# --- scoring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
def test_scores_equal_the_dense_reference_whole_and_in_chunks(name: str, multiple: int) -> None:
    config = COMBINATIONS[name]
    ids = text_ids(multiple * TRAIN)
    wanted = logprobs(config, ids)
    for chunk in (64, 500, 4096):
        if chunk == 500 and multiple < 8:
            continue  # one chunk, as 4096
        (answer,) = answers(engine_of(config, chunk), [Score(prompt=Prompt(ids=tuple(ids)))])
        difference = (torch.tensor(answer.logprobs, dtype=torch.float64) - wanted).abs().max().item()
        assert difference < 1e-4, f"chunks of {chunk}: {difference}"


def test_the_reference_tells_the_combinations_apart() -> None:
    ids = text_ids(4 * TRAIN)
    found = {name: logprobs(config, ids) for name, config in COMBINATIONS.items()}
    names = list(found)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert (found[first] - found[second]).abs().max() > 1e-2, (first, second)


@pytest.mark.parametrize("name", ["windows", "ntk windows", "ntk logn windows"])
@pytest.mark.parametrize("num_prompt", [20, 3 * TRAIN])
def test_generation_equals_the_dense_reference_step_by_step(name: str, num_prompt: int) -> None:
    config = COMBINATIONS[name]
    prompts = [text_ids(num_prompt, seed) for seed in (1, 2)]
    requests = [Generate(prompt=Prompt(ids=tuple(ids)), max_new_tokens=24) for ids in prompts]
    for ids, answer in zip(prompts, answers(engine_of(config, 50), requests)):
        new = list(answer.completions[0].token_ids)
        # the alpha stays that of the prompt, as in the original
        table = dense_logits(config, ids + new, len(ids))[len(ids) - 1 : -1]
        best = table.max(-1).values
        chosen = table.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert len(new) == 24
        assert (best - chosen).max() < 1e-4  # the most likely one, up to rounding


def test_a_windowed_layer_keeps_no_more_keys_than_its_window() -> None:
    config = COMBINATIONS["ntk logn windows"]
    engine = engine_of(config, 50)
    sizes = []
    for num in (4 * TRAIN, 16 * TRAIN):
        prefix = engine.forward.grown(None, text_ids(num), num)
        kept = [read[0].shape[2] for layer in range(3) if (read := prefix.read(layer)) is not None]
        assert all(keys <= window for keys, window in zip(kept, WINDOWS, strict=True))
        sizes.append(prefix.num_bytes)
    assert sizes[0] == sizes[1]


def test_what_the_protocol_feeds_decides_the_alpha() -> None:
    config = COMBINATIONS["ntk"]
    ids = text_ids(TRAIN + 1)
    requests = [Score(prompt=Prompt(ids=tuple(ids)), num_fed=num_fed) for num_fed in (TRAIN, None)]
    fed, whole = (torch.tensor(a.logprobs, dtype=torch.float64) for a in answers(engine_of(config), requests))
    assert (fed - logprobs(config, ids, TRAIN)).abs().max() < 1e-4
    assert (whole - logprobs(config, ids, TRAIN + 1)).abs().max() < 1e-4
    assert (fed - whole).abs().max() > 1e-2  # one token more is another alpha


# --- the schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "layers", "wanted"), [
    ("none", 4, ()),
    ("layerwise", 4, (64, 128, 256, 512)),
    ("layerwise", 16, (64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024, 2048, 2048, 4096, 4096, 8192, 8192)),
    ("32,96", 4, (32, 32, 96, 96)),
    ("32,64,96", 4, (32, 32, 64, 96)),
    ("50", 3, (50, 50, 50)),
])  # fmt: skip
def test_the_schedule_of_windows(window: str, layers: int, wanted: tuple[int, ...]) -> None:
    assert layer_windows(window, replace(CONFIG, num_layers=layers)) == wanted


@pytest.mark.parametrize("window", ["layer-wise", "0", "32,-1", "1,2,3,4"])
def test_a_bad_window_is_one_line(window: str) -> None:
    with pytest.raises(ConfigError, match=f"model.window={window}: "):
        layer_windows(window, CONFIG)
