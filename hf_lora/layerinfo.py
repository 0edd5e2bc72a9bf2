"""What a layer is to a LoRA: its kind and its two sizes, or the reason why it cannot take one."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .architectures import EXPERT_PARAMETERS, WEIGHTS_READ

__all__ = ["LayerInfo", "HELD", "describe_layer", "is_held", "modules_of", "only_read", "out_of", "why_not", "unhook"]


# Names of the children that hf_lora gives to a module: what adapters hold is not part of the base.
HELD = frozenset({"lora_slots", "lora_heads"})


def is_held(path: str) -> bool:
    """Whether a module's, parameter's or state-dict path lies within what adapters hold, rather than in the base."""
    return not HELD.isdisjoint(path.split("."))


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by each of its names, without what adapters hold.

    As `named_modules(remove_duplicate=False)`, in its order, several times faster.
    """
    found: dict[str, nn.Module] = {}
    _collect("", model, found)
    return found


def _collect(path: str, module: nn.Module, found: dict[str, nn.Module]) -> None:
    found[path] = module
    start = f"{path}." if path else ""
    for name, child in module._modules.items():
        if child is not None and name not in HELD:
            _collect(start + name, child, found)


@dataclass(frozen=True)
class LayerInfo:
    """Kind and sizes of a layer that can take a LoRA.

    Attributes:
        kind: "linear" (weight `(out, in)`, quantised or not), "conv1d" (GPT-2's, weight `(in, out)`), "embedding", or
            "conv" (nn.Conv1d, Conv2d, Conv3d), or "attention" (nn.MultiheadAttention's in_proj, at the path of the
            module, and its out_proj).
        in_features: size of what the layer reads; for an embedding the number of its rows V, for a convolution its
            channels times the size of its kernel.
        out_features: size of what the layer gives; for an embedding its width d.
        kernel: of a convolution, its sizes.
        groups: of a convolution.
    """

    kind: Literal["linear", "conv1d", "embedding", "conv", "attention"]
    in_features: int
    out_features: int
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @property
    def pair(self) -> Literal["linear", "embedding", "conv", "attention"]:
        """The kind of factors that it takes: `Factors.kind`."""
        return "linear" if self.kind == "conv1d" else self.kind

    @property
    def weight(self) -> str:
        """What the layer calls the weight that a LoRA changes."""
        attends = self.kind == "attention" and self.out_features == 3 * self.in_features
        return "in_proj_weight" if attends else "weight"

    @property
    def max_rank(self) -> int:
        """The largest rank that a change of this layer's weight can have."""
        return min(self.in_features, self.out_features)


@dataclass(frozen=True)
class _Refused:
    """Linear-like by name and sizes, yet its forward is not x @ W.T + b on the last axis.

    `overridden`: only classes that replace the forward of nn.Linear (a plain Linear may be called what it likes).
    `module`: only classes of a module of that name, or in it.
    """

    name: re.Pattern[str]
    reason: str
    overridden: bool = True
    module: str = ""


_REFUSED = (
    _Refused(
        re.compile("Router|Gate(?!d)"),
        "a router: its forward returns more than a projection (adapt its experts: target_parameters)",
    ),
    _Refused(
        re.compile("QuantLinear"), "its forward takes and returns scales, too", module="transformers.models.ibert"
    ),
    _Refused(re.compile("Grouped"), "its forward applies a different part of the weight to each group of inputs"),
    _Refused(re.compile("Decoupled"), "its forward joins a second, additional weight"),
)

_QUANTISERS = frozenset({"bitsandbytes", "torchao"})  # their embeddings look up as nn.Embedding does

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def describe_layer(module: nn.Module) -> LayerInfo | None:
    """Kind and sizes of `module` as a LoRA sees it, or None if it cannot take one.

    Linear-like is told by the name of a class in the method resolution order ("…Linear…") and two integer sizes, so
    that quantised classes that do not derive from `nn.Linear` (EetqLinear, HiggsLinear, NVFP4Linear, …) count and need
    no import; the same for transformers' `Conv1D`. Subclasses of `nn.Embedding` count, scaled ones too.

    Args:
        module: any module; a layer that already carries a LoRA is described as the layer it is.

    Returns:
        the description; None for everything else, in particular routers, grouped linear layers and the `out_proj` of
        `nn.MultiheadAttention` (see `why_not`).
    """
    if isinstance(module, nn.Embedding):
        if _refused(module) is not None:
            return None
        return LayerInfo("embedding", module.num_embeddings, module.embedding_dim)
    if isinstance(module, _CONVOLUTIONS):
        if _odd_convolution(module) is not None:
            return None
        kernel = tuple(module.kernel_size)
        return LayerInfo("conv", module.in_channels * math.prod(kernel), module.out_channels, kernel, module.groups)
    if isinstance(module, nn.MultiheadAttention):
        size = module.embed_dim
        return LayerInfo("attention", size, 3 * size) if _odd_attention(module) is None else None
    own: Any = _own_class(module)
    sizes = vars(module)
    if own is NonDynamicallyQuantizableLinear:
        return LayerInfo("attention", sizes["in_features"], sizes["out_features"])
    linear, conv1d = _looks(own)
    if linear:
        fan_in, fan_out = sizes.get("in_features"), sizes.get("out_features")
        if not (isinstance(fan_in, int) and isinstance(fan_out, int)) or _refused(module) is not None:
            return None
        weight = getattr(module, "weight", None)
        if not (fan_in and fan_out) or getattr(weight, "ndim", 2) > 2:  # stacked experts call themselves Linear, too
            return None
        return LayerInfo("linear", fan_in, fan_out)
    nx, nf = sizes.get("nx"), sizes.get("nf")
    if isinstance(nx, int) and isinstance(nf, int) and conv1d:
        return LayerInfo("conv1d", nx, nf)
    return None


