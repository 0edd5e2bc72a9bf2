"""`LoRAPool`: thousands of adapters by id over source → host memory → device slots."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import LoRAError, LoRAFileError, LoRANameError, LoRAPoolError, LoRAStateError
from ..fitting import make_plan
from ..loading import require_same_base
from ..model import put, remove, state_of
from ..state import Entry
from ..switching import Which
from .hostcache import Held, HostCache
from .lease import Lease, ids_of
from .metrics import PoolMetrics
from .sources import Source, SourceLike
from .tiers import Resident, Tiers
from .workers import DEMAND, PREFETCH, Job, Workers

__all__ = ["LoRAPool"]

T = TypeVar("T")
_Steps = Generator[Iterable["Future[Any]"], None, T]  # yields what to wait for


class LoRAPool:
    """Adapters by id on one model, as many as the source has: the most used in device slots, others in host memory.

    A request names ids. What is missing is read from the source on loader threads, checked against the model, and
    written into a free slot, or into that of the least recently used adapter that no request holds. Requests that run
    meanwhile neither wait nor see any of it. An adapter that cannot be loaded fails for those who asked for it alone.

    Args:
        model: the base. Adapters that you put on it yourself can be named too; the pool never removes those.
        device_slots: adapters on the model at a time.
        host_slots: further adapters kept in host memory, by least recent use.
        source: None: an id is a folder or a repo on the Hub. A folder: ids are folders in it, and cannot leave it. A
            mapping or a function: from an id to a folder, a repo's id or an `AdapterValue`.
        max_rank, max_bytes: an adapter over one is refused before its tensors are read; None is no limit.
        host_bytes: of the values in host memory together; None is no limit.
        loaders: threads that read.
        timeout: seconds that a request waits for its adapters to be read, and again for device slots.
        force: take adapters that say they were made on another base.
        allow_pickle, options: as of `load_lora` (token, cache_dir, local_files_only, …).
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
        for name, value, least in (
            ("device_slots", device_slots, 1),
            ("host_slots", host_slots, 0),
            ("max_rank", max_rank, 1),
            ("max_bytes", max_bytes, 1),
            ("host_bytes", host_bytes, 0),
            ("loaders", loaders, 1),
            ("timeout", timeout, 0),
        ):
            if value is not None and (isinstance(value, bool) or not value >= least):
                raise _refused(
                    "wrong", f"{name}={value!r} is impossible.", name=name, value=value, expected=f">= {least}"
                )
        self.model, self.timeout = model, timeout
        self._force = force
        self._source = Source(
            source, max_rank=max_rank, max_bytes=max_bytes, allow_pickle=allow_pickle, options=options
        )
        self._lock = threading.Lock()  # of the books; never held while anything is read, placed or waited for
        self._structure = threading.RLock()  # while the model's layers are looked at or changed, by loaders and placer
        self._tiers = Tiers(device_slots, HostCache(host_slots, host_bytes))
        self._reading: dict[str, Job[Held | LoRAError]] = {}
        self._placing: dict[str, tuple[Job[LoRAError | None], Held]] = {}
        self._closed = False
        self._idle = threading.Condition(self._lock)
        self._loaders = Workers(loaders, "hf_lora-pool-load")
        self._placer = Workers(1, "hf_lora-pool-place")
        weakref.finalize(self, _stop, self._loaders, self._placer)

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
            ids: every adapter of the batch; a lease within a lease may wait for itself.
            strict: raise if any of them fails; otherwise the lease holds the others, and `lease.failures` says why.
            timeout: instead of the pool's.

        Raises:
            LoRAPoolError, LoRAStateError: as `route`.
        """
        return self._run(self._take(_distinct(ids), strict), timeout)

    async def aacquire(self, ids: str | Iterable[str], *, strict: bool = True, timeout: float | None = None) -> Lease:
        """`acquire`, without blocking the event loop. A task that is cancelled meanwhile holds nothing."""
        return await self._arun(self._take(_distinct(ids), strict), timeout)

    def load(self, ids: str | Iterable[str], *, timeout: float | None = None) -> dict[str, LoRAError | None]:
        """Read and check what is neither on the device nor in host memory; id → None, or why it cannot be used.

        A server can call this for each request before it joins a batch, and answer those that fail.
        """
        return self._run(self._load(_distinct(ids)), timeout)

    async def aload(self, ids: str | Iterable[str], *, timeout: float | None = None) -> dict[str, LoRAError | None]:
        """`load`, without blocking the event loop."""
        return await self._arun(self._load(_distinct(ids)), timeout)

    # ---- for whoever knows what comes --------------------------------------------------------------------------------

    def prefetch(self, ids: str | Iterable[str]) -> None:
        """Load in the background, after what requests wait for, and place as far as slots are free of requests.

        Never takes the slot of an adapter in use. What fails is counted in `metrics`, and raises nothing.
        """
        with self._lock:
            self._require_open("prefetch")
            for adapter_id in _distinct(ids):
                if self._foreign(adapter_id) is None and self._tiers.resident(adapter_id) is None:
                    held = self._tiers.host.get(adapter_id)
                    if held is None:
                        job = self._read_job(adapter_id, PREFETCH)
                        job.future.add_done_callback(functools.partial(self._offer, adapter_id))
                    else:
                        self._place_job(adapter_id, held, None, PREFETCH)

    def pin(self, adapter_id: str, *, timeout: float | None = None) -> None:
        """Load an adapter and keep it on the device until `unpin`. Raises as `route`."""
        with self._lock:
            if len(self._tiers.pinned | {adapter_id}) > self._tiers.slots:
                raise self._too_many([adapter_id])
        with self.acquire(adapter_id, timeout=timeout), self._lock:
            if self._foreign(adapter_id) is None:
                self._tiers.pinned.add(adapter_id)

    def unpin(self, adapter_id: str) -> None:
        """Let a pinned adapter be evicted again."""
        with self._lock:
            self._tiers.pinned.discard(adapter_id)
            self._tiers.admit()

    def evict(self, adapter_id: str) -> None:
        """Take an adapter off the device and out of host memory.

        Raises:
            LoRAPoolError: a request holds it, or it is pinned (`kind` "in use").
        """
        with self._lock:
            self._require_free([adapter_id])
            self._tiers.host.pop(adapter_id)
            found = self._tiers.resident(adapter_id)
            if found is None:
                return
            del self._tiers.device[adapter_id]
        self._run(self._removal(adapter_id, found), None)

    def refresh(self, adapter_id: str) -> None:
        """Read an adapter from its source again when it is next asked for.

        Requests that hold it end with the old version; those that ask from now on wait for the new one.
        """
        with self._lock:
            tiers = self._tiers
            tiers.versions[adapter_id] = tiers.versions.get(adapter_id, 0) + 1
            tiers.host.pop(adapter_id)
            self._reading.pop(adapter_id, None)

    def metrics(self) -> PoolMetrics:
        """What the pool has done, and holds now."""
        with self._lock:
            tiers, count = self._tiers, self._tiers.count
            return PoolMetrics(
                **{name: getattr(count, name) for name in _COUNTED},
                device_adapters=len(tiers.device),
                host_adapters=len(tiers.host),
                device_bytes=sum(resident.held.nbytes for resident in tiers.device.values()),
                host_bytes=tiers.host.nbytes,
                pinned=len(tiers.pinned),
                leased=len(tiers.leases),
                loading=len(self._reading),
                waiting=len(tiers.queue),
                load_ms=count.load.times(),
                place_ms=count.place.times(),
                wait_ms=count.wait.times(),
                recent_failures=tuple(count.recent),
            )

    @property
    def resident(self) -> tuple[str, ...]:
        """The ids in device slots, the least recently used first."""
        with self._lock:
            return tuple(self._tiers.device)

    @property
    def cached(self) -> tuple[str, ...]:
        """The ids in host memory, the least recently used first."""
        with self._lock:
            return self._tiers.host.ids

    # ---- the end -----------------------------------------------------------------------------------------------------

    def close(self, *, timeout: float | None = None) -> None:
        """Refuse new requests, wait for those that run, stop the threads, and take the pool's adapters off the model.

        Raises:
            LoRAPoolError: requests still held adapters after the timeout (`kind` "in use"); close again later.
        """
        limit = self.timeout if timeout is None else timeout
        with self._lock:
            self._closed = True
            for waiter in self._tiers.queue:
                waiter.future.set_result(False)
            self._tiers.queue.clear()
        self._loaders.stop()
        with self._idle:
            if not self._idle.wait_for(lambda: not self._tiers.leases, limit):
                self._require_free(self._tiers.leases)
        self._placer.stop()
        self._placer.join(limit)
        self._loaders.join(limit)
        with self._lock:
            gone, self._tiers.device = dict(self._tiers.device), type(self._tiers.device)()
            self._tiers.pinned.clear()
            for adapter_id in self._tiers.host.ids:
                self._tiers.host.pop(adapter_id)
        for adapter_id, found in gone.items():
            if found.entry.alive and not found.entry.trainable:
                self._remove(adapter_id)

    def __enter__(self) -> LoRAPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- one request, step by step -----------------------------------------------------------------------------------
    # A generator yields the futures it waits for; `_run` waits on a thread, `_arun` in a task. After a wait it looks at
    # what is done: what is not has timed out.

    def _run(self, steps: _Steps[T], timeout: float | None) -> T:
        limit = self.timeout if timeout is None else timeout
        try:
            while True:
                concurrent.futures.wait(next(steps), limit)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            steps.close()

    async def _arun(self, steps: _Steps[T], timeout: float | None) -> T:
        limit = self.timeout if timeout is None else timeout
        try:
            while True:
                # asyncio.wait cancels nothing: the futures are other requests' too.
                await asyncio.wait([asyncio.wrap_future(future) for future in next(steps)], timeout=limit)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            steps.close()

    def _load(self, ids: Sequence[str]) -> _Steps[dict[str, LoRAError | None]]:
        _, failures = yield from self._read(ids)
        return {adapter_id: failures.get(adapter_id) for adapter_id in ids}

    def _take(self, ids: Sequence[str], strict: bool) -> _Steps[Lease]:
        while True:
            values, failures = yield from self._read(ids)
            if strict and failures:
                raise _failed(failures)
            with self._lock:
                self._require_open("acquire")
                own = [adapter_id for adapter_id in values if self._foreign(adapter_id) is None]
                if len(self._tiers.pinned.union(own)) > self._tiers.slots:
                    raise self._too_many(own)
                waiter = self._tiers.wait(own)
            try:
                if not waiter.future.done():
                    yield [waiter.future]
                if not waiter.future.done():
                    raise self._timed_out(own)
                if not waiter.future.result():
                    raise _refused("closed", "The pool was closed while a request waited for device slots.")
                outcome = yield from self._place(own, values)
            except BaseException:
                self._withdraw(waiter)
                raise
            if outcome is None:  # refreshed meanwhile: once more
                self._withdraw(waiter)
                continue
            failures |= outcome
            if outcome:
                ready = [adapter_id for adapter_id in own if adapter_id not in outcome]
                self._let_go(own if strict else [*outcome])
                if strict:
                    raise _failed(failures)
                own = ready
            held = [adapter_id for adapter_id in ids if adapter_id not in failures]
            return Lease(self.model, held, failures, functools.partial(self._let_go, own))

    def _read(self, ids: Sequence[str]) -> _Steps[tuple[dict[str, Held | None], dict[str, LoRAError]]]:
        """Every adapter's value (None of one that the user put on the model), and why not."""
        values: dict[str, Held | None] = {}
        jobs: dict[str, Job[Held | LoRAError]] = {}
        failures: dict[str, LoRAError] = {}
        with self._lock:
            self._require_open("acquire")
            state = state_of(self.model)
            if state is not None:
                state.require_unmerged("LoRAPool.acquire")
            tiers = self._tiers
            for adapter_id in ids:
                if self._foreign(adapter_id) is not None:
                    values[adapter_id] = None
                    continue
                found = tiers.resident(adapter_id)
                if found is not None and tiers.current(adapter_id, found.held):
                    values[adapter_id] = found.held
                    tiers.count.device_hits += 1
                elif adapter_id in self._placing and tiers.current(adapter_id, self._placing[adapter_id][1]):
                    values[adapter_id] = self._placing[adapter_id][1]
                    tiers.count.host_hits += 1
                elif (held := tiers.host.get(adapter_id)) is not None:
                    values[adapter_id] = held
                    tiers.count.host_hits += 1
                else:
                    jobs[adapter_id] = self._read_job(adapter_id, DEMAND)
                    tiers.count.misses += 1
        waiting = [job.future for job in jobs.values() if not job.future.done()]
        if waiting:
            yield waiting
        for adapter_id, job in jobs.items():
            if not job.future.done():
                failures[adapter_id] = self._timed_out([adapter_id], reading=True)
                continue
            result = job.future.result()
            if isinstance(result, LoRAError):
                failures[adapter_id] = result
            else:
                values[adapter_id] = result
        return values, failures

    def _place(self, own: Sequence[str], values: dict[str, Held | None]) -> _Steps[dict[str, LoRAError] | None]:
        """Put what is leased into slots. What could not be; or None if an adapter was refreshed meanwhile."""
        jobs: dict[str, Job[LoRAError | None]] = {}
        with self._lock:
            tiers = self._tiers
            for adapter_id in own:
                held = values[adapter_id]
                assert held is not None
                if not tiers.current(adapter_id, held):
                    return None
                found = tiers.resident(adapter_id)
                if found is not None and tiers.current(adapter_id, found.held):
                    tiers.device.move_to_end(adapter_id)
                    continue
                if found is not None:  # an old version, which nobody holds any more
                    del tiers.device[adapter_id]
                jobs[adapter_id] = self._place_job(adapter_id, held, found, DEMAND)
        waiting = [job.future for job in jobs.values() if not job.future.done()]
        if waiting:
            yield waiting
        failures: dict[str, LoRAError] = {}
        for adapter_id, job in jobs.items():
            error = job.future.result() if job.future.done() else self._timed_out([adapter_id])
            if error is not None:
                failures[adapter_id] = error
        return failures

    def _withdraw(self, waiter: Any) -> None:
        with self._idle:
            self._tiers.withdraw(waiter)
            self._idle.notify_all()

    def _let_go(self, ids: Sequence[str]) -> None:
        with self._idle:
            self._tiers.release(ids)
            self._idle.notify_all()

    # ---- on the loader threads ---------------------------------------------------------------------------------------

    def _read_job(self, adapter_id: str, priority: int) -> Job[Held | LoRAError]:
        """The one read of this adapter that is under way, or a new one. The lock is held."""
        job = self._reading.get(adapter_id)
        if job is None:
            version = self._tiers.versions.get(adapter_id, 0)
            made: Job[Held | LoRAError] = Job(lambda: self._read_one(adapter_id, version, made), _closed)
            job = self._reading[adapter_id] = made
        elif priority != DEMAND:
            return job
        self._loaders.submit(job, priority)
        return job

    def _read_one(self, adapter_id: str, version: int, job: Job[Held | LoRAError]) -> Held | LoRAError:
        begin, nbytes = time.monotonic(), 0
        result: Held | LoRAError
        try:
            value, nbytes = self._source.read(adapter_id)
            with self._structure:
                if not self._force:
                    require_same_base(self.model, value)
                state = state_of(self.model)
                with state.lock if state else contextlib.nullcontext():
                    make_plan(self.model, value, state, complete=True)
            result = Held(value, value.nbytes, version)
        except Exception as error:  # noqa: BLE001  # a user's source raises anything; its request gets it
            result = _as_ours(error, adapter_id)
        with self._lock:
            count = self._tiers.count
            if self._reading.get(adapter_id) is job:
                del self._reading[adapter_id]
                if isinstance(result, Held) and not self._closed:
                    self._tiers.keep(adapter_id, result)
            if isinstance(result, Held):
                count.loads += 1
                count.bytes_read += nbytes
                count.load.add(time.monotonic() - begin)
            else:
                count.failed(adapter_id, result.message)
        return result

    def _offer(self, adapter_id: str, done: Future[Held | LoRAError]) -> None:
        """Place what was prefetched."""
        result = done.result()
        if isinstance(result, Held):
            with self._lock:
                if not self._closed and self._tiers.current(adapter_id, result):
                    self._place_job(adapter_id, result, None, PREFETCH)

    # ---- on the placer's thread --------------------------------------------------------------------------------------

    def _place_job(self, adapter_id: str, held: Held, old: Resident | None, priority: int) -> Job[LoRAError | None]:
        """The one placing of this adapter that is under way, or a new one. The lock is held."""
        if adapter_id in self._placing:
            job = self._placing[adapter_id][0]
            if priority != DEMAND:
                return job
        else:
            job = Job(lambda: self._place_one(adapter_id, held, old), _closed)
            self._placing[adapter_id] = job, held
        self._placer.submit(job, priority)
        return job

    def _place_one(self, adapter_id: str, held: Held, old: Resident | None) -> LoRAError | None:
        """Free a slot, and put the adapter into it. A slot that a request holds is never freed."""
        begin = time.monotonic()
        error: LoRAError | None = None
        entry: Entry | None = None
        try:
            with self._structure:
                if old is not None and old.entry.alive:
                    self._remove(adapter_id)
                if self._make_room(adapter_id):
                    put(self.model, held.value, adapter_id, active=False)
                    state = state_of(self.model)
                    entry = state.entry(adapter_id) if state is not None else None
        except Exception as failure:  # noqa: BLE001  # whatever it is, the request has to hear of it
            error = _as_ours(failure, adapter_id)
        with self._lock:
            tiers = self._tiers
            self._placing.pop(adapter_id, None)
            if entry is not None:
                tiers.device[adapter_id] = Resident(entry, held)
                tiers.host.pop(adapter_id)
                tiers.count.placed += 1
                tiers.count.place.add(time.monotonic() - begin)
            elif error is not None:
                tiers.count.failed(adapter_id, error.message)
        return error

    def _make_room(self, adapter_id: str) -> bool:
        """Whether the adapter may be put now. Raises `LoRAPoolError` if it must be and no slot can be freed."""
        while True:
            with self._lock:
                tiers = self._tiers
                wanted = adapter_id in tiers.leases
                if not wanted and (tiers.queue or len(tiers.held) >= tiers.slots or self._closed):
                    return False  # a prefetched one, and every slot is spoken for
                if not tiers.full():
                    return True
                victim = tiers.make_room(self._evictable)
                if victim is None:
                    if not wanted:
                        return False
                    raise _refused(
                        "full",
                        f"No device slot can be freed for {adapter_id!r}: all {tiers.slots} are in use outside the "
                        "pool, or their adapters train.",
                        remedy="Use the pool's own route() and use(); train adapters under names of their own.",
                    )
                tiers.count.evictions += 1
            try:
                self._remove(victim[0])
            except LoRAStateError:  # a use_lora() outside the pool came in between
                with self._lock:
                    self._tiers.count.evictions -= 1
                    self._tiers.host.pop(victim[0])
                    self._tiers.device[victim[0]] = victim[1]

    def _evictable(self, entry: Entry) -> bool:
        state = state_of(self.model)
        default = state is not None and entry in state.default.entries
        return not (entry.users or entry.trainable or default)

    def _removal(self, adapter_id: str, found: Resident) -> _Steps[None]:
        def run() -> LoRAError | None:
            try:
                with self._structure:
                    self._remove(adapter_id)
            except LoRAError as error:
                with self._lock:
                    self._tiers.device.setdefault(adapter_id, found)
                return error
            return None

        job: Job[LoRAError | None] = Job(run, _closed)
        self._placer.submit(job)
        yield [job.future]
        error = job.future.result() if job.future.done() else self._timed_out([adapter_id])
        if error is not None:
            raise error

    def _remove(self, adapter_id: str) -> None:
        with torch.inference_mode(False):
            remove(self.model, adapter_id)

    # ---- small -------------------------------------------------------------------------------------------------------

    def _foreign(self, adapter_id: str) -> Entry | None:
        """The adapter of this name that the user put on the model, if there is one. The lock is held."""
        state = state_of(self.model)
        entry = None if state is None else state.entries.get(adapter_id)
        if entry is None or adapter_id in self._placing:
            return None
        mine = self._tiers.device.get(adapter_id)
        return None if mine is not None and mine.entry is entry else entry

    def _require_open(self, verb: str) -> None:
        if self._closed:
            raise _refused("closed", f"{verb}() cannot be used: the pool is closed.", remedy="Make another pool.")

    def _require_free(self, ids: Iterable[str]) -> None:
        used = [adapter_id for adapter_id in ids if self._tiers.in_use(adapter_id)]
        if used:
            raise _refused(
                "in use",
                f"{', '.join(map(repr, used[:5]))} cannot be taken off: in use by a request, or pinned.",
                value=used,
                remedy="Let the requests end, and unpin() what is pinned.",
            )

    def _too_many(self, ids: Sequence[str]) -> LoRAPoolError:
        pinned = len(self._tiers.pinned.difference(ids))
        return _refused(
            "too many",
            f"The batch names {len(ids)} adapters; the pool has {self._tiers.slots} device slots, {pinned} of them "
            "pinned to others.",
            value=len(ids),
            expected=self._tiers.slots - pinned,
            remedy="Split the batch, unpin() some, or make the pool with more device_slots.",
        )

    def _timed_out(self, ids: Sequence[str], reading: bool = False) -> LoRAPoolError:
        names = ", ".join(map(repr, ids[:5]))
        why = f"{names} was not read in time" if reading else f"No device slots were free in time for {names}"
        with self._lock:
            self._tiers.count.timeouts += 1
        remedy = (
            "Try again, or give more loaders or a larger timeout." if reading else "Try again, or use smaller batches."
        )
        return _refused("timeout", f"{why}.", value=list(ids), remedy=remedy)


