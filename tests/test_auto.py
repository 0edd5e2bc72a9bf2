"""`from_pretrained(adapter)`, `pipeline(model=adapter)` and transformers' adapter methods; peft or no peft."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)

import hf_lora
from hf_lora import LoRAConfig, LoRAConfigError, LoRAFileError, LoRANameError, LoRAStateError, LoRAUnsupportedError
from hf_lora.integrations import adapters, auto
from hf_lora.integrations.patching import Registry

VERSION = f"transformers {transformers.__version__}"
HAVE_PEFT = adapters.peft_installed()


def randomise(model: Any, seed: int = 0) -> Any:
    """Give the trainable factors values that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def saved(tiny, tmp_path):
    """saved("llama", "a"): folders of a base and of an adapter made on it, and the model that the two make."""

    def make(name: str = "llama", adapter: str = "adapter", *, base: Path | None = None, seed: int = 1, **fields: Any):
        base = tmp_path / f"base-{name}" if base is None else base
        if not base.exists():
            tiny(name).save_pretrained(base)
        config = transformers.AutoConfig.from_pretrained(base)
        model = getattr(transformers, config.architectures[0]).from_pretrained(base)
        model.add_lora(LoRAConfig(**{"r": 4, "alpha": 8, "target_modules": ["q", "v"]} | fields))
        randomise(model, seed).eval().save_lora(tmp_path / adapter)
        return base, tmp_path / adapter, model

    return make


def same(model: Any, expected: Any, inputs: dict[str, torch.Tensor]) -> None:
    a, b = model(**inputs)[0], expected(**inputs)[0]
    torch.testing.assert_close(a, b, atol=1e-5 * float(b.detach().abs().max()), rtol=0)


# ---- from_pretrained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM])
def test_an_adapter_folder_gives_base_and_our_lora(cls, saved, batch):
    _, folder, expected = saved()
    model = cls.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    assert model.lora_names == ("default",)
    assert model.active_lora == "default"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    inputs = batch(model)
    same(model, expected, inputs)
    with model.no_lora(), expected.no_lora():
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)


def test_a_path_object_a_name_and_loading_info(saved, batch):
    _, folder, expected = saved()
    model, info = LlamaForCausalLM.from_pretrained(Path(folder), adapter_name="task/a", output_loading_info=True)
    assert model.lora_names == ("task/a",)
    assert {key: len(value) for key, value in info.items()} == dict.fromkeys(info, 0)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"} <= info.keys()
    same(model, expected, batch(model))


def test_a_head_comes_with_its_adapter(saved, batch):
    _, folder, expected = saved("bert-cls", task_type="SEQ_CLS")
    for cls in (AutoModelForSequenceClassification, BertForSequenceClassification):
        model = cls.from_pretrained(folder)
        assert model.config.num_labels == 3
        same(model, expected, batch(model))


def test_dtype_device_map_and_attention_go_to_the_base(saved, batch):
    pytest.importorskip("accelerate")
    _, folder, expected = saved()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, attn_implementation="eager"
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    a, b = model(**batch(model)).logits.float(), expected(**batch(model)).logits
    assert 0 < float((a - b).detach().abs().max()) < 0.05 * float(b.detach().abs().max())
    assert not any(p.dtype == torch.float32 and p.is_floating_point() for p in model.parameters())


def test_offloaded_base(saved, batch, tmp_path):
    pytest.importorskip("accelerate")
    _, folder, expected = saved()
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "off")
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    same(model, expected, batch(model))


def test_adapter_kwargs_subfolder(saved, tmp_path, batch):
    *_, expected = saved(adapter="repo/inner")
    for cls in (AutoModelForCausalLM, LlamaForCausalLM):
        model = cls.from_pretrained(tmp_path / "repo", adapter_kwargs={"subfolder": "inner"})
        same(model, expected, batch(model))


def test_a_whole_model_with_an_adapter_beside_it(saved, batch):
    base, folder, expected = saved()
    for file in folder.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.lora_names == ("default",)
    same(model, expected, batch(model))


