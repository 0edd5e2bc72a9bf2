"""Merge adapters into the base's weights, swap what is merged, and take it out again, bit for bit.

All three are one change of the weights, from a record to a new one: W + ΔA → W → W + ΔB, layer by layer. It happens
whole or not at all.
"""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .backends import backend_of
from .errors import LoRAStateError, LoRAUnsupportedError
from .exact import Factored, Record, Scratch, added, fingerprint, restored
from .expertnames import expert_of, parameter_of
from .extras import EXTRAS
from .layerinfo import is_held
from .layers import LoRAHead
from .model import effect_on, read, require
from .replication import require_plain
from .sharding import refuse_sharded
from .standins import Kept, KeptModel, dense
from .state import NOTHING, Active, LoRAState
from .switching import Which, selection
from .targeting import describe_layer
from .ties import as_before, refuse_tied, retie, untie
from .tokenfields import ROWS
from .tokens import RowsOf, rows_name, rows_of, shared_rows
from .tying import led
from .values import AdapterValue, Factors, refuse_invoked
from .variants import Base
from .weights import as_matrix, mergeable, weight_name
from .workers import each

__all__ = ["Merged", "factored", "merge_lora", "merged_lora", "require_mergeable", "unmerge_lora"]


Change = Callable[[Tensor], Factored]  # what makes ΔW of a layer from its W


@dataclass(eq=False)
class Merged:
    """A merge, as `unmerge_lora` and the next merge need it."""

    active: Active
    weights: dict[str, Record] = field(default_factory=dict)  # by the layer's path
    tensors: dict[str, Tensor] = field(default_factory=dict)  # biases and heads: the base's own values
    written: dict[str, bytes] = field(default_factory=dict)  # and the fingerprints of the adapter's
    ties: dict[str, nn.Parameter] = field(default_factory=dict)  # what stood where a weight got a copy of its own
    quantised: dict[str, Kept] = field(default_factory=dict)  # layers that were quantised anew, as they were
    dense: KeptModel | None = None  # the model before it was dequantised

    @property
    def nbytes(self) -> int:
        """What undoing the merge holds in memory; a weight that was untied counts, too."""
        kept: list[Any] = [*self.tensors.values(), *self.ties.values(), *self.quantised.values()]
        whole = 0 if self.dense is None else self.dense.nbytes
        return sum(record.nbytes for record in self.weights.values()) + sum(one.nbytes for one in kept) + whole


def merge_lora(
    model: nn.Module,
    which: Which = None,
    *,
    replace: bool = False,
    untie: bool = False,
    dequantize: bool = False,
) -> Merged:
    """W ← round(W + Σ wᵢ ΔWᵢ), so that the model runs at the base's speed; exactly undone by `unmerge_lora`.

    Until then the record keeps the factors, the weights that rounding moved (about a tenth of them where ‖ΔW‖/‖W‖ is
    0.1) and their places, which take 3 bits a weight at most.

    A quantised layer holds round(Q + ΔW) meanwhile, quantised anew by the library that quantised it, and its own
    tensors are kept beside it: so many bytes more.

    Args:
        which: what to merge, as in `set_lora`; None merges what is active by default.
        replace: if something is merged already, put this in its place: W + ΔA → W + ΔB in one go, bit for bit what a
            merge into the base gives.
        untie: a weight that is tied to a layer that the adapter does not change gets a copy of its own while merged.
        dequantize: while merged every quantised layer is a matrix of floats, in the dtype that it computes in, so that
            ΔW is not rounded to the quantisation's steps, and `save_pretrained` writes a model that is not quantised.

    Raises:
        LoRAStateError: merged already (without `replace`), an open `use_lora`, `no_lora` or `route_lora` in any thread,
            training, nothing active, or an adapter that is not finite or overflows the weights' dtype. The weights, and
            what is merged, are then as before.
        LoRAUnsupportedError: an offloaded weight, a quantised one that cannot be written, or a tied one without
            `untie`.
    """
    if model.training:
        raise LoRAStateError("merge_lora() cannot be used while the model trains.", remedy="Call model.eval() first.")
    if dequantize and replace:
        raise LoRAStateError(
            "replace=True takes over how the merge before it was made: dequantize=True is for a first merge.",
            name="dequantize",
            value=True,
            remedy="Leave dequantize out, or call unmerge_lora() first.",
        )
    return _merge(model, which, replace, untie, "merge_lora", dequantize)


