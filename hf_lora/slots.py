"""What the active adapters add to a layer's output."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, fused
from .activation import acted, mask_compiled, reach_of
from .banks import LoRABanks, Slot, block_index
from .dropout import dropout as dropped_out
from .routing import rows_of, unflattened
from .rowmaps import inner_rows, picked
from .state import Active, Entry, active_rows, tracing
from .variants import PLAIN, Narrow

__all__ = ["CHANNELS_FIRST", "LoRASlots", "Slot", "block_index"]

BATCHED = ("batch", "flat", "windows", "second")  # row maps that need to know no more than the number of rows
CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


@dataclass(eq=False)
class _Plan:
    """What a route is to one layer, gathered once for the route and not for each call."""

    bank: Tensor  # what it was gathered from
    removals: int  # of the state, when the adapters were last seen to be there
    rows: int = 0  # N; 0 where the route adds nothing here
    A: Tensor | None = None  # (N, R, in), frozen factors of each row; None of an embedding
    B: Tensor | None = None  # (N, R, out)
    places: Tensor | None = None  # (N,), an embedding's rows of the bank
    bias: Tensor | None = None  # (N, out)
    gain: Tensor | None = None  # (N, out), less 1
    rounded: tuple[tuple[str, Tensor], ...] = ()  # what stands for the weight, and in which rows: (N,), 1 or 0
    trained: tuple[tuple[int, Slot, Tensor], ...] = ()  # slot, and which rows take it: (N,), 1 or 0

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        chosen = [rows for _, _, rows in self.trained] + [rows for _, rows in self.rounded]
        tensors = [self.A, self.B, self.bias, self.gain, *chosen]
        return sum(t.nbytes for t in tensors if t is not None)


class LoRASlots(LoRABanks):
    """The adapters of one layer, and what they add to its output."""

    def add(self, x: Tensor, output: Tensor, base: nn.Module) -> Tensor:
        """`output` + what the active adapters add to it.

        Args:
            x: the layer's input: (..., in), or token ids (...) of an embedding.
            output: the base layer's output, (..., out).
            base: the layer, for its bias and an embedding's scale.
        """
        if tracing():
            return self._add_compiled(x, output, base)
        active = self.state.current
        if self.invoked and active.invoked:
            return self._add_activated(x, output, base, active)
        if active.rows is not None:
            return self._add_routed(x, output, base, active)
        origin = output
        for entry, weight in active.mixture:
            slot = self.slots.get(entry.check().slot)
            if slot is not None:
                output = self._add_one(x, output, base, entry.slot, slot, weight, origin)
        return output

    def fused(self, x: Tensor, base: nn.Module) -> Tensor | None:
        """The output of a dense base + what the active adapters add to it, where one operation does both.

        That is in training mode, where one adapter is active here, and trainable, and the base is frozen and of x's
        dtype. Whether autograd records makes no difference, so that a checkpointed region draws what its recompute
        draws. In eval mode the sums are those of a frozen adapter, bit for bit; and where another weight stands for the
        layer's the layer's own product is not made.
        """
        if tracing():
            return None
        if not self.training:
            return self._instead(x, base) if self.gained else None
        found: tuple[int, Slot, float] | None = None
        for entry, weight in self.state.current.mixture:
            slot = self.slots.get(entry.check().slot)
            if slot is not None:
                plain = slot.trainable and slot.rank and not (slot.bias or slot.extras or slot.invoked)
                if found is not None or not plain:
                    return None
                if slot.form is not None and slot.form.pooled:  # what it keeps for the backward is narrower than x
                    return None
                found = entry.slot, slot, weight
        if found is None:
            return None
        index, slot, weight = found
        own: Any = getattr(self, slot.rounded) if slot.rounded else base.weight
        bias: Tensor | None = base.bias  # type: ignore[assignment]
        if not fused.fits(x, own, bias) or (slot.rounded and weight != 1):
            return None
        factors = self.dense(index, learned=True)
        assert factors is not None
        dropout = slot.dropout if self.training else 0.0
        return PLAIN.whole(x, own, bias, *factors, slot.scaling * weight, dropout=dropout)

    def _instead(self, x: Tensor, base: nn.Module) -> Tensor | None:
        """The output where one adapter alone is active here, and another weight stands for the layer's under it."""
        active = self.state.current
        here = [] if active.rows is not None else [(e, w) for e, w in active.mixture if e.check().slot in self.slots]
        if len(here) != 1 or here[0][1] != 1:
            return None
        index = here[0][0].slot
        slot = self.slots[index]
        if not slot.rounded:
            return None
        output = F.linear(x, getattr(self, slot.rounded), getattr(base, "bias", None))
        return self._add_one(x, output, base, index, dataclasses.replace(slot, rounded=""), 1.0)

    def _add_one(
        self,
        x: Tensor,
        output: Tensor,
        base: nn.Module,
        index: int,
        slot: Slot,
        weight: float | Tensor,
        origin: Tensor | None = None,
    ) -> Tensor:
        """`output` + weight · what the adapter changes; `weight` is a number, or (N, 1, …) with one for each row.

        `origin`: the layer's own output, where `output` holds more already; an adapter with a gain multiplies that.
        """
        scaled = isinstance(weight, Tensor) or weight != 1
        if slot.rounded:
            output = self._rounded(x, output, base, slot.rounded, weight, origin)
        dropout = slot.dropout
        if dropout and (not self.training or self.kind == "embedding"):
            dropout = 0.0
        if slot.extras and slot.trainable:
            own = output if origin is None else origin
            changed = self._changed(x, own, base, index, dropout)
            output = output + (changed - own) * weight if scaled or own is not output else changed
        elif slot.rank:
            if slot.gain:
                own = output if origin is None else origin
                if dropout:  # what is multiplied sees the input that A sees
                    x, dropout = dropped_out(x, dropout), 0.0
                    own = self.base.forward(base, x)
                gain = _along(self.bank_gain[index].to(output.dtype), output, base)
                output = torch.addcmul(output, own, gain * weight)
            pair = None if slot.trainable or isinstance(weight, Tensor) else self._fused(x, output, index, dropout)
            if pair is not None and not isinstance(weight, Tensor):
                output = PLAIN.add(output, x, *pair, weight, in_place=self._in_place())
            else:
                delta = self._delta(x, output, base, index, dropout)
                output = output + (delta * weight if scaled else delta).to(output.dtype)
        if slot.bias:
            bias = _along(self.bias_delta(index, getattr(base, "bias", None)).to(output.dtype), output, base)
            output = output + (bias * weight if scaled else bias).to(output.dtype)
        return output

    def _rounded(
        self,
        x: Tensor,
        output: Tensor,
        base: nn.Module,
        name: str,
        weight: float | Tensor,
        origin: Tensor | None = None,
    ) -> Tensor:
        """`output` + weight · what changes when another weight stands for the layer's. Arguments: as of `_add_one`."""
        own = output if origin is None else origin
        instead = F.linear(x, getattr(self, name), getattr(base, "bias", None))
        if own is output and not isinstance(weight, Tensor) and weight == 1:
            return instead
        return output + (instead - own) * weight

    def _changed(self, x: Tensor, own: Tensor, base: nn.Module, index: int, dropout: float) -> Tensor:
        """The layer's `own` output as a trainable adapter of a variant changes it."""
        effect, dtype = self.effect(index, base), own.dtype if self.kind == "embedding" else x.dtype
        A, B = effect.A.to(dtype), effect.B.to(dtype)
        narrow: Narrow = self.narrowing(index) if self.training and self.slots[index].settings else F.linear
        inner = dropped_out(x, dropout) if dropout else x
        plain = self.kind not in ("embedding", "conv") and own.dtype == dtype
        if effect.fixed is not None:  # never beside a gain
            C, D = (part.to(dtype) for part in effect.fixed)
            own = own + functional.low_rank(x, C, D).to(own.dtype)
        if effect.gain is None or not dropout:
            if plain:
                changed = summed = functional.add_wide(own, narrow(inner, A), B.T)
            else:
                changed = summed = own + self._widened(inner, A, B, base, narrow).to(own.dtype)
        else:  # what the gain multiplies sees the input that A sees
            delta = self._widened(inner, A, B, base, narrow).to(own.dtype)
            summed = self.base.forward(base, inner) + delta
            changed = own + delta
        if effect.gain is not None:
            bias = None if self.kind == "embedding" else getattr(base, "bias", None)
            # Not gain ∘ summed: in half precision what a gain differs from 1 by has more digits than the gain.
            less = summed if bias is None else summed - _along(bias, summed, base)
            changed = torch.addcmul(changed, less, _along((effect.gain - 1).to(changed.dtype), changed, base))
        return changed if effect.offset is None else changed + _along(effect.offset.to(changed.dtype), changed, base)

    def _in_place(self) -> bool:
        """Whether the base's output is a new tensor that nobody needs any more, autograd included."""
        return self.fresh and not (self.gained or self.invoked) and not torch.is_grad_enabled()

    def _fused(self, x: Tensor, output: Tensor, index: int, dropout: float) -> tuple[Tensor, Tensor] | None:
        """The frozen pair, where product and sum are one operation: nothing to cast, nothing dropped."""
        if self.kind == "embedding" or dropout:
            return None
        A, B = self.frozen(index)
        return (A, B) if x.dtype == A.dtype == output.dtype else None

    def _delta(self, x: Tensor, output: Tensor, base: nn.Module, index: int, dropout: float) -> Tensor:
        dtype = output.dtype if self.kind == "embedding" else x.dtype  # the factors are cast, never the activations
        narrow = self._narrow_delta(x, index, dropout) if self.training else None
        if narrow is not None:
            return narrow
        A, B = self.factors(index, dtype)
        if dropout and self.slots[index].extra_rank:
            rank = self.slots[index].rank
            kept = self._scaled_delta(x, A[rank:], B[:, rank:], base, 0.0)
            return kept + self._scaled_delta(x, A[:rank], B[:, :rank], base, dropout)
        return self._scaled_delta(x, A, B, base, dropout)

    def _narrow_delta(self, x: Tensor, index: int, dropout: float) -> Tensor | None:
        """The delta of a trainable adapter whose stored A reads less than x."""
        slot = self.slots[index]
        form = slot.form if slot.trainable else None
        read = None if form is None else form.read(dropped_out(x, dropout) if dropout else x)
        if read is None:
            return None
        A, B = (self.get_parameter(f"{name}{index}") for name in ("A", "B"))
        return functional.low_rank(read, A.to(x.dtype), (B * slot.scaling).to(x.dtype))

    def _scaled_delta(self, x: Tensor, A: Tensor, B: Tensor, base: nn.Module, dropout: float) -> Tensor:
        padding = getattr(base, "padding_idx", None)
        delta = PLAIN.delta(x, A, B, kind=self.kind, dropout=dropout, padding_idx=padding)
        return functional.embed_scaled(delta, base) if self.kind == "embedding" else delta

    def _widened(self, x: Tensor, A: Tensor, B: Tensor, base: nn.Module, narrow: Narrow) -> Tensor:
        if self.kind == "embedding":
            return self._scaled_delta(x, A, B, base, 0.0)
        return F.linear(narrow(x, A), B)

    def _grouped(self, x: Tensor, A: Tensor, B: Tensor, base: nn.Module) -> Tensor:
        """Each row's delta. A: (N, R, in). B: (N, R, out), scaled."""
        return functional.grouped_low_rank(x, A, B)

    def _trainable(self) -> Iterator[tuple[int, Slot]]:
        return ((index, self.slots[index]) for index in self.learning)

    # ---- from an invocation on ---------------------------------------------------------------------------------------

    def _add_activated(self, x: Tensor, output: Tensor, base: nn.Module, active: Active) -> Tensor:
        """The same where an active adapter, here or in another layer, acts from its invocation on alone."""
        reach, shape = reach_of(active), output.shape
        if x.dim() == 2:  # (B·T, in), or one position of each row
            one = self.row_map == "batch"
            x, output = (t[:, None] if one else t.reshape(reach.rows, -1, t.shape[-1]) for t in (x, output))
        origin, learns = output, torch.is_grad_enabled()
        if active.rows is None or active.uniform:
            for entry, weight in active.mixture or ((entry, 1.0) for entry in active.entries):
                slot = self.slots.get(entry.check().slot)
                if slot is not None:
                    part = functools.partial(self._add_part, x, output, base, entry.slot, slot, weight, origin)
                    always = learns and slot.trainable
                    output = acted(reach, reach.of(entry), x, output, part, always=always)
            return output.reshape(shape)
        plan = self._planned(active)
        if plan.rows:
            counts = tuple(0 if e is None else reach.of(e)[i] for i, e in enumerate(active.rows))
            part = functools.partial(self._add_planned_part, x, output, base, plan)
            output = acted(reach, counts, x, output, part, always=learns and bool(plan.trained))
        return output.reshape(shape)

    def _add_part(
        self,
        x: Tensor,
        output: Tensor,
        base: nn.Module,
        index: int,
        slot: Slot,
        weight: float,
        origin: Tensor,
        at: slice,
    ) -> Tensor:
        return self._add_one(x[:, at], output[:, at], base, index, slot, weight, origin[:, at])

    def _add_planned_part(self, x: Tensor, output: Tensor, base: nn.Module, plan: _Plan, at: slice) -> Tensor:
        return self._add_planned(x[:, at], output[:, at], base, plan)

    # ---- a route -----------------------------------------------------------------------------------------------------

    def _add_routed(self, x: Tensor, output: Tensor, base: nn.Module, active: Active) -> Tensor:
        if self.row_map != "batch" or (self.kind == "embedding" and x.dim() == 1):  # a table by place, say
            return self._add_elsewhere(x, output, base, active)
        if active.uniform:  # no need to gather anything
            for entry in active.entries:
                slot = self.slots.get(entry.check().slot)
                if slot is not None:
                    rows_of(active, x)
                    output = self._add_one(x, output, base, entry.slot, slot, 1.0)
            return output
        plan = self._planned(active)
        if not plan.rows:
            return output
        if x.shape[0] != plan.rows:
            rows_of(active, x)  # raises
        return self._add_planned(x, output, base, plan)

    def _add_elsewhere(self, x: Tensor, output: Tensor, base: nn.Module, active: Active) -> Tensor:
        """The same where the rows of the layer's batch come from the user's in another way."""
        here = [entry for entry in active.entries if entry.check().slot in self.slots]
        if not here:
            return output
        if self.row_map not in BATCHED or (self.kind == "embedding" and x.dim() == 1):
            return self._add_mapped(x, output, base, active, here)
        shape = output.shape
        if self.row_map == "second":  # (T, B, d)
            x, output = x.transpose(0, 1), output.transpose(0, 1)
        elif self.row_map == "windows" or (self.row_map == "flat" and x.dim() == 2):
            x, output = unflattened(active, x), unflattened(active, output)  # the rows one after another: (B, T, d)
        rows_of(active, x, self.row_map)
        output = self._add_planned(x, output, base, self._planned(active))
        return output.transpose(0, 1).contiguous() if self.row_map == "second" else output.reshape(shape)

    def _add_mapped(self, x: Tensor, output: Tensor, base: nn.Module, active: Active, here: list[Entry]) -> Tensor:
        """`output` + the deltas, where the batch is not the rows: each adapter's entries are picked, and put back."""
        if active.uniform:
            return self._add_one(x, output, base, here[0].slot, self.slots[here[0].slot], 1.0)
        rows, axis = inner_rows(active, x, self.row_map)
        inner, whole = (x, output) if axis == 0 else (x[0], output[0])
        for entry in here:
            index = picked(active, entry, rows, x.device)
            changed = self._add_one(inner[index], whole[index], base, entry.slot, self.slots[entry.slot], 1.0)
            whole = whole.index_copy(0, index, changed)
        return whole if axis == 0 else whole[None]

    def _add_planned(self, x: Tensor, output: Tensor, base: nn.Module, plan: _Plan) -> Tensor:
        """x: (N, …), N the rows of the route."""
        for name, chosen in plan.rounded:
            weight = chosen.view(-1, *[1] * (output.dim() - 1)).to(output.dtype)
            output = self._rounded(x, output, base, name, weight)
        if plan.gain is not None:
            output = torch.addcmul(output, output, _bias_rows(plan.gain, output, base))
        if plan.A is not None and plan.B is not None:
            if x.dtype == output.dtype == plan.A.dtype and output.dim() > 2 and self.kind != "conv":
                output = functional.add_grouped_low_rank(output, x, plan.A, plan.B, in_place=self._in_place())
            else:
                A, B = plan.A.to(x.dtype), plan.B.to(x.dtype)
                output = output + self._grouped(x, A, B, base).to(output.dtype)
        elif plan.B is not None and plan.places is not None:
            output = output + functional.embed_scaled(self._embedded(x, output, plan.places[:, None], plan.B), base)
        if plan.bias is not None:
            output = output + _bias_rows(plan.bias, output, base)
        for index, slot, chosen in plan.trained:
            weight = chosen.view(-1, *[1] * (output.dim() - 1)).to(output.dtype)
            output = self._add_one(x, output, base, index, slot, weight)
        return output

    def _planned(self, active: Active) -> _Plan:
        plans = active.plans[torch.is_inference_mode_enabled()]
        plan: _Plan | None = plans.get(self)
        bank = self._buffers["bank_A"]
        if plan is None or bank is None:
            plan = plans[self] = self._plan(active)
        elif plan.bank is not bank:  # it grew; or the model moved
            same = (plan.bank.dtype, plan.bank.device) == (bank.dtype, bank.device)
            plan = plans[self] = dataclasses.replace(plan, bank=bank) if same else self._plan(active)
        if plan.removals != self.state.removals:
            for entry in active.entries:
                entry.check()
            plan.removals = self.state.removals
        return plan

    def _plan(self, active: Active) -> _Plan:
        rows, device = active.rows or (), self.bank_A.device
        plan = _Plan(self.bank_A, self.state.removals)
        here = {entry: self.slots.get(entry.check().slot) for entry in active.entries}
        frozen = [e for e, slot in here.items() if slot is not None and slot.rank and not slot.trainable]
        biased = [e for e, slot in here.items() if slot is not None and slot.bias and not slot.trainable]
        gained = [e for e, slot in here.items() if slot is not None and slot.gain and not slot.trainable]
        if any(here.values()):
            plan.rows = len(rows)
        if frozen:
            places, without = _places(active, frozen, device)
            bank_A, bank_B = self.bank_A, self.bank_B
            most = max(slot.rank + slot.extra_rank for slot in (self.slots[entry.slot] for entry in frozen))
            rank = min(most, bank_A.shape[1], bank_B.shape[1])  # another thread may be widening one after the other
            plan.B = bank_B[:, :rank].index_select(0, places).index_fill_(0, without, 0)
            if self.kind == "embedding":
                plan.places = places
            else:
                plan.A = bank_A[:, :rank].index_select(0, places)
        names = dict.fromkeys(self.slots[entry.slot].rounded for entry in frozen)
        plan.rounded = tuple(
            (name, torch.tensor([r in frozen and self.slots[r.slot].rounded == name for r in rows], device=device))
            for name in names
            if name
        )
        if biased:
            plan.bias = self._gathered(self.bank_bias, active, biased)
        if gained:
            plan.gain = self._gathered(self.bank_gain, active, gained)
        plan.trained = tuple(
            (entry.slot, slot, torch.tensor([row is entry for row in rows], device=device))
            for entry, slot in here.items()
            if slot is not None and slot.trainable
        )
        return plan

    @staticmethod
    def _gathered(bank: Tensor, active: Active, present: list[Entry]) -> Tensor:
        """Each row's vector, (N, out); 0 for a row without."""
        places, without = _places(active, present, bank.device)
        return bank.index_select(0, places).index_fill_(0, without, 0)

    def _embedded(self, ids: Tensor, output: Tensor, places: Tensor, B: Tensor) -> Tensor:
        """Each row's A^T[ids] B. ids: (N, …). places: (N, K) rows of the bank. B: (N, K·R, d)."""
        flat = ids.reshape(ids.shape[0], -1)
        rank = B.shape[1] // places.shape[1]
        h = self.bank_A[:, :rank][places[:, None, :], :, flat[:, :, None]].flatten(2)  # (N, T, K·R)
        return torch.bmm(h.to(output.dtype), B.to(output.dtype)).reshape(output.shape)

    # ---- compiled ----------------------------------------------------------------------------------------------------

    def _add_compiled(self, x: Tensor, output: Tensor, base: nn.Module) -> Tensor:
        """The one graph that serves every switch, weight and route: what is active arrives as tensors."""
        traced = self.state.traced
        row_map = "batch" if self.row_map == "flat" and x.dim() != 2 else self.row_map
        row_map = "inner" if self.kind == "embedding" and x.dim() == 1 else "flat" if row_map == "windows" else row_map
        plain = traced is not None and row_map == "batch"
        slots, weights = traced if plain and traced is not None else active_rows(x, self.state, row_map)
        if self.invoked:
            acts = mask_compiled(x, self.state, slots, flat=row_map == "flat")
            if x.dim() > 2:
                return self._add_compiled_activated(x, output, base, slots, weights[:, None] * acts)
            weights = weights * acts
        ones, origin = [1] * (output.dim() - 1), output
        for index, slot in self._trainable():
            weight = (weights * (slots == index)).sum(1).view(-1, *ones)
            output = self._add_one(x, output, base, index, slot, weight.to(output.dtype), origin)
        for name in dict.fromkeys(name for _, name in self.standing):
            chosen = torch.stack([weights * (slots == index) for index, own in self.standing if own == name])
            chosen = chosen.sum((0, 2))
            output = self._rounded(x, output, base, name, chosen.view(-1, *ones).to(output.dtype), origin)
        if self.bank_gain.shape[0]:
            gain = _bias_rows(_chosen(self.bank_gain, slots, weights), output, base)
            output = torch.addcmul(output, origin, gain)
        if self.bank_A.shape[0]:
            here = self.present[slots.clamp(max=self.present.shape[0] - 1)]
            places = torch.where(here, slots, 0)
            B = self.bank_B[places] * (weights * here)[:, :, None, None].to(self.bank_B.dtype)  # (N, K, R, out)
            B = B.flatten(1, 2)  # (N, K·R, out)
            if self.kind == "embedding":
                output = output + functional.embed_scaled(self._embedded(x, output, places, B), base)
            else:
                A = self.bank_A[places].flatten(1, 2)  # (N, K·R, in)
                output = output + self._grouped(x, A.to(x.dtype), B.to(x.dtype), base).to(output.dtype)
        if self.bank_bias.shape[0]:
            output = output + _bias_rows(_chosen(self.bank_bias, slots, weights), output, base)
        return output

    def _add_compiled_activated(
        self, x: Tensor, output: Tensor, base: nn.Module, slots: Tensor, weights: Tensor
    ) -> Tensor:
        """The same with a weight for each position. x: (N, T, …, in). slots: (N, K). weights: (N, T, K)."""
        shape, origin = output.shape, output
        for index, slot in self._trainable():
            weight = (weights * (slots == index)[:, None]).sum(-1).view(*x.shape[:2], *[1] * (x.dim() - 2))
            output = self._add_one(x, output, base, index, slot, weight.to(output.dtype), origin)
        for bank, by in ((self.bank_gain, origin), (self.bank_bias, None)):
            if bank.shape[0]:
                within = weights * (slots < bank.shape[0])[:, None]
                vectors = torch.bmm(within.to(bank.dtype), bank[slots.clamp(max=bank.shape[0] - 1)])  # (N, T, out)
                vectors = vectors.to(output.dtype).view(*x.shape[:2], *[1] * (x.dim() - 3), -1)
                output = output + vectors if by is None else torch.addcmul(output, by, vectors)
        if not self.bank_A.shape[0]:
            return output
        here = self.present[slots.clamp(max=self.present.shape[0] - 1)]
        places = torch.where(here, slots, 0)
        A, B = self.bank_A[places].flatten(1, 2), self.bank_B[places].flatten(1, 2)  # (N, K·R, in), (N, K·R, out)
        flat, dtype = x.flatten(1, -2), x.dtype
        acts = (weights * here[:, None]).repeat_interleave(self.bank_A.shape[1], -1)  # (N, T, K·R)
        acts = acts.repeat_interleave(flat.shape[1] // x.shape[1], 1) if x.dim() > 3 else acts
        h = torch.bmm(flat, A.to(dtype).transpose(1, 2)) * acts.to(dtype)
        return output + torch.bmm(h, B.to(dtype)).view(shape).to(output.dtype)

    def extra_repr(self) -> str:
        """Kind, sizes and ranks, for `print(model)`."""
        ranks = ", ".join(f"{i}: r={s.rank}{' trainable' if s.trainable else ''}" for i, s in self.slots.items())
        return f"{self.kind}, {self.in_features} -> {self.out_features}; {ranks}"


def _places(active: Active, present: list[Entry], device: torch.device) -> tuple[Tensor, Tensor]:
    """The slot of each row of the batch, (N,), any for one without an adapter here; and which rows those are."""
    key = ("places", tuple(entry.slot for entry in present), device, torch.is_inference_mode_enabled())
    if key not in active.cache:  # layers with the same adapters share it
        chosen, rows = set(present), active.rows or ()
        places = [entry.slot if entry in chosen else present[0].slot for entry in rows]
        without = [i for i, entry in enumerate(rows) if entry not in chosen]
        active.cache[key] = tuple(torch.tensor(found, device=device, dtype=torch.int64) for found in (places, without))
    places_and_without: tuple[Tensor, Tensor] = active.cache[key]
    return places_and_without


def _chosen(bank: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each row's vectors, (N, out). slots, weights: (N, K)."""
    within = slots.clamp(max=bank.shape[0] - 1)
    chosen = weights * (slots < bank.shape[0])
    return (bank[within] * chosen[:, :, None].to(bank.dtype)).sum(1)


def _bias_rows(bias: Tensor, output: Tensor, base: nn.Module) -> Tensor:
    """A bias for each row, (N, out), in a shape that adds to the output."""
    ones = [1] * (output.dim() - 2)
    features = [bias.shape[1]]
    return bias.to(output.dtype).view(-1, *(features + ones if isinstance(base, CHANNELS_FIRST) else ones + features))


def _along(vector: Tensor, output: Tensor, base: nn.Module) -> Tensor:
    """A vector, (out,), in a shape that goes along the output's features."""
    return vector.view(-1, *[1] * (output.dim() - 2)) if isinstance(base, CHANNELS_FIRST) else vector
