"""`merge_to_folder`: bit for bit what loading, merging and saving give, without ever holding the model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
import transformers
from conftest import OLDEST, TINY
from loras import randomise
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_lora import LoRAAdapter, LoRAConfig, LoRAError, LoRAFileError, LoRAMismatchError, LoRAUnsupportedError
from hf_lora.cli import app
from hf_lora.errors import LoRAConfigError
from hf_lora.export import MergeReport, merge_to_folder
from hf_lora.export.shards import size_in_bytes
from hf_lora.integrations.checkpoint_keys import map_keys, meta_model

ROOT = Path(__file__).resolve().parents[1]
Q_V: dict[str, Any] = {"target_modules": ["q", "v"]}


def model_class(name: str) -> Any:
    return getattr(transformers, TINY[name][1])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same(mine: Path, stock: Path) -> None:
    """Same names, dtypes, shapes and bits."""
    one, other = weights(mine), weights(stock)
    if OLDEST:  # transformers 5.0 saves every model with the names of old, whatever names it was loaded from
        one, other = ({_today(key): tensor for key, tensor in found.items()} for found in (one, other))
    assert one.keys() == other.keys()
    for key in other:
        assert oracles.same_bits(one[key], other[key]), key


def _today(key: str) -> str:
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def assert_nothing_left(folder: Path, *, besides: tuple[str, ...] = ("base", "adapter")) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(besides)


@pytest.fixture
def saved(tiny: Any, tmp_path: Path) -> Callable[..., Path]:
    """A base and an adapter on it in folders."""

    def save(
        name: str,
        config: dict[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        scale: float = 0.2,
        folder: Path = tmp_path,
        **options: Any,
    ) -> Path:
        tiny(name, dtype=dtype).save_pretrained(folder / "base", **options)
        model = model_class(name).from_pretrained(folder / "base")
        model.add_lora(LoRAConfig(**config))
        randomise(model, scale=scale)
        model.save_lora(folder / "adapter")
        return folder

    return save


def stock(folder: Path, name: str, **options: Any) -> Path:
    """Load, load_lora, merge_lora, save_pretrained."""
    model = model_class(name).from_pretrained(folder / "base", **options).eval()
    model.load_lora(folder / "adapter")
    model.merge_lora()
    model.save_pretrained(folder / "stock")
    return folder / "stock"


# ---- the same bits as in memory --------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, **Q_V}),
    "all-linear": ("llama", {"r": 4, "target_modules": "all-linear"}),
    "conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc", "mlp.c_proj"], "fan_in_fan_out": True}),
    "conv1d by role": ("gpt2", {"r": 4, "target_modules": ["q", "v", "down"]}),
    "fused rows by head": ("neox", {"r": 4, "target_modules": ["q", "v"]}),
    "fused rows stacked": ("phi3", {"r": 4, "target_modules": ["k", "up"]}),
    "head": ("bert-cls", {"r": 4, "target_modules": ["q", "v"], "task_type": "SEQ_CLS"}),
    "tokens": ("bert-token", {"r": 4, "target_modules": "all-linear", "task_type": "TOKEN_CLS"}),
    "head of a decoder": ("llama-cls", {"r": 4, "target_modules": ["q"], "modules_to_save": ["score"]}),
    "tied": ("llama-tied", {"r": 4, "target_modules": "all-linear"}),
    "tied three ways": ("t5", {"r": 4, "target_modules": ["q", "v", "up"]}),
    "biases": ("bert-cls", {"r": 4, "target_modules": ["q"], "bias": "lora_only"}),
    "all biases": ("opt", {"r": 4, "target_modules": ["q"], "bias": "all"}),
    "embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "head as a target": ("llama", {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "rslora": ("llama", {"r": 4, "alpha": 3.0, "use_rslora": True, **Q_V}),
    "patterns": ("llama", {**Q_V, "r": 4, "rank_pattern": {"v_proj": 7}, "alpha_pattern": {r"layers\.1\..*q_proj": 5}}),
    "picture": ("vit-cls", {"r": 4, "target_modules": ["q", "v"], "modules_to_save": ["classifier"]}),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_tensors_are_those_of_a_merge_in_memory(case: str, dtype: torch.dtype, saved: Any) -> None:
    name, config = CASES[case]
    folder = saved(name, config, dtype=dtype)
    report = merge_to_folder(folder / "adapter", folder / "out", folder / "base")
    other = stock(folder, name)
    assert_same(folder / "out", other)
    before = weights(folder / "base")
    changed = {key for key, tensor in weights(folder / "out").items() if not torch.equal(tensor, before[key])}
    assert changed == {*report.merged, *report.replaced}
    assert json.loads((folder / "out/config.json").read_text()) == json.loads((other / "config.json").read_text())
    assert_nothing_left(folder, besides=("base", "adapter", "out", "stock"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_dtype_is_that_of_from_pretrained(dtype: torch.dtype, saved: Any) -> None:
    for file_dtype in DTYPES:
        folder = saved(
            "t5", {"r": 4, **Q_V}, dtype=file_dtype
        )  # keeps some weights in float32 where the rest is float16
        for out in (folder / "out", folder / "stock"):
            subprocess.run(["rm", "-rf", str(out)], check=True)
        merge_to_folder(folder / "adapter", folder / "out", folder / "base", dtype=dtype)
        assert_same(folder / "out", stock(folder, "t5", dtype=dtype))
        assert json.loads((folder / "out/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_names_of_dtypes(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    assert merge_to_folder(folder / "adapter", folder / "out", folder / "base", dtype="bf16").dtype == "bfloat16"
    with pytest.raises(LoRAConfigError, match="int8"):
        merge_to_folder(folder / "adapter", folder / "other", folder / "base", dtype="int8")


def test_an_adapter_as_a_value(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    merge_to_folder(LoRAAdapter.load(folder / "adapter"), folder / "out", folder / "base")
    assert_same(folder / "out", stock(folder, "llama"))


@pytest.mark.parametrize(
    "case", ["plain", "conv1d by role", "fused rows by head", "head", "biases", "embedding", "patterns"]
)
def test_plain_transformers_computes_base_plus_adapter(case: str, saved: Any, batch: Any) -> None:
    name, config = CASES[case]
    folder = saved(name, config)
    merge_to_folder(folder / "adapter", folder / "out", folder / "base")
    cls = model_class(name)
    base, mine = cls.from_pretrained(folder / "base").eval(), cls.from_pretrained(folder / "out").eval()
    inputs = batch(mine)
    with torch.no_grad():
        expected = oracles.merged(base, folder / "adapter")(**inputs).logits
        oracles.assert_close(mine(**inputs).logits, expected)
        oracles.assert_apart(base(**inputs).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-cls"])
def test_peft_merges_to_the_same(name: str, saved: Any, peft: Any) -> None:
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "bert-cls": ["query", "output.dense"]}[name]
    heads = {"modules_to_save": ["classifier"]} if name == "bert-cls" else {}
    folder = saved(name, {"r": 4, "alpha": 6, "target_modules": targets, **heads})
    merge_to_folder(folder / "adapter", folder / "out", folder / "base")
    base = model_class(name).from_pretrained(folder / "base")
    theirs = peft.PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload().state_dict()
    for key, tensor in weights(folder / "out").items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-6)


# ---- shards ----------------------------------------------------------------------------------------------------------


def test_a_sharded_base_gives_shards_of_the_size_asked_for(saved: Any) -> None:
    folder = saved("llama", {"r": 4, "target_modules": "all-linear"}, max_shard_size="20KB")
    assert (folder / "base/model.safetensors.index.json").exists()
    report = merge_to_folder(folder / "adapter", folder / "out", folder / "base", max_shard_size="30KB")
    shards = sorted((folder / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 30_000 for shard in shards)
    index = json.loads((folder / "out/model.safetensors.index.json").read_text())
    held = weights(folder / "out")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in held.values()) == report.nbytes
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in held.values()) == report.parameters
    assert {key: name for name in shards for key in load_file(name)} == {
        key: folder / "out" / name for key, name in index["weight_map"].items()
    }
    assert_same(folder / "out", stock(folder, "llama"))
    loaded = model_class("llama").from_pretrained(folder / "out").state_dict()
    assert all(oracles.same_bits(loaded[key], tensor) for key, tensor in held.items())


@pytest.mark.parametrize(
    ("size", "expected"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500), ("77", 77), (12, 12)],
)
def test_sizes(size: int | str, expected: int) -> None:
    assert size_in_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "five", "-1", 0, -3, "0GB", "5XB", True, "nan", "1e9"])
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(LoRAConfigError, match="max_shard_size"):
        size_in_bytes(size)


# ---- names in the file and names in the model ------------------------------------------------------------------------


def resave(folder: Path, rename: Callable[[str], str | None]) -> None:
    """Rename the base's tensors in its file; None leaves one out."""
    path = folder / "base/model.safetensors"
    tensors = {new: tensor for key, tensor in load_file(path).items() if (new := rename(key)) is not None}
    save_file(tensors, path, {"format": "pt"})


