"""From `target_parameters` to the 3-D parameters of one model: names match as in PEFT."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .config import LoRAConfig
from .errors import LoRAConfigError, LoRAError, LoRATargetError, LoRAUnsupportedError
from .expertnames import matching
from .layerinfo import describe_layer, why_not

__all__ = ["ExpertTarget", "describe_parameter", "expert_targets", "parameter_problem"]

_FIELD = "target_parameters"


@dataclass(frozen=True)
class ExpertTarget:
    """A 3-D parameter that takes a LoRA for each of its experts.

    Attributes:
        path: the parameter's name.
        experts: E.
        in_features, out_features: of each.
        turned: it is (E, in, out), otherwise (E, out, in).
        rank, alpha: of each expert's pair.
    """

    path: str
    experts: int
    in_features: int
    out_features: int
    turned: bool
    rank: int = 0
    alpha: float = 0.0


def describe_parameter(module: nn.Module, path: str) -> ExpertTarget | None:
    """Sizes of a 3-D parameter; None where the module has none of this name, or it cannot take a LoRA."""
    parameter = module._parameters.get(path.rpartition(".")[2])
    if parameter is None or parameter.ndim != 3 or not parameter.dtype.is_floating_point:
        return None
    if parameter.dtype.itemsize < 2 or type(parameter) is not nn.Parameter:
        return None
    turned = bool(getattr(module, "is_transposed", False))
    experts, one, other = parameter.shape
    sizes = (one, other) if turned else (other, one)
    return ExpertTarget(path, experts, *sizes, turned)


def parameter_problem(module: nn.Module | None, path: str) -> str | None:
    """Why a parameter takes no LoRA of experts; None if it does."""
    parameter = None if module is None else module._parameters.get(path.rpartition(".")[2])
    if module is None or parameter is None:
        return "the model has no such parameter"
    if describe_parameter(module, path) is not None:
        return None
    if parameter.ndim == 3:
        return f"it is {parameter.dtype} ({type(parameter).__name__}), and experts are adapted in a dense dtype"
    if describe_layer(module) is not None:
        return f"it is the weight of a {type(module).__name__}: name the layer in target_modules"
    reason, _ = why_not(module)
    return f"it has {parameter.ndim} dimensions, not 3, and its {type(module).__name__} takes no LoRA ({reason})"


def expert_targets(
    model: nn.Module, config: LoRAConfig, modules: Mapping[str, nn.Module], *, from_file: bool, notes: list[str]
) -> tuple[ExpertTarget, ...]:
    """The 3-D parameters that a config names, in the model's order.

    Raises:
        LoRATargetError: a name matches nothing. LoRAUnsupportedError: it matches what is no experts' parameter.
        LoRAConfigError: a rank above what an expert's matrix can have.
    """
    if config.target_parameters is None:
        return ()
    seen: set[int] = set()
    own = {
        f"{path}.{name}": module
        for path, module in modules.items()
        if path and not (id(module) in seen or seen.add(id(module)))  # type: ignore[func-returns-value]
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    found: dict[str, ExpertTarget] = {}
    for name in config.target_parameters:
        paths = [path for path in own if matching((name,), path)]
        if not paths:
            if not from_file:
                raise _unknown(name, model, list(own))
            notes.append(f"{_FIELD} {name!r}: matches no parameter of this model")
        for path in paths:
            info = describe_parameter(own[path], path)
            if info is None:
                raise LoRAUnsupportedError(
                    f"{_FIELD}: {name!r} matches {path}; {parameter_problem(own[path], path)}.",
                    name=_FIELD,
                    value=name,
                    remedy="Name 3-D parameters of experts, such as 'experts.gate_up_proj', and layers in "
                    "target_modules.",
                )
            found[path] = info
    resolved = config.resolve(found)
    targets = []
    for path, info in ((path, found[path]) for path in own if path in found):
        rank, alpha = resolved[path]
        most = min(info.in_features, info.out_features)
        if rank > most and not from_file:
            raise LoRAConfigError(
                f"rank {rank} is above {most}, the largest that an expert of {path!r} can have "
                f"({info.out_features} x {info.in_features})",
                name="r",
                value=rank,
                expected=f"at most {most}",
                remedy=f"Use r <= {most}, or give this parameter its own rank in rank_pattern.",
            )
        targets.append(ExpertTarget(**{**vars(info), "rank": rank, "alpha": alpha}))
    if targets and config.layers_to_transform not in (None, ()):
        notes.append(f"layers_to_transform does not narrow {_FIELD} (as in PEFT): name whole paths there")
    return tuple(targets)


def _unknown(name: str, model: nn.Module, paths: list[str]) -> LoRAError:
    ends = sorted({".".join(path.split(".")[-2:]) for path in paths})
    close = difflib.get_close_matches(".".join(name.split(".")[-2:]), ends, n=3, cutoff=0.4)
    return LoRATargetError(
        f"{_FIELD}: {name!r} matches no parameter of {type(model).__name__}",
        name=_FIELD,
        value=name,
        remedy=f"Did you mean {', '.join(map(repr, close))}?" if close else "Name a parameter's path, or its end.",
    )
