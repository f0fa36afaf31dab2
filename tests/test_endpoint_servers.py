"""What each kind of server is asked, and what is made of what it can: echo, bounds, templates, prices, its model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
from scripted_api import Raw, Script, chat, completion, serving
from tiny_checkpoint import write_tiny_qwen2

from qwen_eval.__main__ import main
from qwen_eval.config import EngineSpec, ModelSpec
from qwen_eval.core import ChoiceLogprobs, Choose, ConfigError, EngineError, Generate, Prompt, Score, TokenLogprobs
from qwen_eval.engines import open_engine
from qwen_eval.engines.api.account import Prices, read_prices
from qwen_eval.engines.api.replies import Usage
from qwen_eval.engines.api.servers import SERVERS
from qwen_eval.engines.openai.engine import OpenAiEngine
from qwen_eval.models.tokenizer import load_tokenizer

pytest.importorskip("httpx2")

Command = Callable[..., tuple[int, str, str]]
CHAT = Generate(prompt=Prompt.user("Q", prefill="So"), max_new_tokens=4)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """A command line in an empty directory; (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    toy.register()

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["task=toy", "task.num=4", "task.max_new_tokens=2", *arguments])
        said = capfd.readouterr()
        return code, said.out, said.err

    return call


def engine_at(url: str, model: ModelSpec | None = None, **options: Any) -> OpenAiEngine:
    engine = open_engine(EngineSpec(name="openai", base_url=url, **options), model or ModelSpec(name="m"))
    assert isinstance(engine, OpenAiEngine)
    return engine


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Bytes, with the ids of GPT-2's alphabet: the directory of a checkpoint."""
    return str(write_tiny_qwen2(tmp_path_factory.mktemp("tiny")))


def logprob(before: str, token: str) -> float:
    """Of a scripted model: it depends on the character and the one before."""
    return -0.5 - (ord(token[0]) * 7 + ord(before[-1:] or " ")) % 13


def echoing(*, is_real: bool = True, decode: Callable[[list[int]], str] | None = None) -> Script:
    """A server that scores the characters of a text; at the end of one "A" and "B" are in its list, "C" is not."""

    def script(path: str, asked: dict[str, Any]) -> Any:
        given = asked["prompt"]
        text = given if isinstance(given, str) or decode is None else decode(given)
        tops = {token: logprob(text, token) for token in "ABC"}
        del tops["C"]
        if not asked.get("echo"):
            return completion(tops=tops)
        marks = [*text, "A"]
        values = [None, *(logprob(text[:i], text[i]) if is_real else 0.0 for i in range(1, len(text))), tops["A"]]
        rows = [None if value is None else {mark: value} for mark, value in zip(marks, values)]
        logprobs = {
            "tokens": marks,
            "token_logprobs": values,
            "top_logprobs": rows,
            "text_offset": [*range(len(marks))],
        }
        return completion(logprobs=logprobs)

    return script


def test_a_choice_outside_the_list_is_scored_by_echo_where_that_is_real() -> None:
    with serving(echoing()) as server:
        ((_, answer),) = engine_at(server.url, server="vllm").run([Choose(prompt=Prompt.raw("Q:"), choices=("A", "C"))])
    assert isinstance(answer, ChoiceLogprobs)
    assert answer.logprobs == (logprob("Q:", "A"), logprob("Q:", "C"))
    assert answer.bounded == ()


def test_a_choice_of_several_tokens_is_their_sum() -> None:
    with serving(echoing()) as server:
        engine = engine_at(server.url, server="vllm")
        ((_, answer),) = engine.run([Choose(prompt=Prompt.raw("Q:"), choices=("A", "Bcd"))])
    assert isinstance(answer, ChoiceLogprobs)
    assert answer.num_tokens == (1, 3)
    assert answer.logprobs[1] == pytest.approx(logprob(":", "B") + logprob("B", "c") + logprob("c", "d"))


def test_an_echo_that_is_not_real_is_not_used() -> None:
    with serving(echoing(is_real=False)) as server:
        engine = engine_at(server.url, server="vllm")
        ((_, answer),) = engine.run([Choose(prompt=Prompt.raw("Q:"), choices=("A", "C"))])
        with pytest.raises(EngineError, match="or they are not its own"):
            list(engine.run([Score(prompt=Prompt.raw("text"))]))
    assert isinstance(answer, ChoiceLogprobs)
    assert answer.bounded == (1,)


