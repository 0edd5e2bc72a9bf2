"""The factors of 3-D expert parameters, between one pair for each expert and the one pair that files and layers hold.

    A: (E·r, in), the experts one after another      B in a file: (out, r·E), the rank first; in a layer: (out, E·r)

PEFT wraps one parameter of a module in another's wrapper: with gate_up_proj and down_proj on `experts` the pair of the
first is `experts.base_layer.lora_A`, that of the last `experts.lora_A`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import LoRAConfig
from .errors import LoRAFileError, LoRAUnsupportedError
from .expertnames import expert_of, matching, order, path_of
from .values import Factors

__all__ = ["Stack", "even", "in_files", "named", "rank_major", "stacks"]

_INNER = ".base_layer"


@dataclass(frozen=True, eq=False)
class Stack:
    """The pairs of one parameter's experts as one.

    Args:
        A: (E·r, in). B: (out, E·r), expert e's columns e·r:(e+1)·r.
        alpha: of one expert's pair, for rank r.
    """

    A: Tensor
    B: Tensor
    experts: int
    alpha: float
    use_rslora: bool = False

    @property
    def rank(self) -> int:
        """R of one expert."""
        return self.A.shape[0] // self.experts

    @property
    def scaling(self) -> float:
        """alpha/r, or alpha/√r with rsLoRA."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    def pairs(self, parameter: str) -> Iterator[tuple[str, Factors]]:
        """One pair for each expert, by its path; views of these tensors."""
        for e, (a, b) in enumerate(
            zip(self.A.view(self.experts, self.rank, -1), self.B.split(self.rank, 1), strict=True)
        ):
            yield path_of(parameter, e), Factors("linear", a, b, self.alpha, self.use_rslora)

    @classmethod
    def of(cls, pairs: Mapping[int, Factors], experts: int) -> Stack:
        """The pairs of some experts, those of the others zero; smaller ranks are padded with zeros.

        Where the scalings differ, B takes the difference.
        """
        first = max(pairs.values(), key=lambda pair: pair.rank)
        r, dtype = first.rank, first.A.dtype
        for pair in pairs.values():
            dtype = torch.promote_types(dtype, pair.A.dtype)
        if all(pair.rank == r and pair.scaling == first.scaling for pair in pairs.values()) and len(pairs) == experts:
            ordered = [pairs[e] for e in range(experts)]
            A, B = torch.cat([p.A.detach() for p in ordered]), torch.cat([p.B.detach() for p in ordered], 1)
            return cls(A.to(dtype), B.to(dtype), experts, first.alpha, first.use_rslora)
        A = first.A.new_zeros(experts, r, first.in_features, dtype=dtype)
        B = first.B.new_zeros(first.out_features, experts, r, dtype=dtype)
        for e, pair in pairs.items():
            A[e, : pair.rank] = pair.A.detach()
            scaled = (
                pair.B.detach() if pair.scaling == first.scaling else pair.B.detach() * (pair.scaling / first.scaling)
            )
            B[:, e, : pair.rank] = scaled
        return cls(A.view(experts * r, -1), B.view(-1, experts * r), experts, first.alpha, first.use_rslora)


def stacks(factors: Mapping[str, Factors], counts: Mapping[str, int] | None = None) -> dict[str, Stack]:
    """The stack of every parameter that has pairs of experts, by the parameter's path.

    Args:
        counts: how many experts each has; otherwise those that are there, from 0 on.
    """
    found: dict[str, dict[int, Factors]] = {}
    for path, pair in factors.items():
        at = expert_of(path)
        if at is not None:
            found.setdefault(at[0], {})[at[1]] = pair
    return {
        parameter: Stack.of(pairs, max(pairs) + 1 if counts is None else counts[parameter])
        for parameter, pairs in found.items()
    }


def even(factors: Mapping[str, Factors]) -> Mapping[str, Factors]:
    """The same with one rank and scaling for all experts of a parameter, as files have them."""
    found = stacks(factors)
    if not found:
        return factors
    rest = {path: pair for path, pair in factors.items() if expert_of(path) is None}
    return rest | {path: pair for parameter, stack in found.items() for path, pair in stack.pairs(parameter)}


def rank_major(B: Tensor, experts: int, *, back: bool = False) -> Tensor:
    """B (out, E·r) as files have it, (out, r·E); `back`: the other way."""
    first = B.shape[1] // experts if back else experts
    return B.view(B.shape[0], first, -1).transpose(1, 2).reshape(B.shape[0], -1)


# ---- names in files --------------------------------------------------------------------------------------------------


def named(config: LoRAConfig, rows: Mapping[str, int], source: str) -> dict[str, str]:
    """Path of a pair in a file → path of the parameter, for pairs that are of parameters.

    Args:
        rows: of A, by the pair's path.

    Raises:
        LoRAFileError: the config does not say of which. LoRAUnsupportedError: they are of a layer's weight.
    """
    if config.target_parameters is None:
        return {}
    by_module: dict[str, list[str]] = {}
    for path in rows:
        by_module.setdefault(_unnested(path)[0], []).append(path)
    found: dict[str, str] = {}
    for module, held in by_module.items():
        names = _parameters_at(config, module)
        if held == [module] and names == ["weight"] and rows[module] == config.rank_for(f"{module}.weight"):
            raise LoRAUnsupportedError(
                f"{source}: target_parameters names {module}.weight, which is a matrix: the weight of a layer.",
                name="target_parameters",
                value=f"{module}.weight",
                remedy=f"Name {module.rpartition('.')[2]!r} in target_modules instead: that is the same computation.",
            )
        if held == [module] and (not names or rows[module] == config.rank_for(module)):
            continue  # a layer: a name without a dot matches in every module
        expected = [module + _INNER * depth for depth in reversed(range(len(names)))]
        if sorted(expected) != sorted(held):
            raise LoRAFileError(
                f"{source} has {len(held)} pairs in {module!r}; target_parameters names {names or 'nothing'} there.",
                name="target_parameters",
                value=sorted(held),
                expected=expected,
                remedy="Correct target_parameters in adapter_config.json.",
            )
        found |= {path: f"{module}.{name}" for path, name in zip(expected, names, strict=True)}
    return found


def in_files(found: Mapping[str, Stack]) -> dict[str, Stack]:
    """Path of a pair in a file → stack, from those by parameter."""
    modules: dict[str, list[str]] = {}
    for path in found:
        module, _, name = path.rpartition(".")
        modules.setdefault(module, []).append(name)
    return {
        module + _INNER * (len(names) - 1 - at): found[f"{module}.{name}"]
        for module, names in modules.items()
        for at, name in enumerate(order(names))
    }


def _unnested(path: str) -> tuple[str, int]:
    depth = 0
    while path.endswith(_INNER):
        path, depth = path.removesuffix(_INNER), depth + 1
    return path, depth


def _parameters_at(config: LoRAConfig, module: str) -> list[str]:
    """Names of a module's parameters that `target_parameters` means, in PEFT's order, as far as names tell."""
    wanted = config.target_parameters or ()
    return order(n for n in {name.rpartition(".")[2] for name in wanted} if matching(wanted, f"{module}.{n}"))
