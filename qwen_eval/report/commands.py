"""The ledger as one table: every published number with the command that measures its cell here."""

from __future__ import annotations

from qwen_eval.profile.finetune import METHOD_NAMES
from qwen_eval.report.ledger import Published, ledger, sources
from qwen_eval.report.published import BENCHMARKS
from qwen_eval.tables import Cell, Table, text_cell

EVAL, PROFILE = "python -m qwen_eval", "python -m qwen_eval.profile"
SHOTS_ARE_SET = ("mmlu", "ceval", "cmmlu", "gsm8k")  # of the others the official number is the only one
AGENT_TASKS = {"tool_use": "plugin", "code_interpreter": "code_interpreter", "hf_agent": "hf_agent"}
TRICKS = {
    "none": "plain", "+ dynamic_ntk": "ntk", "+ dynamic_ntk + logn": "ntk_logn",
    "+ dynamic_ntk + logn + window_attn": "ntk_logn_window",
}  # fmt: skip


def ledger_rows() -> list[Table]:
    """The whole ledger as one table."""
    columns = (
        *("table", "model", "variant", "benchmark", "metric", "setting"),
        *("printed", "unit", "source", "checked", "command"),
    )
    rows = tuple(
        (
            text_cell(r.table), text_cell(r.model), text_cell(r.variant), text_cell(r.benchmark), text_cell(r.metric),
            text_cell(", ".join(f"{k}={v}" for k, v in r.setting.items())), Cell(text=r.text or "–", value=r.value),
            text_cell(r.unit), text_cell("; ".join(r.sources)), text_cell("yes" if r.checked else "no"),
            text_cell(command(r)),
        )
        for r in ledger()
    )  # fmt: skip
    notes = tuple(f"{key}: {title}" for key, title in sources().items())
    notes += ("command: what measures this cell here; cells of models and benchmarks that are not ours have none.",)
    return [Table(name="ledger", title="Published numbers", columns=columns, rows=rows, notes=notes)]


def command(row: Published) -> str | None:
    """The command that measures a published cell; None where this program has none."""
    model = _our_model(row)
    if model is None:
        return None
    if row.benchmark in AGENT_TASKS:
        task = "hf_agent_chat" if row.setting.get("mode") == "chat" else AGENT_TASKS[row.benchmark]
        return f"{EVAL} task={task} model={model}"
    if row.benchmark == "finetune":
        return _finetune_command(row, model)
    return _profile_command(row, model) or _long_command(row, model) or _task_command(row, model)


def _finetune_command(row: Published, model: str) -> str | None:
    """One GPU is measured; several are planned."""
    method = next((method for method, name in METHOD_NAMES.items() if (row.variant or "").startswith(name)), None)
    if row.variant == "LoRA (emb)":
        method = "lora_emb"
    words = [PROFILE, "mode=finetune", f"method={method}", f"seq={row.setting['seq_len']}", f"model={model}"]
    gpus = row.setting["nodes"] * row.setting["gpus_per_node"]
    return " ".join([*words, *(["plan=true", f"gpus={gpus}", "sharding=zero3"] if gpus > 1 else [])])


def _our_model(row: Published) -> str | None:
    """`"Qwen-7B-Chat", "Int4"` -> `"qwen-7b-chat-int4"`; None for other people's models and for pre-releases."""
    name = row.model.lower().replace(" (original)", "-original")
    if not name.startswith("qwen-") or "(" in name:
        return None
    is_packed = row.variant in ("Int4", "Int8") and "-chat" in name
    return f"{name}-{str(row.variant).lower()}" if is_packed else name


def _task_command(row: Published, model: str) -> str | None:
    task = {benchmark: name for name, benchmark in BENCHMARKS.items()}.get(row.benchmark)
    if task is None or row.metric in ("CodeU", "input_length"):
        return None
    if row.table == "base_quantization_bnb":
        return f"{EVAL} +experiment=bnb_table model={model}"
    words = [f"task={task}", f"model={model}"]
    words += ["model.dtype=fp32"] if row.variant == "FP32" else []
    words += ["task.split=test"] if row.split == "test" and task == "ceval" else []
    shots = row.setting.get("shots")
    if shots is not None and task in SHOTS_ARE_SET and shots != _official_shots(task, model):
        words.append(f"task.shots={shots}")
    return " ".join([EVAL, *words])


def _long_command(row: Published, model: str) -> str | None:
    """Perplexity with the tricks of the row, and the needle."""
    if row.benchmark == "needle":
        return f"{EVAL} task=needle model={model} task.lengths=4000,8000,12000,16000,20000,24000,28000,32000"
    tricks = TRICKS.get(row.variant or "")
    if row.benchmark != "arXiv" or tricks is None:
        return None
    return f"{EVAL} task=long_ppl +tricks={tricks} model={model} task.lengths={row.setting['seq_len']} task.path=TEXTS"


def _official_shots(task: str, model: str) -> int:
    return 0 if "-chat" in model else {"gsm8k": 8}.get(task, 5)


def _profile_command(row: Published, model: str) -> str | None:
    if row.benchmark not in ("memory", "speed"):
        return None
    if row.table == "base_quantization_bnb":
        quant = {"Int8": "int8", "NF4": "nf4"}.get(row.variant or "", "none")
        return f"{PROFILE} model={model} model.quant={quant} seq=2048"
    tables = {"kv_cache_memory_batch": "kv_batch", "kv_cache_memory_seqlen": "kv_length"}
    return f"{PROFILE} profile={tables.get(row.table, 'readme')} model={model}"
