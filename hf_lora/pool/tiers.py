"""What is where, and who holds it: the pool's books. No model and no thread; its lock is held for every call."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..state import Entry
from .hostcache import Held, HostCache
from .metrics import Counters

__all__ = ["Resident", "Tiers", "Waiter"]


@dataclass(eq=False)
class Resident:
    """An adapter in a device slot."""

    entry: Entry
    held: Held


@dataclass(eq=False)
class Waiter:
    """A batch that waits for device slots; its future is True once it holds its leases, False if it never will."""

    ids: tuple[str, ...]
    future: Future[bool] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Tiers:
    """Device slots, host memory, leases, and the queue for slots.

    A batch gets all its slots at once or waits, first come, first served: so two batches never hold a part each and
    wait for the other's. What is held, together with what is pinned, is never more than the slots; so whoever holds a
    lease finds a slot, free or of an adapter that nobody holds.

    An adapter is in one tier at a time: what leaves the device goes to host memory as the most recently used.
    """

    def __init__(self, slots: int, host: HostCache) -> None:
        self.lock = threading.Condition(threading.Lock())  # never held while anything is read, placed or waited for
        self.slots, self.host = slots, host
        self.device: OrderedDict[str, Resident] = OrderedDict()  # the least recently used first
        self.leases: dict[str, int] = {}
        self.pinned: set[str] = set()
        self.versions: dict[str, int] = {}
        self.queue: deque[Waiter] = deque()
        self.count = Counters()
        self.closed = False

    # ---- looking up --------------------------------------------------------------------------------------------------

    def version(self, adapter_id: str) -> int:
        """How often it was refreshed."""
        return self.versions.get(adapter_id, 0)

    def resident(self, adapter_id: str) -> Resident | None:
        """What is in a device slot; not what was removed from the model by hand."""
        found = self.device.get(adapter_id)
        if found is not None and not found.entry.alive:
            del self.device[adapter_id]
            return None
        return found

    def ready(self, adapter_id: str) -> Resident | None:
        """What is in a device slot, in the version of the last `refresh`."""
        found = self.resident(adapter_id)
        return found if found is not None and found.held.version == self.version(adapter_id) else None

    @property
    def held(self) -> set[str]:
        """Everything that somebody holds."""
        return self.leases.keys() | self.pinned

    # ---- leases ------------------------------------------------------------------------------------------------------

    def wait(self, ids: Sequence[str]) -> Waiter:
        """Queue a batch for its leases; one that needs none (rows of the base alone) does not wait."""
        waiter = Waiter(tuple(ids))
        if waiter.ids:
            self.queue.append(waiter)
            self.admit()
        else:
            waiter.future.set_result(True)
        return waiter

    def withdraw(self, waiter: Waiter) -> None:
        """Give up: leave the queue, or let go what was given meanwhile."""
        if not waiter.future.done():
            self.queue.remove(waiter)
            waiter.future.set_result(False)
            self.admit()
        elif waiter.future.result():
            self.release(waiter.ids)

    def admit(self) -> None:
        """Give the first of the queue their leases, as far as the slots go."""
        while self.queue and self._fits(self.queue[0].ids):
            waiter = self.queue.popleft()
            for adapter_id in waiter.ids:
                self.leases[adapter_id] = self.leases.get(adapter_id, 0) + 1
            self.count.wait.add(time.monotonic() - waiter.since)
            waiter.future.set_result(True)

    def _fits(self, ids: Iterable[str]) -> bool:
        taken = len(self.leases) + sum(1 for adapter_id in self.pinned if adapter_id not in self.leases)
        for adapter_id in ids:
            if adapter_id in self.leases:
                if adapter_id in self.device and self.ready(adapter_id) is None:
                    return False  # refreshed while in use: the new version comes when the old one is let go
            elif adapter_id not in self.pinned:
                taken += 1
        return taken <= self.slots

    def release(self, ids: Iterable[str]) -> None:
        """Let leases go."""
        for adapter_id in ids:
            left = self.leases[adapter_id] - 1
            if left:
                self.leases[adapter_id] = left
            else:
                del self.leases[adapter_id]
        self.admit()
        self.lock.notify_all()

    def refuse_waiting(self) -> None:
        """Nobody in the queue gets anything."""
        for waiter in self.queue:
            waiter.future.set_result(False)
        self.queue.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.device.clear()
        self.pinned.clear()
        self.host.clear()

    # ---- slots -------------------------------------------------------------------------------------------------------

    def full(self) -> bool:
        """Whether every slot has an adapter."""
        return len(self.device) >= self.slots

    def make_room(self, evictable: Callable[[Entry], bool]) -> tuple[str, Resident] | None:
        """Take the least recently used adapter that nobody holds off the device's books, into host memory."""
        for adapter_id, found in self.device.items():
            if adapter_id in self.leases or adapter_id in self.pinned or not evictable(found.entry):
                continue
            del self.device[adapter_id]
            if found.held.version == self.version(adapter_id):
                self.keep(adapter_id, found.held)
            return adapter_id, found
        return None

    def restore(self, adapter_id: str, found: Resident) -> None:
        """Undo `make_room`: it could not be taken off the model."""
        self.host.pop(adapter_id)
        self.device[adapter_id] = found

    def keep(self, adapter_id: str, held: Held) -> None:
        """Into host memory, as the most recently used."""
        if not self.closed:
            self.count.host_evictions += self.host.add(adapter_id, held)
