"""CMMLU: 67 subjects in Chinese, averaged over subjects (https://arxiv.org/abs/2306.09212)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_eval.data.rows import TableRow
from qwen_eval.extraction.official_letters import official_ceval_letter
from qwen_eval.tasks.choice import LETTERS, ChoiceSpec, ChoiceTask
from qwen_eval.tasks.prompts import CHINESE_EXAM_BASE, CHINESE_EXAM_CHAT, option_letters

# fmt: off
CATEGORIES = {
    "stem": (
        "anatomy", "astronomy", "college_actuarial_science", "college_engineering_hydrology", "college_mathematics",
        "college_medical_statistics", "computer_science", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "genetics", "high_school_biology", "high_school_chemistry",
        "high_school_mathematics", "high_school_physics", "machine_learning", "virology",
    ),
    "humanities": (
        "arts", "chinese_history", "chinese_literature", "college_law", "global_facts", "international_law",
        "jurisprudence", "logical", "marxist_theory", "philosophy", "professional_law", "world_history",
        "world_religions",
    ),
    "social_science": (
        "ancient_chinese", "business_ethics", "chinese_civil_service_exam", "chinese_food_culture",
        "chinese_foreign_policy", "chinese_teacher_qualification", "college_education", "economics", "education",
        "elementary_chinese", "ethnology", "high_school_geography", "high_school_politics", "journalism",
        "management", "marketing", "modern_chinese", "professional_accounting", "professional_psychology",
        "public_relations", "security_study", "sociology",
    ),
    "other": (
        "agronomy", "chinese_driving_rule", "clinical_knowledge", "college_medicine", "computer_security",
        "construction_project_management", "elementary_commonsense", "elementary_information_and_technology",
        "food_science", "human_sexuality", "legal_and_moral_basis", "nutrition", "professional_medicine",
        "sports_science", "traditional_chinese_medicine",
    ),
    "china_specific": (  # also counted above
        "ancient_chinese", "chinese_civil_service_exam", "chinese_driving_rule", "chinese_food_culture",
        "chinese_foreign_policy", "chinese_history", "chinese_literature", "chinese_teacher_qualification",
        "construction_project_management", "elementary_chinese", "elementary_commonsense", "ethnology",
        "high_school_politics", "modern_chinese", "traditional_chinese_medicine",
    ),
}
# fmt: on


@dataclass(kw_only=True)
class CmmluSpec(ChoiceSpec):
    hub_id: str | None = "haonan-li/cmmlu"


class Cmmlu(ChoiceTask):
    """Qwen published no chat script for CMMLU; its chat form is that of C-Eval."""

    Spec = CmmluSpec
    bundled = "cmmlu"
    categories = CATEGORIES
    average = "macro"
    base_format = CHINESE_EXAM_BASE
    chat_template = CHINESE_EXAM_CHAT

    def candidates(self, subject: str, split: str) -> tuple[str, ...]:
        return f"{split}/{subject}.csv", f"data/{split}/{subject}.csv"

    def read(self, subject: str, split: str) -> list[TableRow]:
        rows = self.source.table(
            *self.candidates(subject, split),
            columns=("Question", *LETTERS, "Answer"),
            header=True,
            as_pandas=self.is_upstream,
        )
        return [TableRow(cells={_NAMES.get(k, k): v for k, v in row.cells.items()}, where=row.where) for row in rows]

    def official_letter(self, reply: str, row: Mapping[str, str]) -> str:
        return official_ceval_letter(reply, row["question"], [row[letter] for letter in option_letters(row)])


_NAMES = {"": "id", "Question": "question", "Answer": "answer"}
