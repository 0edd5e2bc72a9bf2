"""Where an adapter has a ΔW: each layer, and of a fused layer each role's rows; and results by such places."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..agreement import check_finite
from ..architectures import ROLES
from ..errors import LoRAConfigError, LoRAMismatchError, LoRANameError, LoRATargetError
from ..inspection import roles_of_path
from ..spectrum import parts
from ..values import AdapterValue, Block, Factors, refuse_extras

__all__ = [
    "Array",
    "LayerResult",
    "Place",
    "Result",
    "array",
    "called",
    "names_of",
    "numerical_rank",
    "paired",
    "places",
    "refuse_zero",
]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Place:
    """A layer, or one role's rows of a fused layer.

    Args:
        path: of the module.
        role: "q", …; of a whole fused layer "q+k+v"; the module's name where that tells no role.
        factors: of these rows alone: A (r, in), B (rows, r).
        block: the rows, in a fused layer.
    """

    path: str
    role: str
    factors: Factors
    block: Block | None

    def __str__(self) -> str:
        return f"{self.path} ({self.role})" if self.block is not None else self.path


def places(adapter: Any, only: Iterable[str] | None = None, *, what: str = "adapter") -> tuple[Place, ...]:
    """The places of an adapter whose factors are finite, by the numbers in their paths.

    Args:
        adapter: a `LoRAAdapter`.
        only: roles, module paths or their endings ("q", "q_proj"); None is all.
        what: what an error calls it.

    Raises:
        LoRAConfigError: it is no adapter, or `only` no list of names. LoRAMismatchError: it is not finite.
        LoRATargetError: a name in `only` is nowhere in it.
    """
    if not isinstance(adapter, AdapterValue):
        raise LoRAConfigError(
            f"The {what} is {called(adapter)}, not an adapter.",
            name=what,
            value=adapter,
            expected="a LoRAAdapter",
            remedy="Load it: LoRAAdapter.load(folder_or_repo), or model.lora_adapter(name).",
        )
    refuse_extras(adapter, f"An analysis of the {what}")
    check_finite({f"{what}, {path}": factors for path, factors in adapter.factors.items()})
    found = []
    for path, factors in sorted(adapter.factors.items(), key=lambda item: _natural(item[0])):
        blocks: tuple[Block | None, ...] = factors.blocks or (None,)
        for block, (role, part) in zip(blocks, parts(factors), strict=True):
            found.append(Place(path, role or roles_of_path(path), part, block))
    names = names_of(only)
    return tuple(found) if names is None else _chosen(found, names, what)


def _natural(path: str) -> list[str | int]:
    """Layer 2 comes before layer 10: a file has them the other way round."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]{1,9})", path))]


def called(value: Any) -> str:
    """A value in a message: quoted if it is short (a path, a number), else its type."""
    plain = value is None or isinstance(value, str | int | float | os.PathLike)
    return f"{value!r}"[:200] if plain else f"a {type(value).__name__}"


def names_of(only: Any) -> list[str] | None:
    """The names in `only`, which may be one. Raises `LoRAConfigError` if it is no list of names."""
    if only is None:
        return None
    names = [only] if isinstance(only, str) else list(only) if isinstance(only, Iterable) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise LoRAConfigError(
            f"only={only!r} is no list of names.",
            name="only",
            value=only,
            expected="roles or module paths",
            remedy='Write only=["q", "v"], or leave it out for all layers.',
        )
    return names


def _chosen(found: list[Place], names: list[str], what: str) -> tuple[Place, ...]:
    taken: set[int] = set()
    for name in names:
        hits = [
            i for i, place in enumerate(found) if name in (place.role, place.path) or place.path.endswith(f".{name}")
        ]
        if not hits:
            known = sorted({place.role for place in found} | {place.path.rpartition(".")[2] for place in found})
            near = difflib.get_close_matches(name, [*known, *(place.path for place in found)], n=3)
            raise LoRATargetError(
                f"The {what} has no {name!r}; it has {', '.join(known)}.",
                name="only",
                value=name,
                expected=known,
                remedy=f"Did you mean {', '.join(map(repr, near))}?" if near else "Name a role or a module's path.",
            )
        taken.update(hits)
    return tuple(place for i, place in enumerate(found) if i in taken)


