"""One base and its adapters: a batch whose rows name different adapters, token by token, in one `generate`."""

from __future__ import annotations

import contextlib
import contextvars
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRAError
from ..pool import LoRAPool
from ..serve.engine import cut, left_padded
from .settings import Settings

__all__ = ["BatchFacts", "Engine", "Event", "Row"]

Mixture = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Row:
    """What one row is to do.

    Args:
        ids: the prompt. which: an adapter, adapters with weights, or None for the base alone.
        max_tokens: new ones.
    """

    ids: tuple[int, ...]
    which: str | Mixture | None
    max_tokens: int

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that it names."""
        if self.which is None:
            return ()
        return (self.which,) if isinstance(self.which, str) else tuple(name for name, _ in self.which)


@dataclass(frozen=True)
class BatchFacts:
    """A batch as it ran.

    Args:
        rows, adapters: how many, and how many different ones.
        load_ms: until its adapters were on the device; switch_ms: to make them active.
    """

    rows: int
    adapters: int
    load_ms: float
    switch_ms: float


Event = tuple[int, int | LoRAError | None] | BatchFacts
"""(row, its next token), (row, why it cannot run), (row, None) when it has ended; once, when it begins, the facts."""


class Engine:
    """The base, its tokenizer, and a pool of adapters, which is made in the process that computes.

    Args:
        places: an adapter's id → its folder. Its owner adds to it; nothing that is not in it can be named.
    """

    def __init__(self, model: Any, tokenizer: Any, places: dict[str, Path], settings: Settings) -> None:
        self.model, self.tokenizer, self.places, self.settings = model.eval(), tokenizer, places, settings
        eos = model.generation_config.eos_token_id
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos = frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)
        pad = tokenizer.pad_token_id
        self.pad: int = pad if pad is not None else min(self.eos, default=0)
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._pool: tuple[int, LoRAPool] | None = None
        self._one = threading.Lock()  # two batches at once would only take each other's time and memory

    @property
    def pool(self) -> LoRAPool:
        """This process's. A fork (ZeroGPU computes in one) has its own: threads do not live on in it."""
        if self._pool is None or self._pool[0] != os.getpid():
            settings = self.settings
            pool = LoRAPool(
                self.model,
                source=self.places,
                device_slots=settings.device_slots,
                host_slots=4 * settings.device_slots,
                host_bytes=settings.host_bytes,
                timeout=settings.timeout,
            )
            self._pool = os.getpid(), pool
        return self._pool[1]

    def forget(self, key: str) -> None:
        """Nobody may name this adapter any more: free what it takes, unless a batch is just using it."""
        if self._pool is not None and self._pool[0] == os.getpid():
            with contextlib.suppress(LoRAError):
                self._pool[1].evict(key)

    def close(self) -> None:
        """End the pool's threads and take its adapters off the model."""
        with self._one:
            if self._pool is not None and self._pool[0] == os.getpid():
                self._pool[1].close()
            self._pool = None

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """The prompt's ids. special: with what the tokenizer puts before a text."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        own = self.tokenizer("")["input_ids"][:1] if special else []
        return (*(own if own and own[0] == self.tokenizer.bos_token_id else ()), *ids)

    def decode(self, tokens: Sequence[int], max_tokens: int) -> tuple[str, bool]:
        """The text of a row's new tokens, and whether it has ended by itself."""
        kept, reason = cut(tokens, max_tokens, self.eos)
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return str(text), reason == "stop"

    # ---- a batch -----------------------------------------------------------------------------------------------------

    def stream(
        self,
        rows: Sequence[Row],
        ended: Callable[[int], bool] | None = None,
        places: Mapping[str, Path] | None = None,
    ) -> Iterator[Event]:
        """Run the rows, all named by adapters or all of one mixture, and tell of each token as it comes.

        A row whose adapter cannot be used gets its error; the others run. Closing the iterator ends the batch.

        Args:
            ended: whether nobody waits for this row any more; asked after each token.
            places: of its adapters, where this process may not know them.
        """
        self.places.update(places or {})
        events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        stopped = threading.Event()

        def over(row: int) -> bool:
            return stopped.is_set() or (ended is not None and ended(row))

        def work() -> None:
            try:
                self._run(rows, events.put, over)
            except BaseException as error:  # noqa: BLE001  # whoever reads the events raises it
                events.put(error)
            finally:
                events.put(None)

        thread = threading.Thread(
            target=contextvars.Context().run, args=(work,), name="hf_lora-demo-batch", daemon=True
        )
        thread.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            stopped.set()
            thread.join()

    def _run(self, rows: Sequence[Row], tell: Callable[[Event], None], over: Callable[[int], bool]) -> None:
        names = list(dict.fromkeys(name for row in rows for name in row.adapters))
        with self._one:
            begun = time.perf_counter()
            with self.pool.acquire(names, strict=False) as lease:
                load = 1e3 * (time.perf_counter() - begun)
                kept: list[int] = []
                for i, row in enumerate(rows):
                    failure = next((lease.failures[name] for name in row.adapters if name in lease.failures), None)
                    if failure is None:
                        kept.append(i)
                    else:
                        tell((i, failure))
                if not kept:
                    return
                told = False
                for group in self._fitting(rows, kept):
                    which = rows[group[0]].which
                    names_of_rows: Any = [rows[i].which for i in group]
                    begun = time.perf_counter()
                    block = lease.use(dict(which)) if isinstance(which, tuple) else lease.route(names_of_rows)
                    with block:
                        switch = 1e3 * (time.perf_counter() - begun)
                        if not told:
                            adapters = len({name for i in kept for name in rows[i].adapters})
                            tell(BatchFacts(len(kept), adapters, load, switch))
                            told = True
                        self._generate([rows[i] for i in group], _renumbered(tell, group), _of_group(over, group))

    def _fitting(self, rows: Sequence[Row], kept: Sequence[int]) -> list[list[int]]:
        """The rows in groups, of which each fits the context: its longest prompt and its longest answer together.

        A row that has ended goes on being computed until the last one ends, and past the context there is no position.
        """
        groups: list[list[int]] = []
        for i in kept:
            for group in groups:
                both = [rows[j] for j in (*group, i)]
                longest = max(len(row.ids) for row in both) + max(row.max_tokens for row in both)
                if self.context is None or longest <= self.context:
                    group.append(i)
                    break
            else:
                groups.append([i])
        return groups

    def _generate(self, rows: Sequence[Row], tell: Callable[[Event], None], over: Callable[[int], bool]) -> None:
        ids, mask = left_padded([row.ids for row in rows], self.pad, self.model.device)  # (rows, length)
        length = ids.shape[1]
        done = [False] * len(rows)

        def look(so_far: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            count = so_far.shape[1] - length
            for i, token in enumerate(so_far[:, -1].tolist()):
                if not done[i]:
                    tell((i, token))
                    done[i] = token in self.eos or count >= rows[i].max_tokens or over(i)
                    if done[i]:
                        tell((i, None))
            return torch.tensor(done, device=so_far.device)  # (rows,)

        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(row.max_tokens for row in rows),
                stopping_criteria=[look],
                do_sample=False,
                num_beams=1,
                pad_token_id=self.pad,
            )


def _renumbered(tell: Callable[[Event], None], group: Sequence[int]) -> Callable[[Event], None]:
    def told(event: Event) -> None:
        tell(event if isinstance(event, BatchFacts) else (group[event[0]], event[1]))

    return told


def _of_group(over: Callable[[int], bool], group: Sequence[int]) -> Callable[[int], bool]:
    return lambda row: over(group[row])
