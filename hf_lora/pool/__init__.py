"""Thousands of adapters by id on one model: source → host memory → device slots."""

from .core import LoRAPool
from .lease import Lease
from .metrics import PoolMetrics

__all__ = ["Lease", "LoRAPool", "PoolMetrics"]
