"""`python -m qwen_eval.quantize model=qwen-7b-chat bits=4`: see `command.py`."""

import sys

from qwen_eval.quantize.command import main

if __name__ == "__main__":
    sys.exit(main())
