"""A random, B zero (Hu et al. 2021, section 4.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .base import Init, Layer, Settings

__all__ = ["GAUSSIAN", "KAIMING", "OFF"]


def _empty(layer: Layer) -> tuple[Tensor, Tensor]:
    A = torch.empty(layer.rank, layer.in_features, dtype=layer.dtype)
    return A, torch.zeros(layer.out_features, layer.rank, dtype=layer.dtype)


def _embedded(layer: Layer, *, off: bool = False) -> tuple[Tensor, Tensor]:
    """Of an embedding A is zero and B normal, as in loralib."""
    A, B = _empty(layer)
    nn.init.normal_(B)
    return nn.init.normal_(A) if off else nn.init.zeros_(A), B


def _kaiming(layer: Layer, settings: Settings) -> tuple[Tensor, Tensor]:
    if layer.embedding:
        return _embedded(layer)
    A, B = _empty(layer)
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5)), B


def _gaussian(layer: Layer, settings: Settings) -> tuple[Tensor, Tensor]:
    if layer.embedding:
        return _embedded(layer)
    A, B = _empty(layer)
    return nn.init.normal_(A, std=1 / layer.rank), B


def _off(layer: Layer, settings: Settings) -> tuple[Tensor, Tensor]:
    if layer.embedding:
        return _embedded(layer, off=True)
    A, B = _empty(layer)
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5)), nn.init.kaiming_uniform_(B, a=math.sqrt(5))


KAIMING, GAUSSIAN, OFF = Init(_kaiming), Init(_gaussian), Init(_off)
