"""nn.MultiheadAttention in files: PEFT has one rank and alpha for its two pairs, and a name of its own for the second.

The pair of in_proj stands under the module's name, X, and that of out_proj under X.base_layer.out_proj. Where they
differ in rank (a role's rows are a block of in_proj, and out_proj has one rank alone) the smaller is filled up with
zeros in files, and taken down again where they are read.

PEFT adds out_proj's ΔW twice, in its forward and in a merge. A file means what PEFT makes of it, so that the alpha of
that pair is `TWICE` the file's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.nn.functional import pad

from .errors import LoRAFileError
from .values import Factors

__all__ = ["TWICE", "around", "file_path", "filled", "model_path", "taken_down"]

TWICE = 2

_OUT = ".out_proj"
_IN_FILES = re.compile(r"(.+)\.base_layer\.out_proj")


def model_path(path: str) -> str | None:
    """The layer that a file's name means as an output projection; None if it means none."""
    found = _IN_FILES.fullmatch(path)
    return None if found is None else found[1] + _OUT


def around(path: str, factors: Factors) -> str:
    """The nn.MultiheadAttention whose output projection this is; "" if it is another layer."""
    own = factors.kind == "attention" and factors.out_features == factors.in_features and path.endswith(_OUT)
    return path.removesuffix(_OUT) if own else ""


def file_path(path: str, factors: Factors) -> str:
    """The name that the layer's pair has in files."""
    module = around(path, factors)
    return f"{module}.base_layer{_OUT}" if module else path


def filled(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """The factors as files hold them, with the files' alpha: of one rank and alpha in each nn.MultiheadAttention.

    Raises:
        LoRAFileError: PEFT's format has no notation for what is to be one.
    """
    found = dict(factors)
    for path, pair in factors.items():
        module = around(path, pair)
        if not module:
            continue
        found[path] = pair = dataclasses.replace(pair, alpha=pair.alpha / TWICE)
        other = factors.get(module)
        if other is None:
            continue
        rank = max(pair.rank, other.rank)
        if rank > other.rank and other.blocks:
            raise LoRAFileError(
                f"{module}: out_proj has rank {pair.rank} and the rows of in_proj {other.rank}, which PEFT's format "
                "cannot say.",
                name=module,
                remedy="truncate() the adapter to one rank.",
            )
        found[module], found[path] = _filled(other, rank), _filled(pair, rank)
        if found[path].alpha != found[module].alpha:  # their scalings differ: B takes what it is more
            share = pair.scaling / other.scaling
            found[path] = dataclasses.replace(found[path], B=found[path].B * share, alpha=found[module].alpha)
    return found


def _filled(pair: Factors, rank: int) -> Factors:
    more = rank - pair.rank
    if not more:
        return pair
    alpha = pair.scaling * (math.sqrt(rank) if pair.use_rslora else rank)
    return dataclasses.replace(pair, A=pad(pair.A, (0, 0, 0, more)), B=pad(pair.B, (0, more)), alpha=alpha)


def taken_down(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """The factors of a file without the zeros that `filled` gave them."""
    found = dict(factors)
    for path, pair in factors.items():
        if pair.kind == "attention" and not pair.blocks and not pair.A.is_meta:
            rank = _last(pair.A.any(1) | pair.B.any(0)) + 1
            if 0 < rank < pair.rank:
                alpha = pair.scaling * (math.sqrt(rank) if pair.use_rslora else rank)
                A, B = pair.A[:rank].contiguous(), pair.B[:, :rank].contiguous()
                found[path] = dataclasses.replace(pair, A=A, B=B, alpha=alpha)
    return found


def _last(held: Tensor) -> int:
    places: Iterable[int] = held.nonzero().flatten().tolist()
    return max(places, default=-1)
