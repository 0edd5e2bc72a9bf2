"""Bases that bitsandbytes, torchao, quanto and HQQ quantised: train, save, merge, and every bit back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from loras import logits, randomise
from quantbases import BASES, load, save_dense
from training import logged, same, trainer

import hf_lora
from hf_lora import LoRAConfig, backends
from hf_lora.errors import LoRAStateError, LoRAUnsupportedError
from hf_lora.merging import merge_lora

torch.set_num_threads(1)

CONFIG = LoRAConfig(r=4, alpha=8, target_modules="all-linear")
PATH = "model.layers.1.mlp.down_proj"
IDS = {"input_ids": torch.arange(24).view(4, 6)}
BY_PEFT = [name for name in BASES if not name.startswith("quanto")]  # to PEFT quanto's layers are plain ones

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(params=BASES)
def base(request, dense):
    return load(dense, request.param)


def held(model: Any) -> dict[str, Any]:
    """Everything a quantised model holds, by name, as plain tensors."""
    found = {}
    for path, module in model.named_modules():
        if backends.backend_of(module) is not None:
            found[path] = read(module)
    return found


def read(module: Any) -> torch.Tensor:
    """A layer's weight by the library's own means, (out, in)."""
    weight = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(weight.data, module.state.SCB if weight.SCB is None else weight.SCB)
    return module.dequantize() if hasattr(module, "W_q") else weight.dequantize()


def steps(model: Any, n: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(n):
        loss = model(**IDS, labels=IDS["input_ids"]).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


# ---- train, save, remove ---------------------------------------------------------------------------------------------


def test_it_trains_and_the_base_comes_back(base):
    before, weights = logits(base, IDS), {k: v.clone() for k, v in held(base).items()}
    classes = {path: type(module) for path, module in base.named_modules()}
    base.add_lora(CONFIG)
    assert torch.equal(logits(base, IDS), before)
    losses = steps(base)
    assert losses[-1] < losses[0]
    assert not torch.equal(logits(base, IDS), before)
    base.remove_lora()
    assert torch.equal(logits(base, IDS), before)
    assert {path: type(module) for path, module in base.named_modules()} == classes
    assert same(held(base), weights)


def test_the_layer_adds_the_pair_to_its_own_product(base):
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(base.dtype)
    layer = base.get_submodule(PATH)
    with torch.no_grad():
        own = layer(x).double()
    base.add_lora(CONFIG)
    randomise(base, scale=0.1)
    slots = layer.lora_slots
    expected = own + 2 * x.double() @ slots.A0.detach().double().T @ slots.B0.detach().double().T
    with torch.no_grad():
        found = layer(x).double()
    exact = torch.finfo(base.dtype).eps
    assert (found - expected).abs().max() <= 4 * exact * expected.abs().max()
    assert (found - own).abs().max() > 100 * exact


@pytest.mark.parametrize("name", BY_PEFT)
def test_peft_computes_the_same_of_our_file(name, dense, peft, tmp_path):
    model = load(dense, name)
    model.add_lora(CONFIG)
    randomise(model, scale=0.1)
    model.save_lora(tmp_path)
    mine = logits(model, IDS).float()
    theirs = logits(peft.PeftModel.from_pretrained(load(dense, name), str(tmp_path)).eval(), IDS).float()
    most = 1e-5 if model.dtype == torch.float32 else 4e-2  # PEFT adds in float32
    assert (mine - theirs).abs().max() <= most * theirs.abs().max()
    again = load(dense, name)
    again.load_lora(tmp_path, trainable=True)
    assert torch.equal(logits(again, IDS).float(), mine)


@pytest.mark.parametrize("name", ["nf4", "torchao int8", "quanto int4"])
def test_the_stock_trainer_resumes_bit_for_bit(name, dense, tmp_path):
    def run(folder, **given):
        model = load(dense, name)
        torch.manual_seed(0)
        model.add_lora(CONFIG)
        return trainer(model, folder, lr_scheduler_type="constant", **given), model

    whole, model = run(tmp_path / "a")
    whole.train()
    cut, _ = run(tmp_path / "b", max_steps=4)
    cut.train()
    resumed, other = run(tmp_path / "b")
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert same(model.lora_state_dict(), other.lora_state_dict())


# ---- merge -----------------------------------------------------------------------------------------------------------


def trained(model: Any) -> Any:
    model.add_lora(CONFIG)
    randomise(model, scale=0.1)
    model.train_lora([])
    return model


def change(model: Any) -> torch.Tensor:
    """ΔW of one layer, from its factors, in float32."""
    value = hf_lora.model.read(model, "default").factors[PATH]
    return (8 / 4) * value.B.float() @ value.A.float()


@pytest.mark.parametrize("name", BY_PEFT)
def test_merged_it_holds_what_peft_makes_of_it(name, dense, peft, tmp_path):
    model = trained(load(dense, name))
    before, own = logits(model, IDS), read(model.get_submodule(PATH)).clone()
    model.save_lora(tmp_path)
    other = peft.PeftModel.from_pretrained(load(dense, name), str(tmp_path)).eval()
    try:
        other.merge_adapter()
    except ValueError as error:  # PEFT does not know of a torchao that was loaded so
        pytest.fail(str(error))
    model.merge_lora()
    mine = read(model.get_submodule(PATH)).float()
    theirs = read(other.get_submodule(f"base_model.model.{PATH}").get_base_layer()).float()
    assert torch.equal(mine, theirs)
    assert (mine - own.float() - change(model)).abs().max() < (mine - own.float()).abs().max()
    assert not torch.equal(logits(model, IDS), before)
    model.unmerge_lora()
    assert torch.equal(logits(model, IDS), before)
    assert torch.equal(read(model.get_submodule(PATH)), own)


@pytest.mark.parametrize("name", ["quanto int8", "quanto int4", "quanto fp8"])
def test_merged_it_holds_what_quanto_makes_of_it(name, dense):
    model = trained(load(dense, name))
    layer = model.get_submodule(PATH)
    own = read(layer).clone()
    added = (own.float() + change(model)).to(own.dtype)
    fresh = load(dense, name).get_submodule(PATH)
    fresh.weight = torch.nn.Parameter(added)  # quanto's own way of quantising a layer
    fresh.freeze()
    before = logits(model, IDS)
    model.merge_lora()
    assert torch.equal(read(layer), read(fresh))
    model.unmerge_lora()
    assert torch.equal(read(layer), own)
    assert torch.equal(logits(model, IDS), before)


def test_dequantised_while_merged(base, tmp_path):
    from transformers import AutoModelForCausalLM

    model = trained(base)
    before, own = logits(model, IDS), {k: v.clone() for k, v in held(model).items()}
    said = {name: vars(model).get(name) for name in ("hf_quantizer", "is_quantized", "quantization_method")}
    config = getattr(model.config, "quantization_config", None)
    model.merge_lora(dequantize=True)
    weight = model.get_submodule(PATH).weight
    expected = own[PATH].double() + change(model).double()
    assert weight.dtype == model.dtype
    assert not held(model)
    assert (weight.double() - expected).abs().max() <= torch.finfo(weight.dtype).eps * expected.abs().max()
    merged = logits(model, IDS)
    model.save_pretrained(tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not hasattr(alone.config, "quantization_config")
    assert torch.equal(logits(alone, IDS), merged)
    model.merge_lora(replace=True)  # in place of what is merged, and dense still
    assert torch.equal(logits(model, IDS), merged)
    model.unmerge_lora()
    assert torch.equal(logits(model, IDS), before)
    assert same(held(model), own)
    assert {name: vars(model).get(name) for name in said} == said
    assert getattr(model.config, "quantization_config", None) is config


@pytest.mark.parametrize("name", ["nf4", "int8", "quanto int4"])
def test_a_standalone_model_comes_from_the_files_of_the_base(name, dense, tmp_path):
    from transformers import AutoModelForCausalLM

    model = trained(load(dense, name))
    before = logits(model, IDS)
    model.merge_and_save(tmp_path / "whole")
    model.merge_and_save(tmp_path / "copy", dequantize=True)
    whole, copied, plain = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "whole", tmp_path / "copy", dense)
    )
    W = plain.get_submodule(PATH).weight.double()
    expected = W + change(model).double()
    found = whole.get_submodule(PATH).weight.double()
    assert (found - expected).abs().max() <= 2 * torch.finfo(plain.dtype).eps * expected.abs().max()
    assert torch.equal(whole.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert (copied.get_submodule(PATH).weight.double() - expected).abs().max() > 1e-4  # Q is not W
    assert torch.equal(logits(model, IDS), before)
    model.add_lora(CONFIG, "other", active=False)
    with pytest.raises(LoRAStateError, match="One adapter"):
        model.merge_and_save(tmp_path / "two", {"default": 0.5, "other": 0.5})


def test_a_merge_that_fails_changes_nothing(base):
    model = trained(base)
    before, own = logits(model, IDS), {k: v.clone() for k, v in held(model).items()}
    model.merge_lora()
    merged = logits(model, IDS)
    model.unmerge_lora()
    kept = hf_lora.model.require(model).entry("default").record.value
    if kept is not None:  # what a merge reads where the banks are of fewer bits
        kept.factors["model.layers.1.mlp.up_proj"].A.fill_(float("nan"))
    model.get_submodule("model.layers.1.mlp.up_proj").lora_slots.bank_A.fill_(float("nan"))
    for options in ({}, {"dequantize": True}):
        with pytest.raises(LoRAStateError, match="up_proj"):
            model.merge_lora(**options)
        assert same(held(model), own)
    assert not torch.equal(merged, before)


def test_merges_take_each_others_place(base):
    model = trained(base)
    model.add_lora(CONFIG, "other", active=False)
    randomise(model, seed=5, scale=0.1)
    model.train_lora([])
    own = {k: v.clone() for k, v in held(model).items()}
    model.merge_lora("other")
    fresh = {k: v.clone() for k, v in held(model).items()}
    model.unmerge_lora()
    model.merge_lora("default")
    assert not same(held(model), fresh)
    model.merge_lora("other", replace=True)
    assert same(held(model), fresh)
    model.unmerge_lora()
    assert same(held(model), own)


def test_a_weight_that_was_changed_meanwhile_is_not_overwritten(dense):
    model = trained(load(dense, "quanto int8"))
    model.merge_lora()
    layer = model.get_submodule(PATH)
    layer.weight = torch.nn.Parameter(layer.weight.detach(), requires_grad=False)
    with pytest.raises(LoRAStateError, match="changed since it was merged"):
        model.unmerge_lora()


def test_what_cannot_be_quantised_anew_is_refused_with_the_remedy(dense, monkeypatch):
    model = trained(load(dense, "torchao int8"))
    monkeypatch.setitem(vars(model), "hf_quantizer", None)  # quantised by hand: nobody knows how
    before = logits(model, IDS)
    with pytest.raises(LoRAUnsupportedError, match="dequantize=True"):
        model.merge_lora()
    assert torch.equal(logits(model, IDS), before)
    model.merge_lora(dequantize=True)
    model.unmerge_lora()
    assert torch.equal(logits(model, IDS), before)


def test_dequantize_is_for_what_is_quantised(tiny):
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=2, target_modules=["q"]))
    with pytest.raises(LoRAUnsupportedError, match="no layer"):
        model.merge_lora(dequantize=True)
    merge_lora(model)
    with pytest.raises(LoRAStateError, match="dequantize"):
        model.merge_lora(replace=True, dequantize=True)


def test_while_merged_it_says_how_much_is_kept(dense):
    model = trained(load(dense, "nf4"))
    quantised = sum(backends.stored_bytes(m.weight) for _, m in model.named_modules() if hasattr(m, "lora_slots"))
    assert merge_lora(model).nbytes == quantised


def test_a_base_from_a_gguf_file_is_dense_and_only_says_otherwise(dense, tmp_path):
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

    model = AutoModelForCausalLM.from_pretrained(dense)
    config = GgufConfig()
    model.hf_quantizer, model.is_quantized = GgufHfQuantizer(config), True  # what from_pretrained(gguf_file=…) leaves
    model.config.quantization_config = config
    model.prepare_lora(gradient_checkpointing=False)
    model.add_lora(CONFIG)
    trainer(model, tmp_path / "run", max_steps=2).train()
    model.eval()
    found = logits(model, IDS)
    model.merge_and_save(tmp_path / "alone")
    assert model.config.quantization_config is config
    assert model.is_quantized
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    assert (logits(alone, IDS) - found).abs().max() <= 1e-5 * found.abs().max()
    model.merge_lora(dequantize=True)
    model.save_pretrained(tmp_path / "merged")
    model.unmerge_lora()
    assert torch.equal(logits(model, IDS), found)


# ---- prepare ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_it_trains_and_gives_every_bit_back(dense, dtype):
    model = load(dense, "nf4", dtype)
    before, weights = logits(model, IDS), copy.deepcopy(model.state_dict())
    trains = {path for path, p in model.named_parameters() if p.requires_grad}
    model.prepare_lora()
    model.prepare_lora()  # again changes nothing
    assert not any(p.requires_grad for p in model.parameters())
    norms = [m.weight for path, m in model.named_modules() if path.endswith("norm")]
    assert {norm.dtype for norm in norms} == {torch.float32}
    assert model.is_gradient_checkpointing
    assert logits(model, IDS).dtype == dtype
    assert (logits(model, IDS) - before).abs().max() <= 4 * torch.finfo(dtype).eps * before.abs().max()
    seen = []
    model.get_submodule(PATH).register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    model.add_lora(CONFIG)
    losses = steps(model)
    assert losses[-1] < losses[0]
    assert set(seen) == {dtype}  # PEFT's way gives float32 activations
    model.remove_lora()
    assert {path for path, p in model.named_parameters() if p.requires_grad} == trains != set()
    assert same(model.state_dict(), weights)
    assert torch.equal(logits(model, IDS), before)


def test_reentrant_checkpoints_keep_their_gradients(dense):
    model = load(dense, "nf4")
    model.prepare_lora(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.add_lora(CONFIG)
    steps(model, 2)  # asserts that every factor has a gradient


def test_a_model_without_checkpointing_is_told_so():
    module = torch.nn.Linear(4, 4)
    with pytest.raises(LoRAUnsupportedError, match="gradient_checkpointing=False"):
        hf_lora.prepare_lora(module)
    hf_lora.prepare_lora(module, gradient_checkpointing=False)
    assert not module.weight.requires_grad


# ---- bitsandbytes on CPUs that rearrange weights ---------------------------------------------------------------------


def test_under_an_adapter_no_weight_is_rearranged(dense):
    model = load(dense, "nf4", still=False)
    own = {path: vars(m).get("support_avx512bf16_for_cpu") for path, m in model.named_modules()}
    model.add_lora(CONFIG)
    randomise(model, scale=0.1)
    first = logits(model, IDS)  # in eval mode, without gradients: bitsandbytes would rearrange here
    steps(model, 1)  # asserts that every factor has a gradient, those below rearranged layers too
    model.merge_lora()
    model.unmerge_lora()
    assert not torch.equal(logits(model, IDS), first)
    model.remove_lora()
    assert {path: vars(m).get("support_avx512bf16_for_cpu") for path, m in model.named_modules()} == own


def test_an_adapter_does_not_train_on_rearranged_weights(dense):
    model = load(dense, "nf4")
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.packing_format_for_cpu = True  # what bitsandbytes' forward leaves, on such a CPU
    with pytest.raises(LoRAStateError, match="rearranged"):
        model.add_lora(CONFIG)
    assert hf_lora.model.state_of(model) is None


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_the_summary_counts_numbers_and_their_bytes(base, dense):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(dense)
    base.add_lora(CONFIG)
    summary = hf_lora.summary.summarise(base)
    assert summary.base_parameters == sum(p.numel() for p in plain.parameters())
    dense_bytes = sum(p.nbytes for p in plain.to(base.dtype).parameters())
    assert 0.2 * dense_bytes < summary.base_nbytes < 0.8 * dense_bytes
    assert summary.quantised in str(summary)


def test_bytes_of_nf4_are_those_of_its_definition(dense):
    """Half a byte a weight and a float32 for each 64; the 16 numbers of the code are bitsandbytes' own, 64 bytes."""
    layer = load(dense, "nf4").get_submodule(PATH)
    n = 64 * 128
    assert backends.stored_bytes(layer.weight) == n // 2 + 4 * n // 64 + 64
    assert backends.sizes_of(layer, dict(layer.named_parameters()))[0] == n


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nf4", "bitsandbytes, 4 bits (nf4)"),
        ("nf4 twice", "bitsandbytes, 4 bits (nf4, double quantisation)"),
        ("int8", "bitsandbytes, 8 bits"),
        ("quanto int4", "quanto (qint4)"),
        ("HQQ", "HQQ (4 bits in groups of 32)"),
    ],
)
def test_the_card_says_how_the_base_was_quantised(name, said, dense):
    from hf_lora import card, quantised

    model = trained(load(dense, name))
    found = quantised.described(model)
    assert found == said
    value = hf_lora.loading.read_adapter_of(model)
    text = card.update(None, value, base_model="me/base", repo_id="me/task", quantised=found)
    assert f"| base quantised | `{said}` |" in text
    assert "base quantised" not in card.update(None, value, base_model="me/base", repo_id="me/task")


