"""What can go wrong in the quickstart, as typed errors."""

from __future__ import annotations

from ..errors import LoRAError

__all__ = ["BaseNotFoundError", "DataError", "MissingExtraError", "SettingsError"]


class SettingsError(LoRAError, ValueError):
    """An option, or the output folder, cannot be used as asked."""


class DataError(LoRAError, ValueError):
    """The task's data is missing or is not what its format says."""


class BaseNotFoundError(LoRAError, FileNotFoundError):
    """The base model is neither on a reachable Hub, nor cached, nor installed as a package."""

    __str__ = LoRAError.__str__


class MissingExtraError(LoRAError, ImportError):
    """A package of an optional extra is not installed."""

    __str__ = LoRAError.__str__
