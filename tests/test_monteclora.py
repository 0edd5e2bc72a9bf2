"""MonteCLoRA: what it draws against PEFT's module with the same numbers, its loss in float64, and every verb."""

from __future__ import annotations

import math

import pytest
import torch
from loras import bits, logits, randomise
from torch import nn
from training import options, rows

import hf_lora
from hf_lora import LoRAConfig
from hf_lora.errors import LoRAConfigError, LoRAFileError, LoRAStateError, LoRAUnsupportedError
from hf_lora.model import add
from hf_lora.variants.monteclora import draw, expert_weights

TARGETS = ["q_proj", "v_proj", "down_proj"]


def made(tiny, targets=TARGETS, seed=0, **changes):
    settings = {"num_samples": 3, "sample_scaler": 0.05, "kl_loss_weight": 0.01, **changes.pop("monteclora_config", {})}
    model = tiny("llama")
    torch.manual_seed(seed)
    model.add_lora(LoRAConfig(r=4, alpha=6, target_modules=targets, monteclora_config=settings, **changes))
    randomise(model, seed)
    return model


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(mine, theirs, tolerance=1e-5):
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_a_draw_is_pefts_of_the_same_numbers(peft):
    from peft.tuners.lora.monteclora import MontecloraSampler

    torch.manual_seed(0)
    rank, inner, n = 4, 7, 3
    sampler = MontecloraSampler(inner, rank, n, sample_scaler=0.3, buffer_size=1, device="cpu")
    A, z, chi = torch.randn(rank, inner), torch.randn(rank, inner), torch.randn(rank, rank).square().sum(0)
    noise = torch.randn(n)
    own = [tensor.detach().clone().requires_grad_() for tensor in (A, sampler.std_prior, sampler.expert_weights_prior)]
    drawn = draw(own[0], own[1], own[2], z, torch.cat([chi, noise]), 0.3)

    weights = expert_weights(own[2], noise).detach()  # Σ wₖ Zₖ = ‖w‖ Z where Zₖ = Z wₖ / ‖w‖
    sampler.sampler.buffer = [
        {
            "z_mvn": z.T[None] * (weights / weights.norm())[:, None, None],
            "z_wishart": torch.diag(chi),
            "z_dirichlet": noise,
        }
    ]
    sampler.sampler.index, theirs = 0, A.clone().requires_grad_()
    varied, w = sampler.train()()
    assert torch.allclose(w, weights, atol=1e-6)
    expected = torch.einsum("n,nij->ij", w, theirs.T + varied).T  # MontecloraLinearVariant.forward
    assert torch.allclose(drawn, expected, atol=1e-6)
    g = torch.randn(rank, inner)
    drawn.backward(g)
    expected.backward(g)
    for mine, other in zip(own, (theirs, sampler.std_prior, sampler.expert_weights_prior), strict=True):
        assert other.grad.abs().max() > 0
        assert torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_the_law_is_that_of_n_draws():
    # One draw of size ‖w‖ for n draws with weights w: mean A, variance s² ‖w‖² v in every entry.
    torch.manual_seed(0)
    net = nn.ModuleDict({"proj": nn.Linear(6, 5)})
    settings = {"num_samples": 3, "sample_scaler": 0.5}
    add(net, LoRAConfig(r=2, target_modules=["proj"], init="off", monteclora_config=settings))
    slots, x, seen, chi = net["proj"].lora_slots, torch.eye(6), [], []
    A, B, deviation = (slots.get_parameter(f"{name}0").detach() for name in ("A", "B", "deviation"))
    slots.get_parameter("experts0").data.zero_()
    back = torch.linalg.pinv(B.T)
    net.train()
    with torch.no_grad():
        plain = net.eval()["proj"](x) - x @ A.T @ B.T * slots.slots[0].scaling
        net.train()
        for _ in range(4000):
            seen.append(((net["proj"](x) - plain) @ back / slots.slots[0].scaling).T)  # A' (R, in)
            chi.append(slots.get_buffer("noise0")[:2].clone())
    seen, chi = torch.stack(seen), torch.stack(chi)
    assert torch.allclose(seen.mean(0), A, atol=0.1)
    assert abs(float(chi.mean()) - 2) < 0.1
    assert abs(float(chi.var()) - 4) < 0.6  # χ² of 2 degrees of freedom
    weights = torch.stack([expert_weights(torch.zeros(3), torch.randn(3)).square().sum() for _ in range(4000)]).mean()
    expected = 0.25 * weights * torch.exp(2 * deviation) * 2
    assert torch.allclose((seen - A).square().mean((0, 2)), expected, rtol=0.1)


