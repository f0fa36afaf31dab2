"""Whether two runs are comparable: the same benchmark, samples, prompts and gold answers."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_eval.report.comparison import Family, Side
from qwen_eval.report.items import Item
from qwen_eval.report.settings import differing_settings


def not_comparable(first: Side, second: Side, family: Family) -> list[str]:
    """Reasons why two runs are not comparable, the simplest first; empty if they are."""
    found = [
        f"{side.run.path} is {side.run.status_note}"
        for side in (first, second)
        if side.run.status not in ("complete", "partial")
    ]
    if found:
        return found
    found = differing_settings(first.run, second.run)
    found += _sample_differences(first.items, second.items, family)
    return found


def lost_numbers(first: Mapping[str, Item], second: Mapping[str, Item]) -> list[str]:
    """Scores that are missing or not a number in the second run where the first has one.

    Such pairs must not be dropped silently. Only samples with the same prompt are checked.
    """
    pairs = [(first[key], second[key]) for key in first if key in second]
    pairs = [(a, b) for a, b in pairs if a.prompt_digest == b.prompt_digest and not a.not_finite]
    missing = [b.id for a, b in pairs if (a.score is None) < (b.score is None) or (a.nll is None) < (b.nll is None)]
    odd = [f"{b.id} ({b.not_finite})" for _, b in pairs if b.not_finite]
    found = [f"{len(missing)} of {len(first)} scores are missing, the first is {missing[0]}"] if missing else []
    return found + ([f"{len(odd)} of {len(first)} samples hold no number, the first is {odd[0]}"] if odd else [])


def first_difference(first: str, second: str, width: int = 24) -> str:
    """`at character 7: "…B. two" against "…B) two"`; positions count from 1."""
    at = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    shown = [_excerpt(text, at, width) for text in (first, second)]
    return f"at character {at + 1}: {shown[0]} against {shown[1]}"


def _excerpt(text: str, at: int, width: int) -> str:
    start = max(0, at - width)
    piece = text[start : at + width].replace("\n", "⏎")
    return (
        f'"{"…" * (start > 0)}{piece}{"…" * (at + width < len(text))}"' if at < len(text) else f'"…{piece}" (its end)'
    )


def _sample_differences(first: Mapping[str, Item], second: Mapping[str, Item], family: Family) -> list[str]:
    only = [[key for key in a if key not in b] for a, b in ((first, second), (second, first))]
    if only[0] or only[1]:
        name = (only[0] or only[1])[0]
        return [f"other samples: {len(only[0])} only in the first, {len(only[1])} only in the second, such as {name}"]
    texts = [key for key in first if first[key].prompt_digest != second[key].prompt_digest]
    if texts:
        return [f"{len(texts)} of {len(first)} prompts differ, {_where_prompts_differ(first, second, texts)}"]
    odd = [f"{key} ({first[key].not_finite})" for key in first if first[key].not_finite]
    if odd:
        return [f"{len(odd)} samples of the reference hold no number, the first is {odd[0]}"]
    unscored = [key for key in first if first[key].score is None and second[key].score is not None]
    if unscored:
        return [f"{len(unscored)} samples have no score in the reference, the first is {unscored[0]}"]
    tokens = [key for key in first if first[key].num_tokens != second[key].num_tokens]
    if family == "ppl" and tokens:
        a, b = first[tokens[0]].num_tokens, second[tokens[0]].num_tokens
        return [f"the text {tokens[0]} is {a} tokens in the first and {b} in the second: other tokenizers"]
    targets = [key for key in first if first[key].target != second[key].target]
    if targets:
        return [f"{len(targets)} gold answers differ, the first is {targets[0]}"]
    return []


def _where_prompts_differ(first: Mapping[str, Item], second: Mapping[str, Item], keys: list[str]) -> str:
    """To the character where both texts were kept: a baseline keeps one prompt whole, and digests of the others."""
    known = [key for key in keys if first[key].prompt and second[key].prompt]
    if not known:
        return f"the first is {keys[0]}"
    key, ordinal = known[0], "the first" if known[0] == keys[0] else "one of them"
    return f"{ordinal} is {key} {first_difference(first[key].prompt, second[key].prompt)}"
