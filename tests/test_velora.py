"""VeLoRA: its gradients against PEFT's and against the formula in float64, what it keeps, and every verb with it."""

from __future__ import annotations

import pytest
import torch
from loras import bits, logits, randomise
from torch import nn
from training import rows, trainer

from hf_lora import LoRAConfig
from hf_lora.errors import LoRAConfigError, LoRAFileError, LoRAUnsupportedError
from hf_lora.model import add
from hf_lora.variants.velora import velora

TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS = ("batch_average", "batch_average_once", "random")


def made(tiny, family="llama", targets=TARGETS, seed=0, **changes):
    settings = {"num_groups": 5, "scale": 1.5, **changes.pop("velora_config", {})}  # 5 divides neither 32 nor 48
    model = tiny(family)
    torch.manual_seed(seed)
    model.add_lora(LoRAConfig(**{"r": 4, "alpha": 6, "target_modules": targets, **changes, "velora_config": settings}))
    randomise(model, seed)
    return model


def gradients(model):
    """By layer and factor, whoever made it."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            name = name.removeprefix("base_model.model.")
            for mine, theirs in (
                (".lora_slots.A0", ".lora_A.default.weight"),
                (".lora_slots.B0", ".lora_B.default.weight"),
            ):
                name = name.replace(theirs, mine)
            found[name] = parameter.grad.clone()
    return found


def close(mine, theirs, tolerance=1e-5):
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.abs().max() > 0, name
        assert (mine[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def projections(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".projection" in n}


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inner", "d"), [(12, 4), (13, 4), (3, 4)])
def test_the_formula(inner, d):
    torch.manual_seed(0)
    x, A, g = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, inner), (3, inner), (2, 5, 3)))
    v = nn.functional.normalize(torch.randn(d, dtype=torch.float64), dim=0)
    x.requires_grad_(), A.requires_grad_()
    output = velora(x, A, v, 1.5)
    assert torch.equal(output, x @ A.T)
    output.backward(g)
    seen = torch.zeros_like(x)  # every group of x, along v
    for start in range(0, inner, d):
        part, own = x.detach()[..., start : start + d], v[: inner - start]
        seen[..., start : start + d] = 1.5 * (part @ own)[..., None] * own
    assert torch.allclose(A.grad, g.flatten(0, 1).T @ seen.flatten(0, 1), rtol=1e-12)
    assert torch.allclose(x.grad, g @ A.detach(), rtol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_have_pefts_gradients(tiny, batch, peft, tmp_path, kind, family):
    targets = TARGETS if family == "llama" else ["c_attn", "c_fc"]
    model = made(tiny, family, targets, velora_config={"init_type": kind})
    model.save_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path), is_trainable=True)
    for each in (model, theirs):
        for module in each.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    for seed in (0, 1):
        inputs = batch(model, seed=seed)
        found = []
        for each in (model, theirs):
            each.zero_grad()
            each(**inputs, labels=inputs["input_ids"]).loss.backward()
            found.append(gradients(each))
        close(*found)
    embeds = {n: b for n, b in theirs.named_buffers() if "velora_embed" in n}
    for mine, other in zip(projections(model).values(), embeds.values(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)
        assert abs(float(mine.norm()) - 1) < 1e-5


def test_the_forward_is_plain_loras_and_so_is_the_gradient_below(tiny, batch):
    model, plain = made(tiny).train(), tiny("llama")
    plain.add_lora(LoRAConfig(r=4, alpha=6, target_modules=TARGETS))
    for name, parameter in plain.named_parameters():
        if ".lora_slots." in name:
            parameter.data.copy_(model.get_parameter(name))
    inputs = batch(model)
    found = []
    for each in (model, plain.train()):
        output = each(**inputs, labels=inputs["input_ids"])
        output.loss.backward()
        found.append((output.logits.detach(), {k: g for k, g in gradients(each).items() if ".B0" in k}))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    close(found[0][1], found[1][1])
    assert any(not torch.equal(g, gradients(plain)[k]) for k, g in gradients(model).items())  # A's are not


def kept(model, inputs):
    """Bytes that one forward keeps for its backward, of no parameter or buffer."""
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs).logits.sum()
    return sum(storage.nbytes() for storage in found.values())


def test_it_keeps_less_than_lora_and_no_more_than_peft(tiny, batch, peft):
    settings, inputs = {"num_groups": 2}, None
    sizes = {}
    for name, changes in (("frozen", None), ("lora", {}), ("velora", {"velora_config": settings})):
        model = tiny("llama")
        inputs = batch(model, rows=4)
        if changes is None:
            model.requires_grad_(False)
            model.get_input_embeddings().weight.requires_grad_(True)
        else:
            model.add_lora(LoRAConfig(r=2, target_modules="all-linear", **changes))
        sizes[name] = kept(model.train(), inputs)
    config = peft.LoraConfig(r=2, target_modules="all-linear", velora_config=settings)
    sizes["peft"] = kept(peft.get_peft_model(tiny("llama"), config).train(), inputs)
    assert sizes["velora"] < sizes["lora"]
    assert sizes["velora"] <= sizes["peft"]


def test_half_precision_and_autocast(tiny, batch):
    whole = made(tiny).train()
    inputs = batch(whole)
    whole(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = gradients(whole)
    for how in ("bfloat16", "autocast"):
        model = made(tiny).train()
        if how == "bfloat16":
            model.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        for name, grad in gradients(model).items():
            assert (grad.float() - expected[name]).norm() < 0.1 * expected[name].norm(), (how, name)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_and_dropout(tiny, batch, reentrant, kind):
    found = []
    for checkpointed in (False, True):
        model = made(tiny, dropout=0.3, velora_config={"init_type": kind}).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        inputs = batch(model)
        torch.manual_seed(1)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append((gradients(model), projections(model)))
    close(found[1][0], found[0][0])
    close(found[1][1], found[0][1])


def test_compiled(tiny):
    torch.compiler.reset()
    net = nn.ModuleDict({"proj": nn.Linear(12, 9)})
    add(net, LoRAConfig(r=3, target_modules=["proj"], init="off", velora_config={"num_groups": 3}))
    x, found = torch.randn(4, 12), []

    def run(x):
        return net["proj"](x).square().sum()

    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        net.train().zero_grad()
        function(x).backward()
        found.append(gradients(net))
    close(*found)


def test_two_forwards_before_a_backward(tiny, batch):
    model = made(tiny).train()
    losses = [model(**(i := batch(model, seed=seed)), labels=i["input_ids"]).loss for seed in (0, 1)]
    sum(losses).backward()
    together = gradients(model)
    model.zero_grad()
    for seed in (0, 1):
        inputs = batch(model, seed=seed)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    close(together, gradients(model))


def test_with_other_variants(tiny, batch):
    config = {"target_modules": "all-linear", "r": 8, "alpha": 32, "dropout": 0.05}
    model = made(tiny, **config, use_dora=True, lora_bias=True, init="orthogonal", use_rslora=True).train()
    inputs, losses = batch(model), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


# ---- verbs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_files_go_both_ways_and_training_goes_on(tiny, batch, peft, tmp_path, kind):
    config = peft.LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights=False, velora_config={"num_groups": 4, "init_type": kind}
    )
    theirs = peft.get_peft_model(tiny("llama"), config)
    inputs = batch(theirs)
    theirs(**inputs, labels=inputs["input_ids"]).loss.backward()
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny("llama")
    model.load_lora(tmp_path / "theirs", name="default", trainable=True)
    embeds = [b for n, b in theirs.named_buffers() if "velora_embed" in n]
    held = projections(model)
    assert len(held) == len(embeds) == 6
    assert all(torch.equal(mine, other) for mine, other in zip(held.values(), embeds, strict=True))
    assert torch.allclose(logits(model.eval(), inputs), logits(theirs.eval(), inputs), atol=1e-5)
    other = batch(model, seed=3)
    model.train()(**other, labels=other["input_ids"]).loss.backward()
    followed = [not torch.equal(held[n], v) for n, v in projections(model).items()]
    assert all(followed) if kind == "batch_average" else not any(followed)
    model.save_lora(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "ours"), is_trainable=True)
    assert torch.allclose(logits(again.eval(), other), logits(model.eval(), other), atol=1e-5)
    assert all(
        torch.equal(mine, b)
        for mine, b in zip(
            projections(model).values(), (b for n, b in again.named_buffers() if "embed" in n), strict=True
        )
    )


def test_frozen_it_is_plain_lora_in_every_verb(tiny, batch, tmp_path):
    model = made(tiny, dropout=0.1)
    base, inputs = bits(tiny("llama")), batch(model)
    value = model.lora_adapter("default")
    plain = value.config.replace(velora_config=None)
    pairs = {path: type(f)(f.kind, f.A, f.B, f.alpha) for path, f in value.factors.items()}
    model.remove_lora()
    assert bits(model) == base
    model.load_lora(type(value)(plain, pairs), name="plain")
    model.load_lora(value, name="velora")
    assert model.lora_adapter("velora").equal(value)
    found = []
    for name in ("plain", "velora"):
        model.set_lora({name: 0.5})
        found.append([logits(model, inputs)])
        with model.route_lora([name, None]):
            found[-1].append(logits(model, inputs))
        model.set_lora(name)
        model.merge_lora()
        found[-1].append(logits(model, inputs))
        model.unmerge_lora()
    assert all(torch.equal(mine, other) for mine, other in zip(*found, strict=True))
    model.remove_lora()
    assert bits(model) == base
    value.save(tmp_path)
    assert type(value).load(tmp_path).equal(value)
    shorter = value.truncate(rank=2)
    assert shorter.config.velora_config is None
    assert shorter.factors.keys() == value.factors.keys()


def test_slices_of_a_fused_layer_have_pefts_gradients(tiny, batch, peft, tmp_path):
    model = made(tiny, "gpt2", ["q", "v"])
    model.save_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("gpt2"), str(tmp_path), is_trainable=True)
    inputs, found = batch(model), []
    for each in (model, theirs):
        for module in each.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({name: grad for name, grad in gradients(each).items() if ".A0" in name})
    close(*found)


def test_resume_in_trainer_is_bit_exact(tiny, tmp_path):
    def run(resume=None, folder="whole"):
        model = tiny("llama")
        torch.manual_seed(2)
        settings = {"num_groups": 4, "init_type": "batch_average_once"}  # found in the first batch alone
        model.add_lora(LoRAConfig(r=4, dropout=0.1, target_modules=TARGETS, velora_config=settings))
        trainer(model, tmp_path / folder, train_dataset=rows()).train(resume_from_checkpoint=resume)
        return model.lora_adapter("default")

    whole = run()
    again = run(str(tmp_path / "whole" / "checkpoint-4"), "again")
    assert whole.equal(again)
    assert all(abs(float(f.extras["projection"].norm()) - 1) < 1e-5 for f in whole.factors.values())


def test_refusals(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    for bad in ({"num_groups": 0}, {"scale": 0}, {"init_type": "mean"}, {"groups": 3}, True):
        with pytest.raises(LoRAConfigError, match="velora_config"):
            LoRAConfig(velora_config=bad)
    with pytest.raises(LoRAConfigError, match="freeze_a"):
        LoRAConfig(velora_config={}, freeze_a=True)
    with pytest.raises(LoRAUnsupportedError, match="velora_config"):
        tiny("llama").add_lora(LoRAConfig(r=2, target_modules=["embed_tokens"], velora_config={}))
    made(tiny).save_lora(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if "velora" in key)
    for changed, match in (
        ({k: v for k, v in tensors.items() if k != name}, "lora_velora_embed, which velora_config needs"),
        (tensors | {name: tensors[name][1:]}, "should be a floating"),
    ):
        save_file(changed, path)
        with pytest.raises(LoRAFileError, match=match):
            tiny("llama").load_lora(tmp_path)
