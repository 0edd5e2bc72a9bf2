"""Read and write a base layer's weight: dense and Conv1D; exact merges.

A merge writes W' = round(W + ΔW) and keeps what rounding moved: one bit for each weight whose W' − ΔW does not round
back to W, and that weight's own bits. So `unmerge` restores every bit without a second copy of the weights. Records
compare integer views (a float comparison would miss −0.0), and carry checksums of both states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoRAStateError, LoRAUnsupportedError
from .sharding import whole

__all__ = ["MergeRecord", "compute_dtype", "device_of", "materialised", "merge", "mergeable", "unmerge"]

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 24  # elements at a time where an int64 copy is needed


@dataclass(eq=False)
class MergeRecord:
    """What it takes to undo one layer's merge."""

    A: Tensor  # (R, in), float32: the factors as they were merged, so that ΔW can be made again
    B: Tensor  # (out, R), scaled and weighted
    mask: Tensor | None  # packed bits, one a weight: set where subtracting ΔW does not round back
    values: Tensor  # the bits of those weights, as integers
    before: int  # checksum of W
    after: int  # checksum of W'
    threads: int  # a matrix product may round otherwise with another number of threads

    @property
    def nbytes(self) -> int:
        """Bytes that this record holds beside the factors."""
        return self.values.nbytes + (0 if self.mask is None else self.mask.nbytes)


def device_of(module: nn.Module) -> torch.device:
    """Where the layer computes; for a weight offloaded by accelerate, the device it is brought to."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return next((t.device for t in tensors if t is not None), torch.device("cpu"))


def materialised(module: nn.Module, name: str) -> Tensor:
    """A tensor of the module's own, also where accelerate has offloaded it; on the CPU, or meta on a meta model."""
    tensor: Tensor = getattr(module, name)
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        offloaded = getattr(part, "weights_map", None)
        if tensor.is_meta and offloaded is not None:
            found: Tensor = offloaded[name]
            return found.detach().to("cpu", copy=True)
    tensor = whole(tensor).detach()
    return tensor if tensor.is_meta else tensor.to("cpu", copy=True)


def compute_dtype(module: nn.Module, model: nn.Module) -> torch.dtype:
    """The floating dtype in which the layer computes: its weight's, or the model's where the weight is quantised."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return weight.dtype
    for source in (getattr(module, "compute_dtype", None), getattr(getattr(model, "config", None), "dtype", None)):
        if isinstance(source, torch.dtype) and source.is_floating_point:
            return source
    return torch.get_default_dtype()


def mergeable(module: nn.Module, path: str) -> Tensor:
    """The layer's dense weight. Raises `LoRAUnsupportedError` where it is quantised or not in memory."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        found = type(weight).__name__ if not isinstance(weight, Tensor) else str(weight.dtype)
        raise LoRAUnsupportedError(
            f"{path}: cannot merge into a {type(module).__name__} whose weight is {found}.",
            name=path,
            value=found,
            expected="a dense float weight",
            remedy="Load the base model without quantisation, then merge.",
        )
    if weight.is_meta:
        raise LoRAUnsupportedError(
            f"{path}: its weight is offloaded (on the meta device), so nothing can be merged into it here.",
            name=path,
            remedy="Load the base model whole (device_map=None), then merge.",
        )
    return weight


def merge(weight: Tensor, A: Tensor, B: Tensor, *, transposed: bool, path: str) -> MergeRecord:
    """W ← round(W + ΔW) in place; return what undoes it. Nothing is written when it raises.

    Args:
        weight: (out, in), or (in, out) if `transposed` (Conv1D, embeddings).
        A: (R, in). B: (out, R), scaled and weighted. float32.
        path: for messages.

    Raises:
        LoRAStateError: ΔW is not finite, or a weight would overflow its dtype.
    """
    W = weight.detach()
    delta = _delta(A, B, transposed)
    if not bool(torch.isfinite(delta).all()):
        raise LoRAStateError(
            f"{path}: ΔW holds NaN or infinite values, so it was not merged.",
            name=path,
            remedy="Check the adapter (a diverged training run?).",
        )
    merged = (W.to(delta.dtype) + delta).to(W.dtype)
    if bool((~torch.isfinite(merged) & torch.isfinite(W)).any()):
        raise LoRAStateError(
            f"{path}: W + ΔW overflows {W.dtype}, so it was not merged.",
            name=path,
            value=float(delta.abs().max()),
            remedy="Merge into a base in bfloat16 or float32.",
        )
    bits = _bits(W)
    moved = _bits((merged.to(delta.dtype) - delta).to(W.dtype)) != bits
    values = bits[moved].clone()
    mask = _pack(moved) if len(values) else None
    record = MergeRecord(A, B, mask, values, _checksum(W), _checksum(merged), torch.get_num_threads())
    W.copy_(merged)  # last: whatever fails before it has written nothing
    return record


def unmerge(weight: Tensor, record: MergeRecord, *, transposed: bool, path: str) -> None:
    """Undo `merge`, bit for bit, in place. Nothing is written when it raises.

    Raises:
        LoRAStateError: the weight is not the one that the merge left.
    """
    W = weight.detach()
    if _checksum(W) != record.after:
        raise LoRAStateError(
            f"{path}: the weight changed since it was merged, so the base cannot be restored.",
            name=path,
            remedy="Load the base model again; do not train or overwrite weights while an adapter is merged.",
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(record.threads)
    try:
        delta = _delta(record.A.to(W.device), record.B.to(W.device), transposed)
    finally:
        torch.set_num_threads(threads)
    restored = (W.to(delta.dtype) - delta).to(W.dtype)
    if record.mask is not None:
        moved = _unpack(record.mask.to(W.device), W.numel()).view(W.shape)
        _bits(restored)[moved] = record.values.to(W.device)
    if _checksum(restored) != record.before:
        raise LoRAStateError(
            f"{path}: this device does not give the ΔW that was merged, so the base cannot be restored exactly.",
            name=path,
            remedy="Unmerge on the device that merged, or load the base model again.",
        )
    W.copy_(restored)


def _delta(A: Tensor, B: Tensor, transposed: bool) -> Tensor:
    delta = B @ A
    return delta.T.contiguous() if transposed else delta


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGER[tensor.element_size()])


def _checksum(tensor: Tensor) -> int:
    """Order-dependent sum of the bits, modulo 2^64."""
    flat, total = _bits(tensor).reshape(-1), 0
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.int64)
        odd = torch.arange(2 * start + 1, 2 * (start + part.numel()) + 1, 2, device=flat.device, dtype=torch.int64)
        total += int(((part + 0x9E3779B9) * odd * 0x5851F42D4C957F2D).sum())  # wraps, as meant
    return total & 0xFFFFFFFFFFFFFFFF


def _pack(mask: Tensor) -> Tensor:
    flat = mask.reshape(-1).to(torch.uint8)
    flat = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << torch.arange(8, device=flat.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, count: int) -> Tensor:
    bits: Any = (packed.view(-1, 1) >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    unpacked: Tensor = bits.reshape(-1)[:count].bool()
    return unpacked
