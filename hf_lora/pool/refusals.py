"""The pool's errors, one function each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LoRAError, LoRAFileError, LoRAPoolError

__all__ = ["as_ours", "closed", "failed", "full", "in_use", "timed_out", "too_large", "too_many"]

_NAMED = 5  # ids that a message spells out


def _refused(kind: str, message: str, **facts: Any) -> LoRAPoolError:
    error = LoRAPoolError(message, **facts)
    error.kind = kind
    return error


def _names(ids: Sequence[str]) -> str:
    rest = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(map(repr, ids[:_NAMED])) + rest


def as_ours(error: BaseException, adapter_id: str) -> LoRAError:
    """An error of ours as it is, any other as the cause of one."""
    if isinstance(error, LoRAError):
        return error
    ours = LoRAFileError(
        f"The source failed on {adapter_id!r}: {type(error).__name__}: {error}",
        name=adapter_id,
        value=adapter_id,
        remedy="Ask again: a failure is not remembered.",
    )
    ours.__cause__ = error
    return ours


def closed() -> LoRAPoolError:
    """The pool is closed."""
    return _refused("closed", "The pool is closed.", remedy="Make another pool.")


def failed(failures: Mapping[str, LoRAError]) -> LoRAPoolError:
    """Adapters of a batch could not be loaded; the first one's error is the cause."""
    ids = list(failures)
    error = _refused(
        "failed",
        f"{len(ids)} of the batch's adapters cannot be used: {_names(ids)}.",
        name=ids[0],
        value=ids,
        facts=[f"{adapter_id}: {failure.message}" for adapter_id, failure in failures.items()],
        remedy="Run the other rows without them; acquire(strict=False) holds those that can be used.",
    )
    error.failures = dict(failures)
    error.__cause__ = failures[ids[0]]
    return error


def full(adapter_id: str, slots: int) -> LoRAPoolError:
    """No slot can be freed, as adapters are held outside the pool."""
    return _refused(
        "full",
        f"No device slot can be freed for {adapter_id!r}: what the {slots} hold trains, is the model's default, or is "
        "used by blocks outside the pool.",
        name=adapter_id,
        remedy="Use the pool's own route() and use(); set_lora(None); train adapters under names of their own.",
    )


def in_use(ids: Sequence[str]) -> LoRAPoolError:
    """Adapters that cannot be taken off the device."""
    return _refused(
        "in use",
        f"{_names(ids)} cannot be taken off: held by a request, or pinned.",
        value=list(ids),
        remedy="Let the requests end, and unpin() what is pinned.",
    )


def timed_out(ids: Sequence[str], reading: bool) -> LoRAPoolError:
    """A request waited too long for its adapters to be read, or for device slots."""
    why = f"{_names(ids)} was not read in time" if reading else f"No device slots were free in time for {_names(ids)}"
    remedy = "give more loaders or a longer timeout" if reading else "use smaller batches, or more device_slots"
    return _refused("timeout", f"{why}.", value=list(ids), remedy=f"Try again, {remedy}.")


def too_large(adapter_id: str, limit: str, what: str, value: int, most: int) -> LoRAPoolError:
    """An adapter is over a limit of the pool."""
    return _refused(
        "too large",
        f"The adapter {adapter_id!r} has {what}, over the pool's {limit}={most:,}.",
        name=limit,
        value=value,
        expected=f"at most {most:,}",
        remedy=f"Make the pool with a larger {limit}, or the adapter smaller.",
    )


def too_many(count: int, slots: int, pinned: int) -> LoRAPoolError:
    """A batch names more adapters than there will ever be slots for."""
    others = f", {pinned} of them pinned to others" if pinned else ""
    return _refused(
        "too many",
        f"{count} adapters are asked for together; the pool has {slots} device slots{others}.",
        value=count,
        expected=slots - pinned,
        remedy="Split the batch, unpin() some, or make the pool with more device_slots.",
    )
