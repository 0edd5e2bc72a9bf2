"""An adapter on a model as a value, and a value's numbers back into its Parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attachment import Resident, require
from .errors import LoRAStateError
from .expertlayers import LoRAExperts
from .expertnames import expert_of
from .expertputting import read_experts
from .experts import stacks
from .fitting import head_problems
from .layerinfo import modules_of
from .layers import LoRAHead, LoRALinear
from .sharding import assign, reshard, whole
from .slots import LoRASlots, block_index
from .tying import turned
from .values import AdapterValue, Block, Factors

__all__ = ["read", "refill_parameters", "refill_problems"]


def read(model: nn.Module, name: str, tensors: Mapping[str, Tensor] | None = None) -> AdapterValue:
    """The adapter as a value: a frozen one as it came, a trainable one as it stands now, on the CPU.

    Every process of a model that fully_shard() has split must call this.

    Args:
        tensors: take what is trainable from this whole state dict of the model, rather than from the model.
    """
    state = require(model)
    entry = state.entry(name)
    resident: Resident = entry.record
    if resident.value is not None:
        return resident.value
    factors: dict[str, Factors] = {}
    biases: dict[str, Tensor] = {}
    modules = modules_of(model)
    reshard(model)

    def own(path: str, tensor: Tensor) -> Tensor:
        tensor = (whole(tensor) if tensors is None else tensors[path]).detach()
        return tensor if tensor.is_meta else tensor.to("cpu", copy=True)

    led: dict[str, str] = {}
    for path in resident.layers:
        slots = _present(modules, path, LoRALinear).lora_slots
        if (leader := slots.leaders.get(entry.slot)) is not None:
            led[path] = next(p for p in resident.layers if modules[p]._modules.get("lora_slots") is leader)
            continue
        slot = slots.slots[entry.slot]
        pair = (
            slots.dense(entry.slot, lambda key, t, at=path: own(f"{at}.lora_slots.{key}", t))
            if entry.trainable
            else slots.read(entry.slot)
        )
        assert pair is not None
        extras = slots.extras(entry.slot, lambda key, t, at=path: own(f"{at}.lora_slots.{key}", t))
        blocks = tuple(Block(role, rows) for role, rows in slot.blocks)
        rslora = resident.config.use_rslora
        A, B = pair
        like: dict[str, Any] = {"anchored": slot.anchored, "form": slot.form, "kernel": slots.kernel}
        factors[path] = Factors(slots.kind, A, B, slot.alpha, rslora, blocks, extras, **like)
    for path, first in led.items():
        follower: LoRASlots = _present(modules, path, LoRALinear).lora_slots
        factors[path] = turned(factors[first], "embedding" if follower.kind == "embedding" else "linear")
    factors = {path: factors[path] for path in resident.layers}
    for path in resident.experts:
        _present(modules, path, LoRAExperts)
        factors |= read_experts(modules, entry.slot, path, own, resident.config.use_rslora)
    for path in resident.biases:
        owner = _present(modules, path.rpartition(".")[0], LoRALinear)
        key = f"bias{entry.slot}"
        biases[path] = own(f"{path.rpartition('.')[0]}.lora_slots.{key}", owner.lora_slots.get_parameter(key))
    heads = {
        path: {
            key: own(f"{path}.lora_heads.copies.{entry.slot}.{key}", tensor)
            for key, tensor in _present(modules, path, LoRAHead).lora_heads.copies[str(entry.slot)].state_dict().items()
        }
        for path in resident.heads
    }
    return AdapterValue(resident.config, factors, biases, heads)


def _present(modules: Mapping[str, nn.Module], path: str, kind: type[Any]) -> Any:
    module = modules.get(path)
    if not isinstance(module, kind):
        raise LoRAStateError(
            f"{path}: the layer that held the adapter was replaced by a {type(module).__name__} after it was added.",
            name=path,
            remedy="Change the model's layers before adding a LoRA.",
        )
    return module


def refill_problems(have: AdapterValue, value: AdapterValue, modules: Mapping[str, nn.Module]) -> list[str]:
    """Why the Parameters of an adapter cannot hold a value."""
    problems = [f"{path}: not in the file" for path in have.factors.keys() - value.factors.keys()]
    problems += [f"{path}: not on the model" for path in value.factors.keys() - have.factors.keys()]
    if have.config.alora_invocation_tokens != value.config.alora_invocation_tokens:
        problems.append(f"alora_invocation_tokens: {value.config.alora_invocation_tokens} in the file")
    for path in have.factors.keys() & value.factors.keys():
        mine, other = have.factors[path], value.factors[path]
        if (mine.A.shape, mine.B.shape, mine.blocks) != (other.A.shape, other.B.shape, other.blocks):
            problems.append(f"{path}: rank or slices differ ({other.rank} in the file, {mine.rank} on the model)")
        elif mine.extras.keys() != other.extras.keys():
            problems.append(f"{path}: {sorted(other.extras)} in the file, {sorted(mine.extras)} on the model")
        elif mine.form != other.form:
            problems.append(f"{path}: of the form {other.form} in the file, {mine.form} on the model")
        elif mine.scaling != other.scaling:
            problems.append(f"{path}: scaling {other.scaling} in the file, {mine.scaling} on the model")
    for what in ("biases", "modules"):
        a, b = getattr(have, what).keys(), getattr(value, what).keys()
        problems += [f"{path}: only on the model" for path in a - b] + [f"{path}: only in the file" for path in b - a]
    for path in value.modules:
        problems += head_problems(path, modules.get(path), value.modules[path])
    return problems


@torch.no_grad()
def refill_parameters(modules: Mapping[str, Any], index: int, value: AdapterValue) -> None:
    """Write a value into the Parameters of the adapter that has this slot."""
    for parameter, stack in stacks(value.factors).items():
        path, _, name = parameter.rpartition(".")
        bank = modules[path].lora_slots.banks()[name]
        for side, part in (("A", stack.A), ("B", stack.B)):
            assign(bank.get_parameter(f"{side}{index}"), part)
    for path, factors in value.factors.items():
        if expert_of(path) is not None:
            continue
        slots: LoRASlots = modules[path].lora_slots
        slot, B = slots.slots[index], factors.B
        if index in slots.leaders:
            continue  # it is written where it is held
        if slot.blocks:
            rows, columns = block_index(slot.blocks, slot.rank)
            B = B[rows, columns]
        for name, part in {**slot.parts(factors.A, B), **factors.extras}.items():
            assign(slots.get_parameter(f"{name}{index}"), part)
    for path, bias in value.biases.items():
        assign(modules[path.rpartition(".")[0]].lora_slots.get_parameter(f"bias{index}"), bias)
    for path, tensors in value.modules.items():
        for key, own in modules[path].lora_heads.copies[str(index)].state_dict().items():
            assign(own, tensors[key])
