"""`plan`: what training a LoRA takes, before anything is loaded or allocated."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import POSITIONS
from ..config import LoRAConfig
from ..errors import LoRAConfigError, LoRAError
from ..fields import boolean, integer, one_of
from ..model import add, read
from ..store import weights_nbytes
from ..targeting import Resolution, roles_of
from . import skeleton
from .budget import propose
from .ledger import DeviceKernels
from .optimizers import factory
from .result import Proposal, TrainingPlan
from .step import Step, example, nbytes, optimizer_state, run

__all__ = ["plan"]

_LENGTH = 512


def plan(
    model_or_config: Any,
    config: LoRAConfig | Any = None,
    *,
    batch: int = 1,
    length: int | None = None,
    optimizer: Any = "adamw",
    dtype: torch.dtype | str | None = None,
    budget: int | None = None,
    gradient_checkpointing: bool = False,
    device: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    quantization_config: Any = None,
) -> TrainingPlan:
    """What training a LoRA takes: parameters, bytes of the file, and the memory of a training step.

        peak = base + adapter + optimizer state + max over the step of (activations + gradients + temporary tensors)

    One step (forward, backward, optimizer) runs on the device meta, with the layers that `add_lora` makes, and every
    tensor is counted from when it is made until it is freed. Nothing is loaded, computed or stored, so a model of any
    size can be planned for. The batch is full, without padding. Not counted: an allocator's fragmentation, the
    libraries' own workspaces (cuBLAS), and whatever else the process holds.

    Args:
        model_or_config: a model (with weights or on meta; it is left alone), its configuration, an id on the Hub, a
            folder, or a config.json. Of these only the configuration is read.
        config: what to adapt: a `LoRAConfig` or a `peft.LoraConfig`; None is `LoRAConfig()`. Its `task_type` chooses
            the head where there is no model yet.
        batch: rows of a step.
        length: tokens of a row; None is 512, or what the model takes at most.
        optimizer: a name ("adamw", "sgd", "adafactor", …), an optimizer's class, or a function of the parameters.
        dtype: of the base; None is the model's own.
        budget: trainable parameters at most. `target_modules`, where `config` names none, and `r` are then proposed.
        gradient_checkpointing: compute activations again in the backward.
        device: whose kernels to assume, "cpu" or "cuda"; None is the model's own, and "cuda" where it has none.
        inputs: a batch to take instead of `batch` and `length`; only shapes and dtypes are looked at.
        quantization_config: plan for a base that is quantised so, though its configuration says nothing of it: what
            from_pretrained takes. A quantised weight is counted packed, and dequantised for each of its products.

    Returns:
        the plan; `plan.lora_config` is what `add_lora` takes. Where the model's forward needs values (a router of
        experts, say) the bytes of a step are None, and `notes` says so.

    Raises:
        LoRAConfigError: an argument is impossible; a budget that is too small (it says what the least is).
        LoRATargetError, LoRAUnsupportedError: the config does not fit the model, as in `add_lora`.
        LoRAStateError: the model is merged.

    Source: Hu et al. 2021, section 4.2 (memory) and table 5 (budget).
    """
    integer("batch", batch, least=1)
    if length is not None:
        integer("length", length, least=1)
    boolean("gradient_checkpointing", gradient_checkpointing)
    if device is not None:
        one_of("device", device, ("cpu", "cuda"))
    optimizer_name, make = factory(optimizer)
    wanted = skeleton.dtype_of(dtype)
    if config is not None and not isinstance(config, LoRAConfig):
        config = LoRAConfig.from_peft(config)
    with _quiet():
        model, notes, own_device = _skeleton(model_or_config, config, wanted, quantization_config)
    device = device or own_device
    base_parameters, base_bytes = skeleton.base_nbytes(model)
    base_dtype = str(next((p.dtype for p in model.parameters() if p.is_floating_point()), "")).removeprefix("torch.")
    proposals: tuple[Proposal, ...] = ()
    if budget is not None:
        proposals = propose(model, config, budget)
        config = proposals[0].lora_config
    config = LoRAConfig() if config is None else config
    if inputs is None:
        length = _length(model, length, notes)
    else:
        batch, length = _shape(inputs)
    with _quiet():
        model.train()
        if gradient_checkpointing:
            _checkpoint(model, device)
        found = add(model, config)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        held = optimizer_state(model, make)
        step = _step(model, inputs, batch, length, held, device, notes)
    static = base_bytes + sum(p.nbytes for p in trained) + nbytes(held)
    return TrainingPlan(
        model=type(model).__name__,
        lora_config=config,
        targets=_targets(model, found),
        trainable_parameters=sum(p.numel() for p in trained),
        base_parameters=base_parameters,
        adapter_bytes=weights_nbytes(read(model, "default")),
        base_bytes=base_bytes,
        trainable_bytes=sum(p.nbytes for p in trained),
        gradient_bytes=sum(p.nbytes for p in trained),
        optimizer_bytes=nbytes(held),
        activation_bytes=None if step is None else step.activation,
        loss_bytes=None if step is None else step.loss,
        peak_bytes=None if step is None else static + step.peak,
        batch=batch,
        length=length,
        dtype=base_dtype,
        optimizer=optimizer_name,
        device=device,
        gradient_checkpointing=gradient_checkpointing,
        proposals=proposals,
        notes=tuple(notes),
    )


def _skeleton(
    source: Any, config: LoRAConfig | None, dtype: torch.dtype | None, quantisation: Any
) -> tuple[Any, list[str], str]:
    """The model on meta, notes, and the kind of device to plan for."""
    if isinstance(source, nn.Module):
        if quantisation is not None:
            raise LoRAConfigError(
                "quantization_config is for what is not loaded yet, and a model was given.",
                name="quantization_config",
                value=quantisation,
                remedy="Give the model's configuration, or leave quantization_config out: a model's own is seen.",
            )
        own = next((p.device.type for p in source.parameters() if not p.is_meta), "cuda")
        model, notes = skeleton.from_model(source), list[str]()
        if dtype is not None:
            model = model.to(dtype)
    else:
        if isinstance(source, (str, os.PathLike)):
            source = skeleton.read_config(source)
        elif not hasattr(source, "to_dict"):
            raise LoRAConfigError(
                f"model_or_config={source!r} is neither a model nor a configuration.",
                name="model_or_config",
                value=source,
                remedy="Give a model, its config, an id on the Hub, a folder, or a config.json.",
            )
        own = "cuda"
        model, notes = skeleton.from_config(source, None if config is None else config.task_type, dtype, quantisation)
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        notes.append(f"attention {attention!r} does not run without values: counted as sdpa")
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return model, notes, own if own in ("cpu", "cuda") else "cuda"


def _shape(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and length of a batch: the first two sizes of its first tensor."""
    first = next((value for value in inputs.values() if isinstance(value, Tensor) and value.dim()), None)
    if first is None:
        raise LoRAConfigError(
            f"inputs={list(inputs)} holds no tensor.",
            name="inputs",
            value=inputs,
            remedy='Give a batch, such as {"input_ids": ids, "labels": ids}.',
        )
    return first.shape[0], first.shape[1] if first.dim() > 1 else 1


