"""Single rows of an embedding that train (`trainable_token_indices`), and of the output head that is tied to it.

    E' = E with rows[i] in the place of row ids[i]

The rows themselves are stored, not a difference: what an embedding was resized to begins at random, and a difference to
other random numbers would mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import LoRATargetError, LoRAUnsupportedError
from .functional import embed_scaled
from .layerinfo import modules_of
from .ties import tied
from .tokenfields import NAME, ROWS, ids_of
from .weights import is_dense, materialised

__all__ = [
    "RowsOf",
    "TokenRows",
    "initial_rows",
    "problems_of",
    "rows_name",
    "rows_of",
    "shared_rows",
    "sharing",
    "token_paths",
    "token_problems",
]


class TokenRows(nn.Module):
    """One adapter's rows of an embedding or of an output head. ids: (n,) int64. rows: (n, d)."""

    ids: Tensor
    found: Tensor
    order: Tensor

    def __init__(self, ids: Sequence[int], rows: nn.Parameter, base: nn.Module) -> None:
        super().__init__()
        padding = getattr(base, "padding_idx", None)  # its row gets no gradient, as in the embedding
        self.padding = list(ids).index(padding) if padding is not None and padding in ids else None
        self.token_adapter = nn.Module()
        self.token_adapter.trainable_tokens_delta = rows
        own = torch.tensor(ids, device=rows.device, dtype=torch.int64)
        found, order = own.sort()
        for name, tensor in {"ids": own, "found": found, "order": order}.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def rows(self) -> nn.Parameter:
        """The rows, (n, d), in the order of `ids`."""
        rows: nn.Parameter = self.token_adapter.trainable_tokens_delta  # type: ignore[assignment]
        return rows

    def beside(self, base: nn.Module) -> TokenRows:
        """The same rows, the same Parameter, for a module that shares the weight."""
        return TokenRows(self.ids.tolist(), self.rows, base)

    def replace(self, base: nn.Module, output: Tensor, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Linear's
        """The base's `output` as it would be with these rows in its weight.

        Args:
            input: token ids (...) of an embedding, or (..., d) of a head.
            output: (..., d), or (..., V) of a head.
        """
        weight: Tensor = base.weight  # type: ignore[assignment]
        rows = self.rows.to(weight.dtype)
        if not isinstance(base, nn.Embedding):
            return output.index_copy(-1, self.ids, F.linear(input, rows).to(output.dtype))
        x = input.long()
        at = torch.searchsorted(self.found, x).clamp(max=len(self.found) - 1)
        new = embed_scaled(F.embedding(self.order[at], rows, padding_idx=self.padding), base)
        return torch.where((self.found[at] == x)[..., None], new.to(output.dtype), output)


def token_paths(model: nn.Module, indices: Any) -> dict[str, tuple[int, ...]]:
    """Paths of the modules of which rows train, each once, and their token ids.

    Raises:
        LoRATargetError: a key names no module, or the model has no input embedding.
    """
    if indices is None:
        return {}
    modules = modules_of(model)
    if not isinstance(indices, Mapping):
        own = _input_embedding(model)
        paths = [path for path, module in modules.items() if module is own][:1]
        if not paths:
            raise LoRATargetError(
                f"{NAME}: a {type(model).__name__} does not say which its input embedding is",
                name=NAME,
                value=list(indices),
                remedy=f"Name it: {NAME}={{'embed_tokens': [...]}}.",
            )
        return {paths[0]: tuple(indices)}
    found: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for key, ids in indices.items():
        ends = [path for path in modules if path.endswith(key)]
        if not ends:
            raise LoRATargetError(
                f"{NAME}: {key!r} matches no module of {type(model).__name__}",
                name=NAME,
                value=key,
                remedy="Name the embedding, such as embed_tokens.",
            )
        for path in ends:
            if id(modules[path]) not in seen:
                seen.add(id(modules[path]))
                found[path] = ids
    for path, ids in list(found.items()):  # of modules that share a weight and ids, the first holds the rows
        for other in sharing(model, path):
            if other in found and found[other] == ids and path in found and _first(model, path, other):
                del found[other]
    return found


def _input_embedding(model: nn.Module) -> nn.Module | None:
    found: nn.Module | None = getattr(model, "get_input_embeddings", lambda: None)()
    return found


def _first(model: nn.Module, path: str, other: str) -> bool:
    """Whether of two modules that share a weight this one is the embedding whose name PEFT's file uses."""
    own = _input_embedding(model)
    if own is not None and own in (model.get_submodule(path), model.get_submodule(other)):
        return model.get_submodule(path) is own
    return list(modules_of(model)).index(path) < list(modules_of(model)).index(other)


def sharing(model: nn.Module, path: str) -> tuple[str, ...]:
    """Paths of the modules, each once, whose weight is this module's: where its rows count, too."""
    modules = modules_of(model)
    seen, found = {id(modules[path])}, []
    for name in tied(model, [f"{path}.weight"]).get(f"{path}.weight", ()):
        other = name.rpartition(".")[0]
        if id(modules[other]) not in seen:
            seen.add(id(modules[other]))
            found.append(other)
    return tuple(found)


def token_problems(path: str, module: nn.Module | None, rows: Tensor, ids: Sequence[int]) -> list[str]:
    """Why rows cannot stand in for a module's; empty if they can."""
    if module is None:
        return [f"{path}: the model has no such module"]
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, nn.Embedding | nn.Linear) or not is_dense(module):
        return [
            f"{path}: {NAME} is for an embedding, or a head, that is not quantised; it is a {type(module).__name__}"
        ]
    problems = []
    if tuple(rows.shape) != (len(ids), weight.shape[1]):
        problems.append(f"{path}: the rows are {tuple(rows.shape)}, the layer has {len(ids)} of {weight.shape[1]}")
    beyond = [i for i in ids if i >= weight.shape[0]]
    if beyond:
        more = "" if len(beyond) == 1 else f" and {len(beyond) - 1} more"
        problems.append(
            f"{path}: token {beyond[0]}{more} is beyond its {weight.shape[0]} rows: call "
            "resize_token_embeddings(len(tokenizer)) first"
        )
    if isinstance(module, nn.Linear) and module.bias is not None:
        problems.append(f"{path}: {NAME} of a head with a bias, which PEFT leaves out, is not supported")
    return problems


