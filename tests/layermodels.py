"""Small models of transformers around layers that no tiny language model has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class LayersConfig(PretrainedConfig):
    model_type = "hf_lora_test_layers"


class _Model(PreTrainedModel):
    config_class = LayersConfig
    base_model_prefix = "inner"
    supports_gradient_checkpointing = True

    def _init_weights(self, module: nn.Module) -> None:
        pass  # as torch does

    def finished(self) -> Any:
        self.post_init()
        return self.eval()

    def _run(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if getattr(self, "gradient_checkpointing", False) and self.training:
            found: torch.Tensor = self._gradient_checkpointing_func(part.__call__, x)
            return found
        return part(x)


class Single(_Model):
    """One layer; its logits are the layer's output."""

    main_input_name = "x"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(LayersConfig())
        self.layer = layer
        self.finished()

    def forward(self, x: torch.Tensor, **given: Any) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.layer(x, **given))


class Block(nn.Module):
    """Two convolutions, as of a UNet's or a ResNet's block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding="same", groups=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(torch.tanh(self.conv1(x)))


class Convolutions(_Model):
    """Pictures (N, 3, 8, 8) to three classes: Conv2d of several geometries, and a Linear layer."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__(LayersConfig())
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.gradient_checkpointing = False
        self.point = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 3)
        self.finished()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        x = torch.tanh(self.stem(pixel_values))
        for block in self.blocks:
            x = self._run(block, x)
        logits = self.fc(torch.tanh(self.point(x)).mean((2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Encoder(_Model):
    """Vectors (N, L, 8) to the same: nn.TransformerEncoder of two layers; batch_first or not inside."""

    main_input_name = "x"

    def __init__(self, batch_first: bool = True, layers: int = 2) -> None:
        super().__init__(LayersConfig())
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=batch_first)
        self.batch_first = batch_first
        self.finished()

    def forward(
        self, x: torch.Tensor, padding: torch.Tensor | None = None, labels: torch.Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        turned = x if self.batch_first else x.transpose(0, 1)
        out = self.encoder(turned, src_key_padding_mask=padding)
        out = out if self.batch_first else out.transpose(0, 1)
        loss = None if labels is None else (out.mean(1) - labels[:, None]).square().mean()
        return SequenceClassifierOutput(loss=loss, logits=out)
