"""One command from its arguments to its exit code. All commands end here, in the same way."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from qwen_eval.activity import stage
from qwen_eval.cli import completion
from qwen_eval.cli.arguments import is_true, refuse_doubled
from qwen_eval.cli.composing import each_cell, settings
from qwen_eval.cli.grid import cell_name
from qwen_eval.cli.libraries import kept_still
from qwen_eval.cli.mistakes import explain
from qwen_eval.cli.schemas import groups_text
from qwen_eval.core import QwenEvalError
from qwen_eval.runs.progress import shown
from qwen_eval.terminal import plain_text

DONE, MISTAKE, INTERRUPTED = 0, 2, 130
BROKEN_PIPE = 141  # as shells say of a program whose reader has left

Job = Callable[[Any], None]


def run(argv: Sequence[str], *, config_name: str, schema: type, job: Job, usage: str = "") -> int:
    """Compose `conf/<config_name>.yaml` with the overrides in `argv`; call `job` with the `schema` object of each cell.

    Returns the exit code: 0, 2 after a mistake of the user (one line on stderr each), 130 after Ctrl-C, 141 where the
    reader of a pipe has left (`| head`). In a grid (-m) the other cells still run when one fails.
    """
    return guarded(lambda: _run(argv, config_name, schema, job, usage))


def guarded(command: Callable[[], int]) -> int:
    """The exit code of a command: a mistake is one line, Ctrl-C one line, a reader that has left (`| head`) none."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted; graded samples are kept, the same command resumes the run", file=sys.stderr)
        return INTERRUPTED
    except QwenEvalError as error:
        tell(str(error))
        return MISTAKE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it leaves
        return BROKEN_PIPE


def asked_of_itself(argv: Sequence[str], usage: str, *, groups: bool = False) -> bool:
    """Answer `--help` and `--version`; whether one of them was asked for. Hydra takes a second to list its groups."""
    if {"-h", "--help"} & set(argv):
        print(usage.strip(), *([groups_text()] if groups else []), sep="\n\n")
        return True
    if "--version" in argv:
        package = sys.modules["qwen_eval"]  # it imports this module: an import here would be a circle
        print(f"qwen_eval {package.__version__}")
        return True
    return False


def tell(line: str) -> str:
    """A mistake on stderr, in one line."""
    line = " ".join(line.split())
    print(plain_text(line), file=sys.stderr, flush=True)
    return line


def _run(argv: Sequence[str], config_name: str, schema: type, job: Job, usage: str) -> int:
    if asked_of_itself(argv, usage, groups=True):
        return DONE
    if completion.is_asked(argv):
        print(completion.text(argv))
        return DONE
    failures: list[str] = []
    is_quiet = is_true(argv, "quiet")
    with kept_still(is_quiet=is_quiet), shown(is_quiet=is_quiet), ExitStack() as checking:
        checking.enter_context(stage("checking the configuration", is_brief=True))
        try:
            cells = _Cells(job=job, schema=schema, failures=failures, checking=checking)
            each_cell(argv, config_name, schema, lambda config: cells.run(config))
        except (QwenEvalError, BrokenPipeError):
            raise
        except Exception as error:
            checking.close()
            failures.append(tell(explain(error, schema)))
    return MISTAKE if failures else DONE


@dataclass(kw_only=True, eq=False)
class _Cells:
    """Runs each cell. A launcher of Hydra may send it to another process: the arguments of the command go with it."""

    job: Job
    schema: type
    failures: list[str]
    checking: ExitStack
    arguments: Sequence[str] | None = None  # in another process only

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "checking": ExitStack(), "arguments": sys.argv[1:]}

    def run(self, config: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        if self.arguments is not None:
            sys.argv[1:] = self.arguments
        try:
            refuse_doubled(sys.argv[1:])
            spec = settings(config, self.schema, HydraConfig.get())
            self.checking.close()
            self.job(spec)
        except QwenEvalError as error:
            self.checking.close()
            line = f"{cell_name()}{error}"
            if self.arguments is not None:
                raise type(error)(line) from None  # the command has it from Hydra
            self.failures.append(tell(line))
