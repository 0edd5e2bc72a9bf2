"""Base + adapter → a model folder of its own, one tensor at a time: a model larger than the memory merges."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import safefile
from ..errors import LoRAConfigError, LoRAFileError, LoRAMismatchError
from ..loading import read_source
from ..values import AdapterValue, Factors
from .base import BaseFiles, open_base
from .plan import CHUNK, Item, MergePlan, decide, refuse_other_base
from .shards import Shard, Spec, divide, size_in_bytes, write_index, write_shard

__all__ = ["MergeReport", "merge_to_folder"]

PathLike = str | os.PathLike[str]
Progress = Callable[[str, int, int], None]

_SHARD_SIZE = "5GB"
_DTYPES = {
    **dict.fromkeys(("fp32", "float32"), torch.float32),
    **dict.fromkeys(("fp16", "float16"), torch.float16),
    **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
}


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote.

    Args:
        out: the folder.
        base: the base's folder or id.
        revision: the base's, if one was asked for.
        architecture: the class of model that the folder is.
        dtype: of most tensors.
        tensors: how many there are.
        parameters: how many numbers.
        nbytes: bytes of all the tensors.
        merged: tensors that ΔW was added to.
        replaced: biases and tensors of heads that the adapter brought.
        dropped: tensors of the base that this class of model does not use, so that they were left out.
        files: names of the files written, with their sizes in bytes.
    """

    out: str
    base: str
    revision: str | None
    architecture: str
    dtype: str
    tensors: int
    parameters: int
    nbytes: int
    merged: tuple[str, ...]
    replaced: tuple[str, ...]
    dropped: tuple[str, ...]
    files: dict[str, int]


def merge_to_folder(
    source: PathLike | AdapterValue,
    out: PathLike,
    base: PathLike | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    base_revision: str | None = None,
    **options: Any,
) -> MergeReport:
    """Write base + adapter as a standalone model: W ← round(W + scaling·B·A), tensor by tensor.

    The tensors are, bit for bit, those that from_pretrained(base, dtype=dtype), load_lora(), merge_lora() and
    save_pretrained() give. In memory are the adapter and, of the base, at most one tensor that the adapter changes.

    Args:
        source: an adapter: its folder, its repo's id, or the value.
        out: the folder to be made; one that exists must be empty. It appears when everything is written.
        base: the base's folder or id; None takes the one that the adapter names.
        dtype: of the merged model: a torch.dtype, or "bf16", "fp16", "fp32"; None keeps the base's.
        max_shard_size: bytes, or such as "5GB" (the default), of each file of weights.
        force: take the base although the adapter names another; everything else is still checked.
        progress: called with (file, bytes done, bytes in all) as the weights are written.
        base_revision: the base's, on the Hub; None takes the one that the adapter names with its base.
        options: of the adapter: subfolder, revision, allow_pickle; of both: token, cache_dir, local_files_only.

    Raises:
        LoRAFileError: a file is missing or damaged, `out` holds something, or it cannot be written (a full disk).
        LoRAMismatchError: the adapter does not fit this base, is not finite, or would overflow a weight.
        LoRAUnsupportedError: a quantised base, one without safetensors, or a weight that is tied, fused or converted
            when the base is loaded.
    """
    target = Path(out)
    _refuse_out(target)
    wanted, most = _dtype(dtype), size_in_bytes(_SHARD_SIZE if max_shard_size is None else max_shard_size)
    both = {key: options[key] for key in ("token", "cache_dir", "local_files_only") if options.get(key) is not None}
    value = source if isinstance(source, AdapterValue) else read_source(source, **options)
    value.config.require_supported()
    name, revision = _base_name(value, base, base_revision)
    files = open_base(name, revision=revision, **both)
    refuse_other_base(value, files, force)
    plan = decide(value, files, wanted, complete=not isinstance(source, AdapterValue))
    shards = divide([item.spec for item in plan.items], most)
    with _appearing(target, sum(spec.nbytes for shard in shards for spec in shard.specs)) as folder:
        _write(folder, files, plan, shards, progress)
        written = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    return MergeReport(
        out=str(target),
        base=name,
        revision=revision,
        architecture=type(plan.model).__name__,
        dtype=str(plan.dtype).removeprefix("torch."),
        tensors=len(plan.items),
        parameters=sum(item.spec.numel for item in plan.items),
        nbytes=sum(item.spec.nbytes for item in plan.items),
        merged=tuple(item.spec.name for item in plan.items if item.factors is not None),
        replaced=tuple(item.spec.name for item in plan.items if item.value is not None),
        dropped=plan.dropped,
        files=written,
    )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise LoRAConfigError(
            f"dtype={dtype!r} is none that a model is saved in here.",
            name="dtype",
            value=dtype,
            expected=tuple(_DTYPES),
            remedy="Choose bf16, fp16 or fp32.",
        )
    return _DTYPES[dtype]


def _base_name(value: AdapterValue, base: PathLike | None, revision: str | None) -> tuple[str, str | None]:
    if base is not None:
        return os.fspath(base), revision
    if not value.config.base_model:
        raise LoRAConfigError(
            "The adapter does not say which base model it belongs to.",
            name="base_model_name_or_path",
            value=None,
            expected="a folder, or 'user/name'",
            remedy="Say it: --base (base=).",
        )
    return value.config.base_model, revision or value.config.revision


