"""Tiny models of many architectures, with a batch of three rows and each of its rows as a batch of its own.

The rows differ in what they bring: two images, none, one (of other sizes where the architecture has them). There are as
many images as rows, and as many tokens as rows where there are no images: whatever takes a size for the rows, or images
for rows one by one, is wrong here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from test_architectures import CASES, KV, MOE, SMALL, TOWER
from torch import Tensor

ROWS = 3
IMAGES = (2, 0, 1)  # of each row
IMAGE_ID, VIDEO_ID = 60, 61


@dataclass
class Scene:
    """A model, a batch of three rows, and its rows one by one."""

    model: Any
    batch: dict[str, Any]
    alone: list[dict[str, Any]]


def built(config: Any, name: str) -> Any:
    """A model with random weights, in float64 (float32 where its kernel for experts knows no more)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls = getattr(transformers, name)
        model = cls.from_config(config) if name.startswith("Auto") else cls(config)
        for name, parameter in model.named_parameters():  # zero biases and unit norms hide mistakes
            if parameter.dim() < 2 or "norm" in name.lower():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            elif parameter.abs().max() == 0:
                parameter.data.normal_(0, 0.05)
    experts = any(parameter.dim() == 3 for name, parameter in model.named_parameters() if ".experts." in name)
    return (model if experts else model.double()).eval()


def ids(rows: int = ROWS, length: int = ROWS, seed: int = 0) -> Tensor:
    return torch.randint(3, 58, (rows, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_row(batch: dict[str, Any], **constant: Any) -> list[dict[str, Any]]:
    """Each row of tensors whose first dimension is the rows."""
    return [{**{key: value[i : i + 1] for key, value in batch.items()}, **constant} for i in range(ROWS)]


def prompts(tokens: list[list[int]], placeholder: int = IMAGE_ID, length: int | None = None) -> Tensor:
    """Rows of text in which item j of row i stands as `tokens[i][j]` placeholders, filled up with text."""
    length = length or 4 + max(sum(row) + len(row) for row in tokens)
    text = ids(len(tokens), length, seed=1)
    for row, counts in zip(text, tokens, strict=True):
        at = 2
        for count in counts:
            row[at : at + count] = placeholder
            at += count + 1
    return text


_BART = {**SMALL, "d_model": 32, "decoder_start_token_id": 2, "max_length": 32} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
}
_SWIN = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
_STAGES = {"out_features": [f"stage{i}" for i in range(1, 5)], "depths": [1] * 4, "num_heads": [2] * 4}

# model_types outside the table of roles whose layers see (T, B, d), (B · T, d) or windows
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "xlnet": ("AutoModelForCausalLM", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 64}),
    "fsmt": ("AutoModelForSeq2SeqLM", {**_BART, "src_vocab_size": 64, "tgt_vocab_size": 64, "langs": ["en", "de"]}),
    "longformer": ("AutoModelForMaskedLM", {**SMALL, "attention_window": 4}),
    "led": ("AutoModelForSeq2SeqLM", {**_BART, "attention_window": 4, "max_encoder_position_embeddings": 32}),
    "afmoe": ("AutoModelForCausalLM", {**MOE, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2}),
    "wav2vec2-bert": ("AutoModel", {**SMALL, "feature_projection_input_dim": 32, "max_source_positions": 8}),
    "mlcd": ("AutoModel", dict(TOWER)),
    "donut-swin": ("AutoModel", _SWIN),
    "maskformer-swin": ("AutoModel", _SWIN),
    "swinv2": ("AutoModel", _SWIN),
    "swin2sr": ("AutoModel", {**_SWIN, "patch_size": 1, "window_size": 4}),
    "mask2former": (
        "AutoModel",
        {
            **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32),
            "num_attention_heads": 4,
            "dim_feedforward": 48,
            "encoder_feedforward_dim": 48,
            "num_queries": ROWS,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "backbone_config": {**_SWIN, **_STAGES, "model_type": "swin", "image_size": 128},
        },
    ),
}


