"""Code that a command in a process of its own begins with, where a test counts its lines.

On a busy machine lines about slow stages would stand between them. The fixture of conftest.py does the same for
commands within the test's process.
"""

SAYS_NO_STAGES = "from qwen_eval.runs import progress; progress.FIRST_LINE_S = progress.LINE_EVERY_S = 3600.0\n"
