"""Many threads on one model: each has the outputs of its own adapter, whatever the others put, remove, switch or merge.

The oracle is what each adapter gave when nobody else was there. Schedules are drawn from a seed, and the interpreter
changes threads every few microseconds.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loras import bits, logits, with_adapters
from torch import Tensor

from hf_lora import LoRAConfig, LoRAError, LoRANameError, LoRAStateError, switching
from hf_lora import model as placing
from hf_lora.switching import use_lora

FEW = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CONFIGS = {
    "a": LoRAConfig(r=2, target_modules=["q", "v"], alpha=20),
    "b": LoRAConfig(r=3, target_modules=["q", "down"], alpha=20),
    "c": LoRAConfig(r=2, target_modules=["up"], alpha=20, use_dora=True),
    "d": LoRAConfig(r=4, target_modules=["q", "v"], alpha=20, bias="none"),
}
TIMEOUT = 30  # seconds until a thread counts as deadlocked


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Change threads as often as it goes."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


@pytest.fixture
def model(tiny: Any) -> Any:
    return with_adapters(tiny("llama"), CONFIGS)


def together(*works: Callable[[], Any]) -> list[Any]:
    """Run each in a thread of its own, begun at once; what each returned or raised."""
    found: list[Any] = [None] * len(works)
    gate = threading.Barrier(len(works))

    def run(i: int, work: Callable[[], Any]) -> None:
        gate.wait(TIMEOUT)
        try:
            found[i] = work()
        except BaseException as error:  # noqa: BLE001  # looked at by the test
            found[i] = error

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not [thread for thread in threads if thread.is_alive()], "a deadlock"
    return found


def raised(found: list[Any]) -> list[BaseException]:
    return [each for each in found if isinstance(each, BaseException)]


def nobody(model: Any) -> bool:
    """Whether no block is counted as open, and what is active by default is there."""
    state = placing.state_of(model)
    assert state is not None
    alive = all(entry.alive and state.entries.get(entry.name) is entry for entry in state.default.entries)
    return alive and not state.blocks and not any(entry.users for entry in state.entries.values())


# ---- random schedules ------------------------------------------------------------------------------------------------


def oracle(model: Any, inputs: Any) -> dict[Any, Tensor]:
    found = {}
    for name in ("a", "b", "c", "d", None):
        with model.use_lora(name):
            found[name] = logits(model, inputs), model.generate(**inputs, **FEW)
    return found


def users(model: Any, inputs: Any, expected: Any, mine: Any, seed: int, rounds: int) -> Callable[[], None]:
    """A thread that runs one adapter (None: the base) by each kind of block."""
    rows = inputs["input_ids"].shape[0]
    other = next(name for name in ("a", "b", "d") if name != mine)

    def once(kind: str) -> None:
        if kind == "none":
            with model.no_lora():
                assert torch.equal(logits(model, inputs), expected[None][0])
        elif kind == "generate":
            with model.use_lora(mine):
                assert torch.equal(model.generate(**inputs, **FEW), expected[mine][1])
        elif kind == "use":
            with model.use_lora(mine):
                assert torch.equal(logits(model, inputs), expected[mine][0])
                with model.use_lora(other):
                    assert torch.equal(logits(model, inputs), expected[other][0])
                assert model.active_lora == mine
        else:
            route = [mine] * rows if kind == "route" else [mine, other, None][:rows]
            with model.route_lora(route):
                found = logits(model, inputs)
            for i, name in enumerate(route):
                own = expected[name][0][i]
                assert (found[i] - own).abs().max() <= 1e-5 * own.abs().max(), (kind, name)

    def work() -> None:
        chance = random.Random(seed)
        for _ in range(rounds):
            kind = chance.choice(["use", "use", "generate", "route", "mixed route", "none"])
            while True:
                try:
                    once(kind)
                    break
                except LoRAStateError as error:  # another thread has merged for a moment: no block opens then
                    if "merged into the weights" not in str(error):
                        raise

    return work


def changers(model: Any, values: Any, name: str, seed: int, rounds: int) -> Callable[[], dict[str, int]]:
    """A thread that puts, replaces, removes, trains, switches, reserves and merges; only typed errors are let pass."""

    def work() -> dict[str, int]:
        chance, refused = random.Random(seed), {"merge": 0, "other": 0}
        for _ in range(rounds):
            verb = chance.choice(["load", "load", "replace", "remove", "train", "set", "reserve", "merge"])
            try:
                if verb == "load":
                    model.load_lora(chance.choice(values), name=name, trainable=chance.random() < 0.3)
                elif verb == "replace":
                    model.load_lora(chance.choice(values), name=name, replace=True)
                elif verb == "remove":
                    model.remove_lora(name)
                elif verb == "train":
                    model.train_lora(chance.choice([[], [name]]))
                elif verb == "set":
                    model.set_lora(chance.choice(["a", "b", None, name, {"a": 0.5, "b": 2.0}]))
                elif verb == "reserve":
                    placing.reserve(model, chance.randint(1, 12), chance.randint(1, 6))
                else:
                    model.merge_lora("a")
                    model.unmerge_lora()
            except (LoRANameError, LoRAStateError):
                refused["merge" if verb == "merge" else "other"] += 1
        return refused

    return work


@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_schedule(model: Any, batch: Any, seed: int) -> None:
    inputs = batch(model, 3)
    expected = oracle(model, inputs)
    assert len({tuple(expected[name][0].flatten().tolist()) for name in expected}) == 5
    values = [model.lora_adapter(name) for name in ("a", "b", "c")]
    works = [users(model, inputs, expected, name, 10 * seed + i, 10) for i, name in enumerate(["a", "b", "c", None])]
    works += [changers(model, values, name, 100 + 10 * seed + i, 40) for i, name in enumerate(["x", "y", "x"])]
    found = together(*works)
    assert not raised(found), raised(found)
    assert nobody(model)
    for name in set(model.lora_names) - set(CONFIGS):
        model.remove_lora(name)
    model.train_lora([])
    again = oracle(model, inputs)
    assert all(torch.equal(again[name][0], expected[name][0]) for name in expected)


def test_threads_that_put_and_remove_the_first_adapter(tiny: Any, batch: Any) -> None:
    """The model gets and loses its state all the time; at the end it is the base, bit for bit."""
    model = tiny("llama")
    before, inputs = bits(model), batch(model)
    plain = logits(model, inputs)
    values = {}
    for name in ("a", "b"):
        other = with_adapters(tiny("llama"), {name: CONFIGS[name]})
        values[name] = other.lora_adapter(name), logits(other, inputs)

    def work(name: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(12):
                model.load_lora(values[name][0], name=name)
                with model.use_lora(name):
                    assert torch.equal(logits(model, inputs), values[name][1])
                model.remove_lora(name)

        return run

    def base() -> None:
        for _ in range(12):
            with contextlib.suppress(LoRAStateError), model.no_lora():  # the model may have none at that moment
                assert torch.equal(logits(model, inputs), plain)

    found = together(work("a"), work("b"), base)
    assert not [each for each in raised(found) if not isinstance(each, LoRAError)], raised(found)
    assert not raised(found[:2]), raised(found)
    assert placing.state_of(model) is None
    assert bits(model) == before
    assert torch.equal(logits(model, inputs), plain)


# ---- at the worst moment ---------------------------------------------------------------------------------------------


def test_one_name_put_twice_at_once(model: Any) -> None:
    for _ in range(5):
        values = [model.lora_adapter(name) for name in ("a", "b", "d")]
        found = together(*[lambda value=value: model.load_lora(value, name="new") for value in values])
        assert [type(error) for error in raised(found)] == [LoRANameError, LoRANameError]
        model.remove_lora("new")


def test_one_adapter_removed_twice_at_once(model: Any, batch: Any) -> None:
    """The second one must not take what a third thread has just put into the place."""
    inputs = batch(model)
    value, expected = model.lora_adapter("b"), oracle(model, inputs)["b"][0]
    for i in range(5):
        model.load_lora(value, name="old")
        found = together(
            lambda: model.remove_lora("old"),
            lambda: model.remove_lora("old"),
            lambda i=i: model.load_lora(value, name=f"new{i}"),
        )
        assert [type(error) for error in raised(found)] == [LoRANameError]
        with model.use_lora(f"new{i}"):
            assert torch.equal(logits(model, inputs), expected)


def at_the_moment(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], Any]) -> list[Any]:
    """Let another thread do `act` once, just before `owner.name` is called; what that gave."""
    original, done = getattr(owner, name), []

    def called(*args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(None)
            done[:] = together(act)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)
    return done


def test_a_block_that_opens_while_its_adapter_is_removed(
    model: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = batch(model)

    def use() -> Tensor:
        with use_lora(model, "b"):
            return logits(model, inputs)

    done = at_the_moment(monkeypatch, placing, "_erase", use)  # the adapter goes out of the layers now
    model.remove_lora("b")
    assert isinstance(done[0], LoRANameError)
    assert nobody(model)


def test_an_adapter_that_a_block_took_after_it_was_looked_at_stays(
    model: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, opened, leave = batch(model), threading.Event(), threading.Event()
    expected = oracle(model, inputs)["b"][0]
    found: list[Tensor] = []

    def use() -> None:
        with model.use_lora("b"):
            opened.set()
            leave.wait(TIMEOUT)
            found.append(logits(model, inputs))

    thread = threading.Thread(target=use)

    def begin() -> None:
        thread.start()
        opened.wait(TIMEOUT)

    state = type(placing.state_of(model))
    at_the_moment(monkeypatch, state, "retire", begin)
    with pytest.raises(LoRAStateError, match="names it"):
        model.remove_lora("b")
    leave.set()
    thread.join(TIMEOUT)
    assert torch.equal(found[0], expected)
    assert "b" in model.lora_names
    assert nobody(model)


@pytest.mark.parametrize("verb", ["replace", "train"])
def test_a_block_that_opens_while_its_adapter_moves(
    model: Any, batch: Any, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The change is refused and leaves nothing, or the block has the whole of it."""
    inputs, opened, leave = batch(model), threading.Event(), threading.Event()
    value, expected = model.lora_adapter("d"), oracle(model, inputs)["b"][0]
    found: list[Tensor] = []

    def use() -> None:
        with model.use_lora("b"):
            opened.set()
            leave.wait(TIMEOUT)
            found.append(logits(model, inputs))

    thread = threading.Thread(target=use)

    def begin() -> None:
        thread.start()
        opened.wait(TIMEOUT)

    at_the_moment(monkeypatch, placing, "_write", begin)
    before = model.lora_names, model.active_lora
    with pytest.raises(LoRAStateError, match="names it"):
        model.train_lora("b") if verb == "train" else model.load_lora(value, name="b", replace=True)
    leave.set()
    thread.join(TIMEOUT)
    assert torch.equal(found[0], expected)
    assert (model.lora_names, model.active_lora) == before
    slots = model.model.layers[0].self_attn.q_proj.lora_slots.slots
    state = placing.state_of(model)
    assert state is not None
    assert set(slots) == {state.entries[name].slot for name in ("a", "b", "d")}
    assert nobody(model)


