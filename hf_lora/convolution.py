"""The mathematics of LoRA on a convolution: no modules' state, no names.

    h = conv(x, W) + s · conv1×1(conv(x, A), B) = conv(x, W + s·B·A)        A: (R, in·∏k), B: (out, R)

A's convolution has the layer's own stride, padding, padding mode and dilation, and reads every input channel. With
groups A still does, and B is block-diagonal (PEFT's form): ΔW then is no grouped weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["grouped_low_rank", "low_rank"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def low_rank(x: Tensor, A: Tensor, B: Tensor, layer: Any) -> Tensor:
    """What the pair adds to the layer's output, through the rank.

    Args:
        x: (N, C, …).
        A: (R, C·∏k), in x's dtype unless autocast is on.
        B: (out, R), the scaling already in it.
        layer: an nn.Conv1d, Conv2d or Conv3d, for its geometry.

    Returns:
        (N, out, …).
    """
    h = _narrow(x, A, layer, 1)
    ones = (1,) * len(layer.kernel_size)
    return _CONV[len(ones)](h, B.reshape(*B.shape, *ones))


def grouped_low_rank(x: Tensor, A: Tensor, B: Tensor, layer: Any) -> Tensor:
    """Each row of the batch through its own pair: one convolution with a group for each row, and a batched product.

    Args:
        x: (N, C, …).
        A: (N, R, C·∏k). B: (N, R, out), scaled; ranks below R are padded with zeros.

    Returns:
        (N, out, …).
    """
    h = _narrow(x.reshape(1, -1, *x.shape[2:]), A.flatten(0, 1), layer, x.shape[0])
    h = h.reshape(x.shape[0], A.shape[1], *h.shape[2:])
    return torch.bmm(B.transpose(1, 2), h.flatten(2)).view(x.shape[0], B.shape[2], *h.shape[2:])


def _narrow(x: Tensor, A: Tensor, layer: Any, groups: int) -> Tensor:
    """conv(x, A) as the layer itself reads x. x: (N, groups·C, …). A: (groups·R, C·∏k)."""
    weight = A.reshape(A.shape[0], -1, *layer.kernel_size)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, _pads(layer), mode=layer.padding_mode), 0
    return _CONV[x.dim() - 2](x, weight, None, layer.stride, padding, layer.dilation, groups)


def _pads(layer: Any) -> list[int]:
    """What `F.pad` is given: before and after, of the last dimension first."""
    if layer.padding == "valid":
        each = [(0, 0) for _ in layer.kernel_size]
    elif layer.padding == "same":  # what does not divide goes after
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        each = [(total // 2, total - total // 2) for total in totals]
    else:
        each = [(p, p) for p in layer.padding]
    return [p for pair in reversed(each) for p in pair]
