"""`python -m qwen_eval.profile seq=2048,8192`: speed and memory, with the ceiling beside each number."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from qwen_eval import cli
from qwen_eval.activity import stage
from qwen_eval.profile.config import ProfileSpec, check
from qwen_eval.profile.finetune import FinetuneSpec

USAGE = """
python -m qwen_eval.profile [-m] [group=option ...] [key=value ...]

Speed and memory by length:    python -m qwen_eval.profile model=qwen-7b-chat seq=2048,8192
Without a checkpoint:          python -m qwen_eval.profile model=qwen-7b-chat model.weights=random
What will it take?             python -m qwen_eval.profile plan=true model=qwen-72b-chat-int4 seq=8192
The published protocol:        python -m qwen_eval.profile profile=readme model=qwen-7b-chat
The tables of the int8 cache:  python -m qwen_eval.profile profile=kv_batch model=qwen-7b-chat
Fine-tuning:                   python -m qwen_eval.profile mode=finetune method=lora,lora_emb,qlora,full seq=256,512
Several models:                python -m qwen_eval.profile -m model=qwen-1.8b,qwen-7b seq=2048,8192
Every key with its value:      python -m qwen_eval.profile --cfg job

Exit code: 0 done, 2 a mistake, 130 Ctrl-C (the same command measures what is missing).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (0 done, 2 the user's mistake, 130 Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if any(argument.partition("=")[2] == "finetune" for argument in argv if argument.startswith("mode=")):
        return cli.run(argv, config_name="finetune", schema=FinetuneSpec, job=finetune, usage=USAGE)
    return cli.run(argv, config_name="profile", schema=ProfileSpec, job=profile, usage=USAGE)


def profile(spec: ProfileSpec) -> None:
    """Plan or measure one grid and print its tables."""
    spec.tag = cli.cell_tag(spec.tag)
    check(spec)
    if spec.plan:
        with stage(f"planning for {spec.on or 'this device'}"):
            text = plan(spec)
        sys.stdout.write(text)
        return
    with stage(f"preparing to measure {spec.model.name}"):
        from qwen_eval.profile.grid import run_grid
        from qwen_eval.report.profile import run_tables, write_plots, write_tables
        from qwen_eval.tables import print_tables

    path = run_grid(spec, shown=partial(write_tables, published=spec.published))
    print_tables(run_tables(path, published=spec.published))
    with stage("drawing the figures"):
        plots = [plot.name for plot in write_plots(path)]
    print(f"{path}: {', '.join(['result.json', 'profile.md', 'profile.csv', 'profile.tex', *plots])}")


def finetune(spec: FinetuneSpec) -> None:
    """Plan or measure fine-tuning, and print the tables."""
    from qwen_eval.profile import finetune as tuning
    from qwen_eval.report.finetune import plan_text, print_run

    tuning.check(spec)
    if spec.plan:
        print(plan_text(spec), end="")
        return
    print_run(tuning.run_grid(spec), published=spec.published)


def plan(spec: ProfileSpec) -> str:
    """The tables of the plan, for this device or the one that `on` names."""
    import torch

    from qwen_eval.models.device import DTYPES, probe
    from qwen_eval.models.load import choose_device, choose_dtype
    from qwen_eval.models.machine import known
    from qwen_eval.models.quant.formats import quant_format
    from qwen_eval.models.quant.kernels import has_packed
    from qwen_eval.profile.cells import quant_of, shape_fields
    from qwen_eval.profile.plan import plan_tables, texts

    if spec.num_threads is not None:
        torch.set_num_threads(spec.num_threads)
    where = torch.device("cuda") if spec.on else choose_device(spec.model.device)
    packed = quant_format(quant_of(spec.model)).is_stored
    if spec.on and packed and spec.model.dtype == "auto":
        dtype = torch.bfloat16  # as on any GPU of the table: their kernels for packed weights take nothing else
    else:
        fields = shape_fields(spec.model)
        dtype = choose_dtype(spec.model.dtype, fields, where, is_packed=packed and not spec.on)
    name = next(name for name, known_dtype in DTYPES.items() if known_dtype == dtype)
    if spec.on:
        return texts(plan_tables(spec, known(spec.on, name), is_packed=name == "bf16"))
    return texts(plan_tables(spec, probe(where, name), is_packed=has_packed(dtype, where)))


if __name__ == "__main__":
    sys.exit(main())