def unmerge_lora(model: nn.Module) -> None:
    """Take out what `merge_lora` put in; every bit of the base is as before.

    Raises:
        LoRAStateError: nothing is merged, or a weight changed since; the model is then still merged.
    """
    state = require(model)
    with state.lock:
        if state.merged is None:
            raise LoRAStateError("No adapter is merged into this model.", remedy="Call merge_lora() first.")
        before = state.merged.dense
        _change(model, state.merged, Merged(NOTHING), {}, {}, {})
        if before is not None:
            before.restore()
        state.merged = None


@contextmanager
def merged_lora(
    model: nn.Module, which: Which = None, *, untie: bool = False, verb: str, dequantize: bool = False
) -> Iterator[Merged]:
    """Within the block the weights hold the adapters, in training mode too: for what reads weights and runs nothing."""
    merged = _merge(model, which, False, untie, verb, dequantize)
    try:
        yield merged
    finally:
        unmerge_lora(model)


def require_mergeable(model: nn.Module, active: Active, *, untie: bool = False) -> None:
    """Raise `LoRAUnsupportedError` if a merge of `active` cannot write what it changes.

    That is a weight that is quantised, offloaded or tied, a bias that the layer does not have, or an aLoRA's.
    """
    for entry in active.entries:
        refuse_invoked(entry.record.config)
    for path in _layers(model, active):
        _require_writable(model.get_submodule(path), path)
    for path in _parameters(active, model):
        mergeable(model.get_submodule(path.rpartition(".")[0]), path, path.rpartition(".")[2])
    for path in _offsets(active):
        if getattr(model.get_submodule(path), "bias", None) is None:
            raise LoRAUnsupportedError(
                f"{path}: lora_bias adds to the layer's bias, and this {type(model.get_submodule(path)).__name__} has "
                "none, so it cannot be merged.",
                name=path,
                remedy="Run it unmerged, or train without lora_bias.",
            )
    if not untie:
        refuse_tied(model, _touched(model, active), _together(model, active))


def _require_writable(module: nn.Module, path: str) -> None:
    backend = backend_of(module)
    if backend is None:
        mergeable(module, path)
    elif backend.write is None:
        raise LoRAUnsupportedError(
            f"{path}: a weight cannot be quantised anew for {backend.name}.",
            name=path,
            value=type(module).__name__,
            remedy="Pass dequantize=True to merge_lora(), or load the base without quantisation.",
        )


def _merge(model: nn.Module, which: Which, replace: bool, untie: bool, verb: str, dequantize: bool = False) -> Merged:
    state = require(model)
    remedy = "save_lora(), and merge where the base is whole, in one process."
    with state.lock:
        require_plain(model, verb)
        refuse_sharded(model, f"{verb}() cannot be used", remedy, zero3=True)
        old = state.merged
        if not replace:
            state.require_unmerged(verb, remedy="Call unmerge_lora() first, or pass replace=True to merge_lora().")
        active = state.default if which is None else selection(state, which)
        if not active.mixture:
            raise LoRAStateError(
                "No adapter is active, so there is nothing to merge.", remedy=f'Name one: {verb}(…, "task").'
            )
        new = Merged(active, dense=None if old is None else old.dense)
        with _held(state, verb, new), _dequantised(model, new, dequantize):
            with as_before(model, {} if old is None else old.ties):
                require_mergeable(model, active, untie=untie)
            values = {entry.name: read(model, entry.name) for entry, _ in active.mixture}
            changes, whole = _changes(model, active, values), _whole(model, active, values, old.tensors if old else {})
            together = _together(model, active)
            apart = [path for path in _touched(model, active) if path not in together] if untie else []
            _change(model, old or Merged(NOTHING), new, changes, whole, apart)
            state.merged = new
    return new


@contextmanager
def _dequantised(model: nn.Module, new: Merged, wanted: bool) -> Iterator[None]:
    """Make the model dense for a merge; it is as before if that fails."""
    if wanted:
        new.dense = dense(model)
    try:
        yield
    except BaseException:
        if wanted and new.dense is not None:
            new.dense.restore()
        raise


