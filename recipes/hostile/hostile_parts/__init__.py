"""The parts of `recipes/hostile/fuzz.py`."""

from __future__ import annotations

from typing import Any


def targets() -> dict[str, Any]:
    """Name -> what makes the target. Importers are found by name in `hf_lora.importers`."""
    from . import answers, calls, files, texts

    return {**files.TARGETS, **texts.TARGETS, **calls.TARGETS, **answers.TARGETS}
