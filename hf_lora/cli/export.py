"""`hf-lora export`: a command for each format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .output import Json, emit, stdout, stdout_is_ours
from .push import TokenFromEnv, token_of

__all__ = ["export_app"]

export_app = typer.Typer(help="Write an adapter in another format.", no_args_is_help=True)
app.add_typer(export_app, name="export")


@export_app.callback()
def _formats() -> None:
    """Write an adapter in another format."""


@export_app.command(no_args_is_help=True)
def gguf(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter: a folder, or a repo's id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="ID_OR_FOLDER", help="The base, of which the config is read. Default: the adapter's."),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="f32|f16|bf16", help="Of the tensors.")] = "f32",
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT, and write although the adapter names another base.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="The adapter's revision on the Hub.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Where in the folder or repo the adapter is.")] = None,
    token_from_env: TokenFromEnv = None,
    as_json: Json = False,
) -> None:
    """A GGUF LoRA, for `llama-cli -m base.gguf --lora OUT`.

    Example: `hf-lora export gguf me/task task.gguf --dtype f16`
    """
    from ..adapter import LoRAAdapter
    from ..errors import LoRAFileError
    from ..export import to_gguf

    if os.path.exists(out) and not force:
        raise LoRAFileError(
            f"{str(out)!r} exists.",
            name="OUT",
            value=str(out),
            remedy="Choose another name, or replace it with --force.",
        )
    with stdout_is_ours():
        value = LoRAAdapter.load(adapter, revision=revision, subfolder=subfolder, token=token_of(token_from_env))
        report = to_gguf(value, out, base, dtype=dtype, force=force)
    if as_json:
        emit(report)
        return
    said = (
        f"{report.path}: {report.tensors} tensors in {report.dtype}, {report.nbytes:,} bytes, for {report.architecture}"
    )
    stdout().print(said, markup=False, highlight=False, soft_wrap=True)
