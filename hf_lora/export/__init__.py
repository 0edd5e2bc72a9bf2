"""Models out of adapters: base + adapter as a standalone model folder, tensor by tensor."""

from .merge import MergeReport, merge_to_folder
from .resident import merge_and_save

__all__ = ["MergeReport", "merge_and_save", "merge_to_folder"]
