"""What the layers of models outside transformers compute: the classes of timm and diffusers, and a class's own word.

A class says it with an attribute, `lora_roles`, from the end of a layer's path inside it to its role, or to its roles
in the order of its rows, which have equal parts:

    class Attention(nn.Module):
        lora_roles = {"qkv": ("q", "k", "v"), "proj": "o"}
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from .architectures import ROLES, Family, Fused
from .errors import LoRAConfigError

__all__ = ["CLASSES", "own_family"]

_QKV = ("q", "k", "v")
_VIT: Family = {"qkv": Fused(_QKV, "equal"), "q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "o"}
_DIFFUSERS: Family = {
    **dict.fromkeys(("to_q", "add_q_proj"), "q"),
    **dict.fromkeys(("to_k", "add_k_proj"), "k"),
    **dict.fromkeys(("to_v", "add_v_proj"), "v"),
    **dict.fromkeys(("to_out.0", "to_out", "to_add_out"), "o"),
    **dict.fromkeys(("to_qkv", "to_added_qkv"), Fused(_QKV, "equal")),  # after fuse_projections()
    "to_kv": Fused(("k", "v"), "equal"),
}
# GEGLU and SwiGLU of diffusers: x, gate = proj(x).chunk(2); x * act(gate).
_UP: Family = {"proj": "up"}
_GLU: Family = {"proj": Fused(("up", "gate"), "equal")}

CLASSES: Mapping[str, Family] = {
    **dict.fromkeys(
        (
            "timm.layers.attention.Attention",
            "timm.layers.attention.AttentionRope",
            "timm.models.vision_transformer.Attention",
            "timm.models.vision_transformer_sam.Attention",
            "timm.models.eva.EvaAttention",
            "timm.models.beit.Attention",
            "timm.models.swin_transformer.WindowAttention",
        ),
        _VIT,
    ),
    "timm.layers.mlp.SwiGLU": {"fc1_g": "gate", "fc1_x": "up", "fc2": "down"},
    **dict.fromkeys(
        (
            "diffusers.models.attention_processor.Attention",
            "diffusers.models.transformers.transformer_flux.FluxAttention",
        ),
        _DIFFUSERS,
    ),
    "diffusers.models.attention.FeedForward": {"net.2": "down"},
    "diffusers.models.activations.GEGLU": _GLU,
    "diffusers.models.activations.SwiGLU": _GLU,
    "diffusers.models.activations.GELU": _UP,
    "diffusers.models.activations.ApproximateGELU": _UP,
}
"""Class → the ends of its layers' paths, and their roles."""


def own_family(module: nn.Module) -> Family | None:
    """The roles of the layers in a module, as it says itself (on the class or the instance), or as its library's.

    Raises:
        LoRAConfigError: its `lora_roles` is no mapping of paths to roles.
    """
    said, cls = vars(module).get("lora_roles"), _class_of(module)
    return _of_class(cls) if said is None else _family(said, cls.__name__)


def _class_of(module: nn.Module) -> Any:
    return type(module)


@functools.lru_cache(maxsize=1024)
def _of_class(cls: Any) -> Family | None:
    for base in cls.__mro__:
        if (said := vars(base).get("lora_roles")) is not None:
            return _family(said, base.__name__)
        if (found := CLASSES.get(f"{base.__module__}.{base.__qualname__}")) is not None:
            return found
    return None


def _family(said: Any, name: str) -> Family:
    family: dict[str, str | Fused] = {}
    for end, roles in said.items() if isinstance(said, Mapping) else ((None, said),):
        given = (roles,) if isinstance(roles, str) else tuple(roles) if isinstance(roles, list | tuple) else ()
        if not isinstance(end, str) or not given or not set(given) <= set(ROLES) or len(set(given)) < len(given):
            raise LoRAConfigError(
                f"lora_roles of {name}: {end!r}: {roles!r} is no role of a layer.",
                name="lora_roles",
                value=said,
                expected=ROLES,
                remedy='Map the end of a path to a role, or to several in the order of rows: {"qkv": ("q", "k", "v")}.',
            )
        family[end] = given[0] if isinstance(roles, str) else Fused(given, "equal")
    return family