def plain(model_type: str) -> Scene:
    """A scene of a model that takes text, sound or one image for each row."""
    auto, values = OTHERS[model_type] if model_type in OTHERS else CASES[model_type][:2]
    if model_type == "deepseek_v3":
        values = {**values, "head_dim": 4}
    config = transformers.AutoConfig.for_model(model_type, **values)
    model = built(config, auto)
    main = model.main_input_name
    if main == "pixel_values":
        side = 128 if model_type == "mask2former" else 16
        batch = {"pixel_values": noise(ROWS, 3, side, side)}
    elif main == "input_values":
        batch = {"input_values": noise(ROWS, 64)}
    elif model_type == "wav2vec2-bert":
        batch = {"input_features": noise(ROWS, ROWS, 32)}
    elif main == "input_features":
        batch = {"input_features": noise(ROWS, config.num_mel_bins, 32)}
    else:
        batch = {"input_ids": ids()}
    if model_type in ("clip", "siglip", "siglip2"):
        batch["pixel_values"] = noise(ROWS, 3, 16, 16)
        if model_type == "siglip2":
            sides = 4
            batch["pixel_values"] = noise(ROWS, sides * sides, 3 * 16)
            batch["pixel_attention_mask"] = torch.ones(ROWS, sides * sides, dtype=torch.int64)
            batch["spatial_shapes"] = torch.tensor([[sides, sides]] * ROWS)
    if model_type in ("longformer", "led"):
        batch["global_attention_mask"] = torch.tensor([[1, 0, 0]] * ROWS)
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids(seed=2)
    return Scene(model, batch, by_row(batch))


def _images(model: Any, tokens: int, shape: tuple[int, ...], **more: Any) -> Scene:
    """Images of the same size, (n, …), in the order of their rows."""
    text, pixels = prompts([[tokens] * n for n in IMAGES]), noise(sum(IMAGES), *shape).to(model.dtype)
    batch = {"input_ids": text, "pixel_values": pixels, **more}
    alone = []
    for i, own in enumerate(pixels.split(IMAGES)):
        alone.append({"input_ids": text[i : i + 1], **({"pixel_values": own, **more} if len(own) else {})})
    return Scene(model, batch, alone)


def _vlm(
    model_type: str, text: str, vision: dict[str, Any], auto: str = "AutoModelForImageTextToText", **kw: Any
) -> Any:
    fields = {"text_config": {**KV, "model_type": text, "max_position_embeddings": 128}, "vision_config": vision}
    for key in ("image_token_id", "image_token_index"):
        fields.setdefault(key, IMAGE_ID)
    text_fields = kw.pop("text_config", {})
    fields["text_config"].update(text_fields)
    config = transformers.AutoConfig.for_model(model_type, **{**fields, **kw})
    return built(config, auto)


_CLIP = {**TOWER, "model_type": "clip_vision_model"}
_SIGLIP = {**TOWER, "model_type": "siglip_vision_model"}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}


def llava() -> Scene:
    return _images(_vlm("llava", "llama", _CLIP), 16, (3, 16, 16))


def vipllava() -> Scene:
    return _images(_vlm("vipllava", "llama", _CLIP, vision_feature_layers=[-1, -2]), 16, (3, 16, 16))


def paligemma() -> Scene:
    return _images(_vlm("paligemma", "gemma", _SIGLIP, projection_dim=32), 16, (3, 16, 16))


def gemma3() -> Scene:
    return _images(_vlm("gemma3", "gemma3_text", _SIGLIP, mm_tokens_per_image=4), 4, (3, 16, 16))


def internvl() -> Scene:
    vision = {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]}
    return _images(_vlm("internvl", "qwen2", vision, downsample_ratio=0.5), 4, (3, 16, 16))


def aya_vision() -> Scene:
    return _images(_vlm("aya_vision", "cohere2", _SIGLIP, downsample_factor=2), 4, (3, 16, 16))


def cohere2_vision() -> Scene:
    return _images(
        _vlm("cohere2_vision", "cohere2", _SIGLIP, downsample_factor=2, alignment_intermediate_size=32), 4, (3, 16, 16)
    )


def llama4() -> Scene:
    vision = {**TOWER, "pixel_shuffle_ratio": 0.5, "projector_input_dim": 32, "projector_output_dim": 32}
    vision |= {"vision_output_dim": 32, "intermediate_size": 128}
    text = {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_layers": [1]}
    return _images(_vlm("llama4", "llama4_text", vision, text_config=text), 4, (3, 16, 16))


def _padded(model: Any, tokens: int) -> Scene:
    text, most = prompts([[tokens] * n for n in IMAGES]), max(IMAGES)
    pixels = noise(ROWS, most, 3, 16, 16)
    for row, n in enumerate(IMAGES):
        pixels[row, n:] = 0
    alone = []
    for row, n in enumerate(IMAGES):
        own = {"pixel_values": pixels[row : row + 1, :n]} if n else {}
        alone.append({"input_ids": text[row : row + 1], **own})
    return Scene(model, {"input_ids": text, "pixel_values": pixels}, alone)


def idefics2() -> Scene:
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8}
    perceiver |= {"num_key_value_heads": 2, "hidden_size": 32}
    return _padded(_vlm("idefics2", "mistral", dict(TOWER), perceiver_config=perceiver), 4)


