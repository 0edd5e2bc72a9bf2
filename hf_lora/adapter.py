"""`LoRAAdapter`: an adapter as a value, with load and save."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from . import store
from .loading import read_source
from .values import AdapterValue

__all__ = ["LoRAAdapter"]


class LoRAAdapter(AdapterValue):
    """A config and its factors, apart from any model."""

    @classmethod
    def of(cls, value: AdapterValue) -> LoRAAdapter:
        """The same adapter with this class's methods."""
        return cls(**{field.name: getattr(value, field.name) for field in dataclasses.fields(value)})

    @classmethod
    def load(cls, source: str | os.PathLike[str], *, allow_pickle: bool = False, **options: Any) -> LoRAAdapter:
        """Read an adapter from a folder or a repo on the Hub.

        Args:
            source: a folder (wins), or "user/name".
            allow_pickle: read an adapter_model.bin (weights only) where there are no safetensors.
            options: subfolder, revision, token, cache_dir, local_files_only.

        Raises:
            LoRAFileError: a file is missing, truncated or malformed. LoRAUnsupportedError: another kind of adapter.
        """
        return cls.of(read_source(source, allow_pickle=allow_pickle, **options))

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write it in PEFT's format, atomically. Raises `LoRAFileError`; what was there then stays."""
        return store.write_adapter(self, directory)
