"""`hf-lora quickstart`: a LoRA trained, measured, saved, loaded and merged on real data, in minutes, on a CPU."""

from .run import Interrupted, journey
from .settings import Settings
from .train import Recipe

__all__ = ["Interrupted", "Recipe", "Settings", "journey"]
