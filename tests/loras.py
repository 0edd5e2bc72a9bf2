"""Helpers of the tests: give adapters values that matter."""

from __future__ import annotations

from typing import Any

import torch


def randomise(model: Any, seed: int = 0, scale: float = 0.2) -> None:
    """Fill every trainable factor, bias and head of a model's adapters with random values, so that each has an
    effect.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (".lora_slots." in name or ".lora_heads." in name):
            noise = scale * torch.randn(parameter.shape, generator=generator)
            base = 0 if ".lora_slots." in name else parameter.data  # a head's copy stays near the base's
            parameter.data.copy_(base + noise.to(parameter.dtype))


def with_adapters(model: Any, configs: dict[str, Any]) -> Any:
    """Add frozen adapters with random values; the first is active."""
    for seed, (name, config) in enumerate(configs.items()):
        model.add_lora(config, name)
        randomise(model, seed)
    model.train_lora([])
    model.set_lora(next(iter(configs)))
    return model


def logits(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    """The model's logits (or last hidden state), without gradients."""
    with torch.no_grad():
        output = model(**inputs, **kwargs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def bits(model: Any) -> dict[str, bytes]:
    """Every entry of the state dict as bytes: equal only if every bit is (−0.0 and NaN included)."""
    return {
        key: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for key, tensor in model.state_dict().items()
    }
