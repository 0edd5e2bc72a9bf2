"""Typed errors: each quotes the value that was wrong and names the remedy.

Every error is a `LoRAError` and also the built-in exception that a caller would expect (`ValueError`, `KeyError`, …),
so code that knows nothing of hf_lora still catches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "LoRAConfigError",
    "LoRAError",
    "LoRAFileError",
    "LoRAHubError",
    "LoRAMismatchError",
    "LoRANameError",
    "LoRAPoolError",
    "LoRARouteError",
    "LoRAStateError",
    "LoRATargetError",
    "LoRAUnsupportedError",
]

_SHOWN = 20  # how many facts a message spells out; all of them stay on the error


class LoRAError(Exception):
    """Base of every error that hf_lora raises.

    Args:
        message: what is wrong, quoting the value.
        name: the field, tensor, module or adapter concerned.
        value: the value that was refused.
        expected: what would have been accepted.
        remedy: what to do about it, as an imperative sentence.
        facts: further lines, one a problem (every missing tensor, say).
    """

    def __init__(
        self,
        message: str,
        *,
        name: str | None = None,
        value: Any = None,
        expected: Any = None,
        remedy: str | None = None,
        facts: Sequence[str] = (),
    ) -> None:
        self.message, self.name, self.value, self.expected = message, name, value, expected
        self.remedy, self.facts = remedy, tuple(facts)
        super().__init__(message)

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  - {fact}" for fact in self.facts[:_SHOWN]]
        if len(self.facts) > _SHOWN:
            lines.append(f"  - … and {len(self.facts) - _SHOWN} more")
        if self.remedy:
            lines.append(self.remedy)
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions with keyword-only arguments do not unpickle by default (DataLoader workers, multiprocessing).
        return (_rebuild, (type(self), self.message, {k: v for k, v in vars(self).items() if k != "message"}))


def _rebuild(cls: type[LoRAError], message: str, facts: dict[str, Any]) -> LoRAError:
    error = cls(message)
    vars(error).update(facts)
    return error


class LoRAConfigError(LoRAError, ValueError):
    """A `LoRAConfig` field, or an adapter_config.json, says something impossible."""


class LoRATargetError(LoRAError, ValueError):
    """A target, role, regex or head names nothing in the model, or something that cannot take a LoRA."""


class LoRANameError(LoRAError, KeyError):
    """No adapter of this name, or the name is taken."""

    __str__ = LoRAError.__str__  # KeyError's own would quote the whole message


class LoRAFileError(LoRAError, ValueError):
    """A file of an adapter is missing, truncated, malformed or not what its config says."""


class LoRAHubError(LoRAFileError, OSError):
    """The Hub did not give or take an adapter: nothing was loaded, or nothing pushed.

    Attributes:
        kind: which failure, in a word or two: "gated", "missing revision", "rate limited", …
        status: the HTTP status, if there was an answer.
        retry_after: seconds to wait, if the Hub said so.
    """

    kind: str = ""
    status: int | None = None
    retry_after: float | None = None


class LoRAMismatchError(LoRAError, ValueError):
    """An adapter and a model do not fit: missing, extra, mis-shaped or non-finite tensors, or another base."""


class LoRAStateError(LoRAError, RuntimeError):
    """The verb cannot be used in the model's present state (merged, routed, training)."""


class LoRAPoolError(LoRAError, RuntimeError):
    """A `LoRAPool` did not give what was asked for. Nothing of the call is left held.

    Attributes:
        kind: why, in a word or two: "failed" (an adapter could not be loaded), "too large" (over the pool's limits),
            "too many" (more adapters than device slots), "timeout", "in use", "closed".
        failures: id → the error of each adapter concerned; empty where the call as a whole was refused.
    """

    kind: str = ""
    failures: Mapping[str, LoRAError] = {}  # never changed in place


class LoRARouteError(LoRAError, ValueError):
    """A route and a batch do not fit: the number of rows, or a layer whose batch is not the rows."""


class LoRAUnsupportedError(LoRAError, NotImplementedError):
    """Something that exists elsewhere (a PEFT field, an adapter type, a layer) and that hf_lora does not compute."""
