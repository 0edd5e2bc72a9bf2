"""The command `hf-lora`: a thin file for each command, which imports what it calls when it runs."""

from . import (  # noqa: F401  # importing a command's file adds it to the app
    analyze,
    demo,
    export,
    extract,
    import_,
    info,
    list,  # noqa: A004  # the command's own name
    merge,
    plan,
    pull,
    push,
    quickstart,
    train,
)
from .app import app

__all__ = ["app", "main"]


def main() -> None:
    """The entry point."""
    app()
