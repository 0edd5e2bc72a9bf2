"""Which layer plays which role, as data: one entry for each model_type of transformers, shared by families.

A family maps the end of a module's path to a role; the longest end that fits wins (`attention.output.dense` before
`output.dense`). Roles are those of the Transformer's equations, whatever the code calls them:

    q, k, v, o          softmax(x W_q (x W_k)^T) x W_v, then W_o
    gate, up, down      W_down (act(W_gate x) * W_up x), or W_down act(W_up x) where nothing is gated

A layer that computes several of them at once is `Fused`: its roles in the order of its rows, and the name of the row
layout (computed in `rows`). Both old and new module names of a model_type may stand in one family, so that one table
serves every transformers release.

Decisions where the names leave room:
- multi-head latent attention (DeepSeek): q is `q_proj` or `q_b_proj`, k and v are their rows of `kv_b_proj` (k without
  its rotary part, which comes from `kv_a_proj_with_mqa`). The low-rank `…_a_proj…` layers have no role; name them.
- ModernBERT computes act(input) * gate: the rows it calls "input" are `gate` here, because they pass the activation.
- projections of relative positions, poolers, embeddings' projections and routers have no role.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "ARCHITECTURES",
    "BATCHES",
    "DUAL_ENCODERS",
    "EXPERT_LISTS",
    "EXPERT_PARAMETERS",
    "HEADED_CLASS",
    "HEAD_NAMES",
    "INNER_PARTS",
    "MLP_ROLES",
    "PEFT_DEFAULTS",
    "POSITIONS",
    "ROW_MAPS",
    "SHARED_EXPERTS",
    "SIDES",
    "PEFT_HEADS",
    "PRETRAINED_HEADS",
    "ROLES",
    "ROLE_GROUPS",
    "STRUCTURE",
    "STRUCTURE_SIBLINGS",
    "WEIGHTS_READ",
    "Family",
    "Fused",
]

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
MLP_ROLES = ("gate", "up", "down")
ROLE_GROUPS: Mapping[str, tuple[str, ...]] = {
    **{role: (role,) for role in ROLES},
    "attention": ("q", "k", "v", "o"),
    "mlp": MLP_ROLES,
}


@dataclass(frozen=True)
class Fused:
    """A layer whose output rows hold several roles.

    Attributes:
        roles: what it computes, in the order of the rows.
        layout: "stacked" (one run of rows a role), "by_head", "falcon", "bigcode", "codegen", "mla", or "unknown" (the
            layer is fused, but nobody knows how: never guessed).
    """

    roles: tuple[str, ...]
    layout: str = "stacked"


Family = Mapping[str, "str | Fused"]

_QKV = ("q", "k", "v")


def _attention(q: str, k: str, v: str, o: str) -> dict[str, str | Fused]:
    return {q: "q", k: "k", v: "v", o: "o"}


_PROJ = _attention("q_proj", "k_proj", "v_proj", "o_proj")
_GATED: Family = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_FC: Family = {"fc1": "up", "fc2": "down"}

LLAMA: Family = {**_PROJ, **_GATED}
FC_MLP: Family = {**_PROJ, **_FC, "c_fc": "up", "c_proj": "down"}  # Starcoder2 calls fc1 and fc2 c_fc and c_proj
BART: Family = {**_attention("q_proj", "k_proj", "v_proj", "out_proj"), **_FC}
PHI: Family = {**_attention("q_proj", "k_proj", "v_proj", "dense"), **_FC}
PHI3: Family = {
    "qkv_proj": Fused(_QKV),
    "o_proj": "o",
    "gate_up_proj": Fused(("gate", "up")),
    "down_proj": "down",
}
GLM: Family = {**_PROJ, "gate_up_proj": Fused(("gate", "up")), "down_proj": "down"}
GPT2: Family = {
    "attn.c_attn": Fused(_QKV),
    "attn.c_proj": "o",
    "crossattention.q_attn": "q",
    "crossattention.c_attn": Fused(("k", "v")),
    "crossattention.c_proj": "o",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}
BIGCODE: Family = {**GPT2, "attn.c_attn": Fused(_QKV, "bigcode"), "crossattention.c_attn": Fused(("k", "v"), "unknown")}
GPT_NEO: Family = {**_attention("q_proj", "k_proj", "v_proj", "out_proj"), "mlp.c_fc": "up", "mlp.c_proj": "down"}
GPT_J: Family = {**_attention("q_proj", "k_proj", "v_proj", "out_proj"), "fc_in": "up", "fc_out": "down"}
CODEGEN: Family = {"qkv_proj": Fused(("q", "v", "k"), "codegen"), "out_proj": "o", "fc_in": "up", "fc_out": "down"}
NEOX: Family = {
    "query_key_value": Fused(_QKV, "by_head"),
    "attention.dense": "o",
    "self_attention.dense": "o",
    "self_attn.dense": "o",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
}
FALCON: Family = {**NEOX, "query_key_value": Fused(_QKV, "falcon")}
MPT: Family = {"Wqkv": Fused(_QKV), "attn.out_proj": "o", "ffn.up_proj": "up", "ffn.down_proj": "down"}
DEEPSEEK: Family = {
    **LLAMA,
    "q_b_proj": "q",
    "kv_b_proj": Fused(("k", "v"), "mla"),
}
BERT: Family = {
    **_attention("query", "key", "value", "attention.output.dense"),
    "crossattention.output.dense": "o",
    "intermediate.dense": "up",
    "output.dense": "down",
}
DEBERTA: Family = {**BERT, "in_proj": Fused(_QKV, "by_head")}
DEBERTA_V2: Family = {**BERT, **_attention("query_proj", "key_proj", "value_proj", "attention.output.dense")}
MPNET: Family = {**BERT, **_attention("attn.q", "attn.k", "attn.v", "attn.o")}
ALBERT: Family = {**_attention("query", "key", "value", "attention.dense"), "ffn": "up", "ffn_output": "down"}
DISTILBERT: Family = {**_attention("q_lin", "k_lin", "v_lin", "out_lin"), "ffn.lin1": "up", "ffn.lin2": "down"}
MODERNBERT: Family = {
    "attn.Wqkv": Fused(_QKV),
    **_attention("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.Wo"),
    "mlp.Wi": Fused(("gate", "up")),
    "mlp.Wo": "down",
}
T5: Family = {
    **_attention("q", "k", "v", "o"),
    "wi": "up",
    "wi_0": "gate",
    "wi_1": "up",
    "wo": "down",
}
WAV2VEC2: Family = {
    **_attention("q_proj", "k_proj", "v_proj", "out_proj"),
    "intermediate_dense": "up",
    "output_dense": "down",
}
# transformers 5.0 called these layers as BERT does; later releases as Llama does.
VIT: Family = {**BERT, **_PROJ, **_FC, "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
DINOV2: Family = {**VIT, "mlp.weights_in": Fused(("gate", "up")), "mlp.weights_out": "down"}
SAM: Family = {
    **_PROJ,
    "out_proj": "o",
    "attn.qkv": Fused(_QKV),
    "attn.proj": "o",
    "mlp.lin1": "up",
    "mlp.lin2": "down",
}
BLIP_TOWER: Family = {"self_attn.qkv": Fused(_QKV), "self_attn.projection": "o", **_FC}
CTRL: Family = {**_attention("Wq", "Wk", "Wv", "multi_head_attention.dense"), "ffn.0": "up", "ffn.2": "down"}
FUNNEL: Family = {
    **_attention("q_head", "k_head", "v_head", "post_proj"),
    "ffn.linear_1": "up",
    "ffn.linear_2": "down",
}
QKV_TOWER: Family = {"attn.qkv": Fused(_QKV), "attn.proj": "o", **_FC, **_GATED}

_FAMILIES: tuple[tuple[Family, str], ...] = (
    (
        LLAMA,
        """
        llama mistral mixtral qwen2 qwen3 qwen2_moe qwen3_moe gemma gemma2 gemma3 gemma3_text smollm3 olmo
        olmo2 olmo3 cohere cohere2 gpt_oss granite ministral olmoe qwen2_vl_text qwen2_5_vl_text stablelm
        helium arcee ernie4_5 seed_oss apertus
        """,
    ),
    (FC_MLP, "starcoder2"),
    (PHI, "phi"),
    (PHI3, "phi3"),
    (GLM, "glm glm4"),
    (GPT2, "gpt2 openai-gpt imagegpt decision_transformer"),
    (BIGCODE, "gpt_bigcode"),
    (GPT_NEO, "gpt_neo"),
    (GPT_J, "gptj"),
    (CODEGEN, "codegen"),
    (NEOX, "gpt_neox gpt_neox_japanese bloom persimmon"),
    (FALCON, "falcon RefinedWeb RefinedWebModel"),
    (MPT, "mpt"),
    (
        DEEPSEEK,
        "deepseek_v3 deepseek_v2 deepseek_v32 axk1 glm4_moe_lite glm_moe_dsa minicpm3 mistral4 youtu longcat_flash",
    ),
    (CTRL, "ctrl"),
    (FUNNEL, "funnel"),
    (SAM, "sam_vision_model sam_hq_vision_model got_ocr2_vision deepseek_ocr2_sam_vision_model"),
    (BLIP_TOWER, "blip_vision_model blip_2_vision_model instructblip_vision_model instructblipvideo_vision_model"),
    (BERT, "bert roberta xlm-roberta xlm-roberta-xl camembert electra layoutlm roberta-prelayernorm ernie"),
    (DEBERTA, "deberta"),
    (DEBERTA_V2, "deberta-v2"),
    (MPNET, "mpnet"),
    (ALBERT, "albert"),
    (DISTILBERT, "distilbert"),
    (MODERNBERT, "modernbert modernbert-decoder"),
    (T5, "t5 mt5 umt5 longt5"),
    (
        BART,
        """
        opt bart pegasus mbart marian blenderbot blenderbot-small m2m_100 plbart whisper clip
        clip_text_model clip_vision_model siglip siglip_text_model siglip_vision_model siglip2
        siglip2_text_model siglip2_vision_model idefics3_vision smolvlm_vision
        """,
    ),
    (WAV2VEC2, "wav2vec2 hubert wavlm"),
    (VIT, "vit swin deit"),
    (DINOV2, "dinov2 dinov2_with_registers"),
    (QKV_TOWER, "qwen2_vl_vision qwen2_5_vl_vision"),
    (SAM, "sam sam_vision_model sam_mask_decoder"),
    # Composite models: their parts have entries of their own, what joins them has no role.
    ({}, "llava llava_next idefics3 smolvlm paligemma qwen2_vl qwen2_5_vl encoder-decoder vision-encoder-decoder"),
)

ARCHITECTURES: Mapping[str, Family] = {name: family for family, names in _FAMILIES for name in names.split()}
"""model_type → family."""

STRUCTURE: Family = {
    **BERT,
    **LLAMA,
    **_FC,
    **_attention("query_proj", "key_proj", "value_proj", "attention.output.dense"),
    **_attention("q_lin", "k_lin", "v_lin", "out_lin"),
    **_attention("q", "k", "v", "o"),
    **_attention("to_q", "to_k", "to_v", "to_out.0"),
    **_attention("linear_q", "linear_k", "linear_v", "self_attn.linear_out"),
    "q_b_proj": "q",
    "wq": "q",
    "wk": "k",
    "wv": "v",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    "wi_0": "gate",
    "wi_1": "up",
    "wi": "up",
    "c_fc": "up",
    "fc_in": "up",
    "fc_out": "down",
    "linear1": "up",
    "linear2": "down",
    "intermediate_dense": "up",
    "output_dense": "down",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
    **{
        name: Fused(_QKV, "unknown")
        for name in (
            *("query_key_value", "qkv_proj", "Wqkv", "qkv", "c_attn", "in_proj_qkv", "W_pack", "wqkv", "to_qkv"),
        )
    },
    **{name: Fused(("k", "v"), "unknown") for name in ("kv", "kv_proj", "key_value", "kv_b_proj", "to_kv")},
    **{name: Fused(("gate", "up"), "unknown") for name in ("gate_up_proj", "Wi", "w12")},
}
"""What a model_type that has no entry is read with: names that mean the same wherever they occur."""

STRUCTURE_SIBLINGS: Mapping[str, Mapping[str, str]] = {
    "q": dict.fromkeys(("out_proj", "dense", "proj", "c_proj", "to_out", "wo"), "o"),
    "up": {"wo": "down", "c_proj": "down", "proj": "down"},
}
"""Role of a layer → names which, beside it, have a role as well (and none elsewhere)."""

PEFT_DEFAULTS: Mapping[str, tuple[str, ...] | str] = {
    **dict.fromkeys(["t5", "mt5"], ("q", "v")),
    **dict.fromkeys(
        [
            "bart",
            "opt",
            "gptj",
            "gpt_neo",
            "llama",
            "llama4",
            "mistral",
            "mixtral",
            "stablelm",
            "gemma",
            "gemma2",
            "gemma3_text",
            "qwen2",
            "qwen3",
        ],
        ("q_proj", "v_proj"),
    ),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra", "layoutlm"], ("query", "value")),
    **dict.fromkeys(["bloom", "gpt_neox", "chatglm", "falcon", "RefinedWeb", "RefinedWebModel"], ("query_key_value",)),
    **dict.fromkeys(["gpt2", "gpt_bigcode"], ("c_attn",)),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
"""What an adapter means that names no targets (PEFT 0.21.2): names, or one regular expression."""

PEFT_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""task_type → names whose modules PEFT trains and saves whole, where they exist."""

