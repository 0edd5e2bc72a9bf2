"""Parameters that are split over processes: read whole, written in place, left alone where that cannot be.

FSDP2 (`torch.distributed.fsdp.fully_shard`) replaces each Parameter by a DTensor that holds this process's rows, and
brings the whole one back only for a layer's forward and backward. It manages the Parameters that were there when it was
called, and no later ones. DeepSpeed's ZeRO-3 leaves empty Parameters that know how to be gathered (`ds_id`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import LoRAFileError, LoRAStateError

__all__ = ["assign", "first_alone", "is_sharded", "refuse_sharded", "reshard", "whole"]

T = TypeVar("T")


def _dtensor(tensor: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # who has a DTensor has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def _fsdp_modules(model: nn.Module) -> Iterator[Any]:
    module = sys.modules.get("torch.distributed.fsdp")
    if module is not None:
        yield from (m for m in model.modules() if isinstance(m, module.FSDPModule))


def _zero3(tensor: Any) -> bool:
    return hasattr(tensor, "ds_id")


def _fully_sharded(model: nn.Module) -> bool:
    return next(_fsdp_modules(model), None) is not None or any(map(_dtensor, model.parameters()))


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` or ZeRO-3 has split the model or a part of it."""
    return _fully_sharded(model) or any(map(_zero3, model.parameters()))


def reshard(model: nn.Module) -> None:
    """Let every module hold its sharded Parameters again: after a forward some hold a whole copy, perhaps cast."""
    for module in _fsdp_modules(model):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes if it is sharded (all of them must call this)."""
    if _zero3(tensor):
        with sys.modules["deepspeed"].zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    if not _dtensor(tensor):
        return tensor
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    sharded: Any = tensor.detach()
    gathered: Tensor = sharded.full_tensor()
    return gathered


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Write a whole value into a tensor in place; into a sharded one each process writes the rows that it holds.

    Raises:
        LoRAStateError: ZeRO-3 holds it, whose optimizer has a copy of its own that would win.
    """
    if _zero3(tensor):
        raise LoRAStateError(
            "An adapter cannot be loaded into Parameters that ZeRO-3 manages: its optimizer would overwrite them.",
            name="ds_id",
            remedy="Load it before deepspeed.initialize(), or let DeepSpeed's own checkpoint be loaded.",
        )
    if _dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = tensor
        value = value.to(tensor.device, tensor.dtype)
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
    tensor.copy_(value)


def refuse_sharded(model: nn.Module, what: str, remedy: str, *, zero3: bool = False) -> None:
    """Raise `LoRAStateError` if `fully_shard` has split the model; with `zero3`, also if ZeRO-3 has."""
    if _fully_sharded(model) or (zero3 and is_sharded(model)):
        how = "fully_shard()" if _fully_sharded(model) else "ZeRO-3"
        raise LoRAStateError(f"{what} on a model that {how} has split over processes.", name=how, remedy=remedy)


def first_alone(model: nn.Module, write: Callable[[], T]) -> T | None:
    """Call `write` in the first process of a sharded model alone, and return in none before it is done.

    Every process must call this. On a model that is not sharded, it is `write()`.

    Raises:
        what `write` raises, in the first process. LoRAFileError: in the others, if it failed there.
    """
    sharded: Any = next((p for p in model.parameters() if _dtensor(p) or _zero3(p)), None)
    if sharded is None:
        return write()
    import torch.distributed as dist

    if _zero3(sharded):
        groups, first, device = [dist.group.WORLD], dist.get_rank() == 0, sharded.device
    else:  # along the first process's row of the mesh, then from that row to all
        mesh = sharded.device_mesh
        groups = [mesh.get_group(dimension) for dimension in reversed(range(mesh.ndim))]
        first, device = not any(mesh.get_coordinate()), mesh.device_type
    done = torch.zeros((), dtype=torch.int32, device=device)
    result = None
    try:
        if first:
            result = write()
            done.fill_(1)
    finally:
        for group in groups:
            dist.broadcast(done, group=group, group_src=0)
    if not int(done):
        raise LoRAFileError(
            "The first process could not write the adapter; its own error says why.",
            name="fully_shard",
            remedy="Look at the error of rank 0.",
        )
    return result