def idefics3(model_type: str = "idefics3") -> Scene:
    return _padded(_vlm(model_type, "llama", dict(TOWER), scale_factor=2), 4)


def smolvlm() -> Scene:
    return idefics3("smolvlm")


GRIDS = (((1, 2, 2), (1, 4, 6)), (), ((1, 6, 4),))  # of the images of each row, in patches


def grids(model_type: str, *, videos: bool = False, images: bool = True) -> Scene:
    """Qwen-VL: patches of all images (and videos) in one sequence."""
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "intermediate_size": 48}
    vision |= {"out_hidden_size": 32}
    if model_type == "qwen2_vl":
        vision |= {"embed_dim": 32, "mlp_ratio": 2}
    if model_type == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    if model_type.startswith("qwen3_vl"):
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    if model_type == "glm4v":
        vision |= {"image_size": 16}
    text = "glm4v_text" if model_type == "glm4v" else f"{model_type}_text"
    more = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2} if "moe" in model_type else {}
    model = _vlm(
        model_type,
        text,
        vision,
        text_config={**_MROPE, **more},
        video_token_id=VIDEO_ID,
        vision_start_token_id=58,
        vision_end_token_id=59,
    )
    size = 3 * 2 * 4 * 4
    films: Any = (((2, 4, 4),), ((1, 2, 6), (2, 2, 4)), ())
    if model_type.startswith("qwen3"):  # there each frame is a run of placeholders of its own
        films = (((1, 4, 8),), ((1, 2, 6), (1, 4, 4)), ())
    kinds = [("image", GRIDS if images else ((), (), ())), ("video", films if videos else ((), (), ()))]
    counts = [[t * h * w // 4 for _, grid in kinds for t, h, w in grid[row]] for row in range(ROWS)]
    text_ids = prompts(counts)
    for row in range(ROWS):
        seen = sum(t * h * w // 4 for t, h, w in kinds[0][1][row])
        places = (text_ids[row] == IMAGE_ID).nonzero().flatten()
        text_ids[row, places[seen:]] = VIDEO_ID
    types = (text_ids == IMAGE_ID).int() + 2 * (text_ids == VIDEO_ID).int()
    batch: dict[str, Any] = {"input_ids": text_ids, "mm_token_type_ids": types}
    alone: list[dict[str, Any]] = [
        {"input_ids": text_ids[i : i + 1], "mm_token_type_ids": types[i : i + 1]} for i in range(ROWS)
    ]
    for seed, (kind, grid) in enumerate(kinds):
        pixels_name = "pixel_values" if kind == "image" else "pixel_values_videos"
        flat = [thw for row in grid for thw in row]
        if not flat:
            continue
        pixels = noise(sum(t * h * w for t, h, w in flat), size, seed=seed)
        batch |= {pixels_name: pixels, f"{kind}_grid_thw": torch.tensor(flat)}
        start = 0
        for row in range(ROWS):
            n = sum(t * h * w for t, h, w in grid[row])
            if n:
                alone[row] |= {pixels_name: pixels[start : start + n], f"{kind}_grid_thw": torch.tensor(grid[row])}
            start += n
    return Scene(model, batch, alone)


def _sized(model: Any, side: int, merge: int) -> Scene:
    """Images of several sizes, padded to the largest, with `image_sizes`."""
    sizes = (((8, 16), (16, 8)), (), ((16, 16),))
    text = prompts([[h // side // merge * (w // side // merge) for h, w in row] for row in sizes])
    pixels, flat = noise(3, 3, 16, 16), torch.tensor([size for row in sizes for size in row])
    alone, start = [], 0
    for row, own in enumerate(sizes):
        end = start + len(own)
        seen = {"pixel_values": pixels[start:end], "image_sizes": flat[start:end]} if own else {}
        alone.append({"input_ids": text[row : row + 1], **seen})
        start = end
    return Scene(model, {"input_ids": text, "pixel_values": pixels, "image_sizes": flat}, alone)


_PIXTRAL = {**TOWER, "model_type": "pixtral", "head_dim": 8}


def llava_pixtral() -> Scene:
    model = _vlm("llava", "mistral", _PIXTRAL, vision_feature_layer=-1, vision_feature_select_strategy="full")
    return _sized(model, 4, 1)


def mistral3() -> Scene:
    return _sized(_vlm("mistral3", "mistral", _PIXTRAL, vision_feature_layer=-1, spatial_merge_size=2), 4, 2)


def _anyres(model: Any, vision: bool = False) -> Scene:
    sizes = (((16, 32), (32, 16)), (), ((30, 30),))
    base = model.model
    code = __import__("sys").modules[type(base).__module__]
    crops = [
        [code.image_size_to_num_patches(list(size), base.config.image_grid_pinpoints, 16) for size in row]
        for row in sizes
    ]
    flat = torch.tensor([size for row in sizes for size in row])
    most = max(n for row in crops for n in row)
    pixels = noise(3, most, 3, 16, 16)
    with torch.no_grad():  # the model's own count of each image's features
        strategy = {} if "onevision" in base.config.model_type else {"vision_feature_select_strategy": "default"}
        features = base.get_image_features(pixels, flat, **strategy).pooler_output
    tokens = [len(feature) for feature in features]
    text = prompts([tokens[:2], [], tokens[2:]])
    alone, start = [], 0
    for row, own in enumerate(sizes):
        end = start + len(own)
        seen = {"pixel_values": pixels[start:end], "image_sizes": flat[start:end]} if own else {}
        alone.append({"input_ids": text[row : row + 1], **seen})
        start = end
    return Scene(model, {"input_ids": text, "pixel_values": pixels, "image_sizes": flat}, alone)


_PINS = [[16, 32], [32, 16], [32, 32]]


def llava_next() -> Scene:
    return _anyres(_vlm("llava_next", "llama", _CLIP, image_grid_pinpoints=_PINS))


def llava_onevision() -> Scene:
    return _anyres(
        _vlm(
            "llava_onevision",
            "qwen2",
            _SIGLIP,
            image_grid_pinpoints=_PINS,
            video_token_id=VIDEO_ID,
            video_token_index=VIDEO_ID,
        )
    )


def llava_onevision_many() -> Scene:
    """Several images of a row are not cut."""
    model = llava_onevision().model
    pixels, sizes = noise(3, 5, 3, 16, 16), torch.tensor([[16, 32], [32, 16], [30, 30]])
    counts = torch.tensor(IMAGES)
    with torch.no_grad():
        features = model.model.get_image_features(pixels, sizes, batch_num_images=counts).pooler_output
    tokens = [len(feature) for feature in features]
    text, alone, start = prompts([tokens[:2], [], tokens[2:]]), [], 0
    for row, n in enumerate(IMAGES):
        end = start + n
        seen = (
            {"pixel_values": pixels[start:end], "image_sizes": sizes[start:end], "batch_num_images": [n]} if n else {}
        )
        alone.append({"input_ids": text[row : row + 1], **seen})
        start = end
    batch = {"input_ids": text, "pixel_values": pixels, "image_sizes": sizes, "batch_num_images": counts}
    return Scene(model, batch, alone)


def llava_onevision_videos() -> Scene:
    scene = llava_onevision()
    with torch.no_grad():
        films = noise(3, 2, 3, 16, 16)
        (feature, *_) = scene.model.model.get_video_features(
            films, vision_feature_layer=-1, vision_feature_select_strategy="full"
        ).pooler_output
    tokens = feature.shape[-2]
    text = prompts([[tokens] * n for n in IMAGES], VIDEO_ID)
    alone = []
    for i, own in enumerate(films.split(IMAGES)):
        alone.append({"input_ids": text[i : i + 1], **({"pixel_values_videos": own} if len(own) else {})})
    return Scene(scene.model, {"input_ids": text, "pixel_values_videos": films}, alone)


def mllama() -> Scene:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4, "image_size": 16}
    vision |= {"patch_size": 4, "intermediate_size": 48, "vision_output_dim": 64, "max_num_tiles": 2}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    text = {"cross_attention_layers": [1]}
    model = _vlm("mllama", "mllama_text_model", vision, text_config=text)
    media, tiles, length = 2, 2, ROWS
    batch = {
        "input_ids": ids(length=length),
        "pixel_values": noise(ROWS, media, tiles, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[1, 2], [2, 0], [3, 1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0], [1, 1]], [[1, 1], [0, 0]], [[1, 1], [1, 0]]]),
        "cross_attention_mask": torch.ones(ROWS, length, media, tiles, dtype=torch.int64),
    }
    return Scene(model, batch, by_row(batch))


def blip2(model_type: str = "blip-2") -> Scene:
    qformer = {**SMALL, "encoder_hidden_size": 32}
    config = transformers.AutoConfig.for_model(
        model_type,
        text_config={**SMALL, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
        vision_config=dict(TOWER),
        qformer_config=qformer,
        num_query_tokens=4,
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
    )
    name = "Blip2ForConditionalGeneration" if model_type == "blip-2" else "InstructBlipForConditionalGeneration"
    model = built(config, name)
    batch = {"input_ids": prompts([[4]] * ROWS), "pixel_values": noise(ROWS, 3, 16, 16)}
    if model_type == "instructblip":
        batch["qformer_input_ids"] = ids(length=4, seed=3)
    return Scene(model, batch, by_row(batch))


def instructblip() -> Scene:
    return blip2("instructblip")


_AUDIO = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8}


def voxtral() -> Scene:
    audio = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    audio |= {"num_mel_bins": 8, "max_source_positions": 16}
    config = transformers.AutoConfig.for_model(
        "voxtral",
        audio_config=audio,
        text_config={**KV, "model_type": "llama", "max_position_embeddings": 128},
        audio_token_id=IMAGE_ID,
    )
    model = built(config, "VoxtralForConditionalGeneration")
    return _sounds(model, 4)


def _sounds(model: Any, tokens: int) -> Scene:
    text, sounds = prompts([[tokens] * n for n in IMAGES]), noise(3, 8, 32)
    alone = []
    for i, own in enumerate(sounds.split(IMAGES)):
        alone.append({"input_ids": text[i : i + 1], **({"input_features": own} if len(own) else {})})
    return Scene(model, {"input_ids": text, "input_features": sounds}, alone)


def qwen2_audio() -> Scene:
    audio = {**_AUDIO, "max_source_positions": 16, "model_type": "qwen2_audio_encoder"}
    config = transformers.AutoConfig.for_model(
        "qwen2_audio", audio_config=audio, text_config={**KV, "model_type": "qwen2"}, audio_token_index=IMAGE_ID
    )
    model = built(config, "AutoModelForSeq2SeqLM")
    lengths = torch.tensor([32, 20, 12])
    tokens = [((int(n) - 1) // 2 + 1 - 2) // 2 + 1 for n in lengths]
    text, sounds = prompts([tokens[:2], [], tokens[2:]]), noise(3, 8, 32)
    mask = (torch.arange(32) < lengths[:, None]).long()
    alone, start = [], 0
    for i, n in enumerate(IMAGES):
        end = start + n
        seen = {"input_features": sounds[start:end], "feature_attention_mask": mask[start:end]} if n else {}
        alone.append({"input_ids": text[i : i + 1], **seen})
        start = end
    return Scene(model, {"input_ids": text, "input_features": sounds, "feature_attention_mask": mask}, alone)


def experts(model_type: str) -> Scene:
    """Experts as lists of Linear layers, with room for every token: then rows do not meet in them."""
    values = {
        "switch_transformers": {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_heads": 4,
            "vocab_size": 64,
            "pad_token_id": 0,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_experts": 3,
            "expert_capacity": 64,
        },
        "nllb-moe": {
            "d_model": 32,
            "vocab_size": 64,
            "pad_token_id": 0,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_experts": 3,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "moe_token_dropout": 0.0,
            "moe_eval_capacity_token_fraction": 1.0,
            "max_position_embeddings": 64,
        },
    }[model_type]
    model = built(transformers.AutoConfig.for_model(model_type, **values), "AutoModelForSeq2SeqLM")
    batch = {"input_ids": ids(length=5), "decoder_input_ids": ids(length=5, seed=2)}
    return Scene(model, batch, by_row(batch))


def switch() -> Scene:
    return experts("switch_transformers")


def nllb() -> Scene:
    return experts("nllb-moe")


TOWERS = {
    **{
        scene.__name__: scene
        for scene in (
            *(llava, vipllava, paligemma, gemma3, internvl, aya_vision, cohere2_vision, llama4),
            *(idefics2, idefics3, smolvlm, llava_pixtral, mistral3, mllama, blip2, instructblip),
            *(
                llava_next,
                llava_onevision,
                llava_onevision_many,
                llava_onevision_videos,
                voxtral,
                qwen2_audio,
                switch,
                nllb,
            ),
        )
    },
    **{
        name: functools.partial(grids, name, videos=name != "glm4v")
        for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v")
    },
}
"""name → a scene of a model with parts whose batch is not the rows."""
