"""Safetensors files written tensor by tensor, none of which has to be in memory with another."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .. import safefile
from ..errors import LoRAConfigError
from .base import INDEX, SINGLE

__all__ = ["Shard", "Spec", "divide", "size_in_bytes", "write_index", "write_shard"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", re.IGNORECASE)
_NAMES = {dtype: name for name, dtype in safefile.DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        count = 1
        for dimension in self.shape:
            count *= dimension
        return count

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file to be written, and what it holds."""

    name: str
    specs: tuple[Spec, ...]


def size_in_bytes(size: int | str) -> int:
    """5_000_000_000 of "5GB" (decimal, as huggingface_hub reads it; "5GiB" is binary) or of the number itself.

    Raises:
        LoRAConfigError: it is no positive size.
    """
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is not None:
        number = int(float(match[1]) * _UNITS[(match[2] or "").upper()])
    else:
        number = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if number < 1:
        raise LoRAConfigError(
            f"max_shard_size={size!r} is no size.",
            name="max_shard_size",
            value=size,
            expected='a number of bytes, or such as "5GB"',
            remedy="Write 5GB, 500MB or a number of bytes.",
        )
    return number


def divide(specs: Sequence[Spec], most: int) -> list[Shard]:
    """Files of at most `most` bytes of tensors each, in the order given; a larger tensor has a file for itself."""
    groups: list[list[Spec]] = [[]]
    held = 0
    for spec in specs:
        if groups[-1] and held + spec.nbytes > most:
            groups.append([])
            held = 0
        groups[-1].append(spec)
        held += spec.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    count = len(groups)
    return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)]


def write_shard(file: BinaryIO, shard: Shard, values: Callable[[Spec], Iterable[Tensor]]) -> Iterator[int]:
    """Write one file, and tell the bytes of each piece as it is written.

    Args:
        file: open for writing, at its beginning.
        shard: what it is to hold.
        values: a tensor's values in order, as tensors of any shape, in the dtype of its spec.
    """
    order = sorted(shard.specs, key=lambda spec: -spec.dtype.itemsize)  # so that every tensor is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in order:
        start, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for spec in order:
        left = spec.nbytes
        for piece in values(spec):
            assert piece.dtype == spec.dtype, (spec.name, piece.dtype)
            flat = piece.detach().contiguous().reshape(-1).view(torch.uint8)
            file.write(memoryview(flat.numpy()))  # type: ignore[arg-type]
            left -= flat.numel()
            yield flat.numel()
        assert left == 0, (spec.name, left)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """model.safetensors.index.json of several files."""
    specs = [spec for shard in shards for spec in shard.specs]
    index = {
        "metadata": {
            "total_parameters": sum(spec.numel for spec in specs),
            "total_size": sum(spec.nbytes for spec in specs),
        },
        "weight_map": {spec.name: shard.name for shard in shards for spec in shard.specs},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
