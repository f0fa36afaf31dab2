"""A launcher that sends cells as those for other processes do: pickled, and the command's arguments are not there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher


class SendingLauncher(BasicLauncher):
    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        import cloudpickle

        self.task_function = cloudpickle.loads(cloudpickle.dumps(self.task_function))
        sys.argv = ["a process of the launcher", "its", "own=arguments"]
        return super().launch(job_overrides, initial_job_idx)
