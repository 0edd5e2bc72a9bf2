"""Convolutions: held against PEFT's layers, and against conv(x, W + ΔW) written out in float64."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layermodels import Convolutions, Single
from loras import bits, logits, randomise, with_adapters
from safetensors.torch import load_file, save_file
from torch import nn
from training import logged, same, trainer

import hf_lora
from hf_lora import LoRAAdapter, LoRAConfig, combine
from hf_lora.errors import (
    LoRAConfigError,
    LoRAError,
    LoRAFileError,
    LoRAMismatchError,
    LoRARouteError,
    LoRAUnsupportedError,
)
from hf_lora.layerinfo import LayerInfo, describe_layer
from hf_lora.values import Factors, group_blocks

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
ALL = [f"blocks.{i}.conv{k}" for i in (0, 1) for k in (1, 2)] + ["point", "stem"]
PLAIN = ["blocks.0.conv1", "blocks.1.conv1", "point", "stem"]  # without groups


def made(model=None, *, seed=0, name="default", targets=("stem", "conv1", "conv2", "point"), **changes):
    model = fresh() if model is None else model
    model.add_lora(LoRAConfig(**{"r": 4, "alpha": 6, "target_modules": list(targets), **changes}), name)
    randomise(model, seed)
    return model


def fresh():
    torch.manual_seed(0)
    return Convolutions()


def pictures(n=4, seed=0):
    return {"pixel_values": torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def agrees(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def written_out(layer, x, A, B, scaling):
    """conv(x, W + s·B·A) by torch in float64; with groups, PEFT's form: W's own convolution, and a dense one."""
    wide, x = copy.deepcopy(layer).double(), x.double()
    shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    change = (scaling * B.double() @ A.double()).view(shape)
    if layer.groups == 1:
        wide.weight.data += change
        return wide(x)
    dense = type(layer)(
        *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation),
        bias=False,
        padding_mode=layer.padding_mode,
    ).double()
    dense.weight.data = change
    return wide(x) + dense(x)


# ---- the forward -----------------------------------------------------------------------------------------------------

GEOMETRIES = [
    (1, {"stride": 3, "padding": 2}),
    (1, {"padding": "same", "padding_mode": "circular", "dilation": 2}),
    (1, {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}),  # one more after than before
    (2, {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    (2, {"padding": "same", "padding_mode": "reflect"}),
    (2, {"padding": (1, 2), "padding_mode": "replicate", "groups": 2}),
    (2, {"padding": "valid", "padding_mode": "circular"}),
    (3, {"padding": (1, 0, 2), "padding_mode": "circular"}),
    (3, {"stride": 2, "groups": 4}),
]


def single(d, seed=0, **geometry):
    torch.manual_seed(seed)
    return Single(CONV[d](4, 8, **{"kernel_size": 3, **geometry}))


@pytest.mark.parametrize(("d", "geometry"), GEOMETRIES)
def test_a_layer_computes_conv_with_w_plus_delta(d, geometry):
    model, x = single(d, **geometry), torch.randn(3, 4, *[7] * d)
    before, state = logits(model, {"x": x}), bits(model)
    model.add_lora(LoRAConfig(r=4, alpha=6, target_modules=["layer"]))
    assert torch.equal(logits(model, {"x": x}), before)
    randomise(model)
    pair = model.lora_adapter().factors["layer"]
    expected = written_out(Single(copy.deepcopy(plain_layer(d, model, geometry))).layer, x, pair.A, pair.B, 1.5)
    trained = logits(model, {"x": x})
    agrees(trained.double(), expected)
    model.train_lora([])
    agrees(logits(model, {"x": x}).double(), expected)
    with model.route_lora(["default", None, "default"]):
        routed = logits(model, {"x": x})
    agrees(routed.double()[[0, 2]], expected[[0, 2]])
    assert torch.equal(routed[1], before[1])
    with model.use_lora({"default": 0.5}):
        agrees(logits(model, {"x": x}), (trained + before) / 2)
    one = logits(model, {"x": x[0]})  # not batched
    assert one.dim() == d + 1
    agrees(one.double(), expected[0])
    model.remove_lora()
    assert type(model.layer) is CONV[d]
    assert bits(model) == state


def plain_layer(d, model, geometry):
    layer = CONV[d](4, 8, **{"kernel_size": 3, **geometry})
    layer.load_state_dict({k: t for k, t in model.layer.state_dict().items() if "lora" not in k})
    return layer


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_every_geometry(data):
    d = data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 1, 2]))
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(d))
    dilation = tuple(data.draw(st.integers(1, 2)) for _ in range(d))
    padding = data.draw(st.sampled_from(["same", "valid", *[tuple(range(i, i + d)) for i in (0, 1)]]))
    stride = 1 if padding == "same" else tuple(data.draw(st.integers(1, 3)) for _ in range(d))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    layer = CONV[d](2, 4, kernel, stride, padding, dilation, groups, padding_mode=mode).double()
    x = torch.randn(2, 2, *[data.draw(st.integers(5, 7)) for _ in range(d)], dtype=torch.float64)
    model = Single(copy.deepcopy(layer))
    model.add_lora(LoRAConfig(r=2, target_modules=["layer"]))
    randomise(model)
    pair = model.lora_adapter().factors["layer"]
    agrees(logits(model, {"x": x}), written_out(layer, x, pair.A, pair.B, 1.0), 1e-12)


def test_channels_last_and_half_precision():
    model, x = single(2, padding=1), torch.randn(3, 4, 7, 7)
    made(model, targets=["layer"])
    plain = logits(model, {"x": x})
    model.to(memory_format=torch.channels_last)
    last = logits(model, {"x": x.to(memory_format=torch.channels_last)})
    assert last.is_contiguous(memory_format=torch.channels_last)
    agrees(last, plain)
    before = bits(model)
    model.merge_lora()
    agrees(logits(model, {"x": x}), plain)
    assert model.layer.weight.is_contiguous(memory_format=torch.channels_last)
    model.unmerge_lora()
    assert bits(model) == before
    model.to(memory_format=torch.contiguous_format).train_lora([])
    model.bfloat16()
    agrees(logits(model, {"x": x.bfloat16()}).float(), plain, 0.03)


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def test_peft_reads_ours_and_we_read_peft(peft, tmp_path):
    """Every variant that PEFT has on convolutions, with groups where it has it there."""
    for i, (targets, fields) in enumerate(
        [
            (["stem", "conv1", "conv2", "point"], {}),
            (["stem", "conv1", "conv2"], {"lora_bias": True, "use_rslora": True}),
            (["stem", "conv1", "point"], {"use_dora": True}),
            (["stem", "conv1"], {"rank_pattern": {"stem": 2}, "alpha_pattern": {"stem": 5}}),
        ]
    ):
        ours = made(targets=targets, **fields)
        ours.save_lora(tmp_path / f"ours{i}")
        theirs = peft.PeftModel.from_pretrained(fresh(), str(tmp_path / f"ours{i}")).eval()
        agrees(logits(ours, pictures()), logits(theirs, pictures()))
        if "use_dora" in fields:
            merged = copy.deepcopy(ours)
            merged.merge_lora()
            agrees(logits(merged, pictures()), logits(theirs, pictures()))
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **fields)
        theirs = peft.get_peft_model(fresh(), config).eval()
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name or "lora_B.default.bias" in name:
                parameter.data *= 1 + torch.rand_like(parameter)
        theirs.save_pretrained(str(tmp_path / f"theirs{i}"))
        ours = fresh()
        ours.load_lora(tmp_path / f"theirs{i}")
        agrees(logits(ours, pictures()), logits(theirs, pictures()))
        files = [load_file(tmp_path / f"{name}{i}" / "adapter_model.safetensors") for name in ("ours", "theirs")]
        assert {k: t.shape for k, t in files[0].items()} == {k: t.shape for k, t in files[1].items()}


@pytest.mark.parametrize("geometry", [{"dilation": 2, "padding": "same"}, {"padding": 1, "padding_mode": "circular"}])
def test_where_peft_drops_the_geometry_ours_is_its_merge(peft, tmp_path, geometry):
    model, x = single(2, **geometry), torch.randn(3, 4, 7, 7)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(str(tmp_path))
    forward = logits(theirs, {"x": x})
    model.load_lora(tmp_path)
    ours, merged = logits(model, {"x": x}), logits(theirs.merge_and_unload(), {"x": x})
    agrees(ours, merged)
    assert (forward - merged).abs().max() > 0.01 * merged.abs().max()  # PEFT disagrees with itself


def test_a_model_of_transformers(peft, tmp_path):
    """ResNet's convolutions are adapted by their names, as in PEFT, and exported merged."""
    import transformers

    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic", "num_labels": 4}
    base = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    model = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "base").eval()
    made(model, targets=["convolution", "classifier.1"])
    assert len(model.lora_adapter().factors) == 4
    model.save_lora(tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    expected = logits(model, inputs)
    agrees(expected, logits(theirs, inputs))
    model.merge_and_save(tmp_path / "merged")
    merged = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "merged").eval()
    agrees(logits(merged, inputs), expected)
    report = hf_lora.export.merge.merge_to_folder(tmp_path / "lora", tmp_path / "streamed", tmp_path / "base")
    assert report is not None
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("merged", "streamed")]
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())


