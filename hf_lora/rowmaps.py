"""Inner batches: the row of the user's batch that an image, a patch, a sound or an expert's token belongs to.

A vision tower runs once on the images of all rows, an expert on the tokens that were sent to it. Whose they are follows
from what the model's forward was given (the placeholders in `input_ids`, grids, sizes), or the experts' forward. A hook
reads it there, if a route has factors inside, before anything runs, and forgets it when the call ends, by an exception
too. Which part of which architecture is mapped how is data (`architectures.ROW_MAPS`, `architectures.EXPERT_LISTS`); a
size that happens to fit is never taken for a map.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import architectures as arch
from .errors import LoRARouteError
from .layerinfo import modules_of
from .routing import batch_of
from .state import Active, Block, Entry, LoRAState, check_rows, leave, refuse_inner, routed

__all__ = ["MAPPED", "Rows", "hook_row_maps", "inner_rows", "picked", "told", "unhook_row_maps"]

MAPPED = "map:"  # how the row_map of a mapped layer begins: "map:grid", "map:experts.expert_0"
_REMEDY = "Give the inputs as the processor makes them, or run the rows of each adapter as a batch of their own."


@dataclass(frozen=True, eq=False)
class Rows:
    """The row of each entry of an inner batch, (N,) int64 on the CPU.

    Attributes:
        packed: the batch stands in one sequence, (1, N, …), or (N, …).
    """

    index: Tensor
    packed: bool = False
    picked: dict[tuple[Entry, torch.device], Tensor] = field(default_factory=dict)

    def axis(self, x: Tensor) -> int | None:
        """The dimension of `x` that these rows are of; None if there is none."""
        if self.packed and x.dim() == 3 and x.shape[0] == 1:
            return 1 if x.shape[1] == len(self.index) else None
        if self.packed and x.dim() != 2:
            return None
        return 0 if x.dim() and x.shape[0] == len(self.index) else None


@dataclass(eq=False)
class _Call:
    """The row maps of one running forward."""

    module: nn.Module
    maps: Mapping[str, tuple[Rows, ...]]
    outer: Any = None  # the maps of the forward around this one
    block: Block | None = None

    def find(self, name: str) -> tuple[Rows, ...] | None:
        found = self.maps.get(name)
        return self.outer.find(name) if found is None and self.outer is not None else found


def inner_rows(active: Active, x: Tensor, row_map: str) -> tuple[Rows, int]:
    """The rows of a layer's inner batch, and the dimension of `x` that they are of.

    Raises:
        LoRARouteError: no map is known, the layer runs outside the forward that has one, or none fits its size.
    """
    call = active.maps
    found = call.find(row_map) if isinstance(call, _Call) else None
    if not row_map.startswith(MAPPED):
        refuse_inner()
    if found is None:
        _refuse("a layer of a part that takes rows through a row map runs outside the model's own forward")
    fitting = [(rows, axis) for rows in found if (axis := rows.axis(x)) is not None]
    if not fitting:
        sizes = sorted({len(rows.index) for rows in found})
        _refuse(f"a layer's batch is {tuple(x.shape)}, and what the row map knows of has {sizes or 'no'} entries")
    if any(not torch.equal(rows.index, fitting[0][0].index) or axis != fitting[0][1] for rows, axis in fitting[1:]):
        _refuse(f"a layer's batch of {len(fitting[0][0].index)} may be two different things (images and videos, say)")
    return fitting[0]


def picked(active: Active, entry: Entry, rows: Rows, device: torch.device) -> Tensor:
    """Which entries of the inner batch are of the adapter's rows, (n,) int64."""
    key = (entry, device)
    if key not in rows.picked:
        mine = torch.tensor([row is entry for row in active.rows or ()])
        rows.picked[key] = mine[rows.index].nonzero().flatten().to(device)
    return rows.picked[key]


def _refuse(why: str) -> NoReturn:
    raise LoRARouteError(f"The route cannot be told apart in an inner batch: {why}.", remedy=_REMEDY)


# ---- hooks -----------------------------------------------------------------------------------------------------------