def initial_rows(module: nn.Module, path: str, ids: Sequence[int], *, whole: bool = False) -> dict[str, Tensor]:
    """A new adapter's rows: the base's own. `whole`: whether the module is to train whole, too, which is refused."""
    own = getattr(module, "weight", None)
    width = own.shape[-1] if isinstance(own, Tensor) else 0
    problems = token_problems(path, module, torch.empty(len(ids), width, device="meta"), ids)
    if whole:
        problems = [f"{path}: it trains whole (modules_to_save)"]
    if problems:
        raise LoRAUnsupportedError(
            f"{problems[0]}.", name=NAME, value=list(ids), facts=problems, remedy="Name other tokens, or none."
        )
    weight = materialised(module, "weight")
    return {ROWS: weight[torch.tensor(ids, device=weight.device)].detach().clone()}


def rows_of(module: nn.Module, slot: int) -> TokenRows | None:
    """The rows that the adapter in this slot has of a module, if it has rows of it."""
    heads: Any = module._modules.get("lora_heads")
    held = None if heads is None else heads.copies._modules.get(str(slot))
    return held if isinstance(held, TokenRows) else None


def shared_rows(model: nn.Module, path: str, slot: int) -> tuple[str, ...]:
    """Paths of the other modules that have the same rows as this one, and share its weight."""
    own = rows_of(model.get_submodule(path), slot)
    if own is None:
        return ()
    alike = [(other, rows_of(model.get_submodule(other), slot)) for other in sharing(model, path)]
    return tuple(other for other, rows in alike if rows is not None and rows.rows is own.rows)


def rows_name(path: str, slot: int) -> str:
    """What `RowsOf` calls the rows of a module's weight that the adapter in this slot has."""
    return f"{path}.weight#{slot}"


class RowsOf(dict[str, Tensor]):
    """A model's tensors by name; and by `rows_name` rows of them, which are copies."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.model = model

    def __missing__(self, name: str) -> Tensor:
        weight, ids = self._place(name)
        return weight.index_select(0, ids)

    def _place(self, name: str) -> tuple[Tensor, Tensor]:
        key, _, slot = name.rpartition("#")
        held = rows_of(self.model.get_submodule(key.rpartition(".")[0]), int(slot)) if key in self else None
        if held is None:
            raise KeyError(name)
        return self[key], held.ids.to(self[key].device)

    def write(self, name: str, value: Tensor) -> None:
        """Write a tensor, or rows of one, in place."""
        if name in self:
            self[name].copy_(value)
        else:
            weight, ids = self._place(name)
            weight.index_copy_(0, ids, value.to(weight))


def problems_of(
    model: nn.Module, modules: Mapping[str, nn.Module], value: Any
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Where else the rows of a value count, by path; and what does not fit."""
    shared: dict[str, tuple[str, ...]] = {}
    problems: list[str] = []
    for path, tensors in value.modules.items():
        if ROWS not in tensors:
            continue
        ids = ids_of(value.config.trainable_token_indices, path) or ()
        module = modules.get(path)
        problems += token_problems(path, module, tensors[ROWS], ids)
        if module is None:
            continue
        first = module is _input_embedding(model)  # PEFT ties what names the input embedding, and nothing else
        beside = [other for other in sharing(model, path) if first]
        shared[path] = tuple(other for other in beside if other not in value.modules)
        problems += [
            f"{other}: it shares the weight of {path}, whose rows train, and trains whole"
            for other in beside
            if other in value.modules and ROWS not in value.modules[other]
        ]
        for other in shared[path]:
            problems += token_problems(other, modules[other], tensors[ROWS], ids)
            if other in value.factors:
                problems.append(f"{other}: it shares the weight of {path}, whose rows train, and has factors")
    return shared, problems
