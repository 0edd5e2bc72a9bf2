"""`ensure_weight_tying`: what an adapter changes of a tied weight changes wherever the weight is used.

A module that trains whole is one Parameter in both places. With factors, the head's are the embedding's, turned:
ΔE = (s B A)^T of the embedding, (V, d), is s A^T B^T of the head, so A_head = B^T and B_head = A^T.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .config import LoRAConfig
from .errors import LoRAConfigError, LoRAUnsupportedError
from .extras import asked_for
from .layerinfo import modules_of
from .targeting import Resolution, resolve
from .tokenfields import ROWS
from .tokens import sharing
from .values import AdapterValue, Factors

__all__ = ["group_of", "led", "tie", "tied_config", "tie_problems", "tied_pairs", "turned"]

NAME = "ensure_weight_tying"


def group_of(model: nn.Module) -> tuple[str, ...]:
    """Paths of the input embedding and of the modules that share its weight; nothing if none does."""
    own = getattr(model, "get_input_embeddings", lambda: None)()
    path = next((path for path, module in modules_of(model).items() if own is not None and module is own), None)
    others = () if path is None else sharing(model, path)
    return () if path is None or not others else (path, *others)


def tied_config(model: nn.Module, config: LoRAConfig, found: Resolution) -> tuple[LoRAConfig, Resolution]:
    """The config that names all of what is tied where it names one of it, and what it resolves to.

    Raises:
        LoRAConfigError: tied modules were to be adapted in different ways.
    """
    if not config.ensure_weight_tying:
        return config, found
    group = group_of(model)
    if not group:
        note = f"{NAME}: no module shares the weight of this model's input embedding"
        return config, dataclasses.replace(found, skipped=(*found.skipped, note))
    targets, heads = {target.path for target in found.targets} & {*group}, {*found.heads} & {*group}
    if targets and heads:
        raise _apart(sorted(targets | heads))
    if heads:
        named = config.modules_to_save or ()
        config = config.replace(modules_to_save=[*named, *(path for path in group if path not in heads)])
    elif targets:
        missing = [path for path in group if path not in targets]
        named_targets = config.target_modules
        if isinstance(named_targets, str):
            either = "|".join([f"(?:{named_targets})", *map(re.escape, missing)])
            config = config.replace(target_modules=either)
        else:
            config = config.replace(target_modules=[*(named_targets or ()), *missing])
    found = resolve(model, config)
    ranks = {(t.rank, t.alpha) for t in found.targets if t.path in group}
    left = targets and {*group} - {target.path for target in found.targets}
    if left or len(ranks) > 1:
        raise _apart(sorted(left or group))
    return config, found


def _apart(paths: list[str]) -> LoRAConfigError:
    return LoRAConfigError(
        f"{NAME}=True, but {', '.join(paths)} are not adapted in one way: by factors of one rank and alpha, or whole.",
        name=NAME,
        value=True,
        facts=paths,
        remedy="Name one of them alone, or leave ensure_weight_tying out.",
    )


def tied_pairs(config: LoRAConfig, factors: dict[str, Factors], group: tuple[str, ...]) -> None:
    """Let the new factors of what is tied be those of the embedding, turned."""
    if not config.ensure_weight_tying or not group or group[0] not in factors:
        return
    if asked_for(config):
        raise LoRAUnsupportedError(
            f"{NAME} is of plain factors, and the config sets {', '.join(asked_for(config))}.",
            name=NAME,
            value=True,
            remedy="Leave one of them out.",
        )
    for path in group[1:]:
        if path in factors:
            factors[path] = turned(factors[group[0]], factors[path].kind)


def turned(pair: Factors, kind: Any) -> Factors:
    """The pair of an embedding for a module that shares its weight."""
    if kind == pair.kind:
        return pair
    return dataclasses.replace(pair, kind=kind, A=pair.B.T.contiguous(), B=pair.A.T.contiguous())


def tie_problems(model: nn.Module, value: AdapterValue) -> tuple[tuple[str, ...], list[str]]:
    """The group that a value ties on this model, and where the value's own parts of it differ."""
    group = group_of(model) if value.config.ensure_weight_tying else ()
    here = tuple(path for path in group if path in value.factors or path in value.modules)
    if len(here) < 2 or here[0] != group[0]:
        return (), []
    first, problems = here[0], []
    for path in here[1:]:
        if first in value.factors and path in value.factors:
            own, other = turned(value.factors[first], value.factors[path].kind), value.factors[path]
            same = own.A.shape == other.A.shape and own.B.shape == other.B.shape
            same = same and (own.A.is_meta or (torch.equal(own.A, other.A) and torch.equal(own.B, other.B)))
            if not same or own.scaling != other.scaling:
                problems.append(f"{path}: {NAME}, but its factors are not those of {first}")
        elif first in value.modules and path in value.modules:
            if ROWS in value.modules[first] or ROWS in value.modules[path]:
                problems.append(f"{path}: {NAME}, but its rows are not those of {first}")
            else:
                problems += _whole_problems(path, first, value.modules)
        else:
            problems.append(f"{path}: {NAME}, but it is not adapted as {first} is")
    return here, problems


def _whole_problems(path: str, first: str, held: Mapping[str, Mapping[str, Any]]) -> list[str]:
    one, other = held[first].get("weight"), held[path].get("weight")
    if one is None or other is None or one.shape != other.shape or not (one.is_meta or torch.equal(one, other)):
        return [f"{path}: {NAME}, but its weight is not that of {first}"]
    if held[path].keys() != {"weight"}:
        return [f"{path}: {NAME} of a head with a bias, which PEFT leaves out, is not supported"]
    return []


def led(model: nn.Module, records: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    """Path of the input embedding → those that share its weight, where all that adapters change there is one change.

    Args:
        records: what the model keeps of the adapters: config, layers, heads.
    """
    if not any(record.config.ensure_weight_tying for record in records):
        return {}
    group = group_of(model)
    for record in records:
        here = {*record.layers, *record.heads} & {*group}
        if here and not (record.config.ensure_weight_tying and here == {*group}):
            return {}
    return {group[0]: group[1:]} if group else {}


def tie(modules: Mapping[str, Any], group: tuple[str, ...], slot: int) -> None:
    """Let what an adapter trains of tied modules be the same Parameters."""
    for path in group[1:]:
        first, other = modules[group[0]], modules[path]
        if hasattr(first, "lora_heads"):
            other.lora_heads.copies[str(slot)].weight = first.lora_heads.copies[str(slot)].weight
        else:
            other.lora_slots.follow(slot, first.lora_slots)
