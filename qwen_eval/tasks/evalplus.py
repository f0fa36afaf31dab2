"""Tests of EvalPlus rows (HumanEval+, MBPP+): the candidate against the reference solution on many inputs.

A row's `base_input` and `plus_input` are lists of argument lists. The test made here is the benchmark's own text: the
sandbox runs it, with the reference inside, apart from the candidate (https://arxiv.org/abs/2305.01210).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from qwen_eval.extraction.slicing import tree_of


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one function is tested. `oracle`: when its answer counts; `most`: what its second argument is at most;
    `is_complex`: JSON holds its arguments as text, "1j", "(-0-1j)".
    """

    oracle: str = "same(answer, expected, atol)"
    most: float = inf
    is_complex: bool = False

    def inputs(self, row: Mapping[str, Any]) -> list[list[Any]]:
        found = [args for key in ("base_input", "plus_input") for args in row[key]]
        found = [args for args in found if self.most == inf or args[1] <= self.most]
        return [[_number(value) for value in args] for args in found] if self.is_complex else found


SETS = (
    "similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum intersection_array "
    "find_dissimilar Diff"
)
RULES = {  # by entry point, all that is special of a problem
    "find_zero": Rule(oracle="abs(space['poly'](*args, answer)) <= atol"),
    "are_equivalent": Rule(oracle="True"),  # upstream takes any answer: the reference itself is in doubt
    "sum_div": Rule(oracle="answer == 0 or same(answer, expected, atol)"),
    **dict.fromkeys(
        ("check_str", "text_match_three", "text_starta_endb"), Rule(oracle="(answer is not None) == bool(expected)")
    ),
    **dict.fromkeys(SETS.split(), Rule(oracle="set(answer) == set(expected)")),
    # with more colors it asks for 6 to 128 million items: no candidate may send so much back
    "combinations_colors": Rule(most=50),
    **dict.fromkeys(("angle_complex", "convert"), Rule(is_complex=True)),
}

TEST = """\
from copy import deepcopy
from math import isclose

inf, nan = float("inf"), float("nan")
space = {{"__name__": "reference"}}
exec({reference!r}, space)
inputs = {inputs!r}


def same(answer, expected, atol):
    if answer == expected:
        return True
    if isinstance(expected, float) or (atol and isinstance(expected, (int, complex))):
        return isinstance(answer, (int, float, complex)) and near(answer, expected, atol or 1e-6)
    if isinstance(expected, (list, tuple)):
        return (
            type(answer) is type(expected)
            and len(answer) == len(expected)
            and all(same(a, e, atol) for a, e in zip(answer, expected))
        )
    return False


def near(answer, expected, atol):
    if isinstance(answer, complex) or isinstance(expected, complex):
        return abs(answer - expected) <= atol + 1e-7 * abs(expected)
    return isclose(answer, expected, rel_tol=1e-7, abs_tol=atol) or (answer != answer and expected != expected)


def check(candidate):
    atol = {atol!r}
    for args in inputs:
        expected = space[{entry_point!r}](*deepcopy(args))
        answer = candidate(*deepcopy(args))
        assert {oracle}, "input " + repr(args)[:100]
"""


def plus_test(row: Mapping[str, Any]) -> str:
    """Source of a test that defines `check(candidate)`."""
    entry_point: str = row["entry_point"]
    reference: str = row["canonical_solution"] if "assertion" in row else row["prompt"] + row["canonical_solution"]
    rule = RULES.get(entry_point, Rule())
    inputs = rule.inputs(row)
    if not rule.is_complex and (template := next(_called_with(row.get("assertion", ""), entry_point), None)):
        inputs = [_shaped(args, template) for args in inputs]
    return TEST.format(
        reference=reference,
        inputs=inputs,
        atol=row.get("atol") or 0,
        entry_point=entry_point,
        oracle=rule.oracle,
    )


def _called_with(assertion: str, entry_point: str) -> Iterator[list[object]]:
    """The arguments of the calls in a row's original assertions: JSON lost which of them were tuples."""
    for node in ast.walk(tree_of(assertion)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == entry_point:
            try:
                yield [ast.literal_eval(argument) for argument in node.args]
            except ValueError:
                continue  # an argument that is calculated


def _shaped(args: list[object], template: list[object]) -> list[object]:
    return [_like(value, like) for value, like in zip(args, template)] + args[len(template) :]


def _like(value: object, template: object, outer: object = None) -> object:
    """`value` with tuples where the template has tuples; tuples within tuples go on at any depth."""
    if isinstance(value, dict) and isinstance(template, dict) and template:
        like = next(iter(template.values()))
        return {key: _like(item, like) for key, item in value.items()}
    if not isinstance(value, list) or not isinstance(template, (list, tuple)):
        return value
    like = next((item for item in template if isinstance(item, (list, tuple, dict))), None)
    if like is None and isinstance(template, tuple) and isinstance(outer, tuple):
        like = template
    items = [_like(item, like, template) if isinstance(item, (list, dict)) else item for item in value]
    return tuple(items) if isinstance(template, tuple) else items


def _number(value: object) -> object:
    if not isinstance(value, str):
        return value
    return complex(value) if "j" in value else float(value)
