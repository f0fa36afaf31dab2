"""WMT22 zh-en and en-zh: translation, corpus BLEU and chrF2 (https://aclanthology.org/2022.wmt-1.1).

Two scales of BLEU, told apart by name because they lie 12 points apart on Chinese: `wmt22` is that of the Qwen cards
(an early lm-evaluation-harness: Chinese is cut by jieba, then tokenised as 13a), `wmt22_sacrebleu` is sacreBLEU's own
(zh for Chinese, 13a for English), in which the systems of the shared task are scored.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qwen_eval import corpus
from qwen_eval.config import TaskSpec
from qwen_eval.core import (
    JSON,
    ConfigError,
    DataError,
    Generate,
    Grade,
    Message,
    Metric,
    Prompt,
    Record,
    Request,
    Sample,
    Turn,
)
from qwen_eval.data.catalogue import way_to_get
from qwen_eval.data.files import Folder
from qwen_eval.data.hub import is_hub_reachable
from qwen_eval.data.rows import Source
from qwen_eval.extraction.symptoms import answer_part, completions_of, cut, flags
from qwen_eval.tasks.generation import GenerativeTask

logger = logging.getLogger(__name__)

PAIRS = {"zh-en": ("Chinese", "English"), "en-zh": ("English", "Chinese")}
HEADLINES = {"wmt22": corpus.BLEU_QWEN, "wmt22_sacrebleu": corpus.BLEU_SACREBLEU}
TOKENIZERS = {
    corpus.BLEU_QWEN: {"zh-en": "13a", "en-zh": "jieba"},
    corpus.BLEU_SACREBLEU: {"zh-en": "13a", "en-zh": "zh"},
}
QUERY = "{source} phrase: {text}\n{target} phrase:"
CHAT_QUERY = "Translate this text from {source} to {target}. Reply with the translation alone.\n\n{text}"
HARNESS_SEED = 42  # of the harness's draws of shots
HOW = way_to_get("wmt22")


@dataclass(kw_only=True)
class Wmt22Spec(TaskSpec):
    name: str = "wmt22"
    split: str = "test"
    shots: int = 5
    max_new_tokens: int = 256  # the harness's limit


class Wmt22(GenerativeTask[Wmt22Spec]):
    Spec = Wmt22Spec
    version = 1
    bundled = "wmt22"

    # --- rows ---

    def open(self) -> Source:
        """`task.path`, else what sacreBLEU has downloaded or can download, else the bundled sample."""
        if self.spec.path is not None or self.spec.data == "bundled":
            return super().open()
        found = sacrebleu_folder(may_download=is_hub_reachable())
        if found is not None:
            return Source("sacrebleu:wmt22", Folder(found), how=HOW)
        if self.spec.data == "hub":
            raise DataError(f"wmt22: sacreBLEU cannot download it here; {HOW}")
        logger.warning("wmt22: no network and no copy of sacreBLEU's: scoring the small bundled sample; %s", HOW)
        return super().open()

    def rows(self, source: Source) -> list[Sample]:
        pairs = [pair for pair in PAIRS if source.has(*_names(pair, "src"))]
        if not pairs:
            raise DataError(f"{source.origin}: no {' or '.join(_names('zh-en', 'src'))} there; {HOW}")
        return [sample for pair in pairs for sample in self._pair(source, pair)]

    def _pair(self, source: Source, pair: str) -> list[Sample]:
        texts, references = (_lines(source.text(*_names(pair, kind))) for kind in ("src", "ref"))
        if len(texts) != len(references):
            raise DataError(f"{source.origin} {pair}: {len(texts)} sources, {len(references)} references")
        documents = [""] * len(texts)
        if source.has(*_names(pair, "docid")):
            documents = _lines(source.text(*_names(pair, "docid")))
            if len(documents) != len(texts):
                raise DataError(f"{source.origin} {pair}: {len(texts)} sources, {len(documents)} document ids")
        shots = harness_shots(list(zip(texts, references)), self.shots, f"{source.origin} {pair}")
        return [
            Sample(
                id=f"{pair}/{i}", group=pair, target=reference, cluster=f"{pair}/{document}" if document else "",
                data={"text": text, "shots": [[texts[k], references[k]] for k in shots[i]]},
            )
            for i, (text, reference, document) in enumerate(zip(texts, references, documents))
        ]  # fmt: skip

    @property
    def notes(self) -> list[str]:
        if any(sample.cluster for sample in self.samples()):
            return []
        return [
            "no document ids beside the texts: every segment counts as independent, so the intervals are too narrow"
        ]

    # --- asking ---

    def prompt(self, sample: Sample) -> Prompt:
        source, target = PAIRS[sample.group]
        query = CHAT_QUERY if self.is_chat else QUERY

        def asked(text: str) -> str:
            return query.replace("{source}", source).replace("{target}", target).replace("{text}", text)

        shots = sample.data["shots"]
        if not self.is_chat:
            return Prompt.raw("".join(f"{asked(a)} {b}\n\n" for a, b in shots) + asked(sample.data["text"]))
        messages: list[Message] = []
        for text, translation in shots:
            messages.append(Message(role="user", content=asked(text)))
            messages.append(Message(role="assistant", content=translation))
        return Prompt(messages=(*messages, Message(role="user", content=asked(sample.data["text"]))))

    def request(self, sample: Sample, turns: Sequence[Turn]) -> Request | None:
        if turns:
            return None
        return Generate(
            prompt=self.prompt(sample),
            max_new_tokens=self.reply_tokens,
            stop=() if self.is_chat else ("\n",),  # the official harness stops there too
            sampling=self.context.sampling(self.spec),
        )

    # --- grading ---

    @cached_property
    def headline(self) -> str:
        if self.name not in HEADLINES:
            raise ConfigError(f"task.name={self.name}: one of {', '.join(HEADLINES)}, which name the scale of BLEU")
        return HEADLINES[self.name]

    def grade(self, sample: Sample, turns: Sequence[Turn]) -> Grade:
        completion = completions_of(turns[0])[0]
        text = translation_in(completion.text, is_chat=self.is_chat)
        counts = {
            name: corpus.bleu_counts(text, sample.target, tokenize=of_pair[sample.group])
            for name, of_pair in TOKENIZERS.items()
        } | {corpus.CHRF: corpus.chrf_counts(text, sample.target)}
        return Grade(
            score=corpus.segment_bleu(counts[self.headline]),
            extracted=text,
            values={"corpus": self.headline} | {name: list(numbers) for name, numbers in counts.items()},
            flags=flags(completion, has_answer=bool(text)),
        )

    def summarise(self, records: Iterable[Record]) -> dict[str, Metric]:
        """BLEU of the scale in force, the mean over both directions and each; then chrF2 in the same way."""
        rows = list(records)
        pairs = [pair for pair in PAIRS if any(row.group == pair for row in rows)]
        metrics: dict[str, Metric] = {}
        for label, name in (("bleu", self.headline), ("chrf2", corpus.CHRF)):
            segments = [segment_of(row, name) for row in rows]
            metrics[label] = corpus.corpus_metric(name, segments)
            for pair in pairs:
                metrics[f"{label}/{pair}"] = corpus.corpus_metric(name, [s for s in segments if s.group == pair])
        return metrics

    def describe(self) -> Mapping[str, JSON]:
        return {
            **super().describe(),
            "bleu": self.headline,
            "tokenize": TOKENIZERS[self.headline],
            "reference": "A",
            "has_documents": any(sample.cluster for sample in self.samples()),
        }


def segment_of(record: Record, name: str) -> corpus.Segment:
    counts = tuple(record.grade.values[name])
    return corpus.Segment(counts=counts, group=record.group, cluster=record.cluster or record.sample_id)


def translation_in(reply: str, *, is_chat: bool) -> str:
    """A base model's reply up to its first line break, as the harness stops there; a chat's as one line."""
    return " ".join(answer_part(reply).split()) if is_chat else cut(reply, ("\n",)).strip()


def harness_shots(rows: Sequence[tuple[str, str]], shots: int, where: str) -> list[list[int]]:
    """The examples of each row, as lm-evaluation-harness 0.3 draws them from the test set itself.

    Rows are asked in a shuffled order, and each draws one row more than it needs, in case that it draws itself.
    """
    if not 0 <= shots < len(rows):
        raise ConfigError(f"task.shots={shots}: {where} has {len(rows)} rows, and shots are drawn from the others")
    draw, order = random.Random(HARNESS_SEED), list(range(len(rows)))
    draw.shuffle(order)
    found: list[list[int]] = [[] for _ in rows]
    for i in order if shots else ():
        drawn = draw.sample(range(len(rows)), shots + 1)
        found[i] = [k for k in drawn if rows[k] != rows[i]][:shots]
    return found


def sacrebleu_folder(*, may_download: bool) -> Path | None:
    """The folder in which sacreBLEU keeps wmt22, fetched by it where that is possible."""
    from sacrebleu import utils

    folder = Path(utils.SACREBLEU_DIR) / "wmt22"
    if may_download and not (folder / "wmt22.zh-en.src").is_file():
        try:
            for pair in PAIRS:
                utils.get_source_file("wmt22", pair)
        except (Exception, SystemExit) as error:  # it leaves the process where a checksum is wrong
            logger.warning("wmt22: sacreBLEU's download failed (%s)", str(error).split("\n")[0])
    return folder if (folder / "wmt22.zh-en.src").is_file() else None


def _names(pair: str, kind: str) -> tuple[str, ...]:
    """Under which the official repository and sacreBLEU keep a file; `kind`: src, ref (A), docid."""
    source, _, target = pair.partition("-")
    if kind == "docid":
        return f"wmt22.{pair}.docid", f"generaltest2022.{pair}.docid"
    official = f"generaltest2022.{pair}." + (f"src.{source}" if kind == "src" else f"ref.A.{target}")
    folder = "sources" if kind == "src" else "references"
    own = (f"wmt22.{pair}.src",) if kind == "src" else (f"wmt22.{pair}.ref-A", f"wmt22.{pair}.ref")
    return official, f"txt/{folder}/{official}", f"{folder}/{official}", *own


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.removesuffix("\n").split("\n")]
