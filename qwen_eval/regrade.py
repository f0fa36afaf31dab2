"""`python -m qwen_eval.regrade run=DIR [protocol=upstream]`: see `runs/regrade.py`."""

import sys

from qwen_eval.runs.regrade import main

if __name__ == "__main__":
    sys.exit(main())
