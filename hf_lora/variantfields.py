"""The settings of variants that act while training, under PEFT's names: checked, and filled with PEFT's defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import fields
from .errors import LoRAConfigError
from .fields import FrozenMapping

__all__ = ["SETTINGS", "check_together", "settings"]

Check = Callable[[str, Any], Any]


def _count(name: str, value: Any) -> int:
    return fields.integer(name, value, least=1)


def _weight(name: str, value: Any) -> float:
    if not fields.is_number(value) or value < 0:
        raise fields.wrong(name, value, "a number of 0 or more")
    return float(value)


def _projection(name: str, value: Any) -> str:
    fields.one_of(name, value, ("batch_average", "batch_average_once", "random"))
    return str(value)


# Field -> setting -> its default, and the check that gives its normal form.
SETTINGS: Mapping[str, Mapping[str, tuple[Any, Check]]] = {
    "velora_config": {
        "num_groups": (64, _count),
        "scale": (1.0, fields.positive),
        "init_type": ("batch_average", _projection),
    },
    "monteclora_config": {
        "num_samples": (8, _count),
        "use_entropy": (False, fields.boolean),
        "dirichlet_prior": (0.1, fields.positive),
        "sample_scaler": (1e-4, _weight),
        "kl_loss_weight": (1e-5, _weight),
        "buffer_size": (150, _count),  # how many draws PEFT makes at once
    },
}

_APART = {
    "velora_config": "it changes how A's gradient is taken, and freeze_a=True takes none",
    "monteclora_config": "it learns how A is distributed, and freeze_a=True keeps A",
}


def settings(field: str, value: Any) -> FrozenMapping[str, Any] | None:
    """None, or every setting of the field, read-only: those given over the defaults.

    Raises:
        LoRAConfigError: a setting is unknown or impossible.
    """
    if value is None:
        return None
    known = SETTINGS[field]
    if not isinstance(value, Mapping) or not set(value) <= set(known):
        raise fields.wrong(field, value, f"None or a mapping from some of {', '.join(known)}")
    return FrozenMapping(
        {
            name: check(f"{field}[{name!r}]", value[name]) if name in value else default
            for name, (default, check) in known.items()
        }
    )


def check_together(config: Any) -> None:
    """Raise `LoRAConfigError` if a variant's settings contradict another field."""
    for field, why in _APART.items():
        if getattr(config, field) is not None and config.freeze_a:
            raise LoRAConfigError(
                f"{field} cannot be combined with freeze_a=True: {why}.",
                name=field,
                value=dict(getattr(config, field)),
                remedy="Leave one of them out.",
            )