def test_the_loss_is_the_formula_and_pefts(tiny, batch, peft, tmp_path):
    model = made(tiny, monteclora_config={"use_entropy": True, "dirichlet_prior": 0.4}).train()
    with pytest.raises(LoRAStateError, match="after the model's forward"):
        hf_lora.monteclora_loss(model)
    inputs = batch(model)
    model(**inputs)
    loss = hf_lora.monteclora_loss(model)
    loss.backward()
    model.save_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path), is_trainable=True).train()
    expected, count = torch.zeros((), dtype=torch.float64), 0
    for path, module in model.named_modules():
        if not path.endswith(".lora_slots"):
            continue
        chi, own = module.get_buffer("noise0").double().split([4, 3])
        sampler = theirs.get_submodule("base_model.model." + path.removesuffix(".lora_slots"))
        sampler = sampler.lora_monteclora_sampler["default"]
        sampler.sampler.buffer = [
            {"z_mvn": torch.zeros(3, 1, 4), "z_wishart": torch.diag(chi.float()), "z_dirichlet": own.float()}
        ]
        sampler.sampler.index = 0
        sampler()
        # the formula, in float64
        sigma, pi = (module.get_parameter(f"{name}0").detach().double() for name in ("deviation", "experts"))
        alpha, beta = [math.exp(p) for p in pi.tolist()], 0.4
        kl = math.lgamma(sum(alpha)) - math.lgamma(3 * beta) + sum(math.lgamma(a) - math.lgamma(beta) for a in alpha)
        psi = torch.digamma(torch.tensor([*alpha, sum(alpha)], dtype=torch.float64)).tolist()
        kl += sum((a - beta) * (p - psi[-1]) for a, p in zip(alpha, psi, strict=False))
        kl += 0.5 * 4 * sum(math.exp(2 * s) - 2 * s - 1 for s in sigma.tolist())
        v = [max(math.exp(2 * s) * c, 1e-3) for s, c in zip(sigma.tolist(), chi.tolist(), strict=True)]
        kl += 0.5 * 3 * sum(x - math.log(x) - 1 for x in v)
        logs = [math.log(a) for a in alpha]
        spread = [1 / a / 3 + sum(1 / b for b in alpha) / 9 + 1e-6 for a in alpha]
        raw = [log - sum(logs) / 3 + d**0.5 * e for log, d, e in zip(logs, spread, own.tolist(), strict=True)]
        w = torch.tensor(raw, dtype=torch.float64).softmax(0)
        expected, count = expected + 0.01 * kl + w.square().sum(), count + 1
    assert math.isclose(float(loss.detach()), float(expected) / count, rel_tol=1e-5)
    other = theirs._get_monteclora_loss()
    assert math.isclose(float(loss.detach()), float(other.detach()), rel_tol=1e-5)
    other.backward()
    for name, parameter in model.named_parameters():
        for mine, key in (("deviation0", "std_prior"), ("experts0", "expert_weights_prior")):
            if name.endswith(f".{mine}"):
                path = name.replace(f"lora_slots.{mine}", f"lora_monteclora_sampler.default.{key}")
                grad = theirs.get_parameter(f"base_model.model.{path}").grad
                assert torch.allclose(parameter.grad, grad, rtol=1e-3, atol=1e-6), name
    model.eval()
    assert float(hf_lora.monteclora_loss(model)) == 0
    model.train_lora([])
    with pytest.raises(LoRAStateError, match="monteclora_config trains"):
        hf_lora.monteclora_loss(model)


def test_it_learns_the_deviations_and_the_loss_falls(tiny, batch):
    model = made(tiny, "all-linear", dropout=0.1, use_dora=True).train()
    inputs, losses = batch(model), []
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        (loss + hf_lora.monteclora_loss(model)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert {n.rpartition(".")[2] for n in start} == {"A0", "B0", "magnitude0", "deviation0", "experts0"}
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters() if n in start)


