"""A scripted OpenAI-compatible server with faults, to try `engine=openai` on: `python tools/fault_server.py --help`.

Its texts and log-probabilities are hashes of the prompt, so that every sample has one right answer. A share of the
requests meets a fault: a storm of 429, a body that comes too slowly, a reset, a malformed body, impossible
log-probabilities. Prints its address; ends with its stdin. `GET /count` says what it did.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import math
import os
import random
import socket
import struct
import sys
import time
from typing import Any

FAULTS = ("storm", "slow", "reset", "malformed", "logprobs")
STORM_S = 0.2
MALFORMED = (
    b"<html><body>502 Bad Gateway</body></html>", b"", b'{"choices": [{"index": 0, "te', b"[1, 2]", b'"text"', b"null",
    b'{"choices": {}}', b'{"choices": []}', b'{"choices": [7]}', b'{"choices": [{"text": 3, "finish_reason": "stop"}]}',
    b"[" * 100_000, b"\xff\xfe\x00",
)  # fmt: skip


def letters_of(prompt: str) -> dict[str, float]:
    """Log-probabilities of the tokens " A" to " D" and of one other."""
    digest = hashlib.sha256(prompt.encode("utf-8", "replace")).digest()
    weights = [1 + byte for byte in digest[:5]]
    return {token: math.log(w / (sum(weights) + 50)) for token, w in zip((" A", " B", " C", " D", " the"), weights)}


def choice_of(body: dict[str, Any], index: int) -> dict[str, Any]:
    prompt = body["messages"][-1]["content"] if "messages" in body else str(body["prompt"])
    text = f"answer {hashlib.sha256(prompt.encode('utf-8', 'replace')).hexdigest()[:8]}"
    tops = letters_of(prompt)
    row: dict[str, Any] = {"index": index, "finish_reason": "stop", "logprobs": None}
    if "messages" in body:
        row["message"] = {"role": "assistant", "content": text}
        if body.get("logprobs"):
            items = [{"token": token, "logprob": value} for token, value in tops.items()]
            row["logprobs"] = {"content": [{**items[0], "top_logprobs": items}]}
    else:
        row["text"] = text
        if body.get("logprobs"):
            row["logprobs"] = {"tokens": [" A"], "token_logprobs": [tops[" A"]], "top_logprobs": [tops]}
    return row


def reply_to(body: dict[str, Any]) -> dict[str, Any]:
    choices = [choice_of(body, index) for index in range(body.get("n") or 1)]
    usage = {"prompt_tokens": 20, "completion_tokens": 3 * len(choices), "total_tokens": 20 + 3 * len(choices)}
    return {"id": "x", "object": "completion", "created": 0, "model": "scripted", "choices": choices, "usage": usage}


def with_impossible_logprobs(reply: dict[str, Any]) -> bytes:
    """Above zero, or NaN; where the reply has none, a text of another type."""
    text = json.dumps(reply)
    return (
        text.replace('"logprob": -', '"logprob": 4', 1)
        .replace('" A": -', '" A": NaN, "x": -', 1)
        .replace('"text": "answer', '"text": 5, "was": "answer', 1)
        .encode()
    )


class FaultServer:
    """One connection after the other is answered by `serve`; requests on a connection in turn."""

    def __init__(self, *, share: float, seed: int, latency_s: float, slow_s: float) -> None:
        self.share, self.random, self.latency_s, self.slow_s = share, random.Random(seed), latency_s, slow_s
        self.malformed = itertools.cycle(MALFORMED)
        self.storm_until = 0.0
        self.count: dict[str, int] = dict.fromkeys(("requests", "good", "busy", *FAULTS, "most_in_flight"), 0)
        self.in_flight = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) is not None:
                size = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n")
                             if line.startswith(b"content-length:")), 0)  # fmt: skip
                body = await reader.readexactly(size)
                self.in_flight += 1
                self.count["most_in_flight"] = max(self.count["most_in_flight"], self.in_flight)
                try:
                    if not await self.answer(head, body, writer):
                        return
                finally:
                    self.in_flight -= 1
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def answer(self, head: bytes, data: bytes, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection is still of use."""
        if head.startswith(b"GET"):
            found = self.count if b" /count " in head else {"object": "list", "data": [{"id": "scripted"}]}
            return await send(writer, json.dumps(found).encode())
        self.count["requests"] += 1
        await asyncio.sleep(self.latency_s * self.random.uniform(0.5, 1.5))
        if time.monotonic() < self.storm_until:
            return await self.busy(writer)
        body = json.loads(data)
        fault = self.random.choice(FAULTS) if self.random.random() < self.share else None
        if fault is None:
            self.count["good"] += 1
            return await send(writer, json.dumps(reply_to(body)).encode())
        self.count[fault] += 1
        return await self.fail(fault, body, writer)

    async def busy(self, writer: asyncio.StreamWriter) -> bool:
        self.count["busy"] += 1
        wait = f"retry-after-ms: {int(1000 * max(0.01, self.storm_until - time.monotonic()))}\r\n"
        return await send(writer, b'{"error": {"message": "too many requests"}}', "429 Too Many Requests", wait)

    async def fail(self, fault: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if fault == "storm":
            self.storm_until = time.monotonic() + STORM_S
            return await self.busy(writer)
        if fault == "slow":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 400\r\n\r\n")
            for _ in range(int(self.slow_s * 10)):
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.1)
            return False
        if fault == "reset":
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        return await send(
            writer, next(self.malformed) if fault == "malformed" else with_impossible_logprobs(reply_to(body))
        )


async def send(writer: asyncio.StreamWriter, data: bytes, status: str = "200 OK", more: str = "") -> bool:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n{more}\r\n"
    writer.write(head.encode() + data)
    await writer.drain()
    return True


async def run(arguments: argparse.Namespace) -> None:
    script = FaultServer(
        share=arguments.faults, seed=arguments.seed, latency_s=arguments.latency_s, slow_s=arguments.slow_s
    )
    server = await asyncio.start_server(script.serve, "127.0.0.1", arguments.port, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)  # with connections that are open


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--faults", type=float, default=0.1, help="share of the requests that meet a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency-s", type=float, default=0.05, help="of a good reply, half to one and a half times")
    parser.add_argument("--slow-s", type=float, default=60.0, help="how long a slow body takes")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
