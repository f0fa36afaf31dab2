"""docs/extending.md: its steps are carried out in a copy of the package, with the code of the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def blocks(title: str) -> list[str]:
    return [code for _, code in BLOCK.findall(section(title))]


def file_named(title: str) -> str:
    """The first file that a section tells to write: "Write the module. `qwen_eval/engines/echo.py`:"."""
    found = re.search(r"`([\w/]+\.py)`:\n", section(title))
    assert found is not None, title
    return found[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package whose code may be changed; its data and configuration are links."""
    shutil.copytree(
        ROOT / "qwen_eval", tmp_path / "qwen_eval", ignore=lambda _, names: {"assets", "__pycache__"} & set(names)
    )
    (tmp_path / "qwen_eval" / "assets").symlink_to(ROOT / "qwen_eval" / "assets")
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    return tmp_path


def evaluated(checkout: Path, *arguments: str) -> dict[str, Any]:
    """result.json of a command that runs in the copy."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qwen_eval", *arguments, "run_dir=run", "quiet=true"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((checkout / "run" / "result.json").read_text())
    return result


def test_a_task_of_another_package_is_run(checkout: Path) -> None:
    module, announcement = blocks("A task")
    (checkout / file_named("A task")).write_text(module)
    group, line = re.findall(r'entry-points\."(.+)"\]\n(.+)', announcement)[0]
    installed = checkout / "sums-1.0.dist-info"  # what an installer makes of pyproject.toml
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: sums\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    result = evaluated(checkout, "task=sums", "task.largest=3", "engine=fake", "engine.fake_reply=it is 4")
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(3 / 9)  # 1+3, 2+2, 3+1


def test_an_engine_is_run(checkout: Path) -> None:
    module, line = blocks("An engine")
    (checkout / file_named("An engine")).write_text(module)
    kinds = checkout / "qwen_eval" / "engines" / "kinds.py"
    table = '    "native": "qwen_eval.engines.native",\n'
    assert table in kinds.read_text()
    kinds.write_text(kinds.read_text().replace(table, table + line))
    result = evaluated(checkout, "task=gsm8k", "task.data=bundled", "limit=2", "engine=echo", "engine.num_characters=5")
    assert result["engine"]["engine"] == "echo"
    records = [json.loads(text) for text in (checkout / "run" / "records.jsonl").read_text().splitlines()]
    assert [len(record["answers"][0]["completions"][0]["text"]) for record in records] == [5, 5]


def test_a_quantization_format_is_run(checkout: Path) -> None:
    module, row = blocks("A quantization format")
    (checkout / file_named("A quantization format")).write_text(module)
    with (checkout / "qwen_eval" / "models" / "quant" / "formats.py").open("a") as file:
        file.write(row)
    result = evaluated(checkout, "model=qwen-nano", "model.quant=sign", "task=nano", "limit=2", "task.max_new_tokens=4")
    assert result["engine"]["quant"] == "sign"
    assert sum(result["engine"]["kernels"].values()) > 0


def test_each_takes_at_most_three_files() -> None:
    for title in ("A task", "An engine", "A quantization format"):
        steps = re.findall(r"^(\d)\. ", section(title), re.MULTILINE)
        assert steps == ["1", "2", "3"], title  # two files, then the command
