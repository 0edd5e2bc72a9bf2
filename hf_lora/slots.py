"""What the adapters hold of one layer, and what they add to its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .routing import rows_of, unflattened
from .rowmaps import inner_rows, picked, uniform
from .state import Active, Entry, LoRAState, active_rows
from .variants import VARIANTS

__all__ = ["CHANNELS_FIRST", "LoRASlots", "Slot", "block_index"]

BATCHED = ("batch", "flat", "windows", "second")  # row maps that need to know no more than the number of rows
CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


@dataclass
class Slot:
    """What one adapter is on one layer."""

    rank: int = 0  # R; 0 where the adapter only trains the layer's bias
    alpha: float = 1.0
    scaling: float = 1.0
    dropout: float = 0.0
    trainable: bool = False
    variant: str = "plain"
    blocks: tuple[Any, ...] = ()  # the fused layer's (role, rows) that the pair is made of; () for the whole layer
    bias: bool = False


class LoRASlots(nn.Module):
    """The adapters of one layer, by slot.

    A trainable adapter is a pair of Parameters `A<slot>` (R, in) and `B<slot>` (out, R), in float32. Frozen ones
    stand in two buffers, `bank_A` (slots, R_max, in) and `bank_B` (slots, out, R_max), padded with zeros to the largest
    rank, in the layer's compute dtype, their scaling already in B. A trained bias is held, frozen, as its difference
    from the layer's own.
    """

    bank_A: Tensor
    bank_B: Tensor
    bank_bias: Tensor

    def __init__(
        self,
        state: LoRAState,
        kind: str,
        in_features: int,
        out_features: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        row_map: str = "batch",
    ) -> None:
        super().__init__()
        self.state, self.kind, self.row_map = state, kind, row_map
        self.in_features, self.out_features = in_features, out_features
        self.slots: dict[int, Slot] = {}
        for name, shape in (
            ("bank_A", (0, 0, in_features)),
            ("bank_B", (0, out_features, 0)),
            ("bank_bias", (0, out_features)),
        ):
            self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype), persistent=False)

    # ---- putting and reading ----------------------------------------------------------------------------------------

    def put_trainable(self, index: int, slot: Slot, A: Tensor | None, B: Tensor | None, bias: Tensor | None) -> None:
        """Hold an adapter as Parameters. A: (R, in). B: (out, R), or compact (rows, r) where the slot has blocks."""
        self.remove(index)
        device = self.bank_A.device
        for name, tensor in ((f"A{index}", A), (f"B{index}", B), (f"bias{index}", bias)):
            if tensor is not None:
                parameter = nn.Parameter(tensor.detach().clone().to(device))
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # init_weights() leaves it alone
                self.register_parameter(name, parameter)
        if slot.blocks:
            rows, columns = block_index(slot.blocks, slot.rank)
            self.register_buffer(f"rows{index}", rows.to(device), persistent=False)
            self.register_buffer(f"columns{index}", columns.to(device), persistent=False)
        self.slots[index] = slot

    def put_frozen(self, index: int, slot: Slot, A: Tensor | None, B: Tensor | None, bias: Tensor | None) -> None:
        """Write an adapter into the banks, cast once. A: (R, in). B: (out, R), unscaled, dense. bias: b' − b (out,)."""
        self.remove(index)
        self._grow(index + 1 if A is not None else 0, slot.rank, index + 1 if bias is not None else 0)
        if A is not None and B is not None:
            self.bank_A[index, : slot.rank].copy_(A)
            self.bank_B[index, :, : slot.rank].copy_(
                B if slot.scaling == 1 else _wide(B.to(self.bank_B.device)) * slot.scaling
            )
        if bias is not None:
            self.bank_bias[index].copy_(bias)
        self.slots[index] = slot

    def _grow(self, slots: int, rank: int, biases: int) -> None:
        # Capacity doubles, so that loading n adapters copies O(n), and a compiled graph sees few new shapes.
        have, widest = self.bank_A.shape[:2]
        if slots > have or rank > widest:
            size = max(have, 1 << max(slots - 1, 0).bit_length() if slots else 0)
            widest = max(widest, rank)
            self.bank_A = _grown(self.bank_A, (size, widest, self.in_features))
            self.bank_B = _grown(self.bank_B, (size, self.out_features, widest))
        if biases > self.bank_bias.shape[0]:
            self.bank_bias = _grown(self.bank_bias, (1 << (biases - 1).bit_length(), self.out_features))

    def remove(self, index: int) -> None:
        """Forget an adapter; its place in the banks is zero again."""
        slot = self.slots.pop(index, None)
        if slot is None:
            return
        for name in (f"A{index}", f"B{index}", f"bias{index}"):
            self._parameters.pop(name, None)
        for name in (f"rows{index}", f"columns{index}"):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        if not slot.trainable:
            for bank in (self.bank_A, self.bank_B, self.bank_bias):
                if index < bank.shape[0]:
                    bank[index].zero_()

    def dense(
        self, index: int, of: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor
    ) -> tuple[Tensor, Tensor] | None:
        """A (R, in) and the dense, unscaled B (out, R) of a trainable adapter; None without factors.

        Args:
            of: what to take for a Parameter, given its name here and itself.
        """
        slot = self.slots[index]
        if not slot.rank:
            return None
        A, B = (of(key, self.get_parameter(key)) for key in (f"A{index}", f"B{index}"))
        if slot.blocks:
            rows, columns = (self.get_buffer(f"{key}{index}").to(B.device) for key in ("rows", "columns"))
            B = functional.place_blocks(B, rows, columns, self.out_features, slot.rank)
        return A, B

    def factors(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R), dense and scaled, in `dtype`, of any adapter of this layer."""
        slot = self.slots[index]
        if not slot.trainable:
            return self.bank_A[index, : slot.rank].to(dtype), self.bank_B[index, :, : slot.rank].to(dtype)
        pair = self.dense(index)
        assert pair is not None
        A, B = pair
        return A.to(dtype), (B if slot.scaling == 1 else B * slot.scaling).to(dtype)

    def bias_delta(self, index: int, bias: Tensor | None) -> Tensor:
        """What the adapter changes the bias by, b' − b, (out,)."""
        if not self.slots[index].trainable:
            return self.bank_bias[index]
        trained = self.get_parameter(f"bias{index}")
        return trained if bias is None else trained - bias.to(trained.dtype)

    # ---- forward ----------------------------------------------------------------------------------------------------

    def add(self, x: Tensor, output: Tensor, base: nn.Module) -> Tensor:
        """`output` + what the active adapters add to it.

        Args:
            x: the layer's input: (..., in), or token ids (...) of an embedding.
            output: the base layer's output, (..., out).
            base: the layer, for its bias and an embedding's scale.
        """
        if torch.compiler.is_compiling():
            return self._add_compiled(x, output, base)
        active = self.state.current
        if active.rows is not None:
            return self._add_routed(x, output, base, active)
        for entry, weight in active.mixture:
            slot = self.slots.get(entry.check().slot)
            if slot is not None:
                output = self._add_one(x, output, base, entry.slot, slot, weight)
        return output

    def _add_one(
        self, x: Tensor, output: Tensor, base: nn.Module, index: int, slot: Slot, weight: float | Tensor
    ) -> Tensor:
        """`output` + weight · the adapter's delta; `weight` is a number, or (N, 1, …) with one for each row."""
        scaled = isinstance(weight, Tensor) or weight != 1
        if slot.rank:
            delta = self._delta(x, output, base, index, slot)
            output = output + (delta * weight if scaled else delta).to(output.dtype)
        if slot.bias:
            bias = self.bias_delta(index, getattr(base, "bias", None)).to(output.dtype)
            bias = bias.view(-1, *[1] * (output.dim() - 2)) if isinstance(base, CHANNELS_FIRST) else bias
            output = output + (bias * weight if scaled else bias).to(output.dtype)
        return output

    def _delta(self, x: Tensor, output: Tensor, base: nn.Module, index: int, slot: Slot) -> Tensor:
        dtype = output.dtype if self.kind == "embedding" else x.dtype  # the factors are cast, never the activations
        A, B = self.factors(index, dtype)
        dropout = slot.dropout if self.training else 0.0
        padding = getattr(base, "padding_idx", None)
        delta = VARIANTS[slot.variant].delta(x, A, B, kind=self.kind, dropout=dropout, padding_idx=padding)
        return _embed_scaled(delta, base) if self.kind == "embedding" else delta

    def _trainable(self) -> Iterator[tuple[int, Slot]]:
        return ((index, slot) for index, slot in self.slots.items() if slot.trainable)

    def _add_routed(self, x: Tensor, output: Tensor, base: nn.Module, active: Active) -> Tensor:
        here = [entry for entry in active.entries if entry.check().slot in self.slots]
        if not here:
            return output
        if self.row_map not in BATCHED or (self.kind == "embedding" and x.dim() == 1):  # a table by place, say
            return self._add_mapped(x, output, base, active, here)
        shape = output.shape
        if self.row_map == "second":  # (T, B, d)
            x, output = x.transpose(0, 1), output.transpose(0, 1)
        elif self.row_map == "windows" or (self.row_map == "flat" and x.dim() == 2):
            x, output = unflattened(active, x), unflattened(active, output)  # the rows one after another: (B, T, d)
        rows = rows_of(active, x, self.row_map)
        if any(not self.slots[entry.slot].trainable for entry in here):
            # A tensor made under inference_mode cannot take part in autograd later: each mode has its own.
            key = (self, self.bank_A.device, self.bank_A.dtype, torch.is_inference_mode_enabled())
            if key not in active.cache:  # gathered once for each route, not for each call
                active.cache[key] = self._gather(rows)
            output = self._add_gathered(x, output, base, *active.cache[key])
        for entry in here:
            slot = self.slots[entry.slot]
            if slot.trainable:
                chosen = torch.tensor([row is entry for row in rows], device=output.device)
                weight = chosen.view(-1, *[1] * (output.dim() - 1)).to(output.dtype)
                output = self._add_one(x, output, base, entry.slot, slot, weight)
        return output.transpose(0, 1) if self.row_map == "second" else output.reshape(shape)

    def _add_mapped(self, x: Tensor, output: Tensor, base: nn.Module, active: Active, here: list[Entry]) -> Tensor:
        """`output` + the deltas, where the batch is not the rows: each adapter's entries are picked, and put back."""
        if uniform(active):
            return self._add_one(x, output, base, here[0].slot, self.slots[here[0].slot], 1.0)
        rows, axis = inner_rows(active, x, self.row_map)
        inner, whole = (x, output) if axis == 0 else (x[0], output[0])
        for entry in here:
            index = picked(active, entry, rows, x.device)
            changed = self._add_one(inner[index], whole[index], base, entry.slot, self.slots[entry.slot], 1.0)
            whole = whole.index_copy(0, index, changed)
        return whole if axis == 0 else whole[None]

    def _gather(self, rows: tuple[Entry | None, ...]) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Each row's A (N, R, in; None of an embedding), B (N, out, R), slot (N,) and bias (N, out)."""
        frozen = {index: slot for index, slot in self.slots.items() if not slot.trainable}
        mine = [-1 if entry is None else entry.slot for entry in rows]
        device, dtype = self.bank_A.device, self.bank_B.dtype

        def chosen(wanted: set[int]) -> tuple[Tensor, Tensor]:
            """Slots (N,), 0 where a row has none of the wanted, and 1 or 0 (N,) for whether it has."""
            index = torch.tensor([i if i in wanted else 0 for i in mine], device=device)
            return index, torch.tensor([i in wanted for i in mine], device=device).to(dtype)

        slots, mask = chosen({index for index, slot in frozen.items() if slot.rank})
        A = B = bias = None
        if bool(mask.any()):
            bank_A, bank_B = self.bank_A, self.bank_B
            rank = min(bank_A.shape[1], bank_B.shape[2])  # another thread may be widening them one after the other
            A = None if self.kind == "embedding" else bank_A[slots, :rank]
            B = bank_B[slots, :, :rank] * mask.view(-1, 1, 1)
        biased, mask = chosen({index for index, slot in frozen.items() if slot.bias})
        if bool(mask.any()):
            bias = self.bank_bias[biased] * mask.view(-1, 1)
        return A, B, slots, bias

    def _add_gathered(
        self,
        x: Tensor,
        output: Tensor,
        base: nn.Module,
        A: Tensor | None,
        B: Tensor | None,
        slots: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        if self.kind == "embedding" and B is not None:
            flat = x.reshape(x.shape[0], -1)
            h = self.bank_A[:, : B.shape[2]][slots.view(-1, 1), :, flat]  # (N, T, R)
            delta = torch.bmm(h.to(output.dtype), B.to(output.dtype).transpose(1, 2)).reshape(output.shape)
            output = output + _embed_scaled(delta, base)
        elif A is not None and B is not None:
            output = output + functional.grouped_low_rank(x, A.to(x.dtype), B.to(x.dtype)).to(output.dtype)
        if bias is not None:
            output = output + _bias_rows(bias, output, base)
        return output

    def _add_compiled(self, x: Tensor, output: Tensor, base: nn.Module) -> Tensor:
        """The one graph that serves every switch, weight and route: what is active arrives as tensors."""
        if not self.slots:
            return output
        traced = self.state.traced
        row_map = "batch" if self.row_map == "flat" and x.dim() != 2 else self.row_map
        row_map = "inner" if self.kind == "embedding" and x.dim() == 1 else "flat" if row_map == "windows" else row_map
        plain = traced is not None and row_map == "batch"
        slots, weights = traced if plain and traced is not None else active_rows(x, self.state, row_map)
        ones = [1] * (output.dim() - 1)
        for index, slot in self._trainable():
            weight = (weights * (slots == index)).sum(1).view(-1, *ones)
            output = self._add_one(x, output, base, index, slot, weight.to(output.dtype))
        if self.bank_A.shape[0]:
            within = slots.clamp(max=self.bank_A.shape[0] - 1)
            weights_in = weights * (slots < self.bank_A.shape[0])
            B = self.bank_B[within] * weights_in[:, :, None, None].to(self.bank_B.dtype)  # (N, K, out, R)
            B = B.permute(0, 2, 1, 3).flatten(2)  # (N, out, K·R)
            if self.kind == "embedding":
                flat = x.reshape(x.shape[0], -1)
                h = self.bank_A[within[:, None, :], :, flat[:, :, None]].flatten(2)  # (N, T, K·R)
                delta = torch.bmm(h.to(output.dtype), B.to(output.dtype).transpose(1, 2)).reshape(output.shape)
                output = output + _embed_scaled(delta, base)
            else:
                A = self.bank_A[within].flatten(1, 2)  # (N, K·R, in)
                output = output + functional.grouped_low_rank(x, A.to(x.dtype), B.to(x.dtype)).to(output.dtype)
        if self.bank_bias.shape[0]:
            within = slots.clamp(max=self.bank_bias.shape[0] - 1)
            chosen = weights * (slots < self.bank_bias.shape[0])
            bias = (self.bank_bias[within] * chosen[:, :, None].to(self.bank_bias.dtype)).sum(1)
            output = output + _bias_rows(bias, output, base)
        return output

    def extra_repr(self) -> str:
        """Kind, sizes and ranks, for `print(model)`."""
        ranks = ", ".join(f"{i}: r={s.rank}{' trainable' if s.trainable else ''}" for i, s in self.slots.items())
        return f"{self.kind}, {self.in_features} -> {self.out_features}; {ranks}"


def block_index(blocks: tuple[Any, ...], rank: int) -> tuple[Tensor, Tensor]:
    """Rows (n, 1) and columns (n, r) in the dense B of the compact rows of a fused layer's blocks."""
    r = rank // len(blocks)
    rows, columns = [], []
    for i, (_, ranges) in enumerate(blocks):
        index = torch.cat([torch.arange(span.start, span.stop) for span in ranges])
        rows.append(index.view(-1, 1))
        columns.append(torch.arange(i * r, (i + 1) * r).expand(len(index), r))
    return torch.cat(rows), torch.cat(columns)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _grown(bank: Tensor, shape: tuple[int, ...]) -> Tensor:
    grown = bank.new_zeros(shape)
    grown[tuple(slice(0, n) for n in bank.shape)].copy_(bank)
    return grown


def _bias_rows(bias: Tensor, output: Tensor, base: nn.Module) -> Tensor:
    """A bias for each row, (N, out), in a shape that adds to the output."""
    ones = [1] * (output.dim() - 2)
    features = [bias.shape[1]]
    return bias.to(output.dtype).view(-1, *(features + ones if isinstance(base, CHANNELS_FIRST) else ones + features))


def _embed_scaled(delta: Tensor, base: nn.Module) -> Tensor:
    scale = getattr(base, "embed_scale", None)  # Gemma's and BART's embeddings multiply what they look up
    if scale is None:
        return delta
    return delta * (scale.to(delta.dtype) if isinstance(scale, Tensor) else scale)