# ---- graphs, checkpoints, dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("changes", [{}, {"velora_config": {"num_groups": 4}}], ids=["alone", "with velora"])
def test_a_checkpointed_region_draws_what_it_drew(tiny, batch, reentrant, changes):
    found = []
    for checkpointed in (False, True):
        model = made(tiny, dropout=0.2, **changes).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        inputs = batch(model)
        torch.manual_seed(1)
        loss = model(**inputs, labels=inputs["input_ids"]).loss + hf_lora.monteclora_loss(model)
        loss.backward()
        found.append(gradients(model))
    close(found[1], found[0])


def test_two_losses_before_a_backward(tiny, batch):
    model, total = made(tiny).train(), 0
    for seed in (0, 1):
        inputs = batch(model, seed=seed)
        total = total + model(**inputs, labels=inputs["input_ids"]).loss + hf_lora.monteclora_loss(model)
    total.backward()  # the second forward did not change what the first loss was of
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_compiled():
    torch.compiler.reset()
    torch.manual_seed(0)
    net = nn.ModuleDict({"proj": nn.Linear(12, 9)})
    settings = {"num_samples": 3, "sample_scaler": 0.1}
    add(net, LoRAConfig(r=3, target_modules=["proj"], init="off", monteclora_config=settings))
    x, found = torch.randn(4, 12), []

    def run(x):
        return net["proj"](x).square().sum()

    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        net.train().zero_grad()
        torch.manual_seed(3)
        function(x).backward()
        found.append(gradients(net))
    close(*found)
    assert all(grad.abs().max() > 0 for grad in found[0].values())


def test_half_a_base_draws_in_float32(tiny, batch):
    model = made(tiny).to(torch.bfloat16).train()
    model.remove_lora()
    model.add_lora(LoRAConfig(r=4, target_modules=TARGETS, monteclora_config={"num_samples": 2}))
    inputs = batch(model)
    loss = model(**inputs, labels=inputs["input_ids"]).loss + hf_lora.monteclora_loss(model)
    loss.backward()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(grad.isfinite().all() for grad in gradients(model).values())


# ---- verbs -----------------------------------------------------------------------------------------------------------


def test_files_go_both_ways(tiny, batch, peft, tmp_path, recwarn):
    from peft.tuners.lora import MontecloraConfig

    config = peft.LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights=False, monteclora_config=MontecloraConfig(num_samples=3)
    )
    theirs = peft.get_peft_model(tiny("llama"), config).train()
    inputs = batch(theirs)
    theirs(**inputs, labels=inputs["input_ids"]).loss.backward()  # its buffers hold a draw
    theirs.eval().save_pretrained(tmp_path / "theirs")
    model = tiny("llama")
    model.load_lora(tmp_path / "theirs", name="default", trainable=True)
    model.load_lora(tmp_path / "theirs", name="frozen")
    for name in ("default", "frozen"):
        model.set_lora(name)
        assert torch.allclose(logits(model, inputs), logits(theirs, inputs), atol=1e-5)
    value = model.lora_adapter("default")
    assert value.config.monteclora_config["num_samples"] == 3
    for path, factors in value.factors.items():
        sampler = theirs.get_submodule(f"base_model.model.{path}").lora_monteclora_sampler["default"]
        assert torch.equal(factors.extras["deviation"], sampler.std_prior)
        assert torch.equal(factors.extras["experts"], sampler.expert_weights_prior)
    assert model.lora_adapter("frozen").equal(value)
    model.lora_adapter("default").save(tmp_path / "ours")
    recwarn.clear()
    again = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "ours"), is_trainable=True)
    assert not [w for w in recwarn if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]
    assert torch.allclose(logits(again.eval(), inputs), logits(theirs, inputs), atol=1e-5)
    again.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    # a training checkpoint of PEFT's, with the adapter's name in its keys
    state = {n: t for n, t in theirs.state_dict().items() if "lora_" in n}
    named = hf_lora.LoRAAdapter.load(tmp_path / "theirs")
    from hf_lora.layout import from_state_dict

    assert from_state_dict(named.config, state).factors.keys() == value.factors.keys()


