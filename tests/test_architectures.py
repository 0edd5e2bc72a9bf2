"""The table of architectures: every model_type is built small; each role has to give the layers written down here."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_lora import architectures as arch
from hf_lora.config import LoRAConfig
from hf_lora.errors import LoRAUnsupportedError
from hf_lora.rows import role_rows
from hf_lora.targeting import Resolution, resolve, roles_of

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KV = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
BART = {
    "d_model": 32,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "pad_token_id": 0}
IMAGE = {"image_size": 16, "patch_size": 4}
MOE = {
    **KV,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    **IMAGE,
}

LLAMA = {
    **{role: f"self_attn.{role}_proj 2" for role in "qkvo"},
    **{role: f"mlp.{role}_proj 2" for role in ("gate", "up", "down")},
    "head": "lm_head 1",
}
ATTENTION_ONLY = {role: LLAMA[role] for role in (*"qkvo", "head")}
BERT = {
    "q": "attention.self.query 2",
    "k": "attention.self.key 2",
    "v": "attention.self.value 2",
    "o": "attention.output.dense 2",
    "up": "intermediate.dense 2",
    "down": "1.output.dense 1, 0.output.dense 1",
}
VIT = {
    **{role: f"attention.{role}_proj 2" for role in "qkvo"},
    "up": "mlp.fc1 2",
    "down": "mlp.fc2 2",
}
SEQ2SEQ = {  # encoder 2, decoder 2, cross-attention 2
    "q": "self_attn.q_proj 4, encoder_attn.q_proj 2",
    "k": "self_attn.k_proj 4, encoder_attn.k_proj 2",
    "v": "self_attn.v_proj 4, encoder_attn.v_proj 2",
    "o": "self_attn.out_proj 4, encoder_attn.out_proj 2",
    "up": "fc1 4",
    "down": "fc2 4",
}
CAUSAL, MASKED, SEQ2SEQ_LM, BASE, VLM = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModel",
    "AutoModelForImageTextToText",
)


def _gpt2(**roles: str) -> dict[str, str]:
    return {
        **dict.fromkeys("qkv", "attn.c_attn 2"),
        "o": "attn.c_proj 2",
        "up": "mlp.c_fc 2",
        "down": "mlp.c_proj 2",
        "head": "lm_head 1",
        **roles,
    }


def _neox(attention: str) -> dict[str, str]:
    return {
        **dict.fromkeys("qkv", f"{attention}.query_key_value 2"),
        "o": f"{attention}.dense 2",
        "up": "mlp.dense_h_to_4h 2",
        "down": "mlp.dense_4h_to_h 2",
        "head": "lm_head 1",
    }


# model_type -> (auto class, configuration, role -> "end of path, how many")
CASES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    **dict.fromkeys(
        [
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "smollm3",
            "olmo",
            "olmo2",
            "olmo3",
            "cohere",
            "cohere2",
            "granite",
            "ministral",
            "stablelm",
            "helium",
            "ernie4_5",
            "seed_oss",
        ],
        (CAUSAL, KV, LLAMA),
    ),
    **{
        name: (CAUSAL, KV, {role: ends for role, ends in LLAMA.items() if role != "gate"})
        for name in ("arcee", "apertus")
    },
    **dict.fromkeys(("mixtral", "gpt_oss", "qwen3_moe", "olmoe"), (CAUSAL, MOE, ATTENTION_ONLY)),
    "qwen2_moe": (
        CAUSAL,
        {**MOE, "shared_expert_intermediate_size": 16},
        {**ATTENTION_ONLY, **{role: f"mlp.shared_expert.{role}_proj 2" for role in ("gate", "up", "down")}},
    ),
    "deepseek_v3": (
        CAUSAL,
        {
            **MOE,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
        },
        {
            "q": "self_attn.q_b_proj 2",
            "k": "self_attn.kv_b_proj 2",
            "v": "self_attn.kv_b_proj 2",
            "o": "self_attn.o_proj 2",
            # layer 0 is dense, layer 1 has shared experts beside the routed ones
            **{role: f"0.mlp.{role}_proj 1, shared_experts.{role}_proj 1" for role in ("gate", "up", "down")},
            "head": "lm_head 1",
        },
    ),
    "deepseek_v2": (
        CAUSAL,
        {
            **MOE,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
        },
        {
            "q": "self_attn.q_proj 2",
            "k": "self_attn.kv_b_proj 2",
            "v": "self_attn.kv_b_proj 2",
            "o": "self_attn.o_proj 2",
            **{role: f"0.mlp.{role}_proj 1, shared_experts.{role}_proj 1" for role in ("gate", "up", "down")},
            "head": "lm_head 1",
        },
    ),
    "phi": (CAUSAL, SMALL, {**ATTENTION_ONLY, "o": "self_attn.dense 2", "up": "mlp.fc1 2", "down": "mlp.fc2 2"}),
    "phi3": (
        CAUSAL,
        KV,
        {
            **dict.fromkeys("qkv", "self_attn.qkv_proj 2"),
            "o": "self_attn.o_proj 2",
            **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj 2"),
            "down": "mlp.down_proj 2",
            "head": "lm_head 1",
        },
    ),
    **{
        name: (CAUSAL, KV, {**LLAMA, **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj 2")}) for name in ("glm", "glm4")
    },
    "starcoder2": (
        CAUSAL,
        KV,
        {**ATTENTION_ONLY, "up": "mlp.c_fc 2", "down": "mlp.c_proj 2"},
    ),
    "gpt2": (CAUSAL, {**SMALL, "n_positions": 32}, _gpt2()),
    "gpt_bigcode": (CAUSAL, {**SMALL, "n_positions": 32}, _gpt2()),
    "gpt_neo": (
        CAUSAL,
        {**SMALL, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        {
            **{role: f"attn.attention.{role}_proj 2" for role in "qkv"},
            "o": "attn.attention.out_proj 2",
            "up": "mlp.c_fc 2",
            "down": "mlp.c_proj 2",
            "head": "lm_head 1",
        },
    ),
    "gptj": (
        CAUSAL,
        {**SMALL, "n_positions": 32, "rotary_dim": 4},
        {
            **{role: f"attn.{role}_proj 2" for role in "qkv"},
            "o": "attn.out_proj 2",
            "up": "mlp.fc_in 2",
            "down": "mlp.fc_out 2",
            "head": "lm_head 1",
        },
    ),
    "codegen": (
        CAUSAL,
        {**SMALL, "n_positions": 32, "rotary_dim": 4},
        {
            **dict.fromkeys("qkv", "attn.qkv_proj 2"),
            "o": "attn.out_proj 2",
            "up": "mlp.fc_in 2",
            "down": "mlp.fc_out 2",
            "head": "lm_head 1",
        },
    ),
    "gpt_neox": (CAUSAL, SMALL, _neox("attention")),
    "bloom": (CAUSAL, SMALL, _neox("self_attention")),
    "falcon": (CAUSAL, SMALL, _neox("self_attention")),
    "persimmon": (CAUSAL, SMALL, _neox("self_attn")),
    "mpt": (
        CAUSAL,
        {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "vocab_size": 64, "max_seq_len": 32},
        {
            **dict.fromkeys("qkv", "attn.Wqkv 2"),
            "o": "attn.out_proj 2",
            "up": "ffn.up_proj 2",
            "down": "ffn.down_proj 2",
            "head": "lm_head 1",
        },
    ),
    "opt": (
        CAUSAL,
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
        {
            **{role: f"self_attn.{role}_proj 2" for role in "qkv"},
            "o": "self_attn.out_proj 2",
            "up": "fc1 2",
            "down": "fc2 2",
            "head": "lm_head 1",
        },
    ),
    **{name: (MASKED, SMALL, {**BERT, "head": "cls.predictions.decoder 1"}) for name in ("bert", "ernie")},
    **{
        name: (MASKED, SMALL, {**BERT, "head": "lm_head.decoder 1"})
        for name in ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm")
    },
    "layoutlm": (MASKED, SMALL, {**BERT, "head": "cls.predictions.decoder 1"}),
    "electra": (MASKED, {**SMALL, "embedding_size": 16}, {**BERT, "head": "generator_lm_head 1"}),
    "deberta": (
        MASKED,
        SMALL,
        {**BERT, **dict.fromkeys("qkv", "attention.self.in_proj 2"), "head": "lm_predictions.lm_head.dense 0"},
    ),
    "deberta-v2": (
        BASE,
        SMALL,
        {
            **BERT,
            **{role: f"attention.self.{name}_proj 2" for role, name in (("q", "query"), ("k", "key"), ("v", "value"))},
        },
    ),
    "mpnet": (
        MASKED,
        SMALL,
        {**BERT, **{role: f"attention.attn.{role} 2" for role in "qkvo"}, "head": "lm_head.decoder 1"},
    ),
    "albert": (  # its layers share one set of weights
        MASKED,
        {**SMALL, "embedding_size": 16},
        {
            **{
                role: f"attention.{name} 1"
                for role, name in zip("qkvo", ("query", "key", "value", "dense"), strict=True)
            },
            "up": "ffn 1",
            "down": "ffn_output 1",
            "head": "predictions.decoder 1",
        },
    ),
    "distilbert": (
        MASKED,
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64, "max_position_embeddings": 32},
        {
            **{role: f"attention.{role}_lin 2" for role in "qkv"},
            "o": "attention.out_lin 2",
            "up": "ffn.lin1 2",
            "down": "ffn.lin2 2",
            "head": "vocab_projector 1",
        },
    ),
    "modernbert": (
        MASKED,
        {**SMALL, "cls_token_id": 1, "sep_token_id": 2},
        {
            **dict.fromkeys("qkv", "attn.Wqkv 2"),
            "o": "attn.Wo 2",
            "gate": "mlp.Wi 2",
            "up": "mlp.Wi 2",
            "down": "mlp.Wo 2",
            "head": "decoder 1",
        },
    ),
    "modernbert-decoder": (
        CAUSAL,
        {**SMALL, "cls_token_id": 1, "sep_token_id": 2},
        {
            **{role: f"attn.{role}_proj 2" for role in "qkv"},
            "o": "attn.Wo 2",
            "gate": "mlp.Wi 2",
            "up": "mlp.Wi 2",
            "down": "mlp.Wo 2",
            "head": "decoder 1",
        },
    ),
    **{
        name: (
            SEQ2SEQ_LM,
            T5,
            {
                **{role: f"SelfAttention.{role} 4, EncDecAttention.{role} 2" for role in "qkvo"},
                "up": f"DenseReluDense.{up} 4",
                "down": "DenseReluDense.wo 4",
                "head": "lm_head 1",
                **({"gate": "DenseReluDense.wi_0 4"} if up == "wi_1" else {}),
            },
        )
        for name, up in (("t5", "wi"), ("mt5", "wi_1"), ("umt5", "wi_1"))
    },
    "longt5": (
        SEQ2SEQ_LM,
        T5,
        {
            **{
                role: f"LocalSelfAttention.{role} 2, 0.SelfAttention.{role} 2, EncDecAttention.{role} 2"
                for role in "qkvo"
            },
            "up": "DenseReluDense.wi 4",
            "down": "DenseReluDense.wo 4",
            "head": "lm_head 1",
        },
    ),
    **{
        name: (SEQ2SEQ_LM, BART, {**SEQ2SEQ, "head": "lm_head 1"})
        for name in ["bart", "pegasus", "mbart", "marian", "blenderbot", "blenderbot-small", "m2m_100", "plbart"]
    },
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        {**SEQ2SEQ, "head": "proj_out 1"},
    ),
    **{
        name: (
            "AutoModelForCTC",
            {**SMALL, "conv_dim": [8], "conv_kernel": [3], "conv_stride": [2], "num_feat_extract_layers": 1}
            | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
            {
                # WavLM's attention reads its weights and calls none of its layers
                **({role: f"attention.{role}_proj 2" for role in "qkv"} if name != "wavlm" else {}),
                **({"o": "attention.out_proj 2"} if name != "wavlm" else {}),
                "up": "intermediate_dense 2",
                "down": "output_dense 2",
                "head": "lm_head 1",
            },
        )
        for name in ("wav2vec2", "hubert", "wavlm")
    },
    **dict.fromkeys(("vit", "deit", "dinov2", "dinov2_with_registers"), (BASE, TOWER, VIT)),
    **{
        name: (BASE, {**IMAGE, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}, VIT)
        for name in ("swin",)
    },
    **{
        name: (
            BASE,
            {"text_config": dict(SMALL), "vision_config": dict(TOWER)},
            {
                **{role: f"self_attn.{role}_proj 4" for role in "qkv"},
                "o": "self_attn.out_proj 4",
                "up": "mlp.fc1 4, head.mlp.fc1 0",
                "down": "mlp.fc2 4",
            },
        )
        for name in ("clip",)
    },
    **{
        name: (
            BASE,
            {"text_config": dict(SMALL), "vision_config": dict(TOWER)},
            {
                **{role: f"self_attn.{role}_proj 4, head.attention 1" for role in "qkv"},
                "o": "self_attn.out_proj 4, head.attention.out_proj 1",
                "up": "layers.0.mlp.fc1 2, layers.1.mlp.fc1 2, head.mlp.fc1 1",
                "down": "layers.0.mlp.fc2 2, layers.1.mlp.fc2 2, head.mlp.fc2 1",
            },
        )
        for name in ("siglip", "siglip2")
    },
    **{
        name: (
            VLM,
            {
                "text_config": {**KV, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
                "vision_config": {
                    "depth": 3,
                    "embed_dim": 32,
                    "hidden_size": 32,
                    "num_heads": 4,
                    "patch_size": 4,
                    **({} if name == "qwen2_vl" else {"intermediate_size": 48, "out_hidden_size": 32}),
                },
            },
            {
                **{role: f"self_attn.{role}_proj 2, visual.blocks.*.attn.qkv 3" for role in "qkv"},
                "o": "self_attn.o_proj 2, visual.blocks.*.attn.proj 3",
                **(
                    {"gate": "mlp.gate_proj 2", "up": "mlp.up_proj 2, visual.blocks.*.mlp.fc1 3"}
                    | {"down": "mlp.down_proj 2, visual.blocks.*.mlp.fc2 3"}
                    if name == "qwen2_vl"
                    else {role: f"mlp.{role}_proj 5" for role in ("gate", "up", "down")}
                ),
                "head": "lm_head 1",
            },
        )
        for name in ("qwen2_vl", "qwen2_5_vl")
    },
    **{
        name: (
            VLM,
            {
                "text_config": {**KV, "model_type": "llama"},
                "vision_config": {**TOWER, "model_type": "clip_vision_model"},
            },
            {
                **{role: f"self_attn.{role}_proj 4" for role in "qkv"},
                "o": "self_attn.o_proj 2, self_attn.out_proj 2",
                "gate": "mlp.gate_proj 2",
                "up": "mlp.up_proj 2, mlp.fc1 2",
                "down": "mlp.down_proj 2, mlp.fc2 2",
                "head": "lm_head 1",
            },
        )
        for name in ("llava", "llava_next")
    },
    **{
        name: (
            VLM,
            {"text_config": {**KV, "model_type": text}, "vision_config": dict(TOWER)},
            {
                **{role: f"self_attn.{role}_proj 4" for role in "qkv"},
                "o": "self_attn.o_proj 2, self_attn.out_proj 2",
                "gate": "mlp.gate_proj 2",
                "up": "mlp.up_proj 2, mlp.fc1 2",
                "down": "mlp.down_proj 2, mlp.fc2 2",
                "head": "lm_head 1",
            },
        )
        for name, text in (("idefics3", "llama"), ("smolvlm", "llama"))
    },
    **{
        name: (
            VLM,
            {"text_config": {**KV, "model_type": text}, "vision_config": dict(TOWER)},
            {  # SigLIP's tower, with a pooling head that has an nn.MultiheadAttention
                **{role: f"self_attn.{role}_proj 4, head.attention 1" for role in "qkv"},
                "o": "self_attn.o_proj 2, self_attn.out_proj 2, head.attention.out_proj 1",
                "gate": "mlp.gate_proj 2",
                "up": "mlp.up_proj 2, mlp.fc1 3",
                "down": "mlp.down_proj 2, mlp.fc2 3",
                "head": "lm_head 1",
            },
        )
        for name, text in (("paligemma", "gemma"), ("gemma3", "gemma3_text"))
    },
}
FUSED = {  # what is fused; everything else is a layer of its own
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neox", "bloom", "falcon", "persimmon", "mpt", "codegen"), "qkv"),
    "deberta": "qkv",
    "phi3": ("q", "k", "v", "gate", "up"),
    "glm": ("gate", "up"),
    "glm4": ("gate", "up"),
    "modernbert": ("q", "k", "v", "gate", "up"),
    "modernbert-decoder": ("gate", "up"),
    "deepseek_v2": "kv",
    "deepseek_v3": "kv",
}


@functools.lru_cache(maxsize=4)
def build(model_type: str) -> nn.Module:
    auto, values, _ = CASES[model_type]
    config = transformers.AutoConfig.for_model(model_type, **values)
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(config)


def asked(model: nn.Module, *words: str) -> Resolution:
    return resolve(model, LoRAConfig(r=1, target_modules=list(words)))


def expected(model: nn.Module, ends: str) -> set[str]:
    found: set[str] = set()
    for item in ends.split(", "):
        end, count = item.rsplit(" ", 1)
        pattern = re.compile(r"(.*\.)?" + re.escape(end).replace(r"\*", r"\d+"))
        paths = {name for name, _ in model.named_modules() if pattern.fullmatch(name)}
        assert len(paths) == int(count), (item, sorted(paths))
        found |= paths
    return found


@pytest.mark.parametrize("model_type", CASES)
def test_each_role_gives_the_layers_written_down(model_type: str) -> None:
    model = build(model_type)
    roles = CASES[model_type][2]
    for role, ends in roles.items():
        paths = expected(model, ends)
        if not paths:
            continue
        resolution = asked(model, role)
        targets = [target.path for target in resolution.targets]
        assert len(targets) == len(set(targets))
        assert set(targets) == paths, role
        assert resolution.architecture == model_type
        fused = role in FUSED.get(model_type, ())
        for target in resolution.targets:
            visual = (".visual." in f".{target.path}" or target.path.endswith("head.attention")) and role in "qkv"
            assert bool(target.blocks) == (fused or visual), (role, target)
            assert [name for name, _ in target.blocks] in ([], [role])


@pytest.mark.parametrize("model_type", CASES)
def test_groups_are_the_union_of_their_roles_and_rows_are_disjoint(model_type: str) -> None:
    model = build(model_type)
    roles = CASES[model_type][2]
    for group, members in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
        present = [role for role in members if role in roles]
        if not present:
            continue
        paths = set().union(*(expected(model, roles[role]) for role in present))
        targets = asked(model, group).targets
        assert {target.path for target in targets} == paths
        assert [(t.path, t.blocks) for t in targets] == [(t.path, t.blocks) for t in asked(model, *present).targets]
        for target in targets:
            rows = [row for _, ranges in target.blocks for part in ranges for row in part]
            assert len(rows) == len(set(rows))
            assert not rows or sorted(rows) == list(range(target.info.out_features))


@pytest.mark.parametrize("model_type", CASES)
def test_a_layer_has_one_role_or_is_fused(model_type: str) -> None:
    model = build(model_type)
    expected_roles = set(CASES[model_type][2])
    roles = roles_of(model)
    names = [name for name, _ in model.named_modules()]
    assert set(roles) <= set(names)
    assert {role for found in roles.values() for role in found} <= expected_roles
    for found in roles.values():
        assert len(found) == len(set(found))


def test_experts_have_no_linear_layers_to_adapt() -> None:
    with pytest.raises(LoRAUnsupportedError, match="target_parameters") as caught:
        asked(build("mixtral"), "mlp")
    assert "MixtralExperts" in str(caught.value)
    assert "mlp.experts.down_proj" in str(caught.value)
    resolution = asked(build("deepseek_v3"), "mlp")
    assert any("layers.1.mlp.experts" in line and "target_parameters" in line for line in resolution.skipped)


def test_parts_of_a_multimodal_model_say_where_rows_are_not_the_batch() -> None:
    resolution = asked(build("llava"), "q")
    towers = tuple(target.path for target in resolution.targets if "vision_tower" in target.path)
    assert len(towers) == 2
    assert resolution.inner == towers
    assert set(asked(build("qwen2_vl"), "o").inner) == expected(build("qwen2_vl"), "visual.blocks.*.attn.proj 3")
    assert len(asked(build("idefics3"), "q").inner) == 2
    assert asked(build("clip"), "q").inner == ()  # a row of either tower is a row of the user's
    assert asked(build("llama"), "q").inner == ()


def test_every_model_type_of_the_table_is_tested() -> None:
    parts = {  # reached as parts of the composite models above
        *["clip_text_model", "clip_vision_model", "siglip_text_model", "siglip_vision_model", "siglip2_text_model"],
        *["siglip2_vision_model", "idefics3_vision", "smolvlm_vision", "qwen2_vl_text", "qwen2_5_vl_text"],
        *["qwen2_vl_vision", "qwen2_5_vl_vision"],
    }
    parts |= {"sam", "sam_vision_model", "sam_mask_decoder"}  # in test_multimodal.py
    other = {"RefinedWeb", "RefinedWebModel"}  # Falcon's remote code
    composite = {"encoder-decoder", "vision-encoder-decoder"}  # built from two others
    swept = {  # in test_architectures_sweep.py
        *["openai-gpt", "imagegpt", "decision_transformer", "gpt_neox_japanese", "ctrl", "funnel"],
        *["deepseek_v32", "axk1", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "mistral4", "youtu", "longcat_flash"],
        *["sam_vision_model", "sam_hq_vision_model", "got_ocr2_vision", "deepseek_ocr2_sam_vision_model"],
        *["blip_vision_model", "blip_2_vision_model", "instructblip_vision_model", "instructblipvideo_vision_model"],
    }
    assert set(arch.ARCHITECTURES) - set(CASES) - parts - other - composite - swept == set()


def test_defaults_are_those_of_peft() -> None:
    constants = pytest.importorskip("peft.utils.constants")
    theirs = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {
        name: list(value) if isinstance(value, tuple) else value for name, value in arch.PEFT_DEFAULTS.items()
    } == theirs


@pytest.mark.parametrize("layout", ["stacked", "equal", "by_head", "falcon", "bigcode", "codegen", "mla", "unknown"])
def test_rows_that_do_not_fit_the_layer_are_never_guessed(layout: str) -> None:
    config = transformers.LlamaConfig(hidden_size=30, num_attention_heads=3)
    assert role_rows(arch.Fused(("q", "k", "v"), layout), config, 31) is None
    assert role_rows(arch.Fused(("q", "k", "v"), layout), None, 31) is None
