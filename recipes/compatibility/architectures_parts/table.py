"""What the names of fields and arguments do not tell: exceptions for single model_types, as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["EXCEPTIONS", "Rule"]


class Rule:
    """Whether a field's name is of a kind."""

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern)

    def __call__(self, name: str) -> bool:
        return self.pattern.search(name) is not None


_MROPE = (  # positions in three parts, of 16, 24 and 24 where the config does not say
    "qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text qwen2_5_omni_text qwen2_5_omni_talker qwen2_5_omni_thinker "
    "glm46v glm4v glm4v_moe glm4v_moe_text glm4v_text glm_image_text glm_ocr glm_ocr_text glmga"
)
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_SAM = {"image_size": 32, "patch_size": 8, "image_embedding_size": 4}
_SMALL_NET = {"width_coefficient": 0.25, "depth_coefficient": 0.25}
_SERIES = {"start": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}}


def _hidden(make: Any) -> int:
    found: int = make.size("hidden_size", "d_model", default=32)
    return found


def _series(make: Any, given: Any) -> Any:
    past, rows = make.config.context_length + max(make.config.lags_sequence), 2
    features = make.config.num_time_features
    return {
        "past_values": make.noise(rows, past),
        "past_time_features": make.noise(rows, past, features),
        "past_observed_mask": torch.ones(rows, past),
        "future_values": make.noise(rows, make.config.prediction_length),
        "future_time_features": make.noise(rows, make.config.prediction_length, features),
    }


EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    **{name: {"sections": (2, 1, 1)} for name in _MROPE.split()},
    **{name: {**_SERIES, "inputs": _series} for name in ("autoformer", "informer", "time_series_transformer")},
    **{name: {"fields": _MAMBA} for name in ("bamba", "granitemoehybrid")},
    **{name: {"fields": _ROPE} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral")},
    **{name: {"fields": {"prompt_encoder_config": _SAM}} for name in ("sam", "sam_hq")},
    **{name: {"fields": {"num_key_value_heads": 4, "index_topk": 16}} for name in ("glm5_next_text", "minicpm_sala")},
    "instructblip": {
        "fields": {"image_token_index": 100},
        "inputs": lambda m, _: {"qformer_input_ids": m.ids()},
    },
    "blip-2": {"fields": {"image_token_index": 100}},
    **{
        name: {"inputs": lambda m, _: {"spectrogram": m.noise(2, 20, m.config.model_in_dim)}}
        for name in ("fastspeech2_conformer_hifigan", "speecht5_hifigan")
    },
    **{
        name: {"inputs": lambda m, _: {"input_ids": m.ids(rows=2 * m.config.num_codebooks)}}
        for name in ("musicgen_decoder", "musicgen_melody_decoder")
    },
    **{
        name: {
            "inputs": lambda m, _: {
                "pixel_values": None,
                "flattened_patches": m.noise(2, 16, 2 + 3 * m.size("patch_size", default=16) ** 2),
            }
        }
        for name in ("pix2struct", "pix2struct_vision_model")
    },
    **{  # a head whose output hardly depends on what it is given
        name: {"inputs": lambda m, _: {"output_hidden_states": True}}
        for name in ("depth_anything", "prompt_depth_anything", "chmv2")
    },
    "align": {"fields": {"vision_config": _SMALL_NET}},
    "align_vision_model": {"fields": _SMALL_NET},
    "audio-spectrogram-transformer": {
        "fields": {"max_length": 64},
        "inputs": lambda m, _: {"input_values": m.noise(2, 64, m.config.num_mel_bins)},
    },
    "blip_2_qformer": {
        "inputs": lambda m, _: {
            "query_embeds": m.noise(2, 8, _hidden(m)),
            "encoder_hidden_states": m.noise(2, 8, m.config.encoder_hidden_size),
        }
    },
    "canine": {"fields": {"max_position_embeddings": 2048}},
    "chameleon": {"start": {"vocabulary_map": {"<image>": 100}}, "fields": {"vocabulary_map": {"<image>": 100}}},
    "efficientnet": {"fields": _SMALL_NET},
    "efficientloftr": {"class": "EfficientLoFTRModel"},  # the other's output are matches, found or not
    "esm": {"start": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 2}},
    "falcon_h1": {"fields": {**_MAMBA, "mamba_d_ssm": 64}},
    "glm5_next": {"fields": {"text_config": {"num_key_value_heads": 4, "index_topk": 16}}},
    "gpt_neo": {"fields": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]}},
    "hunyuan_vl": {"fields": {"text_config": _ROPE}},
    "idefics2_perceiver": {"inputs": lambda m, _: {"context": m.noise(2, 8, _hidden(m))}},
    "led": {"fields": {"attention_window": 4, "max_encoder_position_embeddings": 64}},
    "lxmert": {
        "inputs": lambda m, _: {
            "visual_feats": m.noise(2, 5, m.config.visual_feat_dim),
            "visual_pos": m.noise(2, 5, m.config.visual_pos_dim),
        }
    },
    "mamba2": {"fields": {"num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}},
    "mllama_vision_model": {
        "inputs": lambda m, _: {
            "pixel_values": m.image()[:, None, None].repeat(1, 1, m.config.max_num_tiles, 1, 1, 1),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(2, 1, m.config.max_num_tiles, dtype=torch.long),
        }
    },
    "mobilebert": {"fields": {"hidden_size": 64}},  # the embedding's rest of it would be empty
    "nemotron": {"fields": {"num_key_value_heads": 2}},
    "neomme": {"fields": {"head_dim": 16}},
    "oneformer": {"inputs": lambda m, _: {"task_inputs": m.ids(m.config.task_seq_len)}},
    "reformer": {
        "skip": "its reversible layers give an adapter gradients in training mode alone, with all dropouts on"
    },
    "seggpt": {"inputs": lambda m, _: {"prompt_pixel_values": m.image(), "prompt_masks": m.image()}},
    "xcodec": {"skip": "its output is made of codes: no gradient reaches a layer before them"},
    "xmod": {"start": {"default_language": "en_XX"}},
}
"""model_type → what its small config needs besides the names of its fields: "start" (keywords that the default config
itself needs), "fields" (written over the small ones, nested as the config is), "drop", "sections" (of mrope), "class"
(tried first), "skip" (why it is not run), "seed" (of the weights), and "inputs" of the forward, from its maker and what
is given already (None: not given)."""