def test_a_head_that_is_a_sequence(tmp_path):
    """ResNet's classifier is an nn.Sequential, which is trained whole beside the convolutions."""
    import transformers

    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic", "num_labels": 4}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).eval()
    inputs, base = {"pixel_values": torch.randn(2, 3, 16, 16)}, copy.deepcopy(model)
    model.add_lora(LoRAConfig(r=4, target_modules=["convolution"]))
    assert torch.equal(logits(model, inputs), logits(base, inputs))
    head = model.classifier.lora_heads.copies["0"][1]
    head.weight.data += 1
    changed = logits(model, inputs)
    base.classifier[1].weight.data += 1
    assert torch.equal(changed, logits(base, inputs))
    with model.route_lora(["default", None]):
        assert torch.equal(logits(model, inputs)[0], changed[0])
    model.remove_lora()
    assert type(model.classifier) is nn.Sequential


# ---- every verb ------------------------------------------------------------------------------------------------------


def resident():
    """Frozen and trainable ones, of different ranks, a variant and other targets."""
    configs = {
        "a": LoRAConfig(r=4, alpha=6, target_modules=["stem", "conv1", "conv2"]),
        "b": LoRAConfig(r=2, target_modules=["conv1", "point", "fc"], use_dora=True),
        "c": LoRAConfig(r=6, target_modules=["stem", "conv2"], lora_bias=True),
    }
    model = with_adapters(fresh(), configs)
    model.add_lora(LoRAConfig(r=2, target_modules=["conv1", "conv2"]), "trains")
    randomise(model, 7)
    return model