def test_a_text_is_not_scored_without_a_tokenizer() -> None:
    """Nothing at all would be asked: an empty list of token ids."""
    with serving(echoing()) as server, pytest.raises(EngineError, match=r"pass engine\.tokenizer=DIR"):
        list(engine_at(server.url, server="vllm").run([Score(prompt=Prompt.raw("text"))]))


def test_given_ids_are_scored_and_sent_as_ids(tokenizer: str) -> None:
    bytes_of = load_tokenizer(Path(tokenizer))
    ids = tuple(bytes_of.encode("perplexity"))
    with serving(echoing(decode=bytes_of.decode)) as server:
        engine = engine_at(server.url, server="vllm", tokenizer=tokenizer)
        ((_, answer),) = engine.run([Score(prompt=Prompt(ids=ids), num_context=2)])
        assert server.seen[-1][1]["prompt"] == list(ids)
    assert isinstance(answer, TokenLogprobs)
    assert answer.token_ids == ids[2:]
    assert answer.logprobs == pytest.approx([logprob("perplexity"[:i], "perplexity"[i]) for i in range(2, 10)])
    assert answer.num_greedy == 8


@pytest.mark.parametrize(("server", "field"), [("vllm", "chat_template_kwargs"), ("dashscope", "enable_thinking")])
def test_thinking_and_prefill_are_said_in_the_words_of_the_server(server: str, field: str) -> None:
    with serving(lambda path, asked: chat()) as api:
        list(engine_at(api.url, ModelSpec(name="m", thinking="off"), server=server).run([CHAT]))
        _, (_, body) = api.seen  # the first is the check at the start
    assert body[field] in (False, {"enable_thinking": False})
    last = body["messages"][-1]
    assert (last["role"], last["content"]) == ("assistant", "So")
    assert last.get("partial") is (True if server == "dashscope" else None)
    assert body.get("continue_final_message") is (True if server == "vllm" else None)


def test_a_message_that_the_server_repeats_before_its_continuation_is_no_part_of_the_text() -> None:
    """llama.cpp's does, others do not: one request tells."""

    def script(path: str, asked: dict[str, Any]) -> Any:
        return chat(asked["messages"][-1]["content"] + " it is B.")

    with serving(script) as api:
        engine = engine_at(api.url, server="llama-server")
        found = dict(engine.run([CHAT, Generate(prompt=Prompt.user("Q"), max_new_tokens=4)]))
        assert len(api.seen) == 3
    assert [found[i].text for i in range(2)] == [" it is B.", "Q it is B."]  # type: ignore[union-attr]


def test_a_server_without_raw_completions_says_so() -> None:
    with serving(lambda path, asked: chat()) as api, pytest.raises(EngineError, match=r"task\.mode=chat"):
        list(engine_at(api.url, server="dashscope").run([Generate(prompt=Prompt.raw("Q"), max_new_tokens=4)]))


def test_fewer_log_probabilities_are_asked_for_where_so_many_are_refused() -> None:
    def script(path: str, asked: dict[str, Any]) -> Any:
        if asked["logprobs"] > 5:
            return Raw(b'{"error": {"message": "logprobs must be at most 5"}}', status=400)
        return completion(tops={"A": -0.5, "B": -2.0})

    with serving(script) as api:
        answers = dict(engine_at(api.url).run([Choose(prompt=Prompt.raw("Q"), choices=("A", "B"))] * 3))
        assert [body["logprobs"] for _, body in api.seen].count(20) == 1
    assert len(answers) == 3


def test_another_chat_template_at_the_server_is_a_warning(tokenizer: str) -> None:
    ask = Generate(prompt=Prompt.user("Q"), max_new_tokens=4)
    with serving(lambda path, asked: chat()) as api:
        engine = engine_at(api.url, tokenizer=tokenizer)
        list(engine.run([ask]))
        (warning,) = engine.info["warnings"]
        ours = len(engine.render(ask.prompt).ids)
    assert f"the server's prompt has 10 tokens, by engine.tokenizer it has {ours}" in warning
    same = chat() | {"usage": {"prompt_tokens": ours, "completion_tokens": 1}}
    with serving(lambda path, asked: same) as api:
        engine = engine_at(api.url, tokenizer=tokenizer)
        list(engine.run([ask]))
        assert engine.info["warnings"] == []