@contextmanager
def _held(state: LoRAState, verb: str, new: Merged) -> Iterator[None]:
    """While weights change no block that overrides what is active may open; raises if one is open."""
    old = state.merged
    state.close(verb, old or new)
    try:
        yield
    except BaseException:
        state.merged = old
        raise


# ---- what a merge puts where -----------------------------------------------------------------------------------------


def _layers(model: nn.Module, active: Active) -> list[str]:
    """The paths of layers whose weight a merge changes; of those that share one and its change, the first."""
    others = {path for paths in _led(model, active).values() for path in paths}
    return list(dict.fromkeys(p for entry in active.entries for p in entry.record.layers if p not in others))


def _led(model: nn.Module, active: Active) -> dict[str, tuple[str, ...]]:
    return led(model, [entry.record for entry in active.entries])


def _parameters(active: Active, model: nn.Module) -> list[str]:
    """The paths of the experts' parameters that adapters change."""
    found = []
    for entry in active.entries:
        for path in entry.record.experts:
            slots: Any = model.get_submodule(path).lora_slots
            found += [f"{path}.{name}" for name, bank in slots.banks().items() if entry.slot in bank.slots]
    return list(dict.fromkeys(found))


def _weight(modules: Mapping[str, nn.Module], path: str) -> Tensor:
    """The weight that a path of factors means: a layer's, or one expert's matrix."""
    at = expert_of(path)
    if at is None:
        return mergeable(modules[path], path)
    owner, _, name = at[0].rpartition(".")
    return mergeable(modules[owner], path, name)[at[1]]


def _turned(model: nn.Module, path: str) -> bool:
    """Whether that weight is (in, out)."""
    if expert_of(path) is not None:
        return bool(getattr(model.get_submodule(parameter_of(path).rpartition(".")[0]), "is_transposed", False))
    info = describe_layer(model.get_submodule(path))
    return info is not None and info.kind in ("conv1d", "embedding")


def _offsets(active: Active) -> list[str]:
    """The paths of layers whose bias a merge changes, though no adapter has it whole."""
    return list(dict.fromkeys(p for e in active.entries if e.record.config.lora_bias for p in e.record.layers))


def _touched(model: nn.Module, active: Active) -> list[str]:
    """The paths of every Parameter that a merge writes."""
    whole = [path for entry in active.entries for path in entry.record.biases]
    for head, slot in [(path, entry.slot) for entry in active.entries for path in entry.record.heads]:
        module = model.get_submodule(head)
        if rows_of(module, slot) is not None:
            whole.append(f"{head}.weight")
        else:
            whole += [f"{head}.{key}" for key, _ in module.named_parameters() if not is_held(key)]
    whole += [f"{path}.bias" for path in _offsets(active)]
    weights = [f"{path}.{weight_name(model.get_submodule(path))}" for path in _layers(model, active)]
    return list(dict.fromkeys([*weights, *_parameters(active, model), *whole]))


def _together(model: nn.Module, active: Active) -> dict[str, tuple[str, ...]]:
    """Weights of which rows change, and those that share them and are to change with them."""
    found = {f"{path}.weight": shared_rows(model, path, e.slot) for e in active.entries for path in e.record.heads}
    for path, others in _led(model, active).items():
        every = (path, *others)
        found |= {f"{one}.weight": tuple(other for other in every if other != one) for one in every}
    return {name: tuple(f"{other}.weight" for other in others) for name, others in found.items() if others}


def _changes(model: nn.Module, active: Active, values: Mapping[str, AdapterValue]) -> dict[str, Change]:
    """What makes ΔW of every layer that the mixture touches, scaled and weighted, from its W; float32 or wider."""
    parts: dict[str, list[tuple[Factors, float]]] = {}
    rounded: dict[str, list[tuple[Tensor, float]]] = {}
    changed = {*_layers(model, active)}
    for entry, weight in active.mixture:
        for path in [path for path in values[entry.name].factors if path in changed or expert_of(path)]:
            factors = values[entry.name].factors[path]
            parts.setdefault(path, []).append((factors, weight))
            if expert_of(path) is not None:
                continue
            slots: Any = model.get_submodule(path).lora_slots
            name = slots.slots[entry.slot].rounded
            if name:
                rounded.setdefault(path, []).append((slots.get_buffer(name), weight))
    changes: dict[str, Change] = {}
    for path, pairs in parts.items():
        turned = _turned(model, path)
        changes[path] = functools.partial(factored, pairs, turned, rounded=rounded.get(path, ()))
    return changes


