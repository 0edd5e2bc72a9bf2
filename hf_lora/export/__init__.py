"""Out of adapters: base + adapter as a standalone model folder, tensor by tensor; a GGUF LoRA for llama.cpp."""

from .gguf_lora import GGUFReport, to_gguf
from .merge import MergeReport, merge_to_folder
from .resident import merge_and_save

__all__ = ["GGUFReport", "MergeReport", "merge_and_save", "merge_to_folder", "to_gguf"]