# --- prices ----------------------------------------------------------------------------------------------------------


def test_tokens_and_their_price_are_counted(tmp_path: Path) -> None:
    table = tmp_path / "prices.yaml"
    table.write_text("currency: CNY\nmodels:\n  m: {input: 2.0, cached_input: 0.5, output: 8.0}\n")
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "prompt_tokens_details": {"cached_tokens": 400}}
    with serving(lambda path, asked: completion() | {"usage": usage}) as api:
        engine = engine_at(api.url, prices=str(table))
        list(engine.run([Generate(prompt=Prompt.raw("Q"), max_new_tokens=4)] * 3))
        found = engine.info["usage"]
    assert (found["prompt_tokens"], found["cached_tokens"], found["completion_tokens"]) == (3000, 1200, 300)
    assert found["cost"] == pytest.approx((1800 * 2.0 + 1200 * 0.5 + 300 * 8.0) / 1e6)
    assert found["currency"] == "CNY"


def test_without_a_price_for_cached_tokens_they_cost_as_others() -> None:
    assert Prices(input=2.0, output=8.0, cached_input=2.0).cost(Usage(prompt_tokens=10, cached_tokens=4)) == 2e-5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {other: {input: 1, output: 2}}", "no prices of m"),
        ("models: {m: {input: 1}}", "needs input and output"),
        ("models: {m: {input: cheap, output: 2}}", "input=cheap is no price"),
        ("models: {m: {input: -1, output: 2}}", "input=-1 is no price"),
        ("- [", "not a YAML file"),
    ],
)
def test_a_table_of_prices_that_says_nothing_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_prices(str(tmp_path / "prices.yaml"), "m")


# --- the command -----------------------------------------------------------------------------------------------------


def options(name: str) -> dict[str, str]:
    rows = (Path(__file__).parent.parent / "conf" / "engine" / f"{name}.yaml").read_text().splitlines()
    return dict(row.split(": ") for row in rows if ": " in row)


@pytest.mark.parametrize("name", ["dashscope", "vllm-server", "llama-server", "sglang"])
def test_every_preset_names_a_server_that_is_known(name: str) -> None:
    found = options(name)
    assert found["name"] == "openai"
    assert found["server"] in SERVERS


def test_the_model_of_a_server_is_the_one_it_has(tmp_path: Path, command: Command) -> None:
    with serving(lambda path, asked: completion(tops={"A": -0.1, "B": -2.0})) as api:
        api.models = [{"id": "Org/My-Model"}]
        code, _, error = command("engine=vllm-server", f"engine.base_url={api.url}", "task.texts_only=true")
        assert code == 0, error
        (run,) = (tmp_path / "runs" / "eval" / "toy").iterdir()
        assert run.name == "My-Model"
        assert {body["model"] for _, body in api.seen} == {"Org/My-Model"}
        api.models = [{"id": "one"}, {"id": "two"}]
        code, _, error = command("engine=vllm-server", f"engine.base_url={api.url}", "task.texts_only=true")
    assert code == 2
    assert "2 models are served; pass engine.api_model= one of one, two" in error


def test_failed_samples_are_counted_and_asked_again_by_the_same_command(tmp_path: Path, command: Command) -> None:
    too_long = ["toy/1问"]

    def script(path: str, asked: dict[str, Any]) -> Any:
        if any(name in asked["prompt"] for name in too_long):
            return Raw(b'{"error": {"message": "too long"}}', status=400)
        return completion("A")

    given = ("engine=vllm-server", "task.texts_only=true", "run_dir=r", "engine.api_model=m")
    with serving(script) as api:
        code, _, error = command(*given, f"engine.base_url={api.url}")
        assert code == 2
        assert "1 of 4 samples have no answer (toy/1: status 400: too long); the others are stored" in error
        assert error.count("\n") == 1
        before = len((tmp_path / "r" / "records.jsonl").read_text().splitlines())
        num_asked = len(api.seen)
        too_long.clear()
        code, _, error = command(*given, f"engine.base_url={api.url}")
        assert code == 0, error
        assert len(api.seen) == num_asked + 1
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["n"] == before + 1
    assert result["engine"]["usage"]["num_replies"] == 1
    assert math.isfinite(next(iter(result["metrics"].values()))["value"])
