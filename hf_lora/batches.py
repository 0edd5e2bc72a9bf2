"""How the rows of each layer's batch come from the user's: told from the architecture, never from a size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from . import architectures as arch

__all__ = ["row_maps"]


def row_maps(model: nn.Module, paths: Iterable[str], modules: Mapping[str, nn.Module] | None = None) -> dict[str, str]:
    """How the rows of a layer's batch come from the user's.

    Args:
        modules: the model's modules by name, if at hand.

    Returns:
        path → "batch" (B, …); "flat" (B·T, d) or "windows" (B·k, …), the rows one after another; "second" (T, B, d);
        "map:…", told by a row map (see `rowmaps`); or "inner": a layer that runs inside another batch (images of a
        vision tower, tokens of an expert, positions) of which no map is known.
    """
    modules = dict(model.named_modules(remove_duplicate=False)) if modules is None else modules
    parts: dict[str, _Part] = {}
    return {path: _row_map(path, modules, parts) for path in paths}


@dataclass(frozen=True)
class _Owner:
    """A model with a language model among its parts: its path, types, and whether the language model is a part."""

    path: str
    model_type: str
    text_type: str | None
    has_text: bool


@dataclass(frozen=True)
class _Part:
    """The (sub)model that a layer belongs to: its model_type, the outermost owner, whether it is the language model."""

    model_type: str | None = None
    owner: _Owner | None = None
    text: bool = False


def _model_type(module: nn.Module | None) -> str | None:
    value = None if module is None else getattr(vars(module).get("config"), "model_type", None)
    return value if isinstance(value, str) and hasattr(module, "base_model_prefix") else None


def _part(path: str, modules: Mapping[str, nn.Module], parts: dict[str, _Part]) -> _Part:
    if path in parts:
        return parts[path]
    part = _part(path.rpartition(".")[0], modules, parts) if path else _Part()
    if (model_type := _model_type(modules.get(path))) is not None:
        part = replace(part, model_type=model_type)
        text = getattr(vars(modules[path])["config"], "text_config", None)
        if part.owner is None and text is not None:
            text_type = getattr(text, "model_type", None)
            inside = {_model_type(module) for key, module in modules.items() if key.startswith(path)}
            part = replace(part, owner=_Owner(path, model_type, text_type, text_type in inside - {model_type}))
        elif part.owner is not None and part.owner.has_text and model_type == part.owner.text_type:
            part = replace(part, text=True)
    parts[path] = part
    return part


def _row_map(path: str, modules: Mapping[str, nn.Module], parts: dict[str, _Part]) -> str:
    part, names = _part(path, modules, parts), path.split(".")
    if "experts" in names:
        at = names.index("experts")
        listed = type(modules[".".join(names[: at + 1])]).__name__ in arch.EXPERT_LISTS
        return f"map:{'.'.join(names[at : at + 2])}" if listed and len(names) > at + 2 else "inner"
    if arch.POSITIONS.search(names[-1]):
        return "inner"
    if part.owner is not None and not part.text and part.owner.model_type not in arch.DUAL_ENCODERS:
        beside = _beside(path.removeprefix(part.owner.path).removeprefix("."), modules.get(path), part.owner)
        if beside is not None:
            return beside
    around = modules.get(path.rpartition(".")[0])
    attends = isinstance(modules.get(path), nn.MultiheadAttention)  # which turns its batch to the front itself
    if (
        not attends
        and isinstance(around, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        and not around.self_attn.batch_first
    ):
        return "second"
    for ends, row_map in arch.BATCHES.get(part.model_type or "", {}).items():
        if ends.search(path):
            return row_map
    return "batch" if arch.SHARED_EXPERTS.isdisjoint(names) else "flat"


def _beside(path: str, module: nn.Module | None, owner: _Owner) -> str | None:
    """The row map of a layer beside the language model (its head, a tower, what joins the two); None: any other's."""
    names = path.split(".")
    if names[0] in arch.HEAD_NAMES:
        return "batch"
    maps = {} if isinstance(module, nn.Embedding) else arch.ROW_MAPS.get(owner.model_type, {})
    if (name := next((name for name in names if name in maps), None)) is not None:
        return f"map:{maps[name]}"
    return "inner" if owner.has_text or not arch.INNER_PARTS.isdisjoint(names) else None
