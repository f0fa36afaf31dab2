"""Schema of `python -m qwen_eval.report`. Keys that are lists take a bare comma list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen_eval.config import not_one_of
from qwen_eval.core import ConfigError

FORMATS = ("auto", "terminal", "md", "csv", "json", "tex", "html", "junit", "svg", "png")
LAYOUTS = ("models", "runs", "quantization", "categories", "long", "profile", "groups", "problems")


@dataclass(kw_only=True)
class MarginsSpec:
    """Changes smaller than these are of no interest: shares absolute (0.01 is one point), the others relative."""

    share: float = 0.01
    ppl: float = 0.01
    mean: float = 0.01
    speed: float = 0.10
    memory: float = 0.10
    once: float = 1.0  # of a time measured only once, such as loading: 1.0 is twice as long


@dataclass(kw_only=True)
class ReportSpec:
    """What is reported: tables of `runs` unless `compare`, `gate`, `accept`, `published` or `ledger` asks for more."""

    runs: list[str] = field(default_factory=lambda: ["runs"])  # run directories, or directories above them
    compare: list[str] = field(default_factory=list)  # reference, other
    published: bool = False  # our numbers beside the published ones
    ledger: str = ""  # contradictions | rows: what the published numbers say themselves
    gate: str = ""  # directory of baselines
    accept: list[str] = field(default_factory=list)  # runs that become baselines (in `gate`, or reports/baselines)
    layout: list[str] = field(default_factory=list)  # empty: those that have something to show
    format: str = "auto"  # auto: by the ending of `out`, else terminal
    out: list[str] = field(default_factory=list)  # files; empty: standard output
    title: str = ""
    num_flips: int = 20  # samples listed by compare in text; HTML lists all
    max_samples: int = 20_000  # samples an HTML file carries
    margins: MarginsSpec = field(default_factory=MarginsSpec)
    margin: float | None = None  # points of a share, per cent of the others: short for margins.share, .ppl and .mean


# --- python -m qwen_eval.list ----------------------------------------------------------------------------------------

LISTED = ("tasks", "models", "engines")


@dataclass(frozen=True, kw_only=True)
class ListSpec:
    what: str
    word: str = ""  # only names that hold it
    config_dirs: tuple[str, ...] = ()


def list_spec(argv: Sequence[str]) -> ListSpec:
    """ConfigError for anything but `tasks|models|engines [word] [--config-dir=DIR]`."""
    folders = tuple(argument.partition("=")[2] for argument in argv if argument.startswith("--config-dir="))
    words = [argument for argument in argv if not argument.startswith("--config-dir=")]
    flags = [word for word in words if word.startswith("-")]
    if flags or not 1 <= len(words) <= 2:
        raise ConfigError(f"{' '.join(argv)}: written tasks|models|engines [word] [--config-dir=DIR]")
    if words[0] not in LISTED:
        raise not_one_of("list", words[0], LISTED)
    return ListSpec(what=words[0], word="".join(words[1:]), config_dirs=folders)
