"""The initialisations by name, as data: ours and PEFT's names, what they do to the base, their settings."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping
from typing import Any

from . import fields
from .errors import LoRAConfigError
from .fields import FrozenMapping

__all__ = [
    "APART",
    "CHANGE_BASE",
    "NAMES",
    "NEED_DATA",
    "OPTIONS",
    "REMEDIES",
    "check",
    "from_peft",
    "method",
    "options",
    "own_options",
    "require_together",
    "settings",
    "to_peft",
    "written",
]

NAMES = (
    *("kaiming", "gaussian", "off", "orthogonal"),
    *("pissa", "olora", "mica", "loftq"),  # from the weights
    *("eva", "lora_ga", "corda"),  # from data
)
_FAST = re.compile(r"pissa_niter_([1-9]\d{0,3})")
# PEFT's word, where it is another.
_FROM_PEFT: dict[Any, str] = {True: "kaiming", False: "off"}
_TO_PEFT: dict[str, Any] = {ours: theirs for theirs, ours in _FROM_PEFT.items()}

# In PEFT these subtract the initial product from the base, so that the factors of a file do not say what the adapter
# computes. (LoftQ rounds the base, which can be done again.)
CHANGE_BASE = frozenset({"pissa", "olora", "corda", "lora_ga"})

NEED_DATA = frozenset({"eva", "lora_ga", "corda"})

# PEFT's field for the settings of an initialisation, and their defaults there.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "eva": (
        "eva_config",
        {
            "rho": 2.0,
            "tau": 0.99,
            "use_label_mask": True,
            "label_mask_value": -100,
            "whiten": False,
            "adjust_scaling_factors": True,
        },
    ),
    "lora_ga": ("lora_ga_config", {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16}),
    "corda": ("corda_config", {"corda_method": "ipm"}),
    "loftq": ("loftq_config", {"loftq_bits": 4, "loftq_iter": 1}),
}
# Settings that PEFT takes elsewhere, so that they are never written.
_UNWRITTEN: dict[str, dict[str, Any]] = {"loftq": {"weights": None}}
# Further settings that PEFT writes; these values of them change nothing.
_WITHOUT_EFFECT: dict[str, dict[str, Any]] = {
    "corda_config": {
        "cache_file": None,
        "covariance_file": None,
        "verbose": False,
        "use_float16_for_covariance": False,
        "prune_temporary_fields": True,
    }
}

_COMPACT = (
    frozenset(NAMES) - {"kaiming", "gaussian", "off"},
    "what that start finds is a plain A and B, which its smaller factors cannot hold",
)
# What a variant's field cannot begin with, and why.
APART: dict[str, tuple[frozenset[str], str]] = {
    "freeze_a": (frozenset({"mica"}), "one keeps A and the other B, so that neither factor would train"),
    "kasa_config": (
        CHANGE_BASE | {"mica", "orthogonal", "loftq"},
        "with σ between A and B this start is not what it is for",
    ),
    "use_dora": (frozenset({"loftq"}), "neither says which weight the magnitudes are of"),
    "alora_invocation_tokens": (
        frozenset({"loftq"}),
        "before the invocation the layer is the base, which is not rounded",
    ),
    "lora_bias": (frozenset({"loftq"}), "PEFT does not have them together, either"),
    "use_bdlora": _COMPACT,
    "use_qalora": _COMPACT,
    "monteclora_config": (CHANGE_BASE | {"loftq"}, "what A began as would be drawn at random, too"),
}

REMEDIES = {
    "file": "This initialisation changed the base's weights: save it again in PEFT with "
    "path_initial_model_for_weight_conversion, which turns it into a plain LoRA.",
}


def check(value: Any) -> None:
    """Raise `LoRAConfigError` unless `value` names an initialisation."""
    if not (isinstance(value, str) and _FAST.fullmatch(value)):
        fields.one_of("init", value, NAMES)


def require_together(init: str, variants: Mapping[str, Any]) -> None:
    """Raise `LoRAConfigError` if one of the variants, fields and their values, cannot begin so."""
    for field, value in variants.items():
        apart, why = APART.get(field, (frozenset(), ""))
        if method(init) in apart and value not in (None, False):
            raise LoRAConfigError(
                f"{field} cannot be combined with init={init!r}: {why}.",
                name=field,
                value=value,
                facts=[f"{field}={value!r}", f"init={init!r}"],
                remedy=f'Leave {field} out, or begin with init="kaiming".',
            )


def method(init: str) -> str:
    """The name without its number of iterations: "pissa" of "pissa_niter_4"."""
    return "pissa" if _FAST.fullmatch(init) else init


def from_peft(value: Any) -> str | None:
    """Our name of PEFT's `init_lora_weights`; None if it is another one."""
    if isinstance(value, bool):
        return _FROM_PEFT[value]
    return value if isinstance(value, str) and (value in NAMES[1:] or _FAST.fullmatch(value)) else None


