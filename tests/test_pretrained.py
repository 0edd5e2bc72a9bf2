"""What PreTrainedModel does by itself, on a model with a LoRA: save, resize, re-initialise, cast, generate."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from loras import bits, logits, randomise, with_adapters
from safetensors import safe_open

import hf_lora
from hf_lora import LoRAConfig, LoRAFileError, LoRAStateError, LoRAUnsupportedError
from hf_lora.facts import RunFacts
from hf_lora.model import state_of

CONFIG = LoRAConfig(r=4, target_modules=["q", "v"], alpha=8)


def keys(folder: Any, name: str) -> set[str]:
    with safe_open(folder / name, "pt") as file:
        return set(file.keys())


def test_save_pretrained_writes_the_adapter_alone(tiny: Any, tmp_path: Any) -> None:
    model = tiny("llama")
    model.add_lora(CONFIG)
    randomise(model)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert all(".lora_" in key for key in keys(tmp_path, "adapter_model.safetensors"))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]


def test_save_pretrained_of_a_merged_model_writes_the_whole_model(tiny: Any, batch: Any, tmp_path: Any) -> None:
    model = tiny("llama")
    base = set(model.state_dict())
    model.add_lora(CONFIG)
    randomise(model)
    inputs = batch(model)
    model.merge_lora()
    merged = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert keys(tmp_path, "model.safetensors") == base
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, inputs), merged)
    assert not hasattr(again, "_lora_state")
    model.unmerge_lora()
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_save_pretrained_without_a_lora_is_stock(tiny: Any, tmp_path: Any) -> None:
    model = tiny("llama")
    model.add_lora(CONFIG)
    model.remove_lora()
    model.save_pretrained(tmp_path)
    assert keys(tmp_path, "model.safetensors") == set(model.state_dict())


def test_save_pretrained_keeps_every_adapter_that_trains(tiny: Any, tmp_path: Any) -> None:
    model = tiny("llama")
    model.add_lora(CONFIG, "org/a")
    model.add_lora(LoRAConfig(r=2, target_modules=["down"]), "b")
    model.train_lora(["org/a", "b"])
    model.save_pretrained(tmp_path)
    for folder in ("lora-org%2Fa", "lora-b"):
        assert (tmp_path / folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("tokens", [80, 40])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_resizing_keeps_what_the_adapters_do_to_old_tokens(tiny: Any, batch: Any, family: str, tokens: int) -> None:
    targets = ["embed_tokens", "q"] if family == "llama-tied" else ["embed_tokens", "lm_head", "q"]
    configs = {"a": LoRAConfig(r=4, target_modules=targets, dropout=0.5), "b": LoRAConfig(r=2, target_modules=["v"])}
    model = with_adapters(tiny(family), configs)
    model.train_lora("a")
    run = RunFacts(steps=7)
    state_of(model).entry("a").record.run = run  # type: ignore[union-attr]
    inputs = batch(model)
    inputs["input_ids"] %= 40
    before = {}
    for which in ("a", "b", None):
        with model.use_lora(which):
            before[which] = logits(model, inputs)[..., :40]
    model.resize_token_embeddings(tokens, mean_resizing=False)
    for which, expected in before.items():
        with model.use_lora(which):
            found = logits(model, inputs)
            assert found.shape[-1] == tokens
            assert torch.equal(found[..., :40], expected)
    assert model.lora_names == ("a", "b")
    assert model.active_lora == "a"
    assert state_of(model).entry("a").record.run is run  # type: ignore[union-attr]  # its card still knows
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if ".lora_slots." in n
    }


def test_resizing_a_head_trained_whole_is_refused_and_changes_nothing(tiny: Any, batch: Any) -> None:
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=2, target_modules=["q"], modules_to_save=["lm_head"]))
    randomise(model)
    before, inputs = bits(model), batch(model)
    expected = logits(model, inputs)
    with pytest.raises(LoRAUnsupportedError, match="before add_lora"):
        model.resize_token_embeddings(80)
    assert bits(model) == before
    assert torch.equal(logits(model, inputs), expected)


def test_resizing_while_merged_is_refused(tiny: Any) -> None:
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=2, target_modules=["lm_head"]))
    model.merge_lora()
    with pytest.raises(LoRAStateError, match="unmerge_lora"):
        model.resize_token_embeddings(80)


@pytest.mark.parametrize("family", ["llama", "bert-cls", "gpt2", "t5"])
def test_init_weights_leaves_adapters_alone(tiny: Any, family: str) -> None:
    model = tiny(family)
    model.add_lora(
        LoRAConfig(r=2, target_modules=["q", "v"], modules_to_save=["classifier"] if family == "bert-cls" else None)
    )
    randomise(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name


def test_a_tied_head_stays_tied(tiny: Any) -> None:
    model = tiny("llama-tied")
    model.add_lora(LoRAConfig(r=2, target_modules=["lm_head", "embed_tokens"]))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.remove_lora()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merging_a_tied_weight_is_refused_and_changes_nothing(tiny: Any) -> None:
    model = tiny("llama-tied")
    model.add_lora(LoRAConfig(r=2, target_modules=["lm_head", "q"]))
    randomise(model)
    before = bits(model)
    with pytest.raises(LoRAUnsupportedError, match=r"lm_head: its weight is tied to model\.embed_tokens"):
        model.merge_lora()
    assert bits(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_cast_after_loading_casts_its_banks(tiny: Any, batch: Any, dtype: torch.dtype) -> None:
    model = with_adapters(tiny("llama"), {"a": CONFIG})
    value = model.lora_adapter("a")
    model.to(dtype)
    assert logits(model, batch(model)).dtype == dtype
    assert value.equal(model.lora_adapter("a"))  # the master is what was loaded


def test_a_bf16_base_keeps_fp32_masters(tiny: Any, batch: Any) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    model.add_lora(CONFIG)
    assert {p.dtype for n, p in model.named_parameters() if ".lora_slots." in n} == {torch.float32}
    inputs = batch(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if ".lora_slots.B" in n]
    assert all(g is not None and g.dtype == torch.float32 and g.abs().max() > 0 for g in grads)


def test_autocast_computes_in_its_dtype(tiny: Any, batch: Any) -> None:
    model = tiny("llama")
    model.add_lora(CONFIG)
    randomise(model)
    inputs = batch(model)
    exact = logits(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, inputs)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    ],
    ids=["greedy", "beams", "static cache"],
)
def test_generate_with_an_adapter_equals_generate_merged(tiny: Any, batch: Any, options: dict[str, Any]) -> None:
    model = with_adapters(tiny("llama"), {"a": CONFIG})
    inputs = batch(model)
    options = {**options, "max_new_tokens": 6, "min_new_tokens": 6}
    with model.no_lora():
        base = model.generate(**inputs, **options)
    found = model.generate(**inputs, **options)
    assert not torch.equal(found, base)
    model.merge_lora()
    assert torch.equal(model.generate(**inputs, **options), found)


def test_generate_routed_equals_each_row_alone(tiny: Any, batch: Any) -> None:
    model = with_adapters(tiny("llama"), {"a": CONFIG, "b": LoRAConfig(r=2, target_modules=["down", "up"])})
    inputs = batch(model, 3)
    inputs["attention_mask"][0, :2] = 0  # left padding
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    rows = []
    for i, name in enumerate(["a", None, "b"]):
        with model.use_lora(name):
            rows.append(model.generate(**{k: v[i : i + 1] for k, v in inputs.items()}, **options))
    with model.route_lora(["a", None, "b"]):
        assert torch.equal(model.generate(**inputs, **options), torch.cat(rows))


def test_a_meta_model_takes_a_lora(tiny: Any) -> None:
    model = tiny("llama").to("meta")
    model.add_lora(LoRAConfig(r=2, target_modules="all-linear"))
    assert all(p.is_meta for p in model.parameters())
    assert model.lora_summary().trainable == 2 * sum(2 * (m.in_features + m.out_features) for m in _linears(model))
    model.remove_lora()
    assert not any("lora" in name for name, _ in model.named_modules())


def _linears(model: Any) -> list[Any]:
    layer = model.model.layers[0]
    return [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]


def test_a_tensor_parallel_model_is_refused(tiny: Any) -> None:
    model = tiny("llama")
    model._tp_size = 2
    with pytest.raises(LoRAUnsupportedError, match="tensor parallelism"):
        model.add_lora(CONFIG)
    assert not hasattr(model, "_lora_state")


def test_a_forward_replaced_on_the_instance_is_refused(tiny: Any) -> None:
    model = tiny("llama")
    before = [type(m) for m in model.modules()]
    layer = model.model.layers[1].self_attn.v_proj
    layer.forward = lambda x: x
    with pytest.raises(LoRAUnsupportedError, match=r"model\.layers\.1\.self_attn\.v_proj: its forward was replaced"):
        model.add_lora(CONFIG)
    assert [type(m) for m in model.modules()] == before  # nothing half done
    assert all(p.requires_grad for p in model.parameters())


def test_unregister_and_register_again(tiny: Any, batch: Any) -> None:
    from transformers import PreTrainedModel, Trainer

    model = with_adapters(tiny("llama"), {"a": CONFIG})
    ours = PreTrainedModel.save_pretrained, Trainer._load_from_checkpoint
    expected = logits(model, batch(model))
    try:
        hf_lora.unregister()
        assert not hasattr(PreTrainedModel, "add_lora")
        for stock in (PreTrainedModel.save_pretrained, Trainer._load_from_checkpoint):
            assert not stock.__code__.co_filename.startswith(os.path.dirname(hf_lora.__file__))
        assert torch.equal(logits(model, batch(model)), expected)  # what is on a model keeps working
        hf_lora.unregister()
    finally:
        hf_lora.register()
    hf_lora.register()
    assert hasattr(PreTrainedModel, "add_lora")
    assert (PreTrainedModel.save_pretrained, Trainer._load_from_checkpoint) != ours  # fresh wrappers of the stock ones
    assert PreTrainedModel.save_pretrained.__wrapped__ is ours[0].__wrapped__


def test_a_state_dict_of_the_callers_is_looked_at(tiny: Any, tmp_path: Any) -> None:
    model = tiny("llama")
    model.add_lora(CONFIG)
    randomise(model)
    model.save_pretrained(tmp_path / "same", state_dict=model.state_dict())
    other = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    with pytest.raises(LoRAUnsupportedError, match="is not what the model holds"):
        model.save_pretrained(tmp_path / "other", state_dict=other)
    model.merge_lora()
    model.save_pretrained(tmp_path / "merged", True, model.state_dict())
    assert keys(tmp_path / "merged", "model.safetensors") == set(tiny("llama").state_dict())


def test_padding_the_embeddings_resizes_the_adapters_too(tiny: Any, batch: Any) -> None:
    model = with_adapters(tiny("llama"), {"a": LoRAConfig(r=2, target_modules=["embed_tokens", "lm_head"])})
    inputs = batch(model)
    before = logits(model, inputs)
    model.resize_token_embeddings(pad_to_multiple_of=48, mean_resizing=False)
    assert torch.equal(logits(model, inputs)[..., :64], before)
    assert model.lora_adapter().factors["model.embed_tokens"].in_features == 96


def test_pefts_copy_of_an_embedding_survives_a_resize(tiny: Any, batch: Any, tmp_path: Any, peft: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny("llama"), config)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    model = tiny("llama")
    model.load_lora(tmp_path, name="a")
    inputs = batch(model)
    before = logits(model, inputs)
    model.resize_token_embeddings(80, mean_resizing=False)
    assert model.lora_names == ("a",)
    assert torch.equal(logits(model, inputs)[..., :64], before)


def test_what_is_saved_inside_a_block_is_what_is_active_there(tiny: Any, tmp_path: Any) -> None:
    model = with_adapters(tiny("llama"), {"a": CONFIG, "b": LoRAConfig(r=2, target_modules=["down"])})
    with model.use_lora("b"):
        model.save_lora(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["down_proj"]


def test_a_value_is_a_copy(tiny: Any) -> None:
    model = with_adapters(tiny("llama"), {"a": CONFIG})
    for tensor in model.lora_state_dict("a").values():
        tensor.zero_()
    value = model.lora_adapter("a")
    for tensor in value.tensors():
        assert tensor.abs().max() > 0
        tensor.zero_()
    assert all(tensor.abs().max() > 0 for tensor in model.lora_state_dict("a").values())


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", ".adapter_config.json.pending"]
)
def test_a_merged_model_is_not_saved_beside_an_adapter(tiny: Any, batch: Any, tmp_path: Any, name: str) -> None:
    """`from_pretrained` would load the merged weights and add the adapter to them once more."""
    model = tiny("llama")
    model.add_lora(CONFIG)
    randomise(model)
    model.save_lora(tmp_path / "adapter")
    model.merge_lora()
    inputs = batch(model)
    merged = logits(model, inputs)
    folder = tmp_path / "out"
    folder.mkdir()
    source = tmp_path / "adapter" / name
    (folder / name).write_bytes(source.read_bytes() if source.exists() else b"{}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for main in (True, False):
        with pytest.raises(LoRAFileError, match=f"{name}.*a second time.*Nothing was written"):
            model.save_pretrained(folder, is_main_process=main)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / name).unlink()
    model.save_pretrained(folder)
    assert torch.equal(logits(type(model).from_pretrained(folder).eval(), inputs), merged)


def test_an_adapter_and_then_its_merged_model_in_one_folder_is_refused(tiny: Any, tmp_path: Any) -> None:
    model = tiny("llama")
    model.add_lora(CONFIG)
    randomise(model)
    model.save_pretrained(tmp_path)
    model.merge_lora()
    with pytest.raises(LoRAFileError, match=r"folder of its own"):
        model.save_pretrained(str(tmp_path), push_to_hub=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
