"""The models that are trained, and a step of each."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from serving_parts import subjects
from torch import Tensor, nn

__all__ = ["FULL", "SETTINGS", "SMOKE", "Setting", "Sizes", "Subjects"]


@dataclass(frozen=True)
class Setting:
    """What is adapted."""

    name: str
    targets: tuple[str, ...]
    rank: int
    dropout: float
    goal: float | None = None  # step ÷ limit
    saved: float | None = None  # bytes kept for the backward ÷ the frozen base's
    fields: tuple[
        tuple[str, Any], ...
    ] = ()  # further keywords of LoRAConfig, and of peft.LoraConfig but for `freeze_a`


SETTINGS = (
    Setting("q, v r=8", subjects.QV, 8, 0.0, 1.03),
    Setting("all-linear r=16", subjects.ALL, 16, 0.0, 1.08, 1.35),
    Setting("all-linear r=16, dropout 0.05", subjects.ALL, 16, 0.05, 1.15, 1.4),
)


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    rounds: int = 6
    shapes: tuple[tuple[int, int], ...] = ((4, 128), (1, 512))  # rows, tokens of each
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    shape: dict[str, Any] | None = None  # of the model; None: SmolLM2-135M itself


FULL = Sizes()
SMOKE = Sizes(rounds=2, shapes=((2, 8),), shape=dict(subjects.TINY))


class Subjects:
    """The base and what is made of it, all over the same weights."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        self.base = subjects.llama(sizes.shape) if sizes.shape else subjects.smollm2()[0]
        self.base = self.base.to(dtype).requires_grad_(False)
        self.made: dict[tuple[str, Setting], Any] = {}

    def limit(self) -> Any:
        """The frozen base whose embeddings ask for a gradient: forward, and the gradient of every layer's input."""
        model = subjects.sharing(self.base).train()
        model.get_input_embeddings().register_forward_hook(lambda module, given, output: output.requires_grad_())
        return model

    def full(self) -> Any:
        """Every weight trained."""
        own = {id(p): nn.Parameter(p.data) for p in self.base.parameters()}  # the same numbers, but trained
        return copy.deepcopy(self.base, own).train()

    def ours(self, setting: Setting) -> Any:
        """hf_lora."""
        from hf_lora import LoRAConfig

        config = LoRAConfig(
            r=setting.rank,
            alpha=setting.rank,
            target_modules=list(setting.targets),
            dropout=setting.dropout,
            **dict(setting.fields),
        )
        model = subjects.sharing(self.base)
        torch.manual_seed(0)
        model.add_lora(config)
        return _filled(model).train()

    def theirs(self, setting: Setting) -> Any:
        """PEFT. What begins from the weights stands on a base less its first product, as PEFT has it."""
        import peft

        fields = dict(setting.fields)
        config = {
            "r": setting.rank,
            "lora_alpha": setting.rank,
            "target_modules": list(setting.targets),
            "lora_dropout": setting.dropout,
        }
        base = self._less(setting) if fields.pop("init", None) else subjects.sharing(self.base)
        freeze = fields.pop("freeze_a", False)
        model = _filled(peft.get_peft_model(base, peft.LoraConfig(**config, **fields)))
        for name, parameter in model.named_parameters():  # as PEFT's optimizer of LoRA-FA has it
            if freeze and ".lora_A." in name:
                parameter.requires_grad_(False)
        return model.train()

    def _less(self, setting: Setting) -> Any:
        """A copy of the base: W − B₀·A₀, with the first pair that hf_lora's has."""
        ours, base = self.ours(setting), copy.deepcopy(self.base)
        with torch.no_grad():
            for path, pair in ours.lora_adapter("default").factors.items():
                first = pair.B[:, setting.rank :] @ pair.A[setting.rank :]  # −B₀·A₀
                base.get_submodule(path).weight += first.to(base.dtype)
        return base


def _filled(model: nn.Module) -> nn.Module:
    """The same factors for both: drawn in the order of the layers, A before B; DoRA's magnitudes stay."""
    factor = re.compile(r"lora_slots\.[AB]\d|lora_[AB]\.")
    trained = [(name, p) for name, p in model.named_parameters() if factor.search(name)]
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(trained, key=lambda pair: _place(pair[0]))):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.copy_(0.02 * noise)
    return model


def _place(name: str) -> tuple[str, str]:
    name = name.removeprefix("base_model.model.").replace("lora_slots.", "").replace(".default.weight", "")
    layer, _, factor = name.rpartition(".")
    return layer, factor.removeprefix("lora_")[0]


def inputs(model: Any, shape: tuple[int, int]) -> Tensor:
    """Token ids, also the labels."""
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def stepper(model: Any, ids: Tensor) -> Callable[[], None]:
    """Forward, loss, backward. The optimizer is no part of it: the limit has none."""
    parameters = list(model.parameters())

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return run


def gradients(model: Any, ids: Tensor) -> Tensor:
    """What a step gives, dropout off: the factors' gradients, or the embeddings' output's where there are none.

    In training mode, since that is what is timed: in eval mode hf_lora's sums are a frozen adapter's.
    """
    kept: list[Tensor] = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, given, output: kept.append(output))
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    with _no_dropout(model):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    handle.remove()
    trained = sorted((_place(n), p) for n, p in model.named_parameters() if p.requires_grad and "lora_" in n)
    found = torch.autograd.grad(loss, [p for _, p in trained] or kept)
    return torch.cat([g.float().flatten() for g in found])


@contextmanager
def _no_dropout(model: Any) -> Iterator[None]:
    """Within the block neither library drops anything."""
    from hf_lora.slots import LoRASlots

    theirs = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    ours = [slot for m in model.modules() if isinstance(m, LoRASlots) for slot in m.slots.values()]
    kept = [slot.dropout for slot in ours]
    for module in theirs:
        module.eval()
    for slot in ours:
        slot.dropout = 0.0
    try:
        yield
    finally:
        for module in theirs:
            module.train()
        for slot, dropout in zip(ours, kept, strict=True):
            slot.dropout = dropout


@contextmanager
def generic() -> Iterator[None]:
    """Within the block no layer takes hf_lora's fused path."""
    from hf_lora import fused

    fits, fused.fits = fused.fits, lambda *_: False
    try:
        yield
    finally:
        fused.fits = fits
