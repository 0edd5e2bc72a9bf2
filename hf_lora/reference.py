"""The same model, seen as another: what a preference loss compares the adapter with, without a second copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .model import require
from .switching import Which, selection, use_lora

__all__ = ["ReferenceModel"]


class ReferenceModel(nn.Module):
    """A model with a LoRA, called as if `which` were active: the base alone, or a frozen adapter.

    It shares every weight with the model and holds none of its own. Each call is in eval mode; gradients flow to
    adapters in `which` unless the caller turns them off.

    Args:
        model: a model with a LoRA.
        which: as in `set_lora`; None is the base alone.

    Raises:
        LoRAStateError: the model has no LoRA. LoRANameError: no such adapter.
    """

    def __init__(self, model: nn.Module, which: Which = None) -> None:
        super().__init__()
        selection(require(model), which)
        self.model, self.which = model, which

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)  # config, device, get_output_embeddings, …

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with `which` active."""
        # Not in `forward`: who puts another forward on this instance (TRL does) still has it run within the block.
        with self._seen():
            return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the model generates with `which` active."""
        with self._seen():
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def _seen(self) -> Iterator[None]:
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with use_lora(self.model, self.which):
                yield
        finally:
            for module in training:
                module.training = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model(*args, **kwargs)
