"""A model in float64 with W' and b' written into it from an adapter's file: none of hf_lora's code, none of peft's.

W' = m ∘ V / ‖V‖,  V = W_k + s · B diag(σ) A,  b' = b + s · β, or the trained bias

An aLoRA adds s · x Aᵀ Bᵀ on the positions from its invocation on. LoftQ's V is of W's nearest NF4 values. Layers that
are repeated are copies.
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
        if config.get("layer_replication"):
            _repeat(into, config["layer_replication"])
            base = into
        buffers = dict(into.named_buffers())
        for path, value in whole.items():
            if path in buffers:
                buffers[path].copy_(value)
                continue
            change = weight * (value.double() - base.get_parameter(path).double())
            into.get_parameter(path).data += change
        if config.get("alora_invocation_tokens"):
            _activate(into, layers, config, weight)
            continue
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


def _repeat(model: Any, spans: Iterable[tuple[int, int]]) -> None:
    held = model.model.layers
    model.model.layers = nn.ModuleList(copy.deepcopy(held[i]) for first, end in spans for i in range(first, end))
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = len(model.model.layers)


def _activate(
    model: Any, layers: Mapping[str, dict[str, torch.Tensor]], config: Mapping[str, Any], weight: float
) -> None:
    tokens, seen = list(config["alora_invocation_tokens"]), {}

    def look(_: Any, args: Any, kwargs: Any) -> None:
        ids = (args[0] if args else kwargs["input_ids"]).tolist()
        mask = torch.zeros(len(ids), len(ids[0]), 1, dtype=torch.float64)
        for row, line in enumerate(ids):
            found = [i for i in range(len(line)) if line[i : i + len(tokens)] == tokens]
            if found:
                mask[row, found[-1] :] = 1
        seen["mask"] = mask

    model.register_forward_pre_hook(look, with_kwargs=True)
    for path, parts in layers.items():
        A, B, scaling = parts["A"], parts["B"], _scaling(config, path, parts)

        def add(_: Any, args: Any, output: torch.Tensor, A: Any = A, B: Any = B, s: float = scaling) -> torch.Tensor:
            return output + weight * s * seen["mask"] * (args[0] @ A.T @ B.T)

        model.get_submodule(path).register_forward_hook(add)


# The 4-bit NormalFloat of Dettmers et al. 2023 (arXiv:2305.14314, appendix E).
_NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
_NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
_NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def _nearest(W: torch.Tensor) -> torch.Tensor:
    """W in NF4, in blocks of 64 numbers with their largest as the scale."""
    flat = W.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(_NF4, dtype=W.dtype)
    found = codes[(blocks / scale.clamp_min(1e-300)).unsqueeze(-1).sub(codes).abs().argmin(-1)] * scale
    return found.flatten()[: len(flat)].view_as(W)


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
    V = _nearest(W) if config.get("init_lora_weights") == "loftq" else W
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
