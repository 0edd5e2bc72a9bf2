"""Ranks that are found while training: which rank-one parts of the factors matter, and how many may stay.

    ΔW = s · Σᵢ bᵢ aᵢ        aᵢ: A's row i, bᵢ: B's column i

A schedule lowers the number of parts from all to a budget. Those that matter least are zeroed, bᵢ = 0, and may come
back until the schedule ends; `cut` then takes them away, and what is left is a plain LoRA whose rank differs from layer
to layer. What a part matters is a criterion of `importance`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .agreement import described
from .errors import LoRAConfigError, LoRANameError, LoRAStateError, LoRAUnsupportedError
from .extras import EXTRAS
from .importance import CRITERIA, Criterion, Pairs, largest, shares
from .layers import LoRALinear
from .model import put, read, require
from .sharding import refuse_sharded
from .state import Entry
from .values import Factors

__all__ = ["RankAllocator", "check"]


class RankAllocator:
    """Finds each layer's rank while an adapter trains, by a schedule, and cuts the factors to it.

        parts that stay = all                                                step ≤ begin
                          target + (all − target) · (1 − (step − begin)/(end − begin))³
                          target                                             step ≥ end

    In a loop of one's own, from step 1 on:

        loss.backward(); allocator.observe(); optimizer.step(); allocator.step(n, optimizer); optimizer.zero_grad()

    and `allocator.cut(optimizer)` after `end`. With a Trainer use `RankCallback`.

    Args:
        model: with a plain adapter that trains, of the rank to begin with.
        target_rank: the mean rank of a layer at the end, which may be a fraction: target = target_rank · layers.
        energy: instead: what stays in each layer is the fewest parts that hold this share, in (0, 1], of what its parts
            matter together; with "spectrum" that is the share of ‖ΔW‖². During the schedule it falls from 1.
        importance: "sensitivity" (AdaLoRA's, from gradients) or "spectrum" (the singular values of ΔW).
        adapter: its name; None: the only one that trains.
        begin, end: steps between which parts are taken away.
        every: steps from one allocation to the next.
        beta1, beta2: of the averages of "sensitivity".

    Attributes:
        target: parts that stay, of the whole adapter; None with `energy`.
        kept: path → which parts stay, (R,) bool; empty before the first allocation.
        settled: the schedule has ended: what stays is fixed.

    Raises:
        LoRAConfigError: an argument is impossible. LoRANameError: several adapters train.
        LoRAStateError: none does. LoRAUnsupportedError: it adapts slices of fused layers, or has a vector of the rank.

    Source: Zhang et al. 2023 (arXiv:2303.10512), sections 3.2 and 3.3.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        end: int,
        target_rank: float | None = None,
        energy: float | None = None,
        importance: Literal["sensitivity", "spectrum"] = "sensitivity",
        adapter: str | None = None,
        begin: int = 0,
        every: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        check(target_rank, energy, importance, every, beta1, beta2)
        if not 0 <= begin < end:
            raise _wrong("end", end, f"a step after begin={begin!r}, which is 0 at least")
        self.model, self.name = model, _trained(model, adapter).name
        refuse_sharded(model, "Ranks cannot be found", "Find them in one process, or with DDP.")
        self.begin, self.end, self.every, self.energy = begin, end, every, energy
        self._pairs = self._read_pairs()
        self.parts = sum(A.shape[0] for A, _, _ in self._pairs.values())
        self.target: int | None = None
        if target_rank is not None:
            self.target = round(target_rank * len(self._pairs))
            if not 1 <= self.target <= self.parts:
                most = self.parts / len(self._pairs)
                raise _wrong("target_rank", target_rank, f"a mean rank of at most {most:g}, the adapter's own")
        self._criterion: Criterion = CRITERIA[importance](beta1, beta2)
        self.kept: dict[str, Tensor] = {}
        self.settled = False

    # ---- while training ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self) -> None:
        """Look at the gradients: after the backward, before the optimizer's step."""
        if not self.settled:
            self._criterion.observe(self._pairs)

    def left(self, step: int) -> float:
        """What the schedule leaves at a step: parts of the whole adapter, or a share of each layer with `energy`."""
        missing = min(max((self.end - step) / (self.end - self.begin), 0.0), 1.0) ** 3
        if self.target is None:
            assert self.energy is not None
            return self.energy + (1 - self.energy) * missing
        return int((self.parts - self.target) * missing + self.target)

    @torch.no_grad()
    def step(self, step: int, optimizer: Any = None) -> None:
        """Zero what the schedule does not leave: after the optimizer's step number `step`, which counts from 1.

        Args:
            optimizer: needed by "spectrum", which begins its state anew.
        """
        if step <= self.begin:
            return
        if not self.settled and (step >= self.end or step % self.every == 0):
            self._allocate(self.left(step), optimizer)
            self.settled = step >= self.end
            self._zero()
        elif self.settled:
            self._zero()

    def _allocate(self, left: float, optimizer: Any) -> None:
        scores = self._criterion.scores(self._pairs, optimizer)
        self.kept = shares(scores, left) if self.target is None else largest(scores, int(left))

    def _zero(self) -> None:
        for path, (_, B, _) in self._pairs.items():
            B.masked_fill_(~self.kept[path].to(B.device), 0)

    @property
    def ranks(self) -> dict[str, int]:
        """Path → the rank that stays."""
        return {
            path: int(self.kept[path].sum()) if self.kept else pair[0].shape[0] for path, pair in self._pairs.items()
        }

    # ---- the end -----------------------------------------------------------------------------------------------------

    @property
    def cuttable(self) -> bool:
        """Whether the schedule has ended and the adapter has nothing but what stays: a cut then changes no output."""
        return self.settled and not any(
            bool(B.detach()[:, ~self.kept[path].to(B.device)].any()) for path, (_, B, _) in self._pairs.items()
        )

    def cut(self, optimizer: Any = None) -> dict[str, int]:
        """Take the zeroed parts away, and return the ranks. A layer that keeps none leaves the adapter.

        The adapter goes on training, in Parameters of its own.

        Args:
            optimizer: holds the Parameters; it is given the new ones, with the rows of its state that stay.

        Raises:
            LoRAStateError: the schedule has not ended, or the adapter was changed since; or no part is left.
        """
        if not self.cuttable:
            raise LoRAStateError(
                "The ranks are not settled, so nothing is cut."
                if not self.settled
                else "The adapter has other values than the schedule left, so nothing is cut.",
                name=self.name,
                value=self.ranks,
                remedy=f"Call step() up to end={self.end} first.",
            )
        value, record = read(self.model, self.name), require(self.model).entry(self.name).record
        factors: dict[str, Factors] = {}
        for path, pair in value.factors.items():
            kept = self.kept[path].nonzero()[:, 0]
            if len(kept):
                alpha = pair.scaling * (math.sqrt(len(kept)) if pair.use_rslora else len(kept))
                A, B = pair.A[kept].contiguous(), pair.B[:, kept].contiguous()
                factors[path] = dataclasses.replace(pair, A=A, B=B, alpha=alpha)
        if not factors:
            raise LoRAStateError("No part of the adapter matters, so it cannot be cut.", name=self.name)
        freeze_a, before = value.config.freeze_a, self._pairs
        value = described(dataclasses.replace(value, factors=factors))
        value = dataclasses.replace(value, config=value.config.replace(freeze_a=freeze_a))
        put(self.model, value, self.name, trainable=True, replace=True)
        own = require(self.model).entry(self.name).record
        own.skipped, own.architecture, own.run = record.skipped, record.architecture, record.run
        self._pairs = self._read_pairs()
        if optimizer is not None:
            _rebind(optimizer, before, self._pairs, self.kept)
        self.kept = {path: torch.ones(A.shape[0], dtype=torch.bool) for path, (A, _, _) in self._pairs.items()}
        return self.ranks

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """What a run needs to go on, as tensors."""
        kept = {f"kept.{path}": mask for path, mask in self.kept.items()}
        return {**self._criterion.averages, **kept, "settled": torch.tensor(self.settled)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        devices = {path: pair[0].device for path, pair in self._pairs.items()}
        averages: dict[str, Tensor] = {}
        self.kept = {}
        for key, tensor in state.items():
            kind, _, path = key.partition(".")
            if kind == "kept":
                self.kept[path] = tensor.cpu()
            elif kind != "settled":
                averages[key] = tensor.to(devices[path.partition(".")[2]], copy=True)
        self._criterion.averages = averages
        self.settled = bool(state["settled"])

    def _read_pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter, float]]:
        entry, found = require(self.model).entry(self.name), {}
        if entry.record.experts:
            raise LoRAUnsupportedError(
                f"{entry.record.experts[0]}: ranks are found of layers, and the experts of a parameter share one rank.",
                name="target_parameters",
                value=entry.record.experts,
                remedy="Let an adapter with target_modules alone train by this schedule.",
            )
        for path in entry.record.layers:
            module = self.model.get_submodule(path)
            assert isinstance(module, LoRALinear)
            slot = module.lora_slots.slots[entry.slot]
            odd = next((EXTRAS[name].field for name in slot.extras if EXTRAS[name].size == "rank"), None)
            odd = "ensure_weight_tying" if entry.slot in module.lora_slots.leaders else odd
            odd = "target_modules" if slot.blocks else "init" if slot.anchored else odd
            if odd is not None:
                raise LoRAUnsupportedError(
                    f"{path}: ranks are found of a plain pair of a whole layer, and this one has {odd}.",
                    name=odd,
                    value=path,
                    remedy="Name fused layers themselves, begin with a start that adds nothing, and leave out variants "
                    "with a vector of the rank.",
                )
            A, B = (module.lora_slots.get_parameter(f"{side}{entry.slot}") for side in "AB")
            found[path] = A, B, slot.scaling
        return found


