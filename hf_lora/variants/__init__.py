"""The strategies by which a pair of factors changes a layer: one small file each, looked up by name."""

from __future__ import annotations

from .plain import Plain

__all__ = ["VARIANTS", "Plain"]

VARIANTS: dict[str, Plain] = {"plain": Plain()}
