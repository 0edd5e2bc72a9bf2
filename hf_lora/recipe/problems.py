"""What can be wrong with a recipe, its data or its folder, as typed errors."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Any

from ..errors import LoRAError
from ..quickstart.problems import BaseNotFoundError, DataError, MissingExtraError

__all__ = ["BaseNotFoundError", "DataError", "MissingExtraError", "RecipeError", "RunFolderError", "near", "wrong"]

_LISTED = 40  # names that a message lists beside a match
_SHOWN = 200  # characters of a value that an error quotes


class RecipeError(LoRAError, ValueError):
    """A recipe says something impossible, or something that nobody knows."""


class RunFolderError(LoRAError, ValueError):
    """The output folder holds something else, another run, or cannot be written."""


def near(name: str, known: Collection[str], *, listed: str = "The keys are") -> str:
    """The remedy for a name that is not known: what was meant, and all there is."""
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    # With a match the rest of a long list is noise; it stays on the error, as `expected`.
    return f"{meant}{listed}." if close and len(known) > _LISTED else f"{meant}{listed} {', '.join(known)}."


def wrong(name: str, value: Any, expected: str, remedy: str | None = None, *, facts: Sequence[str] = ()) -> RecipeError:
    """The error that `name` has this value, quoting it."""
    shown = quoted(value)
    return RecipeError(
        f"{name}: {shown} is not {expected}.", name=name, value=value, expected=expected, remedy=remedy, facts=facts
    )


def quoted(value: Any) -> str:
    """The value as Python writes it, cut to a length that a message can hold."""
    try:
        shown = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        shown = f"a {type(value).__name__} too long to print"
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
