"""`hf-lora plan`."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated, Any

import typer

from .app import app
from .output import Json, emit, stderr, stdout, stdout_is_ours
from .train import DType, targets_of

__all__ = ["plan"]


@app.command(no_args_is_help=True)
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_CONFIG", help="A model's id on the Hub, a folder, or a config.json.")
    ],
    r: Annotated[int | None, typer.Option(help="The rank.", show_default="8, or what the budget allows")] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Roles or module names with commas between (q,v), or all-linear.",
            show_default="the model's usual ones",
        ),
    ] = None,
    dropout: Annotated[float, typer.Option(help="On the adapter's input, while training.")] = 0.0,
    task_type: Annotated[
        str | None, typer.Option(metavar="CAUSAL_LM|SEQ_CLS|…", help="PEFT's word for the task; it chooses the head.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 1,
    length: Annotated[int | None, typer.Option(help="Tokens of a row.", show_default="512")] = None,
    dtype: Annotated[DType, typer.Option(help="Of the base's weights; auto: as its config says.")] = DType.auto,
    optimizer: Annotated[str, typer.Option(help="As Trainer calls it: adamw, sgd, adafactor, …")] = "adamw",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again in the backward.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="cuda|cpu", help="Whose kernels to assume.")] = "cuda",
    budget: Annotated[
        int | None, typer.Option(help="Trainable parameters at most: proposes which matrices, at which rank.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what training a LoRA takes: parameters, bytes of the file, memory of a step. No weights are read.

    Example: `hf-lora plan meta-llama/Llama-3.1-8B --targets q,v --r 8 --batch 4 --length 1024 --dtype bfloat16`
    """
    from ..config import LoRAConfig
    from ..planning import plan as run

    if budget is not None and r is not None:
        raise typer.BadParameter("--budget and --r exclude each other: a budget proposes the rank.")
    with stdout_is_ours():
        config = LoRAConfig(
            r=8 if r is None else r,
            target_modules=None if targets is None else targets_of(targets),
            dropout=dropout,
            task_type=task_type,
        )
        found = run(
            _config(model),
            config,
            batch=batch,
            length=length,
            optimizer=optimizer,
            dtype=dtype.value,
            budget=budget,
            gradient_checkpointing=gradient_checkpointing,
            device=device,
        )
    if as_json:
        emit(_plain(found))
    else:
        _print(found)


def _config(model: str) -> Any:
    """What to plan for. The quickstart's base is also found in the package that carries it."""
    from ..planning.skeleton import read_config
    from ..quickstart import base as known

    if model == known.HUB_ID and not os.path.exists(model):
        loading = known.find_base().loading
        return read_config(loading.pop("pretrained_model_name_or_path"), **loading)
    return read_config(model)


def _plain(found: Any) -> dict[str, Any]:
    """The plan's fields, with each config as adapter_config.json would say it."""
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    fields["lora_config"] = found.lora_config.to_peft()
    fields["proposals"] = [
        {"targets": p.targets, "r": p.r, "parameters": p.parameters, "lora_config": p.lora_config.to_peft()}
        for p in found.proposals
    ]
    return {"format": 1, **fields}


def _print(found: Any) -> None:
    from rich.table import Table

    from ..planning.result import size

    console = stdout()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    say(f"{found.model}: {found.base_parameters:,} parameters in {found.dtype}")
    targets = ", ".join(f"{name} × {n}" for name, n in found.targets.items())
    say(f"r={found.lora_config.r} on {targets}: {found.trainable_parameters:,} train ({found.trainable_share:.3%})")
    again = ", activations computed again" if found.gradient_checkpointing else ""
    say(f"a step of {found.batch} × {found.length} with {found.optimizer} on {found.device}{again}:")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    for label, nbytes in found.rows():
        table.add_row(label, size(nbytes), "" if nbytes is None else f"{nbytes:,} bytes")
    console.print(table)
    if found.proposals:
        say("within the budget, the first is the one above:")
        for proposal in found.proposals:
            say(f"  {proposal}")
    for note in found.notes:
        stderr().print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)
