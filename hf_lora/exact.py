"""W' = round(W + ΔW), and what brings every bit of W back without a second copy of it.

W' − ΔW is W but where rounding has moved it. A record keeps those weights' own bits and their places, the factors that
ΔW is made of, and a fingerprint of both states. Everything compares integer views: a float comparison would miss −0.0.

ΔW is made in pieces of a fixed number of rows that stay in the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import LoRAStateError

__all__ = ["Factored", "Record", "Scratch", "added", "fingerprint", "product", "restored"]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = {"cpu": 1 << 17}  # elements: a piece stays in the cache, and a pair's place in it takes 16 bits
_LARGE = 1 << 24  # elsewhere
_PLACES = 1 << 16
_COLUMNS, _SLAB = 128, 1 << 17  # words: of a row of the fingerprint's grid, and of what is summed while in the cache


@dataclass(frozen=True, eq=False)
class Factored:
    """ΔW = (gain − 1) ∘ W + left @ right, in the weight's own layout: (rows, R) and (R, columns), float32 or wider.

    `gain` is (rows, 1) or (1, columns), or None for 1. With `instead`, (rows, columns), which stands for W, ΔW is
    (instead − W) + left @ right. Nothing brings W back from it, so that a record then keeps all of W.
    """

    left: Tensor
    right: Tensor
    gain: Tensor | None = None
    instead: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Factored:
        """On a device, and at least as wide as `dtype`."""
        wide = torch.promote_types(self.left.dtype, dtype)
        gain = None if self.gain is None else self.gain.to(device, wide)
        instead = None if self.instead is None else self.instead.to(device)
        return Factored(
            self.left.to(device, wide).contiguous(), self.right.to(device, wide).contiguous(), gain, instead
        )

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for t in (self.left, self.right, self.gain, self.instead) if t is not None)

    def put(self, old: Tensor, rows: slice, delta: Tensor, out: Tensor) -> Tensor:
        """round(W + ΔW) of these rows, into `out`."""
        if self.instead is not None:
            return torch.add(self.instead[rows], delta, out=out)
        if self.gain is None:
            return torch.add(old, delta, out=out)
        return out.copy_(torch.addcmul(delta, old.to(delta.dtype), self._part(rows)))

    def take(self, new: Tensor, rows: slice, delta: Tensor, out: Tensor) -> Tensor:
        """About the W that `put` was given, into `out`; the same bits whenever it is asked."""
        if self.gain is None:
            return torch.sub(new, delta, out=out)
        return out.copy_((new.to(delta.dtype) - delta).div_(self._part(rows)))

    def _part(self, rows: slice) -> Tensor:
        assert self.gain is not None
        return self.gain if self.gain.shape[0] == 1 else self.gain[rows]

    def harmless(self, dtype: torch.dtype) -> bool:
        """Whether no sum with a finite weight can overflow `dtype`, told from the factors alone."""
        if self.gain is not None or self.instead is not None:
            return False
        if not self.left.numel() or not self.right.numel():
            return True
        largest = [max(abs(float(x)) for x in torch.aminmax(t)) for t in (self.left, self.right)]
        limits = torch.finfo(dtype)
        # Half a step at the largest number; False for NaN, as comparisons with it are.
        return self.left.shape[1] * largest[0] * largest[1] < limits.max * limits.eps / 4


@dataclass(eq=False)
class Record:
    """What it takes to undo one weight's change."""

    change: Factored
    before: bytes  # fingerprint of W
    after: bytes  # and of W'
    moved: list[_Moved] = field(default_factory=list)  # what rounding moved, of each piece

    @property
    def nbytes(self) -> int:
        """Bytes that this record holds: places and bits, and the factors."""
        return sum(moved.nbytes for moved in self.moved) + self.change.nbytes


