"""What the factors of experts are called: `….experts.gate_up_proj[3]` is expert 3 of a 3-D parameter.

A bracket stands in no name of a module, so that such a path is never taken for one. Names in `target_parameters` match
as in PEFT: the whole path of a parameter, or its end after a dot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["expert_of", "matching", "order", "parameter_of", "path_of"]

_EXPERT = re.compile(r"(.+)\[(\d+)\]")
# The order in which transformers' modules register the parameters, which is that of PEFT's nesting.
_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def path_of(parameter: str, expert: int) -> str:
    """The path of one expert's factors."""
    return f"{parameter}[{expert}]"


def expert_of(path: str) -> tuple[str, int] | None:
    """The parameter's path and the number of the expert; None where the path is a module's."""
    if not path.endswith("]"):
        return None
    found = _EXPERT.fullmatch(path)
    return None if found is None else (found[1], int(found[2]))


def parameter_of(path: str) -> str:
    """The path of the parameter, or of the module: what patterns are matched with."""
    found = expert_of(path)
    return path if found is None else found[0]


def matching(names: Iterable[str], path: str) -> bool:
    """Whether one of `names` names the parameter at `path`."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def order(names: Iterable[str]) -> list[str]:
    """Names of one module's parameters in the order in which PEFT wraps them, the innermost first."""
    return sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
