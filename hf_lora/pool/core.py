"""`LoRAPool`: thousands of adapters by id over source → host memory → device slots."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from torch import nn

from ..errors import LoRAConfigError, LoRAError, LoRANameError
from ..switching import Which
from .hostcache import Held, HostCache
from .lease import Lease, ids_of
from .loader import Loader, Reading
from .metrics import PoolMetrics
from .placer import Placer
from .refusals import closed, in_use, too_many
from .requests import Requests, arun, run
from .sources import Source, SourceLike
from .tiers import Tiers
from .workers import PREFETCH, Workers

__all__ = ["LoRAPool"]


class LoRAPool:
    """Adapters by id on one model, as many as the source has: the most used in device slots, others in host memory.

    A request names ids. What is missing is read from the source on loader threads, checked against the model, and
    written into a free slot, or into that of the least recently used adapter that no request holds. Requests that run
    meanwhile neither wait nor see any of it. An adapter that cannot be loaded fails for those who asked for it alone.

    Args:
        model: the base. Adapters that you put on it yourself can be named too; the pool never removes those.
        device_slots: adapters on the model at a time. Their values stay in host memory too.
        host_slots: further adapters in host memory, by least recent use.
        source: None: an id is a folder, or a repo on the Hub. A folder: ids are folders in it, and cannot leave it. A
            mapping or a function: from an id to a folder, a repo's id or an `AdapterValue`.
        max_rank, max_bytes: an adapter over one is refused before its tensors are read; None is no limit.
        host_bytes: of the values in host memory together; None is no limit.
        loaders: threads that read.
        timeout: seconds that a request waits for its adapters to be read, and again for device slots.
        force: take adapters that say they were made on another base.
        allow_pickle, options: as of `load_lora` (token, cache_dir, local_files_only, …).

    Raises:
        LoRAConfigError: an impossible number, or a source that gives no adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device_slots: int = 32,
        host_slots: int = 256,
        source: SourceLike = None,
        max_rank: int | None = None,
        max_bytes: int | None = None,
        host_bytes: int | None = None,
        loaders: int = 2,
        timeout: float = 60.0,
        force: bool = False,
        allow_pickle: bool = False,
        **options: Any,
    ) -> None:
        _check_least(device_slots=(device_slots, 1), host_slots=(host_slots, 0), loaders=(loaders, 1))
        _check_least(max_rank=(max_rank, 1), max_bytes=(max_bytes, 1), host_bytes=(host_bytes, 0), timeout=(timeout, 0))
        where = Source(source, max_rank=max_rank, max_bytes=max_bytes, allow_pickle=allow_pickle, options=options)
        self.model, self.timeout = model, timeout
        self._tiers = Tiers(device_slots, HostCache(host_slots, host_bytes))
        structure = threading.RLock()
        self._loader = Loader(model, self._tiers, where, structure, threads=loaders, force=force)
        self._placer = Placer(model, self._tiers, structure, max_rank)
        self._requests = Requests(self._tiers, self._loader, self._placer)
        weakref.finalize(self, _stop, self._loader.workers, self._placer.workers)

    # ---- for requests ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def route(self, rows: Sequence[str | None], *, timeout: float | None = None) -> Iterator[nn.Module]:
        """Within the block, row i of every batch goes through adapter `rows[i]`; None is the base.

        Loads what is missing, and holds all of it until the block ends, also by an exception.

        Raises:
            LoRAPoolError: `failures` says which adapters could not be loaded and why; or no slots were free in time,
                or the batch names more adapters than there are slots. Nothing is held then.
            LoRAStateError: an adapter is merged into the weights.
        """
        ids = [] if isinstance(rows, str) else [row for row in rows if row is not None]
        with self.acquire(ids, timeout=timeout) as lease, lease.route(rows):
            yield self.model

    @contextlib.contextmanager
    def use(self, which: Which, *, timeout: float | None = None) -> Iterator[nn.Module]:
        """Within the block, `which` is active for all rows: an id, ids, {id: weight}, or None. Raises as `route`."""
        with self.acquire(ids_of(which), timeout=timeout) as lease, lease.use(which):
            yield self.model

    def acquire(self, ids: str | Iterable[str], *, strict: bool = True, timeout: float | None = None) -> Lease:
        """Load what is missing and hold it on the device until the lease is released.

        Args:
            ids: every adapter of the batch. Take them together: a lease within a lease may wait for itself.
            strict: raise if any of them fails; otherwise the lease holds the others, and `lease.failures` says why.
            timeout: instead of the pool's.

        Raises:
            LoRAPoolError, LoRAStateError: as `route`.
        """
        return run(self._requests.take(_distinct(ids), strict), self._limit(timeout))

    async def aacquire(self, ids: str | Iterable[str], *, strict: bool = True, timeout: float | None = None) -> Lease:
        """`acquire`, without blocking the event loop. A task that is cancelled meanwhile holds nothing."""
        return await arun(self._requests.take(_distinct(ids), strict), self._limit(timeout))

    def load(self, ids: str | Iterable[str], *, timeout: float | None = None) -> dict[str, LoRAError | None]:
        """Read and check what is neither on the device nor in host memory; id → None, or why it cannot be used.

        A server can call this for each request before it joins a batch, and answer those that fail.
        """
        return run(self._requests.load(_distinct(ids)), self._limit(timeout))

    async def aload(self, ids: str | Iterable[str], *, timeout: float | None = None) -> dict[str, LoRAError | None]:
        """`load`, without blocking the event loop."""
        return await arun(self._requests.load(_distinct(ids)), self._limit(timeout))

    def _limit(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else timeout

    # ---- for whoever knows what comes --------------------------------------------------------------------------------

    def prefetch(self, ids: str | Iterable[str]) -> None:
        """Read in the background, after what requests wait for; the first of them go to the device, where it has room.

        Never takes the slot of an adapter in use. What fails is counted in `metrics`, and raises nothing.
        """
        reads: dict[str, Reading] = {}
        with self._tiers.lock:
            if self._tiers.closed:
                raise closed()
            room = self._tiers.slots - len(self._tiers.held)
            for adapter_id in _distinct(ids):
                if self._placer.foreign(adapter_id) or self._tiers.ready(adapter_id) is not None:
                    continue
                held = self._tiers.host.get(adapter_id)
                if held is None:
                    job = self._loader.read(adapter_id, PREFETCH)
                    if room > 0:
                        reads[adapter_id] = job
                elif room > 0 and adapter_id not in self._tiers.device:
                    self._placer.place(adapter_id, held, None, PREFETCH)
                room -= 1
        for adapter_id, job in reads.items():
            job.future.add_done_callback(functools.partial(self._offer, adapter_id))

    def _offer(self, adapter_id: str, done: Future[Held | LoRAError]) -> None:
        """Place what was prefetched."""
        result = done.result()
        with self._tiers.lock:
            tiers = self._tiers
            if (
                isinstance(result, Held)
                and result.version == tiers.version(adapter_id)
                and adapter_id not in tiers.device
                and not tiers.closed
            ):
                self._placer.place(adapter_id, result, None, PREFETCH)

    def pin(self, adapter_id: str, *, timeout: float | None = None) -> None:
        """Load an adapter and keep it on the device until `unpin`. Raises as `route`."""
        with self._tiers.lock:
            pinned = self._tiers.pinned | {adapter_id}
            if len(pinned) > self._tiers.slots:
                raise too_many(1, self._tiers.slots, len(pinned) - 1)
        with self.acquire(adapter_id, timeout=timeout), self._tiers.lock:
            if adapter_id in self._tiers.leases:  # and not one that the user put on the model
                self._tiers.pinned.add(adapter_id)

    def unpin(self, adapter_id: str) -> None:
        """Let a pinned adapter be evicted again."""
        with self._tiers.lock:
            self._tiers.pinned.discard(adapter_id)
            self._tiers.admit()

    def evict(self, adapter_id: str) -> None:
        """Take an adapter off the device and out of host memory.

        Raises:
            LoRAPoolError: a request holds it, or it is pinned (`kind` "in use").
        """
        with self._tiers.lock:
            if adapter_id in self._tiers.held:
                raise in_use([adapter_id])
            self._tiers.host.pop(adapter_id)
            found = self._tiers.device.pop(adapter_id, None)
            job = None if found is None else self._placer.take_off(adapter_id, found)
        if job is not None:
            error = job.future.result()
            if error is not None:
                raise error

    def refresh(self, adapter_id: str) -> None:
        """Read an adapter from its source again when it is next asked for.

        Requests that hold it end with the old version; those that ask from now on wait for the new one.
        """
        with self._tiers.lock:
            self._tiers.versions[adapter_id] = self._tiers.version(adapter_id) + 1
            self._tiers.host.pop(adapter_id)
            self._loader.reading.pop(adapter_id, None)

    def metrics(self) -> PoolMetrics:
        """What the pool has done, and holds now."""
        with self._tiers.lock:
            tiers, count = self._tiers, self._tiers.count
            counted = {field.name for field in dataclasses.fields(count)} & set(PoolMetrics.__dataclass_fields__)
            return PoolMetrics(
                **{name: getattr(count, name) for name in counted},
                device_adapters=len(tiers.device),
                host_adapters=len(tiers.host),
                device_bytes=sum(resident.held.nbytes for resident in tiers.device.values()),
                host_bytes=tiers.host.nbytes,
                pinned=len(tiers.pinned),
                leased=len(tiers.leases),
                loading=self._loader.unfinished,
                placing=len(self._placer.placing),
                waiting=len(tiers.queue),
                load_ms=count.load.times(),
                place_ms=count.place.times(),
                wait_ms=count.wait.times(),
                recent_failures=tuple(count.recent),
            )

    @property
    def resident(self) -> tuple[str, ...]:
        """The ids in device slots, the least recently used first."""
        with self._tiers.lock:
            return tuple(self._tiers.device)

    @property
    def cached(self) -> tuple[str, ...]:
        """The ids in host memory, the least recently used first."""
        with self._tiers.lock:
            return self._tiers.host.ids

    # ---- the end -----------------------------------------------------------------------------------------------------

    def close(self, *, timeout: float | None = None) -> None:
        """Refuse new requests, wait for those that run, take the pool's adapters off the model, and stop the threads.

        An adapter of the pool that trains by now stays. A read that hangs in the source is left to itself.

        Raises:
            LoRAPoolError: requests still hold adapters after the timeout (`kind` "in use"); close again later.
        """
        limit, tiers = self._limit(timeout), self._tiers
        with tiers.lock:
            tiers.closed = True
            tiers.refuse_waiting()
        self._loader.workers.stop()
        with tiers.lock:
            if not tiers.lock.wait_for(lambda: not tiers.leases, limit):
                raise in_use(list(tiers.leases))
        self._placer.workers.stop()
        self._placer.workers.join()
        self._placer.remove_all()
        with tiers.lock:
            tiers.clear()
        self._loader.workers.join(limit)

    def __enter__(self) -> LoRAPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_least(**numbers: tuple[float | None, int]) -> None:
    for name, (value, least) in numbers.items():
        if value is not None and (isinstance(value, (bool, str)) or not value >= least):
            raise LoRAConfigError(
                f"{name}={value!r} is impossible for a pool.",
                name=name,
                value=value,
                expected=f"a number, at least {least}",
                remedy=f"Give another {name}.",
            )


def _distinct(ids: str | Iterable[str]) -> tuple[str, ...]:
    """The ids, each once, in the order of first use."""
    found = tuple(dict.fromkeys((ids,) if isinstance(ids, str) else ids))
    for adapter_id in found:
        if not isinstance(adapter_id, str) or not adapter_id:
            raise LoRANameError(
                f"{adapter_id!r} is no id of an adapter.",
                value=adapter_id,
                expected="a string that is not empty",
                remedy='Give ids such as "task" or "org/task".',
            )
    return found


def _stop(*workers: Workers) -> None:
    for each in workers:
        each.stop()
