"""LoRAPool: what is where, who waits, what fails for whom, and what every row computes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from loras import bits, logits, randomise, with_adapters
from oracles import Snapshot
from pools import DOWN, MLP, QV, alone, assert_rows, random_value, write_folder

from hf_lora import (
    LoRAConfig,
    LoRAConfigError,
    LoRAError,
    LoRAFileError,
    LoRAHubError,
    LoRAMismatchError,
    LoRANameError,
    LoRAPool,
    LoRAPoolError,
    LoRAStateError,
    LoRAUnsupportedError,
    safefile,
)
from hf_lora import model as placing
from hf_lora.loading import load_lora
from hf_lora.pool.hostcache import Held, HostCache
from hf_lora.pool.sources import Source
from hf_lora.values import AdapterValue

IDS = [f"a{i}" for i in range(8)]
SHAPES = [(1, QV), (4, DOWN), (2, MLP), (3, (*QV, *DOWN))]


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny("llama")


@pytest.fixture
def values(model: Any) -> dict[str, AdapterValue]:
    return {name: random_value(model, i, *SHAPES[i % 4]) for i, name in enumerate(IDS)}


@pytest.fixture
def folder(tmp_path: Path, model: Any, values: Any) -> Path:
    write_folder(tmp_path / "adapters", model, values)
    return tmp_path / "adapters"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (4, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def expected(model: Any, folder: Path, ids: torch.Tensor) -> dict[str | None, torch.Tensor]:
    return alone(model, {name: folder / name for name in IDS}, ids)


@contextlib.contextmanager
def on_thread(function: Callable[[], Any]) -> Iterator[list[Any]]:
    """Runs beside the block; [result] once it has ended."""
    done: list[Any] = []

    def run() -> None:
        try:
            done.append(function())
        except LoRAError as error:
            done.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def nothing_held(pool: LoRAPool) -> bool:
    now = pool.metrics()
    return now.leased == now.waiting == 0


def run_rows(pool: LoRAPool, rows: list[str | None], ids: torch.Tensor) -> torch.Tensor:
    with pool.route(rows) as model:
        return logits(model, {"input_ids": ids[: len(rows)]})


# ---- every row through its own adapter -------------------------------------------------------------------------------


def test_every_row_is_its_own_adapters_also_while_they_come_and_go(model, folder, ids, expected):
    with LoRAPool(model, source=folder, device_slots=3, host_slots=2) as pool:
        for rows in (["a0", None, "a1", "a0"], ["a2", "a3", "a4"], ["a1", "a0", "a7"], [None, "a5"], ["a6"], [None]):
            assert_rows(run_rows(pool, rows, ids), rows, expected)
            assert set(pool.resident) >= set(filter(None, rows))
        assert len(pool.resident) == 3
        assert len(pool.cached) <= 2
        assert set(model.lora_names) == set(pool.resident)


def test_use_is_one_adapter_or_a_mixture_for_all_rows(model, folder, ids, expected):
    inputs = {"input_ids": ids}
    with LoRAPool(model, source=folder, device_slots=2) as pool:
        with pool.use("a0"):
            assert_rows(logits(model, inputs), ["a0"] * 4, expected)
        with pool.use({"a0": 0.5, "a2": -1.0}):
            mixed = logits(model, inputs)
        with pool.use(None):
            assert_rows(logits(model, inputs), [None] * 4, expected)
        pool.load(["a0", "a2"])
        with pool.acquire(["a0", "a2"]), model.use_lora({"a0": 0.5, "a2": -1.0}):
            assert torch.equal(logits(model, inputs), mixed)


def test_generate_in_a_route(model, folder, ids):
    rows = ["a0", None, "a3", "a1"]
    with LoRAPool(model, source=folder, device_slots=3) as pool:
        with pool.route(rows):
            together = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for i, row in enumerate(rows):
            with pool.use(row):
                one = model.generate(ids[i : i + 1], max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert torch.equal(together[i : i + 1], one)


@pytest.mark.parametrize(
    ("base", "config"),
    [
        ("llama-cls", LoRAConfig(r=2, target_modules=["q"], modules_to_save=["score"])),
        ("qwen2", LoRAConfig(r=2, target_modules=["q", "v"], bias="lora_only")),
    ],
)
def test_heads_and_biases_come_along(tiny, batch, tmp_path, base, config):
    plain, made = tiny(base), tiny(base)
    inputs = batch(plain, rows=3)
    expected: dict[str | None, torch.Tensor] = {None: logits(plain, inputs)}
    for i in range(3):
        made.add_lora(config, f"h{i}")
        randomise(made, i)
        made.save_lora(tmp_path / f"h{i}", f"h{i}")
        expected[f"h{i}"] = logits(made, inputs)
        made.remove_lora()
    with LoRAPool(plain, source=tmp_path, device_slots=2, host_slots=0) as pool:
        for rows in (["h0", None, "h1"], ["h2", "h2", None], ["h1", "h0", "h1"]):
            with pool.route(rows):
                assert_rows(logits(plain, inputs), rows, expected)


# ---- least recently used ---------------------------------------------------------------------------------------------


class Reference:
    """Two tiers by least recent use, an adapter in one of them at a time; written from the documentation."""

    def __init__(self, device: int, host: int) -> None:
        self.sizes = device, host
        self.device: OrderedDict[str, None] = OrderedDict()
        self.host: OrderedDict[str, None] = OrderedDict()
        self.pinned: set[str] = set()
        self.reads = 0

    def _keep(self, name: str) -> None:
        self.host[name] = None
        self.host.move_to_end(name)
        while len(self.host) > self.sizes[1]:
            self.host.popitem(last=False)

    def load(self, names: list[str]) -> None:
        missing = [name for name in names if name not in self.device and name not in self.host]
        for name in names:
            if name in self.host:
                self.host.move_to_end(name)
        for name in missing:
            self.reads += 1
            self._keep(name)

    def acquire(self, names: list[str]) -> bool:
        if len(self.pinned.union(names)) > self.sizes[0]:
            return False
        missing = [name for name in names if name not in self.device]
        self.load(names)
        for name in names:
            if name in self.device:
                self.device.move_to_end(name)
        for name in missing:
            if len(self.device) == self.sizes[0]:
                victim = next(n for n in self.device if n not in names and n not in self.pinned)
                del self.device[victim]
                self._keep(victim)
            self.device[name] = None
            self.host.pop(name, None)
        return True

    def evict(self, name: str) -> bool:
        if name in self.pinned:
            return False
        self.device.pop(name, None)
        self.host.pop(name, None)
        return True


_NAMES = st.lists(st.sampled_from(IDS), min_size=1, max_size=3, unique=True)
_STEPS = st.one_of(
    st.tuples(st.just("acquire"), _NAMES),
    st.tuples(st.just("acquire"), _NAMES),
    st.tuples(st.just("load"), st.lists(st.sampled_from(IDS), min_size=1, max_size=1)),
    st.tuples(st.sampled_from(["pin", "unpin", "evict"]), st.lists(st.sampled_from(IDS), min_size=1, max_size=1)),
)


@pytest.fixture
def made(model: Any, values: Any) -> Callable[[], Any]:
    return lambda: (model, values)  # hypothesis prints arguments, and these are long


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(_STEPS, max_size=25), device=st.integers(1, 3), host=st.integers(0, 4))
@example(steps=[("load", ["a0"]), ("acquire", ["a1", "a0"])], device=2, host=1)
def test_what_is_where_is_what_least_recent_use_says(made, steps, device, host):
    model, values = made()
    reference = Reference(device, host)
    with LoRAPool(model, source=values, device_slots=device, host_slots=host, loaders=1) as pool:
        for verb, names in steps:
            fits = True
            if verb == "unpin":
                reference.pinned.discard(names[0])
            elif verb == "load":
                reference.load(names)
            elif verb == "evict":
                fits = reference.evict(names[0])
            elif verb == "pin" and len(reference.pinned.union(names)) > device:
                fits = False
            else:
                fits = reference.acquire(names)
                if verb == "pin":
                    reference.pinned.update(names)
            with contextlib.nullcontext() if fits else pytest.raises(LoRAPoolError):
                if verb == "acquire":
                    pool.acquire(names).release()
                else:
                    getattr(pool, verb)(names[0])
            assert pool.resident == tuple(reference.device)
            assert pool.cached == tuple(reference.host)
        now = pool.metrics()
        assert now.loads == reference.reads
        assert (now.device_adapters, now.host_adapters, now.pinned) == (
            len(reference.device),
            len(reference.host),
            len(reference.pinned),
        )
        assert now.host_bytes == sum(values[name].nbytes for name in reference.host)
        assert now.device_bytes == sum(values[name].nbytes for name in reference.device)
        assert nothing_held(pool)
        assert set(model.lora_names) == set(reference.device)
    assert model.lora_names == ()


def test_host_memory_is_limited_by_bytes_too(model, values):
    cache = HostCache(10, 100)
    assert cache.add("large", Held(values["a0"], 101)) == 1
    assert [cache.add(name, Held(values["a0"], 40)) for name in ("x", "y", "z")] == [0, 0, 1]
    assert (cache.ids, cache.nbytes) == (("y", "z"), 80)
    assert cache.add("y", Held(values["a0"], 10)) == 0  # the same id again
    assert (cache.ids, cache.nbytes) == (("z", "y"), 50)

    most = values["a1"].nbytes + values["a2"].nbytes
    with LoRAPool(model, source=values, host_bytes=most, loaders=1) as pool:
        pool.load(["a1", "a2"])
        assert pool.metrics().host_bytes == most
        pool.load("a0")
        assert pool.cached == ("a2", "a0")
        assert pool.metrics().host_bytes == most - values["a1"].nbytes + values["a0"].nbytes


def test_a_value_is_copied_from_who_may_go_on_training_it(model, values, ids):
    with LoRAPool(model, source=values, device_slots=1) as pool:
        before = run_rows(pool, ["a0"], ids)
        pool.acquire("a1").release()
        next(iter(values["a0"].factors.values())).A.zero_()
        assert torch.equal(run_rows(pool, ["a0"], ids), before)


# ---- pinned, prefetched, evicted, refreshed --------------------------------------------------------------------------


def test_what_is_pinned_stays(model, values):
    with LoRAPool(model, source=values, device_slots=2) as pool:
        pool.pin("a0")
        for name in IDS[1:]:
            pool.acquire(name).release()
            assert "a0" in pool.resident
        with pytest.raises(LoRAPoolError) as caught:
            pool.acquire(["a1", "a2"])
        assert (caught.value.kind, caught.value.expected) == ("too many", 1)
        pool.acquire(["a0", "a1"]).release()
        with pytest.raises(LoRAPoolError, match="pinned"):
            pool.evict("a0")
        pool.pin("a1")
        with pytest.raises(LoRAPoolError) as caught:
            pool.pin("a2")
        assert caught.value.kind == "too many"
        pool.unpin("a0")
        pool.unpin("a0")
        pool.acquire("a2").release()
        assert set(pool.resident) == {"a1", "a2"}


def test_prefetch_brings_what_fits_and_raises_nothing(model, values):
    with LoRAPool(model, source=values, device_slots=3) as pool:
        pool.prefetch(["a0", "missing", "a1", "a2", "a3"])
        until(lambda: pool.metrics().loading == 0 and pool.metrics().device_adapters == 2)
        assert set(pool.resident) == {"a0", "a1"}  # "missing" had the place of the third
        assert set(pool.cached) == {"a2", "a3"}
        now = pool.metrics()
        assert (now.failures, now.loads, now.misses, now.device_hits) == (1, 4, 0, 0)
        assert now.recent_failures[0][0] == "missing"
        with pool.acquire(["a0", "a1"]):
            pool.prefetch(["a2", "a3"])  # a2 into the free slot
            until(lambda: "a2" in pool.resident)
        with pool.acquire(["a0", "a1", "a2"]):
            pool.prefetch(["a3", "a4"])
            until(lambda: "a4" in pool.cached)
            assert set(pool.resident) == {"a0", "a1", "a2"}
        assert pool.metrics().evictions == 0


def test_a_request_overtakes_what_is_prefetched(model, values):
    gate, order = threading.Event(), []

    def source(name: str) -> AdapterValue:
        order.append(name)
        assert gate.wait(20)
        return values[name]

    with LoRAPool(model, source=source, loaders=1) as pool:
        pool.prefetch(["a0", "a1", "a2", "a3"])
        until(lambda: order == ["a0"])
        with on_thread(lambda: pool.acquire(["a3", "a4"]).release()):
            until(lambda: pool.metrics().misses == 2)
            gate.set()
        until(lambda: pool.metrics().loading == 0)
    assert order == ["a0", "a3", "a4", "a1", "a2"]


def test_refresh_gives_the_new_version_to_who_asks_from_now_on(model, folder, ids, expected, tmp_path):
    new = write_folder(tmp_path / "new", model, {"a0": random_value(model, 99, 2, MLP)})["a0"]
    after = alone(model, {"a0": new}, ids)
    with LoRAPool(model, source=folder, device_slots=2) as pool:
        lease = pool.acquire("a0")
        for file in new.iterdir():
            (folder / "a0" / file.name).write_bytes(file.read_bytes())
        with lease.route(["a0"]):
            assert_rows(logits(model, {"input_ids": ids[:1]}), ["a0"], expected)
        pool.refresh("a0")
        with on_thread(lambda: run_rows(pool, ["a0", "a1"], ids)) as done:
            until(lambda: pool.metrics().waiting == 1)
            with lease.route(["a0"]):  # the old version until it is let go
                assert_rows(logits(model, {"input_ids": ids[:1]}), ["a0"], expected)
            lease.release()
        assert_rows(done[0], ["a0", "a1"], {**expected, **after})
        assert pool.metrics().loads == 3
        pool.evict("a0")
        pool.evict("a0")
        assert "a0" not in pool.resident + pool.cached + model.lora_names


def test_refresh_while_it_is_read_or_waits(model, values, ids):
    """A value that was read before a refresh is never placed after it."""
    gate, reads = threading.Event(), []
    versions = [random_value(model, seed) for seed in (1, 2)]

    def source(name: str) -> AdapterValue:
        if name != "x":
            return values[name]
        reads.append(name)
        value = versions[min(len(reads), 2) - 1]
        assert len(reads) > 1 or gate.wait(20)
        return value

    with LoRAPool(model, source=source, device_slots=1) as pool:
        with on_thread(lambda: run_rows(pool, ["x"], ids)) as done:
            until(lambda: len(reads) == 1)
            pool.refresh("x")
            gate.set()
        model.load_lora(versions[1], name="mine")
        with model.route_lora(["mine"]):
            assert torch.equal(done[0], logits(model, {"input_ids": ids[:1]}))
        assert len(reads) == 2


def test_a_read_that_a_refresh_overtook_is_counted_until_it_ends_and_leaves_nothing(model, monkeypatch):
    gate, begun, made = threading.Event(), threading.Event(), []
    plain_read = Source.read

    def read(self: Source, name: str) -> tuple[AdapterValue, int]:
        value, nbytes = plain_read(self, name)
        made.append(weakref.ref(value))
        begun.set()
        assert gate.wait(20)
        return value, nbytes

    monkeypatch.setattr(Source, "read", read)
    with LoRAPool(model, source={"x": random_value(model, 1)}, device_slots=1, host_slots=0) as pool:
        pool.prefetch("x")
        assert begun.wait(20)
        pool.refresh("x")
        assert pool.metrics().loading == 1
        gc.disable()  # what it read must not wait for the collector
        try:
            gate.set()
            until(lambda: pool.metrics().loading == 0)
            until(lambda: made[0]() is None)
        finally:
            gc.enable()
        assert pool.metrics().loads == 1
        assert "x" not in pool.resident + pool.cached


def test_refresh_while_it_waits_for_a_slot_or_is_written(model, values, ids, monkeypatch):
    gate, writing, reads = threading.Event(), threading.Event(), []
    versions = [random_value(model, seed) for seed in (1, 2, 3)]

    def source(name: str) -> AdapterValue:
        reads.append(name)
        return values[name] if name != "x" else versions[reads.count("x") - 1]

    def slow_put(*args: Any, **kwargs: Any) -> None:
        if args[2] == "x":
            writing.set()
            assert gate.wait(20)
        put(*args, **kwargs)

    put = placing.put
    monkeypatch.setattr(placing, "put", slow_put)
    with LoRAPool(model, source=source, device_slots=1) as pool:
        lease = pool.acquire("a0")
        with on_thread(lambda: run_rows(pool, ["x"], ids)) as done:
            until(lambda: pool.metrics().waiting == 1)
            pool.refresh("x")  # it was read, and waits
            lease.release()
            assert writing.wait(20)
            assert reads == ["a0", "x", "x"]
            pool.refresh("x")  # it is being written
            gate.set()
        assert reads == ["a0", "x", "x", "x"]
        assert pool.metrics().placed == 3
        pool.evict("x")
        load_lora(model, versions[2], name="mine")
        with model.route_lora(["mine"]):
            assert torch.equal(done[0], logits(model, {"input_ids": ids[:1]}))


def test_refresh_of_what_a_block_outside_the_pool_holds(model, values):
    with LoRAPool(model, source=values, device_slots=2) as pool:
        pool.acquire("a0").release()
        pool.refresh("a0")
        with model.use_lora("a0"), pytest.raises(LoRAPoolError) as caught:
            pool.acquire("a0")
        assert isinstance(caught.value.failures["a0"], LoRAStateError)
        pool.acquire("a0").release()  # the block has ended
        assert pool.metrics().placed == 2


# ---- one load, however many ask --------------------------------------------------------------------------------------


def test_requests_for_one_adapter_share_its_load(model, values, ids):
    gate, reads = threading.Event(), []

    def source(name: str) -> AdapterValue:
        reads.append(name)
        assert gate.wait(20)
        return values[name]

    with LoRAPool(model, source=source, loaders=4) as pool, contextlib.ExitStack() as threads:
        results = [threads.enter_context(on_thread(lambda: run_rows(pool, ["a0"], ids))) for _ in range(6)]
        until(lambda: pool.metrics().misses == 6)
        gate.set()
        threads.close()
        assert reads == ["a0"]
        assert all(torch.equal(result[0], results[0][0]) for result in results)
        now = pool.metrics()
        assert (now.loads, now.placed, now.misses) == (1, 1, 6)
        assert now.load_ms.count == now.place_ms.count == 1


def test_a_hit_waits_for_nobodys_load(model, values, ids, monkeypatch):
    """While a source hangs, and while an adapter is being written, what is on the device runs."""
    gate, reading, writing = threading.Event(), threading.Event(), threading.Event()

    def source(name: str) -> AdapterValue:
        if name == "a2":
            reading.set()
            assert gate.wait(20)
        return values[name]

    def slow_put(*args: Any, **kwargs: Any) -> None:
        if args[2] == "a1":
            writing.set()
            assert gate.wait(20)
        put(*args, **kwargs)

    put = placing.put
    monkeypatch.setattr(placing, "put", slow_put)
    with LoRAPool(model, source=source, device_slots=3) as pool:
        before = run_rows(pool, ["a0"], ids)
        with on_thread(lambda: pool.acquire("a1").release()), on_thread(lambda: pool.acquire("a2").release()):
            assert reading.wait(20)
            assert writing.wait(20)
            assert torch.equal(run_rows(pool, ["a0"], ids), before)
            gate.set()


def test_a_running_forward_neither_waits_nor_changes_while_others_come_and_go(model, folder, ids, expected):
    inside, gate = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        if threading.current_thread().name == "paused":
            inside.set()
            assert gate.wait(20)

    handle = model.model.layers[0].self_attn.register_forward_hook(pause)
    with LoRAPool(model, source=folder, device_slots=3) as pool:
        rows = ["a1", None, "a3"]

        def paused() -> torch.Tensor:
            threading.current_thread().name = "paused"
            return run_rows(pool, rows, ids)

        with on_thread(paused) as done:
            assert inside.wait(20)
            for name in ("a0", "a2", "a4", "a6"):
                assert_rows(run_rows(pool, [name], ids), [name], expected)
            assert {"a1", "a3"} < set(pool.resident)
            gate.set()
        assert_rows(done[0], rows, expected)
        assert pool.metrics().evictions == 3
    handle.remove()


# ---- what fails ------------------------------------------------------------------------------------------------------


def spoiled(kind: str, path: Path, value: AdapterValue) -> None:
    """Damage the adapter in `path`."""
    config, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    fields = json.loads(config.read_text())
    if kind == "missing":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif kind == "another base":
        config.write_text(json.dumps({**fields, "base_model_name_or_path": "lab/other"}))
    elif kind == "another type":
        config.write_text(json.dumps({**fields, "peft_type": "LOHA"}))
    elif kind == "not finite":
        data = weights.read_bytes()
        weights.write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")  # NaN
    elif kind == "no JSON":
        config.write_text("{")


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("missing", LoRAFileError),
        ("truncated", LoRAFileError),
        ("another base", LoRAMismatchError),
        ("another type", LoRAUnsupportedError),
        ("not finite", LoRAFileError),
        ("no JSON", LoRAFileError),
    ],
)
def test_a_load_that_fails_concerns_its_own_request(model, folder, values, ids, expected, kind, error):
    model.config._name_or_path = "lab/base"
    good = {file.name: file.read_bytes() for file in (folder / "a2").iterdir()}
    spoiled(kind, folder / "a2", values["a2"])
    with LoRAPool(model, source=folder, device_slots=3) as pool:
        with pytest.raises(LoRAPoolError) as caught, pool.route(["a0", "a2", None]):
            raise AssertionError("the block must not run")
        assert caught.value.kind == "failed"
        assert set(caught.value.failures) == {"a2"}
        assert isinstance(caught.value.failures["a2"], error)
        assert caught.value.__cause__ is caught.value.failures["a2"]
        assert nothing_held(pool)
        assert "a2" not in model.lora_names

        rows = ["a0", "a2", None]
        with pool.acquire(["a0", "a2"], strict=False) as lease:
            assert (lease.ids, set(lease.failures)) == (("a0",), {"a2"})
            assert "a0" in lease
            assert "a2" not in lease
            rows = [row for row in rows if row not in lease.failures]
            with lease.route(rows):
                assert_rows(logits(model, {"input_ids": ids[:2]}), rows, expected)
            with pytest.raises(error), lease.route(["a2"]):
                pass
        assert isinstance(pool.load(["a0", "a2"])["a2"], error)
        assert pool.load("a0") == {"a0": None}
        assert pool.metrics().failures == 3  # nothing of it is remembered …
        for name, data in good.items():
            (folder / "a2" / name).write_bytes(data)
        assert_rows(run_rows(pool, ["a0", "a2"], ids), ["a0", "a2"], expected)  # … so a repair helps at once


def test_what_does_not_fit_fails_before_it_takes_a_slot(model, values):
    other = random_value(model, 0, 2, QV)
    wrong = {path.replace("layers.0", "layers.7"): factors for path, factors in other.factors.items()}
    bad = AdapterValue(other.config, wrong)
    with LoRAPool(model, source={**values, "bad": bad}, device_slots=1) as pool:
        pool.acquire("a0").release()
        failure = pool.load("bad")["bad"]
        assert isinstance(failure, LoRAMismatchError)
        assert "layers.7" in str(failure)
        assert isinstance(pool.acquire("bad", strict=False).failures["bad"], LoRAMismatchError)
        assert pool.resident == ("a0",)


def test_a_source_that_raises_or_gives_nonsense(model, values):
    calls = iter([RuntimeError("no route to host"), 7, values["a0"]])

    def source(name: str) -> Any:
        found = next(calls)
        if isinstance(found, Exception):
            raise found
        return found

    with LoRAPool(model, source=source) as pool:
        first = pool.load("x")["x"]
        assert isinstance(first, LoRAFileError)
        assert "no route to host" in str(first)
        assert isinstance(first.__cause__, RuntimeError)
        second = pool.load("x")["x"]
        assert isinstance(second, LoRAFileError)
        assert second.value == 7
        assert pool.load("x")["x"] is None
    with LoRAPool(model, source=values) as pool:
        with pytest.raises(LoRAPoolError) as caught:
            pool.acquire("a00")
        assert isinstance(caught.value.failures["a00"], LoRANameError)
        assert "Did you mean 'a0'" in str(caught.value.failures["a00"])


def test_a_put_that_fails_half_way_leaves_nothing(model, folder, ids, expected, monkeypatch):
    from hf_lora.slots import LoRASlots

    put, calls = LoRASlots.put_frozen, []

    def failing(self: Any, *args: Any) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError("no room")
        put(self, *args)

    with LoRAPool(model, source=folder, device_slots=2) as pool:
        run_rows(pool, ["a1"], ids)
        calls.clear()
        monkeypatch.setattr(LoRASlots, "put_frozen", failing)
        with pool.acquire(["a0", "a1"], strict=False) as lease:
            assert set(lease.failures) == {"a0"}
            assert isinstance(lease.failures["a0"].__cause__, MemoryError)
            with lease.route(["a1"]):
                assert_rows(logits(model, {"input_ids": ids[:1]}), ["a1"], expected)
        with pytest.raises(LoRAPoolError), pool.route(["nope", "a1"]):
            pass
        assert model.lora_names == ("a1",)
        assert nothing_held(pool)
        monkeypatch.undo()
        assert_rows(run_rows(pool, ["a0", "a1"], ids), ["a0", "a1"], expected)


LIMITS = {"max_rank": 3, "max_bytes": 2_000}


@pytest.mark.parametrize("limit", LIMITS)
def test_what_is_too_large_is_refused_before_its_tensors_are_read(model, folder, values, limit, monkeypatch):
    def never(*_: Any) -> Any:
        raise AssertionError("tensors were read")

    assert values["a1"].nbytes > LIMITS["max_bytes"] > values["a0"].nbytes
    with LoRAPool(model, source=folder, **{limit: LIMITS[limit]}) as pool:
        assert pool.load("a0")["a0"] is None
        monkeypatch.setattr(safefile, "read_tensors", never)
        error = pool.load("a1")["a1"]
        assert isinstance(error, LoRAPoolError)
        assert (error.kind, error.name) == ("too large", limit)
        assert pool.metrics().bytes_read > 0
    with LoRAPool(model, source=values, **{limit: LIMITS[limit]}) as pool:  # values know their size as well
        assert pool.load("a1")["a1"].kind == "too large"


@pytest.mark.parametrize(
    "name", ["../secret", "/etc", "a/../../secret", "a//b", ".", "..", "out", "a\\b", "a\0b", "a0/"]
)
def test_an_id_cannot_leave_its_folder(model, folder, values, name):
    write_folder(folder.parent, model, {"secret": values["a0"]})
    (folder / "out").symlink_to(folder.parent / "secret")
    with LoRAPool(model, source=folder) as pool:
        assert isinstance(pool.load(name)[name], LoRANameError)


def test_ids_may_have_slashes(model, tmp_path, values):
    write_folder(tmp_path, model, {"org/one": values["a0"]})
    with LoRAPool(model, source=str(tmp_path)) as pool:
        pool.acquire("org/one").release()
        assert pool.resident == ("org/one",)
    with LoRAPool(model) as pool:  # without a source an id is a folder or a repo
        pool.acquire(str(tmp_path / "org" / "one")).release()


def test_repos_of_the_hub(model, tmp_path, values, ids, hub):
    for name in ("me/one", "lab/two"):
        path = write_folder(tmp_path, model, {name: values[IDS[len(name)]]})[name]
        hub.commit(name, {file.name: file.read_bytes() for file in path.iterdir()})
    expected = alone(model, {name: tmp_path / name for name in ("me/one", "lab/two")}, ids)
    with LoRAPool(model, device_slots=3, max_bytes=100_000) as pool:
        rows = ["me/one", None, "lab/two"]
        with pool.acquire([*filter(None, rows), "me/none"], strict=False) as lease:
            assert isinstance(lease.failures["me/none"], LoRAHubError)
            with lease.route(rows):
                assert_rows(logits(model, {"input_ids": ids[:3]}), rows, expected)
        assert pool.metrics().bytes_read > 0


# ---- waiting for slots -----------------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_device_is_refused_at_once(model, values):
    with LoRAPool(model, source=values, device_slots=2) as pool:
        with pytest.raises(LoRAPoolError) as caught, pool.route(["a0", "a1", None, "a2", "a1"]):
            pass
        assert (caught.value.kind, caught.value.value, caught.value.expected) == ("too many", 3, 2)
        assert pool.resident == ()
        with pool.route(["a0", "a1", None, "a0", "a1"]):
            pass


def test_who_finds_no_slot_waits_for_one_or_times_out(model, folder, ids, expected):
    with LoRAPool(model, source=folder, device_slots=2) as pool:
        lease = pool.acquire(["a0", "a1"])
        with pytest.raises(LoRAPoolError) as caught:
            pool.acquire(["a0", "a2"], timeout=0.01)
        with on_thread(lambda: pool.acquire("a3", timeout=20).release()):
            until(lambda: pool.metrics().waiting == 1)
            assert_rows(run_rows(pool, [None, None], ids), [None, None], expected)  # the base alone waits for nobody
            lease.release()
            until(lambda: nothing_held(pool))
            lease = pool.acquire(["a0", "a1"])
        assert (caught.value.kind, pool.metrics().timeouts) == ("timeout", 1)
        assert (pool.metrics().leased, pool.metrics().waiting) == (2, 0)
        with on_thread(lambda: run_rows(pool, ["a2", "a0"], ids)) as done:
            until(lambda: pool.metrics().waiting == 1)
            assert done == []
            lease.release()
            lease.release()
        assert_rows(done[0], ["a2", "a0"], expected)
        assert pool.metrics().wait_ms.count == 4


def test_first_come_first_served(model, values):
    """A batch of three is not starved by small ones that would fit meanwhile."""
    with LoRAPool(model, source=values, device_slots=3) as pool:
        lease, order = pool.acquire("a0"), []

        def take(name: str, wanted: list[str]) -> None:
            with pool.acquire(wanted):
                order.append(name)

        with on_thread(lambda: take("large", ["a1", "a2", "a3"])):
            until(lambda: pool.metrics().waiting == 1)
            with on_thread(lambda: take("small", ["a4"])):
                until(lambda: pool.metrics().waiting == 2)
                assert order == []
                lease.release()
        assert sorted(order) == ["large", "small"]


def test_batches_never_wait_for_each_others_half(model, values):
    """Two of three over four slots, again and again: whoever holds a part and waits for the rest would hang."""
    with LoRAPool(model, source=values, device_slots=4, timeout=30) as pool:

        def batches(first: int) -> str:
            for i in range(20):
                with pool.acquire([IDS[(first + i + j) % 8] for j in range(3)]):
                    pass
            return "done"

        with contextlib.ExitStack() as threads:
            results = [threads.enter_context(on_thread(lambda n=n: batches(n))) for n in (0, 4, 2)]
        assert results == [["done"]] * 3


def test_a_source_that_hangs_times_out_for_its_own_request(model, values):
    gate = threading.Event()

    def source(name: str) -> AdapterValue:
        assert name != "a1" or gate.wait(20)
        return values[name]

    with LoRAPool(model, source=source, loaders=2) as pool:
        with pool.acquire(["a0", "a1"], strict=False, timeout=0.2) as lease:
            assert lease.ids == ("a0",)
            assert lease.failures["a1"].kind == "timeout"
        gate.set()
        pool.acquire("a1").release()
        assert pool.metrics().loads == 2  # the read that was too late was not lost


def test_an_exception_in_the_block_leaves_nothing_held(model, values):
    with LoRAPool(model, source=values, device_slots=1) as pool:
        for verb in (lambda: pool.route(["a0"]), lambda: pool.use("a0"), lambda: pool.acquire("a0")):
            with pytest.raises(ZeroDivisionError), verb():
                raise ZeroDivisionError
            assert nothing_held(pool)
        with pytest.raises(LoRAError), pool.route(["a0", "a0"]):
            model(torch.zeros(3, 4, dtype=torch.long))  # another number of rows
        with pytest.raises(LoRAError), pool.route("a0"):
            pass
        assert nothing_held(pool)
        pool.acquire("a1").release()


def test_a_lease_is_for_what_it_holds(model, values):
    with LoRAPool(model, source=values, device_slots=2) as pool:
        with pool.acquire(["a0"]) as lease:
            pool.acquire(["a1"]).release()
            pool.acquire(["a2"]).release()
            assert pool.resident == ("a0", "a2")  # held, though no block is open
            with pytest.raises(LoRANameError, match="does not hold 'a1'"), lease.route(["a0", "a1"]):
                pass
            with pytest.raises(LoRANameError), lease.use({"a1": 1.0}):
                pass
        with pytest.raises(LoRAStateError, match="released"), lease.route(["a0"]):
            pass
        for wrong in ("", 7, None):
            with pytest.raises(LoRANameError):
                pool.acquire([wrong])


# ---- asyncio ---------------------------------------------------------------------------------------------------------


def test_tasks_load_together_and_the_loop_goes_on(model, values, ids):
    gate, ticks = threading.Event(), []

    def source(name: str) -> AdapterValue:
        assert gate.wait(20)
        return values[name]

    async def request(pool: LoRAPool, name: str) -> torch.Tensor:
        assert await pool.aload(name) == {name: None}
        async_lease = await pool.aacquire([name])
        with async_lease, async_lease.route([name]):
            return await asyncio.to_thread(logits, model, {"input_ids": ids[:1]})

    async def main(pool: LoRAPool) -> list[torch.Tensor]:
        tasks = [asyncio.create_task(request(pool, name)) for name in ("a0", "a1", "a0", "a2")]
        for _ in range(5):
            await asyncio.sleep(0)
            ticks.append(len(tasks))
        gate.set()
        return await asyncio.gather(*tasks)

    with LoRAPool(model, source=source, device_slots=2) as pool:
        results = asyncio.run(main(pool))
        assert len(ticks) == 5
        assert pool.metrics().loads == 3
        for name, found in zip(("a0", "a1", "a0", "a2"), results, strict=True):
            assert torch.equal(found, run_rows(pool, [name], ids))
        assert nothing_held(pool)


def test_a_cancelled_task_holds_nothing(model, values):
    gate = threading.Event()

    def source(name: str) -> AdapterValue:
        assert name != "a3" or gate.wait(20)
        return values[name]

    async def cancelled(pool: LoRAPool, wanted: list[str], there: Callable[[], bool]) -> None:
        task = asyncio.create_task(pool.aacquire(wanted))
        while not there():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with LoRAPool(model, source=source, device_slots=2) as pool:
        lease = pool.acquire(["a0"])
        asyncio.run(cancelled(pool, ["a1", "a2"], lambda: pool.metrics().waiting == 1))  # while it waits for slots
        assert (pool.metrics().waiting, pool.metrics().leased) == (0, 1)
        asyncio.run(cancelled(pool, ["a0", "a3"], lambda: pool.metrics().loading == 1))  # while it is read
        assert pool.metrics().leased == 1
        gate.set()
        lease.release()
        pool.acquire(["a1", "a3"]).release()
        assert nothing_held(pool)


def test_async_timeouts_and_failures(model, values):
    async def main(pool: LoRAPool) -> None:
        with pytest.raises(LoRAPoolError) as caught:
            await pool.aacquire(["a0", "nope"])
        assert set(caught.value.failures) == {"nope"}
        lease = await pool.aacquire(["a0", "a2"])
        with pytest.raises(LoRAPoolError) as caught:
            await pool.aacquire("a1", timeout=0.01)
        assert caught.value.kind == "timeout"
        lease.release()
        (await pool.aacquire(["a1"])).release()

    with LoRAPool(model, source=values, device_slots=2) as pool:
        asyncio.run(main(pool))
        assert nothing_held(pool)


# ---- the model around it ---------------------------------------------------------------------------------------------


def test_the_users_own_adapters_are_used_and_never_touched(model, values, ids):
    model.add_lora(LoRAConfig(r=2, target_modules=["q"]), "mine")
    randomise(model, 5)
    load_lora(model, values["a7"], name="a7")
    model.set_lora("mine")
    inputs = {"input_ids": ids[:3]}
    own = {name: bits(model) for name in ("state",)}
    with LoRAPool(model, source=values, device_slots=1) as pool:
        for rows in (["mine", "a0", "a7"], ["a1", "mine", None], ["mine", "a7", "a2"]):
            with pool.route(rows):
                found = logits(model, inputs)
            for i, row in enumerate(rows):
                with pool.use(row):
                    assert torch.allclose(found[i], logits(model, inputs)[i], atol=1e-5)
        assert "a7" not in pool.resident
        assert pool.metrics().misses == 3
        pool.evict("a7")
        assert model.active_lora == "mine"
    assert model.lora_names == ("mine", "a7")
    assert {"state": bits(model)} == own


def test_what_trains_or_is_the_default_is_not_evicted(model, values):
    with LoRAPool(model, source=values, device_slots=2) as pool:
        pool.acquire("a0").release()
        model.set_lora("a0")
        for name in IDS[1:4]:
            pool.acquire(name).release()
        assert model.active_lora == "a0"
        model.train_lora("a3")
        with pytest.raises(LoRAPoolError) as caught:
            pool.acquire("a4")
        assert caught.value.failures["a4"].kind == "full"
        model.set_lora(None)
        pool.acquire("a4").release()
        assert set(pool.resident) == {"a3", "a4"}
    assert model.lora_names == ("a3",)  # it trains: it is the user's now


def test_what_was_removed_by_hand_is_loaded_again(model, folder, ids, expected):
    with LoRAPool(model, source=folder, device_slots=2) as pool:
        run_rows(pool, ["a0", "a1"], ids)
        model.remove_lora("a0")
        assert_rows(run_rows(pool, ["a0", "a1"], ids), ["a0", "a1"], expected)
        model.remove_lora()
        assert_rows(run_rows(pool, ["a0", "a2"], ids), ["a0", "a2"], expected)
        run_rows(pool, ["a3", "a4"], ids)


def test_a_block_outside_the_pool_keeps_its_adapter(model, values):
    with LoRAPool(model, source=values, device_slots=2) as pool:
        pool.acquire(["a0", "a1"]).release()
        with model.route_lora(["a0"]):
            pool.acquire("a2").release()
            assert set(pool.resident) == {"a0", "a2"}
            with pytest.raises(LoRAStateError):
                pool.evict("a0")
            assert "a0" in pool.resident
        pool.evict("a0")


def test_nothing_is_asked_of_a_merged_model(model, values):
    with LoRAPool(model, source=values) as pool:
        pool.acquire("a0").release()
        model.set_lora("a0")
        model.merge_lora()
        for verb in (pool.load, pool.acquire, lambda name: pool.route([name]).__enter__()):
            with pytest.raises(LoRAStateError, match="merged"):
                verb("a0")
        model.unmerge_lora()
        pool.acquire("a1").release()


# ---- the end ---------------------------------------------------------------------------------------------------------


def pool_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("hf_lora-pool")}


def test_close_gives_the_model_back(model, values, ids):
    before = Snapshot(model)
    pool = LoRAPool(model, source=values, device_slots=3, loaders=3)
    assert len(pool_threads()) == 4
    run_rows(pool, ["a0", "a1", "a2"], ids)
    pool.pin("a0")
    pool.close()
    pool.close()
    before.assert_same(model)
    assert pool_threads() == set()
    assert (pool.resident, pool.cached, pool.metrics().pinned) == ((), (), 0)
    for verb in (pool.load, pool.acquire, pool.prefetch, pool.pin):
        with pytest.raises(LoRAPoolError) as caught:
            verb("a0")
        assert caught.value.kind == "closed"


def test_close_waits_for_requests_and_refuses_those_that_wait(model, values):
    gate = threading.Event()

    def source(name: str) -> AdapterValue:
        assert name != "a2" or gate.wait(20)
        return values[name]

    pool = LoRAPool(model, source=source, device_slots=1, loaders=1)
    lease = pool.acquire("a0")
    with (
        on_thread(lambda: pool.acquire("a1")) as waiting,
        on_thread(lambda: (until(lambda: pool.metrics().waiting == 1), pool.acquire("a2"))[1]) as reading,
        on_thread(lambda: (until(lambda: pool.metrics().misses == 3), pool.acquire("a3"))[1]) as queued,
    ):
        until(lambda: pool.metrics().misses == 4)
        with pytest.raises(LoRAPoolError) as caught:
            pool.close(timeout=0.05)
        assert caught.value.kind == "in use"
        with on_thread(lambda: pool.close()):
            gate.set()
            lease.release()
    assert waiting[0].kind == "closed"
    assert reading[0].kind == "closed"
    assert queued[0].kind == "closed"
    assert model.lora_names == ()
    assert pool_threads() == set()


def test_a_pool_made_inside_a_block_works(model, values):
    load_lora(model, values["a7"], name="mine")
    with model.use_lora("mine"), LoRAPool(model, source=values) as pool:
        pool.acquire("a0").release()
        assert model.active_lora == "mine"


def test_a_pool_that_nobody_closed_leaves_no_thread(model, values):
    pool = LoRAPool(model, source=values)
    pool.acquire("a0").release()
    del pool
    gc.collect()
    until(lambda: pool_threads() == set())


@pytest.mark.parametrize(
    "wrong",
    [
        {"device_slots": 0},
        {"host_slots": -1},
        {"loaders": 0},
        {"max_rank": 0},
        {"max_bytes": float("nan")},
        {"timeout": -1},
        {"device_slots": True},
        {"source": "/no/such/folder"},
        {"source": 7},
    ],
)
def test_impossible_pools_are_refused(model, wrong):
    with pytest.raises(LoRAConfigError) as caught:
        LoRAPool(model, **wrong)
    assert caught.value.name in wrong
    assert pool_threads() == set()


def test_banks_are_made_once_where_the_largest_rank_is_known(tiny: Any) -> None:
    config = LoRAConfig(r=2, target_modules=["q", "v"])
    value = with_adapters(tiny("llama"), {"a": config}).lora_adapter("a")
    model = tiny("llama")
    attributes = set(vars(model))
    with LoRAPool(model, source={str(i): value for i in range(6)}, device_slots=3, max_rank=4) as pool:
        seen = set()
        for i in range(6):
            with pool.use(str(i)):
                seen |= {(n, b.data_ptr(), tuple(b.shape)) for n, b in model.named_buffers() if n.endswith("bank_B")}
        assert len(seen) == len({name for name, _, _ in seen}) == 4
        assert {shape[:2] for _, _, shape in seen} == {(4, 4)}
    assert set(vars(model)) == attributes
