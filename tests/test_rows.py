"""Rows of fused layers, against what transformers' own code makes of them.

The oracle knows nothing of layouts. It doubles the weights (and biases) of the rows said to be one role's, in float64,
and watches the products inside the attention: the states of this role have to double exactly, the other two to stay bit
for bit.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_lora.config import LoRAConfig
from hf_lora.targeting import Target, resolve

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
QKV = ("q", "k", "v")
CAUSAL, MASKED, BASE = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"
MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "head_dim": 4,
}

# name -> (auto class, model_type, configuration, end of the fused layer's path, its roles)
ATTENTION: dict[str, tuple[str, str, dict[str, Any], str, tuple[str, ...]]] = {
    "gpt2": (CAUSAL, "gpt2", {}, "attn.c_attn", QKV),
    "gpt2 cross-attention": (CAUSAL, "gpt2", {"add_cross_attention": True}, "crossattention.c_attn", ("k", "v")),
    "gpt_bigcode multi-query": (CAUSAL, "gpt_bigcode", {"multi_query": True}, "c_attn", QKV),
    "gpt_bigcode multi-head": (CAUSAL, "gpt_bigcode", {"multi_query": False}, "c_attn", QKV),
    "phi3 multi-head": (CAUSAL, "phi3", {"num_key_value_heads": 4}, "qkv_proj", QKV),
    "phi3 grouped-query": (CAUSAL, "phi3", {"num_key_value_heads": 2}, "qkv_proj", QKV),
    "gpt_neox": (CAUSAL, "gpt_neox", {}, "query_key_value", QKV),
    "bloom": (CAUSAL, "bloom", {}, "query_key_value", QKV),
    "falcon 7b": (CAUSAL, "falcon", {"multi_query": True}, "query_key_value", QKV),
    "falcon rw": (CAUSAL, "falcon", {"multi_query": False, "alibi": True, "bias": True}, "query_key_value", QKV),
    "falcon 40b": (
        CAUSAL,
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        "query_key_value",
        QKV,
    ),
    "falcon 40b, one group a head": (
        CAUSAL,
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 4},
        "query_key_value",
        QKV,
    ),
    "mpt": (CAUSAL, "mpt", {"d_model": 32, "n_layers": 1, "n_heads": 4, "expansion_ratio": 2}, "Wqkv", QKV),
    "codegen": (CAUSAL, "codegen", {"num_attention_heads": 8, "rotary_dim": 4}, "qkv_proj", QKV),
    "persimmon": (CAUSAL, "persimmon", {"qk_layernorm": False}, "query_key_value", QKV),
    "modernbert": (MASKED, "modernbert", {"cls_token_id": 1, "sep_token_id": 2}, "Wqkv", QKV),
    "deberta": (BASE, "deberta", {"relative_attention": False}, "in_proj", QKV),
    "deepseek_v3": (CAUSAL, "deepseek_v3", MLA, "kv_b_proj", ("k", "v")),
    "deepseek_v2": (CAUSAL, "deepseek_v2", MLA, "kv_b_proj", ("k", "v")),
    "qwen2_vl vision": (
        "Qwen2VisionTransformerPretrainedModel",
        "qwen2_vl",
        {"vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}},
        "attn.qkv",
        QKV,
    ),
    "qwen2_5_vl vision": (
        "Qwen2_5_VisionTransformerPretrainedModel",
        "qwen2_5_vl",
        {
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 24,
                "num_heads": 4,
                "patch_size": 4,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [0],
            }
        },
        "attn.qkv",
        QKV,
    ),
}
GATED: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "phi3": (CAUSAL, "phi3", {}, "gate_up_proj", "mlp.down_proj"),
    "glm": (CAUSAL, "glm", {"num_key_value_heads": 2, "head_dim": 8}, "gate_up_proj", "mlp.down_proj"),
    "modernbert": (MASKED, "modernbert", {"cls_token_id": 1, "sep_token_id": 2}, "mlp.Wi", "mlp.Wo"),
    "modernbert-decoder": (CAUSAL, "modernbert-decoder", {"cls_token_id": 1, "sep_token_id": 2}, "mlp.Wi", "mlp.Wo"),
}


def build(auto: str, model_type: str, values: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **values})
    if "vision" in auto.lower():
        config.vision_config._attn_implementation = "eager"
        code = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        model = getattr(code, auto)._from_config(config.vision_config, attn_implementation="eager")
    else:
        model = getattr(transformers, auto).from_config(config, attn_implementation="eager")
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms, too, must not be trivial
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def run(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        if "Vision" in type(model).__name__:
            model(torch.randn(16, 3 * 2 * 4 * 4, dtype=torch.float64), grid_thw=torch.tensor([[1, 4, 4]]))
        else:
            inputs: dict[str, Any] = {"input_ids": torch.randint(3, 60, (2, 5))}
            if getattr(model.config, "add_cross_attention", False):
                inputs["encoder_hidden_states"] = torch.randn(2, 3, 32, dtype=torch.float64)
            model(**inputs)


class Products(TorchFunctionMode):
    """Records the factors of the first two matrix products inside `module`: (q, k^T), then (probabilities, v)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inside = False
        self.factors: list[tuple[Tensor, Tensor]] = []
        self.handles = [
            module.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)),
            module.register_forward_hook(lambda *_: setattr(self, "inside", False)),
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.inside and name in ("matmul", "__matmul__", "bmm") and args[1].ndim > 2:  # not a layer's own x @ W.T
            self.factors.append((args[0].clone(), args[1].clone()))
        elif self.inside and name == "baddbmm":  # BLOOM
            self.factors.append((kwargs["batch1"].clone(), kwargs["batch2"].clone()))
        return func(*args, **kwargs)


