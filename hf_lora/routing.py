"""Which row of a batch takes which adapter."""

from __future__ import annotations

from torch import Tensor

from .state import Active, Entry, check_rows, refuse_inner

__all__ = ["rows_of", "unflattened"]


def rows_of(active: Active, x: Tensor, row_map: str = "batch") -> tuple[Entry | None, ...]:
    """The adapter (or None) of each row of `x`, (N, ...).

    Args:
        active: a route.
        x: a layer's input.
        row_map: "inner" for a layer that runs inside another batch (images of a vision tower, tokens of an expert),
            whose rows are not the user's.

    Raises:
        LoRARouteError: the layer has an inner batch, or the number of rows is not the route's.
    """
    rows = active.rows or ()
    if row_map == "inner":
        refuse_inner()
    check_rows(rows, x.shape[0])
    return rows


def unflattened(active: Active, x: Tensor) -> Tensor:
    """(B·T, d) as (B, T, d), B the rows of the route. Raises `LoRARouteError` if that does not come out even."""
    rows = active.rows or ()
    if x.shape[0] % len(rows):
        check_rows(rows, x.shape[0])
    return x.reshape(len(rows), -1, x.shape[-1])
