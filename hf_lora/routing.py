"""Which row of a batch takes which adapter."""

from __future__ import annotations

from torch import Tensor

from .errors import LoRARouteError
from .state import Active, Entry, check_rows

__all__ = ["rows_of"]


def rows_of(active: Active, x: Tensor, *, inner: bool) -> tuple[Entry | None, ...]:
    """The adapter (or None) of each row of `x`, (N, ...).

    Args:
        active: a route.
        x: a layer's input.
        inner: the layer runs inside another batch (images of a vision tower, tokens of an expert), whose rows are not
            the user's.

    Raises:
        LoRARouteError: the layer has an inner batch, or the number of rows is not the route's.
    """
    rows = active.rows or ()
    if inner:
        raise LoRARouteError(
            "A routed adapter has factors in a layer whose batch is not the rows of the input (a vision tower or "
            "an expert), "
            "and no row map is known for this architecture.",
            remedy="Run the rows of each adapter as a batch of their own, with use_lora().",
        )
    check_rows(rows, x.shape[0])
    return rows
