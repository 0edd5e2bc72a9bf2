"""LoftQ: the pair begins as what a quantised base lacks, so that the model begins near the base that was not quantised.

    s · B₀ A₀ = SVD_r(W − Q)

On a dense base Q is W rounded here, and the adapted layer computes with Q (see `rounding`). On a base that bitsandbytes
has quantised Q is what the layer holds, and W is read from the base's own safetensors file, a tensor at a time.

Source: Li et al. 2023 (arXiv:2310.08659) §3.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import safefile
from ..errors import LoRAConfigError, LoRAFileError, LoRAMismatchError, LoRAUnsupportedError
from ..quantised import bits_of, dequantised
from ..rounding import Rounding, low_rank
from ..weights import is_dense
from .base import Init, Layer, Settings
from .plain import KAIMING

__all__ = ["LOFTQ"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_INDEX = 64 << 20  # bytes
_FAR = 0.5  # of ‖W‖: no rounding to 4 bits or more moves a weight so far


def _loftq(layer: Layer, settings: Settings) -> tuple[Tensor, Tensor]:
    if layer.quantised and is_dense(layer.module):
        return KAIMING.pair(layer, settings)  # the quantised model left it as it was
    layer.require_rank("loftq")
    residual = _from_files(layer, settings) if layer.quantised else _rounded(layer, settings)
    A, B = low_rank(residual[layer.rows.to(residual.device)], layer.rank)
    root = layer.scaling**0.5
    return A / root, B / root


def _rounded(layer: Layer, settings: Settings) -> Tensor:
    """W − Q of a dense layer, (out, in)."""
    if settings["weights"] is not None:
        raise LoRAConfigError(
            f"init_options has weights={settings['weights']!r}, but this base is not quantised: they are its own.",
            name="weights",
            value=settings["weights"],
            remedy="Leave weights out.",
        )
    W, rounding = layer.whole(), Rounding(settings["loftq_bits"], settings["loftq_iter"])
    if len(layer.rows) < len(W) and rounding.iterations > 1:
        raise LoRAConfigError(
            f"{layer.path}: loftq_iter={rounding.iterations} is for whole layers, not for slices of a fused one.",
            name="loftq_iter",
            value=rounding.iterations,
            expected=1,
            remedy="Give loftq_iter=1, or name the fused layer itself in target_modules.",
        )
    return W - rounding.stand_in(W, layer.rank)


def _from_files(layer: Layer, settings: Settings) -> Tensor:
    """W − Q of a quantised layer, (out, in), W from the file that the base was loaded from."""
    module, bits = layer.module, settings["loftq_bits"]
    if bits_of(module) is None:
        raise LoRAUnsupportedError(
            f"{layer.path}: this {type(module).__name__} is not quantised by bitsandbytes.",
            name=layer.path,
            value=type(module).__name__,
            remedy='Load the base with BitsAndBytesConfig(load_in_4bit=True), or begin with init="kaiming".',
        )
    for name, have, want in (("loftq_bits", bits, bits_of(module)), ("loftq_iter", settings["loftq_iter"], 1)):
        if have != want:
            raise LoRAConfigError(
                f"{layer.path}: {name}={have}, but the base is quantised already, which makes it {want}.",
                name=name,
                value=have,
                expected=want,
                remedy=f"Give {name}={want}, or load the base without quantisation.",
            )
    Q = dequantised(module)
    W = _original(layer, settings["weights"]).to(Q)
    if W.shape == Q.T.shape and W.shape != Q.shape:  # a Conv1D's
        W = W.T
    distance = float((W - Q).norm() / W.norm()) if W.shape == Q.shape else float("inf")
    if not distance < _FAR:
        raise LoRAMismatchError(
            f"{layer.path}: the file's weight {tuple(W.shape)} is not what this layer {tuple(Q.shape)} was quantised "
            f"from (‖W − Q‖/‖W‖ = {distance:.2g}).",
            name=layer.path,
            value=distance,
            remedy='Name the folder or repo of the base that was quantised: init_options={"weights": ...}.',
        )
    return W - Q


def _original(layer: Layer, source: str | None) -> Tensor:
    """The layer's weight as it stands in the base's safetensors files."""
    model: Any = layer.model
    config = getattr(model, "config", None)
    name = source or getattr(config, "_name_or_path", None)
    if not name:
        raise _no_file(layer, "the model does not say where it was loaded from")
    prefix = getattr(model, "base_model_prefix", None)
    keys = [f"{layer.path}.weight"]
    keys += [f"{prefix}.{keys[0]}", keys[0].removeprefix(f"{prefix}.")] if prefix else []
    file_of = functools.partial(_file, name, None if source else getattr(config, "_commit_hash", None))
    places = _places(file_of)
    from safetensors import SafetensorError, safe_open

    for key in dict.fromkeys(keys):
        stored = _SINGLE if places is None else places.get(key)
        file = file_of(stored) if isinstance(stored, str) and os.path.basename(stored) == stored else None
        if file is None:
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                if key in opened.keys():  # noqa: SIM118  # it is no mapping
                    found: Tensor = opened.get_tensor(key)
                    return found
        except SafetensorError as error:
            raise LoRAFileError(f"{file} is damaged: {error}", name=key, value=str(file)) from error
    raise _no_file(layer, f"{name!r} has no safetensors file with {' or '.join(map(repr, dict.fromkeys(keys)))}")


def _places(file_of: Callable[[str], str | None]) -> dict[str, Any] | None:
    """Which file holds which tensor, where there are several; None where there is one."""
    index = file_of(_INDEX) if file_of(_SINGLE) is None else None
    if index is None:
        return None
    found = safefile.load_json(safefile.read_bytes(Path(index), most=_LARGEST_INDEX), index).get("weight_map")
    return found if isinstance(found, dict) else {}


def _file(name: str, revision: str | None, file: str) -> str | None:
    """A file of a folder, or of a repo at a revision: from the Hub's cache, or the Hub."""
    if os.path.isdir(name):
        found = os.path.join(name, file)
        return found if os.path.isfile(found) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(hf_hub_download(name, file, revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None  # the caller says which tensor is missing, and what to do


def _no_file(layer: Layer, why: str) -> LoRAFileError:
    return LoRAFileError(
        f"{layer.path}: LoftQ needs the weight before it was quantised, and {why}.",
        name=layer.path,
        remedy='Name the folder or repo with the safetensors files: init_options={"weights": ...}; or begin with '
        'init="kaiming".',
    )


LOFTQ = Init(_loftq, embeddings=False)