# ---- writing ---------------------------------------------------------------------------------------------------------


def _write(folder: Path, base: BaseFiles, plan: MergePlan, shards: list[Shard], progress: Progress | None) -> None:
    items = {item.spec.name: item for item in plan.items}
    total, done = sum(item.spec.nbytes for item in plan.items), 0

    def values(spec: Spec) -> Iterable[Tensor]:
        return _values(items[spec.name], plan)

    for shard in shards:
        with open(folder / shard.name, "wb") as file:
            if progress is not None:
                progress(shard.name, done, total)
            for count in write_shard(file, shard, values):
                done += count
                if progress is not None:
                    progress(shard.name, done, total)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        write_index(folder, shards)
    plan.model.config.save_pretrained(folder)
    for path in base.companions():
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(base.folder / path, folder / path)


def _values(item: Item, plan: MergePlan) -> Iterator[Tensor]:
    """The tensor as it is in the merged model, in pieces."""
    if item.value is not None:
        yield item.value.to(item.spec.dtype)
    elif item.factors is not None:
        assert item.source is not None
        yield _added(item.source.read().to(item.spec.dtype), item.factors, item.transposed, item.path)
    else:
        assert item.source is not None
        for piece in item.source.chunks(CHUNK):
            cast = piece.to(item.spec.dtype)
            if cast.dtype != piece.dtype and bool((~torch.isfinite(cast) & torch.isfinite(piece)).any()):
                raise _overflows(item.path, item.spec.dtype)
            yield cast


def _added(weight: Tensor, factors: Factors, transposed: bool, path: str) -> Tensor:
    """round(W + ΔW) as `weights.merge` rounds it, with no more in memory than W, ΔW and the result."""
    wide = torch.promote_types(factors.A.dtype, torch.float32)
    delta = (factors.B.to(wide) * factors.scaling) @ factors.A.to(wide)
    if not _finite(delta):
        raise LoRAMismatchError(
            f"{path}: ΔW holds NaN or infinite values, so nothing was merged.",
            name=path,
            remedy="Check the adapter (a diverged training run?).",
        )
    if transposed:
        delta = delta.T
    delta += weight  # in place; a sum is the same either way round
    merged = delta.to(weight.dtype).contiguous()
    if not _finite(merged) and bool((~torch.isfinite(merged) & torch.isfinite(weight)).any()):
        raise _overflows(path, weight.dtype)
    return merged


def _overflows(path: str, dtype: torch.dtype) -> LoRAMismatchError:
    return LoRAMismatchError(
        f"{path}: the merged weight overflows {dtype}, so nothing was merged.",
        name=path,
        value=dtype,
        remedy="Merge in bfloat16 or float32 (dtype=, --dtype).",
    )


def _finite(tensor: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in tensor.split(max(CHUNK // max(tensor.shape[-1], 1), 1)))


# ---- the folder ------------------------------------------------------------------------------------------------------


def _refuse_out(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise LoRAFileError(f"{out} is not a folder.", name=str(out), value=str(out), remedy="Give another folder.")
    if out.is_dir() and any(out.iterdir()):
        raise LoRAFileError(
            f"{out} is not empty.",
            name=str(out),
            value=sorted(path.name for path in out.iterdir())[:20],
            remedy="Give a new folder, or empty it first.",
        )


@contextlib.contextmanager
def _appearing(out: Path, needed: int) -> Iterator[Path]:
    """A folder beside `out` that gets its name at the end; on an error nothing of it is left."""
    folder = out.parent / f".{out.name}.merging-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(out)
        free = shutil.disk_usage(out.parent).free
        if free < needed:
            raise OSError(f"it needs {needed:,} bytes, {free:,} are free")
        folder.mkdir()
    except OSError as error:
        raise _unwritable(out, error) from error
    with _held(folder):
        try:
            yield folder
            for path in folder.rglob("*"):
                if path.is_dir():
                    safefile.fsync_directory(path)
            safefile.fsync_directory(folder)
            if out.is_dir():
                out.rmdir()  # empty, or it has to stay
            os.rename(folder, out)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, LoRAFileError):
                raise _unwritable(out, error) from error
            raise
    safefile.fsync_directory(out.parent)


def _unwritable(out: Path, error: OSError) -> LoRAFileError:
    return LoRAFileError(
        f"The merged model cannot be written to {out}: {error}.",
        name=str(out),
        value=str(out),
        remedy="Free some space or choose a folder that you may write to; nothing was left there.",
    )


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Lock a folder while it is written; whether that was possible. A killed process's lock is gone with it."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing can be told of others
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _clear_abandoned(out: Path) -> None:
    """Remove what killed merges to the same folder left behind."""
    for path in out.parent.glob(f".{_literal(out.name)}.merging-*"):
        with contextlib.suppress(OSError), _held(path) as free:
            if free and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def _literal(name: str) -> str:
    import glob

    return glob.escape(name)
