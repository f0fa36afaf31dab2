"""A live OpenAI-compatible server against the native engine, on the same checkpoint and requests.

    python tools/nano_as_qwen2.py DIR
    python -m vllm.entrypoints.openai.api_server --model DIR --dtype float32 --host 127.0.0.1 --port 8000
    python tools/check_server.py --model DIR --server vllm --url http://127.0.0.1:8000/v1

Prints one JSON object: per kind of request how many were answered equally, the largest difference of a log-probability
(of the choices that have only a bound: whether it holds), or what was refused. Exit code 1 where an answer differs.
`--no-tokenizer`: text is sent instead of token ids.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from agreement import compared, is_right, timed

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import Choose, EngineError, Generate, Prompt, Request, Score
from qwen_eval.engines import open_engine
from qwen_eval.engines.endpoint import only_model
from qwen_eval.tasks.nano import Nano
from qwen_eval.tasks.registry import TaskContext

LETTERS = (" A", " B", " C", " D")
CHAT_LETTERS = ("A", "B", "C", "D")
UNLIKELY = (" A", " ship", "Question", " not at all")  # the last of several tokens
PREFILLED = "The answer is"


def asked(num: int, scored_tokens: int) -> dict[str, list[Request]]:
    raw = of_nano("base")
    chats = [request for request in of_nano("chat") if isinstance(request, Generate)][:num]
    choices = [request for request in raw if isinstance(request, Choose)][:num]
    texts = [request for request in raw if isinstance(request, Generate)][:num]
    long = "\n".join(str(request.prompt.text) for request in choices)
    starts = range(0, min(len(long) - 2000, 2000 * min(num, 12)), 2000)
    return {
        "choices": list(choices),
        "unlikely choices": [Choose(prompt=request.prompt, choices=UNLIKELY) for request in choices],
        "choices in chats": [Choose(prompt=request.prompt, choices=CHAT_LETTERS) for request in chats],
        "choices in continued chats": [Choose(prompt=continued(request), choices=LETTERS) for request in chats],
        "scored texts": [Score(prompt=Prompt.raw(long[at : at + scored_tokens]), num_context=1) for at in starts],
        "texts": list(texts),
        "chats": list(chats),
        "continued chats": [Generate(prompt=continued(request), max_new_tokens=16) for request in chats],
    }


def continued(request: Generate) -> Prompt:
    return Prompt.user(request.prompt.messages[-1].content, prefill=PREFILLED)


def of_nano(mode: str) -> list[Any]:
    task = Nano(Nano.Spec(name="nano", data="bundled", mode=mode), TaskContext())
    return [task.request(sample, ()) for sample in task.samples()[::5]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="the checkpoint that the server has loaded")
    parser.add_argument("--server", default="vllm", help="its kind, as in engine.server=")
    parser.add_argument("--url", required=True)
    parser.add_argument("--requests", type=int, default=40, help="of each kind, at most")
    parser.add_argument("--scored-characters", type=int, default=1500, help="of each scored text")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--no-tokenizer", action="store_true")
    arguments = parser.parse_args()
    kinds = asked(arguments.requests, arguments.scored_characters)
    native = open_engine(
        EngineSpec(), ModelSpec(name="native", path=arguments.model, dtype="fp32", device="cpu", chat=True)
    )
    spec = EngineSpec(
        name="openai",
        server=arguments.server,
        base_url=arguments.url,
        api_model=only_model(arguments.url, None),
        concurrency=arguments.concurrency,
        tokenizer=None if arguments.no_tokenizer else arguments.model,
    )
    server = open_engine(spec, ModelSpec(name="server"))
    rows: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, requests in kinds.items():
        try:
            theirs = timed(server, requests)
        except EngineError as error:
            refused[name] = str(error)
            continue
        rows[name] = compared(timed(native, requests)["answers"], theirs["answers"]) | {"s": theirs["seconds"][0]}
    told = {"warnings": server.info["warnings"], "usage": server.info["usage"]}
    server.close()
    print(json.dumps({**rows, "refused": refused, **told}, indent=1))
    return 0 if is_right(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
