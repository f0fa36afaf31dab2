"""`python -m qwen_eval.ship reference=A candidate=B tasks=... margin=1`: may B replace A? It stops by itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen_eval import cli
from qwen_eval.ship.config import ShipSpec, arguments, check
from qwen_eval.terminal import plain_text

USAGE = """
python -m qwen_eval.ship reference=MODEL candidate=MODEL tasks=TASK,... [margin=1] [key=value ...]

May Int4 replace it?        python -m qwen_eval.ship reference=qwen-7b-chat candidate=qwen-7b-chat-int4 tasks=mmlu,gsm8k
The same, another cache:    python -m qwen_eval.ship reference=qwen-7b-chat candidate.kv_cache=int8 tasks=mmlu
A checkpoint of your own:   python -m qwen_eval.ship reference.path=DIR candidate.path=DIR tasks=ceval margin=2
Stop after so much:         ... max_items=2000 max_minutes=60
Check a certificate:        python -m qwen_eval.ship verify=certificate.json [reference=A candidate=B] [spot=20]
Every key with its value:   python -m qwen_eval.ship --cfg job

Exit code: 0 ship, 1 do not ship, 3 not decided; 2 a mistake. Verifying: 0 it holds, 1 it does not.
"""
CODES = {"ship": 0, "do not ship": 1, "not decided": 3}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.guarded(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    codes: list[int] = []
    words = arguments(argv)
    failed = cli.run(words, config_name="ship", schema=ShipSpec, job=lambda s: codes.append(ship(s)), usage=USAGE)
    return failed or max(codes, default=0)


def ship(spec: ShipSpec) -> int:
    """Make or check one certificate; the exit code."""
    check(spec)
    if spec.verify is not None:
        from qwen_eval.ship.verify import verify

        return verify(spec)
    from qwen_eval.ship import certificate
    from qwen_eval.ship.page import page, tables
    from qwen_eval.ship.run import ShipRun
    from qwen_eval.tables import print_tables

    with ShipRun(spec) as run:
        verdict = run.all_tasks()
        certificate.write(run, verdict)
        (run.path / "certificate.html").write_bytes(page(run, verdict).encode("utf-8", "replace"))
        print_tables(tables(run, verdict))
        print(
            plain_text(
                f"{run.path}: certificate.json, certificate.html; check it with verify={run.path}/certificate.json"
            )
        )
    return CODES[verdict.word]