EXPERT_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate", "up"),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "w1": ("gate",),
    "w2": ("down",),
    "w3": ("up",),
}
"""Names of 3-D parameters that hold the experts of a mixture: what they compute."""

WEIGHTS_READ: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(["MambaMixer", "FalconMambaMixer", "JambaMambaMixer"], ("dt_proj",)),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "LongcatFlashTopkRouter": ("classifier",),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "TDNNLayer": ("kernel",),
    **{f"{name}MHAttentionMap": ("k_proj",) for name in ("Detr", "ConditionalDetr", "MaskFormerDetr")},
    "DabDetrMHAttentionMap": ("k_linear",),
    **dict.fromkeys(["LayoutLMv2Encoder", "LayoutLMv3Encoder"], ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")),
}
"""Classes that multiply by the weight of a child of theirs, so that its own forward never runs → the children."""

HEADED_CLASS = re.compile(r"For\w*(Classification|MultipleChoice|QuestionAnswering|XVector)$")
"""Classes that put a new head on a base model."""

HEAD_NAMES = ("lm_head", "score", "classifier", "classification_head", "qa_outputs", "proj_out")
"""Children of a model that are its head where `get_output_embeddings` knows none."""

PRETRAINED_HEADS: Mapping[str, frozenset[str]] = {
    "modernbert": frozenset({"head"}),
    "modernbert-decoder": frozenset({"head"}),
}
"""Children of a classifier that come out of pre-training, so that they are not part of its new head."""

