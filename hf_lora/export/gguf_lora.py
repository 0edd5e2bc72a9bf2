"""An adapter as a GGUF file that llama.cpp loads beside its base (`--lora`).

llama.cpp adds (alpha/r)·B(Ax) to the tensor of the same name: one alpha for the file, r from the shapes. Its names are
its own, and for Llama and its kin it stores the rows of W_q and W_k in another order (the halves of a head that RoPE
turns together stand side by side), so the rows of B are put into that order, too. A token embedding's A is stored as
(V, r).
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import fields, scratch
from ..bases import hub_id, same_base
from ..errors import LoRAFileError, LoRAMismatchError, LoRAUnsupportedError
from ..fitting import make_plan
from ..integrations.checkpoint_keys import auto_classes, meta_model
from ..safefile import fsync_directory
from ..values import AdapterValue, Factors, refuse_extras, refuse_replicated
from .base import config_of

__all__ = ["GGUFReport", "to_gguf"]


class _Form(NamedTuple):
    """How llama.cpp stores an architecture: its name in `gguf.MODEL_ARCH`, and whether rows of q and k are permuted."""

    name: str
    permuted: bool = False


# model_type → form. Only those whose tensors llama.cpp stores row for row, or with this one permutation.
_FORMS: Mapping[str, _Form] = {
    "llama": _Form("LLAMA", True),
    "mistral": _Form("LLAMA", True),
    "granite": _Form("GRANITE", True),
    "smollm3": _Form("SMOLLM3", True),
    "qwen2": _Form("QWEN2"),
    "qwen3": _Form("QWEN3"),
    "gemma": _Form("GEMMA"),
    "gemma2": _Form("GEMMA2"),
    "gemma3_text": _Form("GEMMA3"),
    "phi3": _Form("PHI3"),
    "starcoder2": _Form("STARCODER2"),
    "gpt2": _Form("GPT2"),
}
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_EMBEDDING, _OUTPUT = "token_embd", "output"


@dataclass(frozen=True)
class GGUFReport:
    """What was written.

    Attributes:
        path: the file.
        architecture: llama.cpp's name of it.
        alpha: the one alpha of the file.
        rescaled: layers whose B was multiplied, because their alpha is another.
        tensors: how many, two a layer.
        nbytes: of the file.
        dtype: of the tensors.
    """

    path: Path
    architecture: str
    alpha: float
    rescaled: tuple[str, ...]
    tensors: int
    nbytes: int
    dtype: str


def to_gguf(
    adapter: AdapterValue,
    path: str | os.PathLike[str],
    base: Any = None,
    *,
    dtype: str = "f32",
    force: bool = False,
) -> GGUFReport:
    """Write an adapter as a GGUF LoRA for llama.cpp; atomically, an old file stays until the new one is complete.

    Args:
        adapter: factors alone; roles of a fused layer are fine.
        path: the file.
        base: the base, of which only the config is needed: a model, its config, a folder or a repo's id. None takes the
            one that the adapter names.
        dtype: "f32", "f16" or "bf16".
        force: write although the adapter names another base; shapes are still checked.

    Returns:
        What was written. alpha/r is each layer's scaling, rsLoRA's too: alpha is the commonest scaling·r, and where
        a layer has another, its B makes up for it.

    Raises:
        LoRAUnsupportedError: an architecture that is not known here; trained biases or modules, which the format cannot
            hold; a tied embedding; `gguf` is not installed.
        LoRAMismatchError: the adapter does not fit the base. LoRAFileError: the file cannot be written.

    Source: llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
    """
    fields.one_of("dtype", dtype, tuple(_FILE_TYPES))
    out = Path(path)
    if importlib.util.find_spec("gguf") is None:
        raise LoRAUnsupportedError(
            "The package gguf, which writes the file, is not installed.",
            name="gguf",
            remedy='pip install "hf_lora[gguf]"',
        )
    _refuse_held_whole(adapter)
    name, config = _config(adapter.config.base_model if base is None else base)
    _refuse_other_base(adapter, name, force)
    form = _FORMS.get(config.model_type)
    if form is None:
        raise LoRAUnsupportedError(
            f"How llama.cpp stores a {config.model_type!r} is not known here.",
            name="model_type",
            value=config.model_type,
            expected=sorted(_FORMS),
            remedy="Merge the adapter (hf-lora merge) and convert the model with llama.cpp's convert_hf_to_gguf.py.",
        )
    model = meta_model(auto_classes("AutoModelForCausalLM", config)[0], config, torch.float32)
    make_plan(model, adapter, None)
    names = _names(adapter, form, config)
    alphas = {layer: f.scaling * f.rank for layer, f in adapter.factors.items()}
    alpha = float(torch.tensor(Counter(alphas.values()).most_common(1)[0][0], dtype=torch.float32))
    rescaled = tuple(layer for layer, own in alphas.items() if abs(own / alpha - 1) > 1e-6)
    tensors: dict[str, Tensor] = {}
    for layer, factors in adapter.factors.items():
        ratio = alphas[layer] / alpha if layer in rescaled else 1.0
        a, b = _stored(layer, factors, names[layer], form, config, ratio)
        tensors |= {f"{names[layer]}.weight.lora_a": a, f"{names[layer]}.weight.lora_b": b}
    _refuse_overflow(tensors, dtype)
    invocation = adapter.config.alora_invocation_tokens or ()
    written = _write(out, tensors, form, alpha, dtype, hub_id(adapter.config.base_model), invocation)
    return GGUFReport(out, form.name.lower(), alpha, rescaled, len(tensors), written, dtype)


# -- what is refused -------------------------------------------------------------------------------------------------


def _refuse_held_whole(adapter: AdapterValue) -> None:
    refuse_extras(adapter, "A GGUF LoRA")
    refuse_replicated(adapter, "A GGUF LoRA")
    facts = [f"{path}: a module that was trained whole" for path in adapter.modules]
    facts += [f"{name}: a trained bias" for name in adapter.biases]
    if facts:
        raise LoRAUnsupportedError(
            "A GGUF LoRA holds factors alone.",
            name=facts[0].partition(":")[0],
            value=facts,
            facts=facts,
            remedy="Merge the adapter (hf-lora merge) and convert the model; factors_only() leaves them out.",
        )


def _refuse_other_base(adapter: AdapterValue, name: str | None, force: bool) -> None:
    wanted, here = hub_id(adapter.config.base_model), hub_id(name)
    if force or wanted is None or here is None or same_base(wanted, here):
        return
    raise LoRAMismatchError(
        f"The adapter was made on {wanted!r}, the base is {here!r}.",
        name="base_model_name_or_path",
        value=here,
        expected=wanted,
        remedy="Give the adapter's own base, or force=True (--force) if it is the same model under another name.",
    )


def _refuse_overflow(tensors: Mapping[str, Tensor], dtype: str) -> None:
    most = torch.finfo(_DTYPES[dtype]).max
    facts = [
        f"{name}: reaches {float(t.abs().max()):.3g}" for name, t in tensors.items() if float(t.abs().max()) > most
    ]
    if facts:
        raise LoRAMismatchError(
            f"{len(facts)} tensors do not fit {dtype} (most {most:.3g}).",
            name=facts[0].partition(":")[0],
            facts=facts,
            remedy='Write dtype="f32" or "bf16".',
        )


# -- names and values ------------------------------------------------------------------------------------------------


def _config(base: Any) -> tuple[str | None, Any]:
    """The base's name, if it has one, and its transformers config."""
    if isinstance(base, nn.Module):
        base = getattr(base, "config", None)
    if isinstance(getattr(base, "model_type", None), str):
        return getattr(base, "_name_or_path", None) or None, base
    if not isinstance(base, str | os.PathLike) or not os.fspath(base):
        raise LoRAMismatchError(
            "The adapter does not say its base."
            if base is None
            else f"base={base!r} is no model, config, folder or id.",
            name="base",
            value=base,
            remedy="Give the base model, its config, its folder or its id (--base).",
        )
    return os.fspath(base), config_of(os.fspath(base))


