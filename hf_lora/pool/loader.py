"""Reading adapters: on threads of its own, each adapter once however many ask for it."""

from __future__ import annotations

import contextlib
import threading
import time

from torch import nn

from ..errors import LoRAError
from ..fitting import make_plan, unpooled
from ..layerinfo import modules_of
from ..loading import require_same_base
from ..model import state_of
from ..replication import replication_of
from ..values import AdapterValue, refuse_replicated
from .hostcache import Held
from .refusals import as_ours, closed
from .sources import Source
from .tiers import Tiers
from .workers import DEMAND, Job, Workers

__all__ = ["Loader", "Reading"]

Reading = Job[Held | LoRAError]


class Loader:
    """Reads adapters from the source, checks that they fit the model, and leaves them in host memory.

    Args:
        structure: held while the model's layers are looked at, so that none is changed meanwhile.
        force: do not compare the base's name.
    """

    def __init__(
        self,
        model: nn.Module,
        tiers: Tiers,
        source: Source,
        structure: threading.RLock,
        *,
        threads: int,
        force: bool,
    ) -> None:
        self.model, self.tiers, self.source, self.force = model, tiers, source, force
        self.workers = Workers(threads, "hf_lora-pool-load")
        self.reading: dict[str, Reading] = {}  # what is under way; the books' lock guards it
        self.unfinished = 0  # with those whose id was refreshed since they began; the same
        self._structure = structure

    def read(self, adapter_id: str, priority: int) -> Reading:
        """The read of this adapter that is under way, or a new one. The books' lock is held."""
        job = self.reading.get(adapter_id)
        if job is None:
            version = self.tiers.version(adapter_id)
            made: Reading = Job(lambda: self._read(adapter_id, version, made), closed)
            job = self.reading[adapter_id] = made
            self.unfinished += 1
        elif priority != DEMAND:
            return job
        self.workers.submit(job, priority)
        return job

    def _read(self, adapter_id: str, version: int, job: Reading) -> Held | LoRAError:
        begin, nbytes = time.monotonic(), 0
        result: Held | LoRAError
        try:
            value, nbytes = self.source.read(adapter_id)
            self._check(value)
            result = Held(value, value.nbytes, version)
        except BaseException as error:  # noqa: BLE001  # a user's source raises anything; its requests hear of it
            result = as_ours(error, adapter_id)
        with self.tiers.lock:
            count = self.tiers.count
            self.unfinished -= 1
            if self.reading.get(adapter_id) is job:  # not refreshed meanwhile
                del self.reading[adapter_id]
                if isinstance(result, Held):
                    self.tiers.keep(adapter_id, result)
            if isinstance(result, Held):
                count.loads += 1
                count.bytes_read += nbytes
                count.load.add(time.monotonic() - begin)
            else:
                count.failed(adapter_id, result.message)
        return result

    def _check(self, value: AdapterValue) -> None:
        if not self.force:
            require_same_base(self.model, value)
        if value.config.layer_replication != replication_of(self.model):  # requests run on the layers that there are
            refuse_replicated(value, "A pool's model")
        with self._structure:
            state = state_of(self.model)
            with state.lock if state is not None else contextlib.nullcontext():
                make_plan(self.model, unpooled(value, modules_of(self.model)), state, complete=True)