class _Hook:
    """Reads the row maps of one module's forward from its arguments."""

    def __init__(self, state: LoRAState) -> None:
        self.state = state

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and self.state.current.rows is not None:
            of: Any = type(module)
            self.enter(module, {**kwargs, **dict(zip(_names(of), args, strict=False))})

    def enter(self, module: nn.Module, given: Mapping[str, Any]) -> None:
        """Read the maps that the route needs in the module."""
        active = self.state.current
        if active.rows is None or active.uniform:
            return
        key = ("mapped", module)
        if key not in active.cache:
            active.cache[key] = _wanted(module, active)
        wanted: frozenset[str] = active.cache[key]
        maps = _read(module, given, len(active.rows), wanted) if wanted else {}
        if any(maps.values()):
            call = _Call(module, maps, active.maps)
            call.block = self.state.enter(active.mapped(call))

    def check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a batch that the route does not fit before anything runs: generate() calls an encoder by itself."""
        rows = None if torch.compiler.is_compiling() else self.state.current.rows
        batch = None if rows is None else batch_of(module, args[0] if args else None, kwargs)
        if rows is not None and batch is not None:
            check_rows(rows, batch)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.leave(module)

    def leave(self, module: nn.Module) -> None:
        """Forget the maps again."""
        call = self.state.current.maps
        if isinstance(call, _Call) and call.module is module and call.block is not None:
            leave(call.block)


@contextmanager
def told(model: nn.Module, given: Mapping[str, Any]) -> Iterator[None]:
    """Within the block parts of the model may run by themselves: `given` is what its forward would be given."""
    hooks = list(_hooked(model)) if routed() else []
    with ExitStack() as stack:
        for module, hook in hooks:
            hook.enter(module, given)
            stack.callback(hook.leave, module)
        yield


def _hooked(model: nn.Module) -> Iterator[tuple[nn.Module, _Hook]]:
    for module in model.modules():
        if type(module).__name__ not in arch.EXPERT_LISTS:
            for function in module._forward_pre_hooks.values():
                hook = getattr(function, "__self__", None)
                if isinstance(hook, _Hook) and function == hook.before:
                    yield module, hook


@functools.lru_cache(maxsize=256)
def _names(of: Any) -> list[str]:
    """Names of the forward's positional arguments."""
    return list(inspect.signature(of.forward).parameters)[1:]


def _wanted(module: nn.Module, active: Active) -> frozenset[str]:
    """The maps that the route needs inside a module: those of layers in which it has factors, or a copy."""
    slots = {entry.slot for entry in active.entries}
    found = set()
    for held in module.modules():
        row_map = getattr(held, "row_map", "")
        if isinstance(row_map, str) and row_map.startswith(MAPPED):
            have: Iterable[Any] = getattr(held, "slots", None) or getattr(held, "copies", None) or ()
            if not slots.isdisjoint(map(int, have)):
                found.add(row_map)
    return frozenset(found)


def hook_row_maps(model: nn.Module, state: LoRAState) -> None:
    """Hook every part of a model whose arguments tell the rows of an inner batch, and its encoder."""
    hook = _Hook(state)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = getattr(model, "get_encoder", lambda: None)()
        if isinstance(encoder, nn.Module) and encoder is not model:
            encoder.register_forward_pre_hook(hook.check, with_kwargs=True)
    for module in [m for m in dict.fromkeys(modules_of(model).values()) if _is_told(m)]:
        module.register_forward_pre_hook(hook.before, with_kwargs=True)
        module.register_forward_hook(hook.after, always_call=True)


