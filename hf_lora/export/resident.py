"""A model in memory and the adapters on it → a model folder of its own; the model stays as it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import quantised
from ..errors import LoRAStateError, LoRAUnsupportedError
from ..loading import read_adapter_of
from ..merging import merged_lora
from ..model import require
from ..standins import only_said
from ..switching import Which, described, selection
from .merge import merge_to_folder
from .shards import size_in_bytes
from .target import appearing, refuse_out

__all__ = ["merge_and_save"]


def merge_and_save(
    model: Any,
    directory: str | os.PathLike[str],
    which: Which = None,
    *,
    untie: bool = False,
    max_shard_size: int | str | None = None,
    dequantize: bool = False,
) -> Path:
    """Write W + Σ wᵢ ΔWᵢ as a standalone model: weights, config and generation config, without a key of LoRA's.

    The weights hold the adapters while they are written, and are then the base's again, bit for bit; so nothing else
    may run the model meanwhile. Adapters, what is active, what trains and the training mode stay as they are.

    Of a quantised base the model is written that it was quantised from: W + ΔW, tensor by tensor from the files that
    it was loaded from, in their dtype; the quantised copy is not read. One that transformers dequantised from a GGUF
    file is dense, and is written as it is.

    Args:
        directory: the folder to be made; one that exists must be empty. It appears when everything is written.
        which: what to merge, as in `set_lora`; None takes what is active by default, or what is merged already.
        untie: a weight that is tied to a layer that the adapter does not change is written twice, once with ΔW and once
            without, and the config says that they are not tied.
        max_shard_size: bytes, or such as "5GB", of each file of weights; None is transformers' own.
        dequantize: of a quantised base write Q + ΔW, in the dtype that it computes in: what the model here computes.

    Returns:
        the folder.

    Raises:
        LoRAFileError: the folder holds something, or it cannot be written (a full disk).
        LoRAUnsupportedError: it is no model of transformers; as of `merge_lora`.
        LoRAStateError: as of `merge_lora`, but for the training mode, which is fine here; also if `which` is given
            while something is merged. Nothing was written then, and the model is as before.
    """
    state, target = require(model), Path(directory)
    _require_transformers(model)
    refuse_out(target)
    if state.merged is None and not dequantize and quantised.described(model) is not None:
        return _from_original(model, target, which, max_shard_size)
    dequantize = dequantize or (state.merged is None and only_said(model))  # stock saves none that says so
    options = {} if max_shard_size is None else {"max_shard_size": size_in_bytes(max_shard_size)}
    needed = sum(parameter.nbytes for parameter in model.parameters())
    with appearing(target, needed) as folder, state.lock:
        if state.merged is None:
            block: Any = merged_lora(model, which, untie=untie, verb="merge_and_save", dequantize=dequantize)
        elif which is None:
            block = contextlib.nullcontext()
        else:
            raise LoRAStateError(
                "merge_and_save() was told what to merge while something is merged already.",
                name="which",
                value=which,
                remedy="Leave `which` out to save what is merged, or call unmerge_lora() first.",
            )
        with block, _same_config(model.config):
            model.save_pretrained(folder, **options)
        for path in folder.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
    return target


def _require_transformers(model: Any) -> None:
    """Raise unless the model is one of transformers: others have no folder that every tool reads."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise LoRAUnsupportedError(
            f"merge_and_save() writes a model folder of transformers, and a {type(model).__name__} is no model of it.",
            name="model",
            value=type(model).__name__,
            expected="a PreTrainedModel",
            remedy="Call merge_lora(), save hf_lora.base_state_dict(model) your own way, and call unmerge_lora().",
        )


def _from_original(model: Any, target: Path, which: Which, max_shard_size: int | str | None) -> Path:
    """Merge into the files that a quantised base was loaded from."""
    active = require(model).default if which is None else selection(require(model), which)
    if len(active.mixture) != 1 or active.mixture[0][1] != 1:
        raise LoRAStateError(
            f"One adapter is merged into the files of a quantised base, and {described(active)!r} is asked for.",
            name="which",
            value=described(active),
            remedy="Name one; or hf_lora.combine() several and load the result; or pass dequantize=True.",
        )
    value = read_adapter_of(model, active.mixture[0][0].name)
    name, revision = getattr(model.config, "_name_or_path", None), getattr(model.config, "_commit_hash", None)
    if not name:
        raise LoRAUnsupportedError(
            "The quantised base does not say which files it was loaded from, so nothing can be merged into them.",
            name="_name_or_path",
            remedy='Use hf_lora.export.merge_to_folder(adapter, out, base="…"), or pass dequantize=True.',
        )
    merge_to_folder(value, target, name, max_shard_size=max_shard_size, base_revision=revision, force=True)
    return target


@contextlib.contextmanager
def _same_config(config: Any) -> Iterator[None]:
    """save_pretrained writes the class and dtype that it saves into the model's own config, too."""
    before = {name: getattr(config, name, None) for name in ("architectures", "dtype")}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
