"""The value that a new adapter starts with: A random, B zero, biases and heads as the base's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .config import LoRAConfig
from .errors import LoRAUnsupportedError
from .extras import asked_for
from .fitting import adds_bias, base_state, weight_problem
from .layerinfo import is_held
from .targeting import Resolution
from .values import AdapterValue, Block, Factors
from .variants import Base, initial_extras
from .weights import compute_dtype, dense_weight, device_of, materialised

__all__ = ["initial_value"]


def initial_value(model: nn.Module, config: LoRAConfig, found: Resolution) -> AdapterValue:
    """A new adapter for the targets that were found, in float32 (float64 on a float64 base), on the CPU."""
    factors, modules = {}, dict(model.named_modules())
    for target in found.targets:
        module = modules[target.path]
        dtype = torch.promote_types(compute_dtype(module, model), torch.float32)
        # A tensor on meta has no values: factors of a meta model are made on meta, to be filled with the base.
        device = torch.device("meta") if device_of(module).type == "meta" else torch.device("cpu")
        embedding = target.info.kind == "embedding"
        n, r = max(len(target.blocks), 1), target.rank
        A = torch.empty(n * r, target.info.in_features, dtype=dtype, device=device)
        B = torch.zeros(target.info.out_features, n * r, dtype=dtype, device=device)
        blocks = tuple(Block(role, rows) for role, rows in target.blocks)
        for i in range(n):
            rows = blocks[i].index(device) if blocks else torch.arange(target.info.out_features, device=device)
            part = torch.zeros(len(rows), r, dtype=dtype, device=device)
            _initialise(A[i * r : (i + 1) * r], part, config.init, embedding)
            B[rows, i * r : (i + 1) * r] = part
        alpha = target.alpha * (math.sqrt(n) if config.use_rslora else n)
        kind = "embedding" if embedding else "linear"
        pair = Factors(kind, A, B, alpha, config.use_rslora, blocks)  # type: ignore[arg-type]
        factors[target.path] = with_extras(module, target.path, pair, config) if asked_for(config) else pair
    biases = {path: materialised(owner, "bias") for path, owner in _biases(model, config, set(factors), found.heads)}
    heads = {path: base_state(modules[path]) for path in found.heads}
    if any(target.info.kind == "conv1d" for target in found.targets):
        config = config.replace(fan_in_fan_out=True)
    if config.base_model is None:
        config = config.replace(base_model=getattr(getattr(model, "config", None), "_name_or_path", None) or None)
    return AdapterValue(config, factors, biases, heads)


def with_extras(module: nn.Module, path: str, pair: Factors, config: LoRAConfig) -> Factors:
    """The factors of a new adapter with its variants' vectors: with B zero, the layer computes what it did before."""
    lacking = weight_problem(module, asked_for(config), pair.rank)
    if lacking is not None:
        raise LoRAUnsupportedError(
            f"{path}: {lacking[1]}.",
            name=lacking[0],
            value=type(module).__name__,
            remedy=f"Load the base without quantisation, give a smaller rank, or train without {lacking[0]}.",
        )
    extras = initial_extras(
        asked_for(config),
        pair.A,
        pair.B,
        pair.scaling,
        lambda: Base.of(dense_weight(module), getattr(type(module), "lora_base", type(module))),
        random=config.init == "off",
    )
    return dataclasses.replace(pair, extras=extras)


def _initialise(A: Tensor, B: Tensor, how: str, embedding: bool) -> None:
    """A (r, in) random and B (out, r) zero, as the paper; of an embedding A is zero and B normal, as in loralib."""
    if embedding:
        nn.init.normal_(B)
        nn.init.normal_(A) if how == "off" else nn.init.zeros_(A)
        return
    if how == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if how == "off":
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))


def _biases(
    model: nn.Module, config: LoRAConfig, targets: set[str], heads: Iterable[str]
) -> Iterator[tuple[str, nn.Module]]:
    """The bias vectors that the config trains, one name each, and the modules that own them."""
    if config.bias == "none":
        return
    modules, seen = dict(model.named_modules()), set()
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = path.rpartition(".")
        if (
            leaf != "bias"
            or is_held(path)
            or id(parameter) in seen
            or any(f"{owner}.".startswith(f"{head}.") for head in heads)
        ):
            continue
        wanted = owner in targets if config.bias == "lora_only" else adds_bias(modules[owner])
        if wanted:
            seen.add(id(parameter))
            yield path, modules[owner]
