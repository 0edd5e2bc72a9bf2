"""Layers in parallel, each by one thread.

A matrix product may round otherwise with another number of threads. In these threads torch computes alone, so a product
of the same shape is the same, bit for bit, whatever `torch.set_num_threads` says; and layers side by side wait for each
other less than threads within one operation do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch

from .exact import Scratch

__all__ = ["alone", "each"]

T = TypeVar("T")
R = TypeVar("R")


def each(work: Callable[[T, Scratch], R], items: Sequence[T], on_cpu: Callable[[T], bool]) -> None:
    """Do the work for every item: on the CPU one item a thread, elsewhere one after another in this thread.

    Raises:
        what `work` raised first; no item is begun after that, and none is unfinished when it is raised.
    """
    here, scratch = [], Scratch()
    for item in items:
        if on_cpu(item):
            here.append(item)
        else:
            work(item, scratch)
    if not here:
        return
    with _threads(min(torch.get_num_threads(), len(here))) as (pool, held):

        def one(item: T) -> None:
            work(item, held.scratch)

        try:
            for done in as_completed([pool.submit(one, item) for item in here]):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def alone(work: Callable[[], R]) -> R:
    """What `work` returns, computed as `each` computes on the CPU."""
    with _threads(1) as (pool, _):
        return pool.submit(work).result()


@contextmanager
def _threads(count: int) -> Iterator[tuple[ThreadPoolExecutor, threading.local]]:
    ready, held, threads = threading.Barrier(count + 1), threading.local(), torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(1)  # of this thread; and, until it is set again below, of threads that begin later
        held.scratch = Scratch()
        ready.wait()

    with ThreadPoolExecutor(count, thread_name_prefix="hf_lora-merge") as pool:
        try:
            for _ in range(count):
                pool.submit(begin)
            ready.wait()
        except BaseException:
            ready.abort()
            raise
        finally:
            torch.set_num_threads(threads)
        yield pool, held
