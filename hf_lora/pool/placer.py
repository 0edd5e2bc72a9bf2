"""Adapters into device slots and out of them: on one thread, so that one at a time changes the model's layers."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from torch import nn

from .. import model as placing
from ..errors import LoRAError, LoRAStateError
from ..state import Entry
from .hostcache import Held
from .refusals import as_ours, closed, full
from .tiers import Resident, Tiers
from .workers import DEMAND, Job, Workers

__all__ = ["Placer"]


@dataclass
class _Placing:
    job: Job[LoRAError | None]
    held: Held


class Placer:
    """Puts adapters on the model and takes them off.

    Args:
        structure: held while the model's layers are changed.
    """

    def __init__(self, model: nn.Module, tiers: Tiers, structure: threading.RLock, rank: int | None) -> None:
        self.model, self.tiers = model, tiers
        self.workers = Workers(1, "hf_lora-pool-place")
        self.placing: dict[str, _Placing] = {}  # what is under way; the books' lock guards it
        self.owned: dict[str, Entry] = {}  # what is on the model because of the pool; the same
        self._structure = structure
        if rank is not None:  # room for every slot at once, so that none is moved while others run
            state = placing.state_of(model)
            placing.reserve(model, tiers.slots + (0 if state is None else len(state.entries)), rank)

    def foreign(self, adapter_id: str) -> bool:
        """Whether the user put an adapter of this name on the model. The books' lock is held."""
        state = placing.state_of(self.model)
        entry = None if state is None else state.entries.get(adapter_id)
        return entry is not None and self.owned.get(adapter_id) is not entry and adapter_id not in self.placing

    def place(self, adapter_id: str, held: Held, old: Resident | None, priority: int) -> Job[LoRAError | None]:
        """The placing of this adapter that is under way, or a new one. The books' lock is held.

        Whoever needs it must look afterwards: one that no request holds any more is placed only if a slot is free.

        Args:
            old: an earlier version, to be taken off first.
        """
        found = self.placing.get(adapter_id)
        if found is None:
            made: Job[LoRAError | None] = Job(lambda: self._place(adapter_id, held, old), closed)
            found = self.placing[adapter_id] = _Placing(made, held)
        elif priority != DEMAND:
            return found.job
        self.workers.submit(found.job, priority)
        return found.job

    def _place(self, adapter_id: str, held: Held, old: Resident | None) -> LoRAError | None:
        begin = time.monotonic()
        error: LoRAError | None = None
        entry: Entry | None = None
        try:
            with self._structure:
                if old is not None and old.entry.alive:
                    self.remove(adapter_id)
                    old = None
                if self._make_room(adapter_id):
                    placing.put(self.model, held.value, adapter_id, active=False)
                    entry = placing.require(self.model).entry(adapter_id)
        except BaseException as failure:  # noqa: BLE001  # whatever it is, its requests hear of it
            error = as_ours(failure, adapter_id)
        with self.tiers.lock:
            tiers = self.tiers
            del self.placing[adapter_id]
            if entry is not None:
                self.owned[adapter_id] = entry
                tiers.device[adapter_id] = Resident(entry, held)
                tiers.host.pop(adapter_id)
                tiers.count.placed += 1
                tiers.count.place.add(time.monotonic() - begin)
            elif error is not None:
                tiers.count.failed(adapter_id, error.message)
                if old is not None:  # it could not be taken off: somebody uses it outside the pool
                    tiers.device[adapter_id] = old
        return error

    def _make_room(self, adapter_id: str) -> bool:
        """Free a slot; False if no request holds the adapter and every slot is spoken for.

        Raises:
            LoRAPoolError: a request holds it, and no slot can be freed.
        """
        while True:
            with self.tiers.lock:
                tiers = self.tiers
                wanted = adapter_id in tiers.leases
                if not wanted and (tiers.queue or len(tiers.held) >= tiers.slots):
                    return False
                if not tiers.full():
                    return True
                victim = tiers.make_room(self._evictable)
                if victim is None:
                    if wanted:
                        raise full(adapter_id, tiers.slots)
                    return False
            try:
                if victim[1].entry.alive:  # else it was removed by hand
                    self.remove(victim[0])
            except LoRAStateError:  # a use_lora() outside the pool came in between
                with self.tiers.lock:
                    self.tiers.restore(*victim)
            else:
                with self.tiers.lock:
                    self.tiers.count.evictions += 1

    def _evictable(self, entry: Entry) -> bool:
        state = placing.state_of(self.model)
        default = state is not None and entry in state.default.entries
        return not (entry.users or entry.trainable or default)

    def take_off(self, adapter_id: str, found: Resident) -> Job[LoRAError | None]:
        """Remove an adapter that is off the books already; it is back on them if that fails."""

        def run() -> LoRAError | None:
            try:
                if found.entry.alive:
                    self.remove(adapter_id)
            except LoRAError as error:
                with self.tiers.lock:
                    self.tiers.device.setdefault(adapter_id, found)
                return error
            return None

        job: Job[LoRAError | None] = Job(run, closed)
        self.workers.submit(job)
        return job

    def remove(self, adapter_id: str) -> None:
        """Take an adapter off the model. Raises `LoRAStateError` while a block outside the pool uses it."""
        with self._structure:
            placing.remove(self.model, adapter_id)
        with self.tiers.lock:
            self.owned.pop(adapter_id, None)

    def remove_all(self) -> None:
        """Take off the model what the pool put there, but for what trains now."""
        with self.tiers.lock:
            mine = {adapter_id: entry for adapter_id, entry in self.owned.items() if entry.alive}
        for adapter_id, entry in mine.items():
            if not entry.trainable:
                self.remove(adapter_id)
        placing.reserve(self.model, None)
