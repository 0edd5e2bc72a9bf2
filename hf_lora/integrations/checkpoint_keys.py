"""What transformers would make of a checkpoint's tensors, learned without loading any: names, dtypes, ties.

`from_pretrained` renames what it reads (old names, parts that moved), converts some tensors (fuses experts, splits or
permutes projections), adds or takes away the base model's prefix, and keeps some weights in float32. Here a model is
built on the meta device, and transformers' own functions are asked, so that a file can be edited tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Placed", "auto_classes", "dtype_of_keys", "map_keys", "meta_model", "missing_is_fine"]


@dataclass(frozen=True)
class Placed:
    """Where one tensor of a file goes.

    Args:
        key: its name in the model's state dict; of a converted tensor, that of the first tensor that it becomes.
        converted: it is not copied as it is, but fused, split, permuted or transposed on the way.
        renamed: its name was changed by more than the base model's prefix.
        also: of a tensor that becomes several, the names of the others.
    """

    key: str
    converted: bool
    renamed: bool
    also: tuple[str, ...] = ()


def auto_classes(name: str, config: Any) -> tuple[Any, ...]:
    """The classes of model that an Auto class of this name has for a config; () if none."""
    import transformers

    auto = getattr(transformers, name, None) if name else None
    if auto is None or type(config) not in auto._model_mapping:
        return ()
    found = auto._model_mapping[type(config)]
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def meta_model(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model without memory: modules, shapes, dtypes and ties as `from_pretrained(dtype=dtype)` would make them."""
    with torch.device("meta"):
        model: nn.Module = model_class._from_config(config, dtype=dtype)
    return model.eval()


def map_keys(model: Any, keys: Iterable[str]) -> dict[str, Placed]:
    """File's key → where `from_pretrained` puts it in `model`; keys that it would not use are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    made = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Placed] = {}
    for key in sorted(keys, key=dot_natural_key):  # in stock's order: some renamings wait for a key that comes first
        plain, pattern = rename_source_key(key, renamings, converters)
        placed, _ = rename_source_key(plain, [], [], prefix, state)
        renamed = plain != key
        if placed not in state and key in state:  # no renaming was meant
            placed, pattern, renamed = key, None, False
        if placed in state:
            first, *others = made.get(pattern, ("",)) if pattern is not None else ("",)
            also = tuple(placed.replace(first, other) for other in others)
            found[key] = Placed(placed, pattern is not None, renamed, also)
    return found


def dtype_of_keys(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Key of the state dict → the dtype that it has after `from_pretrained(dtype=dtype)`."""
    from transformers.core_model_loading import build_glob_alternation

    own = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    ask = getattr(model, "_get_dtype_plan", None)  # transformers 5.0 keeps the plan on the model
    plan: Mapping[str, torch.dtype] = ask(dtype) if ask is not None else getattr(model, "dtype_plan", {})
    if not plan:
        return own
    alternation, groups, _ = build_glob_alternation(list(plan))
    for key in own:
        match = alternation.search(key)
        if match is not None and match.lastgroup is not None:
            own[key] = plan[groups[match.lastgroup]]
    return own


def missing_is_fine(model: Any, key: str) -> bool:
    """Whether transformers itself expects that a checkpoint lacks `key` (it is computed, or a buffer)."""
    if key not in {name for name, _ in model.named_parameters(remove_duplicate=False)}:
        return True
    return any(re.search(pattern, key) for pattern in model._keys_to_ignore_on_load_missing or ())
