"""Adapters out of other formats: loralib, mlx-lm, AdaLoRA, diffusion models' files, fully fine-tuned models."""

from .adalora import from_adalora
from .diffusion import DiffusionLoRA, from_diffusion
from .extract import ExtractedLayer, ExtractedLoRA, Extraction, extract_lora
from .loralib import from_loralib
from .mlx import from_mlx

__all__ = [
    "DiffusionLoRA",
    "ExtractedLayer",
    "ExtractedLoRA",
    "Extraction",
    "extract_lora",
    "from_adalora",
    "from_diffusion",
    "from_loralib",
    "from_mlx",
]