DUAL_ENCODERS = frozenset({"clip", "siglip", "siglip2", "chinese_clip", "altclip", "clap", "align"})
"""Models with several towers in which a row of each tower's batch is a row of the user's."""

_BATCHES = (  # model_types, layers, and the form of their batch
    ("opt", r"\.(fc1|fc2|final_layer_norm)$", "flat"),
    ("nllb-moe", r"\.router\.classifier$", "flat"),
    ("jetmoe", r"\.router\.layer$", "flat"),
    ("afmoe", r"\.router\.gate$", "flat"),
    ("swin", r"\.attention\.([qkvo]_proj$|self\.|output\.)", "windows"),
    ("donut-swin maskformer-swin", r"\.attention\.(self|output)\.", "windows"),
    ("swinv2 swin2sr", r"\.attention\.(self\.(query|key|value)|output\.dense)$", "windows"),
    ("sam_vision_model", r"\.attn\.(qkv|proj)$", "windows"),
    ("mllama_text_model", r"\.cross_attn\.[kv]_(proj|norm)$", "windows"),  # (rows · tiles, patches, d)
    ("fsmt", r"(^|\.)layers\.\d+\.", "second"),
    ("xlnet", r"(^|\.)(word_embedding|layer_norm|layer_[12])$", "second"),
    ("longformer", r"\.self\.(query|key|value)(_global)?$", "second"),
    ("led", r"\.longformer_self_attn\.(query|key|value)(_global)?$", "second"),
    ("mlcd mlcd_vision_model", r"\.self_attn\.out_proj$", "second"),
    ("mask2former", r"\.decoder\.(layernorm|layers\.\d+\.(\w*layer_?norm|fc[12]))$", "second"),
    ("oneformer", r"(^|\.)transformer_module\.", "inner"),
    ("bros", r"(^|\.)(entity_linker|relation_net|subsequent_token_classifier)(\.|$)", "inner"),
)
BATCHES: Mapping[str, Mapping[re.Pattern[str], str]] = {
    name: {re.compile(layers): form} for names, layers, form in _BATCHES for name in names.split()
}
"""model_type → layers whose batch has another form than (B, …): "flat" (B·T, d) or "windows" (B·k, …), both with the
rows one after another, "second" (T, B, d), or "inner" where the rows cannot be told."""

