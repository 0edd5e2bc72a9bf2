"""What a model's forward is given, from the names of its arguments and the sizes in its config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .table import EXCEPTIONS

__all__ = ["VARIANTS", "Given", "inputs"]

Given = dict[str, Any]
ROWS, LENGTH = 2, 12
_TEXT_FROM = 5  # ids below are special tokens


class _Maker:
    """Makes the arguments of one model's forward."""

    def __init__(self, model: Any, model_type: str, variant: str) -> None:
        self.model, self.config, self.variant = model, model.config, variant
        self.exception: Mapping[str, Any] = EXCEPTIONS.get(model_type, {})
        self.asked = inspect.signature(type(model).forward).parameters
        self.generator = torch.Generator().manual_seed(7)

    def size(self, *names: str, default: Any = None) -> Any:
        """A field of the config, or of its parts."""
        for config in _configs(self.config):
            for name in names:
                value = getattr(config, name, None)
                if value is not None and not callable(value):
                    return value
        return default

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def ids(self, length: int = LENGTH, below: int | None = None, rows: int = ROWS) -> Tensor:
        below = below or min(self.vocabulary(), 90)
        return torch.randint(min(_TEXT_FROM, below - 1), below, (rows, length), generator=self.generator)

    def vocabulary(self) -> int:
        text = self.config.get_text_config()
        return next((v for v in (getattr(text, "vocab_size", None), self.size("vocab_size")) if isinstance(v, int)), 90)

    # ---- arguments ---------------------------------------------------------------------------------------------------

    def image(self) -> Tensor:
        vision = next((c for c in _configs(self.config) if getattr(c, "image_size", None)), self.config)
        size = getattr(vision, "image_size", None) or 64
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return self.noise(ROWS, self.channels(), height, width)

    def channels(self) -> int:
        found = self.size("num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
        return found if isinstance(found, int) else 3

    def patches(self) -> Given:
        """Images as a list of flattened patches, with their grid: two images of 4 x 4 patches."""
        patch = self.size("patch_size", default=8)
        temporal = self.size("temporal_patch_size", "patch_temporal", default=1)
        wide = self.channels() * patch * patch * temporal
        return {
            "pixel_values": self.noise(ROWS * 16, wide),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS),
        }

    def mel(self) -> Tensor:
        bins = self.size("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "mel_dim", default=80)
        frames = 2 * self.size("max_source_positions", default=32)
        return self.noise(ROWS, bins, frames)

    def boxes(self) -> Tensor:
        corner = torch.randint(0, 50, (ROWS, LENGTH, 2), generator=self.generator)
        return torch.cat([corner, corner + 20], -1)

    def make(self) -> Given:
        asked, given = self.asked, dict[str, Any]()
        if "pixel_values" in asked and self.variant != "text":
            if "image_grid_thw" in asked:
                given |= self.patches()
            elif "spatial_shapes" in asked:
                given |= self.shaped()
            elif "grid_thw" in asked:
                patches = self.patches()
                given |= {"pixel_values": patches["pixel_values"], "grid_thw": patches["image_grid_thw"]}
            else:
                given["pixel_values"] = self.image()
        elif "grid_thw" in asked and "hidden_states" in asked:
            patches = self.patches()
            given |= {"hidden_states": patches["pixel_values"], "grid_thw": patches["image_grid_thw"]}
        for name, maker in _MAKERS.items():
            required = name in asked and asked[name].default is inspect.Parameter.empty
            wanted = name in _WANTED and not (
                self.variant == "text" and name.startswith(("pixel", "input_f", "input_v"))
            )
            if name in asked and name not in given and (required or wanted):
                given[name] = maker(self)
        if self.config.is_encoder_decoder and "decoder_input_ids" in asked:
            given["decoder_input_ids"] = self.ids()
        if "use_cache" in asked:
            given["use_cache"] = False
        more = self.exception.get("inputs", {})
        for name, value in (more(self, given) if callable(more) else more).items():
            given[name] = value
            if value is None:
                del given[name]
        if self.variant in _VARIANTS:
            name, change = _VARIANTS[self.variant]
            if not isinstance(given.get(name), Tensor):
                raise LookupError(f"no {name}")
            given[name] = change(given[name])
        for name in ("input_features_mask", "audio_mel_mask"):
            if name in asked and "input_features" in given:
                frames = given["input_features"].shape[1 if self.variant == "features last" else 2]
                given[name] = torch.ones(ROWS, frames, dtype=torch.long)
        if "input_ids" in given and self.exception.get("place", True):
            self.place(given)
        missing = [
            n
            for n, p in list(asked.items())[1:]
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and n not in given
        ]
        if missing:
            raise LookupError(f"nothing is known to give for {missing}")
        return given

    def shaped(self) -> Given:
        """Images as rows of flattened patches, with their heights and widths."""
        patch = self.size("patch_size", default=8)
        return {
            "pixel_values": self.noise(ROWS, 16, self.channels() * patch * patch),
            "pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * ROWS),
        }

    def place(self, given: Given) -> None:
        """As many placeholders in the text as an image or a sound has features."""
        for features, tokens in (
            ("image", ("image_token_id", "image_token_index")),
            ("audio", ("audio_token_id", "audio_token_index")),
        ):
            token = self.size(*tokens)
            function = getattr(self.model, f"get_{features}_features", None)
            if token is None or function is None:
                continue
            takes = inspect.signature(function).parameters
            mine = {n: v for n, v in given.items() if n in takes and n != "input_ids"}
            if not any(n.startswith(("pixel", "input_feat", "input_val", "audio")) for n in mine):
                continue
            with torch.no_grad():
                count = _count(function(**mine)) // ROWS
            ids = given["input_ids"]
            given["input_ids"] = torch.cat([ids[:, :3], torch.full((len(ids), count), token), ids[:, 3:]], 1)
            for name in ("mm_token_type_ids", "token_type_ids"):
                if name in self.asked and features == "image":
                    given[name] = (given["input_ids"] == token).long()


def _count(found: Any) -> int:
    """How many vectors a model's features are."""
    if hasattr(found, "pooler_output") and found.pooler_output is not None:
        found = found.pooler_output
    elif hasattr(found, "last_hidden_state"):
        found = found.last_hidden_state
    if isinstance(found, (list, tuple)):
        return sum(_count(one) for one in found)
    return found.numel() // found.shape[-1]


def _configs(config: Any) -> list[Any]:
    """A config and its parts, outermost first."""
    found = [config]
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "to_dict"):
            found += _configs(part)
    return found


