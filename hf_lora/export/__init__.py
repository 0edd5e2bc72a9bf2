"""Models out of adapters: base + adapter as a standalone model folder, tensor by tensor."""

from .merge import MergeReport, merge_to_folder

__all__ = ["MergeReport", "merge_to_folder"]
