"""What we save PEFT loads, what PEFT saves we load, with equal logits: every layer kind, bias, pattern, head, slice,
dtype.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Snapshot, assert_apart, assert_close, build, disturb, inputs, logits, same_bits
from safetensors.torch import load_file
from torch import Tensor

from hf_lora import LoRAConfig, LoRARouteError

# id -> (family, fields of PEFT's LoraConfig)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "linear with bias": ("opt", {"target_modules": ["q_proj", "fc1"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "conv1d, all": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "bias": "all"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "scaled embedding": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "scaled embedding, bart": ("bart", {"target_modules": ["embed_tokens", "out_proj"]}),
    "tied embedding": ("llama-tied", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied embedding, gpt2": ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"], "fan_in_fan_out": True}),
    "embedding and norm, bloom": ("bloom", {"target_modules": ["word_embeddings", "query_key_value"]}),
    "untied head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "tied head": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "bias none": ("bert-cls", {"target_modules": ["query", "value"], "bias": "none"}),
    "bias all": ("bert-cls", {"target_modules": ["query", "value"], "bias": "all"}),
    "bias lora_only": ("bert-cls", {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "bias all, neox": ("neox", {"target_modules": ["query_key_value"], "bias": "all"}),
    "bias all, vit": ("vit-cls", {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "bias lora_only, conv1d": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "bias all and head": ("bert-cls", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "rank_pattern": (
        "llama",
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}},
    ),
    "alpha_pattern": ("llama", {"target_modules": ["q_proj", "o_proj"], "alpha_pattern": {"o_proj": 40}}),
    "both patterns, rslora": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"down_proj": 7, r".*layers\.0.*k_proj": 1},
            "alpha_pattern": {"down_proj": 3, "^model.layers.1.self_attn.q_proj": 11},
            "use_rslora": True,
        },
    ),
    "rslora": ("mistral", {"target_modules": ["q_proj", "gate_proj"], "use_rslora": True, "lora_alpha": 3}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "modules_to_save, a norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "SEQ_CLS bert": ("bert-cls", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "SEQ_CLS distilbert": ("distilbert-cls", {"target_modules": ["q_lin", "v_lin"], "task_type": "SEQ_CLS"}),
    "SEQ_CLS gpt2": ("gpt2-cls", {"target_modules": ["c_attn"], "task_type": "SEQ_CLS", "fan_in_fan_out": True}),
    "SEQ_CLS llama": ("llama-cls", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "TOKEN_CLS bert": ("bert-token", {"target_modules": ["query", "value"], "task_type": "TOKEN_CLS"}),
    "layers_to_transform": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "layers_pattern": ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "h"}),
    "exclude_modules": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "exclude regex": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*mlp\.(up|down)_proj"}),
    "regex": ("llama", {"target_modules": r".*\.layers\.1\.self_attn\.(q|k|o)_proj"}),
    "all-linear": ("qwen3", {"target_modules": "all-linear"}),
    "all-linear, gpt2": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "all-linear, classifier": ("bert-cls", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all-linear, t5": ("t5", {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}),
    "all-linear, whisper": ("whisper", {"target_modules": "all-linear"}),
    "default targets": ("llama", {"target_modules": None, "task_type": "CAUSAL_LM"}),
    "init gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "init off": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": False}),
    "dropout": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.4}),
    "whole fused layers": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "whole fused layer, falcon": ("falcon-new", {"target_modules": ["query_key_value"]}),
    "whole fused layer, mpt": ("mpt", {"target_modules": ["Wqkv"]}),
}


def peft_logits(peft: Any, model: Any, folder: Path, batch: dict[str, Tensor]) -> Tensor:
    """What PEFT computes with the adapter in a folder; its warnings of missing or unexpected keys are errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected|unused).*key.*")
        loaded = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    found = {key for key in loaded.state_dict() if "lora_" in key}
    assert found
    return logits(loaded.get_base_model(), batch)


def pefts_adapter(peft: Any, model: Any, fields: dict[str, Any], folder: Path, seed: int = 1) -> Any:
    """A PEFT model whose adapter computes something, saved to a folder."""
    tuned = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **fields}))
    assert disturb(tuned, seed=seed) > 0
    tuned.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save_pretrained(str(folder))
    return tuned


