"""One request, step by step: read, wait for slots, place.

A request is a generator that yields the futures it waits for; `run` waits on a thread, `arun` in an asyncio task. After
a wait it looks at what is done: what is not has timed out. Closing the generator lets go whatever it holds.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from ..errors import LoRAError, LoRAPoolError
from ..model import state_of
from .hostcache import Held
from .lease import Lease
from .loader import Loader, Reading
from .placer import Placer
from .refusals import closed, failed, timed_out, too_many
from .tiers import Tiers
from .workers import DEMAND, Job

__all__ = ["Requests", "Steps", "arun", "run"]

T = TypeVar("T")
Steps = Generator["Sequence[Future[Any]]", None, T]


def run(steps: Steps[T], timeout: float) -> T:
    """Wait on this thread, for at most `timeout` seconds at each step."""
    try:
        while True:
            concurrent.futures.wait(next(steps), timeout)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        steps.close()


async def arun(steps: Steps[T], timeout: float) -> T:
    """Wait in this task, for at most `timeout` seconds at each step."""
    try:
        while True:
            await _all_done(next(steps), timeout)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        steps.close()


async def _all_done(futures: Sequence[Future[Any]], timeout: float) -> None:
    # Not asyncio.wrap_future: it would cancel what other requests wait for, too.
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def look() -> None:
        if all(future.done() for future in futures):
            done.set()

    def tell(_: Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(look)

    for future in futures:
        future.add_done_callback(tell)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(done.wait(), timeout)


class Requests:
    """What a request does, over the pool's parts."""

    def __init__(self, tiers: Tiers, loader: Loader, placer: Placer) -> None:
        self.tiers, self.loader, self.placer = tiers, loader, placer

    def load(self, ids: Sequence[str]) -> Steps[dict[str, LoRAError | None]]:
        """Read and check; id → None or why not."""
        _, failures = yield from self._read(ids)
        return {adapter_id: failures.get(adapter_id) for adapter_id in ids}

    def take(self, ids: Sequence[str], strict: bool) -> Steps[Lease]:
        """Read, wait for slots, place; the lease."""
        with self.tiers.lock:
            self._require_usable()
            self._require_room([adapter_id for adapter_id in ids if not self.placer.foreign(adapter_id)])
        while True:
            values, failures = yield from self._read(ids)
            if strict and failures:
                with self.tiers.lock:
                    self._require_usable()  # "closed" rather than "failed because closed"
                raise failed(failures)
            own = [adapter_id for adapter_id in ids if values.get(adapter_id) is not None]
            with self.tiers.lock:
                self._require_usable()
                self._require_room(own)
                waiter = self.tiers.wait(own)
            try:
                if not waiter.future.done():
                    yield [waiter.future]
                if not waiter.future.done():
                    raise self._timed_out(own, reading=False)
                if not waiter.future.result():
                    raise closed()
                broken = yield from self._place(own, values)
                if strict and broken:
                    raise failed(broken)
            except BaseException:
                with self.tiers.lock:
                    self.tiers.withdraw(waiter)
                raise
            if broken is None:
                with self.tiers.lock:
                    self.tiers.withdraw(waiter)
                continue
            if broken:
                with self.tiers.lock:
                    self.tiers.release(broken)
            failures |= broken
            held = [adapter_id for adapter_id in ids if adapter_id not in failures]
            mine = [adapter_id for adapter_id in own if adapter_id not in broken]
            return Lease(self.placer.model, held, failures, functools.partial(self._let_go, mine))

    def _let_go(self, ids: Sequence[str]) -> None:
        with self.tiers.lock:
            self.tiers.release(ids)

    def _read(self, ids: Sequence[str]) -> Steps[tuple[dict[str, Held | None], dict[str, LoRAError]]]:
        """The values (None of an adapter that the user put on the model), and why not of the others."""
        values: dict[str, Held | None] = {}
        jobs: dict[str, Reading] = {}
        with self.tiers.lock:
            self._require_usable()
            for adapter_id in ids:
                found = self._look_up(adapter_id)
                if isinstance(found, Job):
                    jobs[adapter_id] = found
                else:
                    values[adapter_id] = found
        waiting = [job.future for job in jobs.values() if not job.future.done()]
        if waiting:
            yield waiting
        failures: dict[str, LoRAError] = {}
        for adapter_id, job in jobs.items():
            done = job.future.done()
            result = job.future.result() if done else self._timed_out([adapter_id], reading=True)
            if isinstance(result, LoRAError):
                failures[adapter_id] = result
            else:
                values[adapter_id] = result
        return values, failures

    def _look_up(self, adapter_id: str) -> Held | Reading | None:
        """The value, wherever it is, or the read of it; None if the user put the adapter on the model himself."""
        tiers = self.tiers
        if self.placer.foreign(adapter_id):
            return None
        ready = tiers.ready(adapter_id)
        if ready is not None:
            tiers.count.device_hits += 1
            return ready.held
        coming = self.placer.placing.get(adapter_id)
        held = coming.held if coming is not None and coming.held.version == tiers.version(adapter_id) else None
        held = held or tiers.host.get(adapter_id)
        if held is not None:
            tiers.count.host_hits += 1
            return held
        tiers.count.misses += 1
        return self.loader.read(adapter_id, DEMAND)

    def _place(self, own: Sequence[str], values: dict[str, Held | None]) -> Steps[dict[str, LoRAError] | None]:
        """Put what is leased into slots. What could not be; None if something came in between (a `refresh`, say)."""
        tiers = self.tiers
        jobs: dict[str, Job[LoRAError | None]] = {}
        with tiers.lock:
            for adapter_id in own:
                held = values[adapter_id]
                assert held is not None
                if held.version != tiers.version(adapter_id):
                    return None
            for adapter_id in own:
                held = values[adapter_id]
                assert held is not None
                if tiers.ready(adapter_id) is not None:
                    tiers.device.move_to_end(adapter_id)
                    continue
                old = tiers.device.pop(adapter_id, None)  # an earlier version, which nobody holds any more
                jobs[adapter_id] = self.placer.place(adapter_id, held, old, DEMAND)
        waiting = [job.future for job in jobs.values() if not job.future.done()]
        if waiting:
            yield waiting
        failures: dict[str, LoRAError] = {}
        for adapter_id, job in jobs.items():
            error = job.future.result() if job.future.done() else self._timed_out([adapter_id], reading=False)
            if error is not None:
                failures[adapter_id] = error
        with tiers.lock:
            there = all(adapter_id in failures or tiers.ready(adapter_id) is not None for adapter_id in own)
        return failures if there else None

    def _require_usable(self) -> None:
        if self.tiers.closed:
            raise closed()
        state = state_of(self.placer.model)
        if state is not None:
            state.require_unmerged("LoRAPool.acquire")

    def _require_room(self, ids: Sequence[str]) -> None:
        pinned = self.tiers.pinned.difference(ids)
        if len(pinned) + len(ids) > self.tiers.slots:
            raise too_many(len(ids), self.tiers.slots, len(pinned))

    def _timed_out(self, ids: Sequence[str], reading: bool) -> LoRAPoolError:
        with self.tiers.lock:
            self.tiers.count.timeouts += 1
        return timed_out(ids, reading)
