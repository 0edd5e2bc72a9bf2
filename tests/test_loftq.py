"""LoftQ: against bitsandbytes' published numbers, PEFT on a base that was rounded apart, and float64 formulas."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest
import torch
from loras import bits, logits
from training import logged, trainer

import hf_lora
from hf_lora import LoRAAdapter, LoRAConfig, backends
from hf_lora.errors import LoRAConfigError, LoRAFileError, LoRAMismatchError, LoRAStateError, LoRAUnsupportedError
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


def test_rounding_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    W = torch.randn(40, 90, generator=torch.Generator().manual_seed(1)) * 0.02
    four = functional.dequantize_4bit(*functional.quantize_4bit(W, quant_type="nf4", blocksize=64))
    eight, scales, _ = functional.int8_vectorwise_quant(W.half())
    assert torch.allclose(rounded(W, 4), four, atol=1e-7)
    assert torch.allclose(rounded(W, 8), functional.int8_vectorwise_dequant(eight, scales), atol=1e-7)


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


@pytest.mark.parametrize("which", ["own", {"other": 0.5, "own": 0.7}, {"own": 0.5, "twin": 0.5}])
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


@pytest.mark.parametrize(("kind", "targets"), [("gpt2", ["q", "v"]), ("gpt2", ["c_attn", "c_fc"]), ("phi3", ["k"])])
def test_fused_layers_are_rounded_whole(kind, targets, tiny, batch):
    """bitsandbytes quantises (out, in) of a Conv1D, and the whole of a fused layer, whichever roles are adapted."""
    model = added(tiny(kind), target_modules=targets)
    base, inputs = tiny(kind), batch(model)
    for path, f in read(model, "default").factors.items():
        layer = base.get_submodule(path)
        turned = type(layer).__name__ == "Conv1D"
        W = layer.weight.detach().T if turned else layer.weight.detach()
        Q = nearest(W.contiguous())
        changed = Q + f.scaling * f.B.double() @ f.A.double()
        rows = f.blocks[0].index() if f.blocks else torch.arange(len(W))
        assert (W.double() - changed)[rows].norm() < (W.double() - Q)[rows].norm()
        layer.weight.data = (changed.T if turned else changed).float()
    want = logits(base, inputs)
    assert close(logits(model, inputs), want)
    model.train_lora([])
    assert close(logits(model, inputs), want)
    before = bits(tiny(kind))
    model.merge_lora()
    assert close(logits(model, inputs), want)
    model.remove_lora()
    assert bits(model) == before


def test_dropout_reaches_the_pair_alone(tiny, batch):
    model = added(tiny("llama"), dropout=0.5)
    inputs = batch(model)
    for name, parameter in model.named_parameters():
        if ".lora_slots.B" in name:
            parameter.data.zero_()
    base = tiny("llama")
    for path in read(model, "default").factors:
        base.get_submodule(path).weight.data = nearest(of(base, path)).float()
    assert close(logits(model.train(), inputs), logits(base, inputs))


def test_in_bfloat16(tiny, batch):
    """Q in bfloat16, as PEFT and bitsandbytes compute with it; a model that is cast keeps its Q."""
    half = {"dtype": torch.bfloat16}
    model, base = added(tiny("llama", **half)), tiny("llama", **half)
    inputs = batch(model)
    for path, f in read(model, "default").factors.items():
        Q = nearest(of(base, path).float())
        base.get_submodule(path).weight.data = (Q + f.scaling * f.B.double() @ f.A.double()).to(torch.bfloat16)
    assert close(logits(model, inputs).float(), logits(base, inputs).float(), 2e-2)
    wide = added(tiny("llama"))
    was = logits(wide, inputs)
    assert close(logits(wide.to(torch.bfloat16), inputs).float(), was, 2e-2)


def test_adapters_of_one_rounding_share_what_stands_for_the_weight(tiny):
    def held(model: Any) -> dict[str, int]:
        return {name: buffer.nbytes for name, buffer in model.named_buffers() if "rounded" in name}

    model = added(tiny("llama"), "a")
    one = held(model)
    assert sum(one.values()) == sum(of(model, path).nbytes for path in read(model, "a").factors)
    added(model, "b", r=2)
    assert held(model) == one
    added(model, "c", r=2, init_options={"loftq_bits": 4, "loftq_iter": 2})
    assert len(held(model)) == 2 * len(one)
    model.remove_lora("a")
    model.remove_lora("c")
    assert held(model) == one


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_region_gives_the_same_gradients(reentrant, tiny, batch):
    found = []
    for checkpointed in (False, True):
        model = added(tiny("llama"), dropout=0.2).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        inputs = batch(model)
        torch.manual_seed(1)
        with model.use_lora("default"):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    assert all(close(found[1][name], grad) for name, grad in found[0].items())


def test_one_graph_serves_every_switch_and_route():
    from hf_lora.model import add, train
    from hf_lora.switching import route_lora, set_lora

    torch.compiler.reset()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 16)).eval()
    add(net, LoRAConfig(r=2, target_modules=["0", "2"], init="off"), "other")
    for name, n in (("own", 4), ("twin", 4), ("second", 2)):
        options = {"loftq_bits": n, "loftq_iter": 1}
        add(net, LoRAConfig(r=2, target_modules=["0", "2"], init="loftq", init_options=options), name)
    train(net, ["twin"])
    x = torch.randn(4, 16)
    choices: list[Any] = [{"own": 0.5, "other": 0.25, "twin": 0.5}, "own", "twin", None, "second", "other"]
    routes = [["own", None, "other", "twin"], ["second", "own", None, "own"]]

    def every(run: Any) -> list[torch.Tensor]:
        found = []
        for which in choices:
            set_lora(net, which)
            found.append(run(x).detach())
        for route in routes:
            with route_lora(net, route):
                found.append(run(x).detach())
        return found

    eager, graphs = every(net), []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = every(torch.compile(net, fullgraph=True, backend=backend))
    assert all(close(mine, other) for mine, other in zip(compiled, eager, strict=True))
    assert len(graphs) == 1


def test_a_compiled_step_has_the_gradients_of_the_eager_one():
    from hf_lora.model import add

    torch.compiler.reset()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 16)).train()
    add(net, LoRAConfig(r=2, target_modules=["0", "2"], init="loftq"))
    x, found = torch.randn(4, 16), []
    for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad for p in net.parameters() if p.requires_grad])
    assert all(close(mine, other) for mine, other in zip(found[1], found[0], strict=True))


@pytest.mark.parametrize("iterations", [1, 2])
def test_resume_is_the_run_that_nobody_stopped(iterations, tiny, tmp_path):
    options = {"loftq_bits": 4, "loftq_iter": iterations}
    whole = trainer(added(tiny("llama"), init_options=options), tmp_path / "whole", max_steps=4)
    whole.train()
    resumed = trainer(added(tiny("llama"), init_options=options), tmp_path / "run", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert read(resumed.model, "default").equal(read(whole.model, "default"))
    assert logged(resumed) == logged(whole)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def peft_loftq(peft, monkeypatch):
    """PEFT with its own LoftQ, which wants a GPU and bitsandbytes: on the CPU, rounding as in this file."""
    pytest.importorskip("scipy")
    import inspect

    from peft.tuners.lora import layer
    from peft.utils import loftq_utils

    class Params:
        def __init__(self, data: torch.Tensor, **_: Any) -> None:
            self.data = self.quant_state = data
            self.SCB = data.half().float().abs().amax(1)

        def to(self, *_: Any) -> Any:
            return self

    def eight(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.round(data.half() * (127 / scales[:, None])) * scales[:, None] / 127

    functional = types.SimpleNamespace(
        dequantize_4bit=lambda data, _: nearest(data).float(), int8_vectorwise_dequant=eight
    )
    nn = types.SimpleNamespace(Params4bit=Params, Int8Params=Params)
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    source = source.replace("import bitsandbytes as bnb", "pass")
    names = {**vars(loftq_utils), "bnb": types.SimpleNamespace(nn=nn, functional=functional)}
    names |= {"is_bnb_available": lambda: True, "is_bnb_4bit_available": lambda: True}
    exec(source, names)
    monkeypatch.setattr(layer, "loftq_init", names["loftq_init"])
    return peft


@pytest.mark.parametrize("options", [(4, 1), (4, 3), (8, 1)])
def test_files_of_peft_compute_what_they_do_there(options, tiny, batch, peft_loftq, tmp_path):
    fields = dict(zip(("loftq_bits", "loftq_iter"), options, strict=True))
    theirs = peft_loftq.get_peft_model(
        tiny("llama"), peft_loftq.LoraConfig(**PEFT, init_lora_weights="loftq", loftq_config=fields)
    ).eval()
    inputs = batch(theirs)
    want = logits(theirs, inputs)
    theirs.save_pretrained(tmp_path)
    model = tiny("llama")
    base = logits(model, inputs)
    model.load_lora(tmp_path, name="x")
    assert close(logits(model, inputs), want)
    assert not close(want, base, 1e-2 if options[0] == 4 else 1e-3)
    assert model.lora_adapter("x").config.init_options == fields


@pytest.mark.parametrize("options", [(4, 1), (4, 3), (8, 1)])
def test_peft_loads_ours(options, tiny, batch, peft_loftq, tmp_path):
    fields = dict(zip(("loftq_bits", "loftq_iter"), options, strict=True))
    model = added(tiny("llama"), init_options=fields)
    inputs = batch(model)
    steps(model, inputs, 2)
    model.save_lora(tmp_path)
    theirs = peft_loftq.PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()
    assert close(logits(theirs, inputs), logits(model, inputs))
    again = tiny("llama")
    again.load_lora(tmp_path, name="x", trainable=True)
    assert close(logits(again, inputs), logits(model, inputs))
    again.load_lora(tmp_path, name="y")
    again.set_lora("y")
    assert close(logits(again, inputs), logits(model, inputs))
    LoRAAdapter.load(tmp_path).save(tmp_path / "again")
    assert LoRAAdapter.load(tmp_path / "again").equal(LoRAAdapter.load(tmp_path))


def test_what_a_file_says(tiny, tmp_path):
    added(tiny("llama"), init_options={}).save_lora(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["init_lora_weights"] == "loftq"
    assert written["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 1}
    odd: list[tuple[Any, type[Exception], str]] = [
        ({}, LoRAUnsupportedError, "loftq_config"),  # which PEFT refuses, too
        ({"loftq_bits": 4}, LoRAUnsupportedError, "loftq_config"),
        ({"loftq_bits": 4, "loftq_iter": 1, "new": 1}, LoRAUnsupportedError, "loftq_config"),
        ({"loftq_bits": 3, "loftq_iter": 1}, LoRAConfigError, "loftq_bits"),
        ({"loftq_bits": 4, "loftq_iter": 0}, LoRAConfigError, "loftq_iter"),
    ]
    for value, error, match in odd:
        with pytest.raises(error, match=match):
            LoRAConfig.from_peft({**written, "loftq_config": value}).require_supported()
    for field in ("use_dora", "lora_bias"):
        with pytest.raises(LoRAConfigError, match=field):
            LoRAConfig.from_peft({**written, field: True}).require_supported()


# ---- on a base that is quantised -------------------------------------------------------------------------------------


class Params4bit(torch.nn.Parameter):
    """As bitsandbytes': a byte for two numbers, and how to read them. Here the bytes say nothing."""

    quant_state: Any


