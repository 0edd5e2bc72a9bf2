"""Batches, and what goes into the layers when a model reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .. import initnames
from ..config import LoRAConfig
from ..errors import LoRAConfigError, LoRAStateError
from ..weights import device_of

__all__ = [
    "bar",
    "empty",
    "moved",
    "outside",
    "positions",
    "require_data",
    "require_seen",
    "rows_of",
    "same_input",
    "watching",
]


def require_data(config: LoRAConfig, data: Any) -> None:
    """Raise `LoRAConfigError` unless data are given exactly where the initialisation looks at them."""
    needed = config.init in initnames.NEED_DATA
    if needed and data is None:
        raise LoRAConfigError(
            f"init={config.init!r} looks at data, and there are none.",
            name="data",
            value=None,
            expected="batches that the model takes",
            remedy="Give a DataLoader: add_lora(config, data=loader).",
        )
    if data is not None and not needed:
        raise LoRAConfigError(
            f"init={config.init!r} looks at no data.",
            name="data",
            value=type(data).__name__,
            remedy=f"Leave data out, or set init to one of {', '.join(map(repr, sorted(initnames.NEED_DATA)))}.",
        )
    if data is not None and (isinstance(data, (str, bytes, Mapping, Tensor)) or not isinstance(data, Iterable)):
        raise LoRAConfigError(
            f"data is a {type(data).__name__}: it has to give batches.",
            name="data",
            value=type(data).__name__,
            expected="an iterable of batches",
            remedy="Give a DataLoader, or a list of batches: data=[batch].",
        )


def moved(batch: Any, model: nn.Module) -> dict[str, Any]:
    """A batch as keyword arguments, on the model's device. Raises `LoRAConfigError` if it is none."""
    if not isinstance(batch, Mapping):
        raise LoRAConfigError(
            f"A batch is a {type(batch).__name__}: the model is called with a batch's names and tensors.",
            name="data",
            value=type(batch).__name__,
            expected='a mapping, such as {"input_ids": …}',
            remedy="Give the DataLoader a collate_fn that makes mappings.",
        )
    device = next((p.device for p in model.parameters() if not p.is_meta), None) or device_of(model)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def bar(steps: Iterable[Any], title: str) -> Any:
    """A progress bar; transformers.utils.logging.disable_progress_bar() turns it off, as all of transformers'."""
    from transformers.utils import logging

    return logging.tqdm(steps, desc=title, leave=False)


@contextlib.contextmanager
def outside(model: nn.Module) -> Iterator[None]:
    """Nothing of the model's modes is left changed: eval or training, and what requires gradients."""
    training = [module for module in model.modules() if module.training]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        model.eval()
        for module in training:
            module.training = True
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the block `see` is told what goes into each module, under its path."""

    def hook(path: str) -> Callable[..., None]:
        def told(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            see(path, x.detach())

        return told

    handles = [module.register_forward_hook(hook(path), with_kwargs=True) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def same_input(model: nn.Module, modules: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> dict[str, str]:
    """For each path the first one that reads the very same tensor (q for q, k and v), from one forward."""
    firsts: dict[str, str] = {}
    last: list[tuple[str, Tensor]] = []  # held, so that no other tensor can take its memory

    def see(path: str, x: Tensor) -> None:
        if last and (last[0][1].data_ptr(), last[0][1].shape, last[0][1].stride()) == (
            x.data_ptr(),
            x.shape,
            x.stride(),
        ):
            firsts.setdefault(path, last[0][0])
            return
        firsts.setdefault(path, path)
        last[:] = [(path, x)]

    with watching(modules, see):
        model(**batch)
    require_seen(modules, firsts)
    return firsts


def require_seen(paths: Iterable[str], seen: Iterable[str]) -> None:
    """Raise `LoRAStateError` if the data did not reach every layer."""
    missing = sorted(set(paths) - set(seen))
    if missing:
        raise LoRAStateError(
            f"{len(missing)} target(s) were never reached by the data, so there is nothing to begin from.",
            name=missing[0],
            value=missing,
            facts=[f"{path}: not reached" for path in missing],
            remedy="Give batches that use them, or leave them out (exclude_modules).",
        )


def positions(batch: Mapping[str, Any], ignored: int | None = None) -> Tensor | None:
    """Which tokens count, (B, T) bool: those not padded, and whose label is not `ignored`; None if nothing says."""
    mask = batch.get("attention_mask")
    kept = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if ignored is not None and isinstance(labels, Tensor) and isinstance(ids, Tensor) and labels.shape == ids.shape:
        kept = labels != ignored if kept is None else kept & (labels != ignored)
    return kept


def rows_of(x: Tensor, kept: Tensor | None) -> Tensor:
    """The inputs that count, (n, in), of x (..., in)."""
    if kept is not None and x.shape[:-1] == kept.shape:
        return x[kept]
    return x.reshape(-1, x.shape[-1])


def empty() -> LoRAConfigError:
    """The error that data hold no batch."""
    return LoRAConfigError(
        "The data hold no batch.", name="data", remedy="Give at least one batch that the model takes."
    )
