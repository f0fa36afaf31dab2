"""`python -m qwen_eval.tokens tokenizers=qwen-nano,DIR`: tokens per byte by language, see `profile/tokens.py`."""

import sys

from qwen_eval.profile.tokens import main

if __name__ == "__main__":
    sys.exit(main())