def paired(
    a: Any, b: Any, only: Iterable[str] | None, *, missing: bool = False
) -> list[tuple[Place | None, Place | None]]:
    """The places of two adapters, side by side.

    Args:
        missing: a place that only one of them has stands beside None, instead of being refused.

    Raises:
        LoRAMismatchError: they have different layers, rows or shapes; every one is listed.
    """
    only = names_of(only)
    first, second = (
        {(place.path, place.role): place for place in places(adapter, only, what=f"adapter {letter}")}
        for adapter, letter in ((a, "a"), (b, "b"))
    )
    facts = []
    for key in first.keys() & second.keys():
        mine, theirs = (_shape(one[key]) for one in (first, second))
        if mine != theirs:
            facts.append(f"{first[key]}: a is for {mine}, b for {theirs}")
    paths = [{path for path, _ in one} for one in (first, second)]
    for place, letter in _alone(first, second):
        if place.path in paths[letter == "a"]:
            facts.append(f"{place}: the other one has this layer under another role, or whole")
        elif not missing:
            facts.append(f"{place}: only {letter} has it")
    facts.sort()
    if facts or not first.keys() & second.keys():
        raise LoRAMismatchError(
            f"The adapters do not adapt the same layers: {len(facts)} differ."
            if first.keys() & second.keys()
            else "The adapters have no layer in common.",
            name=facts[0].partition(":")[0] if facts else None,
            value=facts,
            facts=facts,
            remedy='Compare adapters of one base; only=["q"] looks at the layers that both have.',
        )
    keys = sorted({**first, **second}, key=lambda key: _natural(key[0]))
    return [(first.get(key), second.get(key)) for key in keys]


def _alone(first: Mapping[Any, Place], second: Mapping[Any, Place]) -> Iterator[tuple[Place, str]]:
    yield from ((place, "a") for key, place in first.items() if key not in second)
    yield from ((place, "b") for key, place in second.items() if key not in first)


def _shape(place: Place) -> str:
    kind = "an embedding" if place.factors.kind == "embedding" else "a layer"
    rows = f", rows {place.block.rows!r}" if place.block is not None else ""
    return f"{kind} with {place.factors.in_features} inputs and {place.factors.out_features} outputs{rows}"


def refuse_zero(zero: list[str], of: int, what: str = "ΔW") -> None:
    """Raise `LoRAMismatchError` for the places where there are no directions to look at."""
    if zero:
        raise LoRAMismatchError(
            f"{what} is zero in {len(zero)} of {of} places: it has rank 0, and so no directions.",
            name=zero[0],
            value=zero,
            facts=zero,
            remedy="Give a trained adapter, or leave these layers out with only=[…].",
        )


def numerical_rank(values: Tensor, shape: tuple[int, int]) -> int:
    """How many singular values are above max(shape)·ε·σ₁, ε of float64."""
    if not len(values):
        return 0
    return int((values > values[0] * max(shape) * torch.finfo(torch.float64).eps).sum())


def array(values: Any) -> Array:
    """A read-only float64 array."""
    made = np.array(values.detach().cpu().numpy() if isinstance(values, Tensor) else values, dtype=np.float64)
    made.flags.writeable = False
    return made


# ---- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerResult:
    """What was found at one place.

    Args:
        path: of the module.
        role: "q", …; of a whole fused layer "q+k+v"; the module's name where that tells no role.
    """

    path: str
    role: str


L = TypeVar("L", bound=LayerResult)


@dataclass(frozen=True, eq=False)
class Result(Generic[L]):
    """Results by layer: `result["model.layers.0.self_attn.q_proj"]`, in a fused layer `result[path, role]`.

    Args:
        layers: one for each layer, or role of a fused one, by the numbers in their paths.
    """

    layers: tuple[L, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[L]:
        return iter(self.layers)

    def __getitem__(self, key: str | tuple[str, str]) -> L:
        path, role = (key, None) if isinstance(key, str) else key
        found = [layer for layer in self.layers if layer.path == path and role in (None, layer.role)]
        if len(found) == 1:
            return found[0]
        roles = [layer.role for layer in found]
        near = difflib.get_close_matches(str(path), [layer.path for layer in self.layers], n=1)
        raise LoRANameError(
            f"{path!r} is fused: it has {', '.join(map(repr, roles))}."
            if roles
            else f"There is no result for {key!r}.",
            name=str(path),
            value=key,
            remedy=f"Write [{path!r}, {roles[0]!r}]." if roles else f"Did you mean {near[0]!r}?" if near else None,
        )

    @property
    def by_role(self) -> dict[str, tuple[L, ...]]:
        """Role → its layers, in the order of the Transformer's equations."""
        roles = sorted({layer.role for layer in self.layers}, key=lambda role: (_place(role), role))
        return {role: tuple(layer for layer in self.layers if layer.role == role) for role in roles}


def _place(role: str) -> float:
    first = role.partition("+")[0]
    return ROLES.index(first) if first in ROLES else math.inf