@functools.lru_cache(maxsize=1024)
def _looks(cls: Any) -> tuple[bool, bool]:
    """Whether a class is Linear-like by its name, or a base's, and whether it is a Conv1D."""
    names = [base.__name__ for base in cls.__mro__]
    return issubclass(cls, nn.Linear) or any("Linear" in name for name in names), "Conv1D" in names


def why_not(module: nn.Module) -> tuple[str, bool]:
    """Why `module` takes no LoRA, and whether it is a layer that LoRA could in principle reach (not yet supported).

    Returns:
        a clause that follows "it is a <class>: ", and True where the answer is "not yet" instead of "not a layer".
    """
    if _own_class(module) is NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads this layer's weight and never calls it; name that module", True
    reason = _refused(module)
    if reason is not None:
        return reason, True
    if isinstance(module, nn.modules.conv._ConvNd):
        return _odd_convolution(module) or "another convolution than Conv1d, Conv2d and Conv3d", True
    if isinstance(module, nn.Linear) and not module.weight.numel():
        return f"its weight is empty ({module.out_features} x {module.in_features})", True
    if any(p.ndim == 3 and name in EXPERT_PARAMETERS for name, p in module.named_parameters(recurse=False)):
        return "its weights are 3-D parameters: name these in target_parameters", True
    if isinstance(module, nn.MultiheadAttention):
        return _odd_attention(module) or "a layer", True
    if next(module.children(), None) is not None:
        return "a container, not a layer", False
    return "neither a Linear-like layer, a Conv1D, a convolution nor an Embedding", False


def _odd_convolution(module: nn.Module) -> str | None:
    """Why a convolution takes no LoRA; None if it does."""
    own: Any = _own_class(module)
    if isinstance(module, nn.modules.conv._LazyConvXdMixin):
        return "it is lazy, so its sizes are not known before it has run once"
    if module.transposed:
        return "transposed convolutions are not supported"
    plain = next((cls for cls in _CONVOLUTIONS if issubclass(own, cls)), None)
    if plain is None or (own.forward, own._conv_forward) != (plain.forward, plain._conv_forward):
        return "its forward is not that of nn.Conv1d, Conv2d or Conv3d"
    return None


def _odd_attention(module: nn.Module) -> str | None:
    """Why an nn.MultiheadAttention takes no LoRA; None if it does."""
    own: Any = _own_class(module)
    assert isinstance(module, nn.MultiheadAttention)
    if own.forward is not nn.MultiheadAttention.forward:
        return "its forward is not that of nn.MultiheadAttention"
    if not module._qkv_same_embed_dim:
        return "its keys or values have another width (kdim, vdim), with a weight for each, which PEFT does not adapt"
    if _own_class(module.out_proj) is not NonDynamicallyQuantizableLinear:
        return f"its out_proj is a {type(module.out_proj).__name__}"
    return None


def out_of(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The path of the nn.MultiheadAttention that the layer at `path` is the output projection of; None: of none."""
    around, _, name = path.rpartition(".")
    module = modules.get(around)
    return around if name == "out_proj" and isinstance(module, nn.MultiheadAttention) else None


def only_read(parent: nn.Module | None, name: str) -> str | None:
    """Why a child of `parent` takes no LoRA although it is a layer: its weight is read, its forward never runs."""
    for cls in type(parent).__mro__:
        if name in WEIGHTS_READ.get(cls.__name__, ()):
            return f"{cls.__name__} multiplies by its weight itself and never calls it"
    return None


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without what hf_lora swapped in."""
    own: type[nn.Module] = getattr(type(module), "lora_base", type(module))
    return own


def _refused(module: nn.Module) -> str | None:
    own: Any = _own_class(module)
    reason: str | None = _refused_class(own)
    if reason is not None or not isinstance(module, nn.Embedding):
        return reason
    # A scaled embedding looks up its input and multiplies; OPT's and BART's positions make their own ids.
    plain = own.forward is nn.Embedding.forward
    looks_up = plain or hasattr(module, "embed_scale") or own.__module__.partition(".")[0] in _QUANTISERS
    return None if looks_up else "its forward looks up something else than the ids that it is given (positions, say)"


@functools.lru_cache(maxsize=1024)
def _refused_class(own: Any) -> str | None:
    plain = own.forward in (nn.Linear.forward, nn.Embedding.forward)
    for cls in own.__mro__:
        if cls in (nn.Linear, nn.Embedding, nn.Module):
            break
        for rule in _REFUSED:
            if (
                not (rule.overridden and plain)
                and cls.__module__.startswith(rule.module)
                and rule.name.search(cls.__name__)
            ):
                return rule.reason
    return None


def unhook(model: nn.Module, owner: type) -> None:
    """Take away every forward hook of the model that is a method of an `owner`."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), owner)]:
                del hooks[key]
                for names in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
                    getattr(module, names).pop(key, None)