def unhook_row_maps(model: nn.Module) -> None:
    """Take the hooks away again."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Hook)]:
                del hooks[key]
                for names in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
                    getattr(module, names).pop(key, None)


def _is_told(module: nn.Module) -> bool:
    if type(module).__name__ in arch.EXPERT_LISTS:
        return True
    model_type = getattr(vars(module).get("config"), "model_type", None)
    return model_type in arch.ROW_MAPS and hasattr(module, "base_model_prefix")


# ---- what the arguments say ------------------------------------------------------------------------------------------


@dataclass
class _Source:
    """Images, videos or sounds, in the order of their rows.

    Attributes:
        stages: how many entries each is at each stage of the part, (n,) each.
        placeholder: names of the placeholder's id in the config; "" where `rows` are given.
        tokens: placeholders of each, (n,); None: the same number for all.
        rows: the row of each, (n,), where the input itself says it.
    """

    stages: list[Tensor]
    placeholder: str
    tokens: Tensor | None = None
    rows: Tensor | None = None
    packed: bool = False


def _read(
    module: nn.Module, given: Mapping[str, Any], batch: int, wanted: frozenset[str]
) -> dict[str, tuple[Rows, ...]]:
    if type(module).__name__ in arch.EXPERT_LISTS:
        return _experts(module, given, batch, wanted)
    maps = {}
    for name in wanted:
        kind = _KINDS.get(name.removeprefix(MAPPED))
        if kind is not None:  # an expert's map is read further in
            maps[name] = tuple(
                Rows(rows.repeat_interleave(stage), source.packed)
                for source in kind(module, given)
                for rows, tokens in [_rows_of(source, module, given, batch)]
                for stage in (*source.stages, *tokens)
            )
    return maps


def _rows_of(
    source: _Source, module: nn.Module, given: Mapping[str, Any], batch: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The row of each image (video, sound), and the placeholders of each: images stand in the order of these."""
    n = len(source.stages[0])
    if source.rows is not None and not source.placeholder:
        if n and (len(source.rows) != n or int(source.rows.max()) != batch - 1):
            _refuse(f"the inputs are of {int(source.rows.max()) + 1} rows, the route of {batch}")
        return source.rows, ()
    ids, token = given.get("input_ids"), _setting(module, source.placeholder)
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        _refuse("the rows' images are told by the placeholders in input_ids, and the model was given none")
    counts = (ids == token).sum(1).cpu()
    total = int(counts.sum())
    tokens = source.tokens
    if tokens is None:
        if total == 0 or total % n:
            _refuse(f"{total} placeholders in input_ids do not divide among {n} images")
        tokens = torch.full((n,), total // n)
    if int(tokens.sum()) != total or bool((tokens < 1).any()):
        _refuse(f"input_ids hold {total} placeholders, and the {n} images given stand for {tokens.tolist()}")
    ends, row_ends = tokens.cumsum(0), counts.cumsum(0)
    rows = torch.searchsorted(row_ends, ends - 1, right=True)
    if not torch.equal(rows, torch.searchsorted(row_ends, ends - tokens, right=True)):
        _refuse(f"{counts.tolist()} placeholders in the rows do not fit images of {tokens.tolist()}")
    if source.rows is not None and not torch.equal(rows, source.rows):
        _refuse(f"by the placeholders the images are of rows {rows.tolist()}, by the input of {source.rows.tolist()}")
    return rows, (tokens,)


def _setting(module: nn.Module, name: str, default: Any = None) -> Any:
    """A field of the module's configuration; a placeholder's id may be called an index."""
    config: Any = module.config
    for key in (name, name.replace("_token_id", "_token_index")):
        if (value := getattr(config, key, None)) is not None:
            return value
    return default


def _tensor(given: Mapping[str, Any], name: str) -> Tensor | None:
    value = given.get(name)
    if value is not None and not isinstance(value, Tensor):
        _refuse(f"{name} is a {type(value).__name__}, not one tensor")
    return value


def _sizes(value: Any, columns: int) -> Tensor:
    return torch.as_tensor(value).reshape(-1, columns).to("cpu", torch.int64)


def _images(module: Any, given: Mapping[str, Any]) -> Iterator[_Source]:
    """(n, channels, height, width), or sounds (n, mel, time): each with the same number of placeholders."""
    if getattr(getattr(module.config, "vision_config", None), "model_type", None) == "pixtral":
        yield from _packed(module, given)
        return
    if given.get("image_sizes") is not None:
        _refuse("images of several sizes go through a tower that takes one")
    for name, placeholder in (("pixel_values", "image_token_id"), ("input_features", "audio_token_id")):
        if (x := _tensor(given, name)) is not None and _setting(module, placeholder) is not None:
            yield _Source([torch.ones(len(x), dtype=torch.int64)], placeholder)


def _padded(module: Any, given: Mapping[str, Any]) -> Iterator[_Source]:
    """(rows, most images, channels, height, width): images that are all zero are padding, and are dropped."""
    if (x := _tensor(given, "pixel_values")) is not None:
        real = (x != 0).flatten(2).any(2).cpu()
        rows = real.nonzero()[:, 0]
        yield _Source([torch.ones_like(rows)], "image_token_id", rows=rows)


def _grid(module: Any, given: Mapping[str, Any]) -> Iterator[_Source]:
    """Patches of all images in one sequence, of t · h · w each; merge² of them become one placeholder."""
    merge = module.config.vision_config.spatial_merge_size
    for name in ("image", "video"):
        pixels = given.get("pixel_values" if name == "image" else "pixel_values_videos")
        if pixels is not None and given.get(f"{name}_grid_thw") is not None:
            patches = _sizes(given[f"{name}_grid_thw"], 3).prod(1)
            yield _Source([patches, patches // merge**2], f"{name}_token_id", tokens=patches // merge**2)


def _packed(module: Any, given: Mapping[str, Any]) -> Iterator[_Source]:
    """Pixtral: the patches of all images in one sequence (1, N, d), of the sizes that `image_sizes` tell."""
    if given.get("pixel_values") is not None and given.get("image_sizes") is not None:
        patch, merge = module.config.vision_config.patch_size, _setting(module, "spatial_merge_size", 1)
        patches = (_sizes(given["image_sizes"], 2) // patch).prod(1)
        merged = (_sizes(given["image_sizes"], 2) // patch // merge).prod(1)
        yield _Source([patches, merged], "image_token_id", tokens=merged, packed=True)


def _tiles(module: Any, given: Mapping[str, Any]) -> Iterator[_Source]:
    """(rows, …, channels, height, width): the images, and the tiles of each, of row after row."""
    if (x := _tensor(given, "pixel_values")) is not None:
        rows, ones = torch.arange(len(x)), torch.ones(len(x), dtype=torch.int64)
        each = [ones * int(torch.tensor(x.shape[1:end]).prod()) for end in range(1, x.dim() - 2)]
        yield _Source(each, "", rows=rows)


def _anyres(module: Any, given: Mapping[str, Any]) -> Iterator[_Source]:
    """LLaVA-NeXT: an image is cut into as many crops as its size asks for; the model's own code counts both."""
    base = getattr(module, "model", module)
    code = sys.modules[type(base).__module__]
    config = module.config
    if _tensor(given, "pixel_values") is not None and given.get("image_sizes") is not None:
        sizes = _sizes(given["image_sizes"], 2)
        whole = [True] * len(sizes)
        if given.get("batch_num_images") is not None:
            whole = [int(n) == 1 for n in given["batch_num_images"] for _ in range(int(n))]
        side = config.vision_config.image_size
        crops = [
            code.image_size_to_num_patches(image_size=size, grid_pinpoints=config.image_grid_pinpoints, patch_size=side)
            if cut
            else 1
            for size, cut in zip(sizes, whole, strict=False)
        ]
        patches = (side // config.vision_config.patch_size) ** 2
        options: dict[str, Any] = {"image_newline": torch.zeros(1)}
        for name in ("vision_feature_select_strategy", "vision_aspect_ratio"):
            if name in inspect.signature(base.pack_image_features).parameters:
                value = given.get(name)
                options[name] = getattr(config, name) if value is None else value
        _, lengths = base.pack_image_features([torch.zeros(n, patches, 1) for n in crops], sizes, **options)
        yield _Source([torch.tensor(crops)], "image_token_id", tokens=lengths)
    if (videos := _tensor(given, "pixel_values_videos")) is not None:
        frames = torch.full((len(videos),), videos.shape[1])
        yield _Source([frames], "video_token_id")


def _sounds(module: Any, given: Mapping[str, Any]) -> Iterator[_Source]:
    """Qwen2-Audio: as many placeholders as the tower makes of the sound's own length."""
    mask = _tensor(given, "feature_attention_mask")
    if given.get("input_features") is not None and mask is not None:
        tower = next(m for m in module.modules() if hasattr(m, "_get_feat_extract_output_lengths"))
        lengths = tower._get_feat_extract_output_lengths(mask.sum(-1))[1].cpu()
        yield _Source([torch.ones_like(lengths)], "audio_token_id", tokens=lengths)


_KINDS: Mapping[str, Callable[[Any, Mapping[str, Any]], Iterator[_Source]]] = {
    "images": _images,
    "padded": _padded,
    "grid": _grid,
    "packed": _packed,
    "tiles": _tiles,
    "anyres": _anyres,
    "sounds": _sounds,
}


def _experts(
    module: nn.Module, given: Mapping[str, Any], batch: int, wanted: frozenset[str]
) -> dict[str, tuple[Rows, ...]]:
    """The rows of the tokens (B·T, d), the rows one after another, that each expert is given, in its order."""
    argument, form = arch.EXPERT_LISTS[type(module).__name__]
    tokens, chosen = len(given["hidden_states"]), given[argument]
    if tokens % batch:
        _refuse(f"the experts' {tokens} tokens are not of {batch} rows")
    mask = nn.functional.one_hot(chosen, len(module)) if form == "one_hot" else chosen  # type: ignore[arg-type]
    mask = mask.permute(2, 1, 0).cpu()
    maps: dict[str, tuple[Rows, ...]] = {}
    for number, name in enumerate(module._modules):
        row_map = f"{MAPPED}experts.{name}"
        if row_map in wanted:
            maps[row_map] = (Rows(torch.where(mask[number])[1] // (tokens // batch)),)
    return maps
