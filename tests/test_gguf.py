"""GGUF LoRA files, read back by llama.cpp's package, with rows put back in order by transformers' reader of GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from loras import randomise

from hf_lora import (
    LoRAAdapter,
    LoRAConfig,
    LoRAConfigError,
    LoRAError,
    LoRAFileError,
    LoRAMismatchError,
    LoRAUnsupportedError,
)
from hf_lora.export import to_gguf
from hf_lora.export.gguf_lora import _FORMS

gguf = pytest.importorskip("gguf", reason="gguf is not installed: install hf_lora[test]")


def adapted(model: Any, **config: Any) -> LoRAAdapter:
    model.add_lora(LoRAConfig(**config))
    randomise(model)
    return model.lora_adapter()


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and dequantised tensors, as llama.cpp's own package sees them."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    for t in reader.tensors:  # ggml's sizes run the other way
        assert tuple(tensors[t.name].shape) == tuple(int(n) for n in reversed(t.shape.tolist()))
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def deltas(path: Path) -> dict[str, np.ndarray]:
    """ΔW of every tensor by llama.cpp's rule: alpha/r · B A, alpha from the file, r from B."""
    fields, tensors = read(path)
    found = {}
    for name in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        a, b = tensors[f"{name}.lora_a"].astype(np.float64), tensors[f"{name}.lora_b"].astype(np.float64)
        scale = float(fields["adapter.lora.alpha"]) / b.shape[1]
        found[name] = scale * b @ (a.T if name == "token_embd.weight" else a)
    assert len(tensors) == 2 * len(found)
    return found


