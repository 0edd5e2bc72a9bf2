"""Which adapters can be combined, and what the combination's config says."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import layout
from .bases import hub_id, same_base
from .config import LoRAConfig
from .errors import LoRAConfigError, LoRAMismatchError
from .expertnames import expert_of
from .experts import even
from .values import AdapterValue, Factors, refuse_extras

__all__ = [
    "check_adapters",
    "check_finite",
    "check_weights",
    "common_config",
    "common_embeddings",
    "described",
    "require_factors_only",
]

V = TypeVar("V", bound=AdapterValue)


# -- may they be combined --------------------------------------------------------------------------------------------


def check_adapters(adapters: Any, *, force: bool) -> None:
    """Raise unless `adapters` are adapters of one base, of one shape and kind wherever two adapt the same layer."""
    if isinstance(adapters, AdapterValue) or not isinstance(adapters, Sequence) or not adapters:
        shown = "one adapter" if isinstance(adapters, AdapterValue) else repr(adapters)
        raise LoRAConfigError(
            f"combine() was given {shown}, not a list of adapters.",
            name="adapters",
            value=adapters,
            expected="a non-empty list of LoRAAdapter",
            remedy="Write combine([a, b], [0.7, 0.3]).",
        )
    for number, adapter in enumerate(adapters):
        if not isinstance(adapter, AdapterValue):
            raise LoRAConfigError(
                f"Adapter {number} is {adapter!r}, a {type(adapter).__name__}.",
                name="adapters",
                value=adapter,
                expected="a LoRAAdapter",
                remedy="Load it: LoRAAdapter.load(folder_or_repo), or model.lora_adapter(name).",
            )
        adapter.config.require_supported()
        refuse_extras(adapter, "A combination")
    _check_invocations(adapters)
    check_finite({f"adapter {i}, {path}": f for i, one in enumerate(adapters) for path, f in one.factors.items()})
    _check_shapes(adapters)
    _check_layers(adapters)
    if not force:
        _check_base(adapters)


def _check_invocations(adapters: Sequence[AdapterValue]) -> None:
    """Adapters that are aLoRAs add up where all act from the same tokens on."""
    first = adapters[0].config.alora_invocation_tokens
    for number, adapter in enumerate(adapters):
        tokens = adapter.config.alora_invocation_tokens
        if tokens != first:
            raise LoRAMismatchError(
                f"Adapter 0 acts from the tokens {first} on, adapter {number} from {tokens} (None: everywhere).",
                name="alora_invocation_tokens",
                value=tokens,
                expected=first,
                remedy="Mix them on the model: set_lora({...}); or combine adapters of the same invocation.",
            )


def check_weights(weights: Any, count: int) -> list[float]:
    """The weights as floats: finite numbers, one for each adapter."""
    given = list(weights) if isinstance(weights, Sequence) and not isinstance(weights, str | bytes) else None
    if given is None or len(given) != count:
        raise LoRAConfigError(
            f"weights={weights!r} are not {count} numbers, one for each adapter.",
            name="weights",
            value=weights,
            expected=f"a list of {count} numbers",
            remedy="Give one weight for each adapter, in their order; 1 adds it whole, -1 takes it away.",
        )
    for number, weight in enumerate(given):
        largest = sys.float_info.max  # false for NaN and infinity, and a whole number may be larger than any float
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= largest:
            raise LoRAConfigError(
                f"Adapter {number} cannot have the weight {weight!r}.",
                name=f"weights[{number}]",
                value=weight,
                expected="a finite number",
                remedy="Give a finite number: it scales the adapter's ΔW.",
            )
    return [float(weight) for weight in given]


def check_finite(factors: Mapping[str, Factors], *, result: bool = False) -> None:
    """Raise, naming every one, if factors hold NaN or infinity."""
    bad = [
        f"{name}.{side}: {int((~tensor.isfinite()).sum())} of {tensor.numel()} values are NaN or infinite"
        for name, pair in factors.items()
        for side, tensor in (("A", pair.A), ("B", pair.B))
        if not tensor.isfinite().all()
    ]
    if bad:
        raise LoRAMismatchError(
            "The result is not finite: it does not fit the adapters' dtype." if result else "Factors are not finite.",
            name=bad[0].split(":")[0],
            value=bad,
            facts=bad,
            remedy="Combine adapter.to(torch.float32), or use smaller weights."
            if result
            else "The training run diverged: use an earlier checkpoint.",
        )


def _check_shapes(adapters: Sequence[AdapterValue]) -> None:
    first: dict[str, tuple[int, Factors]] = {}
    problems = []
    for number, adapter in enumerate(adapters):
        for path, pair in adapter.factors.items():
            where, known = first.setdefault(path, (number, pair))
            mine, theirs = _shape(pair), _shape(known)
            if mine != theirs:
                problems.append(f"{path}: adapter {where} is for {theirs}, adapter {number} for {mine}")
    if problems:
        raise LoRAMismatchError(
            "The adapters are for layers of different shapes: they are not of one base.",
            name=problems[0].split(":")[0],
            value=problems,
            facts=problems,
            remedy="Combine adapters of the same base model.",
        )


def _check_layers(adapters: Sequence[AdapterValue]) -> None:
    spans = [adapter.config.layer_replication for adapter in adapters]
    for number, other in enumerate(spans):
        if other != spans[0]:
            raise LoRAMismatchError(
                f"Adapter 0 has layer_replication={spans[0]}, adapter {number} {other}: layers differ.",
                name="layer_replication",
                value=other,
                expected=spans[0],
                remedy="Combine adapters of the same layers.",
            )


def _shape(pair: Factors) -> str:
    kind = "an embedding" if pair.kind == "embedding" else "a layer"
    return f"{kind} with {pair.in_features} inputs and {pair.out_features} outputs"


def _check_base(adapters: Sequence[AdapterValue]) -> None:
    """What an adapter does not say of its base is not held against it."""
    where, other = -1, LoRAConfig()
    for number, config in enumerate(adapter.config for adapter in adapters):
        if not config.base_model:
            continue
        if not other.base_model:
            where, other = number, config
        if not _same_base(config, other):
            one, two = (
                f"{c.base_model!r}" + (f" at revision {c.revision!r}" if c.revision else "") for c in (other, config)
            )
            raise LoRAMismatchError(
                f"Adapter {where} was made on {one}, adapter {number} on {two}.",
                name="base_model",
                value=config.base_model,
                expected=other.base_model,
                remedy="Combine adapters of the same base model; force=True combines them all the same.",
            )


def _same_base(one: LoRAConfig, other: LoRAConfig) -> bool:
    names = [config.base_model or "" for config in (one, other)]
    ids = [hub_id(name) or name.replace("\\", "/").rstrip("/") for name in names]
    return (one.revision or "main") == (other.revision or "main") and (ids[0] == ids[1] or same_base(*ids))


def require_factors_only(adapters: Sequence[AdapterValue], verb: str) -> None:
    """Raise if one of `adapters` trained heads, biases or a variant's vectors: only factors add up."""
    for adapter in adapters:
        refuse_extras(adapter, verb)
    facts = [
        f"adapter {number}: {name}"
        for number, adapter in enumerate(adapters)
        for name in (*adapter.modules, *adapter.biases)
    ]
    if facts:
        raise LoRAMismatchError(
            f"{verb} is of factors alone, and adapters hold modules or biases that were trained whole.",
            name=facts[0].partition(": ")[2],
            value=facts,
            facts=facts,
            remedy="Use adapter.factors_only(), which leaves them out, or use the adapter alone.",
        )


