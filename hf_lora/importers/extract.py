"""A LoRA out of a fully fine-tuned model.

    ΔW = W_tuned − W_base = U diag(σ) Vᵀ      the best ΔW' of rank r keeps σ₁ … σ_r, and ‖ΔW − ΔW'‖² = Σ_{i>r} σᵢ²

(Eckart–Young). What else training changed (norms, biases, embeddings, layers that are no target) has no factors: it is
taken whole where that is asked for, and otherwise reported.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from .. import fields
from ..adapter import LoRAAdapter
from ..agreement import described
from ..config import LoRAConfig
from ..errors import LoRAMismatchError, LoRAUnsupportedError
from ..fitting import adds_bias, own_state
from ..lowrank import assembled, cut, enough
from ..targeting import Target, resolve
from ..values import AdapterValue, Block, Factors
from ..weights import as_matrix
from .sides import Side, Source, model_of, open_side

__all__ = ["ExtractedLoRA", "ExtractedLayer", "Extraction", "extract_lora"]


@dataclass(frozen=True)
class ExtractedLayer:
    """One layer's, or one role's of a fused layer.

    Attributes:
        path: the module's.
        role: of a slice of a fused layer; else "".
        rank: that it was given.
        relative: ‖ΔW‖ / ‖W_base‖ (Frobenius).
        singular_values: of ΔW, largest first.
    """

    path: str
    role: str
    rank: int
    relative: float
    singular_values: tuple[float, ...]

    def error(self, rank: int | None = None) -> float:
        """‖ΔW − ΔW'‖ / ‖ΔW‖ for the best ΔW' of `rank`; None: of the rank that it was given. 0 if nothing changed."""
        norm = _norm(self.singular_values)
        return _norm(self.singular_values[self.rank if rank is None else rank :]) / norm if norm else 0.0


@dataclass(frozen=True)
class Extraction:
    """What an extraction kept and what it left.

    Attributes:
        layers: that have factors.
        unchanged: targets that are bit for bit as in the base; they have no factors.
        whole: tensors that the adapter holds whole (biases, modules_to_save).
        left_out: tensor → ‖W_tuned − W_base‖ / ‖W_base‖ of what changed and is not in the adapter; of a fused layer
            the rows that are no target.
    """

    layers: tuple[ExtractedLayer, ...]
    unchanged: tuple[str, ...]
    whole: tuple[str, ...]
    left_out: Mapping[str, float]

    def error(self, rank: int | None = None) -> float:
        """√(Σ ‖ΔW − ΔW'‖² / Σ ‖ΔW‖²) over the layers, at `rank` or at the ranks given: 0 is exact, 1 keeps nothing."""
        total = math.fsum(s * s for layer in self.layers for s in layer.singular_values)
        lost = math.fsum(
            s * s
            for layer in self.layers
            for s in layer.singular_values[layer.rank if rank is None else fields.integer("rank", rank, least=0) :]
        )
        return math.sqrt(lost / total) if total else 0.0

    def error_by_rank(self) -> dict[int, float]:
        """Rank → `error(rank)`, for 1, 2, 4, … up to the first that is exact."""
        full = max((len(layer.singular_values) for layer in self.layers), default=1)
        ranks = [1]
        while ranks[-1] < full:
            ranks.append(min(2 * ranks[-1], full))
        return {rank: self.error(rank) for rank in ranks}


@dataclass(frozen=True, eq=False)
class ExtractedLoRA(LoRAAdapter):
    """An adapter that was extracted from a model. What is made of it (truncate, to, …) keeps the report as it is.

    Attributes:
        report: what was kept and what was left.
    """

    report: Extraction = field(default_factory=lambda: Extraction((), (), (), {}))


def extract_lora(
    base_model: nn.Module | str | os.PathLike[str],
    tuned_model: Source,
    rank: int | None = 16,
    *,
    energy: float | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    bias: Literal["none", "lora_only", "all"] = "none",
    modules_to_save: Sequence[str] | None = None,
    strict: bool = False,
    task_type: str | None = None,
    device: torch.device | str = "cpu",
) -> ExtractedLoRA:
    """The LoRA that comes closest to what full fine-tuning changed.

    Each target's W_tuned − W_base is factored by its SVD, one layer at a time, in float32 (float64 if a weight is):
    O(out·in·min(out, in)) time. Folders of safetensors are read tensor by tensor.

    Args:
        base_model: a model, a folder or a repo's id.
        tuned_model: the same class of model; or its state dict.
        rank: of each layer, at most what its weight has; of each role in a fused one, as `r` in `LoRAConfig`.
        energy: instead (rank=None): in each layer the smallest rank that keeps this share of Σσ², in (0, 1].
        target_modules, exclude_modules: as in `LoRAConfig`.
        bias: take the biases that were trained: "lora_only" (of the targets) or "all".
        modules_to_save: modules to take whole, such as ["norm"]. A classifier's head is, as with `add_lora`.
        strict: refuse if anything changed that the adapter does not hold; otherwise there is a warning.
        task_type: PEFT's, for the adapter's config.
        device: where the SVDs are computed, one layer at a time.

    Returns:
        An adapter on the CPU, its factors in float32 (float64 if a weight is), its scaling 1; `report` has the error by
        rank and what was left out.

    Raises:
        LoRAConfigError: rank or energy is impossible. LoRATargetError: a target names nothing.
        LoRAMismatchError: the models are not of one shape, nothing changed, a weight is not finite, or something was
            left out and `strict`. LoRAUnsupportedError: quantised weights. LoRAFileError, LoRAHubError: of files.
    """
    _check_extent(rank, energy)
    model = base_model if isinstance(base_model, nn.Module) else model_of(base_model)
    base, tuned = open_side(base_model, model, "The base"), open_side(tuned_model, model, "The tuned model")
    _refuse_different(base, tuned)
    config = LoRAConfig(
        r=1,  # whether a layer has the rank is asked below, where it is cut to what its weight has
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        bias=bias,
        modules_to_save=modules_to_save,
        task_type=task_type,
        base_model=None if base.name == "The base" else base.name,
    )
    found = resolve(model, config)
    work = _Work(base, tuned, rank, energy, torch.device(device))
    conv1d = any(target.info.kind == "conv1d" for target in found.targets)
    for target in found.targets:
        work.layer(target)
    biases, modules = work.whole(model, bias, found.heads)
    work.rest()
    if not work.factors:
        raise LoRAMismatchError(
            "No target's weight differs between the two models.",
            value=[target.path for target in found.targets],
            remedy="Give the model before and after training, in this order; or choose other target_modules.",
        )
    report = Extraction(tuple(work.layers), tuple(work.unchanged), tuple(work.taken), work.left)
    _say_left_out(report, strict)
    config = config.replace(
        r=max(layer.rank for layer in work.layers),
        target_modules=sorted(work.factors),
        exclude_modules=None,
        modules_to_save=list(found.heads) or None,
        fan_in_fan_out=conv1d,
    )
    value = described(AdapterValue(config, work.factors, biases, modules))
    return ExtractedLoRA(value.config, value.factors, value.biases, value.modules, report=report)


class _Work:
    """What has been compared so far."""

    def __init__(self, base: Side, tuned: Side, rank: int | None, energy: float | None, device: torch.device) -> None:
        self.base, self.tuned, self.rank, self.energy, self.device = base, tuned, rank, energy, device
        self.factors: dict[str, Factors] = {}
        self.layers: list[ExtractedLayer] = []
        self.unchanged: list[str] = []
        self.taken: list[str] = []
        self.left: dict[str, float] = {}
        self.done: set[str] = set()

    def layer(self, target: Target) -> None:
        key = f"{target.path}.{target.info.weight}"
        self.done.add(key)
        before, after = self._pair(key)
        if torch.equal(before, after):
            self.unchanged.append(target.path)
            return
        wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
        before, delta = before.to(wide), after.to(wide) - before.to(wide)
        if not delta.isfinite().all():
            raise LoRAMismatchError(f"{key}: a weight is NaN or infinite.", name=key, remedy="Use another checkpoint.")
        if target.info.kind == "conv":
            before, delta = as_matrix(before), as_matrix(delta)
        elif target.info.kind in ("conv1d", "embedding"):  # stored as (in, out)
            before, delta = before.T, delta.T
        blocks = tuple(Block(role, rows) for role, rows in target.blocks)
        rows = [block.index() for block in blocks] or [torch.arange(delta.shape[0])]
        svds = [self._svd(delta[index]) for index in rows]
        rank = self.rank
        if rank is None:
            assert self.energy is not None
            rank = max(enough(values, self.energy) for _, values, _ in svds)
        like = Factors(target.info.pair, delta[:1], delta[:, :1], 1.0, kernel=target.info.kernel)
        pairs = cut(svds, rank, 1.0)
        self.factors[target.path] = assembled(like, blocks, [(a.contiguous(), b.contiguous()) for a, b in pairs], 1.0)
        for i, (index, (_, values, _)) in enumerate(zip(rows, svds, strict=True)):
            relative = _relative(delta[index], before[index])
            role = blocks[i].role if blocks else ""
            given = min(pairs[i][0].shape[0], len(values))
            self.layers.append(ExtractedLayer(target.path, role, given, relative, tuple(values.tolist())))
        others = torch.ones(delta.shape[0], dtype=torch.bool)
        others[torch.cat(rows)] = False
        if bool(others.any()) and delta[others].count_nonzero():
            roles = ", ".join(block.role for block in blocks)
            self.left[f"{key} (rows beside {roles})"] = _relative(delta[others], before[others])

    def _svd(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, values, vt = torch.linalg.svd(delta.to(self.device), full_matrices=False)
        return u.cpu(), values.cpu(), vt.cpu()

    def whole(
        self, model: nn.Module, bias: str, heads: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Biases and modules that the adapter holds as they are in the tuned model."""
        modules = {
            path: {key: self._take(f"{path}.{key}") for key in own_state(model.get_submodule(path))} for path in heads
        }
        biases = {}
        for key in self.base.read if bias != "none" else ():
            path, _, leaf = key.rpartition(".")
            if leaf != "bias" or key in self.done:
                continue
            if path in self.factors if bias == "lora_only" else adds_bias(model.get_submodule(path)):
                biases[key] = self._take(key)
        return biases, modules

    def _take(self, key: str) -> Tensor:
        if key not in self.tuned.read:
            raise LoRAUnsupportedError(
                f"{key} is tied to another weight, so it cannot be taken by itself.",
                name=key,
                remedy="Leave it out of modules_to_save.",
            )
        tensor = self._pair(key)[1]
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise LoRAMismatchError(f"{key} is NaN or infinite.", name=key, remedy="Use another checkpoint.")
        self.done.add(key)
        self.taken.append(key)
        return tensor.clone()

    def rest(self) -> None:
        """What changed and has no place in the adapter."""
        for key in self.base.read:
            if key in self.done:
                continue
            before, after = self._pair(key)
            if not torch.equal(before, after):
                wide = torch.promote_types(before.dtype, torch.float32)
                self.left[key] = _relative(after.to(wide) - before.to(wide), before.to(wide))

    def _pair(self, key: str) -> tuple[Tensor, Tensor]:
        if key not in self.base.read:
            raise LoRAUnsupportedError(
                f"{key} is no tensor of its own in the base (quantised, or tied to another).",
                name=key,
                remedy="Load the models without quantisation, or leave the layer out (exclude_modules).",
            )
        before, after = self.base.read[key](), self.tuned.read[key]()
        if before.is_meta or after.is_meta:
            raise LoRAUnsupportedError(
                f"{key} is on the meta device.", name=key, remedy="Load the model whole (device_map=None)."
            )
        if before.shape != after.shape:
            raise LoRAMismatchError(
                f"{key} is {list(before.shape)} in the base and {list(after.shape)} in the tuned model.",
                name=key,
                value=tuple(after.shape),
                expected=tuple(before.shape),
                remedy="Give two models of one shape: resize the base's embeddings first if tokens were added.",
            )
        for tensor in (before, after):
            if key.endswith(".weight") and (not tensor.is_floating_point() or tensor.dtype.itemsize < 2):
                raise LoRAUnsupportedError(
                    f"{key} is quantised ({tensor.dtype}).",
                    name=key,
                    value=tensor.dtype,
                    expected="a dense float weight",
                    remedy="Load both models without quantisation.",
                )
        return before, after


def _check_extent(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise fields.wrong(
            "energy" if energy is not None else "rank",
            energy if energy is not None else rank,
            "given alone: either rank, or energy with rank=None",
            "Write extract_lora(base, tuned, rank=16) or extract_lora(base, tuned, None, energy=0.9).",
        )
    if rank is not None:
        fields.integer("rank", rank, least=1)
    elif isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1:
        raise fields.wrong("energy", energy, "a number in (0, 1]")


def _refuse_different(base: Side, tuned: Side) -> None:
    facts = [f"{key}: only in the base" for key in base.read if key not in tuned.read]
    facts += [f"{key}: only in the tuned model" for key in tuned.read if key not in base.read]
    if facts:
        raise LoRAMismatchError(
            f"The models do not have the same tensors: {len(facts)} differ.",
            name=facts[0].partition(":")[0],
            value=facts,
            facts=facts,
            remedy="Give two models of one class, with the same weights tied.",
        )


def _say_left_out(report: Extraction, strict: bool) -> None:
    if not report.left_out:
        return
    facts = [f"{key}: {relative:.2e} of its norm" for key, relative in report.left_out.items()]
    message = f"{len(facts)} tensors changed that the adapter does not hold"
    remedy = "Widen target_modules, or take them whole with bias= and modules_to_save=."
    if strict:
        raise LoRAMismatchError(
            f"{message}.", name=next(iter(report.left_out)), value=facts, facts=facts, remedy=remedy
        )
    shown = ", ".join(list(report.left_out)[:3]) + (", …" if len(facts) > 3 else "")
    warnings.warn(f"{message} (report.left_out): {shown}. {remedy}", stacklevel=3)


def _norm(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values))


def _relative(delta: Tensor, weight: Tensor) -> float:
    norm, change = (float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in (weight, delta))
    return change / norm if norm else (math.inf if change else 0.0)
