"""LaTeX formulas in samples as MathML: trees of known elements and their text, no attribute, for the page's script.

Formulas are text of a model: what is long, deep, defines a macro or becomes an unknown element stays as it was written.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from xml.etree.ElementTree import Element

from qwen_eval.core import JSON

MAX_FORMULAS = 3_000  # distinct ones of a page; half a millisecond each
MAX_DEPTH = 16
MAX_NODES = 400
# The script of the page finds the same: $$…$$, $…$ without a space inside its ends, \(…\), \[…\].
FORMULA = re.compile(
    r"\$\$[^$]{1,300}?\$\$|\$(?![\s$])[^$\n]{1,300}?(?<!\s)\$(?!\d)|\\\((?:[^\\]|\\[^()\[\]]){1,300}?\\\)"
    r"|\\\[(?:[^\\]|\\[^()\[\]]){1,300}?\\\]"
)
ELEMENTS = frozenset((
    "mi", "mn", "mo", "mtext", "mrow", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup", "munder",
    "mover", "munderover", "mtable", "mtr", "mtd", "mspace", "mstyle", "mpadded", "mphantom", "menclose", "mfenced",
))  # fmt: skip
DEFINES = re.compile(r"\\(?:re)?(?:newcommand|def|let|edef|gdef|newenvironment)")


def formulas(texts: Iterable[str]) -> dict[str, JSON]:
    """Formula as written, with its delimiters -> `[[element, text or children], …]`; the first `MAX_FORMULAS`."""
    found: dict[str, JSON] = {}
    seen: set[str] = set()
    for text in texts:
        for match in FORMULA.finditer(text) if "$" in text or "\\" in text else ():
            if match[0] not in seen and len(seen) < MAX_FORMULAS:
                seen.add(match[0])
                tree = _tree(match[0])
                if tree is not None:
                    found[match[0]] = tree
        if len(seen) >= MAX_FORMULAS:
            break
    return found


def _tree(written: str) -> JSON:
    """None for what is no formula that the page can show."""
    from latex2mathml.converter import convert_to_element

    latex = written.strip("$") if written.startswith("$") else written[2:-2]
    if not re.search(r"[\\^_=+*/<>-]|^\w$", latex) or _depth(latex) > MAX_DEPTH or DEFINES.search(latex):
        return None
    try:
        root = convert_to_element(latex)
        nodes = list(root.iter())[1:]
    except Exception:  # of the converter, about text of a model: shown as it was written
        return None
    if len(nodes) > MAX_NODES or any(node.tag not in ELEMENTS for node in nodes):
        return None
    return [_node(child) for child in root]


def _depth(latex: str) -> int:
    deepest = depth = 0
    for character in latex:
        depth += (character == "{") - (character == "}")
        deepest = max(deepest, depth)
    return deepest + latex.count(r"\left") + latex.count(r"\begin")


def _node(element: Element) -> JSON:
    children = [_node(child) for child in element]
    return [element.tag, children or html.unescape(element.text or "")]
