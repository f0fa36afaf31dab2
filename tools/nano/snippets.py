"""Short Python functions and tool choices for the training mixture."""

from __future__ import annotations

import json
import random

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FIXED = [
    ("def double(x):", "Return two times x.", "return x * 2"),
    ("def triple(x):", "Return three times x.", "return x * 3"),
    ("def square(x):", "Return the square of x.", "return x * x"),
    ("def cube(x):", "Return the cube of x.", "return x * x * x"),
    ("def negate(x):", "Return minus x.", "return -x"),
    ("def is_even(n):", "Return True if n is even.", "return n % 2 == 0"),
    ("def is_odd(n):", "Return True if n is odd.", "return n % 2 == 1"),
    ("def is_positive(n):", "Return True if n is greater than zero.", "return n > 0"),
    ("def is_negative(n):", "Return True if n is less than zero.", "return n < 0"),
    ("def add(a, b):", "Return the sum of a and b.", "return a + b"),
    ("def subtract(a, b):", "Return a minus b.", "return a - b"),
    ("def multiply(a, b):", "Return the product of a and b.", "return a * b"),
    ("def larger(a, b):", "Return the larger of a and b.", "return max(a, b)"),
    ("def smaller(a, b):", "Return the smaller of a and b.", "return min(a, b)"),
    ("def length(items):", "Return the number of items.", "return len(items)"),
    ("def total(items):", "Return the sum of the items.", "return sum(items)"),
    ("def largest(items):", "Return the largest of the items.", "return max(items)"),
    ("def smallest(items):", "Return the smallest of the items.", "return min(items)"),
    ("def first(items):", "Return the first of the items.", "return items[0]"),
    ("def last(items):", "Return the last of the items.", "return items[-1]"),
    ("def reverse(text):", "Return the text reversed.", "return text[::-1]"),
    ("def shout(text):", "Return the text in upper case.", "return text.upper()"),
    ("def ordered(items):", "Return the items in order.", "return sorted(items)"),
    ("def is_empty(items):", "Return True if there are no items.", "return len(items) == 0"),
]

# name, what it is for, parameter, queries
TOOLS = [
    ("search", "finds web pages", "query", ["Who wrote {x}?", "Find pages about {x}."], ["Hamlet", "tea", "Mars"]),
    ("calculator", "works out sums", "sum", ["What is {x}?", "Work out {x}."], ["12 * 31", "99 - 45", "7 * 88"]),
    ("weather", "tells the weather of a city", "city", ["Is it raining in {x}?", "How warm is {x}?"],
     ["Paris", "Tokyo", "Cairo"]),
    ("translate", "translates words", "word", ["What is {x} in French?", "Translate {x}."], ["water", "bread", "moon"]),
    ("music", "plays songs", "song", ["Play {x}.", "I want to hear {x}."], ["Spring", "Yesterday", "Summer"]),
    ("draw", "draws pictures", "thing", ["Draw {x}.", "Make a picture of {x}."], ["a cat", "a horse", "a ship"]),
]  # fmt: skip
DESCRIPTION = (
    "{name}: Call this tool to interact with the {name} API. What is the {name} API useful for? It {use}. "
    "Parameters: {parameter} Format the arguments as a JSON object."
)
REACT = (
    "Answer the following questions as best you can. You have access to the following tools:\n\n{tools}\n\n"
    "Use the following format:\n\nQuestion: the input question you must answer\nThought: you should always think about "
    "what to do\nAction: the action to take, should be one of [{names}]\nAction Input: the input to the action\n"
    "Observation: the result of the action\n... (this Thought/Action/Action Input/Observation can be repeated zero or "
    "more times)\nThought: I now know the final answer\nFinal Answer: the final answer to the original input question\n"
    "\nBegin!\n\nQuestion: {query}"
)


def function(rng: random.Random) -> tuple[str, str, str]:
    """Signature line, one-line description, body (four spaces, ends with a newline)."""
    if rng.random() < 0.5:
        signature, doc, body = rng.choice(FIXED)
    else:
        k = rng.randrange(1, 11)
        word = NUMBERS[k - 1]
        signature, doc, body = rng.choice(
            (
                (f"def add_{word}(x):", f"Return x plus {word}.", f"return x + {k}"),
                (f"def subtract_{word}(x):", f"Return x minus {word}.", f"return x - {k}"),
                (f"def times_{word}(x):", f"Return x times {word}.", f"return x * {k}"),
                (f"def above_{word}(x):", f"Return True if x is greater than {word}.", f"return x > {k}"),
                (f"def below_{word}(x):", f"Return True if x is less than {word}.", f"return x < {k}"),
            )
        )
    return signature, doc, f"    {body}\n"


def tool_choice(rng: random.Random) -> tuple[str, str]:
    """A ReAct prompt over one or two tools, and the reply up to where the tool would answer."""
    offered = rng.sample(TOOLS, 2)
    name, _, parameter, queries, values = rng.choice(offered)
    value = rng.choice(values)
    tools = "\n\n".join(DESCRIPTION.format(name=n, use=use, parameter=p) for n, use, p, _, _ in offered)
    prompt = REACT.format(
        tools=tools, names=", ".join(tool[0] for tool in offered), query=rng.choice(queries).format(x=value)
    )
    reply = f"Thought: I should use {name}.\nAction: {name}\nAction Input: {json.dumps({parameter: value})}"
    return prompt, reply + "\nObservation:"
