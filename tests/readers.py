"""Every reader of replies as a function of the reply alone, for the tests of hostile replies.

To add one: a line in `READERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

from qwen_eval.core import Completion, Completions, Generate, Grade, Prompt, Sample, Task, Tokenizer, Turn
from qwen_eval.extraction import leval, short_answers
from qwen_eval.tasks import code_interpreter, function_calls
from qwen_eval.tasks.nano import read as read_nano
from qwen_eval.tasks.registry import TaskContext, build, task_class


def replied(text: str) -> list[Turn]:
    """One question answered by `text`."""
    completion = Completion(text=text, finish_reason="stop", num_tokens=9)
    request = Generate(prompt=Prompt.raw("?"), max_new_tokens=9)
    return [Turn(request=request, answer=Completions(completions=(completion,)))]


def graded(task: Task, sample: Sample, reply: str) -> Grade:
    return task.grade(sample, replied(reply))


def of_task(
    name: str, files: dict[str, str] | None = None, tokenizer: Tokenizer | None = None
) -> Callable[[str], Grade]:
    """The grading of a task's first sample, of the bundled rows or of `files`."""
    spec = task_class(name).Spec(name=name)
    if not files:
        spec.data = "bundled"
    else:
        spec.path = mkdtemp(prefix="rows_")
        for file, text in files.items():
            Path(spec.path, file).write_text(text, encoding="utf-8")
    task = build(spec, TaskContext(is_chat=True, tokenizer=tokenizer))
    return partial(graded, task, task.samples()[0])


def _bbh(target: str, question: str) -> Callable[[str], str | None]:
    return lambda reply: short_answers.concluded_choice(reply, target, question)


PLUGIN = {
    "rows.jsonl": json.dumps(
        {"prompt": "Question: ?", "response": '\nThought: t\nAction: draw\nAction Input: {"prompt": "a cat"}'}
    )
}

READERS: dict[str, Callable[[str], object]] = {
    "mmlu": of_task("mmlu"),
    "ceval": of_task("ceval"),
    "bbh": of_task("bbh"),
    "bbh options": _bbh("(A)", "Options:\n(A) red\n(B) the answer\n(C) one\n(D) two"),
    "bbh yes or no": _bbh("yes", "Does it?"),
    "bbh validity": _bbh("valid", "Is it?"),
    "bbh number": _bbh("7", "How many?"),
    "bbh brackets": _bbh(") ]", "Input: [ ("),
    "bbh words": _bbh("a b", "List: answer a b"),
    "nano choice": partial(read_nano, "choice"),
    "nano fact": partial(read_nano, "fact"),
    "nano recall": partial(read_nano, "recall"),
    "plugin": of_task("plugin", PLUGIN),
    "function call": lambda reply: function_calls.read_call(f"<tool_call>{reply}"),
    "code of a call": lambda reply: code_interpreter.read_call(
        f"\nAction: code_interpreter\nAction Input: {reply}", is_upstream=False
    ),
    "several letters": leval.concluded_letters,
}
