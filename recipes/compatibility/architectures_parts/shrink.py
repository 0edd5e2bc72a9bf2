"""A model_type's default config made small, by the names of its fields.

Three ways, tried in turn until a model builds and runs: "table" writes one size for each kind of field (width 32, 4
heads of 8, 2 layers); "scaled" divides every width by one number and keeps the heads, so that what one part expects of
another still fits; "layers" leaves the widths alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .table import EXCEPTIONS, Rule

__all__ = ["WAYS", "small_config"]

WAYS = ("table", "scaled", "layers")
VOCABULARY, TOKENS = 128, 96  # ids of special tokens that are too large for it begin at TOKENS

_LAYERS = Rule(
    r"^(num_)?(\w+_)?(hidden_|attention_|encoder_|decoder_)?(layers|blocks|depths?)$|^n_layers?$|^num_layers_per_stack$"
    r"|^layers$|_num_layers$|^l_layers$|^[rx]_layers$|^num_residual_layers$|^num_res_blocks$|^depth$|_depth$"
)
_NO_LAYERS = Rule(
    r"^(num_)?(feat_extract|adapter|conv|first_k|dense|global|upscale|res|kv_shared|nextn|ln|lstm|denoising|mem)"
    r"|(feature|conv|adapter|postnet|nextn_predict|dense|coda|pool|look_ahead|look_backward|stem|prompt)_(layers|blocks)$"
    r"|^(max|min|iou_head|num_upscale)_|^rope_|^no_rope|^num_kv_shared_layers$|^encode_proj_layers$"
    r"|^cross_attention_layers$|^moe_layers$|^attn_layers$|^return_layers$|^extract_layers$|^subsample_layers$"
    r"|^kv_source_layers$|^out_layers$|^spatial_target_layers$|_target_layers$|^attention_layers$"
)
_DEPTHS = Rule(
    r"^depths$|^stage_num_blocks$|^num_block_repeats$|^blocks_per_stage$|^stage_numb_of_layers$|^layer_depths$"
)
_WIDTH = Rule(
    r"(^|_)(hidden_size|hidden_dim|d_model|n_embd|embed_dim|emb_dim|embedding_size|embedding_dim|dim|hidden_sizes"
    r"|projection_dim|project_dim|projection_size|embed_dims|hidden_size_global|lru_width|feature_size|output_dim"
    r"|word_embed_proj_dim|output_channels|hidden_channels|width|channels_dim|channel_list|encoder_hidden_size"
    r"|embed_dim_per_stage|attention_hidden_size|pooler_output_size|out_hidden_size|d_inner|attention_channels"
    r"|embedding_channels|bottleneck_size|latents?_dim|d_latents|hidden|vision_output_dim|neck_hidden_sizes"
    r"|proj_size|codevector_dim|feature_projection_input_dim|encoder_hidden_dim|decoder_hidden_dim|dims|dim_model"
    r"|proj_dim|input_dim_hidden|token_embed_dim|num_pos_feats|adapter_(in|out)_dim|text_hidden_size)$"
)
_INNER = Rule(
    r"(^|_)(intermediate_size|ffn_dim|d_ff|mlp_dim|n_inner|ffn_hidden_size|intermediate_dim|feedforward_dim"
    r"|dim_feedforward|feed_forward_size|linear_units|intermediate_size_mlp|dff|dim_ff|feed_forward_hidden_size"
    r"|expert_dim|mlp_hidden_size|shared_experts_intermediate_size)$"
)
_HEADS = Rule(
    r"(^|_)(num_attention_heads|n_heads?|num_heads|attention_heads|num_self_attention_heads|mamba_heads"
    r"|num_cross_attention_heads|self_attn_heads|resampler_heads|encoder_heads|index_n_heads)$"
)
_KV_HEADS = Rule(r"(^|_)(num_key_value_heads|kv_n_heads|num_kv_heads|num_key_value_attention_heads)$")
_HEAD_DIM = Rule(
    r"(^|_)(head_dim|d_kv|attention_head_size|v_head_dim|qk_nope_head_dim|qk_rope_head_dim|kv_channels"
    r"|attention_head_dim|dim_head|d_head|key_head_dim|value_head_dim|rotary_dim|head_size)$"
)
_RANK = Rule(r"(^|_)(lora_rank|time_step_rank|dt_rank|laurel_rank)$")
_EXPERTS = Rule(r"^(moe_)?(num_experts|num_local_experts|n_routed_experts|num_experts_total|zero_expert_num)$")
_PER_TOKEN = Rule(
    r"^(num_experts_per_tok|num_experts_per_token|moe_topk|moe_top_k|moe_k|num_selected_experts|top_k_experts)$"
)
_GROUPS = Rule(r"^(n_group|topk_group|num_expert_group)$")
_VOCABULARY = Rule(
    r"(^|_)(vocab_size|input_vocab_size|output_vocab_size)(_per_layer_input)?$|^num_embeddings$|^entity_vocab_size$"
)
_POSITIONS = Rule(
    r"^(max_position_embeddings|n_positions|n_ctx|max_source_positions|max_target_positions|max_seq_len"
    r"|max_sequence_length|context_length_max|model_max_length|seq_length|max_(en|de)coder_position_embeddings)$"
)
_MANY = Rule(
    r"^(num_queries|num_query_tokens|two_stage_num_proposals|num_denoising|num_latents|resampler_n_latents"
    r"|resampler_num_latents|num_hash_buckets|codebook_size|train_num_points|index_topk|num_image_tokens|latent_query_num)$"
)
_TOKEN = re.compile(
    r"(_token_id|_token_index|_token_ids|_start_id|_end_id|_newline_id|_pad_id|_bos_id|_eos_id|_patch_id|^pad_id|_ignore_index)$"
)
_KINDS = re.compile(
    r"^(\w+_)?(layer_types|block_types?|layers_block_type|indexer_types|mlp_layer_types|gnn_layers_types|attention_types|hybrid_layer_pattern)$"
)


def small_config(config_class: Any, model_type: str, way: str) -> Any:
    """The config of a small model. Raises whatever the config's own checks raise."""
    exception = EXCEPTIONS.get(model_type, {})
    given = exception.get("start", {})
    base = exception["make"]() if "make" in exception else config_class(**given)
    fields = _Shrinker(way, exception.get("sections", ())).shrink(base.to_dict())
    _put(fields, exception.get("fields", {}))
    for name in exception.get("drop", ()):
        fields.pop(name, None)
    return config_class.from_dict(fields)


