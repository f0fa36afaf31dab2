"""Realistic replies: what the readers make of them, beside the official scripts (data/replies/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_eval.extraction.letters import concluded_letter
from qwen_eval.extraction.official_letters import official_ceval_letter, official_mmlu_letter
from qwen_eval.extraction.short_answers import canonical, concluded_choice
from qwen_eval.tasks.bbh import upstream_answer, upstream_target

ROWS = {
    path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for name in ("mmlu", "ceval", "bbh")
    for path in [Path(__file__).parent / "data" / "replies" / f"{name}.jsonl"]
}


def readings(table: str, row: dict[str, Any]) -> tuple[str | None, str]:
    """Ours and the official one."""
    reply = row["reply"]
    if table == "bbh":
        return concluded_choice(reply, row["gold"], row["question"]), upstream_answer(reply, row["gold"])
    if table == "mmlu":
        return concluded_letter(reply, row["choices"]), official_mmlu_letter(reply, row["choices"])
    return concluded_letter(reply, row["choices"]), official_ceval_letter(reply, row["question"], row["choices"])


def right(table: str, row: dict[str, Any]) -> tuple[str | None, str | None]:
    """The right answer as each of the two spells it."""
    answer = row["right"]
    return (canonical(answer), upstream_target(answer)) if table == "bbh" and answer is not None else (answer, answer)


@pytest.mark.parametrize("table", ROWS)
def test_each_table_holds_sixty_replies_with_their_sources(table: str) -> None:
    rows = ROWS[table]
    assert len(rows) >= 60
    assert len({row["reply"] for row in rows}) > 0.95 * len(rows)
    assert all(row["source"] for row in rows)
    assert [row["kept_back"] for row in rows] == [i % 3 == 2 for i in range(len(rows))]


@pytest.mark.parametrize("table", ROWS)
def test_the_table_says_what_both_readers_read(table: str) -> None:
    for row in ROWS[table]:
        assert (row["ours"], row["official"]) == readings(table, row), (row["source"], row["reply"])


@pytest.mark.parametrize("kept_back", [False, True])
@pytest.mark.parametrize("table", ROWS)
def test_at_least_97_of_100_replies_are_read_rightly(table: str, kept_back: bool) -> None:
    rows = [row for row in ROWS[table] if row["kept_back"] or not kept_back]
    missed = [row["reply"] for row in rows if row["ours"] != right(table, row)[0]]
    assert len(missed) <= 0.03 * len(rows), missed


@pytest.mark.parametrize("table", ROWS)
def test_what_the_official_script_reads_rightly_so_do_we_or_the_table_says_why_not(table: str) -> None:
    for row in ROWS[table]:
        ours, official = right(table, row)
        assert row["ours"] == ours or row["official"] != official or row.get("reason"), row


@pytest.mark.parametrize("table", ROWS)
def test_reasoning_in_front_changes_no_reading(table: str) -> None:
    for row in ROWS[table]:
        if "think>" not in row["reply"]:
            thought = {**row, "reply": f"<think>\nThe answer is (D)? No, 12. So yes, A.\n</think>\n\n{row['reply']}"}
            assert readings(table, thought)[0] == row["ours"], row["reply"]


@pytest.mark.parametrize("table", ROWS)
def test_the_readme_says_both_shares(table: str) -> None:
    rows = ROWS[table]
    shares = [
        sum(row[who] == right(table, row)[at] for row in rows) / len(rows)
        for at, who in enumerate(("ours", "official"))
    ]
    line = f"| {table} | {len(rows)} | {shares[0]:.1%} | {shares[1]:.1%} |".replace("%", " %")
    assert line in (Path(__file__).parent / "data" / "replies" / "README.md").read_text().splitlines()
