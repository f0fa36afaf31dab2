from collections.abc import Sequence

class Score:
    score: float

class BLEUScore(Score): ...
class CHRFScore(Score): ...

class Metric:
    def _extract_corpus_statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[list[int]]: ...
    def _compute_score_from_stats(self, stats: list[int]) -> Score: ...

class BLEU(Metric):
    def __init__(self, *, tokenize: str | None = None) -> None: ...
    @staticmethod
    def compute_bleu(
        correct: list[int],
        total: list[int],
        sys_len: int,
        ref_len: int,
        smooth_method: str = "none",
        smooth_value: float | None = None,
        effective_order: bool = False,
    ) -> BLEUScore: ...

class CHRF(Metric):
    def __init__(self) -> None: ...
