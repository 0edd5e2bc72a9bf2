"""One state: eager, compiled, recomputed, on threads, in tasks, copied and pickled."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from loras import logits, randomise, with_adapters
from torch._dynamo.testing import CompileCounterWithBackend

from hf_lora import LoRAConfig, LoRAStateError

CONFIGS = {
    "a": LoRAConfig(r=2, target_modules=["q", "v"], alpha=6),
    "org/b": LoRAConfig(r=4, target_modules=["q", "v", "embed_tokens"]),
    "c": LoRAConfig(r=3, target_modules=["down"], use_rslora=True),
}
CHOICES: list[Any] = [None, "a", "org/b", "c", {"a": 0.7, "org/b": 0.3}, ["a", "org/b", "c"], {"a": -1.5}]
ROUTES = [["a", None, "org/b"], ["c", "c", "a"], [None, None, None], ["org/b", "a", "c"]]


@pytest.fixture
def model(tiny: Any) -> Any:
    return with_adapters(tiny("llama"), CONFIGS)


@pytest.fixture
def inputs(model: Any, batch: Any) -> Any:
    return batch(model, 3)


def rows_alone(model: Any, inputs: Any, route: list[str | None]) -> torch.Tensor:
    rows = []
    for i, name in enumerate(route):
        with model.use_lora(name):
            rows.append(logits(model, {k: v[i : i + 1] for k, v in inputs.items()}))
    return torch.cat(rows)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_route_equals_every_row_alone(model: Any, inputs: Any, route: list[str | None], trainable: bool) -> None:
    if trainable:
        model.train_lora(["a", "c"])
    alone = rows_alone(model, inputs, route)
    with model.route_lora(route):
        assert (logits(model, inputs) - alone).abs().max() <= 1e-5 * alone.abs().max()
        assert (logits(model, inputs) - alone).abs().max() <= 1e-5 * alone.abs().max()  # again, from the route's cache
    if any(route):
        assert not torch.equal(alone, rows_alone(model, inputs, [None] * 3))


@pytest.mark.parametrize("trainable", [False, True])
def test_one_graph_serves_every_switch_weight_and_route(model: Any, inputs: Any, trainable: bool) -> None:
    if trainable:
        model.train_lora("a")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    weights = [{"a": w / 10, "c": 1 - w / 10} for w in range(12)]  # floats beyond dynamo's eight cached variants
    for which in CHOICES + weights + CHOICES:
        with model.use_lora(which):
            eager = logits(model, inputs, use_cache=False)
            assert (logits(compiled, inputs, use_cache=False) - eager).abs().max() <= 1e-5 * eager.abs().max(), which
    for route in ROUTES + ROUTES:
        with model.route_lora(route):
            eager = logits(model, inputs, use_cache=False)
            assert (logits(compiled, inputs, use_cache=False) - eager).abs().max() <= 1e-5 * eager.abs().max(), route
    model.set_lora("c")
    eager = logits(model, inputs, use_cache=False)
    assert (logits(compiled, inputs, use_cache=False) - eager).abs().max() <= 1e-5 * eager.abs().max()
    assert counter.frame_count == 1


def test_inductor_gives_the_same(model: Any, inputs: Any) -> None:
    compiled = torch.compile(model, fullgraph=True)
    for which in ["a", {"a": 0.7, "org/b": 0.3}, None]:
        with model.use_lora(which):
            eager = logits(model, inputs, use_cache=False)
            assert (logits(compiled, inputs, use_cache=False) - eager).abs().max() <= 1e-5 * eager.abs().max()
    with model.route_lora(ROUTES[0]):
        eager = logits(model, inputs, use_cache=False)
        assert (logits(compiled, inputs, use_cache=False) - eager).abs().max() <= 1e-5 * eager.abs().max()


def test_a_new_adapter_costs_at_most_one_recompilation(model: Any, inputs: Any) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    logits(compiled, inputs, use_cache=False)
    value = model.lora_adapter("a")
    for i in range(2):
        model.load_lora(value, name=f"copy{i}")
        with model.use_lora(f"copy{i}"):
            eager = logits(model, inputs, use_cache=False)
            assert (logits(compiled, inputs, use_cache=False) - eager).abs().max() <= 1e-5 * eager.abs().max()
    assert counter.frame_count <= 1 + 2


def gradients(model: Any, forward: Any, inputs: Any, which: Any, *, elsewhere: bool) -> dict[str, torch.Tensor]:
    """Gradients where the backward runs after the `with` has ended, with another adapter active, maybe on a thread."""
    model.zero_grad()
    failures: list[BaseException] = []
    with model.use_lora(which):
        loss = forward(**inputs, labels=inputs["input_ids"], use_cache=False).loss

    def backward() -> None:
        try:
            with model.use_lora("c"):
                loss.backward()
        except BaseException as error:  # noqa: BLE001  # raised again by the caller
            failures.append(error)

    if elsewhere:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    else:
        backward()
    if failures:
        raise failures[0]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("before", [False, True], ids=["enabled-after", "enabled-before"])
def test_recompute_sees_what_the_forward_saw(
    tiny: Any, batch: Any, reentrant: bool, elsewhere: bool, compiled: bool, before: bool
) -> None:
    model, plain = tiny("llama"), tiny("llama")
    if before:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for m in (model, plain):
        with_adapters(m, CONFIGS).train_lora(["a", "org/b"])
    if not before:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    inputs = batch(model, 3)
    which = {"a": 0.5, "org/b": 1.0}
    expected = gradients(plain.train(), plain, inputs, which, elsewhere=False)
    assert len(expected) == 2 * 4 * 2 + 2  # q, v of two layers for two adapters, A and B; one embedding
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    found = gradients(model.train(), forward, inputs, which, elsewhere=elsewhere)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("compiled", [False, True])
def test_a_routed_recompute_trains_each_row_with_its_own(tiny: Any, batch: Any, compiled: bool) -> None:
    model, plain = tiny("llama"), tiny("llama")
    for m in (model, plain):
        with_adapters(m, CONFIGS).train_lora(["a", "org/b"])
        m.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch(model, 3)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for m, run in ((plain, plain), (model, forward)):
        with m.route_lora(["a", None, "org/b"]):
            loss = run(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == found.keys()
    assert expected
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max() + 1e-9, name


def test_threads_never_see_each_others_adapter(model: Any, inputs: Any) -> None:
    expected = {}
    for which in (None, "a", "org/b", "c"):
        with model.use_lora(which):
            expected[which] = logits(model, inputs)
    wrong: list[Any] = []
    barrier = threading.Barrier(4)

    def work(which: str | None) -> None:
        barrier.wait()
        for _ in range(60):
            with model.use_lora(which):
                if not torch.equal(logits(model, inputs), expected[which]):
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tasks_never_see_each_others_adapter(model: Any, inputs: Any) -> None:
    expected = {}
    for which in ("a", "org/b"):
        with model.use_lora(which):
            expected[which] = logits(model, inputs)

    async def work(which: str) -> None:
        for _ in range(10):
            with model.use_lora(which):
                await asyncio.sleep(0)
                assert torch.equal(logits(model, inputs), expected[which])
                assert model.active_lora == which

    async def both() -> None:
        await asyncio.gather(*(work(which) for which in expected for _ in range(3)))

    asyncio.run(both())


def test_a_thread_inherits_by_copy_context(model: Any) -> None:
    seen: list[Any] = []
    with model.use_lora("c"):
        context = contextvars.copy_context()
        for run in (lambda f: f(), context.run):
            thread = threading.Thread(target=run, args=(lambda: seen.append(model.active_lora),))
            thread.start()
            thread.join()
    assert seen == ["a", "c"]  # the default, unless it is given the context


def test_an_exception_leaves_nothing_behind(model: Any, inputs: Any) -> None:
    before = logits(model, inputs)
    with pytest.raises(ZeroDivisionError), model.use_lora("c"), model.route_lora(["a", None, "c"]):
        raise ZeroDivisionError
    assert model.active_lora == "a"
    assert torch.equal(logits(model, inputs), before)


def test_blocks_nest(model: Any) -> None:
    with model.use_lora("c"):
        with model.no_lora():
            assert model.active_lora is None
            with model.route_lora(["a", None]):
                assert model.active_lora == ["a", None]
        assert model.active_lora == "c"
    assert model.active_lora == "a"


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_copy_is_a_model_of_its_own(model: Any, inputs: Any, how: str, trainable: bool) -> None:
    model.train_lora(["a"] if trainable else [])
    if how == "deepcopy":  # transformers' own hook for it does not pickle
        model.gradient_checkpointing_enable()
    before = logits(model, inputs)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(logits(other, inputs), before)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    other.set_lora("c")
    with other.use_lora(None):
        assert model.active_lora == "a"
    assert torch.equal(logits(model, inputs), before)
    randomise(other, 9)
    other.remove_lora("a")
    assert torch.equal(logits(model, inputs), before)
    other.remove_lora()
    assert torch.equal(logits(model, inputs), before)


def test_an_adapter_in_use_on_another_thread_is_not_removed(model: Any, inputs: Any) -> None:
    inside, tried = threading.Event(), threading.Event()
    with model.use_lora("c"):
        expected = logits(model, inputs)
    found: list[Any] = []

    def work() -> None:
        with model.use_lora("c"), model.no_lora(), model.use_lora("c"):
            inside.set()
            tried.wait()
            found.append(logits(model, inputs))

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    try:
        for verb in (
            lambda: model.remove_lora("c"),
            lambda: model.remove_lora(),
            lambda: model.train_lora("c"),
            lambda: model.load_lora(model.lora_adapter("a"), name="c", replace=True),
        ):
            with pytest.raises(LoRAStateError, match="names it"):
                verb()
    finally:
        tried.set()
        thread.join()
    assert torch.equal(found[0], expected)
    model.remove_lora("c")


def test_a_recompute_of_a_removed_adapter_is_an_error(model: Any, inputs: Any) -> None:
    model.train_lora("c")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with model.use_lora("c"):
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    model.remove_lora("c")
    with pytest.raises(LoRAStateError, match="'c' was removed"):
        loss.backward()
