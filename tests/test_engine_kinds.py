"""What an engine declares in its module is all that the rest of the package knows of it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import pytest

from qwen_eval.config import EngineSpec, EvalSpec, ModelSpec
from qwen_eval.core import ConfigError
from qwen_eval.engines import kind, open_engine
from qwen_eval.engines.fake import FakeEngine
from qwen_eval.engines.kinds import ENGINES, MODEL_OPTIONS, EngineKind, deciding_keys, kinds
from qwen_eval.engines.options import check_options
from qwen_eval.runs.evaluate import evaluate
from qwen_eval.runs.run import load_run
from qwen_eval.runs.stored import stored_config
from qwen_eval.tasks.gsm8k import Gsm8kSpec as Spec

LOADED = "import sys, qwen_eval.engines.kinds as k; k.kinds(); print(*(set(sys.modules) & {'torch', 'transformers'}))"


@dataclass(kw_only=True)
class EchoSpec(EngineSpec):
    voice: str = "low"


def open_echo(spec: EchoSpec, model: ModelSpec, *, protocol: str) -> FakeEngine:
    return FakeEngine(spec.voice)


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> EngineKind:
    """A stub engine in a module of its own, as the documentation says to add one."""
    module = ModuleType("echo_engine")
    declared = EngineKind(
        name="echo", opens="echo_engine:open_echo", honours=("dtype",), tuned_by=("voice",), decides=("voice",),
        model_at="server", identity="echo_engine:identity", spec=EchoSpec,
    )  # fmt: skip
    vars(module).update(ENGINE=declared, open_echo=open_echo, identity=lambda engine, model: f"echo of {model.name}")
    monkeypatch.setitem(sys.modules, "echo_engine", module)
    monkeypatch.setitem(ENGINES, "echo", "echo_engine")
    return declared


@pytest.mark.parametrize("name", ENGINES)
def test_every_declared_key_is_a_key_of_the_schema(name: str) -> None:
    declared = kind(name)
    assert set(declared.honours) <= set(MODEL_OPTIONS)
    assert {*declared.tuned_by, *declared.decides} <= {item.name for item in fields(declared.spec)}
    assert set(declared.decides) <= set(declared.tuned_by)


def test_every_key_of_an_engine_has_an_effect_somewhere() -> None:
    keys = {item.name for item in fields(EngineSpec)} - {"name"}
    assert keys == {key for declared in kinds() for key in declared.tuned_by}


def test_the_declarations_load_no_model_library() -> None:
    found = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_an_unknown_engine_is_a_mistake_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r'engine\.name=nativ: unknown; did you mean "native"\?'):
        open_engine(EngineSpec(name="nativ"), ModelSpec(name="m"))


def test_hidden_states_are_refused_where_no_engine_keeps_them() -> None:
    assert check_options(EngineSpec(name="native"), ModelSpec(name="m"), keep_hidden=True) == []
    with pytest.raises(ConfigError, match="keep_hidden=true has no effect in engine=hf; use engine=native"):
        check_options(EngineSpec(name="hf"), ModelSpec(name="m"), keep_hidden=True)


def test_a_model_option_that_an_engine_does_not_name_is_refused(echo: EngineKind) -> None:
    assert check_options(EchoSpec(name="echo"), ModelSpec(name="m", dtype="bf16")) == []
    with pytest.raises(ConfigError, match=r"model\.logn=true has no effect in engine=echo; use engine=native"):
        check_options(EchoSpec(name="echo"), ModelSpec(name="m", logn="true"))


def test_an_engine_of_its_own_module_runs_with_its_own_keys_and_is_read_back(echo: EngineKind, tmp_path: Path) -> None:
    engine = EchoSpec(name="echo", voice="high", concurrency=2)
    task = Spec(data="bundled", limit=2)
    spec = EvalSpec(task=task, model=ModelSpec(name="m"), engine=engine, run_dir=str(tmp_path / "run"))
    outcome = evaluate(spec, lambda spec: open_engine(spec.engine, spec.model))
    assert outcome.warnings[0] == "engine.concurrency=2 has no effect in engine=echo"
    stored = load_run(outcome.path).spec
    assert stored["decides"]["engine"] == {"name": "echo", "api_model": None, "fake_reply": "", "voice": "high"}
    assert stored_config(stored).engine == engine
    assert "voice" in deciding_keys()