def into_cache(cache: Path, repo: str, folders: dict[str, Path], main: str) -> None:
    """A repo in the Hub's cache: `folders` by commit, `main` the commit of the default branch."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(main)
    for commit, folder in folders.items():
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            (snapshot / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM])
def test_repos_and_revisions(cls, saved, tmp_path, batch):
    base, first, old = saved(adapter="first", seed=1)
    _, second, new = saved(adapter="second", seed=2)
    for folder in (first, second):
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "me/base"
        (folder / "adapter_config.json").write_text(json.dumps(config))
    cache, one, two, three = tmp_path / "cache", "1" * 40, "2" * 40, "3" * 40
    into_cache(cache, "me/task", {one: first, two: second}, main=two)
    into_cache(cache, "me/base", {three: base}, main=three)
    where = {"cache_dir": cache}  # Auto classes look for an adapter only where adapter_kwargs says
    model = cls.from_pretrained("me/task", cache_dir=cache, adapter_kwargs=where)
    same(model, new, batch(model))
    model = cls.from_pretrained("me/task", cache_dir=cache, adapter_kwargs={"revision": one, **where})
    same(model, old, batch(model))


def test_pipeline(saved, batch):
    _, folder, expected = saved("bert-cls", task_type="SEQ_CLS")
    base = folder.parent / "base-bert-cls"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (base / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(vocab=str(base / "vocab.txt"))
    tokenizer.save_pretrained(base)
    pipe = pipeline("text-classification", model=str(folder))
    assert pipe.model.lora_names == ("default",)
    probabilities = expected(**tokenizer("good film", return_tensors="pt")).logits.detach().softmax(-1)[0]
    got = pipe("good film", top_k=None)
    assert {x["label"]: pytest.approx(x["score"], abs=1e-5) for x in got} == {
        f"LABEL_{i}": float(p) for i, p in enumerate(probabilities)
    }


def test_wav2vec2_whose_load_adapter_means_a_language(tmp_path):
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        conv_dim=(16, 16),
        conv_stride=(4, 4),
        conv_kernel=(8, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        vocab_size=12,
    )
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path / "base")
    model = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "base")
    model.add_lora(LoRAConfig(target_modules=["q_proj"]))
    randomise(model).eval().save_lora(tmp_path / "task")
    again = transformers.AutoModelForCTC.from_pretrained(tmp_path / "task")
    inputs = {"input_values": torch.randn(1, 400)}
    same(again, model, inputs)
    with pytest.raises(ValueError, match="adapter_attn_dim"):  # transformers' own message
        again.load_adapter("eng")


# ---- what cannot be loaded -------------------------------------------------------------------------------------------


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_other_types(saved, monkeypatch):
    _, folder, _ = saved()
    rewrite(folder, peft_type="ADALORA")
    monkeypatch.setattr(adapters, "peft_installed", lambda: False)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", _never)  # refused before the base is built
    for cls in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(LoRAUnsupportedError, match="ADALORA") as caught:
            cls.from_pretrained(folder)
        assert "Install peft" in str(caught.value)
        assert str(folder) in str(caught.value)


def _never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the base was built")


def test_other_types_through_peft(saved, peft, tmp_path, batch):
    base, _, _ = saved()
    model = LlamaForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(
        model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False)
    ).eval()
    theirs.save_pretrained(tmp_path / "ia3")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ia3")
    assert loaded.lora_names == ()
    assert loaded.peft_config["default"].peft_type == "IA3"
    same(loaded, theirs, batch(model))


def test_a_lora_that_we_do_not_compute_goes_through_peft(saved, peft, tmp_path, batch, caplog):
    base, _, _ = saved()
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()
    theirs.save_pretrained(tmp_path / "later")
    rewrite(tmp_path / "later", use_later_lora=True)  # of a later PEFT: this one warns, and leaves it out
    with caplog.at_level("WARNING", logger="hf_lora"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "later", adapter_kwargs={"allow_pickle": True})
    assert "through peft" in caplog.text
    assert "use_later_lora" in caplog.text
    assert loaded.lora_names == ()
    assert "default" in loaded.peft_config
    ours, saved_tensors = loaded.get_adapter_state_dict(), theirs.state_dict()
    for key in ours:
        part, _, leaf = key.rpartition(".")
        assert torch.equal(ours[key], saved_tensors[f"base_model.model.{part}.default.{leaf}"])


@pytest.mark.parametrize("base", [None, ""])
def test_no_base_named(saved, base):
    _, folder, _ = saved()
    rewrite(folder, base_model_name_or_path=base)
    for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained):
        with pytest.raises(LoRAConfigError, match="which base") as caught:
            load(folder)
        assert "load_lora" in str(caught.value)


def test_a_pickle_only_with_consent(saved, batch):
    from safetensors.torch import load_file

    _, folder, expected = saved()
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(LoRAFileError, match="pickle") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert 'adapter_kwargs={"allow_pickle": True}' in str(caught.value)
    model = AutoModelForCausalLM.from_pretrained(folder, adapter_kwargs={"allow_pickle": True})
    same(model, expected, batch(model))


def test_a_damaged_config(saved):
    _, folder, _ = saved()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(LoRAFileError, match=r"adapter_config\.json"):
        AutoModel.from_pretrained(folder)


def test_another_programs_adapter_config_beside_a_model(saved, monkeypatch):
    base, _, _ = saved()
    (base / "adapter_config.json").write_text(json.dumps({"config": {"architecture": "houlsby"}}))
    monkeypatch.setattr(adapters, "peft_installed", lambda: False)
    assert AutoModelForCausalLM.from_pretrained(base).lora_names == ()
    monkeypatch.setattr(adapters, "peft_installed", lambda: True)
    with pytest.raises(LoRAConfigError, match="peft_type"):
        AutoModelForCausalLM.from_pretrained(base)


# ---- models without an adapter ---------------------------------------------------------------------------------------


def test_stock_is_called_through(saved, batch):
    base, _, _ = saved()
    hf_lora.unregister()
    try:
        stock, stock_info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
        with pytest.raises((ValueError, OSError)) as missing:
            AutoModelForCausalLM.from_pretrained("no/such-model")
        methods = {name: _outcome(stock, name) for name in METHODS}
    finally:
        hf_lora.register()
    model, info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert info == stock_info
    assert vars(model).keys() == vars(stock).keys()
    assert [*model.state_dict()] == [*stock.state_dict()]
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(**batch(model)).logits, stock(**batch(model)).logits)
    with pytest.raises(type(missing.value)) as ours:
        AutoModelForCausalLM.from_pretrained("no/such-model")
    assert str(ours.value) == str(missing.value)
    assert {name: _outcome(model, name) for name in METHODS} == methods


METHODS = {
    "load_adapter": {},
    "add_adapter": {"adapter_config": "none"},
    "set_adapter": {"adapter_name": "a"},
    "enable_adapters": {},
    "disable_adapters": {},
    "active_adapters": {},
    "get_adapter_state_dict": {},
    "delete_adapter": {"adapter_names": "a"},
}


def _outcome(model: Any, name: str) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # whatever stock raises is what ours has to raise
        getattr(copy.deepcopy(model), name)(**METHODS[name])
    if name == "load_adapter" and not HAVE_PEFT:
        return (type(None), "")  # stock cannot import peft, ours says what is missing
    return type(caught.value), str(caught.value)


def test_stock_methods_with_peft(saved, peft, batch):
    """The whole life of stock adapters on a model without our LoRA."""
    base, folder, expected = saved()
    model = LlamaForCausalLM.from_pretrained(base)
    model.load_adapter(folder, "a")
    assert model.lora_names == ()
    assert model.active_adapters() == ["a"]
    same(model, expected, batch(model))
    model.add_adapter(peft.LoraConfig(target_modules=["k_proj"]), "b")
    model.set_adapter("a")
    model.disable_adapters()
    model.enable_adapters()
    assert model.get_adapter_state_dict("a").keys() == {
        key.removeprefix("base_model.model.") for key in expected.lora_state_dict()
    }
    model.delete_adapter(["a", "b"])
    assert not model._hf_peft_config_loaded


# ---- the adapter methods of a model with our LoRA --------------------------------------------------------------------


def test_adapter_methods_through_ours(saved, batch):
    base, first, a = saved(adapter="a", seed=1)
    _, second, b = saved(adapter="b", seed=2, r=2)
    model = LlamaForCausalLM.from_pretrained(first, adapter_name="a")
    inputs = batch(model)
    info = model.load_adapter(second, "b")
    assert not info.missing_keys
    assert model.active_adapters() == ["b"]  # as stock: what was loaded last
    same(model, b, inputs)
    model.set_adapter("a")
    same(model, a, inputs)
    model.set_adapter(["a", "b"])
    assert model.active_adapters() == ["a", "b"]
    assert model.active_lora == {"a": 1.0, "b": 1.0}
    model.disable_adapters()
    assert model.active_adapters() == ["a", "b"]  # as stock
    with a.no_lora():
        same(model, a, inputs)
    model.set_adapter("b")
    assert model.active_lora is None
    model.enable_adapters()
    same(model, b, inputs)
    with model.use_lora("a"):
        assert model.active_adapters() == ["a"]
    tensors = model.get_adapter_state_dict("a")
    assert {f"base_model.model.{key}" for key in tensors} == a.lora_state_dict().keys()
    model.delete_adapter("b")
    assert model.lora_names == ("a",)
    with pytest.raises(LoRANameError, match="'b'"):
        model.delete_adapter(["a", "b"])
    assert model.lora_names == ("a",)
    model.delete_adapter("a")
    assert model.lora_names == ()
    assert "_hf_peft_config_loaded" not in vars(model)
    stock = LlamaForCausalLM.from_pretrained(base).state_dict()
    assert {k: torch.equal(v, stock[k]) for k, v in model.state_dict().items()} == dict.fromkeys(stock, True)


def test_a_switch_ends_disabling(saved):
    _, first, _ = saved(adapter="a")
    model = LlamaForCausalLM.from_pretrained(first, adapter_name="a")
    model.enable_adapters()  # not disabled: nothing to do
    assert model.active_lora == "a"
    model.disable_adapters()
    model.disable_adapters()
    twin = pickle.loads(pickle.dumps(model))
    twin.enable_adapters()
    assert twin.active_lora == "a"
    model.set_lora(None)
    assert model.active_adapters() == []
    model.set_adapter("a")
    assert model.active_lora == "a"
    model.disable_adapters()
    model.load_lora(first, name="b")
    model.remove_lora("a")
    model.enable_adapters()
    assert model.active_adapters() in (["b"], [])


def test_add_adapter_trains_the_new_one_only(saved):
    _, first, _ = saved(adapter="a")
    model = LlamaForCausalLM.from_pretrained(first, adapter_name="a")
    model.add_adapter(LoRAConfig(r=2, target_modules=["k"]), "new")
    assert model.active_adapters() == ["new"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("k_proj" in name for name in trained)
    with pytest.raises(LoRANameError):
        model.add_adapter(LoRAConfig(r=2, target_modules=["k"]), "new")


def test_load_adapter_trainable_and_hotswap(saved, batch):
    _, first, a = saved(adapter="a", seed=1)
    _, second, b = saved(adapter="b", seed=2, r=2)
    model = LlamaForCausalLM.from_pretrained(first, adapter_name="a").train()
    inputs = batch(model)
    model.load_adapter(second, "b", is_trainable=True)
    assert model.training
    assert any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(LoRANameError, match="'a'"):
        model.load_adapter(second, "a")
    with pytest.raises(LoRANameError, match="hotswap"):
        model.load_adapter(second, "c", hotswap=True)
    model.set_adapter("a")
    model.load_adapter(second, "a", hotswap=True)
    assert not model.training
    assert model.active_adapters() == ["a"]
    same(model, b, inputs)
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(first, "a")
    same(model, a, inputs)
    with pytest.raises(LoRANameError):
        model.load_adapter(first, "a", hotswap=False)


def test_load_adapter_from_a_state_dict(saved, batch):
    _, first, _ = saved(adapter="a", seed=1)
    _, second, b = saved(adapter="b", seed=2)
    model = LlamaForCausalLM.from_pretrained(first, adapter_name="a")
    tensors = b.get_adapter_state_dict()
    config = json.loads((second / "adapter_config.json").read_text())
    model.load_adapter(peft_config=config, adapter_state_dict=tensors, adapter_name="b")
    same(model, b, batch(model))
    with pytest.raises(LoRAStateError, match="state dict"):
        model.load_adapter(peft_config=config, adapter_name="c")


def test_load_adapter_fails_whole(saved, tmp_path, batch):
    _, first, a = saved(adapter="a")
    _, folder, _ = saved("gpt2", adapter="other")
    model = LlamaForCausalLM.from_pretrained(first, adapter_name="a")
    with pytest.raises(hf_lora.LoRAMismatchError):
        model.load_adapter(folder, "other")
    assert model.lora_names == ("a",)
    same(model, a, batch(model))
    model.merge_lora()
    for call in (model.disable_adapters, model.enable_adapters, lambda: model.set_adapter("a")):
        with pytest.raises(LoRAStateError, match="merge"):
            call()


# ---- contracts with transformers' private parts ----------------------------------------------------------------------


def _function(module: Any, dotted: str) -> Any:
    found = module
    for part in dotted.split("."):
        found = getattr(found, part)
    return inspect.unwrap(getattr(found, "__func__", found))


@pytest.mark.parametrize("name", list(auto.LOOKING))
def test_contract_where_transformers_looks_for_adapters(name):
    module = importlib.import_module(name)
    used = _function(module, auto.LOOKING[name]).__code__.co_names
    for needed in ("is_peft_available", "find_adapter_config_file"):
        assert needed in vars(module), f"{VERSION}: {name} no longer imports {needed}, which hf_lora replaces there"
        assert needed in used, f"{VERSION}: {name}.{auto.LOOKING[name]} no longer calls {needed}"


def test_contract_nowhere_else_decides_by_find_adapter_config_file():
    root = Path(transformers.__file__).parent
    users = {
        ".".join(("transformers", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        for path in root.rglob("*.py")
        if "find_adapter_config_file(" in path.read_text(encoding="utf-8")
    }
    users.discard("transformers.utils.peft_utils")  # where it is defined
    assert users == set(auto.LOOKING), f"{VERSION} looks for adapters in other places than hf_lora replaces"


def test_contract_trainer_does_not_see_us_as_peft(saved):
    source = (Path(transformers.__file__).parent / "trainer.py").read_text(encoding="utf-8")
    assert "find_adapter_config_file" not in source
    if not HAVE_PEFT:
        trainer = importlib.import_module("transformers.trainer")
        assert not trainer.is_peft_available()


def test_contract_from_pretrained_ends_in_load_adapter(saved, monkeypatch):
    _, folder, _ = saved()
    seen: list[Any] = []

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return adapters.LoadingInfo()

    monkeypatch.setattr(PreTrainedModel, "load_adapter", load_adapter)
    LlamaForCausalLM.from_pretrained(folder, adapter_kwargs={"subfolder": ""}, adapter_name="x")
    ((path, *rest), kwargs) = seen[0]
    told = f"{VERSION}: from_pretrained calls load_adapter otherwise"
    assert len(seen) == 1, told
    assert (os.fspath(path), rest) == (str(folder), []), told
    assert kwargs.keys() == {"adapter_name", "load_config", "adapter_kwargs"}, told
    assert kwargs["adapter_name"] == "x", told
    assert {"revision", "token", "cache_dir", "local_files_only"} <= dict(kwargs["load_config"].download_kwargs).keys()
    assert hasattr(kwargs["load_config"], "use_safetensors"), told


def test_contract_adapter_methods():
    mixin = importlib.import_module("transformers.integrations.peft").PeftAdapterMixin
    public = {name for name in vars(mixin) if not name.startswith("_") and callable(getattr(mixin, name))}
    assert public == {*adapters.METHODS, "load_adapter"}, f"{VERSION} has other adapter methods than hf_lora answers"
    for name in public:
        ours = adapters._load_adapter if name == "load_adapter" else adapters.METHODS[name]
        expected, got = (list(inspect.signature(f).parameters.values())[1:] for f in (getattr(mixin, name), ours))
        told = f"{VERSION}: {name} takes other arguments than ours"
        assert [p.name for p in got] == [p.name for p in expected], told
        assert [p.default for p in got] == [p.default for p in expected], told


def test_contract_loading_info(saved):
    base, _, _ = saved()
    _, info = LlamaForCausalLM.from_pretrained(base, output_loading_info=True)
    ours = adapters.LoadingInfo().to_dict()
    assert ours.keys() == info.keys(), f"{VERSION}: other keys of loading info"
    assert {k: type(v) for k, v in ours.items()} == {k: type(v) for k, v in info.items()}


def test_contract_language_adapters_are_wav2vec2s_alone():
    root = Path(transformers.__file__).parent
    owners = {p.stem for p in root.rglob("modeling_*.py") if "def load_adapter(" in p.read_text(encoding="utf-8")}
    assert owners == {"modeling_wav2vec2"}, f"{VERSION}: other models define load_adapter"


# ---- registration ----------------------------------------------------------------------------------------------------

SNAPSHOT = """
import importlib, sys
blocked = {blocked!r}
if blocked: sys.modules["peft"] = None
names = ["transformers.modeling_utils:PreTrainedModel", "transformers.trainer:Trainer",
         "transformers.models.wav2vec2.modeling_wav2vec2:Wav2Vec2PreTrainedModel",
         "transformers.models.auto.auto_factory:", "transformers.integrations.peft:", "transformers.pipelines:",
         "transformers.models.auto.auto_factory:_BaseAutoModelClass",
         "transformers.integrations.peft:PeftAdapterMixin"]
