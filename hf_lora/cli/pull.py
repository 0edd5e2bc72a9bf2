"""`hf-lora pull`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .output import Json, emit, stdout, stdout_is_ours
from .push import TokenFromEnv, token_of

__all__ = ["pull"]


@app.command(no_args_is_help=True)
def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="USER/NAME on the Hub.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to write it. Default: the repo's (or subfolder's) name."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit. Default: main.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Where in the repo the adapter is.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is in the folder.")] = False,
    token_from_env: TokenFromEnv = None,
    as_json: Json = False,
) -> None:
    """Fetch an adapter from the Hub, check it, and write its two files into a folder.

    Example: `hf-lora pull me/task --out task --revision v1`
    """
    from ..adapter import LoRAAdapter
    from ..errors import LoRAFileError
    from ..store import CONFIG_NAME

    folder = out or Path((subfolder or repo).rstrip("/").rpartition("/")[2])
    if os.path.exists(folder / CONFIG_NAME) and not force:
        raise LoRAFileError(
            f"{str(folder)!r} holds an adapter.",
            name="--out",
            value=str(folder),
            remedy="Choose another --out, or replace it with --force.",
        )
    with stdout_is_ours():
        adapter = LoRAAdapter.pull(repo, revision=revision, subfolder=subfolder, token=token_of(token_from_env))
        adapter.save(folder)
    result = {
        "repo": repo,
        "folder": folder,
        "base_model": adapter.config.base_model,
        "rank": adapter.config.r,
        "parameters": adapter.num_parameters,
        "nbytes": adapter.nbytes,
    }
    if as_json:
        emit(result)
        return
    said = f"{repo} is in {folder}: rank {adapter.config.r}, {adapter.num_parameters:,} parameters"
    stdout().print(f"{said}, for {adapter.config.base_model}.", markup=False, highlight=False, soft_wrap=True)