def assert_loads_the_same(mine: Path, name: str, stock: Path) -> None:
    one, other = (model_class(name).from_pretrained(folder).state_dict() for folder in (mine, stock))
    assert one.keys() == other.keys()
    assert all(oracles.same_bits(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-cls"])
def test_a_base_without_its_prefix(name: str, saved: Any) -> None:
    heads = {"modules_to_save": ["classifier"]} if name == "bert-cls" else {}
    folder = saved(name, {"r": 4, **Q_V, **heads})
    prefix = model_class(name).base_model_prefix + "."
    resave(folder, lambda key: key.removeprefix(prefix))
    merge_to_folder(folder / "adapter", folder / "out", folder / "base")
    assert_same(folder / "out", stock(folder, name))


def test_a_base_with_names_of_old(saved: Any) -> None:
    folder = saved("bert-cls", {"r": 4, **Q_V})
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    resave(folder, lambda key: next((key.replace(k, v) for k, v in old.items() if key.endswith(k)), key))
    assert any("gamma" in key for key in load_file(folder / "base/model.safetensors"))
    merge_to_folder(folder / "adapter", folder / "out", folder / "base")
    assert_same(folder / "out", stock(folder, "bert-cls"))
    assert_loads_the_same(folder / "out", "bert-cls", folder / "stock")


def test_a_base_with_another_head_gives_the_model_of_the_task(tiny: Any, tmp_path: Path) -> None:
    """An encoder alone, with what a masked-LM head left behind; the adapter brings a head for five labels."""
    encoder = tiny("bert")
    encoder.save_pretrained(tmp_path / "base")
    resave(tmp_path, lambda key: f"bert.{key}")
    tensors = load_file(tmp_path / "base/model.safetensors")
    save_file({**tensors, "cls.predictions.bias": torch.zeros(64)}, tmp_path / "base/model.safetensors")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    cls = transformers.BertForSequenceClassification
    model = cls.from_pretrained(tmp_path / "base", num_labels=5)
    model.add_lora(LoRAConfig(r=4, target_modules=["q"], task_type="SEQ_CLS"))
    randomise(model)
    model.save_lora(tmp_path / "adapter")
    report = merge_to_folder(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert report.architecture == "BertForSequenceClassification"
    assert report.replaced == ("classifier.bias", "classifier.weight") or set(report.replaced) == {
        "classifier.bias",
        "classifier.weight",
    }
    assert report.dropped == ("cls.predictions.bias",)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (type(merged), merged.config.num_labels) == (cls, 5)
    model.eval().merge_lora()
    model.save_pretrained(tmp_path / "stock")
    assert_same(tmp_path / "out", tmp_path / "stock")


def mixtral() -> Any:
    config = transformers.MixtralConfig(**TINY["llama"][2], num_local_experts=2)
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).eval()


def test_experts_pass_through_in_the_files_own_layout(tmp_path: Path) -> None:
    """The file has a tensor for each expert, the model one for all: they are copied, the attention is merged."""
    mixtral().save_pretrained(tmp_path / "base")
    assert any("experts.1.w1" in key for key in load_file(tmp_path / "base/model.safetensors"))
    cls = transformers.MixtralForCausalLM
    model = cls.from_pretrained(tmp_path / "base")
    model.add_lora(LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    randomise(model)
    model.save_lora(tmp_path / "adapter")
    merge_to_folder(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    model.eval().merge_lora()
    model.save_pretrained(tmp_path / "stock")
    assert_same(tmp_path / "out", tmp_path / "stock")


def test_both_copies_of_a_tied_weight(saved: Any) -> None:
    """A file that holds the tied weight twice: equal copies are one weight, others are two."""
    folder = saved("llama-tied", {"r": 4, **Q_V})
    path = folder / "base/model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    merge_to_folder(folder / "adapter", folder / "out", folder / "base")
    assert "lm_head.weight" not in weights(folder / "out")
    if not OLDEST:  # transformers 5.0 keeps both copies
        assert_same(folder / "out", stock(folder, "llama-tied"))
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path, {"format": "pt"})
    merge_to_folder(folder / "adapter", folder / "other", folder / "base")
    assert torch.equal(weights(folder / "other")["lm_head.weight"], tensors["model.embed_tokens.weight"] + 1)


def test_the_map_of_names_is_what_from_pretrained_does(tiny: Any, tmp_path: Path) -> None:
    """The contract with transformers: a tensor arrives where `map_keys` says, for every name that may be in a file."""
    model = tiny("bert-cls")
    names = {}
    for i, key in enumerate(model.state_dict()):
        old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        names[old.removeprefix("bert.") if i % 2 else old] = key
    save_file({name: model.state_dict()[key].clone() for name, key in names.items()}, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    placed = map_keys(meta_model(type(model), model.config, torch.float32), [*names, "nowhere.weight"])
    assert {name: where.key for name, where in placed.items()} == names
    assert all(oracles.same_bits(loaded[key], model.state_dict()[key]) for key in loaded)
    several = map_keys(
        meta_model(transformers.MixtralForCausalLM, mixtral().config, torch.float32),
        ["model.layers.0.block_sparse_moe.experts.0.w1.weight"],
    )
    assert [where.converted for where in several.values()] == [True]


# ---- what goes along -------------------------------------------------------------------------------------------------


def test_what_goes_along_and_what_does_not(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    along = {
        "generation_config.json": '{"max_length": 7}',
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "vocab.txt": "a",
        "tokenizer.model": "sp",
        "chat_template.jinja": "{{ x }}",
        "additional_chat_templates/tool.jinja": "{{ y }}",
        "preprocessor_config.json": "{}",
        "LICENSE": "Apache-2.0",
    }
    not_along = {
        "pytorch_model.bin": "p",
        "model.fp16.safetensors": "s",
        "model.gguf": "g",
        "adapter_config.json": "{}",
        "adapter_model.safetensors": "a",
        "optimizer.pt": "o",
        "training_args.bin": "t",
        "trainer_state.json": "{}",
        "README.md": "r",
        ".env": "HF_TOKEN=hf_secret",
        "token": "hf_secret",
        "modeling_x.py": "import os",
    }
    for name, text in {**along, **not_along}.items():
        (folder / "base" / name).parent.mkdir(exist_ok=True)
        (folder / "base" / name).write_text(text)
    report = merge_to_folder(folder / "adapter", folder / "out", folder / "base")
    there = {str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*") if path.is_file()}
    assert there == {"config.json", "model.safetensors", *along} == set(report.files)
    assert all((folder / "out" / name).read_text() == text for name, text in along.items())
    assert report.files == {name: (folder / "out" / name).stat().st_size for name in there}
    for path in (folder / "out").rglob("*"):
        assert path.is_dir() or (
            b"hf_secret" not in path.read_bytes() and str(folder).encode() not in path.read_bytes()
        )


# ---- refusals: nothing is written ------------------------------------------------------------------------------------


def refused(folder: Path, kind: type[LoRAError], *words: str, **options: Any) -> LoRAError:
    """The merge is refused with these words, a remedy, and nothing left."""
    with pytest.raises(kind) as caught:
        merge_to_folder(folder / "adapter", folder / "out", options.pop("base", folder / "base"), **options)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    assert caught.value.remedy
    assert_nothing_left(folder)
    return caught.value


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "base/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def set_adapter(folder: Path, **fields: Any) -> None:
    path = folder / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_weight(target: str, saved: Any, tiny: Any, tmp_path: Path) -> None:
    folder = saved("llama-tied", {"r": 4, "target_modules": [target]})
    refused(folder, LoRAUnsupportedError, "tied", "lm_head.weight", "model.embed_tokens.weight", "untie=True")


def test_a_quantised_base(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    set_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(folder, LoRAUnsupportedError, "quantised", "bitsandbytes")


def test_a_base_in_eight_bits(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    path = folder / "base/model.safetensors"
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file({k: t.to(torch.float8_e4m3fn) if k == key else t for k, t in load_file(path).items()}, path)
    refused(folder, LoRAFileError, key, "F8_E4M3")


def test_a_base_of_pickles(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    (folder / "base/model.safetensors").rename(folder / "base/pytorch_model.bin")
    refused(folder, LoRAUnsupportedError, "pytorch_model.bin", "save_pretrained()")


def test_experts_that_are_fused_when_loaded(tmp_path: Path) -> None:
    """PEFT's LoRA on a weight that does not stand in the file by itself."""
    mixtral().save_pretrained(tmp_path / "base")
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base")
    model.add_lora(LoRAConfig(r=4, target_modules=["q_proj"]))
    randomise(model)
    model.save_lora(tmp_path / "adapter")
    resave(tmp_path, lambda key: key.replace("layers.0.self_attn.q_proj.weight", "nowhere.weight"))
    refused(
        tmp_path,
        LoRAUnsupportedError,
        "model.layers.0.self_attn.q_proj.weight",
        "not in the base's files",
        "merge_lora()",
    )


def test_a_weight_that_is_made_of_others(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, WeightConverter

    folder = saved("phi3", {"r": 4, "target_modules": ["qkv_proj"]})
    path = folder / "base/model.safetensors"
    split = {}
    for key, tensor in load_file(path).items():
        if "qkv_proj" in key:
            for name, part in zip(("q_proj", "k_proj", "v_proj"), tensor.split([32, 16, 16]), strict=True):
                split[key.replace("qkv_proj", name)] = part.contiguous()
        else:
            split[key] = tensor
    save_file(split, path, {"format": "pt"})
    patterns = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]
    converter = WeightConverter(patterns, "self_attn.qkv_proj.weight", operations=[Concatenate(dim=0)])
    conversion_mapping.get_checkpoint_conversion_mapping("phi3")  # fills the cache
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "phi3", [converter])
    refused(folder, LoRAUnsupportedError, "model.layers.0.self_attn.qkv_proj.weight", "q_proj", "merge_lora()")


def test_a_base_that_lacks_tensors(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    resave(folder, lambda key: None if "layers.1.mlp.up_proj" in key or key == "model.norm.weight" else key)
    error = refused(folder, LoRAMismatchError, "random", "model.norm.weight", "model.layers.1.mlp.up_proj.weight")
    assert len(error.value) == 2


def test_a_base_without_the_pooler_that_the_adapter_was_trained_over(tiny: Any, saved: Any) -> None:
    folder = saved("bert-cls", {"r": 4, **Q_V, "task_type": "SEQ_CLS"})
    resave(folder, lambda key: None if "pooler" in key else key)
    refused(folder, LoRAMismatchError, "bert.pooler.dense.weight")


def test_a_base_of_other_shapes(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    set_config(folder, intermediate_size=40)
    refused(folder, LoRAMismatchError, "model.layers.0.mlp.up_proj.weight", "[48, 32]", "[40, 32]")


def test_an_adapter_of_another_architecture(saved: Any, tiny: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    tiny("gpt2").save_pretrained(folder / "base")
    error = refused(folder, LoRAMismatchError, "model.layers.0.self_attn.q_proj", "Nothing was written")
    assert len(error.facts) == 4


def test_an_adapter_of_other_sizes(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    config = transformers.LlamaConfig(**{**TINY["llama"][2], "hidden_size": 64, "head_dim": 8})
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    refused(folder, LoRAMismatchError, "32 -> 32", "64 -> 32")


def test_an_adapter_that_lacks_a_tensor_that_its_config_names(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    set_adapter(folder, target_modules=["q_proj", "v_proj", "k_proj"])
    refused(folder, LoRAMismatchError, "model.layers.0.self_attn.k_proj")


@pytest.mark.parametrize(
    ("named", "base", "fits"),
    [
        ("org/other", "me/base", False),
        ("me/base", "me/base", True),
        ("Me/Base", "me/base", True),
        ("unsloth/base-bnb-4bit", "me/base", True),
        ("/home/someone/base", "me/base", True),
        (None, "me/base", True),
        ("org/other", None, True),
    ],
)
def test_an_adapter_of_another_base(named: str | None, base: str | None, fits: bool, saved: Any) -> None:
    """A folder knows whose model it is where it says so (an old config's _name_or_path, the Hub's cache)."""
    folder = saved("llama", {"r": 4, **Q_V})
    set_adapter(folder, base_model_name_or_path=named)
    if base is not None:
        set_config(folder, _name_or_path=base)
    if not fits:
        refused(folder, LoRAMismatchError, "org/other", "me/base", "force")
        merge_to_folder(folder / "adapter", folder / "forced", folder / "base", force=True)
        assert_same(folder / "forced", stock(folder, "llama"))
    else:
        merge_to_folder(folder / "adapter", folder / "out", folder / "base")


def test_force_overrides_the_id_alone(saved: Any, tiny: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    tiny("gpt2").save_pretrained(folder / "base")
    refused(folder, LoRAMismatchError, "model.layers.0.self_attn.q_proj", force=True)


def test_the_base_that_the_adapter_names(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    set_adapter(folder, base_model_name_or_path=str(folder / "base"))
    assert merge_to_folder(folder / "adapter", folder / "out").base == str(folder / "base")
    assert_same(folder / "out", stock(folder, "llama"))


def test_an_adapter_that_names_no_base(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    set_adapter(folder, base_model_name_or_path=None)
    refused(folder, LoRAConfigError, "base", "--base", base=None)


@pytest.mark.parametrize("name", ["nobody/nothing-here", "not an id!", "a/b/c"])
def test_a_base_that_is_nowhere(name: str, saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    refused(folder, LoRAFileError, name, "base", base=name)


def test_a_base_that_is_an_adapter(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    refused(folder, LoRAFileError, "an adapter, not a model", base=folder / "adapter")


def change(folder: Path, edit: Callable[[str, torch.Tensor], torch.Tensor], which: str = "adapter") -> None:
    path = folder / which / ("adapter_model.safetensors" if which == "adapter" else "model.safetensors")
    save_file({key: edit(key, tensor) for key, tensor in load_file(path).items()}, path, {"format": "pt"})


def test_an_adapter_that_is_not_finite(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    change(folder, lambda key, t: t * float("nan") if "layers.1.self_attn.v_proj.lora_B" in key else t)
    refused(folder, LoRAFileError, "layers.1.self_attn.v_proj.lora_B")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_product_that_is_not_finite_although_its_factors_are(dtype: torch.dtype, saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V}, dtype=dtype)
    big = 6e4 if dtype == torch.float16 else 1e30
    change(folder, lambda key, t: torch.full_like(t, big) if "layers.1.self_attn.v_proj" in key else t)
    says = "overflows torch.float16" if dtype == torch.float16 else "ΔW holds NaN or infinite values"
    refused(folder, LoRAMismatchError, "model.layers.1.self_attn.v_proj.weight", says)


def test_a_sum_that_overflows(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V}, dtype=torch.float16)
    change(folder, lambda key, t: torch.full_like(t, 6e4) if "q_proj" in key else t, "base")
    change(folder, lambda key, t: torch.full_like(t, 60) if "q_proj" in key else t)
    refused(folder, LoRAMismatchError, "q_proj", "overflows torch.float16", "bfloat16")
    merge_to_folder(folder / "adapter", folder / "out", folder / "base", dtype="bf16")


def test_a_base_that_overflows_the_dtype_asked_for(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    change(folder, lambda key, t: torch.full_like(t, 1e6) if "up_proj" in key else t, "base")
    refused(folder, LoRAMismatchError, "up_proj", "overflows torch.float16", dtype="fp16")


def test_a_head_that_overflows(saved: Any) -> None:
    folder = saved("bert-cls", {"r": 4, **Q_V, "modules_to_save": ["classifier"]}, dtype=torch.float16)
    change(folder, lambda key, t: torch.full_like(t, 1e5, dtype=torch.float32) if "classifier" in key else t)
    refused(folder, LoRAMismatchError, "classifier", "float16")


def test_another_bases_embedding(saved: Any, peft: Any) -> None:
    """PEFT writes a copy of the base's embedding beside its factors; it has to be this base's."""
    folder = saved("llama", {"r": 4, **Q_V})
    base = model_class("llama").from_pretrained(folder / "base")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False))
    theirs.save_pretrained(folder / "adapter", save_embedding_layers=True)
    assert any("base_layer" in key for key in load_file(folder / "adapter/adapter_model.safetensors"))
    merge_to_folder(folder / "adapter", folder / "out", folder / "base")
    assert_same(folder / "out", stock(folder, "llama"))
    change(folder, lambda key, t: t + 1 if "embed_tokens" in key else t, "base")
    for name in ("out", "stock"):
        subprocess.run(["rm", "-rf", str(folder / name)], check=True)
    refused(folder, LoRAMismatchError, "model.embed_tokens.weight", "another base")


@pytest.mark.parametrize("damage", ["truncated", "index to elsewhere", "shard missing", "twice"])
def test_a_damaged_base(damage: str, saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V}, max_shard_size="40KB")
    first, second, *_ = sorted((folder / "base").glob("*.safetensors"))
    index = folder / "base/model.safetensors.index.json"
    if damage == "truncated":
        first.write_bytes(first.read_bytes()[:-5])
    elif damage == "index to elsewhere":
        found = json.loads(index.read_text())
        found["weight_map"]["model.norm.weight"] = "../adapter/adapter_model.safetensors"
        index.write_text(json.dumps(found))
    elif damage == "shard missing":
        first.unlink()
    else:
        save_file({**load_file(first), **load_file(second)}, second, {"format": "pt"})
    with pytest.raises(LoRAFileError):
        merge_to_folder(folder / "adapter", folder / "out", folder / "base")
    assert_nothing_left(folder)


# ---- all of the folder, or nothing -----------------------------------------------------------------------------------


def test_an_out_that_holds_something_stays(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    (folder / "out").mkdir()
    (folder / "out/mine.txt").write_text("mine")
    with pytest.raises(LoRAFileError, match="not empty"):
        merge_to_folder(folder / "adapter", folder / "out", folder / "base")
    (folder / "file").write_text("")
    with pytest.raises(LoRAFileError, match="not a folder"):
        merge_to_folder(folder / "adapter", folder / "file", folder / "base")
    with pytest.raises(LoRAFileError, match="not empty"):
        merge_to_folder(folder / "adapter", folder / "base", folder / "base")
    assert_nothing_left(folder, besides=("base", "adapter", "out", "file"))
    assert [path.name for path in (folder / "out").iterdir()] == ["mine.txt"]


def test_an_empty_out_and_one_whose_parent_is_missing(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    (folder / "out").mkdir()
    merge_to_folder(folder / "adapter", folder / "out", folder / "base")
    merge_to_folder(folder / "adapter", folder / "a/b/out", folder / "base")
    assert_same(folder / "out", folder / "a/b/out")


def test_an_out_that_fills_while_it_is_written_stays(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})

    def progress(*_: Any) -> None:
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out/mine.txt").write_text("mine")

    with pytest.raises(LoRAFileError, match="cannot be written"):
        merge_to_folder(folder / "adapter", folder / "out", folder / "base", progress=progress)
    assert_nothing_left(folder, besides=("base", "adapter", "out"))
    assert [path.name for path in (folder / "out").iterdir()] == ["mine.txt"]


def test_progress_counts_to_the_end_and_an_interrupt_leaves_nothing(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    seen: list[tuple[str, int, int]] = []
    report = merge_to_folder(
        folder / "adapter", folder / "a", folder / "base", max_shard_size="30KB", progress=lambda *x: seen.append(x)
    )
    assert {file for file, _, _ in seen} == {name for name in report.files if name.endswith(".safetensors")}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1:] == (report.nbytes, report.nbytes)

    def interrupt(file: str, done: int, total: int) -> None:
        assert [path.name for path in folder.iterdir() if "hf_lora-" in path.name], "it is written beside"
        assert not (folder / "out").exists()
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_to_folder(folder / "adapter", folder / "out", folder / "base", progress=interrupt)
    assert_nothing_left(folder, besides=("base", "adapter", "a"))


CHILD = """
import os, signal, sys
sys.path.insert(0, {root!r})
from hf_lora.export import merge_to_folder
from hf_lora import LoRAFileError
{before}
def progress(file, done, total):
    {each}
try:
    merge_to_folder({adapter!r}, {out!r}, {base!r}, max_shard_size="30KB", progress=progress)
except LoRAFileError as error:
    print("refused:", error)
"""


def child(folder: Path, *, before: str = "", each: str = "pass") -> subprocess.CompletedProcess[str]:
    paths = {name: str(folder / name) for name in ("adapter", "out", "base")}
    program = CHILD.format(root=str(ROOT), before=before, each=each, **paths)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_kill_leaves_no_half_folder_and_the_next_merge_cleans_up(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    done = child(folder, each="done > total / 2 and os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [path for path in folder.iterdir() if path.name not in ("base", "adapter")]
    assert [path.name.rpartition("-")[0] for path in left] == [".out.hf_lora"]
    merge_to_folder(folder / "adapter", folder / "out", folder / "base")
    assert_nothing_left(folder, besides=("base", "adapter", "out"))
    assert_same(folder / "out", stock(folder, "llama"))


@pytest.mark.slow
def test_a_merge_that_runs_is_not_cleaned_up(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    (folder / "go").touch()
    program = CHILD.format(
        root=str(ROOT),
        before="import time",
        each=f"\n    while os.path.exists({str(folder / 'go')!r}): time.sleep(0.02)",
        **{name: str(folder / name) for name in ("adapter", "out", "base")},
    )
    running = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while not list(folder.glob(".out.hf_lora-*/*.safetensors")):
            assert running.poll() is None, "the child ended early"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        merge_to_folder(folder / "adapter", folder / "out", folder / "base")
        assert list(folder.glob(".out.hf_lora-*")), "the other one's folder is still there"
    finally:
        (folder / "go").unlink()
        said = running.communicate(timeout=200)[0]
    assert "refused" in said  # the first to finish has the name
    assert_nothing_left(folder, besides=("base", "adapter", "out"))
    assert_same(folder / "out", stock(folder, "llama"))


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(saved: Any) -> None:
    """A limit on the size of a file ends a write as a full disk does."""
    folder = saved("llama", {"r": 4, **Q_V})
    done = child(folder, before="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))")
    assert "refused:" in done.stdout, done.stderr
    assert "cannot be written" in done.stdout
    assert_nothing_left(folder)


def test_too_little_space_is_said_before_anything_is_written(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    refused(folder, LoRAFileError, "100 are free")


# ---- memory ----------------------------------------------------------------------------------------------------------

MEASURED = """
import sys
sys.path.insert(0, {root!r})
import torch, transformers, hf_lora
from hf_lora.export import merge_to_folder
from hf_lora import loading
transformers.LlamaForCausalLM, transformers.AutoConfig
torch.ones(64, 64) @ torch.ones(64, 64)
loading.read_source({adapter!r})

def now(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024

def reset():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

before = now("VmRSS")
reset()
merge_to_folder({adapter!r}, {out!r}, {base!r}, max_shard_size="200MB")
print("MB", now("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_a_large_model_is_never_in_memory(tmp_path: Path) -> None:
    """600 MB of weights, of which the largest that changes has 8 MB, merge in less than 250 MB beyond the imports."""
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, vocab_size=32000
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(tmp_path / "base")
    size = sum(t.numel() * t.element_size() for t in model.parameters())
    assert size > 550e6
    model.add_lora(LoRAConfig(r=8, target_modules="all-linear"))
    model.save_lora(tmp_path / "adapter")
    del model
    paths = {name: str(tmp_path / name) for name in ("adapter", "out", "base")}
    program = MEASURED.format(root=str(ROOT), **paths)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    peak = float(done.stdout.rsplit("MB", 1)[1])
    print(f"{size / 1e6:.0f} MB of weights, {peak:.0f} MB more than the imports")
    assert peak < 250
    merged = load_file(sorted((tmp_path / "out").glob("*.safetensors"))[0])
    assert merged


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_the_command(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    result = run(folder / "adapter", folder / "out", "--base", folder / "base", "--max-shard-size", "30KB")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM" in result.output
    assert str(folder / "out") in result.output
    assert_same(folder / "out", stock(folder, "llama"))


def test_the_commands_json_is_the_report(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    result = run(folder / "adapter", folder / "out", "--base", folder / "base", "--dtype", "bf16", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == set(MergeReport.__dataclass_fields__)
    assert found["dtype"] == "bfloat16"
    assert len(found["merged"]) == 4
    assert found["files"]["model.safetensors"] == (folder / "out/model.safetensors").stat().st_size
    assert {weights(folder / "out")[key].dtype for key in found["merged"]} == {torch.bfloat16}


def test_the_commands_errors(saved: Any) -> None:
    folder = saved("llama", {"r": 4, **Q_V})
    for arguments, says in [
        ((folder / "nowhere", folder / "out"), "nowhere"),
        ((folder / "adapter", folder / "base", "--base", folder / "base"), "not empty"),
        ((folder / "adapter", folder / "out", "--base", folder / "base", "--dtype", "int3"), "int3"),
        ((folder / "adapter", folder / "out", "--base", folder / "base", "--max-shard-size", "big"), "big"),
        ((folder / "adapter", folder / "out", "--base", folder / "nothing"), "nothing"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert says in result.output
        assert "Traceback" not in result.output
    assert_nothing_left(folder)
    set_adapter(folder, base_model_name_or_path="org/other")
    set_config(folder, _name_or_path="me/base")
    assert run(folder / "adapter", folder / "out", "--base", folder / "base").exit_code == 2
    assert run(folder / "adapter", folder / "out", "--base", folder / "base", "--force").exit_code == 0
