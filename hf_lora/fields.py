"""Checks of `LoRAConfig`'s fields: each returns the value in its normal form, or raises and quotes it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from .errors import LoRAConfigError
from .patterns import compile_pattern, is_literal

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")


_LARGEST = 1e18  # of a scaling; times a mixture's weight, which is bounded likewise, it is still a float32


class FrozenMapping(Mapping[K, V]):
    """A read-only mapping that, unlike `types.MappingProxyType`, can be pickled and deep-copied."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[K, V] | Iterable[tuple[K, V]] = ()) -> None:
        self._items: dict[K, V] = dict(items)

    def __getitem__(self, key: K) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self._items,))


def wrong(name: str, value: Any, expected: str, remedy: str | None = None) -> LoRAConfigError:
    """The error that `name` has this `value`, quoting it."""
    shown = repr(value)
    return LoRAConfigError(
        f"{name}={shown if len(shown) <= 300 else shown[:300] + '…'} is not {expected}.",
        name=name,
        value=value,
        expected=expected,
        remedy=remedy or f"Set {name} to {expected}.",
    )


def is_number(value: Any) -> bool:
    """Whether it is a finite number (no bool) that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def integer(name: str, value: Any, *, least: int) -> int:
    """An integer (no bool) of at least `least`."""
    if not isinstance(value, int) or not is_number(value) or value < least:
        raise wrong(name, value, "a positive integer" if least == 1 else f"an integer of at least {least}")
    return value


def positive(name: str, value: Any) -> float:
    """A positive finite number, as a float."""
    if not is_number(value) or not 0 < value <= _LARGEST:
        raise wrong(name, value, f"a positive finite number of at most {_LARGEST:g}")
    return float(value)


def fraction(name: str, value: Any) -> float:
    """A number in [0, 1), as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise wrong(name, value, "a number from 0 up to but not including 1")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """True or False, and nothing that only looks like them."""
    if not isinstance(value, bool):
        raise wrong(name, value, "True or False")
    return value


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """One of `allowed`; a near match is named."""
    if value in allowed and isinstance(value, str):
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    raise wrong(
        name,
        value,
        "one of " + ", ".join(map(repr, allowed)),
        f"Did you mean {near[0]!r}?" if near else None,
    )


def optional_text(name: str, value: Any) -> None:
    """A string or None."""
    if value is not None and not isinstance(value, str):
        raise wrong(name, value, "a string or None")


def name_list(name: str, value: Any) -> tuple[str, ...]:
    """A sequence or set of non-empty names without duplicates, as a tuple."""
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)  # PEFT holds targets as a set
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise wrong(name, value, "a list of names")
    for item in value:
        if not isinstance(item, str) or not item.strip():
            raise wrong(name, list(value), "a list of non-empty names", f"Remove {item!r} from {name}.")
    twice = sorted({item for item in value if list(value).count(item) > 1}) if len(set(value)) < len(value) else []
    if twice:
        raise wrong(name, list(value), "a list without duplicates", f"Name {', '.join(map(repr, twice))} once.")
    return tuple(value)


def names_or_regex(name: str, value: Any, *, empty: bool = False) -> str | tuple[str, ...] | None:
    """A regular expression that compiles, or names; None for nothing."""
    if value is None:
        return None
    if isinstance(value, str):
        if not value.strip():
            raise wrong(name, value, "a list of names, or a regular expression")
        if value != "all-linear" or name != "target_modules":
            compile_pattern(value, field=name)
        return value
    names = name_list(name, value)
    if not names and not empty:
        raise wrong(name, list(names), "a non-empty list of names", f"Name a module, or leave {name} out.")
    return names or None


def is_empty(value: Any) -> bool:
    """Whether it is a list, tuple or set of nothing."""
    return isinstance(value, list | tuple | set | frozenset) and not value


def optional_names(name: str, value: Any) -> tuple[str, ...] | None:
    """Names or None; a bare string is refused, as it would be taken letter by letter."""
    if isinstance(value, str):
        raise wrong(name, value, "a list of names", f"Write {name}=[{value!r}].")
    return None if value is None else name_list(name, value)


def layers(value: Any) -> int | tuple[int, ...] | None:
    """`layers_to_transform`: an index, or indices without duplicates."""
    name = "layers_to_transform"
    if value is None:
        return None
    if isinstance(value, int):
        return integer(name, value, least=0)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise wrong(name, value, "a layer's index or a non-empty list of them")
    indices = tuple(integer(name, item, least=0) for item in value)
    if len(set(indices)) < len(indices):
        raise wrong(name, list(indices), "a list without duplicates")
    return indices


def ranges(name: str, value: Any) -> tuple[tuple[int, int], ...] | None:
    """Pairs of whole numbers, the first smaller; None for no pairs."""
    expected = "a list of ranges [first, last + 1], such as [[0, 4], [2, 5]]"
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise wrong(name, value, expected)
    for pair in value:
        whole = isinstance(pair, Sequence) and len(pair) == 2 and all(type(number) is int for number in pair)
        if not whole or not 0 <= pair[0] < pair[1]:
            raise wrong(name, value, expected)
    return tuple((first, stop) for first, stop in value) or None