# ---- plan ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "int8", "fp4"])
def test_the_plan_of_a_configuration_counts_what_the_library_holds(name, dense):
    from transformers import AutoConfig

    model = load(dense, name)
    config = AutoConfig.from_pretrained(dense)
    found = hf_lora.plan(config, CONFIG, batch=2, length=8, dtype=model.dtype, quantization_config=BASES[name]())
    of_model = hf_lora.plan(model, CONFIG, batch=2, length=8)
    own = hf_lora.plan(model.config, CONFIG, batch=2, length=8, dtype=model.dtype)  # its config says how
    held = sum(n for _, n in hf_lora.summary.base_sizes(model)) + sum(b.nbytes for b in model.buffers())
    assert found.base_bytes == own.base_bytes == held
    assert of_model.base_bytes == held
    assert found.base_parameters == of_model.base_parameters == 90432
    assert found.peak_bytes == own.peak_bytes
    assert found.notes == ()


def test_a_plan_sees_every_librarys_layers(base):
    plain = hf_lora.plan(base.config.__class__(**_sizes(base)), CONFIG, batch=2, length=8, dtype=base.dtype)
    found = hf_lora.plan(base, CONFIG, batch=2, length=8)
    assert found.base_parameters == plain.base_parameters
    assert found.base_bytes < plain.base_bytes
    assert found.peak_bytes is not None
    assert (found.trainable_parameters, found.optimizer_bytes) == (plain.trainable_parameters, plain.optimizer_bytes)


def _sizes(model: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    return {**{name: getattr(model.config, name) for name in names}, "num_key_value_heads": 4, "pad_token_id": 0}


def test_a_plan_of_what_is_not_known_is_dense_and_says_so(dense):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(dense)
    found = hf_lora.plan(config, CONFIG, batch=1, length=8, quantization_config={"quant_method": "vptq"})
    assert "vptq" in found.notes[0]
    assert found.base_bytes == hf_lora.plan(config, CONFIG, batch=1, length=8).base_bytes