class Linear4bit(torch.nn.Linear):
    """As bitsandbytes': it computes with Q."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        state: Any = self.weight.quant_state
        return torch.nn.functional.linear(input, state.Q, self.bias)


def quantise(model: Any, **state: Any) -> Any:
    """The model as if loaded with load_in_4bit: every linear layer but the head."""
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            weight = module.weight.detach()
            packed = Params4bit(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
            packed.quant_state = types.SimpleNamespace(
                **{"quant_type": "nf4", "blocksize": 64, "nested": False, "Q": nearest(weight).float(), **state}
            )
            module.weight = packed
            module.__class__ = Linear4bit
    return model


@pytest.fixture
def four_bits(tiny, monkeypatch, tmp_path):
    """A quantised model, and the folder of what it was before."""
    functional = types.SimpleNamespace(dequantize_4bit=lambda _, state: state.Q)
    monkeypatch.setattr(backends, "_functional", lambda: functional)
    folder = tmp_path / "base"
    tiny("llama").save_pretrained(folder)
    model = quantise(tiny("llama"))
    model.config._name_or_path = str(folder)
    return model, folder


ALL = {"target_modules": ["q_proj", "v_proj", "up_proj", "lm_head"]}


def test_on_a_quantised_base(four_bits, tiny, batch, tmp_path):
    """A and B are what Q lacks of the file's W; the base stays, and what is saved is a plain LoRA for it."""
    model, _ = four_bits
    inputs, before = batch(model), bits(model)
    alone = logits(model, inputs)
    added(model, **ALL)
    for path, f in read(model, "default").factors.items():
        product = f.scaling * f.B.double() @ f.A.double()
        if path == "lm_head":  # which was not quantised: as if nothing had been said
            assert not product.any()
            assert f.A.any()
            continue
        W = of(tiny("llama"), path).double()
        U, values, Vt = torch.linalg.svd(W - nearest(W))
        assert torch.allclose(product, (U[:, :4] * values[:4]) @ Vt[:4], atol=1e-6)
    own = logits(model, inputs)
    assert not close(own, alone, 1e-3)
    model.save_lora(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["init_lora_weights"], written["loftq_config"]) == (True, {})
    again = quantise(tiny("llama"))
    again.load_lora(tmp_path / "out", name="x")
    assert close(logits(again, inputs), own)
    model.remove_lora()
    assert bits(model) == before


