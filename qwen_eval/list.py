"""`python -m qwen_eval.list tasks|models|engines`: see `report/list_command.py`."""

import sys

from qwen_eval.report.list_command import main

if __name__ == "__main__":
    sys.exit(main())
