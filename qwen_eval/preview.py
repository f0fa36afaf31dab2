"""`python -m qwen_eval.preview task=mmlu model=qwen-7b samples=3`: see `runs/preview.py`."""

import sys

from qwen_eval.runs.preview_command import main

if __name__ == "__main__":
    sys.exit(main())