@pytest.mark.parametrize("case", CASES)
def test_what_we_save_peft_loads(case: str, peft: Any, tmp_path: Path) -> None:
    family, fields = CASES[case]
    model, batch = build(family), inputs(build(family))
    plain = logits(model, batch)
    model.add_lora(peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **fields}))  # PEFT's own config is accepted
    assert disturb(model) > 0
    mine = logits(model, batch)
    assert_apart(mine, plain)
    model.save_lora(tmp_path)
    assert_close(peft_logits(peft, build(family), tmp_path, batch), mine)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_we_load(case: str, peft: Any, tmp_path: Path) -> None:
    family, fields = CASES[case]
    model, batch = build(family), inputs(build(family))
    before, plain = Snapshot(model), logits(model, batch)
    theirs = logits(pefts_adapter(peft, build(family), fields, tmp_path).get_base_model(), batch)
    assert_apart(theirs, plain)
    model.load_lora(tmp_path, name="frozen")
    assert_close(logits(model, batch), theirs, what="frozen")
    model.load_lora(tmp_path, name="trainable", trainable=True)
    model.set_lora("trainable")
    assert_close(logits(model, batch), theirs, what="trainable")
    with model.route_lora(["trainable", "frozen", None]):
        if "wpe" in (fields["target_modules"] or ()):  # positions are looked up once for all rows
            with pytest.raises(LoRARouteError):
                logits(model, batch)
        else:
            routed = logits(model, batch)
            assert_close(routed[:2], theirs[:2], what="routed")
            assert_close(routed[2:], plain[2:], what="routed, base")
    # … and saved again it is the same for PEFT, tensor by tensor.
    model.save_lora(tmp_path / "again", "trainable")
    mine = load_file(str(tmp_path / "again" / "adapter_model.safetensors"))
    original = load_file(str(tmp_path / "adapter_model.safetensors"))
    copies = {
        key
        for key in original
        if key.endswith(".base_layer.weight") or "modules_to_save" in key or "original_module" in key
    }
    assert mine.keys() - copies == original.keys() - copies
    assert all(same_bits(mine[key], original[key]) for key in mine.keys() - copies)
    assert_close(peft_logits(peft, build(family), tmp_path / "again", batch), theirs, what="PEFT, saved again")
    model.remove_lora()
    before.assert_same(model)


@pytest.mark.parametrize(
    "case", ["linear", "conv1d", "embedding", "tied embedding", "bias all", "both patterns, rslora", "SEQ_CLS bert"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_both_directions_on_a_base_of_another_dtype(case: str, dtype: torch.dtype, peft: Any, tmp_path: Path) -> None:
    family, fields = CASES[case]
    batch = inputs(build(family))
    model = build(family, dtype=dtype)
    model.add_lora(peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **fields}))
    disturb(model)
    mine = logits(model, batch)
    model.save_lora(tmp_path / "ours")
    assert_close(peft_logits(peft, build(family, dtype=dtype), tmp_path / "ours", batch), mine, dtype, "ours in PEFT")

    theirs = pefts_adapter(peft, build(family, dtype=dtype), fields, tmp_path / "theirs", seed=5)
    expected = logits(theirs.get_base_model(), batch)
    model.load_lora(tmp_path / "theirs")
    model.set_lora("theirs")
    assert_close(logits(model, batch), expected, dtype, "PEFT's in ours")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_factors_stored_in_half_precision(stored: torch.dtype, peft: Any, tmp_path: Path) -> None:
    tuned = pefts_adapter(peft, build("llama"), {"target_modules": ["q_proj", "embed_tokens"]}, tmp_path / "full")
    tuned.to(stored).save_pretrained(str(tmp_path / "half"))
    kept = load_file(str(tmp_path / "half" / "adapter_model.safetensors"))
    assert {tensor.dtype for tensor in kept.values()} == {stored}
    for path in (tmp_path / "half").glob("*"):  # PEFT's copy of the base embedding was halved, too: leave it out
        path.chmod(0o644)
    from safetensors.torch import save_file

    save_file(
        {key: t for key, t in kept.items() if ".base_layer." not in key},
        str(tmp_path / "half" / "adapter_model.safetensors"),
        {"format": "pt"},
    )
    model, batch = build("llama"), inputs(build("llama"))
    model.load_lora(tmp_path / "half")
    assert_close(logits(model, batch), peft_logits(peft, build("llama"), tmp_path / "half", batch))
    model.save_lora(tmp_path / "again")
    assert {t.dtype for t in load_file(str(tmp_path / "again" / "adapter_model.safetensors")).values()} == {stored}


