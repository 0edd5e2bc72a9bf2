"""`trainable_token_indices` of a config: its checks, and the token ids of one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import LoRAConfigError
from .fields import FrozenMapping, integer, wrong

__all__ = ["ROWS", "checked", "ids_of", "refuse_twice"]

NAME = "trainable_token_indices"
ROWS = "token_adapter.trainable_tokens_delta"  # PEFT's name, below the module, of the rows: (n, d)

TokenIds = tuple[int, ...]


def checked(value: Any) -> TokenIds | FrozenMapping[str, TokenIds] | None:
    """None, token ids, or a read-only map from modules' names to token ids.

    Raises:
        LoRAConfigError: it is none of these, or names a token twice.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        if not value or not all(isinstance(key, str) and key.strip() for key in value):
            raise wrong(NAME, dict(value), "a list of token ids, or a mapping from modules' names to such lists")
        return FrozenMapping((key, _ids(f"{NAME}[{key!r}]", ids)) for key, ids in value.items())
    return _ids(NAME, value)


def _ids(name: str, value: Any) -> TokenIds:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise wrong(name, value, "a non-empty list of token ids")
    ids = tuple(integer(f"{name}[{i}]", item, least=0) for i, item in enumerate(value))
    twice = sorted({item for item in ids if ids.count(item) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise wrong(name, list(ids), "a list without duplicates", f"Name {', '.join(map(str, twice))} once.")
    return ids


def ids_of(indices: Any, path: str) -> TokenIds | None:
    """The token ids of the module at `path` in a checked value; a key names the end of a path, as in PEFT."""
    found: TokenIds | None = indices
    if isinstance(indices, Mapping):
        found = next((ids for key, ids in indices.items() if path.endswith(key)), None)
    return found


def refuse_twice(config: Mapping[str, Any]) -> None:
    """Raise `LoRAConfigError` if a module is to train whole and by single rows."""
    indices, whole = config[NAME], config["modules_to_save"] or ()
    if isinstance(indices, Mapping) and (both := sorted(set(indices) & set(whole))):
        raise LoRAConfigError(
            f"{NAME} and modules_to_save both name {', '.join(map(repr, both))}: it trains whole, or by single rows.",
            name=NAME,
            value={key: list(ids) for key, ids in indices.items()},
            remedy="Leave it out of one of them.",
        )