SHARED_EXPERTS = frozenset({"shared_expert", "shared_experts", "shared_expert_gate"})
"""Parts that a mixture of experts may run on (B·T, d), the rows of the batch one after another."""

POSITIONS = re.compile(r"^wpe$|position|relative|rel_attn|distance|(^|_)pos(_emb|_bias|$)")
"""Layers that compute positions, once for all rows."""

_TOWERS = (  # model_types, their parts beside the language model, and how these take rows
    (
        "llava vipllava paligemma gemma3 internvl aya_vision cohere2_vision voxtral",
        "vision_tower audio_tower multi_modal_projector",
        "images",
    ),
    ("llama4", "vision_model multi_modal_projector", "images"),
    ("idefics2 idefics3 smolvlm", "vision_model connector", "padded"),
    ("qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe glm4v", "visual", "grid"),
    ("llava_next llava_onevision", "vision_tower multi_modal_projector", "anyres"),
    ("mistral3", "vision_tower multi_modal_projector", "packed"),
    ("mllama", "vision_model multi_modal_projector", "tiles"),
    ("blip-2 instructblip", "vision_model qformer language_projection", "tiles"),
    ("qwen2_audio", "audio_tower multi_modal_projector", "sounds"),
)

ROW_MAPS: Mapping[str, Mapping[str, str]] = {
    name: dict.fromkeys(parts.split(), kind) for names, parts, kind in _TOWERS for name in names.split()
}
"""model_type → parts whose batch is images, patches or sounds, and how their rows are told (see `rowmaps`)."""