def common_embeddings(adapters: Sequence[AdapterValue], *, force: bool) -> dict[str, Tensor]:
    """The adapters' copies of the base's embeddings. Where they differ, the base does; `force` takes the first."""
    found: dict[str, Tensor] = {}
    for number, adapter in enumerate(adapters):
        for name, tensor in adapter.embeddings.items():
            known = found.setdefault(name, tensor)
            if not force and (known.dtype != tensor.dtype or not torch.equal(known, tensor)):
                raise LoRAMismatchError(
                    f"Adapter {number} carries another copy of the base's {name!r} than an adapter before it: "
                    f"{tensor.dtype} {tuple(tensor.shape)} and {known.dtype} {tuple(known.shape)}.",
                    name=name,
                    value=tuple(tensor.shape),
                    expected=tuple(known.shape),
                    remedy="Combine adapters of the same base model; force=True keeps the first copy.",
                )
    return found


# -- the result's config ---------------------------------------------------------------------------------------------


def described(value: V) -> V:
    """`value` with the config that its files will say, so that it is read back equal."""
    value = dataclasses.replace(value, factors=even(value.factors))
    return dataclasses.replace(value, config=LoRAConfig.from_peft(layout.disk_config(value).to_peft()))


def common_config(adapters: Sequence[AdapterValue], factors: Mapping[str, Factors]) -> LoRAConfig:
    """The first adapter's config, with targets that cover every layer of `factors`, and the base that is named."""
    configs = [adapter.config for adapter in adapters]
    named = next((config for config in configs if config.base_model), configs[0])
    changes: dict[str, Any] = {"base_model": named.base_model, "revision": named.revision}
    if len(adapters) > 1:
        changes |= {"modules_to_save": None, "trainable_token_indices": None, "bias": "none"}
        parameters = {name for config in configs for name in config.target_parameters or ()}
        if parameters:
            changes |= {"target_parameters": sorted(parameters), "dropout": 0.0}
        selections = [(c.target_modules, c.exclude_modules, c.layers_to_transform, c.layers_pattern) for c in configs]
        if any(selection != selections[0] for selection in selections):
            lists = [
                targets
                for targets, *limits in selections
                if isinstance(targets, tuple) and not any(limit is not None for limit in limits)
            ]
            layers = [path for path in factors if expert_of(path) is None]
            together = {name for targets in lists for name in targets}
            changes |= {
                "target_modules": sorted(together if len(lists) == len(selections) else layers),
                "exclude_modules": None,
                "layers_to_transform": None,
                "layers_pattern": None,
            }
    return configs[0].replace(**changes)
