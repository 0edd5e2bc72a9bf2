"""The application that the commands add themselves to, and how an error leaves it.

Exit codes: 0 done; 1 the result is not what was hoped for, or an unexpected failure; 2 a mistake, and the message says
how to mend it; 130 interrupted. With `--json` an error is {"error": {type, message, remedy}} on stdout, and the code is
the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from ..errors import LoRAError
from .output import emit

__all__ = ["app"]

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
_AS_JSON = "hf_lora.json"  # in the context: whether the result is asked for as JSON


class Rendered(TyperGroup):
    """Renders what a command raises by the table; `--debug` lets it through with its traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Read here, as a mistake in an option is raised before the command's own options are known.
        ctx.meta[_AS_JSON] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except _CLICK_EXCEPTION as error:
            if not ctx.meta[_AS_JSON]:
                raise
            _emit_error(type(error).__name__, error.format_message(), "See the command's --help.")
            raise typer.Exit(error.exit_code) from None
        except BaseException as error:
            if ctx.params.get("debug"):
                raise
            row = next((row for row in RENDERINGS if isinstance(error, row.kind)), None)
            if row is None:
                raise
            if ctx.meta[_AS_JSON]:
                facts = "".join(f"\n{fact}" for fact in getattr(error, "facts", ()))
                said = f"{error.message}{facts}" if isinstance(error, LoRAError) else row.body(error)
                _emit_error(type(error).__name__, said, getattr(error, "remedy", None))
            else:
                typer.secho(row.heading, fg="red", bold=True, nl=False, err=True)
                typer.echo(row.body(error), err=True)
            raise typer.Exit(row.code) from None


def _emit_error(kind: str, message: str, remedy: str | None) -> None:
    emit({"error": {"type": kind, "message": message, "remedy": remedy}})


app = typer.Typer(
    cls=Rendered,
    name="hf-lora",
    help="LoRA for every transformers model.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

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
