"""The API engine against a real HTTP server: what it sends, what it reads, and what it says when that fails."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import (
    ChoiceLogprobs,
    Choose,
    Completions,
    EngineError,
    Generate,
    Message,
    Prompt,
    Sampling,
    Score,
    ToolCall,
)
from qwen_eval.engines import open_engine

pytest.importorskip("httpx2")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.errors: list[int] = []  # statuses of the next replies
        self.in_flight = self.most_in_flight = 0
        self.has_logprobs = True
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, body))
            status = self.server.errors.pop(0) if self.server.errors else 200
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        time.sleep(0.02)
        with self.server.lock:
            self.server.in_flight -= 1
        reply = self._reply(body) if status == 200 else {"error": {"message": f"status {status}\nand a second line"}}
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def _reply(self, body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        tops = {"A": -0.5, "B": -1.5, " A": -3.0} if self.server.has_logprobs else {}
        chosen = []
        for index in range(body.get("n") or 1):
            choice: dict[str, Any] = {"index": index, "finish_reason": "length" if "long" in text else "stop"}
            said = f"echo {text} STOP rest"
            if "messages" in body:
                rows = [{"token": token, "logprob": value, "bytes": None} for token, value in tops.items()]
                content = [{"token": "A", "logprob": -0.5, "bytes": None, "top_logprobs": rows}] if tops else None
                message: dict[str, Any] = {"role": "assistant", "content": said}
                if "tools" in body and "weather" in text:
                    function = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
                    message |= {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
                choice |= {"message": message, "logprobs": {"content": content}}
            else:
                choice |= {"text": said, "logprobs": {"top_logprobs": [tops]} if tops else None}
            chosen.append(choice)
        usage = {"completion_tokens": 7 * len(chosen), "prompt_tokens": 3, "total_tokens": 10}
        return {"id": "x", "object": "completion", "created": 0, "model": "m", "choices": chosen, "usage": usage}

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def engine_at(server: Server, **options: Any) -> Any:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return open_engine(EngineSpec(name="openai", base_url=url, **options), ModelSpec(name="m", hub_id="Qwen/X"))


def test_texts_come_back_to_their_requests_with_many_in_flight(server: Server) -> None:
    engine = engine_at(server, concurrency=4)
    requests = [
        Generate(prompt=Prompt.user(f"q{i}", system="Be brief."), max_new_tokens=9, stop=(" STOP",)) for i in range(12)
    ]
    found = dict(engine.run(requests))
    assert {i: answer.text for i, answer in found.items()} == {i: f"echo q{i}" for i in range(12)}
    assert 2 <= server.most_in_flight <= 4
    path, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["max_tokens"], body["temperature"], body["stop"]) == ("Qwen/X", 9, 0.0, [" STOP"])
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_calls_that_the_server_has_read_are_put_back_into_the_text(server: Server) -> None:
    tool = json.dumps({"type": "function", "function": {"name": "get_weather", "parameters": {}}})
    prompt = Prompt(messages=(Message(role="user", content="weather?"),), tools=(tool,))
    ((_, answer),) = engine_at(server).run([Generate(prompt=prompt, max_new_tokens=4)])
    assert isinstance(answer, Completions)
    assert answer.text == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_raw_text_goes_to_the_completions_endpoint(server: Server) -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=20, seed=5)
    request = Generate(prompt=Prompt.raw("long text"), max_new_tokens=4, sampling=sampling, n=2)
    ((_, answer),) = engine_at(server).run([request])
    assert isinstance(answer, Completions)
    assert [(item.finish_reason, item.num_tokens) for item in answer.completions] == [("length", 7)] * 2
    path, body = server.seen[0]
    assert path == "/v1/completions"
    assert (body["prompt"], body["n"], body["seed"], body["top_k"]) == ("long text", 2, 5, 20)


@pytest.mark.parametrize("prompt", [Prompt.raw("Q"), Prompt.user("Q")])
def test_choices_are_read_from_the_likeliest_tokens(server: Server, prompt: Prompt) -> None:
    ((_, answer),) = engine_at(server).run([Choose(prompt=prompt, choices=("B", "A"))])
    assert isinstance(answer, ChoiceLogprobs)
    assert answer.logprobs == (-1.5, -0.5)


def test_a_choice_the_server_does_not_name_has_a_bound(server: Server) -> None:
    ((_, answer),) = engine_at(server).run([Choose(prompt=Prompt.raw("Q"), choices=("C", "A"))])
    assert isinstance(answer, ChoiceLogprobs)
    assert answer.logprobs == (-3.0, -0.5)  # no likelier than the last token in the list
    assert (answer.bounded, answer.best, answer.is_decided) == ((0,), 1, True)
    assert not math.log(1 - sum(map(math.exp, (-0.5, -1.5, -3.0)))) < -3.0  # what the list leaves would be more


def test_the_best_of_bounds_alone_is_not_decided(server: Server) -> None:
    ((_, answer),) = engine_at(server).run([Choose(prompt=Prompt.raw("Q"), choices=("C", "Bx"))])
    assert isinstance(answer, ChoiceLogprobs)
    assert answer.logprobs == (-3.0, -1.5)  # "Bx" begins with "B"
    assert not answer.is_decided


def test_a_server_without_log_probabilities_says_what_to_do(server: Server) -> None:
    server.has_logprobs = False
    with pytest.raises(EngineError, match="gives no log-probabilities"):
        list(engine_at(server).run([Choose(prompt=Prompt.raw("Q"), choices=("A", "C"))]))


def test_system_message_thinking_and_tools_reach_the_server(server: Server) -> None:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    model = ModelSpec(name="m", hub_id="Qwen/X", system="Count.", thinking="off")
    engine = open_engine(EngineSpec(name="openai", base_url=url), model)
    call = Message(role="assistant", content="", tool_calls=(ToolCall(name="add", arguments='{"a": 1}'),))
    chat = (Message(role="user", content="1+2?"), call, Message(role="tool", content="3"))
    tool = {"type": "function", "function": {"name": "add"}}
    prompt = Prompt(messages=chat, tools=(json.dumps(tool),))
    list(engine.run([Generate(prompt=prompt, max_new_tokens=9)]))
    _, body = server.seen[0]
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "tool"]
    assert body["messages"][0]["content"] == "Count."
    (made,) = body["messages"][2]["tool_calls"]
    assert made["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert body["messages"][3]["tool_call_id"] == made["id"]
    assert body["tools"] == [tool]
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert engine.render(prompt).text.startswith("[system]\nCount.\n[user]\n1+2?")


def test_a_busy_server_is_asked_again(server: Server) -> None:
    server.errors = [503, 429]
    ((_, answer),) = engine_at(server).run([Generate(prompt=Prompt.raw("x"), max_new_tokens=3)])
    assert answer.text.startswith("echo x")
    assert len(server.seen) == 3


def test_one_refused_request_does_not_take_the_others_with_it(server: Server) -> None:
    server.errors = [200, 400]
    engine = engine_at(server, concurrency=1)
    requests = [Generate(prompt=Prompt.raw(f"{i}"), max_new_tokens=3) for i in range(5)]
    assert sorted(dict(engine.run(requests))) == [0, 2, 3, 4]
    assert engine.failures == {1: "status 400: status 400 and a second line"}


def test_refusals_alone_are_one_line_and_end_the_asking(server: Server) -> None:
    server.errors = [400] * 50
    requests = [Generate(prompt=Prompt.raw(f"{i}"), max_new_tokens=3) for i in range(50)]
    with pytest.raises(EngineError, match="status 400") as caught:
        list(engine_at(server, concurrency=1).run(requests))
    assert "\n" not in str(caught.value)
    assert len(server.seen) < 12


def test_no_server_and_no_address_are_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EngineError, match=r"pass engine\.base_url="):
        open_engine(EngineSpec(name="openai"), ModelSpec(name="m"))
    gone = open_engine(EngineSpec(name="openai", base_url="http://127.0.0.1:9/v1", retries=0), ModelSpec(name="m"))
    with pytest.raises(EngineError, match="no server answers"):
        list(gone.run([Generate(prompt=Prompt.raw("x"), max_new_tokens=3)]))


def test_scoring_where_no_text_is_echoed_is_refused(server: Server) -> None:
    with pytest.raises(EngineError, match="gives no log-probabilities of a given text"):
        list(engine_at(server).run([Score(prompt=Prompt.raw("x"))]))


def test_vllm_that_is_not_installed_says_how_to_get_it() -> None:
    try:
        import vllm  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        with pytest.raises(EngineError, match=r"pip install 'qwen_eval\[vllm\]'"):
            open_engine(EngineSpec(name="vllm"), ModelSpec(name="m"))
    else:
        pytest.skip("vllm is installed")