_MAKERS: Mapping[str, Callable[[_Maker], Any]] = {
    "input_ids": lambda m: m.ids(),
    "attention_mask": lambda m: torch.ones(ROWS, LENGTH, dtype=torch.long),
    "bbox": lambda m: m.boxes(),
    "pixel_values_videos": lambda m: m.noise(
        ROWS, m.size("num_frames", "frames_per_clip", default=4), m.channels(), *m.image().shape[-2:]
    ),
    "pixel_values": lambda m: m.image(),
    "input_features": lambda m: m.mel(),
    "input_values": lambda m: m.noise(ROWS, 4000),
    "inputs_embeds": lambda m: m.noise(ROWS, LENGTH, m.size("hidden_size", "d_model", default=32)),
    "hidden_states": lambda m: m.noise(ROWS, LENGTH, m.size("hidden_size", "d_model", default=32)),
    "labels": lambda m: m.ids(),
    "decoder_input_ids": lambda m: m.ids(),
    "past_values": lambda m: m.noise(
        ROWS, m.size("context_length", default=32), m.size("num_input_channels", default=1)
    ),
    "interpolate_pos_encoding": lambda m: False,
}
_WANTED = frozenset({"input_ids", "bbox", "pixel_values", "input_features", "input_values", "past_values"})


_VARIANTS: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "features last": ("input_features", lambda x: x.transpose(1, 2).contiguous()),
    "several images": ("pixel_values", lambda x: x[:, None].repeat(1, 2, *[1] * (x.ndim - 1))),
    "a video": ("pixel_values", lambda x: x[:, None].repeat(1, 8, *[1] * (x.ndim - 1))),
    "channels": ("input_values", lambda x: x[:, None]),
    "time last": ("input_values", lambda x: torch.randn(ROWS, 64, 16, generator=torch.Generator().manual_seed(7))),
}
VARIANTS = ("", *_VARIANTS)
"""Ways of giving the same: an argument has another order of dimensions in some models."""


def inputs(model: Any, model_type: str, variant: str = "") -> Given:
    """The arguments of a forward; the same each time.

    Args:
        variant: one of VARIANTS, or "text": no images and no sounds.

    Raises:
        LookupError: nothing is known for an argument that it needs.
    """
    return _Maker(model, model_type, variant).make()
