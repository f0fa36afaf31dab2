"""The process that renders a chat template: a checkpoint's template is a program, so it gets limits of its own.

Orders and replies are one line of JSON each. It is started by `models/template.py` and ends with its parent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT = 1 << 23  # characters of one rendered chat


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates (its docs, "Writing a chat template")."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's tokens for training; for a prompt it changes nothing."""

        tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def limit_memory(max_bytes: int) -> None:
    """Bound the address space and forbid files; a system that knows no such limits keeps the time limit alone."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        return


class Renderer:
    def __init__(self) -> None:
        self.environment = environment()
        self.template: Template | None = None

    def obey(self, line: bytes) -> dict[str, Any]:
        order: dict[str, Any] = json.loads(line)
        if "load" in order:
            from jinja2.meta import find_undeclared_variables

            self.template = self.environment.from_string(order["load"])
            return {"variables": sorted(find_undeclared_variables(self.environment.parse(order["load"])))}
        return {"texts": [attempt(partial(self.render, row)) for row in order["render"]]}

    def render(self, variables: dict[str, Any]) -> dict[str, Any]:
        assert self.template is not None, "no template is loaded"
        text = self.template.render(**variables)
        if len(text) > MAX_TEXT:
            raise MemoryError
        return {"text": text}


def attempt(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `act` returns, or its error in one printable line."""
    try:
        return act()
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as error:  # whatever a checkpoint's program raises is told as its mistake
        line = "".join(c if c.isprintable() else " " for c in str(error)[:200]) or type(error).__name__
        return {"error": line}


def main(max_bytes: int) -> None:
    renderer = Renderer()
    limit_memory(max_bytes)
    for line in sys.stdin.buffer:
        reply = attempt(partial(renderer.obey, line))
        try:
            answer = json.dumps(reply)
        except MemoryError:
            answer = '{"error": "it needs too much memory"}'
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()
