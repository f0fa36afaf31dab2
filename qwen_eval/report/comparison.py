"""The result of comparing two runs of one benchmark. The first run is the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

from qwen_eval.core import ConfigError, Metric
from qwen_eval.report.items import Item, items_of
from qwen_eval.report.paired import Difference
from qwen_eval.runs.run import Run

Family: TypeAlias = Literal["share", "ppl", "mean", "speed"]
Verdict: TypeAlias = Literal["worse", "better", "unchanged", "cannot tell", "not comparable"]

TIE = 1e-3  # nats between two choices; fingerprints of answers keep four decimals


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL(reference || tested) in nats per position, and how often both models name the same most likely token."""

    mean: float
    low: float | None
    high: float | None
    percentiles: dict[str, float]
    top1_agreement: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Margins:
    """Changes smaller than these do not matter: shares absolute, the others relative. Equivalence is defined by them.

    `once`: for a time or speed measured only once (loading), whose noise is unknown.
    """

    share: float = 0.01
    ppl: float = 0.01
    mean: float = 0.01
    speed: float = 0.10
    memory: float = 0.10
    once: float = 1.0

    def of(self, family: Family) -> float:
        return float(getattr(self, family))

    def checked(self, margin: float | None = None) -> Margins:
        """With `margin` points of a share and per cent of a perplexity or mean; ConfigError for what is no margin."""
        if margin is not None and not 0 < margin < 100:
            raise ConfigError(f"margin={margin}: points or per cent, between 0 and 100, such as 1")
        part = None if margin is None else margin / 100
        found = self if part is None else replace(self, share=part, ppl=part, mean=part)
        for name, value in vars(found).items():
            if not 0 < value < (10 if name in ("once", "memory", "speed") else 1):
                raise ConfigError(f"margins.{name}={value}: a fraction above 0 and below 1, such as 0.01")
        return found


@dataclass(frozen=True, kw_only=True)
class Flip:
    """A sample whose score changed."""

    id: str
    first: Item
    second: Item

    @property
    def is_gain(self) -> bool:
        return (self.second.score or 0.0) > (self.first.score or 0.0)

    @property
    def is_reread(self) -> bool:
        """The same answer, extracted differently: not due to chance (unlike a time-out of the sandbox).

        Near-ties of two choices do not count: another CPU's last digits decide between them.
        """
        same_answer = self.first.answer_sha256 == self.second.answer_sha256
        return same_answer and self.first.extracted != self.second.extracted and not self._is_tie

    @property
    def _is_tie(self) -> bool:
        best = sorted(self.first.choices)[-2:]
        return len(best) == 2 and best[1] - best[0] < TIE


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of `num_samples` in both runs, how many agree in the answer itself, in the extracted answer, in the score.

    `is_text`: the answers are words; of scored text and of choices they are log-probabilities, to four decimals.
    None where no sample has a reading or a score (perplexity).
    """

    num_samples: int
    same_answers: int
    same_readings: int | None
    same_scores: int | None
    is_text: bool


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a comparison: a run directory, or a baseline made of one."""

    run: Run
    given: Mapping[str, Item] | None = None

    @cached_property
    def items(self) -> Mapping[str, Item]:
        return items_of(self.run.records) if self.given is None else self.given


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of one pair. If `not_comparable` holds reasons, nothing else is filled in.

    `failures` list scores that are missing or not a number in the second run. They need no test.
    `difference.delta` is absolute for shares and means and log(ratio) for perplexity and speed; `margin` is on
    the same scale. `by_group` (perplexity only: context lengths, documents) is shown, but not tested.
    `regraded` are (gains, losses) among answers that are equal word for word but extracted differently; if there are
    gains, `without_rereads` is the difference as if those samples had kept their score. `rewritten` are the samples
    whose text changed while their score did not.
    """

    task: str
    label: str
    family: Family
    first: Metric | None
    second: Metric | None
    metric: str = ""
    higher_is_better: bool = True
    not_comparable: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    difference: Difference | None = None
    by_group: tuple[tuple[str, Difference], ...] = ()
    p_adjusted: float | None = None
    margin: float = 0.0
    flips: tuple[Flip, ...] = ()
    regraded: tuple[int, int] = (0, 0)
    without_rereads: Difference | None = None
    rewritten: tuple[str, ...] = ()
    is_identical: bool = False
    agreement: Agreement | None = None
    choice_kl: Metric | None = None
    kld: Divergence | None = None
    notes: tuple[str, ...] = ()
    paths: tuple[Path, ...] = field(default=())
    pair: str = ""  # both models and variants, without length, cell or quantity

    @property
    def gains(self) -> int:
        return sum(flip.is_gain for flip in self.flips)

    @property
    def losses(self) -> int:
        return len(self.flips) - self.gains
