"""MMLU: 57 subjects in English, averaged over questions (https://arxiv.org/abs/2009.03300)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from qwen_eval.core import DataError
from qwen_eval.data.rows import Source, TableRow, printed_by_pandas
from qwen_eval.extraction.official_letters import official_mmlu_letter
from qwen_eval.tasks.choice import LETTERS, ChoiceSpec, ChoiceTask
from qwen_eval.tasks.prompts import MMLU_BASE, MMLU_CHAT, option_letters

COLUMNS = ("question", *LETTERS, "answer")

# The authors' categories, but for anatomy, which Qwen's scripts count as STEM.
# fmt: off
CATEGORIES = {
    "stem": (
        "abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry",
        "college_computer_science", "college_mathematics", "college_physics", "computer_security",
        "conceptual_physics", "electrical_engineering", "elementary_mathematics", "high_school_biology",
        "high_school_chemistry", "high_school_computer_science", "high_school_mathematics", "high_school_physics",
        "high_school_statistics", "machine_learning",
    ),
    "humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios",
        "philosophy", "prehistory", "professional_law", "world_religions",
    ),
    "social_science": (
        "econometrics", "high_school_geography", "high_school_government_and_politics",
        "high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology", "human_sexuality",
        "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy",
    ),
    "other": (
        "business_ethics", "college_medicine", "human_aging", "management", "marketing", "medical_genetics",
        "miscellaneous", "nutrition", "professional_accounting", "professional_medicine", "virology",
        "global_facts", "clinical_knowledge",
    ),
}
# fmt: on


@dataclass(kw_only=True)
class MmluSpec(ChoiceSpec):
    hub_id: str | None = "cais/mmlu"


class Mmlu(ChoiceTask):
    Spec = MmluSpec
    bundled = "mmlu"
    categories = CATEGORIES
    average = "micro"
    base_format = MMLU_BASE
    chat_template = MMLU_CHAT
    letter_prefix = " "
    max_prompt_tokens = 2047  # the official script keeps the last 2047 tokens of longer prompts

    def candidates(self, subject: str, split: str) -> tuple[str, ...]:
        return f"{split}/{subject}_{split}.csv", f"data/{split}/{subject}_{split}.csv"

    def read(self, subject: str, split: str) -> list[TableRow]:
        if self.source.is_hub:
            return self._hub_rows(self.source, subject, split)
        return self.source.table(
            *self.candidates(subject, split), columns=COLUMNS, header=False, as_pandas=self.is_upstream
        )

    def _hub_rows(self, source: Source, subject: str, split: str) -> list[TableRow]:
        cells = []
        for i, row in enumerate(source.hub_rows(subject, split)):
            try:
                cells.append(_official_cells(row))
            except (KeyError, TypeError, IndexError, ValueError):
                raise DataError(f"{source.origin} {subject}/{split} row {i + 1}: not a row of MMLU") from None
        if self.is_upstream:
            cells = printed_by_pandas(cells, COLUMNS)
        return [TableRow(cells=c, where=f"{subject}/{split} row {i + 1}") for i, c in enumerate(cells)]

    def official_letter(self, reply: str, row: Mapping[str, str]) -> str:
        return official_mmlu_letter(reply, [row[letter] for letter in option_letters(row)])


def _official_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """The hub keeps the options as a list and the answer as its index."""
    options = dict(zip(ascii_uppercase, row["choices"]))
    return {"question": row["question"], **options, "answer": list(options)[row["answer"]]}