def _put(fields: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict) and value:
            _put(fields[name], value)
        else:
            fields[name] = value


class _Shrinker:
    def __init__(self, way: str, sections: Sequence[int] = ()) -> None:
        self.way, self.sections = way, sections
        self.tokens: dict[int, int] = {}
        self.factor = {"table": 8, "scaled": 8, "layers": 1}[way]

    def shrink(self, fields: dict[str, Any], path: str = "") -> dict[str, Any]:
        """The fields of a config, its parts' too, made small."""
        if "factor" in fields or "rope_type" in fields or ("rope_theta" in fields and len(fields) < 12):
            return self.rope(fields)
        layers = self.layers(fields)
        fields = {**self.stages(fields, layers), **self.image(fields)}
        depth = fields.get("num_hidden_layers")
        found: dict[str, Any] = {}
        for name, value in fields.items():
            if name == "per_layer_config" and type(depth) is int:
                continue
            if name in ("id2label", "label2id"):
                found[name] = _labels(value, name)
            elif isinstance(value, dict):
                found[name] = self.shrink(value, f"{path}{name}.")
            elif isinstance(value, list) and len(value) == depth and depth > layers and not _KINDS.match(name):
                found[name] = [self.one(name, one, layers) for one in value[:layers]]
            else:
                found[name] = self.one(name, value, layers)
        return found

    def stages(self, fields: dict[str, Any], layers: int) -> dict[str, Any]:
        """A backbone's fields without the names of stages that it will not have; each config makes its own."""
        wanted = fields.get("out_indices")
        if "stage_names" not in fields or fields.get("depths"):
            return fields
        kept = {k: v for k, v in fields.items() if k not in ("stage_names", "out_features", "out_indices")}
        count = len(wanted) if isinstance(wanted, (list, tuple)) else 1
        if count > 1:
            kept |= {"num_hidden_layers": max(layers, count), "out_indices": list(range(1, count + 1))}
        return kept

    def layers(self, fields: dict[str, Any]) -> int:
        """How many layers are needed for one of each kind."""
        kinds = [fields[n] for n in fields if _KINDS.match(n) and isinstance(fields[n], list)]
        distinct = [len({str(v) for v in k}) for k in kinds if k and not isinstance(k[0], list)]
        wanted = fields.get("out_indices") if "stage_names" in fields else None
        return max([2, len(wanted) if isinstance(wanted, (list, tuple)) else 0, *distinct])

    def image(self, fields: dict[str, Any]) -> dict[str, Any]:
        """An image of 4 x 4 patches."""
        patch, size = fields.get("patch_size"), fields.get("image_size")
        if self.way == "layers" or type(size) is not int:
            return {}
        if type(patch) is not int:
            return {"image_size": min(size, 64)}
        if self.way == "table" and patch > 8:
            patch = 8
        return {"patch_size": patch, "image_size": min(size, 4 * patch if patch > 4 else 16 * patch)}

    def one(self, name: str, value: Any, layers: int) -> Any:
        """A field's value, made small."""
        if isinstance(value, (list, tuple)):
            return self.many(name, list(value), layers)
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if _TOKEN.search(name):
            return self.token(value)
        if _VOCABULARY(name):
            return min(value, VOCABULARY)
        if _POSITIONS(name):
            return min(value, 128)
        if _MANY(name):
            return min(value, 8)
        if _EXPERTS(name):
            return min(value, 4)
        if _PER_TOKEN(name):
            return min(value, 2)
        if _GROUPS(name):
            return min(value, 1)
        if _LAYERS(name) and not _NO_LAYERS(name):
            return min(value, layers)
        return self.width(name, value)

    def width(self, name: str, value: int) -> int:
        if self.way == "layers" or value <= 4:
            return value
        if self.way == "scaled":
            if _WIDTH(name) or _INNER(name) or _HEAD_DIM(name) or _RANK(name):
                return value // 8 if value % 8 == 0 else value
            return value
        if _KV_HEADS(name):
            return min(value, 2)
        if _HEADS(name):
            return min(value, 4)
        if _HEAD_DIM(name):
            return min(value, 8)
        if _RANK(name):
            return min(value, 16)
        if _INNER(name):
            return min(value, 64)
        if _WIDTH(name) or name == "upsample_groups":
            return min(value, 32)
        if name in ("num_frames", "frames_per_clip"):
            return min(value, 8)
        return value

    def many(self, name: str, value: list[Any], layers: int) -> Any:
        if _TOKEN.search(name):
            return [self.token(v) if isinstance(v, int) else v for v in value]
        if _KINDS.match(name) and value and isinstance(value[0], str):
            kinds = list(dict.fromkeys(value))
            return (kinds * layers)[:layers] if len(kinds) <= layers else kinds
        if not value or not all(type(v) is int for v in value):
            return value
        if _DEPTHS(name):
            return [min(v, 1) for v in value]
        if (_WIDTH(name) or _INNER(name)) and self.way != "layers":
            return [v // 8 if v % 8 == 0 and v >= 32 else v for v in value]
        return value

    def token(self, value: int) -> int:
        if 0 <= value < TOKENS or value < 0:
            return value
        return self.tokens.setdefault(value, TOKENS + len(self.tokens) % (VOCABULARY - TOKENS))

    def rope(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Parameters of rotary embeddings: sections and factors of as many parts as a head has left."""
        found = dict(fields)
        if self.sections and "rope_type" in fields and self.way == "table":
            found["mrope_section"] = list(self.sections)
        for name, value in fields.items():
            if isinstance(value, dict):
                found[name] = self.rope(value)
            elif name == "mrope_section" and self.way == "table":
                found[name] = [2, 1, 1]
            elif name == "mrope_section" and self.way == "scaled":
                found[name] = [v // 8 for v in value]
            elif name in ("short_factor", "long_factor") and self.way != "layers":
                found[name] = value[: len(value) // 8]
        return found


def _labels(value: dict[Any, Any], name: str) -> dict[Any, Any]:
    kept = {}
    for key, label in (value or {}).items():
        if int(key if name == "id2label" else label) < 3:
            kept[key] = label
    return kept
