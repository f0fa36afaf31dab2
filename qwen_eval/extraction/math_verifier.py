"""The process behind `math_answers.is_same`: reads `[gold, answer]` lines, writes `true` or `false` lines.

Run as `python -m qwen_eval.extraction.math_verifier`. math-verify
parses LaTeX with a grammar; nothing of the text is evaluated.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import sys

MEMORY_BYTES = 4 << 30
SECONDS = 5  # of one parse or comparison; the parent kills this process somewhat later


def is_same(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    try:
        golds, answers = (parse(f"\\boxed{{{text}}}", parsing_timeout=SECONDS) for text in (gold, answer))
        return bool(golds and answers and verify(golds, answers, timeout_seconds=SECONDS))
    except Exception:  # whatever sympy trips over: answers that cannot be compared are not the same
        return False


def main() -> None:
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        print(json.dumps(is_same(gold, answer)), flush=True)


if __name__ == "__main__":
    main()
