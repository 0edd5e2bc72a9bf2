"""LoftQ: against bitsandbytes' published numbers, PEFT on a base that was rounded apart, and float64 formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loras import bits, logits

from hf_lora import LoRAAdapter, LoRAConfig
from hf_lora.model import read
from hf_lora.rounding import Rounding, low_rank, normal_float, rounded

torch.set_num_threads(1)

# The sixteen numbers of NF4, as QLoRA's appendix E prints them and bitsandbytes has them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
QV = {"r": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj", "up_proj"]}  # s = 2, which PEFT's start forgets
PEFT = {"r": 4, "lora_alpha": 8, "target_modules": QV["target_modules"]}


def nearest(weight: torch.Tensor, code: tuple[float, ...] = NF4) -> torch.Tensor:
    """W rounded in blocks of 64 to the nearest of the numbers, by looking at all of them; float64."""
    flat = weight.detach().double().reshape(-1)
    found = []
    for block in flat.split(64):
        most = block.abs().max()
        numbers = torch.tensor(code, dtype=torch.float64) * most
        found.append(numbers[(block[:, None] - numbers).abs().argmin(1)])
    return torch.cat(found).view(weight.shape)


def of(model: Any, path: str) -> torch.Tensor:
    weight: torch.Tensor = model.get_submodule(path).weight.detach()
    return weight


def close(mine: torch.Tensor, other: torch.Tensor, within: float = 1e-5) -> bool:
    return float((mine - other).abs().max()) <= within * float(other.abs().max())


def added(model: Any, name: str = "default", **fields: Any) -> Any:
    options = {"loftq_bits": 4, "loftq_iter": 1}
    model.add_lora(LoRAConfig(**{**QV, "init": "loftq", "init_options": options, **fields}), name)
    return model


def on_rounded_base(peft: Any, model: Any, base: Any, folder: Any) -> Any:
    """PEFT's model of the same factors on a base whose weights were replaced by Q, which is what PEFT's LoftQ does."""
    value = read(model, model.lora_names[0])
    for path in value.factors:
        own = base.get_submodule(path)
        own.weight.data = nearest(own.weight).to(own.weight.dtype)
    plain = LoRAAdapter(value.config.replace(init="kaiming", init_options={}), value.factors)
    plain.save(folder)
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def steps(model: Any, inputs: Any, n: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(n):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


# ---- rounding --------------------------------------------------------------------------------------------------------


def test_normal_float_is_what_was_published():
    assert torch.allclose(normal_float(4), torch.tensor(NF4), atol=2e-7, rtol=0)
    assert normal_float(2).tolist() == pytest.approx([-1.0, 0.0, 0.33791524, 1.0], abs=1e-6)


@pytest.mark.parametrize("shape", [(8, 64), (6, 50), (3, 7)])
def test_rounding_takes_the_nearest_of_each_block(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    W[0] = 0
    assert torch.allclose(rounded(W, 4).double(), nearest(W), atol=1e-6)
    assert torch.equal(rounded(rounded(W, 4), 4), rounded(W, 4))
    half = W.half().double()
    step = half.abs().amax(1, keepdim=True) / 127
    eight = torch.where(step > 0, torch.round(half / step.clamp_min(1e-30)) * step, 0 * half)
    assert torch.allclose(rounded(W, 8).double(), eight, atol=1e-6)


def test_iterations_and_rank_bring_it_nearer():
    W = torch.randn(48, 128, generator=torch.Generator().manual_seed(1)) * 0.02
    plain = float((W - rounded(W, 4)).norm())
    errors = {}
    for rank, n in ((8, 1), (8, 5), (24, 1), (24, 5)):
        Q = Rounding(4, n).stand_in(W, rank)
        A, B = low_rank(W - Q, rank)
        errors[rank, n] = float((W - Q - B @ A).norm())
    assert plain > errors[8, 1] > errors[8, 5]
    assert errors[8, 1] > errors[24, 1] > errors[24, 5]


# ---- on a dense base -------------------------------------------------------------------------------------------------


def test_the_start_is_the_best_of_its_rank_with_the_scaling(tiny):
    model = added(tiny("llama"))
    for path, f in read(model, "default").factors.items():
        W = of(model, path).double()
        residual = W - nearest(W)
        U, values, Vt = torch.linalg.svd(residual)
        best = (U[:, :4] * values[:4]) @ Vt[:4]
        assert f.scaling == 2
        assert torch.allclose(f.scaling * f.B.double() @ f.A.double(), best, atol=1e-6)


def test_the_whole_path(tiny, batch, peft, tmp_path):
    """Trained, it computes what PEFT computes on the rounded base; every bit comes back."""
    model = tiny("llama")
    inputs, before, base = batch(model), bits(model), logits(model, batch(model))
    losses = steps(added(model), inputs)
    assert losses[-1] < losses[0]
    own = logits(model, inputs)
    assert close(own, logits(on_rounded_base(peft, model, tiny("llama"), tmp_path), inputs))
    assert not close(own, base, 1e-2)
    with model.no_lora():
        assert torch.equal(logits(model, inputs), base)
    assert {key: value for key, value in bits(model).items() if ".lora_" not in key} == before
    model.train_lora([])
    assert close(logits(model, inputs), own)
    model.remove_lora()
    assert bits(model) == before
    assert not [name for name, _ in model.named_buffers() if "rounded" in name]


def test_gradients_are_those_of_the_rounded_model(tiny, batch, peft, tmp_path):
    """In training mode, where a dense layer and its adapter are one operation."""
    model = added(tiny("llama"))
    inputs = batch(model)
    theirs = on_rounded_base(peft, model, tiny("llama"), tmp_path)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for each in (model, theirs):
        each.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for path in read(model, "default").factors:
        slots = model.get_submodule(path).lora_slots
        other = theirs.get_submodule(f"base_model.model.{path}")
        for key in "AB":
            mine = slots.get_parameter(f"{key}{model._lora_state.entry('default').slot}").grad
            assert close(mine, getattr(other, f"lora_{key}")["default"].weight.grad, 1e-4)


def test_others_beside_it_see_the_base(tiny, batch):
    """Routes, mixtures, another adapter: the base is the base, and Q is this adapter's alone; frozen or not."""
    model = tiny("llama")
    inputs = batch(model, rows=4)
    base = logits(model, inputs)
    model.add_lora(LoRAConfig(r=2, target_modules=["q", "o"], init="off"), "other")
    other = logits(model, inputs)
    added(model, "own")
    steps(model, inputs, 2)
    own = logits(model, inputs)
    added(model, "second", init_options={"loftq_bits": 2, "loftq_iter": 1})
    second = logits(model, inputs)
    for trained in (["own"], ["second"], ["own", "second"], []):
        model.train_lora(trained)
        for name, alone in (("other", other), ("own", own), ("second", second)):
            with model.use_lora(name):
                assert close(logits(model, inputs), alone)
        with model.route_lora(["own", None, "other", "second"]):
            routed = logits(model, inputs)
        for row, alone in enumerate((own, base, other, second)):
            assert close(routed[row], alone[row])
        with model.route_lora(["own"] * 4):
            assert close(logits(model, inputs), own)
        with model.no_lora():
            assert torch.equal(logits(model, inputs), base)


