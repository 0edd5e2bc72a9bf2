"""The safetensors container, read with distrust and written so that a kill leaves the old file.

Nothing is allocated before the whole header has been checked against the file's size. The tensors of a file are views
of one buffer in memory, not of the file: overwriting or truncating it afterwards does not touch them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import LoRAFileError

__all__ = [
    "Entry",
    "Header",
    "fsync_directory",
    "is_text",
    "load_json",
    "read_bytes",
    "read_header",
    "read_pickle",
    "read_tensors",
    "reading",
]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as in safetensors itself
_LFS = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Entry:
    """One tensor of a header; `start` and `stop` are bytes from the beginning of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header: the entries tile the data, which ends where the file does."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int
    data_size: int


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for reading; a missing, unreadable or special file is a `LoRAFileError`."""
    try:
        if not path.is_file():
            raise LoRAFileError(
                f"{path} is not a file." if path.exists() else f"{path} does not exist.",
                name=path.name,
                value=str(path),
            )
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise LoRAFileError(f"{path} cannot be read: {error}.", name=path.name, value=str(path)) from error


def read_bytes(path: Path, *, most: int) -> bytes:
    """The whole of a small file."""
    with reading(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise LoRAFileError(
            f"{path} is larger than {most:,} bytes, the most that is accepted.", name=path.name, value=str(path)
        )
    refuse_lfs_pointer(path, data)
    return data


def refuse_lfs_pointer(path: Path, start: bytes) -> None:
    if start.startswith(_LFS):
        raise LoRAFileError(
            f"{path} is a git-LFS pointer, not the file itself.",
            name=path.name,
            value=start[:200].decode(errors="replace"),
            remedy="Run `git lfs pull` in its repository, or download the file.",
        )


def load_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object, or `LoRAFileError`: not UTF-8, malformed, too deep, NaN, a name twice, or no object."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1}) if len(names) < 1000 else names[:1]
            raise LoRAFileError(f"{what} has {', '.join(map(repr, twice))} twice.", name=twice[0])
        return found

    def no_constant(name: str) -> float:
        raise LoRAFileError(f"{what} has the number {name}, which JSON does not have.", value=name)

    try:
        found = json.loads(data.decode("utf-8-sig"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise LoRAFileError(f"{what} is not UTF-8: {error}.", value=data[:80]) from error
    except RecursionError as error:
        raise LoRAFileError(f"{what} is nested too deeply.") from error
    except ValueError as error:
        if isinstance(error, LoRAFileError):
            raise
        raise LoRAFileError(f"{what} is not JSON: {error}.", value=data[:80]) from error
    if rb"\u" in data and not is_text(found):
        raise LoRAFileError(f"{what} has a text with half of a character, which is none.", value=data[:80])
    if not isinstance(found, dict):
        raise LoRAFileError(f"{what} is no JSON object but {type(found).__name__}.", value=data[:80])
    return found


def is_text(found: Any) -> bool:
    """Whether every text in a JSON value can be written again: an escape can name one half of a surrogate pair."""
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _bad(path: Path, why: str, remedy: str = "Download or save it again.") -> LoRAFileError:
    return LoRAFileError(f"{path} is no valid safetensors file: {why}.", name=path.name, value=str(path), remedy=remedy)


def read_header(file: BinaryIO, path: Path) -> Header:
    """Read and check the header of an open safetensors file; reads no tensor and allocates nothing for one."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(64)
    refuse_lfs_pointer(path, start)
    if size < 8:
        raise _bad(path, f"it has only {size} bytes")
    length = int.from_bytes(start[:8], "little")
    if length > min(size - 8, _LONGEST_HEADER):
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise _bad(path, "it is a pickle of torch.save", "Convert it with safetensors.torch.save_file.")
        raise _bad(path, f"its header claims {length:,} bytes, the file has {size:,}; it is truncated or damaged")
    file.seek(8)
    header = load_json(file.read(length), f"The header of {path}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "its metadata is not a mapping of strings")
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise _bad(path, f"tensor {name!r} starts at byte {entry.start}, the one before it ends at {end}")
        end = entry.stop
    if 8 + length + end != size:
        raise _bad(
            path, f"its tensors need {8 + length + end:,} bytes, the file has {size:,}; it is truncated or damaged"
        )
    return Header(entries, metadata, 8 + length, end)


def _entry(path: Path, name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"the entry of {name!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(path, f"tensor {name!r} has dtype {dtype!r}", f"Save it as one of {', '.join(list(DTYPES)[:4])}.")
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets)):
        raise _bad(path, f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
    needed = DTYPES[dtype].itemsize if 0 not in shape else 0
    for dimension in shape:
        needed = min(needed * dimension, 2**63)  # larger than any file: what a long shape claims is not worked out
    if offsets[1] - offsets[0] != needed:
        raise _bad(path, f"tensor {name!r} {shape} needs {needed:,} bytes but has {offsets[1] - offsets[0]:,}")
    return Entry(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def read_tensors(file: BinaryIO, path: Path, header: Header) -> tuple[dict[str, Tensor], Tensor | None]:
    """Every tensor of `header`, as views of one buffer; also all of them as one flat tensor if they share a dtype."""
    if not header.data_size:
        return {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in header.entries.items()}, None
    buffer = torch.empty(header.data_size, dtype=torch.uint8)
    file.seek(header.data_start)
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    read = 0
    while read < header.data_size:
        count = file.readinto(view[read:])  # type: ignore[attr-defined]
        if not count:
            raise _bad(path, f"it ended after {header.data_start + read:,} bytes while it was read")
        read += count
    # One view of the buffer for each dtype, and one strided view of that for each tensor: cheaper than slicing bytes.
    typed: dict[tuple[torch.dtype, int], Tensor] = {}
    tensors = {}
    for name, entry in header.entries.items():
        size = entry.dtype.itemsize
        shift = entry.start % size  # 0 in every file that safetensors wrote
        base = typed.get((entry.dtype, shift))
        if base is None:
            whole = buffer[shift : shift + (header.data_size - shift) // size * size]
            base = typed[entry.dtype, shift] = (whole.clone() if shift else whole).view(entry.dtype)
        tensors[name] = base.as_strided(entry.shape, _strides(entry.shape), (entry.start - shift) // size)
    return tensors, next(iter(typed.values())) if len(typed) == 1 else None


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for dimension in reversed(shape):
        strides.append(step)
        step *= max(dimension, 1)
    return tuple(reversed(strides))


def read_pickle(path: Path, *, allow: bool, within: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a torch.save file, with `weights_only`: nothing in it is run.

    Args:
        path: the file.
        allow: whether the caller asked for pickles; else it is refused.
        within: keys under which the tensors may stand instead, alone in the outer mapping ("model_state_dict").

    Raises:
        LoRAFileError: refused, damaged, packed, or no mapping from names to plain dense tensors.
    """
    if not allow:
        raise LoRAFileError(
            f"{path} is a pickle, which is not read unless asked for.",
            name=path.name,
            value=str(path),
            remedy="Pass allow_pickle=True (it is read with weights_only), or save it as safetensors.",
        )
    with reading(path) as file:
        refuse_lfs_pointer(path, file.read(64))
        if _unpacks_larger(file):
            raise LoRAFileError(
                f"{path} has packed members, which torch.save does not write.", name=path.name, value=str(path)
            )
        file.seek(0)
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as error:  # a damaged pickle raises anything: UnpicklingError, RuntimeError, KeyError, EOFError, …
            raise LoRAFileError(
                f"{path} is no pickle of tensors alone: {str(error).splitlines()[0] if str(error) else error!r}",
                name=path.name,
                value=str(path),
                remedy="Save it as safetensors where you trust it.",
            ) from error
    if isinstance(found, dict) and len(found) == 1 and next(iter(found)) in within:
        found = next(iter(found.values()))
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise LoRAFileError(f"{path} holds no mapping from names to tensors.", name=path.name, value=str(path))
    for name, tensor in found.items():
        # A stride of 0 makes a few bytes look like terabytes.
        if (
            tensor.layout is not torch.strided
            or tensor.is_quantized
            or tensor.numel() * tensor.element_size() > (tensor.untyped_storage().nbytes())
        ):
            raise LoRAFileError(f"{path}: {name!r} is not a plain dense tensor.", name=name, value=tuple(tensor.shape))
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def _unpacks_larger(file: BinaryIO) -> bool:
    """Whether a file is a zip archive with deflated or overlapping members: a few bytes that would fill the memory."""
    import zipfile

    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False  # no archive, which torch.load will say better
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return not stored or sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: largest element first, then by name, so that every tensor is aligned."""
    order, start, _ = _layout(tensors, metadata)
    file.write(start)
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        file.write(memoryview(flat.numpy()))  # type: ignore[arg-type]


def written_nbytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Bytes of the file that `write_tensors` would write; the tensors may be on meta."""
    _, start, size = _layout(tensors, metadata)
    return len(start) + size


def _layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[list[str], bytes, int]:
    """The order of the tensors, what stands before them, and the bytes that they take."""
    unknown = sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in _NAMES})
    if unknown:
        raise LoRAFileError(f"Tensors of {', '.join(unknown)} cannot be saved.", value=unknown)
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return order, len(text).to_bytes(8, "little") + text, end


def fsync_directory(path: Path) -> None:
    """Make renames in `path` durable, where the system has such a thing (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
