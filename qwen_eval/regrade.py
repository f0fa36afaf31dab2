"""`python -m qwen_eval.regrade run=DIR [protocol=upstream]`: see `runs/regrade_command.py`."""

import sys

from qwen_eval.runs.regrade_command import main

if __name__ == "__main__":
    sys.exit(main())
