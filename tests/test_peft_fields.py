"""Every field of PEFT's LoraConfig with another value than its default: no third case beside the two.

A file loads and computes what PEFT computes, or it is refused with the field named.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from loras import logits

from hf_lora.config import PEFT_DEFAULTS
from hf_lora.errors import LoRAUnsupportedError

# What is computed: fields that PEFT's file is made with, and is then compared with.
COMPUTED: dict[str, dict[str, Any]] = {
    "alora_invocation_tokens": {"alora_invocation_tokens": [3, 4]},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3}},
    "bias": {"bias": "all"},
    "corda_config": {"corda_config": {"corda_method": "kpm"}},
    "eva_config": {"eva_config": {"rho": 1.5}},
    "exclude_modules": {"exclude_modules": ["v_proj"]},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "init_lora_weights": {"init_lora_weights": "gaussian"},
    "kasa_config": {"kasa_config": {}},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "layers_pattern": {"layers_pattern": "layers", "layers_to_transform": [1]},
    "layers_to_transform": {"layers_to_transform": 0},
    "loftq_config": {"loftq_config": {"loftq_bits": 4}},
    "lora_alpha": {"lora_alpha": 5},
    "lora_bias": {"lora_bias": True},
    "lora_dropout": {"lora_dropout": 0.5},
    "lora_ga_config": {"lora_ga_config": {}},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "qalora_group_size": {"qalora_group_size": 4},
    "r": {"r": 3},
    "rank_pattern": {"rank_pattern": {"v_proj": 2}},
    "revision": {"revision": "main"},
    "target_modules": {"target_modules": "all-linear"},
    "target_parameters": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "task_type": {"task_type": "CAUSAL_LM"},
    "monteclora_config": {"monteclora_config": {"num_samples": 4}},
    "velora_config": {"velora_config": {"num_groups": 4}},
    "use_bdlora": {"use_bdlora": {"target_modules_bd_a": ["q_"], "target_modules_bd_b": ["v_"], "nblocks": 2}},
    "use_dora": {"use_dora": True},
    "use_qalora": {"use_qalora": True},
    "use_rslora": {"use_rslora": True},
    "trainable_token_indices": {"trainable_token_indices": [5, 7, 9, 11, 13, 17, 33, 41]},
    "ensure_weight_tying": {"ensure_weight_tying": True, "target_modules": ["q_proj", "embed_tokens"]},
}
# Further values of the same.
MORE: list[tuple[str, Any]] = [
    ("bias", "lora_only"),
    ("exclude_modules", ".*v_proj"),
    *[("init_lora_weights", init) for init in (False, "orthogonal", "mica", "eva")],
    ("layers_to_transform", [0, 1]),
    ("target_modules", r".*\.(q_proj|down_proj)"),
]
BASES = {
    "ensure_weight_tying": ("llama-tied", []),
    "fan_in_fan_out": ("gpt2", ["c_attn", "c_fc"]),
    "target_parameters": ("mixtral", ["q_proj"]),
}  # else a Llama
# What is written into a file as it is, and has no effect on what it computes.
WRITTEN: dict[str, Any] = {
    "auto_mapping": {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    },
    "base_model_name_or_path": "",
    "inference_mode": True,
    "megatron_config": {"tensor_model_parallel_size": 1},
    "megatron_core": "another.core",
    "peft_version": "0.99.0",
}
# What is refused: a value, and the field that the error names if it is another.
REFUSED: dict[str, Any] = {
    "arrow_config": {"top_k": 2},
    "peft_type": "LOHA",
}
CHANGE_BASE = ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")  # factors are then not all of it


def test_every_field_is_in_a_table():
    tables = (COMPUTED, WRITTEN, REFUSED)
    assert PEFT_DEFAULTS.keys() == {name for table in tables for name in table}


def made(peft, model, fields):
    given = {"r": 4, "lora_alpha": 6, **fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that PEFT says it does not use
        theirs = peft.get_peft_model(model, peft.LoraConfig(**given))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return theirs.eval()


@pytest.mark.parametrize(
    ("name", "fields"), [*COMPUTED.items(), *((name, {name: value}) for name, value in MORE)], ids=str
)
def test_a_file_computes_what_peft_computes(tiny, batch, peft, tmp_path, name, fields):
    family, targets = BASES.get(name, ("llama", ["q_proj", "v_proj"]))
    inputs = batch(tiny(family))
    if name == "alora_invocation_tokens":
        fields = {name: inputs["input_ids"][0, 2:4].tolist(), "task_type": "CAUSAL_LM"}  # else PEFT does not look
    theirs = made(peft, tiny(family), {"target_modules": targets, **fields})
    expected = logits(theirs, inputs)
    assert (logits(tiny(family), inputs) - expected).abs().max() > 1e-3 * expected.abs().max()  # else it says nothing
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written[name] != PEFT_DEFAULTS[name] or name == "loftq_config"  # which PEFT drops where it is not used
    model = tiny(family)
    model.load_lora(tmp_path, name="x")
    assert (logits(model, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", WRITTEN)
def test_what_has_no_effect_has_none(tiny, batch, peft, tmp_path, name):
    theirs = made(peft, tiny("llama"), {"target_modules": ["q_proj", "v_proj"]})
    inputs = batch(theirs)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: WRITTEN[name]}))
    model = tiny("llama")
    model.load_lora(tmp_path, name="x")
    expected = logits(theirs, inputs)
    assert (logits(model, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "value"), [*REFUSED.items(), *(("init_lora_weights", init) for init in CHANGE_BASE)], ids=str
)
def test_what_is_not_computed_is_refused_by_name(tiny, peft, tmp_path, name, value):
    made(peft, tiny("llama"), {"target_modules": ["q_proj", "v_proj"]}).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    model = tiny("llama")
    with pytest.raises(LoRAUnsupportedError, match=name) as caught:
        model.load_lora(tmp_path, name="x")
    assert caught.value.name == name
    assert caught.value.remedy
    assert not hasattr(model, "_lora_state")