_COUNTED = (
    *("device_hits", "host_hits", "misses", "loads", "failures", "placed", "evictions", "host_evictions", "timeouts"),
    "bytes_read",
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


def _refused(kind: str, message: str, **facts: Any) -> LoRAPoolError:
    error = LoRAPoolError(message, **facts)
    error.kind = kind
    return error


def _closed() -> LoRAError:
    return _refused("closed", "The pool was closed before the adapter was loaded.")


def _failed(failures: dict[str, LoRAError]) -> LoRAPoolError:
    error = _refused(
        "failed",
        f"{len(failures)} of the batch's adapters cannot be used: {', '.join(map(repr, failures))}.",
        name=next(iter(failures)),
        value=list(failures),
        facts=[f"{adapter_id}: {failure.message}" for adapter_id, failure in failures.items()],
        remedy="Run the other rows without them; acquire(strict=False) holds those that can be used.",
    )
    error.failures = failures
    return error


def _as_ours(error: Exception, adapter_id: str) -> LoRAError:
    if isinstance(error, LoRAError):
        return error
    ours = LoRAFileError(
        f"The source failed on {adapter_id!r}: {type(error).__name__}: {error}", name=adapter_id, value=adapter_id
    )
    ours.__cause__ = error
    return ours


def _stop(*workers: Workers) -> None:
    for each in workers:
        each.stop()
