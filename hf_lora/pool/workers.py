"""Threads that run jobs, the most urgent first."""

from __future__ import annotations

import contextvars
import itertools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["DEMAND", "PREFETCH", "Job", "Workers"]

T = TypeVar("T")

DEMAND, PREFETCH = 0, 1  # priorities: what a request waits for; what may be wanted later
_STOP = 2


class Job(Generic[T]):
    """Work whose result several may wait for. The result may be an error, as a value; it is never raised.

    Args:
        run: does the work.
        abandoned: the result if the workers stop before it began.
    """

    def __init__(self, run: Callable[[], T], abandoned: Callable[[], T]) -> None:
        self.future: Future[T] = Future()
        self._run, self._abandoned = run, abandoned
        self._once = threading.Lock()

    def __call__(self, stopping: bool = False) -> None:
        """Do the work, unless it was begun already (a job may be queued again with a higher priority)."""
        if self._once.acquire(blocking=False):
            work = self._abandoned if stopping else self._run
            del self._run, self._abandoned  # they may know this job: in a cycle its result would outlive its last user
            self.future.set_result(work())


class Workers:
    """Daemon threads that take jobs from one queue."""

    def __init__(self, count: int, name: str) -> None:
        self._queue: queue.PriorityQueue[tuple[int, int, Job[object] | None]] = queue.PriorityQueue()
        self._order = itertools.count()
        # The target holds the queue and nothing else, so that a pool that nobody closed can be collected.
        # It runs in an empty context: a use_lora() that is open here is not open there.
        self._threads = [
            threading.Thread(
                target=contextvars.Context().run, args=(_work, self._queue), name=f"{name}-{i}", daemon=True
            )
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job[T], priority: int = DEMAND) -> None:
        """Queue a job."""
        self._queue.put((priority, next(self._order), job))  # type: ignore[arg-type]

    def stop(self) -> None:
        """Let the threads end after the jobs that they are at; what is queued is abandoned."""
        while True:
            try:
                job = self._queue.get_nowait()[2]
            except queue.Empty:
                break
            if job is not None:
                job(stopping=True)
        for _ in self._threads:
            self._queue.put((_STOP, next(self._order), None))

    def join(self, timeout: float | None = None) -> None:
        """Wait for the threads to end; None waits for as long as it takes."""
        end = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))


def _work(jobs: queue.PriorityQueue[tuple[int, int, Job[object] | None]]) -> None:
    while True:
        job = jobs.get()[2]
        if job is None:
            return
        job()
        del job  # while waiting for the next, nothing of this one is held
