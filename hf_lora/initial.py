"""The value that a new adapter starts with: its pairs as `inits` has them, biases and heads as the base's."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .config import LoRAConfig
from .errors import LoRAConfigError, LoRAUnsupportedError
from .expertputting import initial_experts
from .extras import EXTRAS, asked_for
from .fitting import adds_bias, base_state, weight_problem
from .forms import Form, form_of
from .inits import INITS, Layer
from .inits.base import dense
from .inits.inputs import bar
from .layerinfo import is_held
from .targeting import Resolution, Target
from .tokens import initial_rows, token_paths
from .tying import group_of, tied_pairs
from .values import NAMES, AdapterValue, Block, Factors, group_blocks, require_kind, require_whole_linear
from .variants import STEPS, Base, initial_extras, initial_steps
from .weights import compute_dtype, dense_weight, device_of, is_dense, materialised

__all__ = ["initial_value", "refuse_embeddings"]

# With which `init` layers begin that PEFT begins in a few ways alone.
_BEGUN = {
    "conv": ("kaiming", "gaussian", "off"),
    "attention": ("kaiming", "gaussian", "off", "orthogonal"),
}
_LARGE = 1 << 20  # numbers in a weight, from which on its decomposition is worth a bar


def initial_value(
    model: nn.Module, config: LoRAConfig, found: Resolution, seen: Mapping[str, Any] | None = None
) -> AdapterValue:
    """A new adapter for the targets that were found, in float32 (float64 on a float64 base), on the CPU.

    Args:
        seen: what the initialisation found in data, by path.
    """
    factors, modules, init = {}, dict(model.named_modules()), INITS[config.init_method]
    quantised = any(not is_dense(modules[target.path]) for target in found.targets)
    for target in _shown(found.targets, config):
        module = modules[target.path]
        dtype = torch.promote_types(compute_dtype(module, model), torch.float32)
        # A tensor on meta has no values: factors of a meta model are made on meta, to be filled with the base.
        device = torch.device("meta") if device_of(module).type == "meta" else torch.device("cpu")
        kind = target.info.kind
        blocks = tuple(Block(role, rows) for role, rows in target.blocks)
        groups = group_blocks(target.info.out_features, target.info.groups)
        form = form_of(config, target.path)
        if form is not None:
            _require_form(form, target, blocks)
        n, r = max(len(blocks), 1), target.rank * (2 if init.anchored else 1)
        A = torch.empty(n * r, target.info.in_features, dtype=dtype, device=device)
        B = torch.zeros(target.info.out_features, n * r, dtype=dtype, device=device)
        weight = functools.cache(functools.partial(dense, module, target.path, kind, dtype))
        for i in range(n if device.type != "meta" else 0):
            rows = blocks[i].index() if blocks else torch.arange(target.info.out_features)
            layer = Layer(
                target.path,
                target.info.in_features if form is None else form.columns(target.info.in_features),
                len(rows),
                target.rank,
                target.alpha / (math.sqrt(target.rank) if config.use_rslora else target.rank),
                dtype,
                kind == "embedding",
                lambda rows=rows if blocks else None, W=weight: W() if rows is None else W()[rows.to(W().device)],  # type: ignore[misc]
                rows,
                weight,
                module,
                model,
                quantised,
                None if seen is None else seen[target.path],
            )
            a, b = init.pair(layer, config.init_settings)
            if form is not None:
                a, b = form.begun(a * form.spread if config.init == "kaiming" else a, b)
            A[i * r : (i + 1) * r] = torch.cat([a, a]) if init.anchored else a
            B[rows, i * r : (i + 1) * r] = (torch.cat([b, -b], 1) if init.anchored else b).to(device)
        alpha = target.alpha * _times(n * r // target.rank, config)
        pair = Factors(
            target.info.pair,
            A,
            B if target.info.groups == 1 else _grouped(B, groups, config),
            alpha,
            config.use_rslora,
            blocks or groups,
            anchored=init.anchored,
            form=form,
            kernel=target.info.kernel,
        )
        factors[target.path] = with_extras(module, target.path, pair, config) if asked_for(config) else pair
    tied_pairs(config, factors, group_of(model) if config.ensure_weight_tying else ())
    factors |= initial_experts(model, config, found.parameters)
    if init.anchored:
        config = _doubled(config)
    if quantised and config.init == "loftq":  # the base holds what the pair was made for: a plain LoRA
        config = config.replace(init="kaiming", init_options={})
    biases = {path: materialised(owner, "bias") for path, owner in _biases(model, config, set(factors), found.heads)}
    heads = {path: base_state(modules[path]) for path in found.heads}
    for path, ids in token_paths(model, config.trainable_token_indices).items():
        heads[path] = initial_rows(modules[path], path, ids, whole=path in found.heads)
    if any(target.info.kind == "conv1d" for target in found.targets):
        config = config.replace(fan_in_fan_out=True)
    if config.base_model is None:
        config = config.replace(base_model=getattr(getattr(model, "config", None), "_name_or_path", None) or None)
    return AdapterValue(config, factors, biases, heads)


def with_extras(module: nn.Module, path: str, pair: Factors, config: LoRAConfig) -> Factors:
    """The factors of a new adapter with its variants' vectors: while ΔW is zero, the layer computes what it did."""
    for name in asked_for(config):
        require_kind(EXTRAS[name], pair.kind)
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
        torch.zeros_like(pair.B) if pair.anchored else pair.B,  # B·A − B₀·A₀ is 0, and not only up to rounding
        pair.scaling,
        lambda: Base.of(dense_weight(module), getattr(type(module), "lora_base", type(module))),
        random=config.init == "off",
    )
    settings = {field: getattr(config, field) for field in STEPS if getattr(config, field) is not None}
    extras |= initial_steps(settings, pair.A)
    return dataclasses.replace(pair, extras=extras)