def factored(
    parts: Sequence[tuple[Factors, float]],
    turned: bool,
    weight: Tensor,
    rounded: Sequence[tuple[Tensor, float]] = (),
) -> Factored:
    """ΔW of a mixture on a layer of this weight, in its layout.

    Args:
        parts: factors, and what their ΔW is multiplied by.
        turned: the weight is (in, out).
        weight: the base's, of which DoRA takes the norm.
        rounded: what stands for the weight under some of them, (out, in), and their share.
    """
    base = Base(weight.T if turned else weight)
    pairs: list[tuple[Tensor, Tensor]] = []
    gain: Tensor | None = None
    for factors, share in parts:
        wide = torch.promote_types(factors.A.dtype, torch.float32)
        if any(EXTRAS[name].weight for name in factors.extras):
            effect = effect_on(factors, weight.device, lambda: base)
            A, B = effect.pair
            B = B * share
            if effect.gain is not None:
                B = B * effect.gain[:, None]
                gain = (1 if gain is None else gain) + (effect.gain - 1) * share
        else:
            A, B = factors.A.to(weight.device, wide), factors.B.to(weight.device, wide) * (factors.scaling * share)
        pairs.append((A, B))
    instead: Tensor | None = None
    if rounded:
        instead = _instead(weight, [(Q.T if turned else Q, share) for Q, share in rounded])
    A, B = pairs[0] if len(pairs) == 1 else (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1))
    if turned:
        return Factored(A.T.contiguous(), B.T.contiguous(), None if gain is None else gain[None], instead)
    return Factored(B, A, None if gain is None else gain[:, None], instead)


def _instead(weight: Tensor, rounded: Sequence[tuple[Tensor, float]]) -> Tensor:
    """W + Σ wᵢ (Qᵢ − W), in the weight's layout."""
    if len(rounded) == 1 and rounded[0][1] == 1:
        return rounded[0][0]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return wide + sum((share * (Q.to(wide) - wide) for Q, share in rounded), torch.zeros_like(wide))


