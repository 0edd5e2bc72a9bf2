"""One replica: an engine, and what Ray asks of it. `app` puts `serve.multiplexed` and `serve.batch` on its methods."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
from collections.abc import Coroutine
from typing import Any, TypeVar

from ..errors import LoRAError
from .answers import Completion, Refusal, bad_request, refusal
from .engine import Engine
from .requests import Ask
from .settings import Settings

__all__ = ["Replica"]

T = TypeVar("T")


class Replica:
    """A base with a pool of adapters.

    Args:
        settings: as of `build`.
        label: what its answers call it; Ray's id of the replica.
    """

    def __init__(self, settings: Settings, label: str = "") -> None:
        self.engine, self.label = Engine(settings), label

    async def complete(self, ask: Ask) -> tuple[Completion | Refusal, str]:
        """The answer, and which replica gave it."""
        return await self._complete(ask), self.label

    async def _complete(self, ask: Ask) -> Completion | Refusal:
        try:
            row = self.engine.encode(ask)
        except LoRAError as error:
            return bad_request(error)
        if ask.adapter is not None:
            # Before Ray hears of the id: it loads one at a time, and what cannot be loaded is not worth a place there.
            try:
                error_of = await self.engine.pool.aload(ask.adapter)
            except LoRAError as error:
                return refusal(error)
            if (failure := error_of[ask.adapter]) is not None:
                return refusal(failure)
            await self.hold(ask.adapter)
        answer = await _in_no_request(self.run(row))
        return refusal(answer) if isinstance(answer, LoRAError) else answer

    async def hold(self, adapter_id: str) -> str:
        """Multiplexed: so Ray knows that this replica has the adapter. Where it is, is the pool's own affair."""
        return adapter_id

    # Batched: Ray's decorator collects what single calls are given, and hands each its own of the results.
    async def run(self, rows: Any) -> Any:
        """One row → its answer; within, the rows of a batch → their answers."""
        return await asyncio.to_thread(self.engine.complete, rows)

    def stats(self) -> dict[str, Any]:
        """Batches so far, and the pool's metrics."""
        engine = self.engine
        counts = {"batches": engine.batches, "rows": engine.rows, "mixed_batches": engine.mixed}
        there = {"resident": list(engine.pool.resident), "cached": list(engine.pool.cached)}
        return {"replica": self.label, **counts, **there, "pool": dataclasses.asdict(engine.pool.metrics())}

    def check_health(self) -> None:
        """Raise if the pool is closed, or the base merged. Ray replaces the replica then."""
        self.engine.pool.load(())

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the base could not be loaded: there is no engine
            self.engine.close()


async def _in_no_request(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await outside the request's context, where `serve.batch` finds a model's id and would batch for each id apart."""
    return await contextvars.Context().run(asyncio.ensure_future, coroutine)