def _names(adapter: AdapterValue, form: _Form, config: Any) -> dict[str, str]:
    """Path → llama.cpp's name of the tensor, without ".weight"."""
    import gguf

    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[form.name], config.num_hidden_layers)
    names = {path: known.get_name(path) for path in adapter.factors}
    facts = [f"{path}: no tensor of its own in llama.cpp" for path, name in names.items() if name is None]
    tied = bool(getattr(config, "tie_word_embeddings", False))
    facts += [
        f"{path}: tied to the {'output' if name == _EMBEDDING else 'input'} embedding, which llama.cpp stores as one"
        for path, name in names.items()
        if tied and name in (_EMBEDDING, _OUTPUT)
    ]
    facts += [
        f"{path}: an embedding that llama.cpp looks up without adapters"
        for path, factors in adapter.factors.items()
        if factors.kind == "embedding" and names[path] not in (None, _EMBEDDING)
    ]
    twice = [name for name, count in Counter(names.values()).items() if name is not None and count > 1]
    facts += [f"{path}: a second {name!r}" for path, name in names.items() if name in twice]
    if facts:
        raise LoRAUnsupportedError(
            f"{len(facts)} of the adapter's {len(names)} layers have no place in a GGUF LoRA.",
            name=facts[0].partition(":")[0],
            value=facts,
            facts=facts,
            remedy="Merge the adapter (hf-lora merge) and convert the model with llama.cpp's convert_hf_to_gguf.py.",
        )
    return {path: str(name) for path, name in names.items()}


