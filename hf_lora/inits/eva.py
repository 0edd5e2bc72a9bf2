"""EVA: A begins as the principal components of what goes into the layer, and layers get rank by how much they explain.

    A₀ = the first r right singular vectors of X − mean(X), B₀ = 0

A layer gets at most rho·r; all together get what they had. Layers with one input (q, k and v) share a decomposition.

Source: Paischer et al. 2024 (arXiv:2410.07170) §3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRAConfigError, LoRAStateError
from ..fields import boolean, wrong
from ..targeting import Target
from .base import Init, Layer, Settings
from .inputs import bar, empty, moved, outside, positions, rows_of, same_input, watching
from .pca import IncrementalPCA

__all__ = ["EVA"]

_MOST_PASSES = 50  # over the data, before it is said that they do not settle


def _eva(layer: Layer, settings: Settings) -> tuple[Tensor, Tensor]:
    pca: IncrementalPCA = layer.seen
    A = pca.components[: layer.rank]
    if settings["whiten"]:
        A = A / pca.values[: layer.rank].sqrt()[:, None]
    return A.to(layer.dtype), A.new_zeros(layer.out_features, layer.rank, dtype=layer.dtype)


def _look(
    model: nn.Module, targets: tuple[Target, ...], data: Iterable[Any], settings: Settings
) -> tuple[tuple[Target, ...], dict[str, Any]]:
    """Read the data, again and again, until the components that are used do not turn any more."""
    _check(settings)
    modules = {target.path: model.get_submodule(target.path) for target in targets}
    ignored = settings["label_mask_value"] if settings["use_label_mask"] else None
    with outside(model), torch.no_grad():
        model.eval()
        first = next(iter(data), None)
        if first is None:
            raise empty()
        firsts = same_input(model, modules, moved(first, model))
        most = _most(targets, firsts, settings["rho"])
        pcas = {path: IncrementalPCA(most[path], settings["tau"]) for path in modules if firsts[path] == path}
        ranks = dict(most)
        shown = bar(_again(data, pcas, ranks), "EVA")
        for batch in shown:
            given = moved(batch, model)
            kept = positions(given, ignored)
            unsettled = {path: modules[path] for path, pca in pcas.items() if not pca.settled(ranks[path])}
            shown.set_description_str(f"EVA: {len(pcas) - len(unsettled)}/{len(pcas)} inputs have settled")
            if not unsettled:
                break
            with watching(unsettled, lambda path, x, kept=kept: pcas[path].update(rows_of(x, kept))):  # type: ignore[misc]
                model(**given)
            if all(pca.count for pca in pcas.values()):
                ranks.update(_distributed(targets, firsts, pcas, most))
    adjust = settings["adjust_scaling_factors"]
    changed = [
        dataclasses.replace(t, rank=ranks[t.path], alpha=t.alpha * (ranks[t.path] / t.rank if adjust else 1))
        for t in targets
        if ranks[t.path]
    ]
    return tuple(changed), {target.path: pcas[firsts[target.path]] for target in changed}


def _check(settings: Settings) -> None:
    for name, low, high in (("rho", 1, float("inf")), ("tau", 0, 1)):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise wrong(name, value, "a number of at least 1" if name == "rho" else "a number from 0 to 1")
    for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
        boolean(name, settings[name])


def _most(targets: tuple[Target, ...], firsts: Mapping[str, str], rho: float) -> dict[str, int]:
    """How many components of each layer are looked at; the same for layers that share an input."""
    groups: dict[str, int] = {}
    for t in targets:
        rank = min(round(t.rank * rho), t.info.in_features, *(sum(map(len, rows)) for _, rows in t.blocks or ()))
        groups[firsts[t.path]] = max(groups.get(firsts[t.path], 0), min(rank, t.info.max_rank))
    return {t.path: groups[firsts[t.path]] for t in targets}


def _again(data: Iterable[Any], pcas: Mapping[str, IncrementalPCA], ranks: Mapping[str, int]) -> Iterable[Any]:
    for done in range(_MOST_PASSES):
        batches = 0
        for batch in data:
            batches += 1
            yield batch
        short = [path for path, pca in pcas.items() if not pca.count]
        if short and done:
            most = max(pcas[path].components_wanted for path in short)
            raise LoRAConfigError(
                f"No batch has the {most} tokens that {len(short)} layer(s) need for as many components.",
                name="data",
                value=short[0],
                expected=most,
                remedy="Give larger batches, or a smaller r or rho.",
            )
        if not batches:
            raise LoRAConfigError(
                "The data can be read only once, and EVA reads them until its components have settled.",
                name="data",
                remedy="Give a DataLoader or a list, not an iterator.",
            )
    left = [path for path, pca in pcas.items() if not pca.settled(ranks[path])]
    if left:
        raise LoRAStateError(
            f"After {_MOST_PASSES} passes over the data the components of {len(left)} layer(s) still turn.",
            name=left[0],
            value=left,
            remedy="Give more data, or a smaller tau, rho or r.",
        )


def _distributed(
    targets: tuple[Target, ...], firsts: Mapping[str, str], pcas: Mapping[str, IncrementalPCA], most: Mapping[str, int]
) -> dict[str, int]:
    """The ranks: Σ r components go to where they explain the largest share of the variance."""
    explained = [
        (-float(share), place, t.path)
        for place, t in enumerate(targets)
        for share in pcas[firsts[t.path]].shares[: most[t.path]]
    ]
    ranks = {t.path: 0 for t in targets}
    for _, _, path in sorted(explained)[: sum(t.rank for t in targets)]:
        ranks[path] += 1
    return ranks


EVA = Init(_eva, embeddings=False, look=_look)