class Scratch:
    """Memory that is used again for the next weight. One for each thread."""

    def __init__(self) -> None:
        self._held: dict[Any, Tensor] = {}
        self._masks: dict[int, np.ndarray[Any, np.dtype[np.bool_]]] = {}

    def empty(self, use: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor for one use, with anything in it; the last one for this use is void."""
        key, count = (use, dtype, device), torch.Size(shape).numel()
        if key not in self._held or self._held[key].numel() < count:
            self._held[key] = torch.empty(count, dtype=dtype, device=device)
        return self._held[key][:count].view(shape)

    def mask(self, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Room for `count`, and an eighth more that is set.

        Where more than a tenth is set numpy finds the places without a branch for each, in a quarter of the time.
        """
        if count not in self._masks:
            self._masks = {count: np.ones(count + count // 8, dtype=np.bool_)}
        return self._masks[count]


def added(weight: Tensor, change: Factored, path: str, scratch: Scratch, before: bytes = b"") -> tuple[Tensor, Record]:
    """round(W + ΔW) in scratch memory, and what undoes it; `weight` is not written.

    Args:
        weight: (rows, columns).
        path: for messages.
        before: the weight's fingerprint, if it is known.

    Raises:
        LoRAStateError: ΔW is not finite, or a weight would overflow its dtype.
    """
    kept, old = change.to(weight.device, torch.float32), weight.contiguous()
    change = kept.to(weight.device, weight.dtype)
    harmless = change.harmless(weight.dtype)
    new = scratch.empty("new", old.shape, old.dtype, old.device)
    back = scratch.empty("back", (_rows(old.shape[1], old.device), old.shape[1]), old.dtype, old.device)
    moved = []
    for rows, delta in _deltas(change, scratch):
        change.put(old[rows], rows, delta, new[rows])
        if not harmless:
            _require_finite(old[rows], delta, new[rows], path)
        again = change.take(new[rows], rows, delta, back[: len(delta)])
        moved.append(_Moved.between(again, old[rows], scratch))
    return new, Record(kept, before or fingerprint(old), fingerprint(new), moved)


def restored(weight: Tensor, record: Record, path: str, scratch: Scratch) -> Tensor:
    """W in scratch memory, every bit of it, from W' and its record; `weight` is not written.

    Raises:
        LoRAStateError: the weight is not the one that the merge left.
    """
    if fingerprint(weight) != record.after:
        raise LoRAStateError(
            f"{path}: the weight changed since it was merged, so the base cannot be restored.",
            name=path,
            remedy="Load the base model again; do not train or overwrite weights while an adapter is merged.",
        )
    device = record.change.left.device  # where it was merged: another one may round otherwise
    here = weight.to(device)
    change = record.change.to(device, weight.dtype)
    old = scratch.empty("old", here.shape, here.dtype, device)
    for (rows, delta), moved in zip(_deltas(change, scratch), record.moved, strict=True):
        moved.put(change.take(here[rows], rows, delta, old[rows]), scratch)
    if fingerprint(old) != record.before:
        raise LoRAStateError(
            f"{path}: the ΔW that was merged cannot be made again here, so the base cannot be restored exactly.",
            name=path,
            remedy="Unmerge on the machine that merged, with the same settings of torch (matmul precision, TF32), or "
            "load the base model again.",
        )
    return old.to(weight.device)


def product(change: Factored) -> Iterator[tuple[slice, Tensor]]:
    """ΔW, a few rows at a time, as a merge makes it; each is void when the next is asked for."""
    return _deltas(change, Scratch())


def _rows(columns: int, device: torch.device) -> int:
    rows = _PIECE.get(device.type, _LARGE) // max(columns, 1)
    return max(rows - rows % 2, 2)  # even, so that a piece begins with a whole cell


def _deltas(change: Factored, scratch: Scratch) -> Iterator[tuple[slice, Tensor]]:
    left, right = change.left, change.right
    step = _rows(right.shape[1], left.device)
    delta = scratch.empty("delta", (step, right.shape[1]), left.dtype, left.device)
    for start in range(0, left.shape[0], step):
        rows = slice(start, min(start + step, left.shape[0]))
        yield rows, torch.mm(left[rows], right, out=delta[: rows.stop - start])


def _require_finite(old: Tensor, delta: Tensor, fresh: Tensor, path: str) -> None:
    if not bool(torch.isfinite(delta).all()):
        raise LoRAStateError(
            f"{path}: ΔW holds NaN or infinite values, so it was not merged.",
            name=path,
            remedy="Check the adapter (a diverged training run?).",
        )
    if bool((~torch.isfinite(fresh) & torch.isfinite(old)).any()):
        raise LoRAStateError(
            f"{path}: W + ΔW overflows {old.dtype}, so it was not merged.",
            name=path,
            value=float(delta.abs().max()),
            remedy="Merge into a base in bfloat16 or float32.",
        )


# ---- the weights that rounding moved ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Moved:
    """Some cells of a piece: where they are, and their bits. A cell is a pair of neighbours.

    Few are held by their places, many by a mask of one bit for each cell of the piece.
    """

    places: Tensor  # uint16 as int16, or uint8: the mask
    bits: Tensor

    @property
    def nbytes(self) -> int:
        return self.places.nbytes + self.bits.nbytes

    @classmethod
    def between(cls, found: Tensor, expected: Tensor, scratch: Scratch) -> _Moved:
        """Where two contiguous tensors differ, and what is expected there."""
        one, other = _cells(found), _cells(expected)
        count = other.numel()
        if one.device.type == "cpu":
            mask = scratch.mask(count)
            np.not_equal(one.numpy(), other.numpy(), out=mask[:count])
            index = _set(mask, count)
        else:
            index = (one != other).nonzero().view(-1)
        bits = other.index_select(0, index)
        if count <= _PLACES and 5 * len(index) <= 2 * count:  # 3.2 bits a weight at most
            return cls(index.to(torch.int16), bits)
        marked = torch.zeros(count, dtype=torch.uint8)
        marked[index.cpu()] = 1
        return cls(torch.from_numpy(np.packbits(marked.numpy())).to(index.device), bits)

    def put(self, tensor: Tensor, scratch: Scratch) -> None:
        """Write the bits to their places."""
        cells = _cells(tensor)
        if self.places.dtype == torch.int16:
            index = self.places.to(torch.int64).bitwise_and_(_PLACES - 1)
        else:
            mask = scratch.mask(cells.numel())
            mask[: cells.numel()] = np.unpackbits(self.places.cpu().numpy(), count=cells.numel())
            index = _set(mask, cells.numel()).to(cells.device)
        cells.index_copy_(0, index, self.bits)


def _cells(tensor: Tensor) -> Tensor:
    """The bits of a contiguous tensor, two elements at a time where that is possible, as integers."""
    size = tensor.element_size()
    paired = size < 8 and tensor.numel() % 2 == 0 and tensor.storage_offset() % 2 == 0
    return tensor.view(-1).view(_INTEGERS[2 * size if paired else size])


def _set(mask: np.ndarray[Any, np.dtype[np.bool_]], count: int) -> Tensor:
    places = np.flatnonzero(mask)
    return torch.from_numpy(places[: len(places) - (len(mask) - count)])


# ---- has a weight changed? -------------------------------------------------------------------------------------------


def fingerprint(tensor: Tensor) -> bytes:
    """16 bytes that tell whether a tensor is the one of before.

    The bits, as 64-bit words, stand in grids of 128 columns. Sums of each row and of each column (modulo 2⁶⁴), and in
    turn of those sums, are hashed. A change within one or two words always shows (a flipped bit, −0.0 for 0.0, two
    weights in each other's place); any other unless its differences cancel in every row and every column.
    """
    found: list[Tensor] = []
    _sums(_words(tensor), found)
    digest = hashlib.blake2b(torch.cat(found).cpu().numpy().tobytes(), digest_size=16)
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return digest.digest()


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().view(-1)
    if flat.data_ptr() % 8 or flat.nbytes % 8:
        flat = nn.functional.pad(flat.view(torch.uint8), (0, -flat.nbytes % 8))
    return flat.view(torch.int64)


def _sums(words: Tensor, found: list[Tensor]) -> None:
    whole = words.numel() // _COLUMNS * _COLUMNS
    if whole <= 4 * _COLUMNS:
        found.append(words)
        return
    slabs = words[:whole].view(-1, _COLUMNS).split(_SLAB // _COLUMNS)
    found.append(words[whole:])
    _sums(torch.cat([slab.sum(1) for slab in slabs]), found)
    _sums(torch.cat([slab.sum(0) for slab in slabs]), found)