def test_what_was_made_on_the_dense_base_goes_to_the_quantised_one(four_bits, tiny, batch, tmp_path):
    dense = added(tiny("llama"), **ALL)
    inputs = batch(dense)
    dense.save_lora(tmp_path / "out")
    model, _ = four_bits
    model.load_lora(tmp_path / "out", name="x")
    want = logits(quantised_by_hand(tiny("llama"), read(dense, "default")), inputs)
    assert close(logits(model, inputs), want)
    for state in ({"nested": True}, {"quant_type": "fp4"}, {"blocksize": 128}):
        with pytest.raises(LoRAMismatchError, match="4 bits with loftq_iter=1"):
            quantise(tiny("llama"), **state).load_lora(tmp_path / "out", name="x")
    added(dense, "twice", init_options={"loftq_bits": 4, "loftq_iter": 2}).save_lora(tmp_path / "two", name="twice")
    with pytest.raises(LoRAMismatchError, match="loftq_iter=2"):
        model.load_lora(tmp_path / "two", name="y")


def test_a_weight_that_a_forward_on_the_cpu_has_rearranged(four_bits, tiny, tmp_path):
    """Its numbers cannot be had from bitsandbytes any more; what needs none of them still works."""
    model, _ = four_bits
    packed = {"packing_format_for_cpu": True, "nested": False}
    for module in model.modules():
        if isinstance(module, Linear4bit):
            vars(module.weight.quant_state).update(packed, original_nested=False)
    with pytest.raises(LoRAStateError, match="rearranged"):
        added(model)
    assert model.lora_names == ()
    added(tiny("llama")).save_lora(tmp_path / "out")
    model.load_lora(tmp_path / "out", name="x")
    with pytest.raises(LoRAMismatchError, match="double quantised"):
        quantise(tiny("llama"), **packed, original_nested=True).load_lora(tmp_path / "out", name="x")


