"""Many requests from many threads over many adapters, with failures injected: no wrong row, no leak.

HF_LORA_SOAK is the number of requests (batches), 800 if it is not set; the full run is

    HF_LORA_SOAK=10000 pytest -s tests/test_pool_soak.py
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pools import DOWN, MLP, QV, alone, random_value, write_folder

from hf_lora import LoRAPool, LoRAPoolError
from hf_lora.state import Active, Entry
from hf_lora.store import read_adapter
from hf_lora.values import AdapterValue

REQUESTS = int(os.environ.get("HF_LORA_SOAK", "800"))
THREADS, ADAPTERS, SLOTS, HOST = 8, 200, 24, 60
SHAPES = [(1, QV), (4, DOWN), (2, MLP), (8, (*QV, *DOWN)), (3, (*QV, *MLP, *DOWN)), (6, ("k_proj", "o_proj"))]
ALLOWED_MIB = 32  # between the halves' resident memory; 10,000 leaked adapters would be 100 and more


class Soak:
    """One run: the pool, its unreliable source, and what came of each request."""

    def __init__(self, model: Any, root: Path) -> None:
        self.model, self.root = model, root
        self.names = [f"org/a{i}" for i in range(ADAPTERS)]
        values = {name: random_value(model, i, *SHAPES[i % len(SHAPES)]) for i, name in enumerate(self.names)}
        folders = write_folder(root, model, values)
        self.prompts = torch.randint(3, 64, (5, 6), generator=torch.Generator().manual_seed(2))
        self.expected = alone(model, folders, self.prompts)
        self.broken = [f"org/broken{i}" for i in range(8)]
        for path in write_folder(root, model, dict.fromkeys(self.broken, values[self.names[0]])).values():
            weights = path / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-100])
        self.left, self.lock = REQUESTS, threading.Lock()
        self.came: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.unexpected: list[str] = []
        self.rss: list[float] = []
        self.refreshed = {"org/slow"}
        self.chance = random.Random(0)

    def source(self, name: str) -> str | Path:
        """The folder; now and then an exception, or much too late."""
        if name == "org/slow":
            time.sleep(0.2)
            return self.root / self.names[1]
        with self.lock:
            unlucky = self.chance.random() < 0.02
        if unlucky:
            raise ConnectionError("injected")
        return self.root / name

    def take(self) -> int | None:
        with self.lock:
            if self.left == 0:
                return None
            self.left -= 1
            if self.left % max(REQUESTS // 40, 1) == 0:
                self.rss.append(psutil.Process().memory_info().rss / 2**20)
            return self.left

    def work(self, pool: LoRAPool, seed: int) -> None:
        chance = random.Random(seed)
        while self.take() is not None:
            try:
                self.request(pool, chance)
            except Exception:  # noqa: BLE001  # everything that was not injected is a failure of the test
                self.unexpected.append(traceback.format_exc())

    def request(self, pool: LoRAPool, chance: random.Random) -> None:
        """One batch: rows, most of the popular adapters; some of what nobody can load; some that break off."""
        rows: list[str | None] = []
        for _ in range(chance.randint(1, 6)):
            popular = int(chance.paretovariate(0.7)) - 1
            rows.append(self.names[popular] if popular < ADAPTERS else chance.choice([None, *self.names]))
        kind = chance.random()
        if kind < 0.06:
            rows[chance.randrange(len(rows))] = chance.choice([*self.broken, "org/none", "../outside"])
        if kind > 0.97:
            pool.prefetch(chance.choices(self.names, k=5))
        if kind > 0.99:
            name = chance.choice(self.names)
            self.refreshed.add(name)
            pool.refresh(name)
        if 0.06 < kind < 0.07:
            try:
                with pool.acquire("org/slow", strict=False, timeout=0.0005) as lease:
                    late = [getattr(error, "kind", "") for error in lease.failures.values()]
            except LoRAPoolError as error:  # it was read for another request, and there was no slot in time
                late = [error.kind]
            self.count("too late", late.count("timeout"))
            pool.refresh("org/slow")
            return
        if 0.07 < kind < 0.09:
            with (
                pytest.raises(ZeroDivisionError),
                pool.acquire(list(filter(None, rows)), strict=False) as lease,
                lease.route([row for row in rows if row in lease] or [None]),
            ):
                raise ZeroDivisionError
            self.count("broke off")
            return
        prompts = [chance.randrange(5) for _ in rows]
        if kind < 0.5:  # all or nothing
            try:
                with pool.route(rows), torch.no_grad():
                    found = self.model(self.prompts[prompts]).logits
            except LoRAPoolError as error:
                self.check_failures(error.failures or {"?": error})
                return
            self.check(found, rows, prompts)
        else:  # the failed ones are answered, the others run
            with pool.acquire(list(filter(None, rows)), strict=False) as lease:
                self.check_failures(lease.failures)
                kept = [i for i, row in enumerate(rows) if row is None or row in lease]
                if kept:
                    rows, prompts = [rows[i] for i in kept], [prompts[i] for i in kept]
                    with lease.route(rows), torch.no_grad():
                        found = self.model(self.prompts[prompts]).logits
                    self.check(found, rows, prompts)

    def check_failures(self, failures: Any) -> None:
        for name, error in failures.items():
            injected = name in (*self.broken, "org/none", "../outside") or "injected" in str(error)
            if not injected:
                self.unexpected.append(f"{name}: {error}")
            self.count("failed adapters")

    def check(self, found: torch.Tensor, rows: list[str | None], prompts: list[int]) -> None:
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            want = self.expected[row][prompt]
            if not float((found[i].double() - want).abs().max() / want.abs().max()) <= 1e-5:
                self.wrong.append(f"{row} in {rows}")
        self.count("right batches")
        self.count("rows", len(rows))

    def count(self, what: str, n: int = 1) -> None:
        with self.lock:
            self.came[what] += n


def alive(*kinds: type) -> dict[str, int]:
    gc.collect()
    return Counter(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, kinds))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_soak(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    soak = Soak(model, tmp_path)
    before = alive(Entry, Active, AdapterValue)
    begin = time.monotonic()
    with LoRAPool(model, source=soak.source, device_slots=SLOTS, host_slots=HOST, timeout=120) as pool:
        pool.pin(soak.names[7])
        threads = [threading.Thread(target=soak.work, args=(pool, seed)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - begin
        idle = 0
        while idle < 3:  # what was prefetched at last, is read first and placed then
            now = pool.metrics()
            idle = 0 if now.loading or now.placing else idle + 1
            time.sleep(0.05)
        now = pool.metrics()
        print(f"\n{REQUESTS} requests in {seconds:.0f} s: {dict(soak.came)}\n{now}\nRSS, MiB: {soak.rss}")

        assert soak.wrong == []
        assert soak.unexpected == []
        assert soak.came["rows"] > 2 * soak.came["right batches"]
        assert min(soak.came["too late"], soak.came["broke off"], soak.came["failed adapters"]) > 0

        assert (now.leased, now.waiting, now.pinned) == (0, 0, 1)
        assert now.device_adapters == len(pool.resident) <= SLOTS
        assert now.host_adapters == len(pool.cached) <= HOST
        assert set(model.lora_names) == set(pool.resident)
        assert soak.names[7] in pool.resident
        assert set(pool.resident) & set(pool.cached) <= soak.refreshed  # the old version there, the new one here
        assert now.placed - now.evictions >= now.device_adapters  # refreshed ones leave without an eviction
        assert now.loads == now.load_ms.count
        assert now.placed == now.place_ms.count
        assert min(now.device_hits, now.host_hits, now.misses, now.evictions, now.host_evictions) > 0
        sizes = {name: read_adapter(tmp_path / name).nbytes for name in soak.names}
        sizes["org/slow"] = sizes[soak.names[1]]
        assert now.device_bytes == sum(sizes[name] for name in pool.resident)
        assert now.host_bytes == sum(sizes[name] for name in pool.cached)
        held = alive(Entry, Active, AdapterValue)
        assert held["AdapterValue"] - before.get("AdapterValue", 0) == now.device_adapters + now.host_adapters
        assert held["Entry"] - before.get("Entry", 0) <= SLOTS + THREADS
        assert held["Active"] - before.get("Active", 0) <= THREADS
    assert model.lora_names == ()
    after = alive(Entry, Active, AdapterValue)
    assert {kind: n - before.get(kind, 0) for kind, n in after.items() if n > before.get(kind, 0)} == {}

    first, second = soak.rss[len(soak.rss) // 4 : len(soak.rss) // 2], soak.rss[len(soak.rss) // 2 :]
    assert max(second) <= max(first) + ALLOWED_MIB, soak.rss
