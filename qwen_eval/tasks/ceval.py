"""C-Eval: 52 subjects in Chinese, averaged over subjects (https://arxiv.org/abs/2305.08322).

Scored on val. The test split has no answers: its run leaves `submission.json`, which the authors' server takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qwen_eval.core import JSON, Record
from qwen_eval.data.rows import TableRow
from qwen_eval.extraction.official_letters import official_ceval_letter
from qwen_eval.tasks.choice import LETTERS, ChoiceSpec, ChoiceTask
from qwen_eval.tasks.prompts import CHINESE_EXAM_BASE, CHINESE_EXAM_CHAT, option_letters

COLUMNS = ("id", "question", *LETTERS)

# fmt: off
CATEGORIES = {
    "stem": (
        "computer_network", "operating_system", "computer_architecture", "college_programming", "college_physics",
        "college_chemistry", "advanced_mathematics", "probability_and_statistics", "discrete_mathematics",
        "electrical_engineer", "metrology_engineer", "high_school_mathematics", "high_school_physics",
        "high_school_chemistry", "high_school_biology", "middle_school_mathematics", "middle_school_biology",
        "middle_school_physics", "middle_school_chemistry", "veterinary_medicine",
    ),
    "social_science": (
        "college_economics", "business_administration", "marxism", "mao_zedong_thought", "education_science",
        "teacher_qualification", "high_school_politics", "high_school_geography", "middle_school_politics",
        "middle_school_geography",
    ),
    "humanities": (
        "modern_chinese_history", "ideological_and_moral_cultivation", "logic", "law",
        "chinese_language_and_literature", "art_studies", "professional_tour_guide", "legal_professional",
        "high_school_chinese", "high_school_history", "middle_school_history",
    ),
    "other": (
        "civil_servant", "sports_science", "plant_protection", "basic_medicine", "clinical_medicine",
        "urban_and_rural_planner", "accountant", "fire_engineer", "environmental_impact_assessment_engineer",
        "tax_accountant", "physician",
    ),
    "hard": (  # also counted above
        "advanced_mathematics", "discrete_mathematics", "probability_and_statistics", "college_physics",
        "college_chemistry", "high_school_mathematics", "high_school_physics", "high_school_chemistry",
    ),
}
# fmt: on


@dataclass(kw_only=True)
class CevalSpec(ChoiceSpec):
    hub_id: str | None = "ceval/ceval-exam"
    split: str = "val"


class Ceval(ChoiceTask):
    Spec = CevalSpec
    splits = ("val", "test")
    bundled = "ceval"
    categories = CATEGORIES
    average = "macro"
    base_format = CHINESE_EXAM_BASE
    chat_template = CHINESE_EXAM_CHAT

    def candidates(self, subject: str, split: str) -> tuple[str, ...]:
        name = f"{split}/{subject}_{split}.csv"
        return name, f"data/{name}", f"ceval-exam/{name}", f"formal_ceval/{name}"

    def read(self, subject: str, split: str) -> list[TableRow]:
        needs = COLUMNS if split == "test" else (*COLUMNS, "answer")
        return self.source.table(
            *self.candidates(subject, split), columns=needs, header=True, as_pandas=self.is_upstream
        )

    def official_letter(self, reply: str, row: Mapping[str, str]) -> str:
        return official_ceval_letter(reply, row["question"], [row[letter] for letter in option_letters(row)])

    def artifacts(self, records: Iterable[Record]) -> dict[str, JSON]:
        """File name -> content to be written beside the result: the submission of a split without answers, else none.

        `{subject: {id: letter}}`; "" where no letter could be read.
        """
        submission: dict[str, dict[str, str]] = {}
        for record in records:
            if record.target is None:
                number = str(record.grade.values["id"])
                submission.setdefault(record.group, {})[number] = str(self.chosen(record.grade) or "")
        return {"submission.json": submission} if submission else {}
