"""Base + adapter → a model folder of its own, one tensor at a time: a model larger than the memory merges."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRAConfigError, LoRAMismatchError
from ..exact import product
from ..extras import EXTRAS, FORWARD
from ..loading import read_source
from ..merging import factored
from ..values import AdapterValue, Factors, refuse_extras, refuse_replicated
from ..weights import as_matrix
from ..workers import alone
from .base import BaseFiles, open_base
from .plan import CHUNK, Item, MergePlan, decide, refuse_other_base
from .shards import Shard, Spec, divide, size_in_bytes, write_index, write_shard
from .target import appearing, refuse_out

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
    refuse_out(target)
    wanted, most = _dtype(dtype), size_in_bytes(_SHARD_SIZE if max_shard_size is None else max_shard_size)
    both = {key: options[key] for key in ("token", "cache_dir", "local_files_only") if options.get(key) is not None}
    value = source if isinstance(source, AdapterValue) else read_source(source, **options)
    value.config.require_supported()
    refuse_replicated(value, "A merge on disk")
    name, revision = _base_name(value, base, base_revision)
    files = open_base(name, revision=revision, **both)
    refuse_other_base(value, files, force)
    refuse_extras(value, "A merge on disk", [name for name in FORWARD if not EXTRAS[name].weight])
    plan = decide(value, files, wanted, complete=not isinstance(source, AdapterValue))
    shards = divide([item.spec for item in plan.items], most)
    with appearing(target, sum(spec.nbytes for shard in shards for spec in shard.specs)) as folder:
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
        weight, factors = item.source.read().to(item.spec.dtype), item.factors
        yield alone(lambda: _added(weight, factors, item.transposed, item.path))
    else:
        assert item.source is not None
        for piece in item.source.chunks(CHUNK):
            cast = piece.to(item.spec.dtype)
            if cast.dtype != piece.dtype and bool((~torch.isfinite(cast) & torch.isfinite(piece)).any()):
                raise _overflows(item.path, item.spec.dtype)
            yield cast


def _added(weight: Tensor, factors: Factors, transposed: bool, path: str) -> Tensor:
    """round(W + ΔW), the bits that `merge_lora` gives, in place of W."""
    flat = as_matrix(weight)
    change = factored([(factors, 1.0)], transposed, flat).to(weight.device, weight.dtype)
    for rows, delta in product(change):
        if not _finite(delta):
            raise LoRAMismatchError(
                f"{path}: ΔW holds NaN or infinite values, so nothing was merged.",
                name=path,
                remedy="Check the adapter (a diverged training run?).",
            )
        old = flat[rows]
        merged = change.put(old, rows, delta, torch.empty_like(old))
        if not _finite(merged) and bool((~torch.isfinite(merged) & torch.isfinite(old)).any()):
            raise _overflows(path, weight.dtype)
        old.copy_(merged)
    return weight


def _overflows(path: str, dtype: torch.dtype) -> LoRAMismatchError:
    return LoRAMismatchError(
        f"{path}: the merged weight overflows {dtype}, so nothing was merged.",
        name=path,
        value=dtype,
        remedy="Merge in bfloat16 or float32 (dtype=, --dtype).",
    )


def _finite(tensor: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in tensor.split(max(CHUNK // max(tensor.shape[-1], 1), 1)))
