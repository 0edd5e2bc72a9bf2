"""One training step of a model on meta, and the bytes that it holds."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import LoRAUnsupportedError
from ..survey import survey
from .ledger import DeviceKernels, Ledger
from .optimizers import Factory

__all__ = ["Step", "example", "optimizer_state", "run"]

_LOSS = "loss"  # the phase from the output head on
_ONE_LABEL = ("SequenceClassification", "ImageClassification", "MultipleChoice", "AudioClassification")


@dataclass(frozen=True)
class Step:
    """Bytes: kept by the forward for the backward; the part of head and loss; the most held beside what was there."""

    activation: int
    loss: int
    peak: int


def run(model: nn.Module, inputs: Mapping[str, Any], optimizer: Optimizer, device: str) -> Step:
    """Forward, backward and optimizer step of a model on meta whose optimizer has its state.

    Raises:
        whatever the model's forward does, where it asks for values that meta does not have.
    """
    there = [*model.parameters(), *model.buffers(), *_tensors(inputs), *_tensors(optimizer.state)]
    ledger = Ledger(there)
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda *_: setattr(ledger, "phase", _LOSS))
        for path in survey(model).head
    ]
    try:
        with DeviceKernels(device), ledger:
            loss = _loss(model(**inputs))
            activation, lost = ledger.live - loss.nbytes, max(ledger.held(_LOSS) - loss.nbytes, 0)
            loss.backward()
            del loss
            ledger.any_number = True
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    finally:
        for hook in hooks:
            hook.remove()
    return Step(activation, lost, ledger.peak)


def optimizer_state(model: nn.Module, make: Factory) -> Optimizer:
    """An optimizer of what trains on a meta model, after a step, so that it has its state."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make(trained)
    ledger = Ledger(())
    ledger.any_number = True
    with ledger:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def nbytes(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state."""
    return sum(tensor.nbytes for tensor in _tensors(optimizer.state))


def example(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    """A batch without values for a model of transformers, labels included where it computes a loss.

    Raises:
        LoRAUnsupportedError: it takes neither tokens nor images.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    takes = inspect.signature(model.forward).parameters
    kind: dict[str, Any] = {"dtype": torch.long, "device": "meta"}
    if main == "input_ids":
        inputs: dict[str, Any] = {main: torch.empty(batch, length, **kind)}
    elif main == "pixel_values" and isinstance(getattr(config, "image_size", None), (int, tuple, list)):
        side = config.image_size
        sides = (side, side) if isinstance(side, int) else tuple(side)
        dtype = next(model.parameters()).dtype
        inputs = {main: torch.empty(batch, config.num_channels, *sides, dtype=dtype, device="meta")}
    else:
        raise LoRAUnsupportedError(
            f"What a batch of {type(model).__name__} looks like is not known.",
            name="inputs",
            value=main,
            remedy="Give one: plan(model, inputs=batch).",
        )
    if "use_cache" in takes:
        inputs["use_cache"] = False
    if "labels" in takes:
        one = any(word in type(model).__name__ for word in _ONE_LABEL)
        inputs["labels"] = torch.empty(*((batch,) if one else (batch, length)), **kind)
    elif {"start_positions", "end_positions"} <= takes.keys():
        inputs |= {name: torch.empty(batch, **kind) for name in ("start_positions", "end_positions")}
    elif "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = torch.empty(batch, length, **kind)
    return inputs


def _loss(output: Any) -> Tensor:
    """The model's loss; of a model that has none, the sum of its first output."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    return next(t for t in _tensors(output) if t.is_floating_point() and t.requires_grad).sum()


def _tensors(held: Any) -> Iterator[Tensor]:
    """Every tensor in mappings and sequences."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, Iterable) and not isinstance(held, (str, bytes)):
        for value in held:
            yield from _tensors(value)