def mixed(base: Any, values: dict[str, tuple[Any, float]]) -> Any:
    """The base with W + Σ w (Q − W + s·B·A) as its weights, in float64."""
    changes: dict[str, torch.Tensor] = {}
    for value, weight in values.values():
        for path, f in value.factors.items():
            W = of(base, path).double()
            change = f.scaling * f.B.double() @ f.A.double()
            change = change + (nearest(W) - W if value.config.init == "loftq" else 0)
            changes[path] = changes.get(path, torch.zeros_like(W)) + weight * change
    base = base.double()
    for path, change in changes.items():
        base.get_submodule(path).weight.data += change
    return base


@pytest.mark.parametrize("which", ["own", {"own": 0.7, "other": 0.5}, {"own": 0.5, "twin": 0.5}])
def test_mixtures_and_merges(which, tiny, batch):
    model = tiny("llama")
    inputs, before = batch(model), bits(model)
    model.add_lora(LoRAConfig(r=2, target_modules=["q", "o"], init="off"), "other")
    for name in ("own", "twin"):
        steps(added(model, name), inputs, 2)
    weights = {which: 1.0} if isinstance(which, str) else which
    want = mixed(tiny("llama"), {name: (read(model, name), w) for name, w in weights.items()})
    want = logits(want, inputs).float()
    model.set_lora(which)
    assert close(logits(model, inputs), want)
    model.train_lora([])
    assert close(logits(model, inputs), want)
    model.merge_lora()
    assert close(logits(model, inputs), want)
    model.merge_lora("other", replace=True)
    model.merge_lora(which, replace=True)
    assert close(logits(model, inputs), want)
    model.unmerge_lora()
    assert close(logits(model, inputs), want)
    model.remove_lora()
    assert bits(model) == before
