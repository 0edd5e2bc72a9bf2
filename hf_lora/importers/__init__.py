"""Adapters out of other formats: loralib's checkpoints, mlx-lm's adapters, AdaLoRA, fully fine-tuned models."""

from .adalora import from_adalora
from .extract import ExtractedLayer, ExtractedLoRA, Extraction, extract_lora
from .loralib import from_loralib
from .mlx import from_mlx

__all__ = ["ExtractedLayer", "ExtractedLoRA", "Extraction", "extract_lora", "from_adalora", "from_loralib", "from_mlx"]
