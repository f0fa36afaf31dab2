"""The stub tools of the Hugging Face agent benchmark and the interpreter that calls them.

The driver of a sandbox session: it runs inside, beside the model's code, and decides nothing. Standard library alone.
The tools say in words what they would have done, so that a right chain of calls gives a known text.
"""

from __future__ import annotations

import ast
import builtins
import difflib
from collections.abc import Callable
from typing import Any

MOST_VALUES = 200
MOST_CHARACTERS = 4000


def _needs(kind: str, name: str, value: str) -> None:
    if kind not in value:
        raise ValueError(f"`{name}` ({value}) is not {'a' if kind == 'sound' else 'an'} {kind}.")


def text_classifier(text: str, labels: Any) -> str:
    return f"This is the classification of {text} along {labels}."


def translator(text: str, src_lang: str, tgt_lang: str) -> str:
    return f"This is the translation of {text} from {src_lang} to {tgt_lang}."


def text_reader(text: str) -> str:
    return f"This is actually a sound reading {text}."


def transcriber(audio: str) -> str:
    _needs("sound", "audio", audio)
    return f"This is the transcribed text from {audio}."


def image_generator(prompt: str) -> str:
    return f"This is actually an image representing {prompt}."


def image_segmenter(image: str, prompt: str) -> str:
    return f"This is the mask of {prompt} in {image}"


def image_captioner(image: str) -> str:
    _needs("image", "image", image)
    return f"This is a description of {image}."


def image_transformer(image: str, prompt: str) -> str:
    _needs("image", "image", image)
    return f"This is a transformation of {image} according to {prompt}."


def text_qa(text: str, question: str) -> str:
    return f"This is the answer to {question} from {text}."


def image_qa(image: str, question: str) -> str:
    _needs("image", "image", image)
    return f"This is the answer to {question} from {image}."


def document_qa(image: str, question: str) -> str:
    return f"This is the answer to {question} from the document {image}."


def text_downloader(url: str) -> str:
    return f"This is the content of {url}."


def summarizer(text: str) -> str:
    return f"This is a summary of {text}."


def video_generator(prompt: str, seconds: int = 2) -> str:
    return f"A video of {prompt}"


TOOLS: dict[str, Callable[..., str]] = {
    tool.__name__: tool
    for tool in (
        document_qa, image_captioner, image_qa, image_segmenter, transcriber, summarizer, text_classifier, text_qa,
        text_reader, translator, image_transformer, text_downloader, image_generator, video_generator,
    )
}  # fmt: skip
BUILTINS = (
    "print",
    "range",
    "float",
    "int",
    "bool",
    "str",
)  # what the official interpreter lets code call beside tools
OFFICIAL_NODES = (
    ast.Assign, ast.Call, ast.Constant, ast.Dict, ast.Expr, ast.For, ast.FormattedValue, ast.If, ast.JoinedStr,
    ast.List, ast.Name, ast.Subscript, ast.BinOp, ast.Compare, ast.keyword, ast.expr_context, ast.operator, ast.cmpop,
)  # fmt: skip
_states: dict[str, dict[str, Any]] = {}


class Variables(dict[str, Any]):
    """As the official interpreter looks names up: the nearest one where there is none."""

    def __missing__(self, name: str) -> Any:
        if name in TOOLS or hasattr(builtins, name):
            raise KeyError(name)
        near = difflib.get_close_matches(name, [key for key in self if isinstance(key, str)], n=1)
        if not near:
            raise KeyError(name)
        return self[near[0]]


def run(reading: str, code: str, inputs: dict[str, str]) -> list[Any]:
    """[result, texts in the variables, error] of a snippet in the chat so far, by one of the two readings.

    "robust": plain Python; the result is the last value that a statement gave. "upstream": only what the official
    interpreter knows; it stops at the first other statement, a failing one leaves no result, names may be misspelt.
    """
    state = _states.setdefault(reading, Variables() if reading == "upstream" else {})
    state.update(inputs)
    result: Any = None
    error = ""
    try:
        for statement in ast.parse(code).body:
            if reading == "upstream" and not _is_official(statement):
                break
            value = _value(statement, state)
            result = value if value is not None else result
    except BaseException as raised:  # whatever it is, the snippet has ended
        error, result = type(raised).__name__, None
    texts = [text[:MOST_CHARACTERS] for text in list(state.values())[-MOST_VALUES:] if isinstance(text, str)]
    return [result[:MOST_CHARACTERS] if isinstance(result, str) else None, texts, error]


def _value(statement: ast.stmt, state: dict[str, Any]) -> Any:
    names = {"__builtins__": builtins, **TOOLS}
    if isinstance(statement, ast.Expr):
        return eval(compile(ast.Expression(statement.value), "<code>", "eval"), names, state)
    exec(compile(ast.Module([statement], []), "<code>", "exec"), names, state)
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return state[statement.targets[0].id]
    return None


def _is_official(statement: ast.stmt) -> bool:
    for node in ast.walk(statement):
        if not isinstance(node, OFFICIAL_NODES):
            return False
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Name) and (node.func.id in TOOLS or node.func.id in BUILTINS)
        ):
            return False
    return True
