"""Adapters of mlx-lm: adapters.safetensors beside adapter_config.json.

    y = W x + scale · (x lora_a) lora_b      lora_a (in, r), lora_b (r, out)

`scale` is the scaling itself, so alpha = scale·r here.
"""

from __future__ import annotations

import os
import re
from typing import Any

from torch import Tensor

from .. import fields
from ..adapter import LoRAAdapter
from ..config import LoRAConfig
from ..errors import LoRAConfigError, LoRAFileError, LoRAUnsupportedError
from ..values import Factors
from .reading import adapter_of, file_in, read_config, read_tensors, refuse_problems

__all__ = ["from_mlx"]

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|tok_embeddings|word_embeddings|embed_in)$")


def from_mlx(
    source: str | os.PathLike[str], *, scale: float | None = None, base_model: str | None = None
) -> LoRAAdapter:
    """The adapter that mlx-lm wrote into a folder.

    Args:
        source: holds adapters.safetensors and adapter_config.json.
        scale: instead of the config's; needed where the config has an `alpha` beside it, which early versions of mlx-lm
            multiplied in (scale·alpha/rank) and later ones ignore.
        base_model: the base's id, for the adapter's config. None takes the config's `model`. mlx-lm's own conversions
            ("mlx-community/…-4bit") are no base for transformers.

    Raises:
        LoRAConfigError: the config has no usable scale. LoRAFileError: a file is damaged, or holds something else;
            everything that is not understood is listed. LoRAUnsupportedError: DoRA, full fine-tuning, factors
            that are quantised, of experts, or of an embedding.

    Source: mlx-lm, mlx_lm/tuner/lora.py.
    """
    path = file_in(source, CONFIG)
    config = read_config(path)
    rank, scaling, dropout = _parameters(config, str(path), scale)
    tensors = read_tensors(file_in(source, WEIGHTS), allow_pickle=False)
    named = str(file_in(source, WEIGHTS))
    _refuse_foreign(tensors, named)
    pairs: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("lora_a", "lora_b") and module:
            pairs.setdefault(module, {})[leaf[-1]] = tensor
        else:
            problems.append(f"{name}: neither lora_a nor lora_b")
    factors = {}
    for module, pair in pairs.items():
        if len(pair) < 2:
            problems.append(f"{module}: lora_{next(iter(pair))} is alone")
            continue
        a, b = pair["a"], pair["b"]
        if a.shape[1] != rank or b.shape[0] != rank or 0 in (*a.shape, *b.shape):
            problems.append(f"{module}: lora_a {list(a.shape)} and lora_b {list(b.shape)}, the config's rank is {rank}")
        elif not a.is_floating_point() or a.dtype != b.dtype:
            problems.append(f"{module}: lora_a is {a.dtype}, lora_b {b.dtype}")
        else:
            factors[module] = Factors("linear", a.T.contiguous(), b.T.contiguous(), scaling * rank)
    if not tensors:
        problems.append("lora_a: there is none")
    refuse_problems(named, problems)
    if base_model is None:
        base_model = config.get("model") if isinstance(config.get("model"), str) else None
    written = LoRAConfig(r=rank, alpha=scaling * rank, dropout=dropout, base_model=base_model or None)
    return adapter_of(named, written, factors)


def _parameters(config: dict[str, Any], path: str, scale: float | None) -> tuple[int, float, float]:
    if "peft_type" in config:
        raise LoRAFileError(
            f"{path} is PEFT's config (peft_type={config['peft_type']!r}), not mlx-lm's.",
            name="peft_type",
            value=config["peft_type"],
            remedy="Load it with LoRAAdapter.load().",
        )
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise LoRAUnsupportedError(
            f"{path}: fine_tune_type={kind!r} is not LoRA.",
            name="fine_tune_type",
            value=kind,
            expected="lora",
            remedy="Fuse it with mlx_lm.fuse and extract a LoRA (extract_lora).",
        )
    given = config.get("lora_parameters")
    if not isinstance(given, dict):
        raise LoRAConfigError(
            f"{path} has no lora_parameters; its fields: {', '.join(sorted(config)[:8])}.",
            name="lora_parameters",
            value=given,
            remedy="Use the adapter_config.json that mlx-lm wrote beside the weights.",
        )
    unknown = sorted(given.keys() - {"rank", "scale", "dropout", "keys", "alpha"})
    if unknown:
        raise LoRAUnsupportedError(
            f"{path}: lora_parameters has {', '.join(unknown)}, which is not known here.",
            name=unknown[0],
            value=given[unknown[0]],
        )
    if scale is None:
        if "alpha" in given or "scale" not in given:
            what = f"alpha={given['alpha']!r} beside scale" if "alpha" in given else "no scale"
            raise LoRAConfigError(
                f"{path}: lora_parameters has {what}, so the scaling is not certain.",
                name="scale",
                value=given,
                remedy="Give scale=… (--scale): the scale for a recent mlx-lm, scale·alpha/rank for an early one.",
            )
        scale = given["scale"]
    rank = fields.integer("rank", given.get("rank"), least=1)
    return rank, fields.positive("scale", scale), fields.fraction("dropout", given.get("dropout", 0.0))


def _refuse_foreign(tensors: dict[str, Tensor], source: str) -> None:
    found = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "m":
            found[name] = "DoRA's magnitude"
        elif leaf.endswith(("_scales", "_biases")):
            found[name] = "quantised factors"
        elif leaf in ("lora_a", "lora_b") and tensor.dim() != 2:
            found[name] = f"experts' factors, shape {list(tensor.shape)}"
        elif leaf in ("lora_a", "lora_b") and _EMBEDDING.search(module):
            # Where the output is tied to it, mlx-lm adapts that as well, which the file does not say.
            found[name] = "an embedding's factors"
    if found:
        raise LoRAUnsupportedError(
            f"{source} has tensors of {', '.join(sorted(set(found.values())))}, which are not imported.",
            name=next(iter(found)),
            value=next(iter(found.values())),
            facts=[f"{name}: {what}" for name, what in found.items()],
            remedy="Fuse it with mlx_lm.fuse and extract a LoRA (extract_lora).",
        )
