"""What a command prints: one JSON object for a script, or tables for a person; notes go to stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

__all__ = ["Json", "emit", "stderr", "stdout", "stdout_is_ours"]

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, errors too, and everything else on stderr.")
]


_WIDE = 160  # columns of a table that goes into a file or a pipe, where nothing has to fit a window


def stdout() -> Any:
    """A rich Console for results."""
    return _console(stderr=False)


def stderr() -> Any:
    """A rich Console for progress and notes."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Any:
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE
    return console


def emit(result: Any) -> None:
    """Print a result as one JSON object; what JSON has no number for (NaN, infinity) becomes null."""
    typer.echo(json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date):  # and so a datetime
        return value.isoformat()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@contextlib.contextmanager
def stdout_is_ours() -> Iterator[None]:
    """Within, what libraries print goes to stderr: stdout carries the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