EXPERT_LISTS: Mapping[str, tuple[str, str]] = {
    "SwitchTransformersExperts": ("selected_experts", "mask"),
    "NllbMoeExperts": ("router_mask", "one_hot"),
}
"""Classes of expert lists on (B·T, d) → the argument of their forward that says which token goes to which expert."""

SIDES: Mapping[str, frozenset[str]] = {
    "language": frozenset({"language_model", "text_model", "text_encoder", "text_decoder", "lm_head"}),
    "vision": frozenset(
        {
            "vision_tower",
            "vision_model",
            "vision_encoder",
            "visual",
            "image_encoder",
            "embed_vision",
            "vision_embed_tokens",
        }
    ),
    "audio": frozenset({"audio_tower", "audio_model", "audio_encoder", "embed_audio", "speech_encoder"}),
    "projector": frozenset(
        {
            *("multi_modal_projector", "mm_projector", "connector", "merger", "qformer", "resampler"),
            *("perceiver_resampler", "language_projection", "visual_projection", "text_projection", "audio_projection"),
        }
    ),
    "encoder": frozenset({"encoder"}),
    "decoder": frozenset({"decoder", "mask_decoder"}),
}
"""Word before a role ("language.q") → components of the paths of what lies on that side."""

INNER_PARTS = frozenset(
    {
        *("vision_tower", "vision_model", "vision_encoder", "visual", "image_encoder", "embed_vision", "merger"),
        *("audio_tower", "embed_audio", "multi_modal_projector", "connector", "qformer", "resampler"),
        *("vision_embed_tokens", "perceiver_resampler"),
    }
)
"""Parts of a model with a language model inside whose batch is images or patches, not the user's rows."""
