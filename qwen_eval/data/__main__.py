"""`python -m qwen_eval.data get|list`: fetch the rows of benchmarks and checkpoints, and show what is here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from qwen_eval import cli
from qwen_eval.cli.command import INTERRUPTED, MISTAKE, tell
from qwen_eval.config import HUBS, ModelSpec, not_one_of
from qwen_eval.core import ConfigError, QwenEvalError
from qwen_eval.data.catalogue import CARDS, UNKNOWN

USAGE = """
python -m qwen_eval.data get TASK ... [model=NAME] [hub=modelscope] [revision=REVISION]
python -m qwen_eval.data list [word]

Rows of two benchmarks:   python -m qwen_eval.data get mmlu ceval
From ModelScope:          python -m qwen_eval.data get gsm8k hub=modelscope
From a mirror:            HF_ENDPOINT=https://hf-mirror.com python -m qwen_eval.data get mmlu
A checkpoint:             python -m qwen_eval.data get model=qwen-7b-chat
Any checkpoint of a hub:  python -m qwen_eval.data get model=Qwen/Qwen3-0.6B
What is here already:     python -m qwen_eval.data list

What is fetched lies in the cache of the hub's client, where runs find it. A broken download is resumed by the same
command. Layouts and licences: docs/data.md.

Exit code: 0 done, 2 a mistake or a hub that fails, 130 after Ctrl-C.
"""
COMMANDS = ("get", "list")
KEYS = ("model", "hub", "revision")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    what: str
    names: tuple[str, ...] = ()  # tasks, or a word of `list`
    models: tuple[str, ...] = ()
    hub: str = "huggingface"
    revision: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (0 done, 2 a mistake of the user or a failing hub, 130 after Ctrl-C, 141 a closed pipe)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.guarded(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    if cli.asked_of_itself(argv or ["--help"], USAGE):
        return 0
    spec = data_spec(argv)
    try:
        return _get(spec) if spec.what == "get" else _list(spec)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes the download", file=sys.stderr)
        return INTERRUPTED


def data_spec(argv: Sequence[str]) -> DataSpec:
    """ConfigError for anything but the words of `USAGE`."""
    what, *words = argv
    if what not in COMMANDS:
        raise not_one_of("data", what, COMMANDS)
    keys = dict(word.split("=", 1) for word in words if "=" in word)
    names = tuple(name for word in words if "=" not in word for name in word.split(",") if name)
    for key in keys:
        if key not in KEYS or what == "list":
            raise not_one_of(f"data {what}", key, KEYS if what == "get" else ())
    if keys.get("hub", HUBS[0]) not in HUBS:
        raise not_one_of("hub", keys["hub"], HUBS)
    flags = [name for name in names if name.startswith("-")]
    if flags:
        raise ConfigError(f"{flags[0]}: no such option; see python -m qwen_eval.data --help")
    models = tuple(name for name in keys.pop("model", "").split(",") if name)
    if what == "get" and not names and not models:
        raise ConfigError("data get: name tasks or model=, as in python -m qwen_eval.data get mmlu ceval")
    if "revision" in keys and len(names) + len(models) > 1:
        raise ConfigError(f"revision={keys['revision']}: a revision is one repository's; name one task or model")
    return DataSpec(what=what, names=names, models=models, **keys)


# --- get -------------------------------------------------------------------------------------------------------------


def _get(spec: DataSpec) -> int:
    """Fetch one after another; what fails is said, and does not keep the others from being fetched."""
    from qwen_eval.tasks.registry import TASKS

    for name in spec.names:
        if name not in TASKS:
            raise not_one_of("data get", name, sorted(TASKS))
    models = [(name, _model(name, spec)) for name in spec.models]
    code = 0
    for name, fetch in [(n, _task) for n in spec.names] + [(n, _checkpoint(model)) for n, model in models]:
        try:
            fetch(name, spec)
        except QwenEvalError as error:
            tell(str(error))
            code = MISTAKE
    return code


def _task(name: str, spec: DataSpec) -> None:
    from qwen_eval.data.hub import repository_of

    card = CARDS.get(name)
    if name.startswith("wmt22"):
        _sacrebleu(name)
        return
    if card is None or not card.files:
        print(f"{name}: nothing to fetch; {card.source if card else 'it is a task of another package'}")
        return
    hub_id = card.modelscope_id if spec.hub == "modelscope" else card.hub_id
    if hub_id is None:
        raise ConfigError(
            f"hub={spec.hub}: no copy of {name} is known there; leave hub= out, set HF_ENDPOINT to a mirror, or take "
            f"the files from {card.source}"
        )
    _fetch(name, repository_of(card, hub_id, revision=spec.revision, hub=spec.hub), card.licence)
    print(f"  python -m qwen_eval task={name}{_path_key(spec, hub_id)} model=…")


def _path_key(spec: DataSpec, hub_id: str) -> str:
    """How a run is told of it: it looks itself into the cache of the Hugging Face hub."""
    if spec.hub == "modelscope":
        return " task.path=DIR (the directory above)"
    return f" task.revision={spec.revision}" if spec.revision else ""


def _sacrebleu(name: str) -> None:
    from qwen_eval.core import DataError
    from qwen_eval.hubs.repository import is_offline
    from qwen_eval.tasks.wmt22 import sacrebleu_folder

    print(f"{name}: WMT22 by sacreBLEU", flush=True)
    folder = sacrebleu_folder(may_download=not is_offline())
    if folder is None:
        raise DataError(f"{name}: sacreBLEU cannot download it here; docs/data.md shows what task.path= takes")
    print(f"  in {folder}\n  python -m qwen_eval task={name} model=…")


def _model(name: str, spec: DataSpec) -> ModelSpec:
    """The model of a yaml, or any repository OWNER/NAME."""
    from qwen_eval.report.inventory import inherited

    if "/" in name:
        return ModelSpec(name=name, hub_id=name, modelscope_id=name, hub=spec.hub, revision=spec.revision)
    folder = cli.conf_dir()
    if not (folder / "model" / f"{name}.yaml").is_file():
        known = sorted(path.stem for path in (folder / "model").glob("*.yaml"))
        raise not_one_of("model", name, known)
    keys: dict[str, Any] = {field.name: value for field in fields(ModelSpec) if (
        value := inherited([folder], name).get(field.name)
    ) is not None}  # fmt: skip
    return ModelSpec(**keys | {"hub": spec.hub, "rope": ModelSpec().rope} | _revision(spec))


def _revision(spec: DataSpec) -> dict[str, Any]:
    return {"revision": spec.revision} if spec.revision else {}


def _checkpoint(model: ModelSpec) -> Any:
    from qwen_eval.models.hub import repository_of

    def fetch(name: str, spec: DataSpec) -> None:
        if model.asset is not None or model.path is not None:
            print(f"{name}: nothing to fetch; it is {model.path or 'in the package'}")
            return
        _fetch(name, repository_of(model))
        key = f"model.path={name}" if "/" in name else f"model={name}"
        hub = " model.hub=modelscope" if spec.hub == "modelscope" else ""
        revision = f" model.revision={spec.revision}" if spec.revision else ""
        print(f"  python -m qwen_eval {key}{hub}{revision} task=…")

    return fetch


def _fetch(name: str, repository: Any, licence: str = "") -> None:
    from qwen_eval.data.get import get
    from qwen_eval.hubs.repository import NAMES

    said = f"; licence: {licence}" if licence else ""
    print(f"{name}: {repository.id} from {NAMES[repository.hub]}{said}", flush=True)
    print(get(repository).text())


# --- list ------------------------------------------------------------------------------------------------------------


def _list(spec: DataSpec) -> int:
    """What is fetched for each benchmark, and whether it is here."""
    from qwen_eval.tables import Table, print_tables, text_cell
    from qwen_eval.tasks.registry import TASKS

    rows = []
    for name in sorted(TASKS):
        card = CARDS.get(name)
        if all(word in name for word in spec.names):
            cells = (name, card.licence if card else UNKNOWN, _place(card), card.size if card else "", _here(card))
            rows.append(tuple(text_cell(cell) for cell in cells))
    columns = ("task", "licence", "from", "size", "here")
    print_tables([Table(name="data", title="data", columns=columns, rows=tuple(rows), notes=())])
    return 0


def _place(card: Any) -> str:
    return UNKNOWN if card is None else card.hub_id or card.source


def _here(card: Any) -> str:
    """`yes` for a whole copy in the cache of the Hugging Face hub."""
    from qwen_eval.data.hub import repository_of
    from qwen_eval.hubs.snapshots import cached

    if card is None or not card.files:
        return ""
    return "yes" if cached(repository_of(card, card.hub_id, revision=None)) else "no"


if __name__ == "__main__":
    sys.exit(main())
