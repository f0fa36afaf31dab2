"""Benchmarks from data alone: `task=csv task.path=rows.csv`, `task=jsonl task.path=rows.jsonl` (docs/own_task.md).

Csv rows are questions with options; JSON lines are questions answered by a text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qwen_eval.core import ConfigError, DataError
from qwen_eval.data.rows import Source
from qwen_eval.tasks.own import FIELD, OwnChoice, OwnGenerative, OwnSpec, OwnTask, Question
from qwen_eval.tasks.prompts import option_letters

OPTION_MARK = "|"  # between the options of one cell


@dataclass(kw_only=True)
class CsvSpec(OwnSpec):
    name: str = "csv"


class CsvTask(OwnChoice):
    """Columns question, answer, and options: A, B, C ..., or one column `options` with "|" between them."""

    Spec = CsvSpec

    def questions(self) -> Iterable[Question]:
        source = _rows_source(self, "rows.csv")
        for name in _names(source, "csv"):
            for row in source.table(name, columns=(), header=True, needs=("question", "answer")):
                letters, cells = option_letters(row.cells), row.cells
                if not letters and "options" not in cells:
                    raise DataError(f"{source.origin} {row.where}: no options; columns A, B, C ..., or options")
                options = [cells[x] for x in letters] if letters else cells["options"].split(OPTION_MARK)
                yield Question(
                    question=cells["question"],
                    options=[text.strip() for text in options if text.strip()],
                    answer=cells["answer"].strip(),
                    group=cells.get("subject", ""),
                    data={key: text for key, text in cells.items() if key not in letters},
                    where=f"{source.origin.removeprefix('path:')}: {row.where}",
                )


@dataclass(kw_only=True)
class JsonlSpec(OwnSpec):
    name: str = "jsonl"
    answer: str = "answer"  # the key of the right answer: a text, or a list of them
    question: str = "question"  # the key that the default template shows


class JsonlTask(OwnGenerative):
    """One JSON object a line. `task.template` words the prompt, `task.answer` names the key of the right answer."""

    Spec = JsonlSpec

    @property
    def keys_needed(self) -> list[str]:
        """Those of the right answer and of the template."""
        assert isinstance(self.spec, JsonlSpec)
        own = self.spec.template
        return [self.spec.answer, *([self.spec.question] if own is None else FIELD.findall(own))]

    def questions(self) -> Iterable[Question]:
        assert isinstance(self.spec, JsonlSpec)
        source = _rows_source(self, "rows.jsonl")
        for name in _names(source, "jsonl"):
            for number, row in enumerate(source.jsonl(name), 1):
                where = f"{source.origin.removeprefix('path:')}: {name} row {number}"
                for key in self.keys_needed:
                    if key not in row:
                        raise DataError(
                            f"{where}: no key {key!r}; found {', '.join(row)}; see task.template= and task.answer="
                        )
                gold = row[self.spec.answer]
                yield Question(
                    question=str(row.get(self.spec.question, "")),
                    answer=[str(item) for item in gold] if isinstance(gold, list) else str(gold),
                    group=str(row.get("subject", "")),
                    data=row,
                    where=where,
                )


def _rows_source(task: OwnTask, example: str) -> Source:
    if task.spec.path is None:
        raise ConfigError(f"task={task.name}: pass task.path={example}")
    return task.source


def _names(source: Source, ending: str) -> list[str]:
    names = source.names(f"*.{ending}") + source.names(f"*.{ending}.gz")
    if not names:
        raise DataError(f"{source.origin}: no .{ending} file there")
    return names