def transformers_order(model: Any) -> Callable[[str, np.ndarray], np.ndarray]:
    """What transformers does to the rows of a Llama's tensors when it reads a GGUF."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    processor = LlamaTensorProcessor(config=model.config.to_dict())
    return lambda name, weights: processor.process(weights, name=name).weights


LLAMA = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_delta_w_is_ours_once_the_rows_are_in_transformers_order(tiny, tmp_path, name):
    model = tiny(name)
    adapter = adapted(model, r=4, alpha=6, target_modules="all-linear")
    report = to_gguf(adapter, tmp_path / "x.gguf", tiny(name))
    fields, _ = read(tmp_path / "x.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == report.architecture == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == report.alpha == 6
    assert (report.tensors, report.nbytes, report.rescaled) == (28, (tmp_path / "x.gguf").stat().st_size, ())
    back, found = transformers_order(model), deltas(tmp_path / "x.gguf")
    assert len(found) == len(adapter.factors) == 14
    moved = 0
    for path, factors in adapter.factors.items():
        layer, _, part = path.removeprefix("model.layers.").partition(".")
        stored = f"blk.{layer}.{LLAMA[part]}.weight"
        want = factors.to(torch.float64).delta().numpy()
        np.testing.assert_allclose(back(stored, found[stored]), want, rtol=1e-6, atol=1e-7)
        moved += not np.allclose(found[stored], want)
    assert moved == 4  # q and k of both layers are in another order in the file


def test_what_a_llama_cpp_would_compute_for_the_real_order_of_its_base(tiny, tmp_path):
    """The base's W_q as llama.cpp's converter stores it, plus ΔW of the file, is the merged W_q stored likewise."""
    model = tiny("llama")
    adapter = adapted(model, r=2, target_modules=["q", "k"])
    to_gguf(adapter, tmp_path / "x.gguf", model)
    found = deltas(tmp_path / "x.gguf")

    def stored(weight: torch.Tensor, heads: int) -> np.ndarray:  # row by row, from RoPE's two conventions
        size = weight.shape[0] // heads
        order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
        return weight.detach().double().numpy()[order]

    for part, name, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        path = f"model.layers.1.self_attn.{part}"
        weight = tiny("llama").get_parameter(f"{path}.weight")
        merged = weight.double() + adapter.factors[path].to(torch.float64).delta()
        np.testing.assert_allclose(
            stored(weight, heads) + found[f"blk.1.{name}.weight"], stored(merged, heads), rtol=1e-6, atol=1e-7
        )


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 64,
    "pad_token_id": 0,
}
UNFUSED, FUSED = set(LLAMA.values()), {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}


@pytest.mark.parametrize("name", sorted(_FORMS))
def test_every_linear_layer_of_every_architecture_has_its_tensor(tmp_path, name):
    config = transformers.AutoConfig.for_model(name, **({} if name == "gpt2" else SMALL))
    if name == "gpt2":
        config.n_embd, config.n_layer, config.n_head, config.vocab_size = 32, 2, 4, 64
    model = transformers.AutoModelForCausalLM.from_config(config)
    adapter = adapted(model, r=2, target_modules="all-linear")
    to_gguf(adapter, tmp_path / "x.gguf", config)
    found = deltas(tmp_path / "x.gguf")
    parts = FUSED if name in ("gpt2", "phi3") else UNFUSED - ({"ffn_gate"} if name == "starcoder2" else set())
    assert found.keys() == {f"blk.{i}.{part}.weight" for i in range(2) for part in parts}
    sizes = sorted(delta.shape for delta in found.values())
    assert sizes == sorted((f.out_features, f.in_features) for f in adapter.factors.values())


def test_rslora_ranks_and_alphas_all_become_one_alpha(tiny, tmp_path):
    model = tiny("qwen2")
    adapter = adapted(
        *(model,),
        r=4,
        alpha=3,
        use_rslora=True,
        target_modules=["q", "v", "down"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"down_proj": 5},
    )
    report = to_gguf(adapter, tmp_path / "x.gguf", model.config)
    assert report.architecture == "qwen2"
    found = deltas(tmp_path / "x.gguf")
    assert len({round(f.scaling, 6) for f in adapter.factors.values()}) == 3
    assert len(report.rescaled) == 4
    for path, factors in adapter.factors.items():
        layer, _, part = path.removeprefix("model.layers.").partition(".")
        want = factors.to(torch.float64).delta().numpy()
        np.testing.assert_allclose(found[f"blk.{layer}.{LLAMA[part]}.weight"], want, rtol=1e-5, atol=1e-7)


def test_fused_rows_conv1d_and_an_embedding(tiny, tmp_path):
    model = tiny("gpt2")
    adapter = adapted(model, r=2, target_modules=["q", "v"])
    to_gguf(adapter, tmp_path / "gpt2.gguf", model)
    for i in range(2):
        want = adapter.factors[f"transformer.h.{i}.attn.c_attn"].to(torch.float64).delta().numpy()
        got = deltas(tmp_path / "gpt2.gguf")[f"blk.{i}.attn_qkv.weight"]
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    model = tiny("llama")
    adapter = adapted(model, r=2, target_modules=["embed_tokens", "lm_head"])
    to_gguf(adapter, tmp_path / "llama.gguf", model)
    found = deltas(tmp_path / "llama.gguf")
    for path, name in (("model.embed_tokens", "token_embd.weight"), ("lm_head", "output.weight")):
        want = adapter.factors[path].to(torch.float64).delta().numpy()
        np.testing.assert_allclose(found[name], want, rtol=1e-6, atol=1e-7)
    _, tensors = read(tmp_path / "llama.gguf")
    assert tensors["token_embd.weight.lora_a"].shape == (64, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 1e-3), ("bf16", 1e-2)])
def test_half_precision(tiny, tmp_path, dtype, tolerance):
    model = tiny("llama")
    adapter = adapted(model, r=4, target_modules=["v"])
    to_gguf(adapter, tmp_path / "x.gguf", model, dtype=dtype)
    want = adapter.factors["model.layers.0.self_attn.v_proj"].delta().numpy()
    got = deltas(tmp_path / "x.gguf")["blk.0.attn_v.weight"]
    assert 0 < np.abs(got - want).max() < tolerance * np.abs(want).max() * 2


def test_what_the_format_cannot_hold_is_refused_and_nothing_is_written(tiny, tmp_path):
    out = tmp_path / "x.gguf"
    out.write_bytes(b"old")

    def refused(kind: type[LoRAError], match: str, adapter: Any, base: Any, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            to_gguf(adapter, out, base, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
        assert out.read_bytes() == b"old"

    llama = adapted(tiny("llama"), r=2, target_modules=["q"])
    whole = adapted(tiny("llama"), r=2, target_modules=["q"], modules_to_save=["lm_head"])
    refused(LoRAUnsupportedError, "lm_head: a module that was trained whole", whole, tiny("llama"))
    biased = adapted(tiny("qwen2"), r=2, target_modules=["q"], bias="lora_only")
    refused(LoRAUnsupportedError, "q_proj.bias: a trained bias", biased, tiny("qwen2"))
    refused(LoRAUnsupportedError, "not known here", adapted(tiny("bloom"), r=2, target_modules=["q"]), tiny("bloom"))
    tied = adapted(tiny("llama-tied"), r=2, target_modules=["embed_tokens"])
    refused(LoRAUnsupportedError, "tied to the output embedding", tied, tiny("llama-tied"))
    positions = adapted(tiny("gpt2"), r=2, target_modules=["wpe"])
    refused(LoRAUnsupportedError, "looks up without adapters", positions, tiny("gpt2"))
    refused(LoRAMismatchError, "does not fit", llama, tiny("gpt2"))
    refused(LoRAMismatchError, "does not say its base", llama, None)
    refused(LoRAMismatchError, "is no model", llama, 3)
    refused(LoRAFileError, "config", llama, str(tmp_path))
    refused(LoRAConfigError, "q8_0", llama, tiny("llama"), dtype="q8_0")
    large = adapted(tiny("llama"), r=2, target_modules=["q"])
    next(iter(large.factors.values())).B[0, 0] = 1e6
    refused(LoRAMismatchError, "do not fit f16", large, tiny("llama"), dtype="f16")
    nan = adapted(tiny("llama"), r=2, target_modules=["q"])
    next(iter(nan.factors.values())).B[0, 0] = torch.nan
    refused(LoRAMismatchError, "NaN", nan, tiny("llama"))
    named = LoRAAdapter(llama.config.replace(base_model="org/one"), llama.factors)
    config = tiny("llama").config
    config._name_or_path = "org/two"
    refused(LoRAMismatchError, "made on 'org/one'", named, config)
    assert to_gguf(named, out, config, force=True).tensors == 4
    assert read(out)[0]["general.base_model.0.repo_url"] == "https://huggingface.co/org/one"
    with pytest.raises(LoRAFileError, match="cannot be written"):
        to_gguf(named, tmp_path, config, force=True)
