"""Which matrices at which rank, for a number of parameters: the paper's study of section 7.1, on any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..architectures import ROLES
from ..config import LoRAConfig
from ..errors import LoRAConfigError, LoRATargetError, LoRAUnsupportedError
from ..fields import integer
from ..initial import initial_value
from ..survey import survey
from ..targeting import Resolution, resolve
from .result import Proposal

__all__ = ["propose"]

# Table 5 of the paper in its order, then what it leaves frozen.
_SETS: tuple[tuple[str, ...], ...] = (
    *(("q",), ("k",), ("v",), ("o",)),
    *(("q", "k"), ("q", "v"), ("q", "k", "v", "o")),
    ROLES,
)
# What Table 5 finds best at one budget, best first, and the least rank at which it does. More kinds of matrices are
# worth more than a larger rank: all four with r=2 do as well as q and v with r=4, and these better than one with r=8.
_BEST: tuple[tuple[tuple[str, ...], int], ...] = ((("q", "k", "v", "o"), 2), (("q", "v"), 1), (("v",), 1), (("o",), 1))


def propose(model: nn.Module, config: LoRAConfig | None, budget: Any) -> tuple[Proposal, ...]:
    """Every set of matrices that a budget allows, each with the largest rank that it does; the recommended one first.

    Args:
        model: without adapters.
        config: the other fields; if it names targets these are the only set.
        budget: trainable parameters at most, heads and biases that the config trains included.

    Raises:
        LoRAConfigError: the budget is no positive integer, or below what the smallest set takes with rank 1.
    """
    integer("budget", budget, least=1)
    config = LoRAConfig() if config is None else config
    fixed = config.target_modules
    found: list[Proposal] = []
    least: list[tuple[int, str]] = []
    for targets in _sets(model) if fixed is None else [fixed]:
        wanted = config.replace(target_modules=targets)
        try:
            one, most, step = _costs(model, wanted)
        except (LoRATargetError, LoRAUnsupportedError):
            if fixed is not None:
                raise
            continue  # this model has no such layer, or does not say which rows are which
        least.append((one, targets if isinstance(targets, str) else ", ".join(targets)))
        if one <= budget:
            r = min(most, 1 + (budget - one) // step)
            found.append(
                Proposal(
                    targets if isinstance(targets, str) else tuple(targets),
                    r,
                    one + (r - 1) * step,
                    wanted.replace(r=r),
                )
            )
    if not found:
        cost, names = min(least)
        raise LoRAConfigError(
            f"budget={budget!r} is too small: the least that trains here is {cost:,} parameters ({names} with r=1).",
            name="budget",
            value=budget,
            expected=f"at least {cost}",
            remedy=f"Give a budget of {cost} or more, or fewer layers (layers_to_transform).",
        )
    best = _recommended(found)
    return (best, *(proposal for proposal in found if proposal is not best))


def _sets(model: nn.Module) -> list[tuple[str, ...] | str]:
    """The sets of roles that this model has layers for, each once; "all-linear" if nothing here has a role."""
    roles = {role for layer in survey(model).layers.values() for role in layer.roles}
    sets = [tuple(role for role in wanted if role in roles) for wanted in _SETS]
    return list(
        dict.fromkeys(s for s, wanted in zip(sets, _SETS, strict=True) if s and (s == wanted or len(s) > 4))
    ) or ["all-linear"]


def _costs(model: nn.Module, config: LoRAConfig) -> tuple[int, int, int]:
    """Trainable parameters with r=1, the largest r that every layer can have, and what each further rank adds."""
    if config.use_bdlora is not None:
        raise LoRAUnsupportedError(
            "budget= looks for a rank, and use_bdlora has blocks of one that nblocks divides.",
            name="use_bdlora",
            value=dict(config.use_bdlora),
            remedy="Leave budget out, and give r.",
        )
    first = resolve(model, config.replace(r=1))
    one = initial_value(model, config.replace(r=1), first).num_parameters
    try:
        second = resolve(model, config.replace(r=2))
    except LoRAConfigError:  # a layer of one row
        return one, 1, 1
    two = initial_value(model, config.replace(r=2), second).num_parameters
    return one, _largest(first, second), max(two - one, 1)


def _largest(first: Resolution, second: Resolution) -> int:
    sizes = [
        min([target.info.max_rank, *(sum(map(len, rows)) for _, rows in target.blocks)])
        for target, other in zip(first.targets, second.targets, strict=True)
        if target.rank != other.rank  # not one that rank_pattern sets
    ]
    return min(sizes, default=1)


def _recommended(found: Sequence[Proposal]) -> Proposal:
    for targets, rank in _BEST:
        for proposal in found:
            if proposal.targets == targets and proposal.r >= rank:
                return proposal
    return found[0]
