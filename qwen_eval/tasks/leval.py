"""L-Eval, its closed-ended exams: questions on long documents (https://arxiv.org/abs/2307.11088).

TOEFL, QuALITY, Coursera, GSM100 and SFiction; the average is over these five (the published ones are over six: codeU
is not among them here). All questions of one document share its text as a prefix, so it is read once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_eval.config import TaskSpec
from qwen_eval.core import (
    JSON,
    ConfigError,
    DataError,
    Generate,
    Grade,
    Metric,
    Prompt,
    Record,
    Request,
    Sample,
    Tokenizer,
    Turn,
)
from qwen_eval.data.rows import Source
from qwen_eval.extraction import leval as reading
from qwen_eval.extraction.letters import concluded_letter
from qwen_eval.extraction.numbers import concluded_number
from qwen_eval.extraction.symptoms import answer_part, completions_of, flags
from qwen_eval.metrics import macro, share
from qwen_eval.tasks.generation import GenerativeTask
from qwen_eval.tasks.registry import TaskContext

EXAMS = ("tpo", "quality", "coursera", "gsm100", "sci_fi")
ONE_LETTER, SEVERAL_LETTERS = ("tpo", "quality"), ("coursera",)

_DOCUMENT = "Now you are given a very long document. Please follow the instruction based on this document. "
_ONE = (
    _DOCUMENT + "For multi-choice questions, there is only a sinlge correct option. Please only provide the letter "
    "corresponding to the answer (like A or B) when answering. For other questions, please directly give the concise "
    "and accurate answer. "
)
INTRODUCTIONS = {  # with their slips, as they are part of the protocol
    "tpo": _ONE,
    "quality": _ONE,
    "coursera": _DOCUMENT + "For multi-choice questions, there could be a sinlge correct option or multiple correct "
    "options. Please only provide the letter corresponding to the answer (like A or AB) when answering. ",
    "gsm100": "Given several question answer pairs, you need to follow a similar format to answer the last question. "
    "Make sure the response is end with The answer is _ . ",
    "sci_fi": "Now you are given a scientific fiction. I will ask you some questions and the answer should be "
    '"True" or "False". Notice that you should answer the question based on the evidence in the document instead of '
    "your background knowledge.",
}
BY_DOCUMENT = "based on the world described in the document."
BY_FACTS = "based on the real-world knowledge and facts up until your last training"
STEP_WORDS = 250  # by which the official loop shortens a document that is still too long


@dataclass(kw_only=True)
class LevalSpec(TaskSpec):
    name: str = "leval"
    hub_id: str | None = "L4NLP/LEval"
    split: str = "test"
    max_new_tokens: int = 512
    max_prompt_tokens: int | None = None  # longer documents lose their end; null: what the checkpoint states


class Leval(GenerativeTask[LevalSpec]):
    Spec = LevalSpec
    version = 1

    def __init__(self, spec: LevalSpec, context: TaskContext):
        super().__init__(spec, context)
        if spec.shots:
            raise ConfigError(f"task.shots={spec.shots}: leval is asked without examples")
        if spec.max_prompt_tokens is not None and spec.max_prompt_tokens < 1:
            raise ConfigError(f"task.max_prompt_tokens={spec.max_prompt_tokens}: at least 1, or null")
        self.limit = context.prompt_limit(spec.max_prompt_tokens, self.reply_tokens)
        self._num_cut = 0
        self._exams: tuple[str, ...] = ()

    # --- rows ---

    def rows(self, source: Source) -> list[Sample]:
        samples = []
        for exam in EXAMS:
            for i, row in enumerate(_read(source, exam, self.spec.split)):
                samples += self._document(exam, i, row, f"{source.origin} {exam} row {i + 1}")
        self._exams = tuple(dict.fromkeys(sample.group for sample in samples))
        if not samples:
            raise DataError(f"{source.origin}: none of {', '.join(EXAMS)} there; {source.how}")
        return samples

    def _document(self, exam: str, i: int, row: Mapping[str, Any], where: str) -> list[Sample]:
        """The questions of one document. The document is cut once, so that they share all of it."""
        questions, golds = row.get("instructions"), row.get("outputs")
        if not (isinstance(questions, list) and isinstance(golds, list) and isinstance(row.get("input"), str)):
            raise DataError(f"{where}: needs instructions, outputs and input, as L-Eval has them")
        if len(questions) != len(golds):
            raise DataError(f"{where}: {len(questions)} instructions, {len(golds)} outputs")
        document = self._fitting(exam, row["input"], questions)
        return [
            Sample(
                id=f"{exam}/{i}/{k}", group=exam, cluster="" if exam == "gsm100" else f"{exam}/{i}",
                data={"document": document, "question": question}, target=_target(exam, gold, f"{where}, output {k}"),
            )
            for k, (question, gold) in enumerate(zip(questions, golds))
        ]  # fmt: skip

    def _fitting(self, exam: str, document: str, questions: Sequence[str]) -> str:
        tokenizer = self.context.tokenizer
        if tokenizer is None or self.limit is None:
            return document
        frame = max(len(tokenizer.render(self._asked(exam, "", question))) for question in questions)
        if frame >= self.limit:
            raise ConfigError(f"leval: a question of {exam} alone takes {frame} tokens, {self.limit} are allowed")
        kept = cut_from_right(document, tokenizer, self.limit - frame)
        self._num_cut += kept != document
        return kept

    # --- asking ---

    def _asked(self, exam: str, document: str, question: str) -> Prompt:
        introduction = INTRODUCTIONS[exam]
        if exam == "gsm100":
            text = f"{document}\n\n{question}"
        else:
            text = f"Document is as follows. {document} \nQuestion: {question}  \nAnswer:"
        return Prompt.user(text, system=introduction) if self.is_chat else Prompt.raw(introduction + text)

    def prompt(self, sample: Sample) -> Prompt:
        return self._asked(sample.group, sample.data["document"], sample.data["question"])

    def request(self, sample: Sample, turns: Sequence[Turn]) -> Request | None:
        """SFiction asks a second time, without the document: what holds in the real world?"""
        if len(turns) != 1 or sample.group != "sci_fi":
            return super().request(sample, turns)
        text = sample.data["question"].replace(BY_DOCUMENT, BY_FACTS) + "\nAnswer:"
        return Generate(
            prompt=Prompt.user(text) if self.is_chat else Prompt.raw(text),
            max_new_tokens=self.reply_tokens,
            stop=() if self.is_chat or self.is_upstream else self.stops(),
            sampling=self.context.sampling(self.spec),
        )

    def stops(self) -> tuple[str, ...]:
        return ("\nQuestion:", "\nDocument is as follows.")

    # --- grading ---

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        completions = [completions_of(turn)[0] for turn in turns]
        replies = [completion.text for completion in completions]
        read, robust = _read_robustly(sample, replies)
        read_upstream, upstream = _read_officially(sample, replies)
        symptoms = [flags(completion, has_answer=bool(read)) for completion in completions]
        return Grade(
            score=robust,
            extracted=read,
            extracted_upstream=read_upstream,
            score_upstream=upstream,
            flags=tuple(dict.fromkeys(flag for found in symptoms for flag in found)),
        )

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        """The mean over exams, each counting the same; then each exam. Documents are the draws."""
        rows = list(records)
        metrics = {"accuracy": _average(rows, is_upstream=False)}
        if not self.is_upstream:
            metrics["accuracy_upstream"] = _average(rows, is_upstream=True)
        for exam, part in _by_exam(rows).items():
            metrics[f"accuracy/{exam}"] = share([row.grade.score for row in part], _clusters(part))
        return metrics

    @property
    def notes(self) -> list[str]:
        found = [f"the average is over {len(self._exams)} exams ({', '.join(self._exams)}); published ones are over 6"]
        if self._num_cut:
            found.append(f"{self._num_cut} documents lost their end to fit {self.limit} tokens")
        if self.limit is None or self.context.tokenizer is None:
            found.append("no length is known of this model, so no document was cut; task.max_prompt_tokens= sets one")
        return found

    def describe(self) -> Mapping[str, JSON]:
        return {**super().describe(), "exams": list(self._exams), "max_prompt_tokens": self.limit}


# --- pieces --------------------------------------------------------------------------------------------------------


def cut_from_right(document: str, tokenizer: Tokenizer, limit: int) -> str:
    """L-Eval's truncation: while there are too many tokens, keep `limit` words, then 250 fewer each time."""
    step, num_words = max(1, min(STEP_WORDS, limit // 8)), limit
    while len(tokenizer.encode(document)) > limit and document:
        document = " ".join(document.split(" ")[: max(0, num_words)])
        num_words -= step
    return document


def _read(source: Source, exam: str, split: str) -> list[dict[str, JSON]]:
    if source.is_hub:
        return source.hub_rows(exam, split)
    folders = ("", "Closed-ended-tasks/", "LEval-data/Closed-ended-tasks/", "LEval/Exam/")
    names = [f"{folder}{exam}.jsonl{ending}" for folder in folders for ending in ("", ".gz")]
    return source.jsonl(*names) if source.has(*names) else []


def _target(exam: str, gold: str, where: str) -> JSON:
    try:
        if exam == "sci_fi":
            return list(reading.gold_truths(gold))
        if exam == "gsm100":
            float(gold.replace(",", ""))
            return gold
        return reading.official_gold_letters(gold)
    except (ValueError, AttributeError):
        raise DataError(f"{where}: {gold!r} is no answer of {exam}") from None


def _read_robustly(sample: Sample, replies: Sequence[str]) -> tuple[JSON, float]:
    gold = sample.target
    if sample.group == "sci_fi":
        truths = [reading.concluded_truth(reply) for reply in replies]
        return (truths if all(truths) else None), _mean_right(truths, gold)
    if sample.group == "gsm100":
        number = concluded_number(answer_part(replies[0]))
        return (None if number is None else str(number)), float(reading.is_number(replies[0], gold))
    if sample.group in SEVERAL_LETTERS:
        letters = reading.concluded_letters(replies[0])
        return letters or None, reading.letters_score(letters, gold)
    letter = concluded_letter(replies[0], reading.options_of(sample.data["question"]))
    return letter, reading.letters_score(letter or "", gold)


def _read_officially(sample: Sample, replies: Sequence[str]) -> tuple[JSON, float]:
    gold = sample.target
    if sample.group == "sci_fi":
        truths = [reading.official_truth(reply) for reply in replies]
        return truths, _mean_right(truths, gold)
    if sample.group == "gsm100":
        number = reading.official_number(replies[0])
        return number, reading.official_number_score(number, gold)
    letters = reading.official_letters(replies[0], several=sample.group in SEVERAL_LETTERS)
    return letters, reading.official_letters_score(letters, gold)


def _mean_right(read: Sequence[str], gold: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(read, gold)) / len(gold)


def _by_exam(rows: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        found[row.group].append(row)
    return {exam: found[exam] for exam in EXAMS if exam in found}


def _average(rows: Sequence[Record], *, is_upstream: bool) -> Metric:
    exams = _by_exam(rows)
    scores = {
        exam: [row.grade.score_upstream if is_upstream else row.grade.score for row in part]
        for exam, part in exams.items()
    }
    return macro(scores, clusters={exam: _clusters(part) for exam, part in exams.items()})


def _clusters(rows: Sequence[Record]) -> list[str]:
    return [row.cluster or row.sample_id for row in rows]
