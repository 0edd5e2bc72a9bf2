"""Rank schedules: importance against a float64 reference, ranks that go where they are needed, cuts, resumed runs."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from loras import logits, randomise
from safetensors.torch import load_file
from torch import nn
from training import same, trainer

import hf_lora
from hf_lora import LoRAConfig, RankAllocator, RankCallback
from hf_lora.errors import LoRAConfigError, LoRAFileError, LoRANameError, LoRAStateError, LoRAUnsupportedError
from hf_lora.model import add, read

TRUE = {"a": 3, "b": 1, "c": 0}  # the rank of the change that each layer needs


class Apart(nn.Module):
    """Three layers side by side, each with an input of its own."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleDict({name: nn.Linear(10, 8) for name in TRUE})
        self.wanted = {}
        for name, rank in TRUE.items():
            change = torch.randn(8, rank) @ torch.randn(rank, 10) / max(rank, 1) ** 0.5
            self.wanted[name] = self.layers[name].weight.detach() + change

    def loss(self, n=32):
        total = 0
        for name, layer in self.layers.items():
            x = torch.randn(n, 10)
            total = total + (layer(x) - x @ self.wanted[name].T - layer.bias).square().mean()
        return total


def apart(r=4, **config):
    model = Apart()
    add(model, LoRAConfig(r=r, alpha=r, target_modules=["a", "b", "c"], **config))
    return model


def pairs(model):
    return {
        path: tuple(model.get_parameter(f"{path}.lora_slots.{side}0") for side in "AB")
        for path in ("layers.a", "layers.b", "layers.c")
    }


