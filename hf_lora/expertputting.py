"""Experts' pairs on a model: what a new adapter starts with, whether a value fits, put it, read it, take it off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches import row_maps
from .config import LoRAConfig
from .errors import LoRAUnsupportedError
from .expertlayers import ExpertBanks, ExpertSlots, LoRAExperts
from .expertnames import expert_of, order, path_of
from .experts import Stack, stacks
from .experttargets import ExpertTarget, describe_parameter, parameter_problem
from .inits import INITS, Layer
from .layers import swap
from .rowsources import TOKENS
from .slots import Slot
from .state import LoRAState
from .values import Factors
from .weights import device_of

__all__ = ["expert_problems", "initial_experts", "put_experts", "read_experts"]

_INITS = ("kaiming", "gaussian", "off")


# ---- a new adapter ---------------------------------------------------------------------------------------------------


def initial_experts(model: nn.Module, config: LoRAConfig, targets: Iterable[ExpertTarget]) -> dict[str, Factors]:
    """A pair for each expert, in float32 (float64 on a float64 base), on the CPU.

    Raises:
        LoRAUnsupportedError: the initialisation is of a layer's weight or inputs.
    """
    factors: dict[str, Factors] = {}
    for target in targets:
        if config.init not in _INITS:
            raise LoRAUnsupportedError(
                f"{target.path}: init={config.init!r} is not for experts' parameters.",
                name="init",
                value=config.init,
                expected=_INITS,
                remedy='Begin with init="kaiming", or leave target_parameters out.',
            )
        parameter = model.get_parameter(target.path)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        scaling = target.alpha / (math.sqrt(target.rank) if config.use_rslora else target.rank)
        sizes = (target.in_features, target.out_features, target.rank, scaling, dtype, False)
        module = model.get_submodule(target.path.rpartition(".")[0])
        nothing: Any = None
        layer = Layer(target.path, *sizes, nothing, nothing, nothing, module, model, False)
        for e in range(target.experts):
            a, b = INITS[config.init_method].pair(layer, config.init_settings)
            if parameter.is_meta:
                a, b = a.to("meta"), b.to("meta")
            factors[path_of(target.path, e)] = Factors("linear", a, b, target.alpha, config.use_rslora)
    return factors


# ---- does it fit? ----------------------------------------------------------------------------------------------------


def expert_problems(factors: Mapping[str, Factors], modules: Mapping[str, nn.Module]) -> list[str]:
    """Why the pairs of experts in `factors` are not of this model's parameters; empty if they are."""
    found: dict[str, dict[int, Factors]] = {}
    for path, pair in factors.items():
        at = expert_of(path)
        if at is not None:
            found.setdefault(at[0], {})[at[1]] = pair
    problems, names = [], dict[str, list[str]]()
    for parameter, pairs in found.items():
        owner, _, name = parameter.rpartition(".")
        module = modules.get(owner)
        info = None if module is None else describe_parameter(module, parameter)
        if info is None:
            problems.append(f"{parameter}: {parameter_problem(module, parameter)}")
            continue
        names.setdefault(owner, []).append(name)
        beyond = [e for e in pairs if e >= info.experts]
        if beyond or len(pairs) != info.experts:
            problems.append(f"{parameter}: the adapter has {len(pairs)} experts, the model {info.experts}")
        want = (info.in_features, info.out_features)
        for e, pair in pairs.items():
            got = (pair.in_features, pair.out_features)
            if got != want:
                sizes = f"the factors are {got[0]} -> {got[1]}, the expert is {want[0]} -> {want[1]}"
                problems.append(f"{path_of(parameter, e)}: {sizes}")
                break
            if pair.kind != "linear" or pair.extras or pair.form is not None or pair.blocks:
                problems.append(f"{path_of(parameter, e)}: only a plain pair can be an expert's")
                break
    for owner, held in names.items():
        own = [name for name in modules[owner]._parameters if name in held]
        if own != order(held):
            problems.append(
                f"{owner}: its parameters stand in another order than {order(held)}, by which files tell them"
            )
    return problems


# ---- on the model ----------------------------------------------------------------------------------------------------


def put_experts(
    model: nn.Module,
    state: LoRAState,
    modules: Mapping[str, nn.Module],
    index: int,
    factors: Mapping[str, Factors],
    trainable: bool,
    still: tuple[str, ...],
) -> bool:
    """Put the pairs of experts in `factors` into their modules. Returns whether these hold every bit of them."""
    held = True
    for parameter, stack in stacks(factors).items():
        bank = _bank(model, state, modules, parameter)
        slot = Slot(stack.A.shape[0], stack.alpha, stack.scaling, trainable=trainable, still=still)
        if trainable:
            master = torch.promote_types(stack.A.dtype, torch.float32)
            bank.put_trainable(index, slot, stack.A.to(master), stack.B.to(master), None)
        else:
            bank.put_frozen(index, slot, stack.A, stack.B, None)
            held = held and slot.dtype is not None
    return held


def read_experts(
    modules: Mapping[str, nn.Module], index: int, path: str, own: Callable[[str, Tensor], Tensor], use_rslora: bool
) -> dict[str, Factors]:
    """The pairs of an adapter in the module at `path`, as they are now. `own`: gives what a Parameter holds."""
    slots, factors = _slots_at(modules[path]), dict[str, Factors]()
    assert slots is not None
    for name, bank in slots.banks().items():
        slot = bank.slots.get(index)
        if slot is None:
            continue
        at = f"{path}.lora_slots.{name}"
        pair = bank.dense(index, lambda key, t, at=at: own(f"{at}.{key}", t)) if slot.trainable else bank.read(index)  # type: ignore[misc]
        assert pair is not None
        factors |= Stack(*pair, bank.experts, slot.alpha, use_rslora).pairs(f"{path}.{name}")
    return factors


def _slots_at(module: nn.Module) -> ExpertSlots | None:
    slots = module._modules.get("lora_slots")
    return slots if isinstance(slots, ExpertSlots) else None


def _bank(model: nn.Module, state: LoRAState, modules: Mapping[str, nn.Module], parameter: str) -> ExpertBanks:
    """The parameter's bank; its module's class is swapped, and it is made, if there is none."""
    path, _, name = parameter.rpartition(".")
    module = modules[path]
    slots, fresh = _slots_at(module), False
    if slots is None:
        fresh = True
        around = row_maps(model, [path.rpartition(".")[0]], modules)
        slots = ExpertSlots(state, path, TOKENS if set(around.values()) == {"batch"} else "inner")
        slots.train(module.training)
        slots.base = type(module)
    if name not in slots.banks():
        info = describe_parameter(module, parameter)
        assert info is not None
        weight = module._parameters[name]
        assert weight is not None
        sizes = (info.in_features, info.out_features)
        bank = ExpertBanks(state, "linear", *sizes, device=device_of(module), dtype=weight.dtype, row_map=slots.row_map)
        bank.experts, bank.turned = info.experts, info.turned
        bank.train(module.training)
        slots.add_module(name, bank)
    if fresh:
        module.lora_slots = slots  # before the class that needs it: other threads may be in this module's forward
        try:
            swap(module, LoRAExperts, path)
        except BaseException:
            del module.lora_slots
            raise
    return slots.banks()[name]