def _grouped(B: torch.Tensor, groups: tuple[Block, ...], config: LoRAConfig) -> torch.Tensor:
    """What the groups of a convolution keep of B, (out, R); random numbers as large as PEFT's, of shorter rows."""
    n, kept = len(groups), torch.zeros_like(B)
    for i, block in enumerate(groups if B.device.type != "meta" else ()):
        columns = slice(i * B.shape[1] // n, (i + 1) * B.shape[1] // n)
        kept[block.index(), columns] = B[block.index(), columns] * math.sqrt(n)
    return kept


def refuse_embeddings(config: LoRAConfig, targets: Iterable[Target]) -> None:
    """Raise `LoRAUnsupportedError` if an embedding or a convolution is to begin in a way that is not for it."""
    for target in targets:
        kind = target.info.kind
        if kind in _BEGUN and config.init not in _BEGUN[kind]:
            raise LoRAUnsupportedError(
                f"{target.path}: init={config.init!r} is not for {NAMES[kind]}.",
                name=target.path,
                value=config.init,
                expected=_BEGUN[kind],
                remedy='Leave it out of target_modules, or begin with init="kaiming".',
            )
        if kind == "attention" and config.bias != "none":
            raise LoRAUnsupportedError(
                f"{target.path}: bias={config.bias!r} is not for nn.MultiheadAttention, which calls no layer.",
                name="bias",
                value=config.bias,
                remedy='Leave it out of target_modules, or train with bias="none".',
            )
    found = [target.path for target in targets if target.info.kind == "embedding"]
    if found and not INITS[config.init_method].embeddings:
        raise LoRAUnsupportedError(
            f"{found[0]}: init={config.init!r} is not for embeddings.",
            name=found[0],
            value=config.init,
            remedy="Leave the embedding out of target_modules, or begin another way.",
        )


def _require_form(form: Form, target: Target, blocks: tuple[Block, ...]) -> None:
    require_whole_linear(form, target.info.kind, blocks)
    problem = form.problem(target.rank, target.info.in_features, target.info.out_features)
    if problem is not None:
        raise LoRAConfigError(
            f"{target.path}: {problem}.",
            name=form.field,
            value=form,
            remedy="Choose a number that divides it, or leave the layer out of target_modules.",
        )


def _times(n: int, config: LoRAConfig) -> float:
    """What alpha has to grow by with a rank that is n times as large, so that the scaling stays."""
    return math.sqrt(n) if config.use_rslora else n


def _doubled(config: LoRAConfig) -> LoRAConfig:
    """The config of the plain LoRA of twice the rank that an anchored pair is, with the same scaling."""
    wide = _times(2, config)
    return config.replace(
        init="kaiming",
        init_options={},
        r=2 * config.r,
        alpha=wide * (config.r if config.alpha is None else config.alpha),
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: wide * alpha for key, alpha in config.alpha_pattern.items()},
    )


def _shown(targets: tuple[Target, ...], config: LoRAConfig) -> Iterable[Target]:
    """The targets, with a progress bar where each takes long: a decomposition of a large weight."""
    largest = max((t.info.in_features * t.info.out_features for t in targets), default=0)
    if config.init_method in ("kaiming", "gaussian", "off", "orthogonal", "eva") or largest < _LARGE:
        return targets
    shown: Iterable[Target] = bar(targets, f"init={config.init}")
    return shown


def _biases(
    model: nn.Module, config: LoRAConfig, targets: set[str], heads: Iterable[str]
) -> Iterator[tuple[str, nn.Module]]:
    """The bias vectors that the config trains, one name each, and the modules that own them."""
    if config.bias == "none":
        return
    modules, seen = dict(model.named_modules()), set()
    attention = next((path for path, m in modules.items() if isinstance(m, nn.MultiheadAttention)), None)
    if config.bias == "all" and attention is not None:
        raise LoRAUnsupportedError(
            f'{attention}: bias="all" is not for a model with an nn.MultiheadAttention, which adds biases of its own '
            "and calls no layer.",
            name="bias",
            value="all",
            remedy='Train with bias="none" or "lora_only".',
        )
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
