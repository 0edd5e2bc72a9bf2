"""nn.MultiheadAttention with adapters. It reads its layers' weights and calls none, so its forward is another here.

    q, k, v = x W_inᵀ + b + s · (x Aᵀ) Bᵀ         B: (3d, R), and the same on the output projection

While nothing is active there the module's own forward runs, its fused inference path included. While something is, the
steps are those of its other path, one by one, with the deltas added: no weight is made or merged in a forward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import LoRAUnsupportedError
from .layers import LoRALinear, Swapped, restore, swap
from .slots import LoRASlots
from .state import LoRAState, tracing

__all__ = ["LoRAAttention", "shield", "unshield"]


class LoRAAttention(LoRALinear):
    """nn.MultiheadAttention with adapters on in_proj, here, and on out_proj, in that child's own slots."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's."""
        slots: Any = self._modules.get("lora_slots")
        options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if slots is None:  # another thread gave the class back after this forward had been looked up
            return self(query, key, value, *options)
        if not tracing() and all(e.check().slot not in slots.slots for e in slots.state.current.entries):
            return slots.base.forward(self, query, key, value, *options)
        if query.is_nested or key.is_nested or value.is_nested:
            raise LoRAUnsupportedError(
                "An nn.MultiheadAttention takes nested tensors on its fused inference path alone, which has no LoRA.",
                name="query",
                remedy="Give a padded tensor and key_padding_mask, or merge_lora() first.",
            )
        return _attend(self, slots, query, key, value, *options)


def _attend(
    layer: Any,
    slots: LoRASlots,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    need_weights: bool,
    mask: Tensor | None,
    average: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    batched, turned = query.dim() == 3, layer.batch_first and query.dim() == 3
    together = batched and key is value  # torch projects what is not batched one by one
    same = together and query is key
    if is_causal and mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # torch's own error and words
    # From here on (L, N, E), in which torch computes.
    query, key, value = (t.transpose(0, 1) if turned else t if batched else t[:, None] for t in (query, key, value))
    q, k, v = _projected(layer, slots, query, query if same else key, query if same else key if together else value)
    (length, n, _), heads = q.shape, layer.num_heads
    padding = padding[None] if padding is not None and not batched else padding
    causal = is_causal and padding is None and not need_weights
    total = _mask(None if causal else mask, padding, q, n, heads, length, k.shape[0])
    if layer.bias_k is not None:
        k, v = (torch.cat([t, own.repeat(1, n, 1)]) for t, own in ((k, layer.bias_k), (v, layer.bias_v)))
    if layer.add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(1, n, t.shape[2])]) for t in (k, v))
    if total is not None:
        total = F.pad(total, (0, k.shape[0] - total.shape[-1]))  # whoever is appended is seen
    q, k, v = (t.view(t.shape[0], n * heads, -1).transpose(0, 1) for t in (q, k, v))  # (N·H, L, E/H)
    dropout = layer.dropout if layer.training else 0.0
    shares: Tensor | None = None
    if need_weights:
        scaled = q * math.sqrt(1.0 / q.shape[-1])
        scores = torch.bmm(scaled, k.mT) if total is None else torch.baddbmm(total, scaled, k.mT)
        weights = F.dropout(F.softmax(scores, -1), dropout) if dropout else F.softmax(scores, -1)
        mixed = torch.bmm(weights, v).transpose(0, 1).reshape(length * n, -1)
        shares = weights.view(n, heads, length, -1)
        shares = shares.mean(1) if average else shares
        shares = shares if batched else shares[0]
    else:
        q, k, v = (t.view(n, heads, t.shape[1], -1) for t in (q, k, v))
        if total is not None:
            total = total[None] if len(total) == 1 else total.view(n, heads, -1, total.shape[-1])
        mixed = F.scaled_dot_product_attention(q, k, v, total, dropout, causal)
        mixed = mixed.permute(2, 0, 1, 3).contiguous().view(length * n, -1)
    out = layer.out_proj
    output = F.linear(mixed, out.weight, out.bias).view(length, n, -1)
    held = out._modules.get("lora_slots")
    if held is not None:
        output = held.add(mixed.view(length, n, -1).transpose(0, 1), output.transpose(0, 1), out).transpose(0, 1)
    return output.transpose(0, 1) if turned else output if batched else output[:, 0], shares


def _projected(layer: Any, slots: LoRASlots, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, (L, N, E) each, contiguous. What is one tensor is projected at once, as torch does it."""
    size, found = query.shape[-1], []
    spans = [(query, 0, 3)] if query is key else [(query, 0, 1), (key, 1, 3)]
    if key is not value:
        spans = [(query, 0, 1), (key, 1, 2), (value, 2, 3)]
    for x, start, stop in spans:
        rows = slice(start * size, stop * size)
        bias = None if layer.in_proj_bias is None else layer.in_proj_bias[rows]
        output = F.linear(x, layer.in_proj_weight[rows], bias)
        if slots.factored:
            inner = x.transpose(0, 1)
            if stop - start == 3:
                output = slots.add(inner, output.transpose(0, 1), layer).transpose(0, 1)
            else:  # B has the rows of all three
                zero = output.new_zeros(*inner.shape[:2], 3 * size)
                output = output + slots.add(inner, zero, layer)[..., rows].transpose(0, 1)
        found += output.unflatten(-1, (-1, size)).movedim(-2, 0).contiguous().unbind(0)
    return tuple(found)