def _whole(
    model: nn.Module, active: Active, values: Mapping[str, AdapterValue], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What takes the place of the base's biases and heads, in their dtypes; a mixture holds none but lora_bias's.

    `base`: the base's own values of what is merged already.
    """
    found: dict[str, Tensor] = {}
    offset = any("offset" in f.extras for value in values.values() for f in value.factors.values())
    whole = offset or any(entry.record.whole for entry in active.entries)
    own: Mapping[str, Tensor] = ChainMap(dict(base), _tensors(model)) if whole else {}
    for entry, weight in active.mixture:
        value = values[entry.name]
        given = dict(value.biases)
        for path, factors in value.factors.items():
            if "offset" in factors.extras:
                shift, name = factors.extras["offset"], f"{path}.bias"
                before = given.get(name, found.get(name, own[name])).to(shift)  # what others added stays
                given[name] = before + shift * (factors.scaling * weight)
        for path, tensors in value.modules.items():
            assert isinstance(model.get_submodule(path), LoRAHead)
            if ROWS in tensors:
                given[rows_name(path, entry.slot)] = tensors[ROWS]
            else:
                given |= {f"{path}.{key}": tensor for key, tensor in tensors.items()}
        for name, tensor in given.items():
            found[name] = tensor.to(own[name].dtype)
            if tensor.is_floating_point() and not bool(torch.isfinite(found[name]).all()):
                raise LoRAStateError(
                    f"{name}: adapter {entry.name!r} holds values there that are NaN or infinite in {own[name].dtype}, "
                    "so it was not merged.",
                    name=name,
                    remedy="Check the adapter (a diverged training run?).",
                )
    return found


def _tensors(model: nn.Module) -> RowsOf:
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return RowsOf(model, {name: tensor.detach() for name, tensor in every if not is_held(name)})


# ---- the change ------------------------------------------------------------------------------------------------------


def _change(
    model: nn.Module,
    old: Merged,
    new: Merged,
    changes: Mapping[str, Change],
    whole: Mapping[str, Tensor],
    apart: Collection[str],
) -> None:
    """Take out what `old` put in, and put `changes` and `whole` in, with records in `new`: all of it or nothing.

    Args:
        apart: Parameters that get a copy of their own if they are tied.
    """
    modules = dict(model.named_modules())
    quantised = list(
        dict.fromkeys(
            [*old.quantised, *(path for path in changes if not expert_of(path) and backend_of(modules[path]))]
        )
    )
    paths = [path for path in dict.fromkeys([*old.weights, *changes]) if path not in quantised]
    undone: list[Kept] = []

    def forward(path: str, scratch: Scratch) -> None:
        weight, was = _weight(modules, path).detach(), old.weights.get(path)
        flat = as_matrix(weight)
        result = flat if was is None else restored(flat, was, path, scratch)
        if path in changes:
            before = b"" if was is None else was.before
            result, record = added(result, changes[path](result), path, scratch, before)
            new.weights[path] = record  # before the write: after a failure the weight itself tells which it is
        weight.copy_(result.view(weight.shape))
        if was is not None:
            was.moved = []  # its memory serves the next layer; `backward` makes it again

    def backward(path: str, scratch: Scratch) -> None:
        weight, was, now = _weight(modules, path).detach(), old.weights.get(path), new.weights.get(path)
        flat = as_matrix(weight)
        found = fingerprint(flat)
        if was is not None and was.moved and found == was.after:
            return  # not begun
        if now is not None and found == now.after:
            result = restored(flat, now, path, scratch)
        elif found in {record.before for record in (was, now) if record is not None}:
            result = flat
        else:
            return  # somebody else wrote it, which is what was raised
        if was is not None:
            result, old.weights[path] = added(result, was.change, path, scratch, was.before)
        weight.copy_(result.view(weight.shape))

    _require_unchanged(model, old)
    try:
        _write(model, old.tensors)
        new.ties.update({path: shared for path, shared in old.ties.items() if path in apart})
        if apart:
            with as_before(model, {path: shared for path, shared in old.ties.items() if path not in apart}):
                untie(model, apart, new.ties)
        each(forward, paths, _on_cpu(modules))
        for path in quantised:
            undone.append(Kept(modules[path]))
            _requantise(model, modules[path], path, old, new, changes.get(path))
        if whole:
            own = _tensors(model)
            new.tensors.update({name: own[name].clone() for name in whole})
            _write(model, whole)
            new.written.update({name: fingerprint(own[name]) for name in whole})
    except BaseException:
        for kept in undone:
            kept.restore()
        _write(model, new.tensors)
        each(backward, paths, _on_cpu(modules))
        retie(model, {path: shared for path, shared in new.ties.items() if path not in old.ties})
        _write(model, _whole(model, old.active, {e.name: read(model, e.name) for e in old.active.entries}, {}))
        raise
    retie(model, {path: shared for path, shared in old.ties.items() if path not in new.ties})


def _requantise(
    model: nn.Module, module: nn.Module, path: str, old: Merged, new: Merged, change: Change | None
) -> None:
    """Give a quantised layer its own tensors back, and then what `change` makes of them, quantised as they are."""
    if path in old.quantised:
        old.quantised[path].restore()
    if change is None:
        return
    backend = backend_of(module)
    assert backend is not None
    assert backend.write is not None
    own, kept = backend.read(module), Kept(module)
    scratch = Scratch()
    backend.write(module, added(own, change(own), path, scratch)[0].clone(), model)
    kept.hold()
    new.quantised[path] = kept


def _on_cpu(modules: Mapping[str, nn.Module]) -> Callable[[str], bool]:
    return lambda path: _weight(modules, path).device.type == "cpu"


def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    if not values:
        return
    own = _tensors(model)
    for name, value in values.items():
        own.write(name, value)


def _require_unchanged(model: nn.Module, merged: Merged) -> None:
    for path, kept in merged.quantised.items():
        kept.require_unchanged(path)
    own = _tensors(model) if merged.written else {}
    for name, before in merged.written.items():
        if fingerprint(own[name]) != before:
            raise LoRAStateError(
                f"{name} changed since it was merged, so the base cannot be restored.",
                name=name,
                remedy="Load the base model again; do not train or overwrite weights while an adapter is merged.",
            )