def test_rows_and_mixtures():
    model, x = resident(), pictures(6)
    rows = ["b", None, "a", "trains", "c", "a"]
    alone = {}
    for name in {"a", "b", "c", "trains"}:
        with model.use_lora(name):
            alone[name] = logits(model, x)
    with model.no_lora():
        alone[None] = logits(model, x)
    with model.route_lora(rows):
        routed = logits(model, x)
    for i, name in enumerate(rows):
        agrees(routed[i], alone[name][i])
    assert torch.equal(routed[1], alone[None][1])
    with model.route_lora(["b"] * 6):
        agrees(logits(model, x), alone["b"])
    with pytest.raises(LoRARouteError), model.route_lora(["a", "b"]):
        logits(model, x)
    with model.use_lora({"a": 0.7, "trains": -0.3}):
        mixed = logits(model, x)
    both = combine([model.lora_adapter("a"), model.lora_adapter("trains")], [0.7, -0.3])
    other = fresh()
    hf_lora.model.put(other, both, "both")
    agrees(mixed, logits(other, x))


def test_gradients_are_those_of_w_plus_delta():
    for fields in ({}, {"use_dora": True}, {"lora_bias": True}):
        model = made(single(2, stride=2, padding=1), targets=["layer"], **fields).double().train()
        x = torch.randn(3, 4, 7, 7, dtype=torch.float64)
        held = {n.rpartition(".")[2].rstrip("0"): p for n, p in model.named_parameters() if p.requires_grad}
        model(x=x).logits.square().sum().backward()
        found = {name: parameter.grad.clone() for name, parameter in held.items()}
        own = {name: parameter.detach().clone().requires_grad_() for name, parameter in held.items()}
        W, b = model.layer.weight.detach(), model.layer.bias.detach()
        whole = W + 1.5 * (own["B"] @ own["A"]).view_as(W)
        if fields.get("use_dora"):
            norm = whole.detach().flatten(1).norm(dim=1)
            whole = whole * (own["magnitude"] / norm)[:, None, None, None]
        shift = 1.5 * own["offset"] if "offset" in own else 0
        F.conv2d(x, whole, b + shift, stride=2, padding=1).square().sum().backward()
        for name, parameter in own.items():
            agrees(found[name], parameter.grad, 1e-9)