def to_peft(init: str) -> Any:
    """PEFT's word for it."""
    return _TO_PEFT.get(init, init)


def options(init: str, value: Any) -> FrozenMapping[str, Any]:
    """`init_options` in its normal form. Raises `LoRAConfigError` if one is no setting of the initialisation."""
    if not isinstance(value, Mapping):
        raise fields.wrong("init_options", value, "a mapping from names of settings to their values")
    known = {**(OPTIONS[init][1] if init in OPTIONS else {}), **_UNWRITTEN.get(init, {})}
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            remedy = f"Its settings are {', '.join(known)}." if known else f"Only {', '.join(OPTIONS)} have settings."
            raise LoRAConfigError(
                f"init_options has {name!r}, which init={init!r} does not know.",
                name="init_options",
                value=name,
                expected=tuple(known),
                remedy=f"Did you mean {near[0]!r}?" if near else remedy,
            )
    if init == "loftq":
        _check_loftq({**known, **value})
    return FrozenMapping(copy.deepcopy(dict(value)))


def _check_loftq(given: Mapping[str, Any]) -> None:
    fields.integer("loftq_iter", given["loftq_iter"], least=1)
    if type(given["loftq_bits"]) is not int or given["loftq_bits"] not in (2, 4, 8):
        raise fields.wrong("loftq_bits", given["loftq_bits"], "4 or 8, or 2, which PEFT does not have")
    fields.optional_text("weights", given["weights"])


def written(init: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a file that hold the settings. PEFT has no defaults for LoftQ's, so that they are all written."""
    if init not in OPTIONS or not (given or init == "loftq"):
        return {}
    field, known = OPTIONS[init]
    found = {**(known if init == "loftq" else {}), **given}
    return {field: {name: copy.deepcopy(value) for name, value in found.items() if name in known}}


def own_options(init: str, kept: dict[str, Any]) -> dict[str, Any]:
    """`init_options` from the fields of a file, taken out of `kept`; they stay there if not all can be had."""
    field, known = OPTIONS.get(init, ("", {}))
    found = kept.get(field)
    if init == "loftq" and (not isinstance(found, Mapping) or known.keys() - found.keys()):
        kept.setdefault(field, {})  # PEFT refuses such a file; here it is refused by this field
        return {}
    if not isinstance(found, Mapping):
        return {}
    others = _WITHOUT_EFFECT.get(field, {})
    if not all(name in known or (name in others and others[name] == value) for name, value in found.items()):
        return {}
    del kept[field]
    return {name: value for name, value in found.items() if name in known}


def settings(init: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting: `given` over PEFT's defaults; of PiSSA "niter", 0 where the decomposition is exact."""
    fast = _FAST.fullmatch(init)
    if method(init) == "pissa":
        return {"niter": int(fast[1]) if fast else 0}
    return {**(OPTIONS[init][1] if init in OPTIONS else {}), **_UNWRITTEN.get(init, {}), **given}
