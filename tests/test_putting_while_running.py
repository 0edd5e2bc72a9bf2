"""A forward on another thread, at the very moment an adapter is put or removed; and a route among changing slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loras import logits, with_adapters

from hf_lora import LoRAConfig
from hf_lora import model as placing
from hf_lora.slots import Slot

Q, DOWN = LoRAConfig(r=2, target_modules=["q"]), LoRAConfig(r=2, target_modules=["down"])


@pytest.mark.parametrize("name", ["llama", "llama-cls"])
@pytest.mark.parametrize("step", ["swap", "restore"])
def test_a_forward_between_the_steps_of_a_swap(tiny: Any, batch: Any, monkeypatch: Any, name: str, step: str) -> None:
    head = {"modules_to_save": ["score"]} if name == "llama-cls" else {}
    model = with_adapters(tiny(name), {"a": Q, "b": LoRAConfig(r=2, target_modules=["down"], **head)})
    inputs, value = batch(model), model.lora_adapter("b")
    before, seen = logits(model, inputs), []
    original = getattr(placing, step)

    def stepping(module: Any, *args: Any) -> None:
        seen.append(logits(model, inputs))
        original(module, *args)
        seen.append(logits(model, inputs))

    monkeypatch.setattr(placing, step, stepping)
    model.remove_lora("b")
    model.load_lora(value, name="b")
    assert seen
    assert all(torch.equal(found, before) for found in seen)


def test_a_route_while_another_adapter_is_put(tiny: Any, batch: Any) -> None:
    model = with_adapters(tiny("llama"), {"a": Q, "b": Q})
    inputs = batch(model)
    with model.route_lora(["a", "b"]):
        before = logits(model, inputs)
    slots = model.model.layers[0].self_attn.q_proj.lora_slots

    class Busy(Slot):
        """While it is looked at, another thread puts an adapter."""

        def __getattribute__(self, key: str) -> Any:
            slots.slots.setdefault(max(slots.slots) + 1, Slot()) if len(slots.slots) < 9 else None
            return super().__getattribute__(key)

    for index, slot in list(slots.slots.items()):
        slots.slots[index] = Busy(**vars(slot))
    with model.route_lora(["a", "b"]):
        assert torch.equal(logits(model, inputs), before)
