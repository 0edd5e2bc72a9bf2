"""How libraries hold a layer's weight quantised: how it is read whole, and how another takes its place; a table.

Layers are told by the names of their classes and of their weights', so that no library is imported for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .errors import LoRAStateError, LoRAUnsupportedError

__all__ = ["BACKENDS", "Backend", "backend_of", "sizes_of", "stored_bytes"]


@dataclass(frozen=True)
class Backend:
    """One way of holding a weight.

    Attributes:
        name: what it is called, for messages.
        holds: whether a layer's weight is held so.
        read: gives the weight, (out, in), in the dtype that the library computes in.
        write: quantises a weight of that dtype, (out, in), as the layer's own was, and puts it into the layer: new
            tensors, so that the old ones stay what they are. None where nothing can be written.
        detail: which of its ways, in a few words.
    """

    name: str
    holds: Callable[[Any], bool]
    read: Callable[[Any], Tensor]
    write: Callable[[Any, Tensor, Any], None] | None = None
    detail: Callable[[Any], str] = lambda module: ""

    def described(self, module: nn.Module) -> str:
        """What a layer's weight is, for a card."""
        detail = self.detail(module)
        return f"{self.name} ({detail})" if detail else self.name


def backend_of(module: nn.Module) -> Backend | None:
    """How the layer's weight is quantised; None for one of plain floats, and for what has no weight."""
    return next((backend for backend in BACKENDS if backend.holds(module)), None)


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------


def _read_4bit(module: Any) -> Tensor:
    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        # A forward in eval mode on a CPU has rearranged it; bitsandbytes' way back loses scales.
        raise LoRAStateError(
            f"bitsandbytes has rearranged the weight of this {type(module).__name__} for the CPU, in which form it "
            "cannot be read back.",
            remedy="Load the base again, and add the adapter before the model has run in eval mode.",
        )
    found: Tensor = _functional().dequantize_4bit(module.weight.data, state)
    return found


def _write_4bit(module: Any, weight: Tensor, model: Any) -> None:
    old = module.weight
    settings = {
        name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    }
    module.weight = type(old)(weight.cpu(), requires_grad=False, **settings, module=module).to(old.device)


def _detail_4bit(module: Any) -> str:
    state = module.weight.quant_state
    return str(state.quant_type) + (", double quantisation" if getattr(state, "nested", False) else "")


def _read_8bit(module: Any) -> Tensor:
    scales = getattr(module.weight, "SCB", None)
    found: Tensor = _functional().int8_vectorwise_dequant(
        module.weight.data, module.state.SCB if scales is None else scales
    )
    return found