def check(target_rank: Any, energy: Any, importance: Any, every: Any, beta1: Any = 0.85, beta2: Any = 0.85) -> None:
    """Raise `LoRAConfigError` if one of the arguments is impossible."""
    if (target_rank is None) == (energy is None):
        raise _wrong("target_rank", target_rank, "given, or energy is: one of the two")
    if target_rank is not None and not (_number(target_rank) and target_rank > 0):
        raise _wrong("target_rank", target_rank, "a mean rank above 0")
    if energy is not None and not (_number(energy) and 0 < energy <= 1):
        raise _wrong("energy", energy, "a share in (0, 1]")
    if importance not in CRITERIA:
        raise _wrong("importance", importance, f"one of {', '.join(map(repr, CRITERIA))}")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise _wrong("every", every, "a number of steps")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not _number(beta) or not 0 <= beta < 1:
            raise _wrong(name, beta, "a number in [0, 1)")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, value: Any, expected: str) -> LoRAConfigError:
    return LoRAConfigError(f"{name}={value!r} is not {expected}.", name=name, value=value, expected=expected)


def _trained(model: nn.Module, adapter: str | None) -> Entry:
    entries = [entry for entry in require(model).entries.values() if entry.trainable]
    if adapter is not None:
        entries = [entry for entry in entries if entry is require(model).entry(adapter)]
    if not entries:
        raise LoRAStateError(
            f"No adapter{'' if adapter is None else f' {adapter!r}'} trains.", remedy="Call train_lora('…') first."
        )
    if len(entries) > 1:
        names = tuple(entry.name for entry in entries)
        raise LoRANameError(
            f"{len(names)} adapters train: {', '.join(map(repr, names))}.",
            expected=names,
            remedy="Name one: adapter='…'.",
        )
    return entries[0]


def _rebind(optimizer: Any, before: Pairs, after: Pairs, kept: Mapping[str, Tensor]) -> None:
    """Give an optimizer the new Parameters in place of the old ones, and of their state the parts that stay."""
    new: dict[int, nn.Parameter | None] = {}
    for path, (A, B, _) in before.items():
        own = after.get(path)
        for dim, old in enumerate((A, B)):
            new[id(old)] = None if own is None else own[:2][dim]
            state = optimizer.state.pop(old, None)
            if state is not None and own is not None:
                index = kept[path].nonzero()[:, 0].to(old.device)
                optimizer.state[own[dim]] = {
                    key: item.index_select(dim, index) if isinstance(item, Tensor) and item.shape == old.shape else item
                    for key, item in state.items()
                }
    for group in optimizer.param_groups:
        group["params"] = [own for p in group["params"] if (own := new.get(id(p), p)) is not None]