def test_in_eval_and_frozen_it_is_plain_lora(tiny, batch, tmp_path):
    model = made(tiny, dropout=0.1)
    base, inputs = bits(tiny("llama")), batch(model)
    value = model.lora_adapter("default")
    pairs = {path: type(f)(f.kind, f.A, f.B, f.alpha) for path, f in value.factors.items()}
    expected = tiny("llama")
    expected.load_lora(type(value)(value.config.replace(monteclora_config=None), pairs), name="plain")
    assert torch.allclose(logits(model, inputs), logits(expected, inputs), atol=1e-6)  # trainable, in eval mode
    model.train_lora([])
    assert model.lora_adapter("default").equal(value)
    found = []
    for each, name in ((expected, "plain"), (model, "default")):
        each.train()
        torch.manual_seed(0)
        found.append([logits(each, inputs)])  # dropout, and no draw
        each.eval()
        with each.route_lora([None, name]):
            found[-1].append(logits(each, inputs))
        each.set_lora({name: -0.5})
        found[-1].append(logits(each, inputs))
        each.set_lora(name)
        each.merge_lora()
        found[-1].append(logits(each, inputs))
        each.unmerge_lora()
    assert all(torch.equal(mine, other) for mine, other in zip(*found, strict=True))
    model.remove_lora()
    assert bits(model) == base
    value.save(tmp_path)
    assert type(value).load(tmp_path).equal(value)
    both = hf_lora.combine([value, value], [0.5, 0.5])
    assert both.config.monteclora_config is None


def test_rows_and_mixtures_in_training(tiny, batch):
    model = made(tiny).train()
    model.add_lora(LoRAConfig(r=2, target_modules=TARGETS), "plain", trainable=False, active=False)
    inputs = batch(model)
    for parameter in model.parameters():
        parameter.grad = None
    with model.route_lora(["default", None]):
        output = model(**inputs).logits
    output.sum().backward()
    assert torch.equal(output[1], logits(tiny("llama"), inputs)[1])
    assert any(grad.abs().max() > 0 for name, grad in gradients(model).items() if "deviation" in name)
    model.set_lora({"default": 0.5, "plain": 0.5})
    first, second = (logits(model, inputs) for _ in range(2))
    assert not torch.equal(first, second)


def test_resume_in_trainer_is_bit_exact(tiny, tmp_path):
    from transformers import Trainer, TrainingArguments

    class WithLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = loss + hf_lora.monteclora_loss(model)
            return (loss, outputs) if return_outputs else loss

    def run(resume=None, folder="whole"):
        model = tiny("llama")
        torch.manual_seed(2)
        settings = {"num_samples": 3, "sample_scaler": 0.05}
        model.add_lora(LoRAConfig(r=4, dropout=0.1, target_modules=TARGETS, monteclora_config=settings))
        arguments = TrainingArguments(str(tmp_path / folder), **options())
        WithLoss(model, arguments, train_dataset=rows()).train(resume_from_checkpoint=resume)
        return model.lora_adapter("default")

    whole = run()
    assert whole.equal(run(str(tmp_path / "whole" / "checkpoint-4"), "again"))


def test_refusals(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    for bad in ({"num_samples": 0}, {"dirichlet_prior": 0}, {"sample_scaler": -1}, {"use_entropy": 1}, {"samples": 3}):
        with pytest.raises(LoRAConfigError, match="monteclora_config"):
            LoRAConfig(monteclora_config=bad)
    with pytest.raises(LoRAConfigError, match="freeze_a"):
        LoRAConfig(monteclora_config={}, freeze_a=True)
    with pytest.raises(LoRAConfigError, match="monteclora_config"):
        tiny("llama").add_lora(LoRAConfig(r=2, target_modules=["q_proj"], monteclora_config={}, init="pissa"))
    with pytest.raises(LoRAUnsupportedError, match="monteclora_config"):
        tiny("llama").add_lora(LoRAConfig(r=2, target_modules=["embed_tokens"], monteclora_config={}))
    made(tiny).save_lora(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if "std_prior" in key)
    other = next(key for key in tensors if "expert_weights_prior" in key)
    for changed, match in (
        ({k: v for k, v in tensors.items() if k != name}, "std_prior, which monteclora_config needs"),
        (tensors | {other: tensors[other][1:]}, "should be a floating"),
    ):
        save_file(changed, path)
        with pytest.raises(LoRAFileError, match=match):
            tiny("llama").load_lora(tmp_path)
    made(tiny).save_lora(tmp_path)
