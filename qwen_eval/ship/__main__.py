"""`python -m qwen_eval.ship reference=A candidate=B tasks=mmlu,gsm8k margin=1`: see `command.py`."""

import sys

from qwen_eval.ship.command import main

if __name__ == "__main__":
    sys.exit(main())
