"""A regression planted in the weights of the embedded miniature, run through the whole harness, is called worse."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qwen_eval.__main__ import main as evaluate
from qwen_eval.report.compare import compare_paths
from qwen_eval.report.verdict import judge

NANO = Path(__file__).parent.parent / "qwen_eval" / "assets" / "qwen-nano"
CELL = (
    "task=long_ppl",
    "task.data=bundled",
    "task.lengths=256",
    "task.max_chunks=48",
    "model.dtype=fp32",
    "quiet=true",
)


def perturbed(source: Path, target: Path, share: float) -> Path:
    """A copy whose matrices have noise of `share` of their own standard deviation added."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    torch.manual_seed(0)
    weights = load_file(target / "model.safetensors")
    noisy = {
        name: (w.float() + share * w.float().std() * torch.randn(w.shape)).to(w.dtype) if w.ndim == 2 else w
        for name, w in weights.items()
    }
    save_file(noisy, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.skipif(not NANO.is_dir(), reason="the miniature is not in this checkout")
def test_weights_three_per_cent_off_are_worse_in_perplexity(tmp_path: Path) -> None:
    places = [NANO, perturbed(NANO, tmp_path / "noisy", 0.03)]
    for name, place in zip("ab", places):
        argv = [*CELL, "model=qwen-nano", f"model.path={place}", f"run_dir={tmp_path / name}"]
        assert evaluate(argv) == 0
    found = judge(compare_paths([str(tmp_path / "a"), str(tmp_path / "b")])[0])
    assert found.verdict == "worse", found.why