SLICES = [
    (family, roles)
    for family in ("gpt2", "phi3", "neox", "bloom", "falcon", "falcon-heads", "falcon-new", "mpt")
    for roles in (["q", "v"], ["k"], ["q", "k", "v", "up"])
]


@pytest.mark.parametrize(("family", "roles"), SLICES, ids=[f"{family} {'+'.join(roles)}" for family, roles in SLICES])
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_a_slice_of_a_fused_layer_is_a_dense_adapter_to_peft(
    family: str, roles: list[str], rslora: bool, peft: Any, tmp_path: Path
) -> None:
    model, batch = build(family), inputs(build(family))
    plain = logits(model, batch)
    model.add_lora(LoRAConfig(r=3, target_modules=roles, alpha=9, use_rslora=rslora))
    disturb(model)
    mine = logits(model, batch)
    assert_apart(mine, plain)
    model.save_lora(tmp_path)
    assert_close(peft_logits(peft, build(family), tmp_path, batch), mine)
    # Ours reads it back as slices: what is saved from there is the same file, zeros and all.
    fresh = build(family)
    fresh.load_lora(tmp_path, name="again", trainable=True)
    fresh.save_lora(tmp_path / "again")
    first, second = (load_file(str(folder / "adapter_model.safetensors")) for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(same_bits(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["org/repo", "a/b/c", "task.v1", "ä b", "lora_slots", "0"])
def test_any_string_is_a_name(name: str, peft: Any, tmp_path: Path) -> None:
    model, batch = build("llama"), inputs(build("llama"))
    model.add_lora(LoRAConfig(r=2, target_modules=["q", "v"]), name)
    disturb(model)
    mine = logits(model, batch)
    model.save_lora(tmp_path, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_close(peft_logits(peft, build("llama"), tmp_path, batch), mine)


def test_several_adapters_each_equal_pefts_and_mix_as_pefts_weighted_sum(peft: Any, tmp_path: Path) -> None:
    fields = {
        "org/a": {"target_modules": ["q_proj", "v_proj"], "r": 2},
        "b": {"target_modules": ["v_proj", "down_proj", "embed_tokens"], "r": 5, "use_rslora": True},
        "c.d": {"target_modules": "all-linear", "r": 1, "lora_alpha": 3},
    }
    batch, model = inputs(build("llama"), rows=4), build("llama")
    plain, expected = logits(model, batch), {}
    for seed, (name, config) in enumerate(fields.items()):
        folder = tmp_path / str(seed)
        expected[name] = logits(pefts_adapter(peft, build("llama"), config, folder, seed).get_base_model(), batch)
        model.load_lora(folder, name=name)
    assert model.lora_names == tuple(fields)
    for name in (*fields, *reversed(fields)):
        model.set_lora(name)
        assert_close(logits(model, batch), expected[name], what=name)
    with model.route_lora(["c.d", None, "org/a", "b"]):
        routed = logits(model, batch)
    rows = torch.stack([expected["c.d"][0], plain[1], expected["org/a"][2], expected["b"][3]])
    assert_close(routed, rows, what="routed")

    mixed = peft.PeftModel.from_pretrained(build("llama"), str(tmp_path / "0"), adapter_name="a")
    mixed.load_adapter(str(tmp_path / "2"), adapter_name="c")
    mixed.add_weighted_adapter(["a", "c"], [0.7, 0.3], "mix", combination_type="cat")
    mixed.set_adapter("mix")
    with model.use_lora({"org/a": 0.7, "c.d": 0.3}):
        assert_close(logits(model, batch), logits(mixed.eval().get_base_model(), batch), what="mixture")


def test_the_config_that_we_write_says_what_peft_needs(peft: Any, tmp_path: Path) -> None:
    model = build("gpt2")
    model.add_lora(LoRAConfig(r=2, target_modules=["q", "v", "mlp"], alpha=5))
    disturb(model)
    model.save_lora(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(config) == sorted(config)
    assert config["peft_type"] == "LORA"
    assert config["inference_mode"] is True
    assert config["fan_in_fan_out"] is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert peft.PeftConfig.from_pretrained(str(tmp_path)).r == config["r"]
    assert set(config["target_modules"]) == {"c_attn", "c_fc", "mlp.c_proj"} or all(
        target.endswith(("c_attn", "c_fc", "mlp.c_proj")) for target in config["target_modules"]
    )
