"""Which row of a batch takes which adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .state import Active, Entry, check_rows, refuse_inner

__all__ = ["batch_of", "rows_of", "unflattened"]


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


def batch_of(model: nn.Module, first: Any, given: Mapping[str, Any]) -> int | None:
    """How many rows a call of the model (its forward, or generate) is given; None if no argument tells.

    Args:
        first: its first positional argument, if it has one; a mapping holds arguments (sentence-transformers' way).
        given: its keyword arguments.
    """
    given = {**first, **given} if isinstance(first, Mapping) else given
    mains = (getattr(part, "main_input_name", None) for part in (model, getattr(model, "encoder", None)))
    names = ["input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", *mains]
    encoded = given.get("encoder_outputs")  # a ModelOutput or a tuple: the hidden states come first
    hidden = encoded[0] if encoded is not None and not isinstance(encoded, Tensor) and len(encoded) else encoded
    for tensor in (*(given.get(name) for name in names if name), first, hidden):
        if isinstance(tensor, Tensor) and tensor.dim():
            return tensor.shape[0]
    return None
