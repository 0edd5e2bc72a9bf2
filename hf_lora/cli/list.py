"""`hf-lora list`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .output import Json, emit, stdout, stdout_is_ours
from .push import TokenFromEnv, token_of

__all__ = ["list_"]


@app.command("list", no_args_is_help=True)
def list_(
    where: Annotated[
        str, typer.Argument(metavar="BASE|FOLDER", help="A base's id on the Hub, or a folder (which wins).")
    ],
    author: Annotated[str | None, typer.Option(help="On the Hub: only of this user or organisation.")] = None,
    search: Annotated[str | None, typer.Option(help="On the Hub: only with this in the name.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="On the Hub: at most so many, most downloaded first.")] = 20,
    token_from_env: TokenFromEnv = None,
    as_json: Json = False,
) -> None:
    """List the adapters for a base on the Hub, or those in and below a folder.

    Example: `hf-lora list HuggingFaceTB/SmolLM2-135M-Instruct --search sql` and `hf-lora list runs`
    """
    local = os.path.isdir(where) or where.startswith((".", "/", "~"))
    with stdout_is_ours():
        if local:
            if author or search:
                raise typer.BadParameter("--author and --search are for the Hub, and this is a folder.")
            from ..folders import adapters_below

            found: list[Any] = [*adapters_below(Path(where).expanduser())]
        else:
            from ..hub import list_adapters

            found = [*list_adapters(where, author=author, search=search, limit=limit, token=token_of(token_from_env))]
    if as_json:
        emit({"folder" if local else "base_model": where, "adapters": found})
    elif not found:
        stdout().print(f"No adapter {'below' if local else 'for'} {where}.", markup=False, highlight=False)
    else:
        stdout().print(_table(_LOCAL if local else _HUB, found))


_HUB = {
    "adapter": lambda a: a.repo_id,
    "downloads": lambda a: f"{a.downloads:,}",
    "likes": lambda a: f"{a.likes:,}",
    "changed": lambda a: a.last_modified.date().isoformat() if a.last_modified else "",
    "access": lambda a: ", ".join(word for word in ("private", "gated") if getattr(a, word)),
}
_LOCAL = {
    "adapter": lambda a: a.path,
    "rank": lambda a: "" if a.rank is None else str(a.rank),
    "parameters": lambda a: "" if a.parameters is None else f"{a.parameters:,}",
    "bytes": lambda a: "" if a.nbytes is None else f"{a.nbytes:,}",
    "base": lambda a: a.base_model or "",
    "problem": lambda a: a.problem or "",
}
_NUMBERS = frozenset({"downloads", "likes", "rank", "parameters", "bytes"})


def _table(columns: dict[str, Any], rows: list[Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    shown = {name: cell for name, cell in columns.items() if any(cell(row) for row in rows)}
    table = Table()
    for name in shown:
        table.add_column(name, justify="right" if name in _NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(row)) for cell in shown.values()))
    return table