def while_chosen(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> Callable[[], Any]:
    """Let another thread try `act` between the finding of an adapter and its use; what is given waits for it."""
    found, original, threads = [], switching.selection, []

    def work() -> None:
        try:
            found.append(act())
        except LoRAError as error:
            found.append(error)

    def selection(*args: Any) -> Any:
        chosen = original(*args)
        threads.append(threading.Thread(target=work))
        threads[0].start()
        threads[0].join(0.1)  # it has to wait
        return chosen

    monkeypatch.setattr(switching, "selection", selection)

    def wait() -> Any:
        threads[0].join(TIMEOUT)
        return found[0]

    return wait


def test_a_default_that_is_removed_while_it_is_chosen(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = while_chosen(monkeypatch, lambda: model.remove_lora("b"))
    model.set_lora("b")
    assert wait() is None
    assert model.active_lora is None
    assert nobody(model)


def test_an_adapter_that_is_removed_while_a_block_takes_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = while_chosen(monkeypatch, lambda: model.remove_lora("b"))
    with model.use_lora("b"):
        error = wait()
    assert isinstance(error, LoRAStateError)
    assert "names it" in str(error)
    assert "b" in model.lora_names


def test_an_adapter_is_not_put_while_weights_are_merged(model: Any, batch: Any) -> None:
    inputs, value = batch(model), model.lora_adapter("a")
    expected = oracle(model, inputs)
    for _ in range(6):
        found = together(lambda: model.load_lora(value, name="x"), lambda: model.merge_lora("b"))
        assert all(isinstance(error, LoRAStateError) for error in raised(found)), raised(found)
        merged = placing.require(model).merged is not None
        assert merged
        assert torch.allclose(logits(model, inputs), expected["b"][0], atol=1e-4)
        model.unmerge_lora()
        if "x" in model.lora_names:
            model.remove_lora("x")
        with model.no_lora():
            assert torch.equal(logits(model, inputs), expected[None][0])