def optimizer_of(model, lr=2e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def run(model, allocator, steps, optimizer, first=1):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        loss = model.loss()
        loss.backward()
        allocator.observe()
        optimizer.step()
        allocator.step(step, optimizer)
        optimizer.zero_grad()
    return float(loss.detach())


# ---- importance and schedule -----------------------------------------------------------------------------------------


def test_sensitivity_is_the_papers_formula():
    model = apart()
    randomise(model)
    allocator = RankAllocator(model, target_rank=5 / 3, end=6, every=1, beta1=0.8, beta2=0.7)
    smooth, spread = {}, {}
    for _ in range(4):
        model.zero_grad()
        model.loss().backward()
        allocator.observe()
        for path, pair in pairs(model).items():
            for side, parameter in zip("AB", pair, strict=True):
                key, seen = (path, side), (parameter * parameter.grad).detach().double().abs()
                smooth[key] = 0.8 * smooth.get(key, 0) + 0.2 * seen
                spread[key] = 0.7 * spread.get(key, 0) + 0.3 * (seen - smooth[key]).abs()
        optimizer_of(model).step()
    scores = {
        path: (smooth[path, "A"] * spread[path, "A"]).mean(1) + (smooth[path, "B"] * spread[path, "B"]).mean(0)
        for path in pairs(model)
    }
    allocator.step(6)
    cutoff = torch.cat(list(scores.values())).sort(descending=True).values[4]
    assert {path: kept.tolist() for path, kept in allocator.kept.items()} == {
        path: (own >= cutoff).tolist() for path, own in scores.items()
    }
    found = allocator._criterion.scores(allocator._pairs, None)
    for path, own in scores.items():
        assert torch.allclose(found[path], own, rtol=1e-4)


def test_the_schedule_is_pefts_and_met_exactly(peft):
    from peft.tuners.adalora.layer import RankAllocator as Theirs

    model = apart()
    allocator = RankAllocator(model, target_rank=4 / 3, begin=3, end=19, every=4)
    assert (allocator.parts, allocator.target) == (12, 4)
    theirs = object.__new__(Theirs)
    theirs.peft_config = SimpleNamespace(tinit=3, tfinal=5, total_step=24, deltaT=4)
    theirs.init_bgt, theirs.target_bgt = 12, 4
    optimizer = optimizer_of(model)
    for step in range(1, 25):
        run(model, allocator, 1, optimizer, step)
        budget, allocated = theirs.budget_schedule(step)
        if allocated:
            assert sum(allocator.ranks.values()) == budget == allocator.left(step)
            zero = [int((~B.detach().any(0)).sum()) for _, B in pairs(model).values()]
            assert sum(zero) == 12 - budget
        elif step <= 3:
            assert sum(allocator.ranks.values()) == 12
    assert allocator.cuttable


@pytest.mark.parametrize("importance", ["sensitivity", "spectrum"])
def test_ranks_go_where_they_are_needed(importance):
    model = apart()
    allocator = RankAllocator(model, target_rank=4 / 3, begin=40, end=160, every=10, importance=importance)
    optimizer = optimizer_of(model)
    loss = run(model, allocator, 240, optimizer)
    assert allocator.ranks == {f"layers.{name}": rank for name, rank in TRUE.items()}
    assert loss < 0.02
    if importance == "spectrum":  # where a pair was turned, an average of its gradients is of another pair
        allocator.settled = False
        allocator.step(240, optimizer)
        assert not optimizer.state
    uniform = apart(r=1)
    for step in range(1, 241):
        torch.manual_seed(step)
        own = uniform.loss()
        own.backward()
        opt = optimizer_of(uniform) if step == 1 else opt  # noqa: F821
        opt.step()
        opt.zero_grad()
    assert float(own.detach()) > 10 * loss  # rank 1 everywhere


def test_energy_keeps_its_share_of_each_layer():
    model = apart()
    values = {"a": [3.0, 2.0, 1.0, 0.1], "b": [1.0, 0.01, 0.01, 0.0], "c": [2.0, 2.0, 2.0, 2.0]}
    before = {}
    for name, (A, B) in zip(values, pairs(model).values(), strict=True):
        mixed = torch.linalg.qr(torch.randn(4, 4)).Q  # the parts are not the singular directions
        u, v = (torch.linalg.qr(torch.randn(n, 4)).Q for n in (8, 10))
        B.data.copy_(u * torch.tensor(values[name]) @ mixed)
        A.data.copy_(mixed.T @ v.T)
        before[name] = (B @ A).detach()
    allocator = RankAllocator(model, energy=0.99, end=1, importance="spectrum")
    allocator.step(1)
    assert allocator.ranks == {"layers.a": 3, "layers.b": 1, "layers.c": 4}
    ranks = allocator.cut()
    assert ranks == {"layers.a": 3, "layers.b": 1, "layers.c": 4}
    for path, f in read(model, "default").factors.items():
        own = before[path.rpartition(".")[2]]
        assert (f.delta() - own).square().sum() <= 0.01 * own.square().sum() + 1e-6
    assert read(model, "default").factors["layers.a"].scaling == 1


# ---- the cut ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_training_goes_on_after_a_cut_as_without(rslora):
    found = []
    for cut in (False, True):
        model = apart(use_rslora=rslora)
        allocator = RankAllocator(model, target_rank=4 / 3, begin=2, end=30, every=5)
        optimizer = optimizer_of(model)
        run(model, allocator, 30, optimizer)
        if cut:
            before = {path: f.delta() for path, f in read(model, "default").factors.items()}
            ranks = allocator.cut(optimizer)
            assert sum(ranks.values()) == 4
            for path, f in read(model, "default").factors.items():
                assert torch.allclose(f.delta(), before[path], atol=1e-6)
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert held == {id(p) for p in model.parameters() if p.requires_grad}
            assert {id(p) for p in optimizer.state} == held
        run(model, allocator, 10, optimizer, 31)
        found.append({path: f.delta() for path, f in read(model, "default").factors.items() if f.B.any()})
    assert found[0].keys() == found[1].keys()
    for path, own in found[0].items():
        assert torch.allclose(found[1][path], own, atol=1e-5)


def test_peft_loads_what_was_cut(tiny, batch, peft, tmp_path):
    model = tiny("llama")
    config = LoRAConfig(r=4, alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], freeze_a=True, dropout=0.1)
    model.add_lora(config)
    randomise(model)
    with torch.no_grad():  # a layer that did nothing
        model.get_parameter("model.layers.1.self_attn.v_proj.lora_slots.B0").zero_()
        model.get_parameter("model.layers.0.self_attn.q_proj.lora_slots.B0")[:, 0] *= 20  # and one with one direction
    allocator = RankAllocator(model, energy=0.8, end=2, importance="spectrum")
    allocator.step(2)
    expected, inputs = logits(model, batch(model)), batch(model)
    ranks = allocator.cut()
    assert len(ranks) == 5
    assert len(set(ranks.values())) > 1
    assert "model.layers.1.self_attn.v_proj" not in ranks
    assert torch.allclose(logits(model, inputs), expected, atol=1e-5)
    assert model.active_lora == "default"
    model.save_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()
    assert torch.allclose(logits(theirs, inputs), expected, atol=1e-5)
    again = tiny("llama")
    again.load_lora(tmp_path)
    assert {path: f.rank for path, f in again.lora_adapter(again.active_lora).factors.items()} == ranks
    loaded = hf_lora.LoRAAdapter.load(tmp_path).config
    assert loaded.rank_pattern
    model.lora_adapter("default").save(tmp_path / "value")  # which knows no model, and names the layers that are left
    again.load_lora(tmp_path / "value", name="value")
    assert model.lora_adapter("default").config.freeze_a


