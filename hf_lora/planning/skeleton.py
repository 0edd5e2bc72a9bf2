"""A model without values: from a config, or as a copy of a model, on the device meta."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..banks import LoRABanks
from ..errors import LoRAConfigError, LoRAStateError
from ..layerinfo import modules_of
from ..model import remove, state_of
from .quantised import QuantisedLinear, quantise, stand_in

__all__ = ["base_nbytes", "dtype_of", "from_config", "from_model", "read_config"]

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_OTHERWISE = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForImageClassification", "AutoModel")


def dtype_of(dtype: Any) -> torch.dtype | None:
    """The floating dtype that is meant by a `torch.dtype` or its name; None and "auto" stand for the model's own.

    Raises:
        LoRAConfigError: it is none.
    """
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise LoRAConfigError(
            f"dtype={dtype!r} is no dtype that a base computes in.",
            name="dtype",
            value=dtype,
            expected="float32, bfloat16 or float16",
            remedy="Give float32, bfloat16 or float16; None takes the model's own.",
        )
    return found


def read_config(source: str | os.PathLike[str], **loading: Any) -> Any:
    """The configuration of a model: of an id on the Hub, a folder, or a config.json. No weights are read.

    Raises:
        LoRAConfigError: there is none, or transformers does not know it.
    """
    from transformers import AutoConfig

    path = os.fspath(source)
    path = os.path.expanduser(path) if path.startswith("~") else path
    try:
        config = AutoConfig.from_pretrained(path, **loading)
    except (OSError, ValueError, KeyError) as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LoRAConfigError(
            f"No model's configuration is found at {os.fspath(source)!r}: {said}",
            name="model_or_config",
            value=os.fspath(source),
            remedy="Give a model, its config, an id on the Hub, a folder, or a config.json.",
        ) from error
    if "gguf_file" in loading and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # a GGUF file's weights are dequantised while they are loaded
    return config


def from_config(
    config: Any, task_type: str | None, dtype: torch.dtype | None, quantisation: Any = None
) -> tuple[Any, list[str]]:
    """The model of a configuration, on meta, and notes on what was done to it.

    Its class is that of the task; otherwise the one that the configuration names; otherwise the usual one.
    `quantisation` takes the place of its own quantization_config.

    Raises:
        LoRAConfigError: transformers makes no model of it.
    """
    config = copy.deepcopy(config)
    own = getattr(config, "quantization_config", None)
    if own is not None:
        del config.quantization_config
    asked = own if quantisation is None else quantisation
    model = _built(config, task_type, dtype)
    note = None if asked is None else quantise(model, asked)
    return model, [note] if note else []


def _built(config: Any, task_type: str | None, dtype: torch.dtype | None) -> Any:
    import transformers

    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    names = [_AUTO[task_type]] if task_type in _AUTO else []
    if not names:
        named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
        cls: Any = next((cls for cls in named if hasattr(cls, "_from_config")), None)
        if cls is not None:
            with torch.device("meta"):
                return cls._from_config(config, dtype=dtype)
        names = ["AutoModelForSeq2SeqLM"] if getattr(config, "is_encoder_decoder", False) else []
        names += _OTHERWISE
    for name in names:
        with torch.device("meta"), contextlib.suppress(ValueError):  # "unrecognised configuration class for this …"
            return getattr(transformers, name).from_config(config, dtype=dtype)
    raise LoRAConfigError(
        f"transformers has no model of a {type(config).__name__}" + (f" for {task_type}." if task_type else "."),
        name="model_or_config",
        value=type(config).__name__,
        expected=names,
        remedy="Give another task_type, or the model itself.",
    )


def from_model(model: nn.Module) -> nn.Module:
    """A copy of a model on meta, without the adapters that are on it. The model is left alone.

    Raises:
        LoRAStateError: an adapter is merged into its weights.
    """
    state = state_of(model)
    if state is not None and state.merged is not None:
        raise LoRAStateError("A merged model cannot be planned for.", remedy="Call unmerge_lora() first.")
    known: dict[int, Any] = {}
    instead = {path: made for path, module in modules_of(model).items() if (made := stand_in(module)) is not None}
    for path in instead:
        for held in model.get_submodule(path).parameters(recurse=False):  # a library's own kind of tensor, perhaps
            known[id(held)] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
    for tensor in [tensor for tensor in _held(model) if id(tensor) not in known]:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        known[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    for entry in state.entries.values() if state is not None else ():
        known[id(entry.record.value)] = None if entry.record.value is None else entry.name  # never looked at
    skeleton = copy.deepcopy(model, known)
    if state is not None:
        remove(skeleton)
    for path, layer in instead.items():
        parent, _, leaf = path.rpartition(".")
        setattr(skeleton.get_submodule(parent), leaf, layer)
    return skeleton


def _held(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, LoRABanks):
            yield from (tensor for pair in module.masters.values() for tensor in pair)


def base_nbytes(model: nn.Module) -> tuple[int, int]:
    """Parameters, and bytes of weights and buffers, of a model without adapters; what is tied counts once."""
    parameters = list(model.parameters())
    packed = sum(module.numbers for module in model.modules() if isinstance(module, QuantisedLinear))
    return packed + sum(p.numel() for p in parameters), sum(t.nbytes for t in (*parameters, *model.buffers()))