def states(model: nn.Module, attention: nn.Module) -> dict[str, Tensor]:
    with Products(attention) as seen:
        run(model)
    for handle in seen.handles:
        handle.remove()
    (q, k), (_, v) = seen.factors[:2]
    return {"q": q, "k": k, "v": v}


def only(model: nn.Module, end: str, role: str) -> Target:
    targets = resolve(model, LoRAConfig(r=1, target_modules=[role])).targets
    (target,) = [target for target in targets if f".{target.path}".endswith(f".{end}")]
    assert [name for name, _ in target.blocks] == [role]
    return target


@contextlib.contextmanager
def doubled(layer: nn.Module, rows: tuple[range, ...]) -> Iterator[None]:
    """Twice the weights and biases of some output rows, exactly, and back."""
    weight = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
    index = torch.tensor([row for part in rows for row in part])
    tensors = [weight.detach()] + ([layer.bias.detach()] if layer.bias is not None else [])
    for tensor in tensors:
        tensor[index] *= 2
    yield
    for tensor in tensors:
        tensor[index] /= 2


@pytest.mark.parametrize("name", ATTENTION)
def test_rows_of_a_role_are_the_states_of_that_role(name: str) -> None:
    auto, model_type, values, end, roles = ATTENTION[name]
    model = build(auto, model_type, values)
    if model_type == "deberta":  # biases of its own, added after the projection
        for module in model.modules():
            for bias in ("q_bias", "v_bias"):
                if hasattr(module, bias):
                    getattr(module, bias).data.zero_()
    path = only(model, end, roles[0]).path
    layer = model.get_submodule(path)
    attention = model.get_submodule(path.rpartition(".")[0])
    before = states(model, attention)
    covered: list[int] = []
    for role in roles:
        ((_, rows),) = only(model, end, role).blocks
        covered += [row for part in rows for row in part]
        with doubled(layer, rows):
            after = states(model, attention)
        expected = before[role] * 2
        if "kv_b_proj" in end and role == "k":  # the rotary part of k comes from another layer
            size = model.config.qk_nope_head_dim
            expected[..., size:, :] = before[role][..., size:, :]
        assert torch.equal(after[role], expected), f"{role}: not all of its rows, or not only its own"
        for other in {"q", "k", "v"} - {role}:
            assert torch.equal(after[other], before[other]), f"rows of {role} reach {other}"
        assert before[role].abs().max() > 1e-3
    assert sorted(covered) == list(range(layer.nf if hasattr(layer, "nf") else layer.out_features))


@pytest.mark.parametrize("name", GATED)
def test_gate_is_what_passes_the_activation(name: str) -> None:
    auto, model_type, values, end, down = GATED[name]
    model = build(auto, model_type, values)
    target = only(model, end, "gate")
    layer = model.get_submodule(target.path)
    seen: dict[str, Tensor] = {}
    layer.register_forward_pre_hook(lambda _, args: seen.__setitem__("in", args[0]))
    (out,) = [module for path, module in model.named_modules() if path.endswith(down)]
    out.register_forward_pre_hook(lambda _, args: seen.__setitem__("out", args[0]))
    run(model)
    hand = {}
    for role in ("gate", "up"):
        ((_, rows),) = only(model, end, role).blocks
        index = torch.tensor([row for part in rows for row in part])
        bias = None if layer.bias is None else layer.bias[index]
        hand[role] = nn.functional.linear(seen["in"], layer.weight[index], bias)
    activation = getattr(model.config, "hidden_act", None) or model.config.hidden_activation
    expected = transformers.activations.ACT2FN[activation](hand["gate"]) * hand["up"]
    torch.testing.assert_close(seen["out"], expected, rtol=1e-12, atol=1e-12)