# ---- Trainer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"target_rank": 1.5}, {"target_rank": 1.5, "importance": "spectrum"}, {"energy": 0.8, "importance": "spectrum"}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_resumed_run_is_the_run_without_a_break(tiny, tmp_path, options):
    def run(resume=None, folder="whole"):
        model = tiny("llama")
        torch.manual_seed(3)
        model.add_lora(LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], dropout=0.1))
        callback = RankCallback(**options, begin=0.1, end=0.8, every=1)
        given = {"callbacks": [callback], "save_steps": 1}
        trainer(model, tmp_path / folder, **given).train(resume_from_checkpoint=resume)
        return model.lora_adapter("default"), callback.allocator.ranks

    whole, ranks = run()
    assert {path: f.rank for path, f in whole.factors.items()} == ranks
    if "target_rank" in options:
        assert sum(ranks.values()) == 6
    for step in (1, 3, 5) if options == {"target_rank": 1.5} else (3,):  # before the schedule moves, in it, after it
        again, found = run(str(tmp_path / "whole" / f"checkpoint-{step}"), f"again{step}")
        assert found == ranks
        assert again.equal(whole)
        state, other = (
            load_file(tmp_path / name / "checkpoint-6" / "rank_schedule.safetensors")
            for name in ("whole", f"again{step}")
        )
        assert same(state, other)


def test_what_does_not_fit_the_schedule_is_said(tiny, tmp_path, caplog):
    def made():
        model = tiny("llama")
        model.add_lora(LoRAConfig(r=2, target_modules=["q_proj"]))
        return model

    model = made()
    callback = RankCallback(target_rank=1, begin=0, end=1)
    run = trainer(model, tmp_path / "run", callbacks=[callback], max_steps=2)
    with caplog.at_level(logging.WARNING, "hf_lora"):
        model.get_parameter("model.layers.0.self_attn.q_proj.lora_slots.B0").data.fill_(1)
        run.add_callback(type("Stop", (type(callback).__mro__[1],), {"on_step_end": _stop})())
        run.train()
    assert "not cut" in caplog.text
    assert {f.rank for f in model.lora_adapter("default").factors.values()} == {2}
    trainer(made(), tmp_path / "plain", max_steps=2).train()
    with pytest.raises(LoRAFileError, match="rank_schedule"):
        trainer(made(), tmp_path / "plain", callbacks=[RankCallback(target_rank=1)], max_steps=4).train(
            resume_from_checkpoint=True
        )


def _stop(self, args, state, control, **kwargs):
    control.should_training_stop = True


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(tiny):
    model = apart()
    for bad in (
        {},
        {"target_rank": 1, "energy": 0.9},
        {"target_rank": 0},
        {"target_rank": 5},
        {"energy": 1.5},
        {"target_rank": 1, "every": 0},
        {"target_rank": 1, "importance": "loss"},
        {"target_rank": 1, "beta1": 1},
        {"target_rank": 1, "begin": 9},
    ):
        with pytest.raises(LoRAConfigError):
            RankAllocator(model, **{"end": 9, **bad})
    with pytest.raises(LoRAConfigError):
        RankCallback(target_rank=1, begin=0.5, end=0.5)
    with pytest.raises(LoRAStateError, match="not settled"):
        RankAllocator(model, target_rank=1, end=9).cut()
    add(model, LoRAConfig(r=2, target_modules=["a"]), "other", active=False)
    with pytest.raises(LoRANameError, match="nobody"):
        RankAllocator(model, target_rank=1, end=9, adapter="nobody")
    for config in (
        {"target_modules": ["q", "v"]},
        {"target_modules": ["c_fc"], "init": "pissa"},
        {"target_modules": ["c_fc"], "monteclora_config": {}},
    ):
        gpt2 = tiny("gpt2")
        gpt2.add_lora(LoRAConfig(r=2, **config))
        with pytest.raises(LoRAUnsupportedError):
            RankAllocator(gpt2, target_rank=1, end=9)
