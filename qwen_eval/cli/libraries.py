"""What libraries print beside us: their bars never, since ours is there; with quiet=true their warnings neither."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

NO_BARS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
NO_WARNINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "BITSANDBYTES_NOWELCOME": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",  # of child processes
}


@contextmanager
def kept_still(*, is_quiet: bool) -> Iterator[None]:
    """Within the block, and for libraries that are first imported there. What the user has set stays."""
    wanted = {**NO_BARS, **(NO_WARNINGS if is_quiet else {})}
    ours = {key: value for key, value in wanted.items() if key not in os.environ}
    before = logging.root.manager.disable
    try:
        os.environ.update(ours)
        with warnings.catch_warnings():
            if is_quiet:
                warnings.simplefilter("ignore")
                logging.disable(logging.WARNING)
            with _transformers_bars_off():
                yield
    finally:
        logging.disable(before)
        _take_back(ours)


@contextmanager
def _transformers_bars_off() -> Iterator[None]:
    """transformers shows its bars whatever the environment says; where it is imported already it is told so."""
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.utils import logging as said

    was_on = said.is_progress_bar_enabled()
    said.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            said.enable_progress_bar()


def _take_back(ours: Mapping[str, str]) -> None:
    for key in ours:
        os.environ.pop(key, None)
