"""Ours beside what was published for Qwen v1, with every difference of protocol that can be told from both.

Where the protocol was never published, that is said as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_eval.core import JSON, Metric
from qwen_eval.profile.finetune import METHOD_NAMES
from qwen_eval.profile.measure import median
from qwen_eval.report.ledger import Published, ledger, sources_of
from qwen_eval.report.runs import ProfileCell, RunSet, device_name, profile_cells, speeds_of
from qwen_eval.report.settings import run_names, settings, with_runs
from qwen_eval.runs.fields import section
from qwen_eval.runs.run import Run
from qwen_eval.tables import Cell, Table, metric_cell, number_cell, text_cell

BENCHMARKS = {
    "mmlu": "MMLU", "ceval": "C-Eval", "cmmlu": "CMMLU", "gsm8k": "GSM8K", "math": "MATH", "humaneval": "HumanEval",
    "mbpp": "MBPP", "bbh": "BBH", "vcsum": "VCSUM", "leval": "L-Eval",
    "wmt22": "WMT22", "plugin": "tool_use", "plugin_template": "tool_use", "code_interpreter": "code_interpreter",
    "hf_agent": "hf_agent", "hf_agent_chat": "hf_agent",
}  # fmt: skip
AGENTS = ("tool_use", "code_interpreter", "hf_agent")  # several published metrics of one run, each by its own name
AGENT_METRICS = {
    "tool_selection_acc": "tool_selection",
    "tool_input_rougeL": "tool_input_rouge_l",
}  # where ours differs
HEADLINES = ("accuracy", "avg", "pass@1", "average", "Rouge-L", "BLEU avg")
OUR_NAMES = {  # of the metrics that are no headline
    "BLEU zh-en": "bleu/zh-en", "BLEU en-zh": "bleu/en-zh", "TOEFL": "accuracy/tpo", "QuALITY": "accuracy/quality",
    "Coursera": "accuracy/coursera", "GSM": "accuracy/gsm100", "SFiction": "accuracy/sci_fi",
}  # fmt: skip
CATEGORY_METRICS = ("STEM", "Social Sciences", "Humanities", "Others", "avg_hard")
UNPUBLISHED = {
    "MATH": "the published script is not public", "MBPP": "the published script is not public",
    "BBH": "the published script is not public", "CMMLU": "", "VCSUM": "published truncation and prompt are not public",
    "L-Eval": "published truncation and prompt are not public", "arXiv": "the published documents are not public",
    "tool_use": "the published rows are not public",
    "WMT22": "that Chinese was cut by jieba is inferred from the harness, not published",
}  # fmt: skip
PRECISIONS = ("BF16", "FP16", "FP32", "AUTO")


def published_tables(runs: RunSet) -> list[Table]:
    """Every number of ours that has a published counterpart, and what differs between the two."""
    found = [(run, row) for run in runs.finished for row in _quality_rows(run)]
    found += [(run, row) for run in runs.profiles for row in (*_speed_rows(run), *_finetune_rows(run))]
    members = list({id(run): run for run, _ in found}.values())
    places = run_names([(f"{run.label} {run.variant} {run.task}", [run]) for run in members])
    place_of = {} if places is None else {run.path: place for run, place in zip(members, places)}
    columns = ("model", "precision", "benchmark", "ours", "published", "Δ", "in our interval", "what differs", "source")
    notes: tuple[str, ...] = (
        "Δ is ours minus published, in the unit shown (points for shares, ratio for speed and memory).",
        "in our interval: the published value, give or take its last printed digit, lies in our 95 % interval.",
    )
    if not found:
        notes = ("None of these runs is of a model, precision and benchmark that the ledger knows.",)
    table = Table(
        name="published", title="Ours beside published", columns=columns, rows=tuple(row for _, row in found),
        notes=notes, optional=("source", "in our interval", "what differs"), num_keys=3,
    )  # fmt: skip
    return [with_runs(table, [place_of[run.path] for run, _ in found] if place_of else None, at=2)]


def counterparts(run: Run) -> list[tuple[str, Metric, Published]]:
    """(name of our metric, our metric, published number), closest protocol first."""
    found: list[tuple[str, Metric, Published]] = []
    for row in ledger():
        if row.value is None or not _same_model(run, row):
            continue
        ours = _our_metric(run, row)
        if ours is not None:
            found.append((ours[0], ours[1], row))
    return sorted(found, key=lambda item: (item[0], len(differences(run, item[2])), -len(item[2].sources)))


def differences(run: Run, row: Published) -> list[str]:
    """What is known to differ between how we and they measured."""
    found = []
    facets = settings(run)
    shots = row.setting.get("shots")
    if shots is not None and facets.get("shots") not in (None, shots):
        found.append(f"shots: ours {facets['shots']}, published {shots}")
    if row.split is not None and facets.get("split") and not str(row.split).startswith(str(facets.get("split"))):
        found.append(f"split: ours {facets['split']}, published {row.split}")
    if run.status == "partial":
        found.append(f"ours is {run.status_note}")
    if facets.get("protocol") == "robust" and row.benchmark != "arXiv":
        found.append("ours reads answers with protocol=robust")
    if row.variant == "BF16" and not run.variant.startswith("BF16"):
        found.append(f"precision: ours {run.variant}, published BF16")
    if run.task == "plugin_template":
        found.append("ours through the tool template, published in ReAct form")
    if row.metric == "math_executable_rate":
        found.append("published over questions of its own; ours over GSM8K where those are not given")
    if UNPUBLISHED.get(row.benchmark):
        found.append(UNPUBLISHED[row.benchmark])
    if (row.benchmark, row.metric) == ("L-Eval", "average"):
        found.append("ours is the mean of 5 exams, published of 6 with CodeU")
    if not row.checked:
        found.append("published value typed in, not machine-checked")
    return found


def _quality_rows(run: Run) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for name, metric, row in counterparts(run):
        scale = 100.0 if metric.kind == "share" else 1.0
        assert row.value is not None
        delta = metric.value * scale - row.value
        inside = _inside(metric, row.value / scale, row.resolution / scale)
        differing = differences(run, row)
        rows.append((
            text_cell(run.label), text_cell(run.variant), text_cell(_what(row, name)), metric_cell(metric),
            Cell(text=row.text or str(row.value), value=row.value), Cell(text=f"{delta:+.1f}", value=delta),
            text_cell(inside, tone={"yes": "good", "no": "bad"}.get(inside, "")),
            text_cell("; ".join(differing) or "nothing known"), text_cell(sources_of(row)),
        ))  # fmt: skip
    return rows


def _speed_rows(run: Run) -> list[tuple[Cell, ...]]:
    """Speed and peak memory of cells of a published shape: generated from one token, or encoded; batch and cache."""
    rows: list[tuple[Cell, ...]] = []
    for cell in profile_cells(run):
        speeds = sorted(speeds_of(cell))
        ours = {"speed": speeds[len(speeds) // 2] if speeds else None, "memory": _gib(cell.get("peak_bytes"))}
        for row in ledger():
            value = ours.get(row.benchmark)
            if value is None or not row.value or not _same_model(run, row) or not _same_shape(cell, row):
                continue
            differing = "; ".join(_speed_differences(run, row))
            rows.append((
                text_cell(run.label), text_cell(run.variant), text_cell(_what(row, row.metric)), number_cell(value, 2),
                Cell(text=row.text or str(row.value), value=row.value),
                Cell(text=f"{value / row.value:.2f} ×", value=value / row.value), text_cell(None),
                text_cell(differing), text_cell(sources_of(row)),
            ))  # fmt: skip
    return rows


def _finetune_rows(run: Run) -> list[tuple[Cell, ...]]:
    """Memory and seconds of a step of the same method and length on one GPU."""
    rows: list[tuple[Cell, ...]] = []
    for cell in profile_cells(run):
        steps = sorted(float(step) for step in cell.get("step_s") or ())
        ours = {"seconds_per_iter": median(steps), "gpu_memory": _gib(cell.get("peak_bytes"))}
        for row in ledger():
            value = ours.get(row.metric)
            if row.benchmark != "finetune" or value is None or not row.value or not _same_tuning(run, cell, row):
                continue
            differing = [f"device: ours {device_name(run)}, published {row.setting.get('gpu')}"]
            differing += ["ours NF4, published GPTQ Int4"] if row.variant == "Q-LoRA" else []
            differing += ["ours of random weights"] if run.engine_info.get("is_random") else []
            what = f"{'seconds a step' if row.unit == 's/it' else 'memory'} ({row.variant}, {cell['seq']} tokens)"
            rows.append((
                text_cell(run.label), text_cell(run.variant), text_cell(what), number_cell(value, 2),
                Cell(text=row.text or str(row.value), value=row.value),
                Cell(text=f"{value / row.value:.2f} ×", value=value / row.value), text_cell(None),
                text_cell("; ".join(differing)), text_cell(sources_of(row)),
            ))  # fmt: skip
    return rows


def _same_tuning(run: Run, cell: ProfileCell, row: Published) -> bool:
    single = row.setting.get("nodes") == row.setting.get("gpus_per_node") == 1
    step = row.setting.get("seq_len"), row.setting.get("grad_accum")
    same_step = step == (cell.get("seq"), cell.get("accumulation"))
    model = _squeezed(run.model).replace("chat", "")  # the table names sizes: adapters were put on chat models
    is_method = METHOD_NAMES.get(str(cell.get("method"))) == row.variant
    return single and same_step and is_method and model == _squeezed(row.model)


def _same_model(run: Run, row: Published) -> bool:
    if _squeezed(run.model) not in (_squeezed(row.model), _squeezed(f"{row.model}-{row.variant or ''}")):
        return False
    if row.benchmark == "arXiv":
        return True  # its variants are the long-context switches
    precision = run.variant.partition(",")[0]
    if row.variant is None:
        return precision in PRECISIONS
    is_bnb = row.variant == "Int8" and row.setting.get("backend") == "bitsandbytes"
    return precision == ("LLM.int8" if is_bnb else row.variant) or (row.variant == "BF16" and precision in PRECISIONS)


def _our_metric(run: Run, row: Published) -> tuple[str, Metric] | None:
    if row.benchmark == "arXiv":
        return _our_perplexity(run, row)
    if BENCHMARKS.get(run.task) != row.benchmark or run.headline is None:
        return None
    if row.benchmark in AGENTS:
        return _agent_metric(run, row)
    if row.metric in HEADLINES:
        return None if run.headline[1].kind == "count" else run.headline  # a split without answers was only answered
    if (named := OUR_NAMES.get(row.metric)) in run.metrics:
        return str(named), run.metrics[str(named)]
    if row.metric not in CATEGORY_METRICS:
        return None
    wanted = _squeezed(row.metric.removeprefix("avg_")).rstrip("s")
    for name, metric in run.metrics.items():
        if "/" in name and _squeezed(name.rpartition("/")[2]).rstrip("s") == wanted:
            return name, metric
    return None


def _agent_metric(run: Run, row: Published) -> tuple[str, Metric] | None:
    """The metric of the same meaning, in the same mode."""
    if row.benchmark == "hf_agent" and (row.setting.get("mode") == "chat") != (run.task == "hf_agent_chat"):
        return None
    name = AGENT_METRICS.get(row.metric, row.metric)
    return (name, run.metrics[name]) if name in run.metrics else None


def _our_perplexity(run: Run, row: Published) -> tuple[str, Metric] | None:
    switches = section(run.model_spec.get("rope")).get("dynamic_ntk"), run.model_spec.get("logn")
    wanted = row.setting.get("dynamic_ntk"), row.setting.get("logn")
    if [str(x).lower() for x in switches] != [str(x).lower() for x in wanted]:
        return None
    if (str(run.model_spec.get("window") or "none") != "none") != bool(row.setting.get("window_attn")):
        return None
    for stem in ("ppl", "perplexity"):
        name = f"{stem}/{row.setting.get('seq_len')}"
        if name in run.metrics:
            return name, run.metrics[name]
    return None


def _speed_differences(run: Run, row: Published) -> list[str]:
    """The device always, then how it was measured."""
    found = [f"device: ours {device_name(run)}, published {row.setting.get('gpu', 'A100-SXM4-80G')}"]
    if run.config.get("method") == "measured":
        found.append("ours greedy after a warm-up, published sampled without")
    if run.engine_info.get("is_random") or run.model_spec.get("weights") == "random":
        found.append("ours of random weights")
    flash = row.setting.get("flash_attn")
    if flash is not None:
        found.append(f"published with flash attention {flash}" if flash else "published without flash attention")
    return found


def _same_shape(cell: Mapping[str, Any], row: Published) -> bool:
    said = row.setting
    tokens = said.get("gen_tokens") or said.get("tokens")
    is_encoding = str(said.get("mode", "")).startswith("encode")
    shape = (tokens, 1) if is_encoding else (said.get("context_tokens", 1), tokens)
    ours = (cell.get("prompt_tokens") or 1, cell.get("new_tokens"))
    is_same_cache = bool(said.get("kv_cache_int8")) == (cell.get("kv_cache") == "int8")
    return ours == shape and (cell.get("batch") or 1) == said.get("batch_size", 1) and is_same_cache


def _inside(metric: Metric, value: float, resolution: float) -> str:
    if metric.low is None or metric.high is None:
        return "no interval"
    return "yes" if metric.low - resolution <= value <= metric.high + resolution else "no"


def _what(row: Published, ours: str) -> str:
    setting = [f"{row.setting['shots']}-shot" if row.setting.get("shots") is not None else "", row.split or ""]
    setting += [f"{row.setting[key]} tokens" for key in ("seq_len", "gen_tokens", "tokens") if key in row.setting]
    setting += [f"batch {row.setting['batch_size']}"] if "batch_size" in row.setting else []
    setting += ["int8 cache"] if row.setting.get("kv_cache_int8") else []
    setting += [
        str(row.setting[key]) for key in ("dataset_version", "mode") if row.benchmark in AGENTS and key in row.setting
    ]
    setting += ["encoding"] if str(row.setting.get("mode", "")).startswith("encode") else []
    metric = "" if row.metric in HEADLINES or row.benchmark == "arXiv" else f" {row.metric}"
    listed = ", ".join(part for part in setting if part)
    return f"{row.benchmark}{metric}" + (f" ({listed})" if listed else "")


def _squeezed(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum() or c == ".")


def _gib(value: JSON) -> float | None:
    return float(value) / 2**30 if isinstance(value, (int, float)) else None
