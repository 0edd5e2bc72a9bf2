"""What the names of fields and arguments do not tell: exceptions for single model_types, as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["EXCEPTIONS", "Rule"]


class Rule:
    """Whether a field's name is of a kind."""

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern)

    def __call__(self, name: str) -> bool:
        return self.pattern.search(name) is not None


_SECTIONS = {  # of rotary embeddings with several positions, where the code has its own for heads of 128
    (2, 1, 1): "qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text qwen2_5_omni_text qwen2_5_omni_talker",
    (1, 1, 0): "glm46v glm4v glm4v_moe glm4v_moe_text glm4v_text glm_image_text glm_ocr glm_ocr_text",
}

EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    **{name: {"sections": sections} for sections, names in _SECTIONS.items() for name in names.split()},
    "mobilebert": {"fields": {"hidden_size": 64}},  # the embedding's rest of it would be empty
    "esm": {"start": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 2}},
}
"""model_type → what its small config needs besides the names of its fields: "start" (keywords that the default config
itself needs), "fields" (written over the small ones, nested as the config is), "drop", "sections" (of mrope), and
"inputs" of the forward."""