def _mask(
    mask: Tensor | None, padding: Tensor | None, q: Tensor, n: int, heads: int, length: int, source: int
) -> Tensor | None:
    """Both masks as one that is added to the scores, (N·H or 1, L or 1, S); None for none.

    Raises:
        RuntimeError: a shape that torch refuses, too.
    """
    total = None if mask is None else _additive(mask, q.dtype, (length, source), (n * heads, length, source))
    if total is not None and total.dim() == 2:
        total = total[None]
    if padding is not None:
        own = _additive(padding, q.dtype, (n, source))
        own = own.view(n, 1, 1, source).expand(-1, heads, -1, -1).reshape(n * heads, 1, source)
        total = own if total is None else total + own
    return total


def _additive(mask: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Tensor:
    if tuple(mask.shape) not in shapes:
        raise RuntimeError(
            f"A mask of {tuple(mask.shape)} does not fit the attention, {' or '.join(map(str, shapes))}."
        )
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise RuntimeError(f"A mask of {mask.dtype} is neither boolean nor floating.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


# ---- what is around it ---------------------------------------------------------------------------------------------


class _Shielded(Swapped):
    """A module of torch whose fused inference path reads its layers' weights and calls none of them."""

    def _bypassed(self) -> bool:
        state: LoRAState | None = vars(self).get("lora_state")
        return state is not None and (tracing() or bool(state.current.entries))


class LoRAEncoderLayer(_Shielded):
    """nn.TransformerEncoderLayer, which computes layer by layer while an adapter is active."""

    @property
    def activation_relu_or_gelu(self) -> int:
        """0, which the fused path refuses, while an adapter is active."""
        return 0 if self._bypassed() else int(vars(self)["activation_relu_or_gelu"])

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        vars(self)["activation_relu_or_gelu"] = value


class LoRAEncoder(_Shielded):
    """nn.TransformerEncoder, which makes no nested tensor for its layers while an adapter is active."""

    @property
    def use_nested_tensor(self) -> bool:
        """False while an adapter is active."""
        return not self._bypassed() and bool(vars(self)["use_nested_tensor"])

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        vars(self)["use_nested_tensor"] = value


_AROUND = ((nn.TransformerEncoderLayer, LoRAEncoderLayer), (nn.TransformerEncoder, LoRAEncoder))


def shield(modules: Any, path: str, state: LoRAState) -> None:
    """Let no fused path around the layer at `path` go past its adapters. `modules`: the model's, by name."""
    names = path.split(".")
    for i in range(len(names)):
        around = modules.get(".".join(names[:i]))
        for kind, mixin in _AROUND:
            if isinstance(around, kind) and not isinstance(around, _Shielded):
                vars(around)["lora_state"] = state
                swap(around, mixin, ".".join(names[:i]))


def unshield(modules: Any) -> None:
    """Give their own class back to those around layers that hold no adapter any more."""
    for module in modules.values():
        if isinstance(module, _Shielded) and not any(
            "lora_slots" in part._modules or "lora_heads" in part._modules for part in module.modules()
        ):
            restore(module)
            vars(module).pop("lora_state", None)
