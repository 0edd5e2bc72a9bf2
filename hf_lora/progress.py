"""How far training has moved the weights: by role, ‖ΔW‖/‖W‖ and the effective rank of ΔW; cheap."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layerinfo import describe_layer, is_held
from .layers import LoRALinear
from .model import require
from .sharding import reshard, whole
from .slots import LoRASlots, Slot
from .spectrum import effective_rank
from .state import Entry
from .targeting import roles_of
from .weights import as_matrix, materialised, weight_name

__all__ = ["Progress", "trained_parameters"]


@dataclass(frozen=True)
class _Pair:
    """One pair of factors of a layer: all of it, or one role's rows of a fused one."""

    path: str
    role: str
    index: int  # which of the slot's blocks
    rows: tuple[range, ...]  # the base's output rows; () for all


class Progress:
    """Measures the adapters that train on a model. The base's norms are computed once, at the first `measure`.

    Args:
        model: with at least one adapter that trains.

    Attributes:
        left_out: role → why it has no `delta_norm`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.left_out: dict[str, str] = {}
        self._base: dict[tuple[str, tuple[range, ...]], float] | None = None  # rows of a layer -> their ‖W‖²
        roles = roles_of(model)
        if any(entry.record.experts for entry in _training(model)):
            self.left_out["experts"] = "their parameters (target_parameters) are not measured"
        self._pairs = {
            entry.name: tuple(self._pairs_of(entry, roles)) for entry in _training(model) if entry.record.layers
        }

    def measure(self) -> dict[str, float]:
        """The numbers, under names for a log.

            delta_norm/<role> = √Σ‖ΔW‖² / √Σ‖W‖² (Frobenius, over the role's layers)
            effective_rank/<role> = the mean over them of exp(entropy of ΔW's normalised singular values)

        With several adapters that train, a name begins with the adapter's: <adapter>/delta_norm/<role>. Every process
        of a sharded model must call this.
        """
        reshard(self.model)
        if self._base is None:
            self._base = self._base_norms()
        found: dict[str, float] = {}
        for name, pairs in self._pairs.items():
            prefix = f"{name}/" if len(self._pairs) > 1 else ""
            squares, ranks = self._spectra(require(self.model).entry(name), pairs)
            base: dict[str, float] = defaultdict(float)  # of the layers that this adapter is on
            for pair in pairs:
                base[pair.role] += self._base.get((pair.path, pair.rows), 0.0)
            for role in dict.fromkeys(pair.role for pair in pairs):
                if base[role] and role not in self.left_out:
                    found[f"{prefix}delta_norm/{role}"] = math.sqrt(squares[role] / base[role])
                found[f"{prefix}effective_rank/{role}"] = sum(ranks[role]) / len(ranks[role])
        return found

    def _pairs_of(self, entry: Entry, roles: dict[str, tuple[str, ...]]) -> Iterator[_Pair]:
        for path in entry.record.layers:
            slot = self._slots(path).slots[entry.slot]
            if slot.gain:
                role = "+".join(roles.get(path) or (path.rpartition(".")[2],))
                self.left_out[role] = f"{path}: a variant multiplies its output too, so that B·A is not its ΔW"
            for index, (role, rows) in enumerate(slot.blocks):
                yield _Pair(path, role, index, rows)
            if not slot.blocks:
                yield _Pair(path, "+".join(roles.get(path) or (path.rpartition(".")[2],)), 0, ())

    def _slots(self, path: str) -> LoRASlots:
        module = self.model.get_submodule(path)
        assert isinstance(module, LoRALinear)
        return module.lora_slots

    def _spectra(self, entry: Entry, pairs: tuple[_Pair, ...]) -> tuple[dict[str, float], dict[str, list[float]]]:
        """By role: Σ‖ΔW‖², and each layer's effective rank."""
        squares: dict[str, float] = defaultdict(float)
        ranks: dict[str, list[float]] = defaultdict(list)
        by_rank: dict[int, list[tuple[_Pair, float, Tensor, Tensor]]] = defaultdict(list)
        for pair in pairs:
            slots = self._slots(pair.path)
            slot = slots.slots[entry.slot]
            A, B = _own_factors(slots, entry.slot, slot, pair)
            by_rank[A.shape[0]].append((pair, slot.scaling, A @ A.T, B.T @ B))
        for group in by_rank.values():
            a = torch.stack([gram for _, _, gram, _ in group]).to("cpu", torch.float64)
            b = torch.stack([gram for _, _, _, gram in group]).to("cpu", torch.float64)
            norms = (a * b).sum((1, 2)).clamp_min(0)  # tr(BᵀB · AAᵀ) = ‖BA‖²
            for (pair, scaling, _, _), norm, values in zip(group, norms.tolist(), _singular(a, b), strict=True):
                squares[pair.role] += norm * scaling**2
                ranks[pair.role].append(effective_rank(values) if math.isfinite(norm) else math.nan)
        return squares, ranks

    def _base_norms(self) -> dict[tuple[str, tuple[range, ...]], float]:
        """‖W‖² of rows; a role with a layer whose weight cannot be read is left out, and `left_out` says why."""
        squares: dict[tuple[str, tuple[range, ...]], float] = {}
        for pair in (pair for found in self._pairs.values() for pair in found):
            if (pair.path, pair.rows) in squares:  # of another adapter too
                continue
            module = self.model.get_submodule(pair.path)
            weight = getattr(module, weight_name(module))
            assert isinstance(weight, Tensor)
            if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
                self.left_out[pair.role] = f"{pair.path} is quantised ({weight.dtype})"
                continue
            weight = materialised(module, weight_name(module)) if weight.is_meta else whole(weight.detach())
            weight = as_matrix(weight)
            if weight.is_meta or weight.ndim != 2:
                self.left_out[pair.role] = f"the weight of {pair.path} is not here as a matrix"
                continue
            info = describe_layer(module)
            by_output = weight.T if info is not None and info.kind == "conv1d" else weight
            parts = [by_output[span.start : span.stop] for span in pair.rows] or [by_output]
            squares[pair.path, pair.rows] = sum(
                float(torch.linalg.vector_norm(part, dtype=_widest(weight))) ** 2 for part in parts
            )
        return squares


def _training(model: nn.Module) -> list[Entry]:
    return [entry for entry in require(model).entries.values() if entry.trainable]


def _own_factors(slots: LoRASlots, index: int, slot: Slot, pair: _Pair) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (rows, r) of the pair, in the precision that its device has."""
    A, B = slots.compact(index, lambda _, tensor: whole(tensor.detach()))
    if slot.blocks:  # the Parameter B holds the blocks' rows one below the other
        r = slot.rank // len(slot.blocks)
        lengths = [sum(map(len, rows)) for _, rows in slot.blocks]
        A = A[pair.index * r : (pair.index + 1) * r]
        B = B[sum(lengths[: pair.index]) :][: lengths[pair.index]]
    return A.to(_widest(A)), B.to(_widest(B))


def _widest(tensor: Tensor) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float64 if tensor.device.type in ("cpu", "cuda") else torch.promote_types(tensor.dtype, torch.float32)


def _singular(a: Tensor, b: Tensor) -> Tensor:
    """Singular values of BA from its Gram matrices, (n, r): the roots of the eigenvalues of √(AAᵀ) BᵀB √(AAᵀ)."""
    usable = torch.isfinite(a).all() and torch.isfinite(b).all()
    if not usable:  # eigh would raise; their effective rank is not asked for
        a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt()[:, None, :]
    squared = torch.linalg.eigvalsh(root.mT @ b @ root)
    smallest = squared[:, -1:].clamp_min(0) * 1e-14  # what rounding leaves of a zero
    return torch.where(squared > smallest, squared, 0).sqrt()


def trained_parameters(model: nn.Module) -> tuple[list[Any], list[Any], int]:
    """The parameters that require gradients of adapters, and of the base; how many numbers the base has."""
    adapters: list[Any] = []
    others: list[Any] = []
    total = 0
    ours = {id(p) for path, p in model.named_parameters() if is_held(path)}
    for parameter in model.parameters():
        if id(parameter) not in ours:
            total += parameter.numel()
        if parameter.requires_grad:
            (adapters if id(parameter) in ours else others).append(parameter)
    return adapters, others, total
