"""Arithmetic on adapters as values: sums of ΔW, their best approximation, sparse merges, negation. No model is seen.

    ΔW = Σ wᵢ ΔWᵢ = Σ wᵢ·scalingᵢ·Bᵢ Aᵢ = [w₁s₁B₁ | w₂s₂B₂ | …] [A₁; A₂; …]

so that a sum is exactly the concatenation of factors, and its SVD that of a matrix as small as the sum of the ranks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from . import agreement, fields, lowrank, sparsify
from .errors import LoRAConfigError, LoRAMismatchError
from .lowrank import Merge, Terms
from .values import AdapterValue, plain, refuse_extras, without_training

__all__ = ["Method", "combine", "factors_only", "negate", "truncate"]

V = TypeVar("V", bound=AdapterValue)
Method = Literal["concat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]

# Which options each method takes.
_OPTIONS: dict[str, frozenset[str]] = {
    "concat": frozenset(),
    "linear": frozenset(),
    "svd": frozenset({"rank", "energy"}),
    "ties": frozenset({"rank", "energy", "density", "majority_sign_method"}),
    "dare_linear": frozenset({"rank", "energy", "density", "seed"}),
    "dare_ties": frozenset({"rank", "energy", "density", "majority_sign_method", "seed"}),
    "magnitude_prune": frozenset({"rank", "energy", "density"}),
}


def combine(
    adapters: Sequence[V],
    weights: Sequence[float],
    method: Method = "concat",
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] | None = None,
    seed: int | torch.Generator | None = None,
    force: bool = False,
) -> V:
    """One adapter from several: ΔW = Σ wᵢ ΔWᵢ, or what `method` makes of it.

    A layer that an adapter does not have counts as ΔWᵢ = 0. Ranks, alphas and rsLoRA may differ. Adapters that share a
    fused layer's roles stay in roles, and each role is computed by itself; else the layer is taken whole.

    Methods:
        concat: Σ wᵢ ΔWᵢ itself. The rank is the sum of the ranks.
        svd: its best approximation of rank `rank` in each layer (Eckart–Young), from the factors' QR in float64.
        linear: PEFT's "linear", for results made with it: A = Σ ±√|wᵢsᵢ| Aᵢ and B = Σ √|wᵢsᵢ| Bᵢ, of one rank. This
            is *not* the sum of the ΔW: the product adds √(wᵢsᵢwⱼsⱼ) Bᵢ Aⱼ for all i ≠ j.
        ties: trims each ΔWᵢ to its `density` largest entries, elects a sign for each entry by Σ wᵢ ΔWᵢ ("total") or
            Σ sgn(wᵢ ΔWᵢ) ("frequency"), and takes the mean of the wᵢ ΔWᵢ that have it. An even vote gives 0.
        dare_linear: drops entries of each ΔWᵢ at random, divides the rest by `density`, and adds them.
        dare_ties: drops as DARE, then elects and averages as TIES.
        magnitude_prune: trims as TIES, then adds.

    The last four are the papers', on each layer's ΔW. (PEFT's work on A and B apart; its "…_svd" are these, but that
    they elect the sign without the weights.) One layer at a time, on its factors' device, the dense ΔWᵢ are made and
    merged, and the SVD gives the best factors of rank `rank`: O(out·in·min(out, in)) time, a few dense matrices an
    adapter.

    Args:
        adapters: of one base.
        weights: one for each; negative ones subtract (task negation), 0 leaves an adapter out.
        method: see above.
        rank: at most this rank in each layer, in a fused one for each role, as `r` in `LoRAConfig`; None: the largest
            rank that the layer has in an adapter.
        energy: instead of `rank`: in each layer the smallest rank that keeps this share of Σσ², in (0, 1].
        density: the share of entries that is kept, in (0, 1].
        majority_sign_method: "total" (None) or "frequency".
        seed: of DARE's masks; a number, a generator, or None for torch's own.
        force: combine adapters that name different bases, if their shapes fit.

    Returns:
        An adapter of the class of the first, with its config (dropout, task type, fields of PEFT) but for ranks, alphas
        and targets. Computed in float32 (float64 if a factor is), stored in the widest dtype of the factors. concat
        keeps every A, and every B up to the ratio of wᵢ·scalingᵢ to the largest, which becomes the result's scaling:
        where all are equal, up to sign, no bit is rounded.

    Raises:
        LoRAConfigError: an option or weight is impossible, or does not belong to `method`.
        LoRAMismatchError: the adapters do not fit each other, hold trained heads or biases (only one adapter with
            weight 1 may), have different ranks ("linear"), or the result is not finite.

    Source: Hu et al. 2021 §4.1; Ilharco et al. 2022 (arXiv:2212.04089); Yadav et al. 2023 (arXiv:2306.01708); Yu et al.
        2023 (arXiv:2311.03099); Eckart & Young 1936.
    """
    fields.one_of("method", method, tuple(_OPTIONS))
    options = {
        "rank": rank,
        "energy": energy,
        "density": density,
        "majority_sign_method": majority_sign_method,
        "seed": seed,
    }
    _check_options(method, options)
    agreement.check_adapters(adapters, force=force)
    adapters = [plain(without_training(adapter)) for adapter in adapters]
    scales = agreement.check_weights(weights, len(adapters))
    if len(adapters) > 1 or scales[0] != 1:
        agreement.require_factors_only(adapters, "A combination")
    embeddings = agreement.common_embeddings(adapters, force=force)

    paths = sorted({path for adapter in adapters for path in adapter.factors})
    layers: dict[str, Terms] = {
        path: [(w, one.factors[path]) for w, one in zip(scales, adapters, strict=True) if path in one.factors]
        for path in paths
    }
    widest = functools.reduce(torch.promote_types, (f.A.dtype for terms in layers.values() for _, f in terms))
    working = torch.promote_types(widest, torch.float32)
    largest = max(abs(w * f.scaling) for terms in layers.values() for w, f in terms)
    if not largest <= torch.finfo(working).max:
        raise LoRAMismatchError(
            f"A weight times its adapter's scaling is {largest!r}, which no {working} holds.",
            name="weights",
            value=list(weights),
            remedy="Use smaller weights.",
        )
    if method == "linear":
        _require_equal_ranks(layers)

    if method == "concat":
        factors = {path: lowrank.concatenated(terms, largest or 1.0, working) for path, terms in layers.items()}
    elif method == "linear":
        factors = {path: lowrank.averaged(terms, working) for path, terms in layers.items()}
    else:
        merge = None if method == "svd" else _merger(method, options)
        factors = {}
        for path, terms in layers.items():
            most = rank or lowrank.largest_rank(terms)
            try:
                if merge is None:
                    whole = lowrank.concatenated(terms, largest or 1.0, torch.float64)
                    factors[path] = lowrank.reduced(whole, most, energy)
                else:
                    factors[path] = lowrank.merged(terms, merge, most, energy, working)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise LoRAMismatchError(
                    f"{path}: the combined ΔW has no SVD: {error}",
                    name=path,
                    remedy="Use smaller weights, or combine adapter.to(torch.float64).",
                ) from error
    factors = {path: f.to(widest) for path, f in factors.items()}
    agreement.check_finite(factors, result=True)
    config = agreement.common_config(adapters, factors)
    return agreement.described(dataclasses.replace(adapters[0], config=config, factors=factors, embeddings=embeddings))


def truncate(adapter: V, rank: int | None = None, energy: float | None = None) -> V:
    """The adapter with a smaller rank: in each layer the ΔW' of that rank with the least ‖ΔW − ΔW'‖ (Eckart–Young).

    Computed in float64 from the factors' QR; dtype and scaling of each layer stay. A layer whose rank is small enough
    already stays as it is, bit for bit. In a fused layer each role is truncated by itself, and all get one rank: `rank`
    is each role's, as `r` in `LoRAConfig`. Heads and biases stay.

    Args:
        adapter: what to truncate; it is not changed.
        rank: the largest rank that stays.
        energy: instead: in each layer the smallest rank that keeps this share of Σσ² (of every role), in (0, 1].

    Raises:
        LoRAConfigError: neither or both are given, or one is out of range.
        LoRAMismatchError: the adapter is not finite.
    """
    _check_extent(rank, energy)
    if rank is None and energy is None:
        raise LoRAConfigError(
            "truncate() was given neither rank nor energy.",
            name="rank",
            expected="a positive integer, or energy in (0, 1]",
            remedy="Write truncate(rank=4) or truncate(energy=0.99).",
        )
    refuse_extras(adapter, "truncate()")
    adapter = without_training(adapter)
    agreement.check_finite(adapter.factors)
    whole = plain(adapter)
    factors = {path: lowrank.reduced(pair, rank or pair.rank, energy) for path, pair in whole.factors.items()}
    if all(pair is whole.factors[path] for path, pair in factors.items()):
        return adapter
    agreement.check_finite(factors, result=True)
    return agreement.described(dataclasses.replace(whole, factors=factors))


def negate(adapter: V) -> V:
    """The adapter with −ΔW, exactly: B is negated, all else stays. With it, a model unlearns what the adapter learned.

    Raises:
        LoRAMismatchError: it holds trained heads or biases, which have no negative.

    Source: Ilharco et al. 2022 (arXiv:2212.04089) §3.
    """
    agreement.require_factors_only([adapter], "Negation")
    factors = {path: dataclasses.replace(pair, B=-pair.B.detach()) for path, pair in adapter.factors.items()}
    return dataclasses.replace(adapter, factors=factors)


def factors_only(adapter: V) -> V:
    """The adapter without the heads and biases that it trained: its factors alone, which can be added."""
    config = adapter.config.replace(modules_to_save=None, trainable_token_indices=None, bias="none")
    return dataclasses.replace(adapter, config=config, biases={}, modules={})


# -- options ---------------------------------------------------------------------------------------------------------


def _check_options(method: str, options: Mapping[str, Any]) -> None:
    takes = _OPTIONS[method]
    for name, value in options.items():
        if value is not None and name not in takes:
            others = ", ".join(repr(other) for other, taken in _OPTIONS.items() if name in taken)
            remedy = f"Leave {name} out, or use a method that takes it: {others}."
            if name in ("rank", "energy"):
                remedy += f" combine(…).truncate({name}={value!r}) truncates the result."
            raise LoRAConfigError(
                f'{name}={value!r} means nothing to method="{method}".', name=name, value=value, remedy=remedy
            )
    _check_extent(options["rank"], options["energy"])
    if "density" in takes:
        _share("density", options["density"], "the share of entries that is kept, a number in (0, 1]")
    if options["majority_sign_method"] is not None:
        fields.one_of("majority_sign_method", options["majority_sign_method"], ("total", "frequency"))
    seed = options["seed"]
    if seed is not None and not isinstance(seed, torch.Generator):
        fields.integer("seed", seed, least=0)


def _check_extent(rank: Any, energy: Any) -> None:
    if rank is not None and energy is not None:
        raise LoRAConfigError(
            f"rank={rank!r} and energy={energy!r} were both given.",
            name="energy",
            value=energy,
            remedy="Give one: rank fixes the rank, energy finds the smallest that keeps a share of Σσ².",
        )
    if rank is not None:
        fields.integer("rank", rank, least=1)
    if energy is not None:
        _share("energy", energy, "a number in (0, 1]")


def _share(name: str, value: Any, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise fields.wrong(name, value, expected)


def _require_equal_ranks(layers: Mapping[str, Terms]) -> None:
    facts = [
        f"{path}: ranks {', '.join(str(f.rank) for _, f in terms)}"
        for path, terms in layers.items()
        if len({f.rank for _, f in terms}) > 1
    ]
    if facts:
        raise LoRAMismatchError(
            'method="linear" adds A to A and B to B, which needs equal ranks.',
            name=facts[0].split(":")[0],
            value=facts,
            facts=facts,
            remedy='Use "concat" (exact), or "svd" for a smaller rank.',
        )


def _merger(method: str, options: Mapping[str, Any]) -> Merge:
    """A function from the weights and dense ΔWᵢ of a piece to what `method` makes of them."""
    density, seed = options["density"], options["seed"]
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed

    def merge(deltas: list[tuple[float, Tensor]]) -> Tensor:
        if method.startswith("dare"):
            sparse = [weight * sparsify.drop(delta, density, generator) for weight, delta in deltas]
        else:
            sparse = [weight * sparsify.trim(delta, density) for weight, delta in deltas]
        if method.endswith("ties"):
            sign = sparsify.elect(sparse, options["majority_sign_method"] or "total")
            return sparsify.merge_elected(sparse, sign)
        return torch.stack(sparse).sum(dim=0)

    return merge
