"""`hf-lora push`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .output import Json, emit, stdout, stdout_is_ours

__all__ = ["push", "token_of"]

TokenFromEnv = Annotated[
    str | None,
    typer.Option(
        "--token-from-env",
        metavar="VARIABLE",
        help="Read the token from this environment variable, not from `hf auth login` or HF_TOKEN.",
    ),
]


@app.command(no_args_is_help=True)
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The adapter's folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="USER/NAME on the Hub; made if it is missing.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repo. Default: as the account is set.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch; made if it is missing.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="A folder for this adapter, in a repo of several.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="The base's id on the Hub. Default: the one in the config.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Push it although it is not finite or not trained.")] = False,
    token_from_env: TokenFromEnv = None,
    as_json: Json = False,
) -> None:
    """Publish an adapter: its two files and a card, in one commit.

    Example: `hf-lora push out me/task --private`

    What FOLDER/README.md says goes into the card, and trainer_state.json beside it gives the training's numbers.
    Nothing else of the folder is pushed.
    """
    from ..adapter import LoRAAdapter
    from ..errors import LoRAFileError
    from ..facts import RunFacts
    from ..hub import CARD_NAME

    if not os.path.isdir(folder):
        raise LoRAFileError(
            f"{str(folder)!r} is no folder.", name="FOLDER", value=str(folder), remedy="Give the adapter's folder."
        )
    readme = folder / CARD_NAME
    with stdout_is_ours():
        adapter = LoRAAdapter.load(folder)
        commit = adapter.push(
            repo,
            private=private,
            token=token_of(token_from_env),
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
            card=readme if readme.is_file() else None,
            subfolder=subfolder,
            base_model=base_model,
            force=force,
            run=RunFacts.read(folder),
        )
    result = {"repo": repo, "commit": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url}
    if as_json:
        emit(result)
    else:
        stdout().print(f"Pushed: {commit.pr_url or commit.commit_url}", markup=False, highlight=False, soft_wrap=True)


def token_of(variable: str | None) -> str | None:
    """The token in an environment variable; None leaves it to huggingface_hub. The value is never shown."""
    if variable is None:
        return None
    # A token given by mistake would be in the shell's history, and must not be in a log too.
    shown = variable if variable.isidentifier() and not variable.startswith("hf_") else "what was given"
    token = os.environ.get(variable, "").strip() if shown == variable else ""
    if not token:
        raise typer.BadParameter(f"--token-from-env: {shown} is no environment variable that holds a token.")
    return token
