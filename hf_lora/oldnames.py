"""Adapters that were made before transformers 5 had the experts in one parameter: their layers' names, as they are now.

transformers renames and fuses a checkpoint's tensors when it loads one; here its own functions are asked what becomes
of `….experts.3.w1.weight`, and the pairs follow:

    [W_gate + B_g·A_g; W_up + B_u·A_u] = W + [B_g 0; 0 B_u]·[A_g; A_u]         the ranks add up, and nothing is rounded
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import LoRAUnsupportedError
from .expertnames import expert_of
from .experts import Stack
from .experttargets import ExpertTarget, describe_parameter
from .layout import disk_config
from .values import AdapterValue, Factors

__all__ = ["as_now"]

_FUSING = {("MergeModulelist",), ("MergeModulelist", "Concatenate")}


def as_now(
    model: nn.Module, value: AdapterValue, modules: Mapping[str, nn.Module], *, trainable: bool = False
) -> AdapterValue:
    """The adapter with the names that its base's layers have in this release; itself where it has them.

    Raises:
        LoRAUnsupportedError: the experts' tensors become what no pairs of theirs can be, or dropout is to go on.
    """
    old = [path for path in value.factors if path not in modules and expert_of(path) is None]
    if not old or not hasattr(getattr(model, "config", None), "model_type"):
        return value
    renamed, parts = _placed(model, old, modules)
    if not renamed and not parts:
        return value
    if parts and trainable and value.config.dropout:
        raise LoRAUnsupportedError(
            f"The adapter was trained with dropout={value.config.dropout} on layers that are experts' parameters now, "
            "whose inputs cannot be dropped.",
            name="dropout",
            value=value.config.dropout,
            remedy="Load it frozen; or take it with config.replace(dropout=0.0) to train on without.",
        )
    factors = {renamed.get(path, path): pair for path, pair in value.factors.items() if path not in parts}
    for info, experts in _by_parameter(value, parts):
        pairs = {e: _fused(info, own, value.config.use_rslora) for e, own in experts.items()}
        factors |= Stack.of(pairs, info.experts).pairs(info.path)
    config = value.config
    if parts:
        config = config.replace(dropout=0.0, target_parameters=sorted({info.path for info, *_ in parts.values()}))
    changed = dataclasses.replace(value, config=config, factors=factors)
    return dataclasses.replace(changed, config=disk_config(changed))


_Part = tuple[ExpertTarget, int, int, int]  # the parameter, the expert, which of its parts, and of how many


def _placed(model: Any, paths: list[str], modules: Mapping[str, nn.Module]) -> tuple[dict[str, str], dict[str, _Part]]:
    """The layers that have other names now, and those that became a part of a parameter."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    renamed: dict[str, str] = {}
    parts: dict[str, _Part] = {}
    for path in paths:
        key, pattern = rename_source_key(f"{path}.weight", renamings, converters)
        if pattern is None:
            now = key.removesuffix(".weight")
            if now != path and now in modules:
                renamed[path] = now
            continue
        owner = modules.get(key.rpartition(".")[0])
        info = None if owner is None else describe_parameter(owner, key)
        number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), f"{path}.weight")
        if info is None or number is None or number.lastindex != 1:
            continue
        entry = by_pattern[pattern]
        made = tuple(type(operation).__name__ for operation in entry.operations)
        if made not in _FUSING or info.turned:
            raise LoRAUnsupportedError(
                f"{path}: transformers makes {key} of it by {', '.join(made)}, which no pair of factors follows.",
                name=path,
                value=made,
                remedy="Merge the adapter with the release that it was made for.",
            )
        parts[path] = (info, int(number[1]), entry.source_patterns.index(pattern), len(entry.source_patterns))
    return renamed, parts


def _by_parameter(
    value: AdapterValue, parts: Mapping[str, _Part]
) -> list[tuple[ExpertTarget, dict[int, list[tuple[int, int, Factors]]]]]:
    """Of each parameter, by expert: which part, of how many, and its pair."""
    infos = {info.path: info for info, *_ in parts.values()}
    found: dict[str, dict[int, list[tuple[int, int, Factors]]]] = {path: defaultdict(list) for path in infos}
    for path, (info, expert, part, of) in parts.items():
        found[info.path][expert].append((part, of, value.factors[path]))
    return [(infos[path], experts) for path, experts in found.items()]


def _fused(info: ExpertTarget, own: list[tuple[int, int, Factors]], use_rslora: bool) -> Factors:
    """One pair for an expert, of those of its parts, each of which is a run of the rows of W."""
    own = sorted(own, key=lambda item: item[0])
    scaling, ranks = own[0][2].scaling, [pair.rank for _, _, pair in own]
    A = torch.cat([pair.A.detach() for _, _, pair in own])
    B = own[0][2].B.new_zeros(info.out_features, sum(ranks))
    at = 0
    for part, of, pair in own:
        rows = info.out_features // of
        if pair.out_features != rows or pair.extras or pair.blocks or pair.form is not None:
            raise LoRAUnsupportedError(
                f"{info.path}: {pair.out_features} rows, or a variant, of a part of {rows} rows.",
                name=info.path,
                value=pair.out_features,
                expected=rows,
                remedy="Merge the adapter with the release that it was made for.",
            )
        scaled = pair.B.detach() if pair.scaling == scaling else pair.B.detach() * (pair.scaling / scaling)
        B[part * rows : (part + 1) * rows, at : at + pair.rank] = scaled
        at += pair.rank
    return Factors("linear", A, B, scaling * (math.sqrt(at) if use_rslora else at), use_rslora)