def _stored(path: str, factors: Factors, name: str, form: _Form, config: Any, ratio: float) -> tuple[Tensor, Tensor]:
    """(A, B) as llama.cpp stores them, float32; B times `ratio`."""
    a, b = factors.A.detach().cpu().double(), factors.B.detach().cpu().double() * ratio
    if form.permuted and name.endswith((".attn_q", ".attn_k")):
        heads = config.num_attention_heads
        if name.endswith(".attn_k"):
            heads = getattr(config, "num_key_value_heads", None) or heads
        if b.shape[0] % (2 * heads):
            raise LoRAMismatchError(
                f"{path}: {b.shape[0]} rows are not {heads} heads of even size.", name=path, value=b.shape[0]
            )
        # Row (head, half, i) of transformers' rotation is row (head, i, half) of llama.cpp's.
        b = b.view(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)
    if factors.kind == "embedding":
        a = a.T
    return a.float().contiguous(), b.float().contiguous()


# -- the file --------------------------------------------------------------------------------------------------------


def _write(
    path: Path,
    tensors: Mapping[str, Tensor],
    form: _Form,
    alpha: float,
    dtype: str,
    base: str | None,
    invocation: Sequence[int],
) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        with scratch.beside(path) as temporary:
            _write_to(temporary, path.stem, tensors, form, alpha, dtype, base, invocation)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        raise LoRAFileError(
            f"{path} cannot be written: {error}.",
            name=path.name,
            value=str(path),
            remedy="Free some space or choose a place that you may write to; what was there is unchanged.",
        ) from error
    return path.stat().st_size


def _write_to(
    file: Path,
    name: str,
    tensors: Mapping[str, Tensor],
    form: _Form,
    alpha: float,
    dtype: str,
    base: str | None,
    invocation: Sequence[int],
) -> None:
    import gguf

    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[form.name]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if invocation:  # an aLoRA
        kinds = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
        writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, list(invocation), *kinds)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    if base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    for key, tensor in tensors.items():
        data, kind = tensor.numpy(), gguf.GGMLQuantizationType[dtype.upper()]
        writer.add_tensor(key, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