def _length(model: nn.Module, length: int | None, notes: list[str]) -> int:
    """The tokens of a row. Raises `LoRAConfigError` if the model has a table of fewer positions."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return length or _LENGTH
    if length is None:
        return min(_LENGTH, most)
    if length <= most:
        return length
    table = any(
        isinstance(module, nn.Embedding) and POSITIONS.search(path.rpartition(".")[2])
        for path, module in model.named_modules()
    )
    if table:
        raise LoRAConfigError(
            f"length={length} is more than the {most} positions that {type(model).__name__} has.",
            name="length",
            value=length,
            expected=f"at most {most}",
            remedy=f"Give a length of at most {most}.",
        )
    notes.append(f"length={length} is more than the {most} positions that the model was made for")
    return length


def _checkpoint(model: Any, device: str) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise LoRAConfigError(
            f"gradient_checkpointing=True: {type(model).__name__} has none.",
            name="gradient_checkpointing",
            value=True,
            remedy="Leave it out.",
        )
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    # Autograd recomputes outside of the modes of functions that surround the backward.
    enable({"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), DeviceKernels(device))})


def _step(
    model: nn.Module,
    inputs: Mapping[str, Any] | None,
    batch: int,
    length: int,
    optimizer: Any,
    device: str,
    notes: list[str],
) -> Step | None:
    if inputs is None:
        given = example(model, batch, length)
    else:
        given = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    try:
        return run(model, given, optimizer, device)
    except LoRAError:
        raise
    except Exception as error:  # noqa: BLE001  # a forward that wants values may fail in any way
        said = str(error).partition("\n")[0]
        notes.append(
            f"the bytes of a step are unknown, for the forward needs values: {type(error).__name__}: {said[:200]}"
        )
        return None


def _targets(model: nn.Module, found: Resolution) -> dict[str, int]:
    roles, counts = roles_of(model), Counter[str]()
    for target in found.targets:
        names = [role for role, _ in target.blocks]
        counts.update(names or ["+".join(roles.get(target.path) or (target.path.rpartition(".")[2],))])
    counts.update(f"{t.path.rpartition('.')[2]} of {t.experts} experts" for t in found.parameters)
    return dict(counts)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice, which is for a run."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
