"""What a deployment is made of, and what it allows a request."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import LoRAConfigError

if TYPE_CHECKING:
    from ..pool.sources import SourceLike

__all__ = ["LEAST", "Base", "Limits", "Settings"]

Base = str | os.PathLike[str] | Callable[[], tuple[Any, Any]]
"""An id or a folder, or a function that makes the model and its tokenizer."""

LEAST = {
    "device_slots": 1,
    "host_slots": 0,
    "max_batch_size": 1,
    "batch_wait_timeout_s": 0,
    "max_new_tokens": 1,
    "max_prompt_tokens": 1,
    "max_body_bytes": 1,
}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for. base_name: what it calls the base alone, if that has a name."""

    base_name: str | None
    max_new_tokens: int
    max_body_bytes: int


@dataclass(frozen=True)
class Settings:
    """As `build` documents them; checked."""

    base: Base
    source: SourceLike
    name: str | None = None
    device_slots: int = 32
    host_slots: int = 256
    max_batch_size: int = 32
    batch_wait_timeout_s: float = 0.01
    max_new_tokens: int = 256
    max_prompt_tokens: int | None = None
    max_body_bytes: int = 2**20
    pool_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (callable(self.base) or (isinstance(self.base, str | os.PathLike) and os.fspath(self.base))):
            raise _impossible("base", self.base, "an id, a folder, or a function that makes model and tokenizer")
        if self.name is not None and not isinstance(self.name, str):
            raise _impossible("name", self.name, "a string")
        if not isinstance(self.pool_options, Mapping):
            raise _impossible("pool_options", self.pool_options, "a mapping of LoRAPool's arguments")
        for name, least in LEAST.items():
            value = getattr(self, name)
            kinds = (int, float) if name == "batch_wait_timeout_s" else (int,)
            if value is None and name == "max_prompt_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
                raise _impossible(name, value, f"{'a number' if float in kinds else 'an integer'}, at least {least}")

    @property
    def limits(self) -> Limits:
        """What the ingress has to know."""
        name = self.name if self.name is not None or callable(self.base) else os.fspath(self.base)
        return Limits(name, self.max_new_tokens, self.max_body_bytes)


def _impossible(name: str, value: object, expected: str) -> LoRAConfigError:
    return LoRAConfigError(
        f"{name}={value!r} is impossible for a deployment.",
        name=name,
        value=value,
        expected=expected,
        remedy=f"Give another {name}.",
    )
