"""Bottleneck adapters, as the paper compares with them.

    h ← h + W_up act(W_down h + b_down) + b_up        W_down (r, d), W_up (d, r)

A table says where each kind puts them. W_up and b_up begin at zero, so that the model begins as it was.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_lora.targeting import roles_of

__all__ = ["KINDS", "Bottleneck", "Kind", "insert", "layer_paths"]


class Bottleneck(nn.Module):
    """What is added to a layer's output. With `norm` its input is normalised first (Lin et al. 2020)."""

    def __init__(self, width: int, bottleneck: int, *, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        if self.up.weight.device.type != "meta":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.up(torch.nn.functional.gelu(self.down(self.norm(hidden))))


@dataclass(frozen=True)
class Kind:
    """After the layers with which roles; whether with a LayerNorm of its own."""

    roles: tuple[str, ...]
    norm: bool = False


KINDS = {
    "adapter-h": Kind(("o", "down")),  # Houlsby et al. 2019: after attention and after the MLP
    "adapter-l": Kind(("down",), norm=True),  # Lin et al. 2020: after the MLP, with a LayerNorm
    "adapter-p": Kind(("down",)),  # Pfeiffer et al. 2021: after the MLP
    "adapter-d": Kind(("down",)),  # Rücklé et al. 2020 (AdapterDrop): as P, none in the lower layers
}


def layer_paths(model: nn.Module) -> list[str]:
    """The Transformer's layers, from the lowest."""
    found = (re.match(r"(.+?\.\d+)\.", path) for path, roles in roles_of(model).items() if "v" in roles)
    return list(dict.fromkeys(match.group(1) for match in found if match))


def insert(model: nn.Module, kind: str, bottleneck: int, *, dropped: int = 0) -> list[Bottleneck]:
    """Put adapters behind the layers that the kind names, but for the lowest `dropped` layers."""
    lower = tuple(f"{path}." for path in layer_paths(model)[:dropped])
    put = []
    for path, roles in roles_of(model).items():
        if not set(roles) & set(KINDS[kind].roles) or path.startswith(lower):
            continue
        module = model.get_submodule(path)
        weight = module.weight  # (out, in), or (in, out) of a Conv1D
        width = weight.shape[1] if type(module).__name__ == "Conv1D" else weight.shape[0]
        with torch.device(weight.device):
            module.bottleneck = Bottleneck(width, bottleneck, norm=KINDS[kind].norm)
        module.register_forward_hook(_added)
        put.append(module.bottleneck)
    return put


def _added(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output + module.bottleneck(output)
