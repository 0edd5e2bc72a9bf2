"""Small random models of every family, and a float64 oracle that shares no code with hf_lora.

The oracle reads an adapter's folder with `json` and `safetensors` alone, applies PEFT's naming and scaling rules
itself, and writes W + scaling · B A into a float64 copy of the base.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

torch.set_num_threads(1)  # models of width 32: a second thread only waits

# ---- models ----------------------------------------------------------------------------------------------------------

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {**_SMALL, **_IDS, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64, **_IDS}
_BERT = {**_SMALL, "max_position_embeddings": 64, "num_labels": 3}
_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64, "max_position_embeddings": 64}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, **_IDS}
_SEQ2SEQ = {
    "d_model": 32,
    **{f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))},
    "encoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    **_IDS,
    "decoder_start_token_id": 2,
}
_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, **_IDS}
_FALCON = {**_SMALL, **_IDS, "alibi": False}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "llama-cls": ("LlamaConfig", "LlamaForSequenceClassification", {**_LLAMA, "num_labels": 3}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_LLAMA, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_LLAMA, "sliding_window": 4}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt2-cls": ("GPT2Config", "GPT2ForSequenceClassification", {**_GPT2, "num_labels": 3}),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_SMALL, **_IDS, "max_position_embeddings": 64}),
    "bloom": ("BloomConfig", "BloomForCausalLM", _BLOOM),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**_FALCON, "multi_query": True}),
    "falcon-heads": ("FalconConfig", "FalconForCausalLM", {**_FALCON, "multi_query": False, "bias": True}),
    "falcon-new": (
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "max_seq_len": 64, "expansion_ratio": 2, **_IDS},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_SMALL, **_IDS, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "bert-cls": ("BertConfig", "BertForSequenceClassification", _BERT),
    "bert-token": ("BertConfig", "BertForTokenClassification", _BERT),
    "distilbert-cls": ("DistilBertConfig", "DistilBertForSequenceClassification", {**_DISTIL, "num_labels": 3}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}),
    "bart": ("BartConfig", "BartForConditionalGeneration", {**_SEQ2SEQ, "scale_embedding": True}),
    "vit-cls": (
        "ViTConfig",
        "ViTForImageClassification",
        {**{k: v for k, v in _SMALL.items() if k != "vocab_size"}, "image_size": 16, "patch_size": 4, "num_labels": 3},
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 32},
    ),
}
"""name → class of the config, class of the model, fields: two layers of width 32."""

_BUILT: dict[tuple[str, int], nn.Module] = {}


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in eval mode, a fresh copy each time, the same weights for a seed."""
    if (family, seed) not in _BUILT:
        config_name, model_name, fields = FAMILIES[family]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, model_name)(getattr(transformers, config_name)(**fields))
            roughen(model)
        _BUILT[family, seed] = model.eval()
    return copy.deepcopy(_BUILT[family, seed]).to(dtype)


def roughen(model: nn.Module) -> None:
    """Weights of a size that matters: std 0.02, zero biases and unit norms would hide mistakes."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        elif "embed" not in name and "wte" not in name and "shared" not in name:
            parameter.data.normal_(0, 0.7 / math.sqrt(parameter.shape[-1]))


def inputs(model: Any, rows: int = 3, length: int = 7, *, seed: int = 0) -> dict[str, Tensor]:
    """Inputs that the model takes."""
    generator, config = torch.Generator().manual_seed(seed), model.config

    def ids() -> Tensor:
        return torch.randint(3, config.get_text_config().vocab_size, (rows, length), generator=generator)

    if model.main_input_name == "pixel_values":
        size = (rows, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator).to(model.dtype)}
    if model.main_input_name == "input_features":
        size = (rows, config.num_mel_bins, 2 * config.max_source_positions)
        features = torch.randn(size, generator=generator).to(model.dtype)
        return {"input_features": features, "decoder_input_ids": ids()}
    return {"input_ids": ids(), **({"decoder_input_ids": ids()} if config.is_encoder_decoder else {})}


@torch.no_grad()
def logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's logits for a batch; its floating tensors in the model's dtype."""
    batch = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in batch.items()}
    out: Tensor = model(**batch).logits
    return out


def disturb(model: nn.Module, *, seed: int = 1, std: float = 0.15) -> int:
    """Add noise to everything that trains, so that an adapter computes something; returns how many tensors that
    were.
    """
    generator, count = torch.Generator().manual_seed(seed), 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.data.add_((std * noise).to(parameter.dtype))
            count += 1
    return count


# ---- closeness -------------------------------------------------------------------------------------------------------

