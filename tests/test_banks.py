"""Banks: what they keep of an adapter, when they grow or are cast, and what a route gathers of them."""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import pytest
import torch
from loras import logits, randomise, with_adapters
from torch import Tensor, nn

from hf_lora import LoRAConfig, LoRAStateError
from hf_lora.model import require

A = LoRAConfig(r=2, target_modules=["q", "v"], alpha=4)
B = LoRAConfig(r=4, target_modules=["q", "down"], alpha=4)


@pytest.fixture
def model(tiny: Any) -> Any:
    return with_adapters(tiny("llama"), {"a": A, "b": B})


def banks(model: Any) -> dict[str, Tensor]:
    return {name: b for name, b in model.named_buffers() if ".bank_" in name}


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0, 16.0])  # of rank 2: ΔW scaled by ½, 1, 1½ and 8
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_what_was_loaded_is_read_back_bit_for_bit(
    tiny: Any, alpha: float, stored: torch.dtype, base: torch.dtype
) -> None:
    source = with_adapters(tiny("llama"), {"a": LoRAConfig(r=2, target_modules=["q"], alpha=alpha)})
    value = source.lora_adapter("a").to(stored)
    model = tiny("llama", dtype=base)
    model.load_lora(value, name="a")
    assert value.equal(model.lora_adapter("a"))
    exact = base == torch.float32 or stored == base
    kept = require(model).entry("a").record.value is not None
    assert kept == (not exact or alpha not in (2.0, 16.0))  # no second copy where the banks hold every bit
    model.to(torch.float16)
    assert value.equal(model.lora_adapter("a"))
    model.remove_lora("a")
    randomise(source.train_lora("a") or source, seed=7)
    other = source.lora_adapter("a").to(stored)
    model.load_lora(other, name="b")  # into the same slot
    assert other.equal(model.lora_adapter("b"))


def test_growing_keeps_every_adapter(tiny: Any, batch: Any) -> None:
    model, inputs = tiny("llama"), batch(tiny("llama"))
    values, expected = [], []
    for i in range(9):  # ranks go up and down, and the number of slots doubles four times
        source = with_adapters(tiny("llama"), {"a": LoRAConfig(r=1 + 5 * i % 7, target_modules=["q", "up"])})
        randomise(source.train_lora("a") or source, seed=i)
        source.train_lora([])
        values.append(source.lora_adapter("a"))
        expected.append(logits(source, inputs))
        model.load_lora(values[-1], name=str(i))
    for i in (3, 5):
        model.remove_lora(str(i))
        model.load_lora(values[i], name=str(i))
    for i, alone in enumerate(expected):
        assert values[i].equal(model.lora_adapter(str(i)))
        with model.use_lora(str(i)):
            assert (logits(model, inputs) - alone).abs().max() <= 1e-6 * alone.abs().max()


def test_a_route_survives_what_others_load_and_remove(model: Any, batch: Any) -> None:
    inputs, value = batch(model, 3), model.lora_adapter("a")
    with model.route_lora(["a", None, "b"]):
        expected = logits(model, inputs)
        plans = require(model).current.plans
        gathered = {id(plan.A) for held in plans for plan in held.values()}
        assert gathered

        def others() -> None:
            for i in range(6):  # the banks grow, and slots are used again
                model.load_lora(value, name=str(i))
            for i in range(5):
                model.remove_lora(str(i))

        thread = threading.Thread(target=others)
        thread.start()
        thread.join()
        assert torch.equal(logits(model, inputs), expected)
        assert gathered == {id(plan.A) for held in plans for plan in held.values()}  # nothing was gathered again
        assert require(model).current.nbytes > 0
    model.remove_lora("a")
    assert model.lora_names == ("b", "5")


def test_a_route_follows_a_model_that_is_cast(model: Any, batch: Any) -> None:
    inputs = batch(model, 2)
    with model.route_lora(["a", "b"]):
        logits(model, inputs)
        model.to(torch.float64)
        found = logits(model, inputs)
    assert found.dtype == torch.float64
    for i, name in enumerate(("a", "b")):
        with model.use_lora(name):
            torch.testing.assert_close(found[i], logits(model, inputs)[i])


class Remembering(nn.Linear):
    """A layer whose output somebody holds."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = super().forward(x)
        return self.seen


@pytest.mark.parametrize("route", [["a", "a"], ["a", "b"], ["a", None]])
def test_an_output_that_the_base_holds_is_not_written(tiny: Any, batch: Any, route: list[str | None]) -> None:
    model = tiny("llama")
    layer = model.model.layers[0].self_attn.q_proj
    layer.__class__ = Remembering
    with_adapters(model, {"a": A, "b": B})
    inputs, held = batch(model, 2), []
    hook = layer.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    with model.route_lora(route):
        logits(model, inputs)
    hook.remove()
    assert torch.equal(layer.seen, nn.functional.linear(held[0], layer.weight, layer.bias))


def test_a_smaller_adapter_in_the_place_of_a_larger_one(tiny: Any, batch: Any) -> None:
    wide, narrow = (LoRAConfig(r=r, target_modules=["q", "v"]) for r in (6, 2))
    source = with_adapters(tiny("llama"), {"wide": wide, "narrow": narrow})
    values = {name: source.lora_adapter(name) for name in ("wide", "narrow")}
    model, inputs = tiny("llama"), batch(tiny("llama"), 2)
    model.load_lora(values["wide"], name="gone")
    model.load_lora(values["wide"], name="wide")
    model.remove_lora("gone")
    model.load_lora(values["narrow"], name="narrow")
    with source.route_lora(["narrow", "wide"]):
        expected = logits(source, inputs)
    with model.route_lora(["narrow", "wide"]):
        assert (logits(model, inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_route_that_outlives_its_block_and_an_adapter_is_an_error(model: Any, batch: Any) -> None:
    inputs = batch(model, 2)
    with model.route_lora(["a", "b"]):
        logits(model, inputs)
        context = contextvars.copy_context()
    model.remove_lora("a")
    with pytest.raises(LoRAStateError, match="'a' was removed"):
        context.run(logits, model, inputs)


def test_what_is_left_of_a_removed_adapter_is_never_read(tiny: Any, batch: Any) -> None:
    model = with_adapters(tiny("llama"), {"a": B, "b": A})
    inputs = batch(model, 2)
    with model.use_lora("b"):
        expected = logits(model, inputs)
    slot = require(model).entry("a").slot
    model.remove_lora("a")
    for bank in banks(model).values():
        if len(bank) > slot:
            bank[slot] = 1e4
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with model.route_lora(["b", None]):
        found = logits(model, inputs)
        assert (logits(compiled, inputs, use_cache=False) - found).abs().max() <= 1e-5 * found.abs().max()
    assert (found[0] - expected[0]).abs().max() <= 1e-5 * expected.abs().max()
    with model.no_lora():
        assert (found[1] - logits(model, inputs)[1]).abs().max() <= 1e-6
