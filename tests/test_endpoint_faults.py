"""What a server may send instead of an answer: each request ends in time, with one line, and costs no other sample."""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from scripted_api import Raw, chat, completion, serving

from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import ChoiceLogprobs, Choose, Completions, EngineError, Generate, Prompt
from qwen_eval.engines import open_engine
from qwen_eval.engines.api.pace import duration_s
from qwen_eval.engines.openai.engine import OpenAiEngine

pytest.importorskip("httpx2")

ROOT = Path(__file__).parent.parent
GENERATE = Generate(prompt=Prompt.raw("Q"), max_new_tokens=4)


def engine_at(url: str, **options: Any) -> OpenAiEngine:
    engine = open_engine(EngineSpec(name="openai", base_url=url, **options), ModelSpec(name="m"))
    assert isinstance(engine, OpenAiEngine)
    return engine


MALFORMED = {
    "a web page": (b"<!DOCTYPE html><html>Sign in</html>", "a web page instead of JSON"),
    "nothing": (b"", "an empty reply"),
    "cut JSON": (b'{"choices": [{"index": 0, "te', "29 bytes that are no JSON"),
    "no UTF-8": (b"\xff\xfe\x00{", "4 bytes that are no JSON"),
    "deep nesting": (b"[" * 200_000, "nested too deep"),
    "a list": (b"[1, 2]", "the reply of type list"),
    "choices of another type": (b'{"choices": {"0": 1}}', "choices of type dict"),
    "no choice": (b'{"choices": []}', "0 of 1 completions"),
    "a choice of another type": (b'{"choices": ["A"]}', "a choice of type str"),
    "a text of another type": (b'{"choices": [{"text": 3, "finish_reason": "stop"}]}', "a completion without text"),
    "content of another type": (b'{"choices": [{"message": {"content": {"text": "A"}}}]}', "content of type dict"),
    "content that is no text": (
        b'{"choices": [{"message": {"content": [{"type": "image_url"}]}}]}',
        "a message whose content is no text",
    ),
    "a part of another type": (b'{"choices": [{"message": {"content": ["A"]}}]}', "a part of type str"),
    "a number of many digits": (b'{"choices": [{"text": ' + b"9" * 5_000 + b"}]}", "bytes that are no JSON"),
    "a call of another type": (
        b'{"choices": [{"message": {"content": null, "tool_calls": [{"function": {"name": 3}}]}}]}',
        "are no text",
    ),
    "an end that is none": (
        b'{"choices": [{"text": "", "finish_reason": "insufficient_system_resource"}]}',
        "a completion that ended with",
    ),
    "no end": (b'{"choices": [{"text": "A", "finish_reason": null}]}', "a completion that ended with None"),
    "an error with status 200": (
        b'{"error": "out of\\u001b[31m memory"}',
        r"an error for a reply: out of\x1b[31m memory",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_body_is_asked_again_and_then_fails_in_one_line(name: str) -> None:
    body, reason = MALFORMED[name]
    replies = [Raw(body), completion("fine")]
    with serving(lambda path, asked: replies.pop(0)) as server:
        ((_, answer),) = engine_at(server.url).run([GENERATE])
        assert isinstance(answer, Completions)
        assert answer.text == "fine"
    with serving(lambda path, asked: Raw(body)) as server:
        engine = engine_at(server.url, retries=0)
        with pytest.raises(EngineError) as caught:
            list(engine.run([GENERATE]))
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_gzip_bomb_is_not_unpacked_further_than_the_bound() -> None:
    bomb = gzip.compress(b" " * (200 << 20), 1)  # 200 MiB
    with serving(lambda path, asked: Raw(bomb, content_encoding="gzip")) as server:
        engine = engine_at(server.url, retries=0)
        with pytest.raises(EngineError, match="a reply of more than 64 MiB"):
            list(engine.run([GENERATE]))
    good = gzip.compress(json.dumps(completion("packed")).encode())
    with serving(lambda path, asked: Raw(good, content_encoding="gzip")) as server:
        ((_, answer),) = engine_at(server.url).run([GENERATE])
    assert isinstance(answer, Completions)
    assert answer.text == "packed"


def test_an_encoding_that_was_not_asked_for_is_not_unpacked() -> None:
    with serving(lambda path, asked: Raw(b"x", content_encoding="zstd")) as server:
        with pytest.raises(EngineError, match="packed as zstd"):
            list(engine_at(server.url, retries=0).run([GENERATE]))
        assert "zstd" not in str(server.seen)


def test_a_body_that_drips_or_breaks_off_ends_in_time() -> None:
    start = time.monotonic()
    with (
        serving(lambda path, asked: Raw(b" " * 500, pause_s=0.05)) as server,
        pytest.raises(EngineError, match=r"no whole reply within 0\.3 s"),
    ):
        list(engine_at(server.url, retries=1, timeout_s=0.3).run([GENERATE]))
    assert time.monotonic() - start < 5
    with (
        serving(lambda path, asked: Raw(b"{", is_cut=True)) as server,
        pytest.raises(EngineError, match="the connection broke"),
    ):
        list(engine_at(server.url, retries=0).run([GENERATE]))


def test_what_a_server_says_is_printed_without_the_key_or_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    said = json.dumps({"error": {"message": "bad key sk-secret-123 \x1b]0;owned\x07\u202e of you\nline two"}}).encode()
    with serving(lambda path, asked: Raw(said, status=401)) as server:
        with pytest.raises(EngineError) as caught:
            list(engine_at(server.url).run([GENERATE] * 20))
        assert len(server.seen) <= 16  # no other request would fare better
    assert "status 401: bad key [key] " in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000", "pass engine.base_url=http://localhost:8000"),
        ("127.0.0.1:8000/v1", "pass engine.base_url=http://127.0.0.1:8000/v1"),
        ("http://", "not an address"),
        ("http://host:port/v1", "not an address"),
        ("http://a b/v1", "not an address"),
    ],
)
def test_an_address_that_is_none_is_told_so(url: str, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        engine_at(url)


def test_a_storm_of_429_is_waited_for_and_costs_no_retry() -> None:
    start = time.monotonic()

    def script(path: str, asked: dict[str, Any]) -> Any:
        if time.monotonic() - start < 0.4:
            return Raw(b'{"error": {"message": "slow down"}}', status=429, retry_after_ms="100")
        return completion(asked["prompt"])

    with serving(script) as server:
        engine = engine_at(server.url, retries=0, concurrency=32)
        asked = [Generate(prompt=Prompt.raw(f"q{i}"), max_new_tokens=4) for i in range(64)]
        found = dict(engine.run(asked))
        assert engine.failures == {}
        assert engine.info["usage"]["num_retries"] == 0
    assert [found[i].text for i in range(64)] == [f"q{i}" for i in range(64)]  # type: ignore[union-attr]


def test_a_used_up_account_is_not_waited_for() -> None:
    said = b'{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}'
    with serving(lambda path, asked: Raw(said, status=429, retry_after="3600")) as server:
        with pytest.raises(EngineError, match="status 429: You exceeded your current quota"):
            list(engine_at(server.url).run([GENERATE] * 20))
        assert len(server.seen) <= 16


def test_the_retries_of_a_run_are_bounded_together() -> None:
    """Half of the requests meet a fault at first: 50 retries are for all, the others fail, and are told why."""
    begun: set[str] = set()

    def script(path: str, asked: dict[str, Any]) -> Any:
        is_first = asked["prompt"] not in begun
        begun.add(asked["prompt"])
        return Raw(b"") if is_first and int(asked["prompt"]) % 2 else completion()

    with serving(script) as server:
        engine = engine_at(server.url, retry_share=0.0)
        asked = [Generate(prompt=Prompt.raw(f"{i}"), max_new_tokens=4) for i in range(140)]
        assert len(dict(engine.run(asked))) == 120
        assert len(engine.failures) == 20
        assert set(engine.failures.values()) == {"an empty reply (and the run's 50 retries are spent)"}


@pytest.mark.parametrize(
    ("text", "seconds"), [("6m0s", 360), ("20ms", 0.02), ("1.5", 1.5), ("1h2m3s", 3723), ("x", None), ("", None)]
)
def test_rate_limits_are_read_in_the_forms_in_use(text: str, seconds: float | None) -> None:
    assert duration_s(text) == (None if seconds is None else pytest.approx(seconds))


def test_a_rate_limit_that_is_used_up_is_waited_for() -> None:
    sent: list[float] = []

    def script(path: str, asked: dict[str, Any]) -> Any:
        sent.append(time.monotonic())
        headers = {"x_ratelimit_remaining_requests": "0", "x_ratelimit_reset_requests": "300ms"}
        return Raw(json.dumps(completion()).encode(), **headers)

    with serving(script) as server:
        list(engine_at(server.url, concurrency=1).run([GENERATE] * 3))
    assert all(later - before >= 0.29 for before, later in itertools.pairwise(sent))


def test_an_engine_can_be_closed_twice_and_asked_in_between() -> None:
    with serving(lambda path, asked: completion()) as server:
        engine = engine_at(server.url)
        assert len(list(engine.run([GENERATE]))) == len(list(engine.run([GENERATE]))) == 1
        engine.close()
        engine.close()


def test_nothing_is_asked_while_nobody_takes_the_answers() -> None:
    with serving(lambda path, asked: completion()) as server:
        answers = engine_at(server.url, concurrency=4).run([GENERATE] * 100)
        next(answers)
        time.sleep(0.5)
        assert len(server.seen) <= 9  # twice what may be in flight, and the one that was taken
        answers.close()
        time.sleep(0.2)
        assert len(server.seen) <= 10


def test_a_server_that_is_restarted_is_waited_for() -> None:
    """Each request in flight meets it, and none of them costs a retry."""
    with serving(lambda path, asked: completion()) as server:
        engine = engine_at(server.url, concurrency=100, retries=1)
        answers = engine.run([GENERATE] * 300)
        found = {next(answers)[0] for _ in range(20)}
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        rest = pool.submit(lambda: [index for index, _ in answers])
        time.sleep(1.0)
        assert not rest.done()
        stack.enter_context(serving(lambda path, asked: completion(), port=server.server_address[1]))
        found.update(rest.result(timeout=30))
    assert len(found) + len(engine.failures) == 300
    assert not [reason for reason in engine.failures.values() if "no server" in reason]


def test_a_server_that_is_gone_ends_the_run_in_one_line_and_leaves_no_task_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qwen_eval.engines.api.client.DOWN_S", 0.5)
    with serving(lambda path, asked: completion()) as server:
        engine = engine_at(server.url, concurrency=200, retries=1)
        answers = engine.run([GENERATE] * 600)
        next(answers)
    with pytest.raises(EngineError, match=r"^http\S+ no server answers \(.*\), waited for 0 s"):
        list(answers)
    engine.close()
    del answers, engine
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_filtered_and_refused_completions_are_no_normal_end() -> None:
    refused = chat(
        None, message={"role": "assistant", "content": None, "refusal": "no"}, finish_reason="content_filter"
    )
    silent = chat(None, message={"role": "assistant", "content": "", "refusal": "I cannot"})
    for reply in (refused, silent, completion("", finish_reason="content_filter")):
        with serving(lambda path, asked, reply=reply: reply) as server:
            prompt = Prompt.raw("Q") if "text" in reply["choices"][0] else Prompt.user("Q")
            ((_, answer),) = engine_at(server.url).run([Generate(prompt=prompt, max_new_tokens=4)])
        assert isinstance(answer, Completions)
        assert answer.completions[0].finish_reason == "filtered"


def test_log_probabilities_in_the_form_of_chats_are_read_from_raw_completions_too() -> None:
    tops = {" A": -0.1, " B": -3.0, " C": -4.0, " D": -5.0}
    rows = [{"token": token, "logprob": value, "bytes": None} for token, value in tops.items()]
    reply = completion(" A", logprobs={"content": [{**rows[0], "top_logprobs": rows}]})
    with serving(lambda path, asked: reply) as server:
        ((_, answer),) = engine_at(server.url).run([Choose(prompt=Prompt.raw("Q"), choices=(" A", " B", " C", " D"))])
    assert isinstance(answer, ChoiceLogprobs)
    assert answer.logprobs == (-0.1, -3.0, -4.0, -5.0)


@pytest.mark.parametrize(
    ("tops", "said"),
    [
        ({" A": -2.0, " B": -2.0, " C": -2.0}, "the same log-probability to 3 tokens"),
        ({" A": 0.7, " B": -2.0}, r"a log-probability of 0\.7"),
        ({" A": float("nan"), " B": -2.0}, "a log-probability of nan"),
        ({" A": -0.1, " B": -0.1}, "add up to more than one"),
        ({" A": "-0.1", " B": -0.1}, r"a log-probability of -0\.1"),
    ],
)
def test_log_probabilities_that_cannot_be_are_refused_before_the_first_sample(tops: dict[str, Any], said: str) -> None:
    with serving(lambda path, asked: completion(tops=tops)) as server:
        with pytest.raises(EngineError, match=said):
            list(engine_at(server.url, retries=0).run([Choose(prompt=Prompt.raw("Q"), choices=(" A", " B"))] * 50))
        assert len(server.seen) <= 2


def test_a_server_that_contradicts_itself_is_refused() -> None:
    values = iter([-0.1, -2.5, -0.1])
    with (
        serving(lambda path, asked: completion(tops={" A": next(values), " B": -4.0})) as server,
        pytest.raises(EngineError, match=r"gives ' A' the log-probabilities -0\.100 and -2\.500"),
    ):
        list(engine_at(server.url).run([Choose(prompt=Prompt.raw("Q"), choices=(" A", " B"))]))


@pytest.mark.slow
def test_500_requests_in_flight_with_faults_are_each_answered_once_in_bounded_memory() -> None:
    """10 % faults: storms of 429, slow bodies, resets, malformed bodies, impossible log-probabilities."""
    tool = [sys.executable, "tools/bench_endpoint.py", "--requests", "1000", "--in-flight", "500", "--faults", "0.1"]
    done = subprocess.run(
        tool, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["answered"], found["right"], found["twice"], found["failed"]) == (1000, 1000, 0, 0)
    assert found["most_in_flight"] == 500
    assert found["memory_peak_mib"] - found["memory_before_mib"] < 100


@pytest.mark.parametrize(
    ("message", "end", "text"),
    [
        ({"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "A"}]}, "stop", "A"),
        ({"content": None, "reasoning_content": "B?"}, "length", ""),
        (
            {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": "你"}}}]},
            "tool_calls",
            '<tool_call>\n{"name": "f", "arguments": {"x": "你"}}\n</tool_call>',
        ),
        (
            {"content": None, "function_call": {"name": "f", "arguments": "{}"}},
            "function_call",
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        ),
        ({"content": "A"}, "eos_token", "A"),
    ],
)
def test_messages_are_read_in_the_forms_in_use(message: dict[str, Any], end: str, text: str) -> None:
    with serving(lambda path, asked: chat(message=message, finish_reason=end)) as server:
        ((_, answer),) = engine_at(server.url).run([Generate(prompt=Prompt.user("Q"), max_new_tokens=4)])
    assert isinstance(answer, Completions)
    assert (answer.text, answer.completions[0].finish_reason) == (text, "length" if end == "length" else "eos")