# max|difference| ≤ tolerance · max|logit|. float32 is the promise. Norms and softmax of many models compute in float32
# whatever the dtype, so float64 is no better than that. bfloat16 has 8 bits: two layers of width 32 lose 3 of them.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def error(found: Tensor, expected: Tensor) -> float:
    """max|found − expected| / max|expected|."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert bool(found.isfinite().all()), "not finite"
    assert bool(expected.isfinite().all()), "the expected values are not finite"
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def assert_close(
    found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32, what: str = "", least: float = 0.0
) -> None:
    """`found` equals `expected` within what its dtype promises, or within `least` if that is more."""
    apart, allowed = error(found, expected), max(TOLERANCE[dtype], least)
    assert apart <= allowed, f"{what}: {apart:.2e} of the largest logit apart, {allowed:.1e} allowed"


def assert_apart(found: Tensor, other: Tensor, dtype: torch.dtype = torch.float32, what: str = "") -> None:
    """`found` differs from `other` by so much that no tolerance would hide it."""
    apart = error(found, other)
    assert apart > 3 * TOLERANCE[dtype], f"{what}: only {apart:.2e} apart, so this test would show nothing"


# ---- what a model was before -----------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: equal for NaN, different for 0.0 and −0.0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(mine: Tensor, other: Tensor) -> bool:
    """Same dtype, shape and bytes."""
    return mine.dtype == other.dtype and mine.shape == other.shape and torch.equal(bits(mine), bits(other))


class Snapshot:
    """Everything that a model is: keys in their order, bits, identity, classes, attributes, requires_grad, training."""

    def __init__(self, model: nn.Module) -> None:
        self.state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
        self.classes = {path: type(module) for path, module in model.named_modules()}
        self.attributes = {path: set(vars(module)) for path, module in model.named_modules()}
        self.identities = {path: id(p) for path, p in model.named_parameters(remove_duplicate=False)}
        self.trains = {path: p.requires_grad for path, p in model.named_parameters(remove_duplicate=False)}
        self.training = {path: module.training for path, module in model.named_modules()}

    def assert_weights(self, model: nn.Module) -> None:
        """The base's own tensors are those of before, bit by bit."""
        now = model.state_dict()
        moved = [key for key, tensor in self.state.items() if not same_bits(now[key], tensor)]
        assert not moved, f"changed: {moved}"

    def assert_same(self, model: nn.Module) -> None:
        """Nothing at all differs."""
        assert list(model.state_dict()) == list(self.state)
        self.assert_weights(model)
        assert {path: type(module) for path, module in model.named_modules()} == self.classes
        assert {path: set(vars(module)) for path, module in model.named_modules()} == self.attributes
        assert {path: id(p) for path, p in model.named_parameters(remove_duplicate=False)} == self.identities
        assert {p: t.requires_grad for p, t in model.named_parameters(remove_duplicate=False)} == self.trains
        assert {path: module.training for path, module in model.named_modules()} == self.training


# ---- the oracle ------------------------------------------------------------------------------------------------------

_PREFIX = "base_model.model."


def _looked_up(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)


@torch.no_grad()
def merged(base: nn.Module, folder: str | Path) -> Any:
    """A float64 copy of `base` with the adapter in `folder` in its weights: W + scaling · B A, by hand."""
    model = copy.deepcopy(base).double()
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(str(Path(folder) / "adapter_model.safetensors"))
    for name, tensor in tensors.items():
        assert name.startswith(_PREFIX), name
        key = name.removeprefix(_PREFIX)
        if key.endswith((".lora_B.weight", ".lora_embedding_B", ".base_layer.weight")):
            continue  # read together with its A; a copy of the base's own embedding
        if key.endswith((".lora_A.weight", ".lora_embedding_A")):
            path = key.removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
            module = model.get_submodule(path)
            A, B = (
                tensor.double(),
                tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")].double(),
            )
            rank = _looked_up(config["rank_pattern"], path, config["r"])
            alpha = _looked_up(config["alpha_pattern"], path, config["lora_alpha"])
            assert len(A) == rank, (path, len(A), rank)
            delta = B @ A * (alpha / (math.sqrt(rank) if config["use_rslora"] else rank))
            if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
                delta = delta.T
            assert module.weight.shape == delta.shape, path
            _replace(module, "weight", module.weight + delta)
        else:  # a trained bias, or a tensor of a head
            owner, _, leaf = key.replace(".base_layer.", ".").rpartition(".")
            assert model.get_submodule(owner).get_parameter(leaf).shape == tensor.shape, key
            _replace(model.get_submodule(owner), leaf, tensor.double())
    return model.eval()


def _replace(module: nn.Module, leaf: str, value: Tensor) -> None:
    setattr(module, leaf, nn.Parameter(value))  # a new Parameter: what was tied to the old one stays as it was
