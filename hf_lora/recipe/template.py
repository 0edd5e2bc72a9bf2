"""Texts with columns in braces: "Question: {question}". Only a column's name may stand there, and nothing is evaluated.

`str.format` would look up attributes and items ("{row.__class__}"); here the braces are parsed and the values put in.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .problems import RecipeError, wrong

__all__ = ["Template"]


@dataclass(frozen=True)
class Template:
    """Literal texts and, after each, the column whose value follows (None at the end)."""

    source: str
    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, name: str, source: str) -> Template:
        """Read a template. Raises `RecipeError` for anything but columns in braces; `{{` and `}}` are braces."""
        try:
            parsed = list(string.Formatter().parse(source))
        except ValueError as error:
            raise RecipeError(
                f"{name}: {source!r} is no template: {error}.",
                name=name,
                value=source,
                remedy="Write {column} for a column, and {{ or }} for a brace.",
            ) from error
        parts: list[tuple[str, str | None]] = []
        for literal, column, spec, conversion in parsed:
            if column is not None and (not column or spec or conversion):
                raise wrong(
                    name,
                    source,
                    "a template: braces hold a column's name and nothing else",
                    "Write {column}, and {{ or }} for a brace.",
                )
            parts.append((literal, column))
        if not any(column for _, column in parts):
            raise wrong(
                name,
                source,
                "a template that names a column",
                f'Write "{{{source}}}" for the column {source!r}.' if source.isidentifier() else "Write {column}.",
            )
        return cls(source, tuple(parts))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names, each once."""
        return tuple(dict.fromkeys(column for _, column in self.parts if column is not None))

    def render(self, row: Mapping[str, Any]) -> str:
        """The text for a row whose values are strings or numbers."""
        return "".join(literal + ("" if column is None else str(row[column])) for literal, column in self.parts)
