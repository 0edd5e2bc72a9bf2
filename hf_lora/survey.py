"""One pass over a model: its layers, what each is called, and which roles its rows play."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from . import architectures as arch
from .layerinfo import LayerInfo, describe_layer, modules_of, only_read, out_of, why_not
from .libraries import own_family
from .rows import role_rows

__all__ = ["Layer", "Survey", "survey"]


_BODY = (nn.Embedding, nn.modules.conv._ConvNd)  # what no head is made of


@dataclass(frozen=True)
class Layer:
    """A layer that can take a LoRA.

    Attributes:
        path: its first name in `named_modules()`.
        roles: what it computes; empty if it has no role.
        rows: role → output rows, for a fused layer whose layout is known; empty otherwise.
        fused: several roles share its rows.
        guessed: its roles were told from names alone, because the model_type has no entry.
        out_of: path of the nn.MultiheadAttention of which it is the output projection, which it comes with; or "".
    """

    path: str
    info: LayerInfo
    roles: tuple[str, ...] = ()
    rows: Mapping[str, tuple[range, ...]] = field(default_factory=dict)
    fused: bool = False
    guessed: bool = False
    out_of: str = ""


@dataclass(frozen=True)
class Survey:
    """What `survey` saw.

    Attributes:
        modules: every module by each of its names (a shared module has several).
        canonical: name → first name of the same module.
        layers: path → layer, shared ones once.
        experts: path → roles that a module computes with 3-D parameters, out of reach of a LoRA on Linear layers.
        model_type: the root's; None for a model without a transformers configuration.
        known: the root's model_type has an entry in the table.
        guessed_parts: path → model_type of parts without an entry.
        head: paths of the output head (the output embeddings or a classifier's children), outermost modules.
        output_embeddings: path of the output embeddings.
        unread: path → why a LoRA there would never run, although it is a layer.
    """

    modules: Mapping[str, nn.Module]
    canonical: Mapping[str, str]
    layers: Mapping[str, Layer]
    experts: Mapping[str, tuple[str, ...]]
    model_type: str | None
    known: bool
    guessed_parts: Mapping[str, str]
    head: tuple[str, ...]
    output_embeddings: str | None
    unread: Mapping[str, str] = field(default_factory=dict)

    def roles(self) -> frozenset[str]:
        """Every role word that this model has a layer for."""
        single = {role for layer in self.layers.values() for role in layer.roles}
        single |= {role for roles in self.experts.values() for role in roles}
        words = {word for word, roles in arch.ROLE_GROUPS.items() if single & set(roles)}
        return frozenset(words | ({"head"} if self.head_layers() else set()))

    def why_not(self, path: str) -> tuple[str, bool]:
        """Why a module takes no LoRA, as `layerinfo.why_not`."""
        return (self.unread[path], True) if path in self.unread else why_not(self.modules[path])

    def head_layers(self) -> list[str]:
        """Paths of the Linear-like layers that the head is made of."""
        starts = tuple(f"{path}." for path in self.head)
        return [
            path
            for path, layer in self.layers.items()
            if layer.info.kind not in ("embedding", "conv") and f"{path}.".startswith(starts)
        ]


@dataclass(frozen=True)
class _Part:
    """The (sub)model that a module belongs to."""

    config: Any
    model_type: str | None
    family: arch.Family
    guessed: bool


def survey(model: nn.Module) -> Survey:
    """Walk `model` once (about 1 ms for each hundred layers)."""
    first: dict[int, str] = {}
    modules: dict[str, nn.Module] = {}
    canonical: dict[str, str] = {}
    layers: dict[str, Layer] = {}
    experts: dict[str, tuple[str, ...]] = {}
    parts: dict[str, _Part] = {}
    guessed: dict[str, str] = {}
    unread: dict[str, str] = {}
    root_type = _model_type(model)
    for path, module in modules_of(model).items():
        modules[path] = module
        canonical[path] = first.setdefault(id(module), path)
        parent = parts.get(path.rpartition(".")[0]) if path else None
        part = parts[path] = _part(module, parent)
        if part.guessed and parent is not None and part.model_type != parent.model_type:
            guessed[path] = part.model_type or ""
        if canonical[path] != path:
            continue
        info = describe_layer(module)
        above, _, name = path.rpartition(".")
        if info is not None and path and (reason := only_read(modules[above], name)):
            unread[path] = reason
        elif info is not None and info.kind == "attention":
            layers |= _attention(path, info, modules)
        elif info is not None:
            layers[path] = _layer(path, info, _told(path, part, modules))
        elif path and (roles := _expert_roles(module)):
            experts[path] = roles
    _structural_siblings(layers)
    output = _output_embeddings(model, first)
    return Survey(
        modules=modules,
        canonical=canonical,
        layers=layers,
        experts=experts,
        model_type=root_type,
        known=root_type in arch.ARCHITECTURES,
        guessed_parts=guessed,
        head=_head(model, output, modules, canonical),
        output_embeddings=output,
        unread=unread,
    )


def _model_type(module: nn.Module) -> str | None:
    model_type = getattr(vars(module).get("config"), "model_type", None)
    return model_type if isinstance(model_type, str) and model_type else None


def _part(module: nn.Module, parent: _Part | None) -> _Part:
    config = vars(module).get("config")
    if parent is not None and (config is None or config is parent.config):
        return parent
    model_type = _model_type(module)
    if model_type is None:
        return parent or _Part(None, None, arch.STRUCTURE, True)
    family = arch.ARCHITECTURES.get(model_type)
    return _Part(config, model_type, arch.STRUCTURE if family is None else family, family is None)


def _told(path: str, part: _Part, modules: Mapping[str, nn.Module]) -> _Part:
    """The part, with what the nearest module around the layer that knows it says of it."""
    above, end = path, ""
    while above:
        above, _, name = above.rpartition(".")
        end = f"{name}.{end}" if end else name
        family = own_family(modules[above])
        if family is not None and end in family:
            return replace(part, family={path: family[end]})
    return part


def _endings(path: str) -> Iterator[str]:
    """The ends of a dotted path, longest first: a.b.c, b.c, c."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def _layer(path: str, info: LayerInfo, part: _Part) -> Layer:
    if info.kind in ("embedding", "conv"):
        return Layer(path, info)
    entry = next((part.family[end] for end in _endings(path) if end in part.family), None)
    if entry is None:
        return Layer(path, info, guessed=part.guessed)
    if isinstance(entry, str):
        return Layer(path, info, (entry,), guessed=part.guessed)
    rows = role_rows(entry, part.config, info.out_features) or {}
    return Layer(path, info, entry.roles, rows, fused=True, guessed=part.guessed)


def _attention(path: str, info: LayerInfo, modules: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """The layer that a projection of an nn.MultiheadAttention is."""
    around = out_of(path, modules)
    if around is not None:
        adapted = describe_layer(modules[around]) is not None
        return {path: Layer(path, info, ("o",), out_of=around)} if adapted else {}
    if info.out_features != 3 * info.in_features:  # an out_proj by itself
        return {}
    size = info.in_features
    rows = {role: (range(i * size, (i + 1) * size),) for i, role in enumerate("qkv")}
    return {path: Layer(path, info, tuple(rows), rows, fused=True)}


def _structural_siblings(layers: dict[str, Layer]) -> None:
    """Where roles are told from structure, some names mean a role only beside a layer that has another."""
    for role, names in arch.STRUCTURE_SIBLINGS.items():
        parents = {path.rpartition(".")[0] for path, layer in layers.items() if layer.guessed and role in layer.roles}
        for path, layer in layers.items():
            parent, _, name = path.rpartition(".")
            if layer.guessed and not layer.roles and parent in parents and name in names:
                layers[path] = Layer(path, layer.info, (names[name],), guessed=True)


def _expert_roles(module: nn.Module) -> tuple[str, ...]:
    """Roles that a module of stacked experts computes with 3-D parameters."""
    found: list[str] = []
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3:
            found += arch.EXPERT_PARAMETERS.get(name, ())
    return tuple(dict.fromkeys(found))


def _output_embeddings(model: nn.Module, first: Mapping[int, str]) -> str | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        module = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        module = None
    return first.get(id(module)) if module is not None else None


def _head(
    model: nn.Module, output: str | None, modules: Mapping[str, nn.Module], canonical: Mapping[str, str]
) -> tuple[str, ...]:
    if arch.HEADED_CLASS.search(type(model).__name__):
        return _new_head(model, canonical)
    if output is not None:
        return (output,)
    return tuple(canonical[name] for name in arch.HEAD_NAMES if name in modules)


def _new_head(model: nn.Module, canonical: Mapping[str, str]) -> tuple[str, ...]:
    """What a classifier adds to its base model: its children with parameters, less the base and pre-trained ones."""
    pretrained = arch.PRETRAINED_HEADS.get(_model_type(model) or "", frozenset())
    base = getattr(model, "base_model_prefix", None)
    return tuple(
        canonical[name]
        for name, child in model.named_children()
        if name != base
        and name not in pretrained
        and not hasattr(child, "base_model_prefix")  # a part that is a pre-trained model itself
        and next(child.parameters(), None) is not None
        and not any(isinstance(part, _BODY) for part in child.modules())
    )