def quantised_by_hand(base: Any, value: Any) -> Any:
    """Every linear layer Q, the head too where the adapter has it, and s·B·A added to it."""
    for name, module in base.named_modules():
        if type(module) is torch.nn.Linear and (name != "lm_head" or name in value.factors):
            f = value.factors.get(name)
            change = 0 if f is None else f.scaling * f.B.double() @ f.A.double()
            module.weight.data = (nearest(module.weight) + change).float()
    return base


def test_where_the_weights_before_come_from(four_bits, tiny):
    model, folder = four_bits
    weights = {"loftq_bits": 4, "loftq_iter": 1, "weights": str(folder)}
    added(model)
    first = read(model, "default")
    model.remove_lora()
    model.config._name_or_path = ""
    with pytest.raises(LoRAFileError, match="does not say where it was loaded from"):
        added(model)
    assert read(added(model, init_options=weights), "default").factors.keys() == first.factors.keys()
    model.remove_lora()
    sharded = folder.parent / "sharded"
    tiny("llama").save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    again = read(added(model, init_options={**weights, "weights": str(sharded)}), "default")
    assert all(again.factors[path].equal(f) for path, f in first.factors.items())
    model.remove_lora()
    other = folder.parent / "other"
    tiny("llama", seed=7).save_pretrained(other)
    before = bits(model)
    odd: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"weights": str(other)}, LoRAMismatchError, "was quantised from"),
        ({"weights": str(folder.parent)}, LoRAFileError, "no safetensors file"),
        ({"loftq_iter": 2}, LoRAConfigError, "loftq_iter=2"),
        ({"loftq_bits": 8}, LoRAConfigError, "loftq_bits=8"),
    ]
    for given, error, match in odd:
        with pytest.raises(error, match=match) as caught:
            added(model, init_options={**weights, **given})
        assert caught.value.remedy  # type: ignore[attr-defined]
        assert bits(model) == before
        assert model.lora_names == ()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_refusals(tiny):
    odd: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"use_dora": True}, LoRAConfigError, "use_dora"),
        ({"lora_bias": True}, LoRAConfigError, "lora_bias"),
        ({"kasa_config": {}}, LoRAConfigError, "kasa_config"),
        ({"init_options": {"loftq_bits": 3}}, LoRAConfigError, "loftq_bits"),
        ({"init_options": {"loftq_iter": 0}}, LoRAConfigError, "loftq_iter"),
        ({"init_options": {"weights": "x"}}, LoRAConfigError, "not quantised"),
        ({"target_modules": ["embed_tokens"]}, LoRAUnsupportedError, "not for embeddings"),
    ]
    model = tiny("llama")
    before = bits(model)
    for fields, error, match in odd:
        with pytest.raises(error, match=match):
            added(model, **fields)
        assert bits(model) == before
        assert model.lora_names == ()
    with pytest.raises(LoRAConfigError, match="slices of a fused one"):
        added(tiny("phi3"), target_modules=["q"], init_options={"loftq_bits": 4, "loftq_iter": 2})
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(LoRAMismatchError, match="not in memory"):
        added(empty)


def test_no_arithmetic_takes_it_for_a_plain_lora(tiny):
    """B·A alone is not what it does to a model."""
    adapter = added(tiny("llama")).lora_adapter("default")
    for verb in (
        lambda: hf_lora.combine([adapter, adapter], [0.5, 0.5]),
        lambda: adapter.truncate(rank=2),
        lambda: adapter.negate(),
        lambda: hf_lora.analysis.subspace_similarity(adapter, adapter),
    ):
        with pytest.raises(LoRAUnsupportedError, match="loftq"):
            verb()
    plain = LoRAAdapter(adapter.config.replace(init="kaiming", init_options={}), adapter.factors)
    assert plain.truncate(rank=2).config.r == 2