def _write_8bit(module: Any, weight: Tensor, model: Any) -> None:
    old = module.weight
    module.state = copy.copy(module.state)  # what it holds belongs to the old weight
    module.state.CB = module.state.SCB = None
    module.state.reset_grads()
    module.weight = type(old)(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(old.device)


def _functional() -> Any:
    from bitsandbytes import functional  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return functional


# ---- torchao, quanto, HQQ --------------------------------------------------------------------------------------------


def _read_tensor(module: Any) -> Tensor:
    found: Tensor = module.weight.dequantize()
    return found


def _write_torchao(module: Any, weight: Tensor, model: Any) -> None:
    from torchao.quantization import quantize_  # type: ignore[import-not-found,import-untyped,unused-ignore]

    config: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    make = getattr(config, "get_apply_tensor_subclass", None)
    if make is None:
        raise LoRAUnsupportedError(
            f"How torchao quantised this {type(module).__name__} is not known: the model was not loaded with a "
            "TorchAoConfig.",
            value=type(module.weight).__name__,
            remedy="Pass dequantize=True, or load the model with from_pretrained(..., quantization_config=...).",
        )
    place = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    place.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(place, make())
    if type(place.weight) is not type(module.weight):
        raise LoRAUnsupportedError(
            f"The model's TorchAoConfig gives a {type(place.weight).__name__}, and this layer has a "
            f"{type(module.weight).__name__}.",
            value=type(module.weight).__name__,
            remedy="Pass dequantize=True.",
        )
    module.weight = nn.Parameter(place.weight.detach(), requires_grad=False)


def _write_quanto(module: Any, weight: Tensor, model: Any) -> None:
    old = module.weight
    try:
        module.weight = nn.Parameter(weight, requires_grad=False)
        found = module.qweight  # quanto quantises a weight of floats when it is asked for this
    except BaseException:
        module.weight = old
        raise
    module.weight = nn.Parameter(found.detach(), requires_grad=False)


def _read_hqq(module: Any) -> Tensor:
    found: Tensor = module.dequantize()
    return found.float()  # it quantises what is wider, too


def _write_hqq(module: Any, weight: Tensor, model: Any) -> None:
    base = getattr(type(module), "lora_base", type(module))
    settings = copy.deepcopy(module.quant_config)
    made = {**copy.deepcopy(settings), "offload_meta": module.offload_meta}
    fresh = base(None, made, compute_dtype=module.compute_dtype, device=module.device)
    fresh.quantize(weight, **{name: value for name, value in settings.items() if name != "offload_meta"})
    module.W_q, module.meta = fresh.W_q, fresh.meta


def _detail_tensor(module: Any) -> str:
    kind = getattr(module.weight, "qtype", None)  # quanto's
    return str(getattr(kind, "name", None) or type(module.weight).__name__)


def _detail_hqq(module: Any) -> str:
    settings = module.quant_config.get("weight_quant_params", {})
    return f"{settings.get('nbits')} bits in groups of {settings.get('group_size')}"


# ---- read only -------------------------------------------------------------------------------------------------------


def _read_gptq(module: Any) -> Tensor:
    found: Tensor = module.dequantize_weight()  # (in, out)
    return found.T


def _read_fp8(module: Any) -> Tensor:
    weight, scale = module.weight, module.weight_scale_inv
    rows, columns = (-(-size // count) for size, count in zip(weight.shape, scale.shape, strict=True))
    wide = scale.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    return weight.to(scale.dtype) * wide


def _weight_named(name: str) -> Callable[[Any], bool]:
    return lambda module: type(getattr(module, "weight", None)).__name__ == name


def _weight_from(package: str) -> Callable[[Any], bool]:
    return lambda module: f"{type(getattr(module, 'weight', None)).__module__}.".startswith(f"{package}.")


def _fp8(module: Any) -> bool:
    weight, scale = getattr(module, "weight", None), getattr(module, "weight_scale_inv", None)
    narrow = isinstance(weight, Tensor) and weight.dtype.is_floating_point and weight.dtype.itemsize == 1
    return narrow and isinstance(scale, Tensor) and scale.dim() == 2


def _gptq(module: Any) -> bool:
    return callable(getattr(module, "dequantize_weight", None)) and hasattr(module, "qweight")


def _hqq(module: Any) -> bool:
    return hasattr(module, "W_q") and any(cls.__name__ == "HQQLinear" for cls in type(module).__mro__)


BACKENDS = (
    Backend("bitsandbytes, 4 bits", _weight_named("Params4bit"), _read_4bit, _write_4bit, _detail_4bit),
    Backend("bitsandbytes, 8 bits", _weight_named("Int8Params"), _read_8bit, _write_8bit),
    Backend("torchao", _weight_from("torchao"), _read_tensor, _write_torchao, _detail_tensor),
    Backend("quanto", _weight_from("optimum.quanto"), _read_tensor, _write_quanto, _detail_tensor),
    Backend("HQQ", _hqq, _read_hqq, _write_hqq, _detail_hqq),
    Backend("GPTQ or AWQ", _gptq, _read_gptq),
    Backend("block-wise FP8", _fp8, _read_fp8),
)
"""The first that holds a layer's weight is its backend."""


# ---- bytes -----------------------------------------------------------------------------------------------------------


def sizes_of(module: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Numbers and bytes of a module's own tensors: a quantised weight is out · in numbers, and its scales are bytes.

    Args:
        tensors: those of its Parameters that count, by name.
    """
    backend = backend_of(module)
    if backend is None:
        return sum(t.numel() for t in tensors.values()), sum(stored_bytes(t) for t in tensors.values())
    layer: Any = module
    bias = tensors.get("bias")
    numbers = layer.out_features * layer.in_features + (0 if bias is None else bias.numel())
    scales = [value for value in (vars(module).get("meta") or {}).values() if isinstance(value, Tensor)]  # HQQ's
    held = [*tensors.values(), *module._buffers.values(), *scales]
    return numbers, sum(stored_bytes(tensor) for tensor in held if tensor is not None)


def stored_bytes(tensor: Any) -> int:
    """Bytes of everything that a Parameter holds: packed numbers, scales, zero points."""
    return sum(part.numel() * part.element_size() for part in _parts(tensor, set()))


def _parts(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is not None and not hasattr(value, "full_tensor"):  # one that is split counts whole
        for name in flatten()[0]:
            yield from _parts(getattr(value, name), seen)
        return
    if isinstance(value, Tensor):
        yield value
    state = hasattr(value, "absmax")  # bitsandbytes' state of a weight, which may hold another one
    for part in vars(value).values() if state else [getattr(value, name, None) for name in ("quant_state", "SCB")]:
        if isinstance(part, Tensor) or hasattr(part, "absmax"):
            yield from _parts(part, seen)