def snapshot():
    found = {{}}
    for name in names:
        module, _, attribute = name.partition(":")
        owner = importlib.import_module(module)
        found[name] = dict(vars(getattr(owner, attribute) if attribute else owner))
    return found
def same(a, b):
    for name in names:
        assert a[name].keys() == b[name].keys(), (name, a[name].keys() ^ b[name].keys())
        changed = [k for k in a[name] if a[name][k] is not b[name][k]]
        assert not changed, (name, changed)
if {late}:
    import hf_lora
    hf_lora.unregister()
    before = snapshot()
else:
    before = snapshot()
    import hf_lora
    assert vars(sys.modules["transformers"].PreTrainedModel)["load_adapter"]
hf_lora.register()
hf_lora.register()
between = snapshot()
assert any(between[n][k] is not v for n in names for k, v in before[n].items())
hf_lora.unregister()
same(before, snapshot())
hf_lora.unregister()
same(before, snapshot())
hf_lora.register()
assert [between[n].keys() for n in names] == [snapshot()[n].keys() for n in names]
hf_lora.unregister()
same(before, snapshot())
"""


@pytest.mark.parametrize(
    ("late", "blocked"), [(False, True), (True, False)], ids=["transformers first, no peft", "hf_lora first, peft"]
)
def test_unregister_gives_back_the_very_objects(late, blocked):
    code = SNAPSHOT.format(late=late, blocked=blocked)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
import torch, hf_lora, transformers
folder, inputs, out = sys.argv[1:]
results = []
for cls in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
    model = cls.from_pretrained(folder)
    results.append(model(torch.load(inputs)).logits.detach())
model = transformers.LlamaForCausalLM.from_pretrained(folder.replace("adapter", "base-llama"))
model.load_adapter(folder, "direct")  # stock needs peft for this
assert model.lora_names == ("direct",)
results.append(model(torch.load(inputs)).logits.detach())
torch.save(results, out)
"""


