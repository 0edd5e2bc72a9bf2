"""`hf-lora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .output import Json, emit, stderr, stdout, stdout_is_ours
from .push import TokenFromEnv, token_of

__all__ = ["merge"]


@app.command(no_args_is_help=True)
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter: a folder, or a repo's id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; it must not hold anything.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="ID_OR_FOLDER", help="The base model. Default: the one that the adapter names."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="bf16|fp16|fp32", help="Of the merged model. Default: the base's.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of each file of weights.")] = "5GB",
    force: Annotated[
        bool, typer.Option("--force", help="Merge although the adapter names another base; shapes are still checked.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="The adapter's revision on the Hub.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Where in the folder or repo the adapter is.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="The base's revision on the Hub.")] = None,
    token_from_env: TokenFromEnv = None,
    as_json: Json = False,
) -> None:
    """Write base + adapter as a model folder that any tool loads, without an adapter.

    Works tensor by tensor, so a model larger than the memory merges. The folder appears when it is complete.

    Example: `hf-lora merge me/task task-merged --dtype bf16`
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ..export import merge_to_folder

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with stdout_is_ours(), Progress(*columns, console=stderr(), disable=as_json, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def progress(file: str, done: int, total: int) -> None:
            bar.update(task, description=file, completed=done, total=total)

        report = merge_to_folder(
            adapter,
            out,
            base,
            dtype=dtype,
            max_shard_size=max_shard_size,
            force=force,
            progress=progress,
            base_revision=base_revision,
            revision=revision,
            subfolder=subfolder,
            token=token_of(token_from_env),
        )
    if as_json:
        emit(report)
    else:
        _print(report)


def _print(report: Any) -> None:
    console = stdout()
    heads = f", {len(report.replaced)} biases and head tensors replaced" if report.replaced else ""
    size = f"{report.parameters:,} parameters, {report.nbytes / 1e9:.2f} GB in {report.dtype}"
    console.print(f"{report.out}: {report.architecture}, {size}", soft_wrap=True, highlight=False, markup=False)
    revision = f" at {report.revision}" if report.revision else ""
    console.print(
        f"{report.base}{revision}: ΔW added to {len(report.merged)} of {report.tensors} tensors{heads}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if report.dropped:
        console.print(
            f"left out, as {report.architecture} has no use for them: {', '.join(report.dropped)}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
