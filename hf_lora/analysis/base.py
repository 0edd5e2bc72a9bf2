"""The base's weights W, one at a time, from a model, from its files, or from a mapping."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import LoRAConfigError, LoRAMismatchError, LoRAUnsupportedError
from ..layerinfo import describe_layer, modules_of
from ..model import state_of
from ..replication import replication_of
from ..values import AdapterValue, refuse_replicated
from ..weights import as_matrix, materialised, weight_name
from .places import Place, called

if TYPE_CHECKING:
    from ..export.base import BaseFiles

__all__ = ["Base", "BaseWeights"]

Base: TypeAlias = "Mapping[str, Tensor] | nn.Module | BaseFiles | str | os.PathLike[str]"


@dataclass(frozen=True)
class _Weight:
    """One W, not read yet; `shape` and what is read are (out, in)."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class BaseWeights:
    """The weights that an adapter's factors are added to. Checked when made: names and shapes, before any is read.

    Args:
        base: a model, the folder or id of one with safetensors (or what `export.base.open_base` made of it), or module
            path → W (out, in).
        adapter: what they are the base of.
        places: where they are asked for.

    Raises:
        LoRAMismatchError: a layer is missing or has another shape; every one is listed.
        LoRAUnsupportedError: a weight is quantised or not in memory. LoRAStateError: an adapter is merged into it.
        LoRAConfigError: it is none of these. LoRAFileError: there is no such folder or repo.
    """

    def __init__(self, base: Any, adapter: AdapterValue, places: tuple[Place, ...]) -> None:
        if not isinstance(base, nn.Module) or replication_of(base) != adapter.config.layer_replication:
            refuse_replicated(adapter, "What is compared with W")
        self._weights = _found(base, adapter, dict.fromkeys(place.path for place in places))
        self._last: tuple[str, Tensor] | None = None
        facts, remedy = [], "Give the base that the adapter was trained on."
        for path, factors in ((place.path, adapter.factors[place.path]) for place in places):
            weight, wanted = self._weights.get(path), (factors.out_features, factors.in_features)
            if weight is None:
                facts.append(f"{path}: not in the base")
            elif weight.shape != wanted:
                facts.append(f"{path}: W is {weight.shape}, ΔW {wanted}")
                if isinstance(base, Mapping) and weight.shape == wanted[::-1]:
                    remedy = "Transpose it: W is (out, in), also of a Conv1D (GPT-2) or an embedding."
        if facts:
            facts = list(dict.fromkeys(facts))
            if isinstance(base, Mapping) and any(f"{place.path}.weight" in base for place in places):
                remedy = (
                    "Name modules, not parameters ('x', not 'x.weight'): a state dict does not say which way its "
                    "weights lie. Or give the model itself."
                )
            raise LoRAMismatchError(
                f"The base does not fit the adapter: {len(facts)} of its weights are missing or have another shape.",
                name=facts[0].partition(":")[0],
                value=facts,
                facts=facts,
                remedy=remedy,
            )

    def of(self, place: Place) -> Tensor:
        """W of a place: (rows, in) float64, finite. Raises `LoRAMismatchError` if it is not."""
        if self._last is None or self._last[0] != place.path:  # the roles of a fused layer share one reading
            weight = self._weights[place.path].read().detach()
            if not weight.isfinite().all():
                raise LoRAMismatchError(
                    f"{place.path}: the base's weight holds NaN or infinity.",
                    name=place.path,
                    remedy="Download or save the base again.",
                )
            self._last = (place.path, weight)
        weight = self._last[1]
        rows = weight if place.block is None else weight[place.block.index(weight.device)]
        return rows.to("cpu", torch.float64)


def _found(base: Any, adapter: AdapterValue, paths: Mapping[str, Any]) -> dict[str, _Weight]:
    if isinstance(base, nn.Module):
        return _of_model(base, paths)
    if isinstance(base, Mapping):
        return _of_mapping(base, paths)
    from ..export.base import BaseFiles, open_base

    if isinstance(base, BaseFiles):
        return _of_files(base, adapter, paths)
    if isinstance(base, str | os.PathLike):
        return _of_files(open_base(os.fspath(base)), adapter, paths)
    raise LoRAConfigError(
        f"The base is {called(base)}, no model.",
        name="base",
        value=base,
        expected="a model, the folder or id of one, or module path → weight",
        remedy="Give the model that the adapter was trained on, or its folder.",
    )


def _of_mapping(base: Mapping[Any, Any], paths: Mapping[str, Any]) -> dict[str, _Weight]:
    found = {}
    for path in paths:
        weight = base.get(path)
        if weight is None:
            continue
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
            shown = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
            raise LoRAMismatchError(
                f"{path}: the base's weight is {shown}, not a floating tensor (out, in).",
                name=path,
                value=shown,
                expected="a floating tensor (out, in)",
                remedy="Give torch tensors.",
            )
        found[path] = _Weight(tuple(weight.shape), lambda weight=weight: weight)  # type: ignore[misc]
    return found


def _of_model(model: nn.Module, paths: Mapping[str, Any]) -> dict[str, _Weight]:
    state = state_of(model)
    if state is not None:
        state.require_unmerged("analysis")
    modules, found = modules_of(model), {}
    for path in paths:
        module = modules.get(path)
        info = None if module is None else describe_layer(module)
        if module is None or info is None:
            continue
        weight = getattr(module, weight_name(module), None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
            raise LoRAUnsupportedError(
                f"{path}: the weight of this {type(module).__name__} is quantised, and only dense ones are analysed.",
                name=path,
                value=str(getattr(weight, "dtype", type(weight).__name__)),
                expected="a dense float weight",
                remedy="Load the base model without quantisation.",
            )
        if info.groups > 1:
            continue  # its ΔW has another shape than its weight
        turned = info.kind in ("conv1d", "embedding")
        shape = (info.out_features, info.in_features)

        def read(module: nn.Module = module, turned: bool = turned, path: str = path) -> Tensor:
            weight = materialised(module, weight_name(module))
            if weight.is_meta:
                raise LoRAUnsupportedError(
                    f"{path}: its weight is on the meta device, so there is nothing to look at.",
                    name=path,
                    remedy="Load the base model with its weights.",
                )
            return weight.T if turned else as_matrix(weight)

        found[path] = _Weight(shape, read)
    return found


def _of_files(base: BaseFiles, adapter: AdapterValue, paths: Mapping[str, Any]) -> dict[str, _Weight]:
    from ..export.plan import stored_weights

    found = {}
    for path, (stored, turned) in stored_weights(adapter, base).items():
        if path in paths:
            shape = stored.shape[::-1] if turned else (stored.shape[0], math.prod(stored.shape[1:]))
            read: Callable[[], Tensor] = lambda s=stored, t=turned: s.read().T if t else as_matrix(s.read())  # type: ignore[misc] # noqa: E731
            found[path] = _Weight(shape, read)
    return found