def test_without_peft_in_a_fresh_process(saved, batch, tmp_path):
    _, folder, expected = saved()
    inputs = batch(expected)["input_ids"]
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", WITHOUT_PEFT, str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits = expected(inputs).logits.detach()
    for got in torch.load(tmp_path / "out.pt"):
        torch.testing.assert_close(got, logits, atol=1e-5 * float(logits.abs().max()), rtol=0)


# ---- Registry --------------------------------------------------------------------------------------------------------


class _Base:
    kept = 1

    @staticmethod
    def static() -> str:
        return "base"


class _Child(_Base):
    @classmethod
    def made(cls) -> str:
        return cls.__name__


def test_registry_restores_the_owners_own_namespace():
    before, registry = dict(vars(_Child)), Registry()
    registry.set(_Child, "static", staticmethod(lambda: "new"))  # inherited
    registry.set(_Child, "made", classmethod(lambda cls: "new"))
    registry.set(_Child, "made", classmethod(lambda cls: "newer"))
    registry.set(_Child, "fresh", 3)
    assert (_Child.static(), _Child.made(), _Child.fresh, len(registry)) == ("new", "newer", 3, 3)
    assert registry.original(_Child, "static")() == "base"
    assert registry.is_set(_Child, "made")
    assert registry.restore() == ()
    assert {k: v for k, v in vars(_Child).items() if not k.startswith("__")} == {
        k: v for k, v in before.items() if not k.startswith("__")
    }
    assert all(vars(_Child)[k] is v for k, v in before.items() if not k.startswith("__"))
    assert registry.restore() == ()
    assert not registry.is_set(_Child, "made")


def test_registry_leaves_what_somebody_replaced_after_it(monkeypatch):
    registry = Registry()
    registry.set(_Base, "kept", 2)
    monkeypatch.setattr(_Base, "kept", 3)
    assert registry.restore() == ("_Base.kept",)
    assert _Base.kept == 3
