"""What a pool has done, in numbers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

__all__ = ["Counters", "PoolMetrics", "Times"]

_KEPT = 1024  # durations that the percentiles are of
_FAILURES = 16  # failures that are told


@dataclass(frozen=True)
class Times:
    """Durations of one kind, in milliseconds.

    Args:
        count, total, last: of all since the pool was made.
        p50, p95, p99: percentiles of the last 1,024; 0 before the first.
    """

    count: int = 0
    total: float = 0.0
    last: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0


@dataclass(frozen=True)
class PoolMetrics:
    """What a pool has done, and holds now. An adapter named by several rows of one batch counts once.

    Args:
        device_hits: adapters asked for that were in a device slot. host_hits: that were in host memory.
        misses: that had to come from the source (also those that another request was loading already).
        loads: adapters read from the source. failures: adapters that could not be read, or did not fit.
        placed: adapters written into device slots. evictions: that left one for another.
        host_evictions: that left host memory, and must be read again when next asked for.
        timeouts: requests that waited too long.
        bytes_read: of the weights' files that were read.
        device_adapters, host_adapters: how many are there now.
        device_bytes, host_bytes: of their tensors, as in their files.
        pinned, leased: adapters that stay: pinned ones, and those that open requests hold.
        loading, placing: reads, and writes into slots, that are queued or running.
        waiting: requests that wait for device slots.
        load_ms: reading and checking one adapter. place_ms: writing one into its slot. wait_ms: for device slots.
        recent_failures: (id, message) of the last 16.
    """

    device_hits: int
    host_hits: int
    misses: int
    loads: int
    failures: int
    placed: int
    evictions: int
    host_evictions: int
    timeouts: int
    bytes_read: int
    device_adapters: int
    host_adapters: int
    device_bytes: int
    host_bytes: int
    pinned: int
    leased: int
    loading: int
    placing: int
    waiting: int
    load_ms: Times
    place_ms: Times
    wait_ms: Times
    recent_failures: tuple[tuple[str, str], ...]


class _Clock:
    """Collects durations."""

    def __init__(self) -> None:
        self.count, self.total, self.last = 0, 0.0, 0.0
        self.kept: deque[float] = deque(maxlen=_KEPT)

    def add(self, seconds: float) -> None:
        self.last = seconds * 1000
        self.count, self.total = self.count + 1, self.total + self.last
        self.kept.append(self.last)

    def times(self) -> Times:
        if not self.kept:
            return Times()
        order = sorted(self.kept)
        p50, p95, p99 = (order[min(len(order) - 1, int(len(order) * share))] for share in (0.5, 0.95, 0.99))
        return Times(self.count, self.total, self.last, p50, p95, p99)


@dataclass
class Counters:
    """The pool's own counts; its lock guards them."""

    device_hits: int = 0
    host_hits: int = 0
    misses: int = 0
    loads: int = 0
    failures: int = 0
    placed: int = 0
    evictions: int = 0
    host_evictions: int = 0
    timeouts: int = 0
    bytes_read: int = 0
    load: _Clock = field(default_factory=_Clock)
    place: _Clock = field(default_factory=_Clock)
    wait: _Clock = field(default_factory=_Clock)
    recent: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=_FAILURES))

    def failed(self, adapter_id: str, message: str) -> None:
        """Count a failure."""
        self.failures += 1
        self.recent.append((adapter_id, message))
