"""AdaLoRA of PEFT as a plain LoRA.

    ΔW = lora_B (lora_E ⊙ lora_A) · lora_alpha/(init_r + 1e-5)      lora_E (r, 1): the singular values that were kept

PEFT divides by the rank that a layer began with, whatever was pruned later. So A = lora_E ⊙ lora_A, and alpha makes up
for the rank r that is left: alpha = lora_alpha·r/(init_r + 1e-5).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from .. import fields
from ..adapter import LoRAAdapter
from ..agreement import described
from ..config import LoRAConfig
from ..errors import LoRAFileError
from ..layout import PREFIX, from_state_dict
from .reading import file_in, read_config, read_tensors, refuse_problems

__all__ = ["from_adalora"]

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_OWN = frozenset({"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"})
_REPLACED = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type"})
_KEY = re.compile(r"(.+)\.lora_([ABE])")
_EPSILON = 1e-5  # PEFT's, against a rank of 0


def from_adalora(source: str | os.PathLike[str], *, allow_pickle: bool = False) -> LoRAAdapter:
    """The LoRA that computes what an AdaLoRA adapter of PEFT does.

    Args:
        source: holds adapter_config.json and adapter_model.safetensors (or .bin).
        allow_pickle: read adapter_model.bin, with torch.load(weights_only=True).

    Returns:
        The adapter, its A in float32 at least. A layer whose rank was pruned to 0 has no factors.

    Raises:
        LoRAFileError: it is no AdaLoRA, or damaged; everything that is wrong is listed.
        LoRAConfigError, LoRAUnsupportedError: a field is impossible, or not computed here.

    Source: Zhang et al. 2023 (arXiv:2303.10512); peft 0.21.2, tuners/adalora/layer.py.
    """
    path = file_in(source, CONFIG)
    config = read_config(path)
    if config.get("peft_type") != "ADALORA":
        raise LoRAFileError(
            f"{path} has peft_type={config.get('peft_type')!r}, not 'ADALORA'.",
            name="peft_type",
            value=config.get("peft_type"),
            expected="ADALORA",
            remedy="Load a LoRA with LoRAAdapter.load().",
        )
    first = fields.integer("init_r", config.get("init_r", 12), least=1)
    alpha = fields.positive("lora_alpha", config.get("lora_alpha", 8))
    weights = file_in(source, WEIGHTS, PICKLE)
    named = str(weights)
    tensors: dict[str, Tensor] = {}
    triples: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(weights, allow_pickle=allow_pickle).items():
        match = _KEY.fullmatch(name)
        if match is not None and name.startswith(PREFIX):
            triples.setdefault(match[1][len(PREFIX) :], {})[match[2]] = tensor
        else:
            tensors[name] = tensor
    kept, problems = _kept(config, str(path))
    problems += [f"{name}: no tensor of an AdaLoRA" for name in tensors if ".lora_" in name]
    ranks = {}
    for layer, triple in triples.items():
        problem = _problem(triple, kept.get(layer, first))
        if problem is not None:
            problems.append(f"{layer}: {problem}")
        elif triple["A"].shape[0]:
            wide = torch.promote_types(triple["A"].dtype, torch.float32)
            ranks[layer] = triple["A"].shape[0]
            tensors[f"{PREFIX}{layer}.lora_A.weight"] = triple["A"].to(wide) * triple["E"].to(wide)
            tensors[f"{PREFIX}{layer}.lora_B.weight"] = triple["B"].to(wide)
    problems += [f"{layer}: in rank_pattern, without tensors" for layer in sorted(kept.keys() - triples.keys())]
    if not ranks and not problems:
        problems.append("lora_A: no layer has a rank above 0")
    refuse_problems(named, problems)
    written = {name: value for name, value in config.items() if name not in _OWN | _REPLACED}
    written |= _ranks(ranks, alpha / (first + _EPSILON))
    if len(ranks) < len(triples):  # its targets would name layers that have no factors any more
        written |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        written["target_modules"] = sorted(ranks)
    value = from_state_dict(LoRAConfig.from_peft(written), tensors, source=named)
    return LoRAAdapter.of(described(value))


def _kept(config: dict[str, Any], path: str) -> tuple[dict[str, int], list[str]]:
    """Layer → how many of its singular values the allocator kept; what is wrong with the pattern."""
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        return {}, [f"{path}: rank_pattern is {type(pattern).__name__}"]
    found, problems = {}, []
    for name, mask in pattern.items():
        layer = name.removeprefix(PREFIX).partition(".lora_E")[0]
        if not isinstance(mask, list) or not all(isinstance(bit, bool) for bit in mask):
            problems.append(f"{name}: its rank_pattern is no list of booleans")
        else:
            found[layer] = sum(mask)
    return found, problems


def _problem(triple: dict[str, Tensor], rank: int) -> str | None:
    if len(triple) < 3:
        return f"has only lora_{', lora_'.join(sorted(triple))}"
    a, b, e = triple["A"], triple["B"], triple["E"]
    shapes = f"lora_A {list(a.shape)}, lora_E {list(e.shape)}, lora_B {list(b.shape)}"
    if a.dim() != 2 or b.dim() != 2 or tuple(e.shape) != (a.shape[0], 1) or b.shape[1] != a.shape[0]:
        return f"{shapes} do not fit each other"
    if a.shape[0] != rank:
        return f"{shapes}: the config says rank {rank}"
    if not a.is_floating_point() or len({a.dtype, b.dtype, e.dtype}) > 1:
        return f"dtypes {a.dtype}, {e.dtype}, {b.dtype}"
    return None


def _ranks(ranks: dict[str, int], scaling: float) -> dict[str, Any]:
    """PEFT's fields for these ranks and one scaling."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {"^" + re.escape(layer): rank for layer, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": scaling * common,
        "rank_pattern": others,
        "alpha_pattern": {layer: scaling * rank for layer, rank in others.items()},
    }
