"""What the arguments of a forward say of its inner batches: the row of each image, video, sound or expert's token."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import architectures as arch
from .errors import LoRARouteError
from .state import Entry

__all__ = ["MAPPED", "TOKENS", "Rows", "has_experts", "read", "refuse"]

TOKENS = "map:tokens"  # of a module of 3-D expert parameters: (B·T, d), told by the block around it
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


def refuse(why: str) -> NoReturn:
    """Raise `LoRARouteError`: nothing says whose the entries of an inner batch are."""
    raise LoRARouteError(f"The route cannot be told apart in an inner batch: {why}.", remedy=_REMEDY)


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


def read(
    module: nn.Module, given: Mapping[str, Any], batch: int, wanted: frozenset[str]
) -> dict[str, tuple[Rows, ...]]:
    """The row maps that the arguments of a forward tell.

    Args:
        module: the model, or a list of experts.
        given: its arguments by name.
        batch: the rows of the route.
        wanted: names of maps, as layers have them in `row_map`.

    Raises:
        LoRARouteError: the arguments contradict one another, or do not say whose an image is.
    """
    if type(module).__name__ in arch.EXPERT_LISTS:
        return _experts(module, given, batch, wanted)
    if has_experts(module):
        return _tokens(given, batch) if TOKENS in wanted else {}
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


def has_experts(module: nn.Module) -> bool:
    """Whether it is a block around a module of 3-D expert parameters."""
    if hasattr(module, "base_model_prefix"):  # a model
        return False
    children = (child for child in module.children() if not isinstance(child, nn.modules.conv._ConvNd))
    return any(p is not None and p.ndim == 3 for child in children for p in child._parameters.values())


def _tokens(given: Mapping[str, Any], batch: int) -> dict[str, tuple[Rows, ...]]:
    """The row of each token of a block that is given (B, T, d)."""
    x = given.get("hidden_states", next((value for value in given.values() if isinstance(value, Tensor)), None))
    if not isinstance(x, Tensor) or x.dim() != 3 or len(x) != batch:
        return {}
    return {TOKENS: (Rows(torch.arange(batch).repeat_interleave(x.shape[1])),)}


def _rows_of(
    source: _Source, module: nn.Module, given: Mapping[str, Any], batch: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The row of each image (video, sound), and the placeholders of each: images stand in the order of these."""
    n = len(source.stages[0])
    if n == 0:
        return torch.zeros(0, dtype=torch.int64), ()
    if source.rows is not None and not source.placeholder:
        if n != batch:
            refuse(f"the inputs are of {n} rows, the route of {batch}")
        return source.rows, ()
    ids, token = given.get("input_ids"), _setting(module, source.placeholder)
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        refuse("the rows' images are told by the placeholders in input_ids, and the model was given none")
    counts = (ids == token).sum(1).cpu()
    total = int(counts.sum())
    tokens = source.tokens
    if tokens is None:
        if total == 0 or total % n:
            refuse(f"{total} placeholders in input_ids do not divide among {n} images")
        tokens = torch.full((n,), total // n)
    if int(tokens.sum()) != total or bool((tokens < 1).any()):
        refuse(f"input_ids hold {total} placeholders, and the {n} images given stand for {tokens.tolist()}")
    ends, row_ends = tokens.cumsum(0), counts.cumsum(0)
    rows = torch.searchsorted(row_ends, ends - 1, right=True)
    if not torch.equal(rows, torch.searchsorted(row_ends, ends - tokens, right=True)):
        refuse(f"{counts.tolist()} placeholders in the rows do not fit images of {tokens.tolist()}")
    if source.rows is not None and not torch.equal(rows, source.rows):
        refuse(f"by the placeholders the images are of rows {rows.tolist()}, by the input of {source.rows.tolist()}")
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
        refuse(f"{name} is a {type(value).__name__}, not one tensor")
    return value


def _sizes(value: Any, columns: int) -> Tensor:
    return torch.as_tensor(value).reshape(-1, columns).to("cpu", torch.int64)


def _images(module: Any, given: Mapping[str, Any]) -> Iterator[_Source]:
    """(n, channels, height, width), or sounds (n, mel, time): each with the same number of placeholders."""
    if getattr(getattr(module.config, "vision_config", None), "model_type", None) == "pixtral":
        yield from _packed(module, given)
        return
    if given.get("image_sizes") is not None:
        refuse("images of several sizes go through a tower that takes one")
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
        refuse(f"the experts' {tokens} tokens are not of {batch} rows")
    mask = nn.functional.one_hot(chosen, len(module)) if form == "one_hot" else chosen  # type: ignore[arg-type]
    mask = mask.permute(2, 1, 0).cpu()
    maps: dict[str, tuple[Rows, ...]] = {}
    for number, name in enumerate(module._modules):
        row_map = f"{MAPPED}experts.{name}"
        if row_map in wanted:
            maps[row_map] = (Rows(torch.where(mask[number])[1] // (tokens // batch)),)
    return maps