def layer_names(value: Any) -> str | tuple[str, ...] | None:
    """`layers_pattern`: a name, or names."""
    name = "layers_pattern"
    if value is None:
        return None
    names = name_list(name, [value] if isinstance(value, str) else value)
    if not names:
        raise wrong(name, list(names), "a non-empty list of names")
    for item in names:
        compile_pattern(item, field=name)
    return value if isinstance(value, str) else names


def token_ids(name: str, value: Any) -> tuple[int, ...] | None:
    """None, or token ids: a non-empty list of integers of 0 or more."""
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise wrong(name, value, "a non-empty list of token ids")
    return tuple(integer(f"{name}[{i}]", item, least=0) for i, item in enumerate(value))


def numbers(name: str, value: Any, keys: tuple[str, ...]) -> FrozenMapping[str, float] | None:
    """None, or a read-only map from some of `keys` to numbers of 0 or more."""
    if value is None:
        return None
    expected = f"a mapping from {' and '.join(keys)} to numbers of 0 or more"
    if not isinstance(value, Mapping) or not set(value) <= set(keys):
        raise wrong(name, value, expected)
    for item in value.values():
        if not is_number(item) or item < 0:
            raise wrong(name, dict(value), expected)
    return FrozenMapping(value)


def block_diagonal(value: Any) -> FrozenMapping[str, Any] | None:
    """`use_bdlora`: None, or a read-only map of PEFT's four settings, lists as tuples."""
    name = "use_bdlora"
    if value is None:
        return None
    lists = ("target_modules_bd_a", "target_modules_bd_b")
    if not isinstance(value, Mapping) or not set(value) <= {*lists, "nblocks", "match_strict"}:
        raise wrong(name, value, f"a mapping of {lists[0]}, {lists[1]}, nblocks and match_strict")
    found = dict(value)
    for key in lists:
        if found.get(key) is not None:
            found[key] = optional_names(f"{name}[{key!r}]", found[key])
    both = sorted(set(found.get(lists[0]) or ()) & set(found.get(lists[1]) or ()))
    if both:
        raise wrong(name, dict(value), f"a mapping that has {', '.join(map(repr, both))} in one of its lists")
    integer(f"{name}['nblocks']", found.get("nblocks", 1), least=1)
    boolean(f"{name}['match_strict']", found.get("match_strict", True))
    return FrozenMapping(found)


_PARAMETERS_APART = (
    *("use_dora", "lora_bias", "kasa_config", "use_bdlora", "use_qalora", "velora_config", "monteclora_config"),
    *("alora_invocation_tokens", "layer_replication", "fan_in_fan_out"),
)

# Fields that have no meaning together, and why.
_APART = (
    ("use_bdlora", "use_qalora", "neither says of which form A is"),
    ("use_bdlora", "kasa_config", "its loss compares A and B with singular vectors, which blocks cannot be"),
    ("use_qalora", "kasa_config", "its loss compares A with singular vectors, which pooled inputs do not give"),
    *(
        (form, step, "that step of training is of a whole A")
        for form in ("use_bdlora", "use_qalora")
        for step in ("velora_config", "monteclora_config")
    ),
    *(("target_parameters", name, "it is not computed for the experts' parameters") for name in _PARAMETERS_APART),
    ("target_parameters", "dropout", "the input of A cannot be dropped where the pair is part of a parameter"),
)


def require_apart(config: Mapping[str, Any]) -> None:
    """Raise `LoRAConfigError` if two fields are set that have no meaning together."""
    pairs = [*_APART]
    if (config["use_bdlora"] or {}).get("target_modules_bd_b"):
        pairs.append(("lora_bias", "use_bdlora", "in PEFT a block-diagonal B has no bias"))
    if config["bias"] != "none":
        pairs.append(
            ("layer_replication", "bias", "layers that repeat one share its bias, which would train once for all")
        )
    for one, other, why in pairs:
        if all(config[name] not in (None, False) for name in (one, other)):
            raise LoRAConfigError(
                f"{one} cannot be combined with {other}: {why}.",
                name=one,
                value=config[one],
                facts=[f"{name}={config[name]!r}" for name in (one, other)],
                remedy="Leave one of them out.",
            )


def pattern_map(name: str, value: Any, check: Callable[[str, Any], T]) -> FrozenMapping[str, T]:
    """A read-only map from regular expressions to values that pass `check`."""
    if not isinstance(value, Mapping):
        raise wrong(name, value, "a mapping from the end of a module path to a number")
    for key in value:
        if not isinstance(key, str) or not key:
            raise wrong(name, dict(value), "a mapping whose keys are non-empty strings")
        if not is_literal(key):
            compile_pattern(key, field=name)
    return FrozenMapping((key, check(f"{name}[{key!r}]", item)) for key, item in value.items())
