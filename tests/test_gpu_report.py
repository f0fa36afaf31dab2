"""The report of a GPU machine: each row of the table, failures with their reason, predicted bytes beside measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import bench_generation
import bench_scoring
import gpu_report
from gpu_report import SMOKE, Work

from qwen_eval import cli
from qwen_eval.core import DataError
from qwen_eval.profile.config import ProfileSpec, check


def cell(**fields: Any) -> dict[str, Any]:
    return {
        "status": "ok", "key": "generate", "kv_cache": "auto", "tok_per_s": [90.0, 100.0, 120.0], "load_s": 7.6,
        "tpot_s": {"mean": 0.010}, "decode_share": 0.81, "prefill_share": 0.62, "seq": 2048,
        "predicted_bytes": 15 * 2**30, "peak_bytes": 16 * 2**30, "baseline_bytes": 0, "device": {"name": "NVIDIA H200"},
        "engine": {"decode_attention": "triton", "kernels": {}}, **fields,
    }  # fmt: skip


RESULTS = {
    "decode": [cell()],
    "int4": [cell(tpot_s={"mean": 0.005})],
    "int8": [{"status": "oom", "reason": "no memory"}],
    "batch": [cell(), cell(kv_cache="int8", tpot_s={"mean": 0.008})],
    "long": [cell(), cell(kv_cache="int8", tpot_s={"mean": 0.020})],
    "encode": [cell(), cell(seq=8192, prefill_share=None)],
    "choices": [{"status": "ok", "seconds": 60.0, "tokens": 1_700_000, "share": 0.55}],
}


def test_each_row_of_the_table_is_there() -> None:
    assert dict(gpu_report.table(RESULTS, Work())) == {
        "decode BF16, batch 1": "100.0 tokens/s, 81% of the bandwidth",
        "Int8 / Int4 against BF16, batch 1": "oom: no memory / 2.00 x",
        "decode BF16, batch 64": "100.0 tokens/s, 81% of the bandwidth",
        "int8 cache against BF16 cache, batch 64": "1.25 x",
        "int8 cache against BF16 cache, 8,192 tokens of context": "0.50 x",
        "encode 2,048": "100.0 tokens/s, 62% of the matrix product's peak",
        "encode 8,192": "100.0 tokens/s",
        "choice questions, 5-shot": "60.0 s, 1,700,000 tokens, 55% of the matrix product's peak",
        "load Int4": "8 s",
    }


def test_the_page_is_named_by_the_device_and_holds_predictions_and_kernels(tmp_path: Path) -> None:
    gpu_report.write(RESULTS, Work(), tmp_path)
    page = (tmp_path / "nvidia-h200.md").read_text()
    assert "| decode: generate, auto cache | 15.00 / 16.00 GiB, -6.2% |" in page
    assert "- decode: decode_attention triton" in page
    assert (tmp_path / "nvidia-h200.json").is_file()


@pytest.mark.parametrize("work", [Work(), SMOKE], ids=["7B", "smoke"])
def test_every_cell_is_a_valid_profile(work: Work) -> None:
    for arguments in work.cells().values():
        spec = cli.compose([*arguments, "model.weights=random"], config_name="profile", schema=ProfileSpec)
        check(spec)


def test_the_commands_against_the_other_harness_are_understood_and_their_end_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mains = {"tools/bench_scoring.py": bench_scoring.main, "tools/bench_generation.py": bench_generation.main}
    for program, *arguments in gpu_report.comparisons("python", "mmlu", "test.jsonl").values():
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(DataError, match=r"mmlu|test\.jsonl"):  # once every option is understood
            mains[program]()
    found = gpu_report.compared({"echo": ["-c", "print('a\\nb')"], "stop": ["-c", "raise SystemExit('no GPU')"]})
    assert [(cell["status"], cell["said"]) for cell in found] == [("ok", ["a", "b"]), ("failed", ["no GPU"])]
    gpu_report.write({**RESULTS, "against": found}, Work(), tmp_path)
    assert "stop against lm-evaluation-harness (failed):" in (tmp_path / "nvidia-h200.md").read_text()
