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


EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {}
"""model_type → what its small config needs besides the names of its fields: "start" (keywords that the default config
itself needs), "fields" (written over the small ones, nested as the config is), "drop", and "inputs" of the forward."""
