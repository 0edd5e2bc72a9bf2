"""What visitors ask for becomes batches: fair among visitors, bounded, each action with its time, each can be stopped.

An action (`Ticket`) has one or more rows, which run in the same batch. While one batch runs others gather; the next
takes one action of each visitor in turn until it is full. A failure, a stop or a time-out is of one action alone.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import LoRAError
from .engine import BatchFacts, Engine, Event, Row
from .problems import DemoError, said
from .settings import Settings

__all__ = ["Dispatcher", "Ticket"]

Stream = Callable[[Sequence[Row], Callable[[int], bool] | None], Iterator[Event]]


class Ticket:
    """One action: its rows, and what has become of them. Read it at any time; only the dispatcher writes.

    Attributes:
        tokens: of each row, as they come.
        errors: of each row, or None.
        state: "waiting", "running", "done", "cancelled", "late" (the time was over) or "failed".
        facts: of the batch that it ran in, once it has begun.
        waited, seconds: until it began, and since.
    """

    def __init__(self, visitor: str, rows: Sequence[Row], deadline: float, place: str = "") -> None:
        self.visitor, self.rows, self.deadline, self.place = visitor, tuple(rows), deadline, place
        self.context = contextvars.copy_context()  # who asks, for ZeroGPU
        self.tokens: list[list[int]] = [[] for _ in rows]
        self.errors: list[BaseException | None] = [None] * len(self.rows)
        self.stopped = [False] * len(self.rows)  # the reader needs no more of this row
        self.finished = [False] * len(self.rows)
        self.state = "waiting"
        self.facts: BatchFacts | None = None
        self.made, self.begun, self.ended = time.monotonic(), 0.0, 0.0

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.state not in ("waiting", "running")

    @property
    def waited(self) -> float:
        """Seconds until it began, or until now."""
        return (self.begun or time.monotonic()) - self.made

    @property
    def seconds(self) -> float:
        """Since it began."""
        return (self.ended or time.monotonic()) - self.begun if self.begun else 0.0

    @property
    def mixture(self) -> Any:
        """What a batch must agree on: None, or the one mixture of its rows."""
        which = self.rows[0].which
        return which if isinstance(which, tuple) else None


class Dispatcher:
    """Makes batches of what waits, on one thread.

    Args:
        stream: `Engine.stream`, or the same in another process.
    """

    def __init__(self, engine: Engine, settings: Settings, stream: Stream | None = None) -> None:
        self.settings = settings
        self._stream = stream or engine.stream
        self._lock = threading.Condition()
        self._waiting: OrderedDict[str, deque[Ticket]] = OrderedDict()  # visitor → actions; the next visitor first
        self._running: list[Ticket] = []
        self._closed = False
        self.batches = self.rows = self.mixed = 0
        self._thread = threading.Thread(target=self._work, name="hf_lora-demo-dispatch", daemon=True)
        self._thread.start()

    # ---- for visitors ------------------------------------------------------------------------------------------------

    def submit(self, visitor: str, rows: Sequence[Row], place: str = "") -> Ticket:
        """Queue an action; `place` is where on the page it was asked for.

        Raises:
            DemoError: the queue is full, the visitor has too much in it, or it has more rows than a batch.
        """
        settings = self.settings
        if not 1 <= len(rows) <= settings.batch_rows:
            raise DemoError(f"One batch has at most {settings.batch_rows} rows here, and this has {len(rows)}.")
        with self._lock:
            if self._closed:
                raise DemoError("The demo is shutting down.")
            mine = len(self._waiting.get(visitor, ())) + sum(t.visitor == visitor and not t.over for t in self._running)
            if mine >= settings.per_visitor:
                raise DemoError(f"You have {mine} requests under way. Wait for one of them, or stop it.")
            if sum(map(len, self._waiting.values())) >= settings.queue:
                raise DemoError("Too many people are asking just now. Try again in a minute.")
            ticket = Ticket(visitor, rows, time.monotonic() + settings.timeout, place)
            self._waiting.setdefault(visitor, deque()).append(ticket)
            self._lock.notify_all()
        return ticket

    def ahead(self, ticket: Ticket) -> int:
        """How many actions are before this one, at most: those that run and those that came earlier."""
        with self._lock:
            earlier = sum(t.made < ticket.made for own in self._waiting.values() for t in own)
            return sum(not t.over for t in self._running) + earlier

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more. Its rows end with their next token; the others of the batch go on."""
        with self._lock:
            self._end(ticket, "cancelled")

    def expire(self, ticket: Ticket) -> None:
        """Its time is over, if it is: what is written stays."""
        if ticket.deadline <= time.monotonic():
            with self._lock:
                self._end(ticket, "late")

    def cancel_all(self, visitor: str, place: str | None = None) -> None:
        """The visitor has left, or wants no more of what was asked for in this place."""
        with self._lock:
            own = [*self._waiting.get(visitor, ()), *(t for t in self._running if t.visitor == visitor)]
            for ticket in own:
                if place is None or ticket.place == place:
                    self._end(ticket, "cancelled")

    def close(self) -> None:
        """End what runs, refuse what waits, stop the thread."""
        with self._lock:
            self._closed = True
            for own in [*self._waiting.values(), self._running]:
                for ticket in list(own):
                    self._end(ticket, "cancelled")
            self._lock.notify_all()
        self._thread.join()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _end(self, ticket: Ticket, state: str) -> None:
        """The lock is held."""
        if not ticket.over:
            ticket.state, ticket.ended = state, time.monotonic()
            if own := self._waiting.get(ticket.visitor):
                if ticket in own:
                    own.remove(ticket)
                if not own:
                    del self._waiting[ticket.visitor]

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self._closed:
                    self._lock.wait()
                if self._closed:
                    return
            time.sleep(self.settings.gather)
            batch = self._next()
            if batch:
                self._run(batch)

    def _next(self) -> list[Ticket]:
        """One action of each visitor in turn, as long as they fit and agree. What is late is told so."""
        batch: list[Ticket] = []
        rows = 0
        with self._lock:
            now = time.monotonic()
            for own in list(self._waiting.values()):
                for ticket in [t for t in own if t.deadline <= now]:
                    self._end(ticket, "late")
            passed: set[str] = set()
            while len(passed) < len(self._waiting):
                visitor = next(v for v in self._waiting if v not in passed)
                own = self._waiting[visitor]
                ticket = own[0]
                if rows + len(ticket.rows) > self.settings.batch_rows or (batch and ticket.mixture != batch[0].mixture):
                    passed.add(visitor)
                    continue
                own.popleft()
                if own:
                    self._waiting.move_to_end(visitor)
                else:
                    del self._waiting[visitor]
                ticket.state, ticket.begun = "running", now
                batch.append(ticket)
                rows += len(ticket.rows)
            self._running = batch
        return batch

    def _run(self, batch: list[Ticket]) -> None:
        try:
            self._compute(batch)
        except BaseException as error:  # noqa: BLE001  # the thread goes on; those of this batch hear of it
            left = [ticket for ticket in batch if not ticket.over]
            if len(left) > 1:
                self._one_by_one(left)
            else:
                self._fail(left, error)
        with self._lock:
            for ticket in batch:
                self._end(ticket, "failed" if all(ticket.errors) else "done")
            self._running = []

    def _compute(self, batch: Sequence[Ticket]) -> None:
        places = [(ticket, i) for ticket in batch for i in range(len(ticket.rows))]

        def ended(row: int) -> bool:
            ticket, own = places[row]
            self.expire(ticket)
            return ticket.over or ticket.stopped[own]

        events = iter(self._stream([ticket.rows[i] for ticket, i in places], ended))
        context = batch[0].context
        while True:
            try:
                event = context.run(next, events)
            except StopIteration:
                return
            if isinstance(event, BatchFacts):
                for ticket in batch:
                    ticket.facts = event
                self.batches, self.rows = self.batches + 1, self.rows + event.rows
                self.mixed += event.adapters > 1
                continue
            (ticket, own), what = places[event[0]], event[1]
            if ticket.over:
                continue
            if isinstance(what, int):
                ticket.tokens[own].append(what)
                continue
            ticket.errors[own], ticket.finished[own] = what, True
            if all(ticket.finished):  # others of the batch may have longer answers
                with self._lock:
                    self._end(ticket, "failed" if all(ticket.errors) else "done")

    def _one_by_one(self, tickets: Sequence[Ticket]) -> None:
        """A batch broke: run each action that is not over alone, so that it can break no other."""
        for ticket in tickets:
            if ticket.over or self._closed:
                continue
            ticket.tokens, ticket.errors = [[] for _ in ticket.rows], [None] * len(ticket.rows)
            ticket.stopped, ticket.finished = [False] * len(ticket.rows), [False] * len(ticket.rows)
            try:
                self._compute([ticket])
            except BaseException as error:  # noqa: BLE001
                self._fail([ticket], error)
            else:
                with self._lock:
                    self._end(ticket, "failed" if all(ticket.errors) else "done")

    def _fail(self, tickets: Sequence[Ticket], error: BaseException) -> None:
        told = error if isinstance(error, LoRAError) else DemoError(said(error))  # which notes it, once
        with self._lock:
            for ticket in tickets:
                ticket.errors = [told] * len(ticket.rows)
                self._end(ticket, "failed")
