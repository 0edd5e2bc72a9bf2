"""The host tier: adapters that wait in memory, the least recently used leave first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from ..values import AdapterValue

__all__ = ["Held", "HostCache"]


@dataclass(frozen=True, eq=False)
class Held:
    """An adapter that was read and fits the model.

    Args:
        value: the adapter. nbytes: of its tensors. version: of its id, counted by `refresh`.
    """

    value: AdapterValue
    nbytes: int
    version: int = 0


class HostCache:
    """Values by id, at most `slots` of them and at most `most_bytes` in all. The pool's lock guards it.

    Args:
        slots: how many; 0 keeps none.
        most_bytes: of all tensors together; None is no limit. A value that alone is larger is not kept.
    """

    def __init__(self, slots: int, most_bytes: int | None = None) -> None:
        self.slots, self.most_bytes = slots, most_bytes
        self.nbytes = 0
        self._values: OrderedDict[str, Held] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._values

    @property
    def ids(self) -> tuple[str, ...]:
        """The least recently used first."""
        return tuple(self._values)

    def get(self, adapter_id: str) -> Held | None:
        """The value, which is now the most recently used; or None."""
        value = self._values.get(adapter_id)
        if value is not None:
            self._values.move_to_end(adapter_id)
        return value

    def add(self, adapter_id: str, value: Held) -> int:
        """Keep a value as the most recently used. Returns how many had to leave."""
        self.pop(adapter_id)
        if self.slots == 0 or (self.most_bytes is not None and value.nbytes > self.most_bytes):
            return 1
        self._values[adapter_id] = value
        self.nbytes += value.nbytes
        left = 0
        while len(self._values) > self.slots or (self.most_bytes is not None and self.nbytes > self.most_bytes):
            self.pop(next(iter(self._values)))
            left += 1
        return left

    def pop(self, adapter_id: str) -> Held | None:
        """Take a value out."""
        value = self._values.pop(adapter_id, None)
        if value is not None:
            self.nbytes -= value.nbytes
        return value

    def clear(self) -> None:
        """Take all out."""
        self._values.clear()
        self.nbytes = 0