def test_dropout_is_of_what_a_reads(monkeypatch):
    mask = torch.rand(3, 4, 7, 7).gt(0.4) / 0.6
    for module in ("slots", "convslots"):
        monkeypatch.setattr(f"hf_lora.{module}.dropped_out", lambda x, p: x * mask)
    x = torch.randn(3, 4, 7, 7)
    for fields in ({}, {"use_dora": True}):
        model = made(single(2, padding=1), targets=["layer"], dropout=0.4, **fields).train()
        pair = model.lora_adapter().factors["layer"]
        W, b = model.layer.weight.detach(), model.layer.bias.detach()
        change = pair.delta().view_as(W) if not fields else 1.5 * (pair.B @ pair.A).view_as(W)
        expected = F.conv2d(x, W, b, padding=1) + F.conv2d(x * mask, change, padding=1)
        if fields:
            gain = (pair.extras["magnitude"] / (W + change).flatten(1).norm(dim=1))[:, None, None, None]
            less = gain - 1
            expected = F.conv2d(x, W, b, padding=1)
            expected = expected + F.conv2d(x * mask, less * W + gain * change, padding=1)
        agrees(model(x=x).logits.detach(), expected)
        model.eval()
        assert not torch.equal(model(x=x).logits, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    def grads(checkpointing):
        model = made().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.stem.register_forward_hook(lambda m, a, out: out.requires_grad_())
        model(**pictures(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for mine, other in zip(grads(True), grads(False), strict=True):
        assert torch.equal(mine, other)


def test_compiled_one_graph_serves_all():
    model, x, graphs = single(2, padding=1), {"x": torch.randn(3, 4, 7, 7)}, []
    configs = {"a": {}, "dora": {"use_dora": True, "r": 2}}
    with_adapters(model, {n: LoRAConfig(**{"r": 4, "target_modules": ["layer"], **c}) for n, c in configs.items()})
    model.add_lora(LoRAConfig(r=2, target_modules=["layer"], lora_bias=True), "trains")
    randomise(model, 7)

    def backend(graph, given):
        graphs.append(graph)
        return graph.forward

    with model.use_lora({"a": 0.5, "dora": 0.25}):  # a mixture wider than any before makes a graph
        logits(model, x)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for choice in ("a", "trains", {"a": 0.5, "dora": 0.25}, None):
        with model.use_lora(choice) if choice is not None else model.no_lora():
            agrees(logits(compiled, x), logits(model, x))
    with model.route_lora(["dora", None, "trains"]):
        agrees(logits(compiled, x), logits(model, x))
    assert len(graphs) == 1


def test_a_trainer_resumes_exactly(tmp_path):
    data = [{"pixel_values": p, "labels": i % 3} for i, p in enumerate(pictures(20)["pixel_values"])]
    given = {"train_dataset": data, "save_steps": 2, "max_steps": 4}

    def start():
        model = fresh()
        model.add_lora(LoRAConfig(r=4, target_modules=["stem", "conv1", "conv2"], dropout=0.1, lora_bias=True))
        return model

    whole = trainer(start(), tmp_path / "whole", **given)
    whole.train()
    again = trainer(start(), tmp_path / "again", **given)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(again) == logged(whole)
    assert same(again.model.lora_state_dict(), whole.model.lora_state_dict())
    loaded = fresh()
    loaded.load_lora(tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(logits(loaded, pictures()), logits(whole.model.eval(), pictures()))


def test_merge_and_remove(tmp_path):
    model, state = made(targets=["stem", "conv1", "point"]), bits(fresh())
    model.add_lora(LoRAConfig(r=2, target_modules=["stem", "fc"], use_dora=True), "dora")
    randomise(model, 3)
    held, x = bits(model), pictures()
    for which in ("default", "dora", {"default": 0.5, "dora": -1.0}):
        with model.use_lora(which):
            expected = logits(model, x)
        model.merge_lora(which)
        agrees(logits(model, x), expected)
        model.unmerge_lora()
        assert bits(model) == held
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(model).to(dtype)
        held = bits(half)
        half.merge_lora({"default": 0.5, "dora": 1.0})
        assert bits(half) != held
        half.unmerge_lora()
        assert bits(half) == held
    model.remove_lora()
    assert bits(model) == state
    assert type(model.stem) is nn.Conv2d


# ---- values ----------------------------------------------------------------------------------------------------------


def test_arithmetic_on_values(tmp_path):
    one, two = (made(seed=s, r=r).lora_adapter() for s, r in ((1, 4), (2, 2)))
    dense = {path: 0.5 * pair.delta() - two.factors[path].delta() for path, pair in one.factors.items()}
    for method in ("concat", "svd", "ties"):
        options = {"density": 1.0} if method == "ties" else {}
        both = combine([one, two], [0.5, -1.0], method, **options)
        both.save(tmp_path / method)
        again = LoRAAdapter.load(tmp_path / method)
        assert again.equal(dataclass_config(both, again))
        for path, pair in again.factors.items():
            assert (pair.kind, pair.kernel) == ("conv", one.factors[path].kernel)
            if method == "concat":
                agrees(pair.delta(), dense[path])
    short = one.truncate(rank=1)
    for path, pair in short.factors.items():
        if not pair.blocks:
            values = torch.linalg.svdvals(one.factors[path].delta().double())
            error = (pair.delta() - one.factors[path].delta()).double().norm()
            assert abs(error - values[1:].norm()) <= 1e-4 * values[0]
    assert short.factors["blocks.0.conv2"].rank == 2  # one for each group
    model = fresh()
    hf_lora.model.put(model, short, "short")
    assert torch.isfinite(logits(model, pictures())).all()


def dataclass_config(value, other):
    import dataclasses

    return dataclasses.replace(value, config=other.config)


def test_extract_from_a_tuned_model():
    base, tuned = fresh(), fresh()
    torch.manual_seed(1)
    for path in PLAIN:
        weight = tuned.get_submodule(path).weight
        change = torch.randn(len(weight), 2) @ torch.randn(2, weight[0].numel())
        weight.data += 0.05 * change.view_as(weight)
    found = hf_lora.extract_lora(base, tuned, rank=2, target_modules=["stem", "conv1", "point"])
    hf_lora.model.put(base, found, "found")
    agrees(logits(base, pictures()), logits(tuned, pictures()), 1e-4)
    with pytest.raises(LoRAConfigError, match="2 groups"):
        hf_lora.extract_lora(fresh(), tuned, rank=2, target_modules=["conv2"])


def test_factors_of_a_convolution():
    A, B = torch.randn(4, 18), torch.randn(6, 4)
    pair = Factors("conv", A, B, 4.0, kernel=(3, 3))
    assert [t.shape for t in pair.stored()] == [(4, 2, 3, 3), (6, 4, 1, 1)]
    assert pair.num_parameters == A.numel() + B.numel()
    assert not pair.equal(Factors("conv", A, B, 4.0, kernel=(9, 1)))
    grouped = torch.block_diag(B[:3, :2], B[3:, :2])
    pair = Factors("conv", A, grouped, 4.0, blocks=group_blocks(6, 2), kernel=(3,))
    assert [t.shape for t in pair.stored()] == [(4, 6, 3), (6, 2, 1)]
    assert pair.num_parameters == A.numel() + B.numel() // 2
    for kind, kernel in (("conv", ()), ("conv", (4,)), ("conv", (3, 0)), ("conv", (1, 1, 3, 3)), ("linear", (3,))):
        with pytest.raises(LoRAMismatchError, match="kernel"):
            Factors(kind, A, B, 4.0, kernel=kernel)


def test_summary_counts_convolutions():
    model = made()
    text = str(model.lora_summary())
    assert "group 0" not in text
    assert "conv2 × 2" in text


# ---- what is refused, and named --------------------------------------------------------------------------------------


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(2 * x)


def test_which_convolutions_are_layers():
    assert describe_layer(nn.Conv2d(4, 6, (3, 5), groups=2)) == LayerInfo("conv", 60, 6, (3, 5), 2)
    assert describe_layer(nn.Conv1d(4, 6, 1)) == LayerInfo("conv", 4, 6, (1,))
    for layer, reason in (
        (nn.LazyConv2d(4, 3), "lazy"),
        (nn.ConvTranspose1d(4, 4, 3), "transposed"),
        (nn.LazyConvTranspose2d(4, 3), "lazy"),
        (Own(4, 4, 3), "its forward is not that"),
    ):
        model = nn.ModuleDict({"layer": layer, "fc": nn.Linear(4, 4)})
        assert describe_layer(layer) is None
        with pytest.raises(LoRAUnsupportedError, match=reason):
            hf_lora.model.add(model, LoRAConfig(target_modules=["layer"]))


def test_other_beginnings():
    for init in ("gaussian", "off"):
        model = fresh()
        model.add_lora(LoRAConfig(r=4, target_modules=["stem", "conv2"], init=init))
        for path, pair in model.lora_adapter().factors.items():
            bound = (4 / len(pair.blocks or "1")) ** -0.5  # of B's rows, of which each group has its own
            assert (pair.B.abs().max() > 0.75 * bound) == (init == "off")
            assert pair.B.abs().max() <= bound
            spread = pair.A.std() * 4 if init == "gaussian" else pair.A.abs().max() * pair.in_features**0.5
            assert 0.8 < spread < 1.2, path


def test_all_linear_leaves_convolutions():
    model = fresh()
    model.add_lora(LoRAConfig(target_modules="all-linear", r=2))
    assert set(model.lora_adapter().factors) == {"fc"}
    model.remove_lora()
    model.add_lora(LoRAConfig(target_modules=r"blocks\.\d\.conv1", exclude_modules=["blocks.1.conv1"], r=2))
    assert set(model.lora_adapter().factors) == {"blocks.0.conv1"}


REFUSED = [
    ({"use_dora": True}, "conv2"),
    ({"kasa_config": {}}, "stem"),
    ({"velora_config": {}}, "stem"),
    ({"monteclora_config": {}}, "stem"),
    ({"use_qalora": True, "qalora_group_size": 3}, "stem"),
    ({"use_bdlora": {"target_modules_bd_a": ["stem"], "target_modules_bd_b": [], "nblocks": 1}}, "stem"),
    ({"alora_invocation_tokens": [1]}, "stem"),
    *[({"init": init}, "stem") for init in ("pissa", "olora", "mica", "orthogonal", "loftq")],
]


@pytest.mark.parametrize(("fields", "target"), REFUSED, ids=lambda value: str(value)[:24])
def test_variants_that_peft_refuses_there(fields, target):
    model = fresh()
    state = bits(model)
    with pytest.raises(LoRAUnsupportedError):
        model.add_lora(LoRAConfig(r=2, target_modules=[target], **fields))
    assert bits(model) == state


def test_groups_that_do_not_divide_the_rank_and_merges(tmp_path):
    with pytest.raises(LoRAConfigError, match="2 groups, which do not divide rank 3"):
        made(r=3)
    model = made()
    held = bits(model)
    with pytest.raises(LoRAUnsupportedError, match="no grouped weight"):
        model.merge_lora()
    with pytest.raises(LoRAUnsupportedError, match="no grouped weight"):
        model.merge_and_save(tmp_path)
    assert bits(model) == held
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
    model, x = made(Single(layer), targets=["layer"]), torch.randn(2, 4, 9)
    pair = model.lora_adapter().factors["layer"]
    expected = F.conv1d(x, layer.weight + pair.delta().view(4, 4, 3), layer.bias)
    agrees(logits(model, {"x": x}), expected.detach())
    with pytest.raises(LoRAUnsupportedError, match="weight_norm"):
        model.merge_lora()


def test_files_that_do_not_fit(tmp_path):
    model = made(targets=["stem", "conv2"])
    model.save_lora(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good, config = load_file(path), json.loads((tmp_path / "adapter_config.json").read_text())
    names = {"A": "base_model.model.stem.lora_A.weight", "B": "base_model.model.blocks.0.conv2.lora_B.weight"}

    def refused(error, text, **changes):
        save_file(good | changes, path)
        other = fresh()
        with pytest.raises(error) as caught:
            other.load_lora(tmp_path)
        assert text in str(caught.value) + " ".join(map(str, caught.value.facts))
        assert not hasattr(other.stem, "lora_slots")

    assert config["target_modules"]
    A, B = good[names["A"]], good[names["B"]]
    refused(LoRAMismatchError, "kernel (9, 1)", **{names["A"]: A.reshape(4, 3, 9, 1)})
    refused(LoRAFileError, "matrices", **{names["A"]: A[None]})
    refused(LoRAFileError, "not matrices", **{names["A"]: A[:3].contiguous()})
    refused(LoRAMismatchError, "1 groups, the layer has 2", **{names["B"]: torch.randn(8, 4, 1, 1)})
    refused(LoRAFileError, "conv2", **{names["B"]: B.repeat(1, 1, 3, 1)})
    refused(LoRAFileError, "not finite", **{names["A"]: A * float("inf")})
    assert issubclass(LoRAFileError, LoRAError)
