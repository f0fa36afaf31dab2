"""The command line: Hydra composes `conf/` into plain dataclasses; every mistake of the user is reported in one line.

Every command is a call of `run` with its schema and its job. Other modules do not use Hydra or OmegaConf, and torch is
not imported before the configuration is valid.
"""

from qwen_eval.cli.arguments import bracket_lists, model_first, quoted, text
from qwen_eval.cli.command import asked_of_itself, guarded, run
from qwen_eval.cli.composing import compose
from qwen_eval.cli.grid import cell_tag
from qwen_eval.cli.schemas import conf_dir, list_keys, text_keys

__all__ = [
    "asked_of_itself",
    "bracket_lists",
    "cell_tag",
    "compose",
    "conf_dir",
    "guarded",
    "list_keys",
    "model_first",
    "quoted",
    "run",
    "text",
    "text_keys",
]
