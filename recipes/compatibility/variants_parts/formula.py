"""A model in float64 with W' and b' written into it from an adapter's file: none of hf_lora's code, none of peft's.

W' = m ∘ V / ‖V‖,  V = W_k + s · B diag(σ) A,  b' = b + s · β, or the trained bias
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

__all__ = ["written_out"]

_PREFIX = "base_model.model."
# The end of a tensor's key -> what it is called here.
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    "lora_diag": "sigma",
    "lora_B.bias": "beta",
}
_TRAINING = re.compile(r"\.lora_(velora|monteclora)")  # what only a training reads


def written_out(base: nn.Module, adapters: Mapping[Path, float] | Iterable[Path]) -> Any:
    """The base in float64, with every adapter's change of W and b added, times its weight.

    Args:
        adapters: folders in PEFT's format, and their weights; 1 if none are given.
    """
    weights = adapters if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    into = copy.deepcopy(base).double().eval()
    for folder, weight in weights.items():
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        layers, whole = _read(folder / "adapter_model.safetensors")
        for path, value in whole.items():
            change = weight * (value.double() - base.get_parameter(path).double())
            into.get_parameter(path).data += change
        for path, parts in layers.items():
            _change(into.get_submodule(path), base.get_submodule(path), parts, config, path, weight)
    return into


def _read(file: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    whole = {}
    for key, tensor in load_file(file).items():
        key = key.removeprefix(_PREFIX)
        if _TRAINING.search(key):
            continue
        end = next((end for end in sorted(_PARTS, key=len, reverse=True) if key.endswith("." + end)), None)
        if end is not None:
            layers.setdefault(key.removesuffix("." + end), {})[_PARTS[end]] = tensor.double()
        elif "lora_" not in key:  # trained biases, and PEFT's copy of an embedding
            whole[key.replace(".base_layer.", ".")] = tensor
        else:
            raise KeyError(f"{key}: no formula is written down for it")
    return layers, whole


def _scaling(config: Mapping[str, Any], path: str, parts: Mapping[str, torch.Tensor]) -> float:
    rank = len(parts["A"])
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", path)), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _expanded(
    A: torch.Tensor, B: torch.Tensor, in_features: int, config: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole factors of those with blocks (BD-LoRA), and of A that reads means of groups (QA-LoRA)."""
    if config.get("use_bdlora"):
        n = config["use_bdlora"]["nblocks"]
        A = A if A.shape[1] == in_features else torch.block_diag(*A.chunk(n))
        B = B if B.shape[1] == len(A) else torch.block_diag(*B.chunk(n))
    if config.get("use_qalora") and A.shape[1] != in_features:
        group = in_features // A.shape[1]
        A = A.repeat_interleave(group, 1) * A.shape[1] / group
    return A, B


def _change(
    into: nn.Module,
    base: nn.Module,
    parts: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    path: str,
    weight: float,
) -> None:
    scaling = _scaling(config, path, parts)
    turned = not isinstance(base, nn.Linear)  # Conv1D and Embedding hold (in, out)
    W = base.weight.detach().double()
    W = W.T if turned else W
    A, B = _expanded(parts["A"], parts["B"], W.shape[1], config)
    V = W
    if "sigma" in parts:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        kept = len(S) - len(A)
        V = (U[:, :kept] * S[:kept]) @ Vh[:kept]
        B = B * parts["sigma"]
    V = V + scaling * B @ A
    if "m" in parts:
        V = parts["m"][:, None] * V / torch.linalg.vector_norm(V, dim=1, keepdim=True)
    change = weight * (V - W)
    into.weight.data += change.T if turned else change
    if "beta" in parts:
        shift = weight * scaling * parts["beta"]
        if into.bias is None:
            into.bias = nn.Parameter(torch.zeros_like(shift))
        into.bias.data += shift
