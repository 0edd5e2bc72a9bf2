"""nn.MultiheadAttention: held against PEFT, against torch's own forward with W + ΔW, and against its own other path."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from layermodels import Encoder, Single
from loras import bits, logits, randomise
from safetensors.torch import load_file
from torch import nn
from training import logged, same, trainer

import hf_lora
from hf_lora import LoRAAdapter, LoRAConfig, combine
from hf_lora.errors import (
    LoRAError,
    LoRAFileError,
    LoRARouteError,
    LoRATargetError,
    LoRAUnsupportedError,
)

N, L, S = 3, 5, 7
KINDS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias, zeros": {"bias": False, "add_zero_attn": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


class Attention(Single):
    def forward(self, tensors, **given):  # one argument, of which nothing tells where its rows are
        return self.layer(*tensors, **given)


def attention(kind="plain", heads=2, seed=0, **more):
    torch.manual_seed(seed)
    model = Attention(nn.MultiheadAttention(8, heads, **KINDS[kind], **more))
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def calls(kind="plain", seed=0):
    """Inputs and options of every way in which the module can be called."""
    g = torch.Generator().manual_seed(seed)
    first = KINDS[kind].get("batch_first", False)
    x, y, z = (torch.randn(*((N, n) if first else (n, N)), 8, generator=g) for n in (L, S, S))
    alone = x[0] if first else x[:, 0]
    boolean = torch.rand(L, L, generator=g) > 0.7
    boolean[:, 0] = False
    each, padding = torch.randn(N * 2, L, L, generator=g), torch.zeros(N, L, dtype=torch.bool)
    padding[0, 3:] = True
    causal = torch.ones(L, L).triu(1).bool()
    return [
        ((x, x, x), {}),
        ((x, y, y), {}),
        ((x, y, z), {"average_attn_weights": False}),
        ((x, x, z[:, :L] if first else z[:L]), {"need_weights": False}),
        ((x, x, x), {"attn_mask": boolean, "key_padding_mask": padding}),
        ((x, x, x), {"attn_mask": each, "average_attn_weights": False}),
        ((x, x, x), {"attn_mask": each, "key_padding_mask": padding, "need_weights": False}),
        ((x, x, x), {"key_padding_mask": padding, "need_weights": False}),
        ((x, x, x), {"attn_mask": causal, "is_causal": True, "need_weights": False}),
        ((x, x, x), {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding}),
        ((alone, alone, alone), {"attn_mask": boolean}),
        ((alone, alone, alone), {"key_padding_mask": padding[0], "need_weights": False}),
    ]


def made(model, *, seed=0, name="default", **changes):
    model.add_lora(LoRAConfig(**{"r": 4, "alpha": 6, "target_modules": ["layer"], **changes}), name)
    randomise(model, seed)
    return model


def dense(model, value, weight=1.0):
    """torch's own module with W + weight · ΔW."""
    model = copy.deepcopy(model)
    for path, pair in value.factors.items():
        own = model.layer.out_proj.weight if path.endswith("out_proj") else model.layer.in_proj_weight
        own.data += weight * pair.delta()
    return model


def agrees(ours, theirs, tolerance=1e-5):
    for mine, other in zip(*(t if isinstance(t, tuple) else (t,) for t in (ours, theirs)), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.shape == other.shape
            assert (mine - other).abs().max() <= tolerance * other.abs().max()


@pytest.fixture
def slow_path():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


# ---- the forward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_step_0_is_torchs_own_path_bit_for_bit(kind, slow_path):
    base = attention(kind)
    model = copy.deepcopy(base)
    model.add_lora(LoRAConfig(r=4, target_modules=["layer"]))
    for tensors, given in calls(kind):
        (ours, shares), (theirs, others) = model(tensors, **given), base(tensors, **given)
        assert torch.equal(ours, theirs)
        assert (shares is None and others is None) or torch.equal(shares, others)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_attention_with_w_plus_delta(kind):
    base = attention(kind)
    model = made(copy.deepcopy(base))
    value, state = model.lora_adapter(), bits(base)
    expected, half = dense(base, value), dense(base, value, 0.5)
    for frozen in (False, True):
        if frozen:
            model.train_lora([])
        for tensors, given in calls(kind):
            agrees(model(tensors, **given), expected(tensors, **given))
        for tensors, given in calls(kind)[:3]:
            with model.use_lora({"default": 0.5}):
                agrees(model(tensors, **given), half(tensors, **given))
            with model.no_lora():
                found, plain = model(tensors, **given), base(tensors, **given)
            assert torch.equal(found[0], plain[0])  # the fused path included
    held = bits(model)
    model.merge_lora()
    for tensors, given in calls(kind):
        agrees(model(tensors, **given), expected(tensors, **given))
    model.unmerge_lora()
    assert bits(model) == held
    model.remove_lora()
    assert bits(model) == state
    assert type(model.layer) is nn.MultiheadAttention
    assert type(model.layer.out_proj) is type(base.layer.out_proj)


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_gradients_are_those_of_w_plus_delta(kind):
    base = attention(kind).double()
    model = made(copy.deepcopy(base)).double().train()
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for tensors, given in calls(kind)[:3]:
        same = {id(t): t.double() for t in tensors}
        tensors = tuple(same[id(t)] for t in tensors)
        model.zero_grad()
        model(tensors, **given)[0].square().sum().backward()
        own = {n: p.detach().clone().requires_grad_() for n, p in held.items()}
        W = {"in_proj_weight": "layer.lora_slots", "out_proj.weight": "layer.out_proj.lora_slots"}
        layer = base.layer.train()
        weights = dict(layer.named_parameters())
        for name, at in W.items():
            scaling = 3.0 if "out" in name else 1.5
            weights[name] = weights[name] + scaling * own[f"{at}.B0"] @ own[f"{at}.A0"]
        torch.func.functional_call(layer, weights, tuple(tensors), given)[0].square().sum().backward()
        for name, parameter in own.items():
            agrees(held[name].grad, parameter.grad, 1e-9)


def test_dropout_of_the_attention_and_of_the_factors(monkeypatch):
    """Its own dropout draws what torch's draws; a LoRA's drops what A reads."""
    base = attention("plain", dropout=0.3).train()
    model = copy.deepcopy(base)
    model.add_lora(LoRAConfig(r=4, target_modules=["layer"]))
    model.train()
    x = calls()[0][0][0]
    for given in ({}, {"need_weights": False}):
        found = []
        for one in (model, base):
            torch.manual_seed(3)
            found.append(one((x, x, x), **given)[0].detach())
        assert torch.equal(*found)
    model = made(attention(), dropout=0.4).train()
    seen = []
    monkeypatch.setattr("hf_lora.variants.plain.dropped_out", lambda x, p: seen.append((x.shape, p)) or x)
    model((x, x, x))
    assert seen == [((N, L, 8), 0.4)] * 2


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_rows_whatever_dimension_they_are_of(kind):
    model = made(attention(kind))
    model.add_lora(LoRAConfig(r=2, target_modules=["q", "o"]), "roles")
    randomise(model, 1)
    model.train_lora([])
    model.add_lora(LoRAConfig(r=3, target_modules=["layer"]), "trains")
    randomise(model, 2)
    rows = ["roles", None, "trains"]
    axis = 0 if KINDS[kind].get("batch_first") else 1
    for tensors, given in calls(kind)[1:7]:
        with model.route_lora(rows):
            routed = model(tensors, **given)[0]
        for i, name in enumerate(rows):
            with model.use_lora(name) if name else model.no_lora():
                alone = model(tensors, **given)[0]
            agrees(routed.select(axis, i), alone.select(axis, i))
    with pytest.raises(LoRARouteError), model.route_lora(["trains", None]):
        model(calls(kind)[1][0])


# ---- around it -------------------------------------------------------------------------------------------------------


def states(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    padding = torch.zeros(n, 6, dtype=torch.bool)
    padding[0, 4:] = True
    return {"x": torch.randn(n, 6, 8, generator=g), "padding": padding}


def encoder(batch_first=True, layers=2):
    torch.manual_seed(0)
    return Encoder(batch_first, layers).requires_grad_(False)


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1"], ["o"], ["q", "v", "linear2"]])
def test_no_fused_path_of_an_encoder_goes_past_the_adapter(targets):
    """nn.TransformerEncoder and its layers read weights in inference, and make nested tensors of what is padded."""
    base = encoder()
    model = copy.deepcopy(base)
    made(model, target_modules=targets)
    inputs = states()
    real = ~inputs["padding"]
    with torch.enable_grad():
        trained = model.train()(**inputs).logits.detach()
    model.eval()
    found, plain = logits(model, inputs), logits(base, inputs)
    agrees(found[real], trained[real])
    assert (found - plain)[real].abs().max() > 1e-3
    with model.no_lora():
        assert torch.equal(logits(model, inputs), plain)
    with model.route_lora(["default", None, "default", None]):
        routed = logits(model, inputs)
    agrees(routed[::2][real[::2]], found[::2][real[::2]])
    agrees(routed[1::2], plain[1::2])
    model.merge_lora()
    agrees(logits(model, inputs)[real], found[real])
    model.unmerge_lora()
    model.remove_lora()
    assert torch.equal(logits(model, inputs), plain)
    assert type(model.encoder) is nn.TransformerEncoder
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    assert {k: v for k, v in vars(model.encoder).items() if k.startswith("lora")} == {}


def test_rows_of_an_encoder_that_is_not_batch_first():
    model = made(encoder(False), target_modules=["self_attn", "linear1"])
    inputs = {"x": states()["x"]}
    with model.route_lora(["default", None, "default", None]):
        routed = logits(model, inputs)
    whole = logits(model, inputs)
    with model.no_lora():
        plain = logits(model, inputs)
    agrees(routed[::2], whole[::2])
    agrees(routed[1::2], plain[1::2])


def test_compiled_one_graph_serves_all():
    model = made(encoder(layers=1), target_modules=["self_attn"])
    model.train_lora([])
    made(model, target_modules=["q", "o"], seed=2, name="b")
    inputs, graphs = {"x": states()["x"]}, []

    def backend(graph, given):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for choice in ("default", "b", None):
        with model.use_lora(choice) if choice else model.no_lora():
            agrees(logits(compiled, inputs), logits(model, inputs))
    with model.route_lora(["default", None, "b", "b"]):
        agrees(logits(compiled, inputs), logits(model, inputs))
    assert len(graphs) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    model = made(encoder(), target_modules=["self_attn"]).train()
    x = states()["x"].requires_grad_()
    found = []
    for through in (lambda run, x: run(x), lambda run, x: checkpoint(run, x, use_reentrant=reentrant)):
        model.zero_grad()
        through(lambda x: model(x).logits, x).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *found))


def test_a_trainer_resumes_exactly(tmp_path):
    data = [{"x": x, "labels": x.mean()} for x in states(20)["x"]]
    given = {"train_dataset": data, "max_steps": 4}

    def start():
        model = encoder()
        model.add_lora(LoRAConfig(r=2, target_modules=["q", "v", "o"], dropout=0.1))
        return model

    whole, again = (trainer(start(), tmp_path / name, **given) for name in ("whole", "again"))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(again) == logged(whole)
    assert same(again.model.lora_state_dict(), whole.model.lora_state_dict())


# ---- PEFT and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_peft_reads_ours_and_we_read_peft(peft, tmp_path, kind):
    base = attention(kind)
    for i, fields in enumerate(({}, {"use_rslora": True, "rank_pattern": {"layer": 2}, "alpha_pattern": {"layer": 3}})):
        ours = made(copy.deepcopy(base), **fields)
        ours.save_lora(tmp_path / f"ours{i}")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / f"ours{i}")).eval()
        config = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], "init_lora_weights": False, **fields}
        other = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).eval()
        other.save_pretrained(str(tmp_path / f"theirs{i}"))
        read = copy.deepcopy(base)
        read.load_lora(tmp_path / f"theirs{i}")
        for tensors, given in calls(kind):
            agrees(ours(tensors, **given), tuple(None if t is None else t.detach() for t in theirs(tensors, **given)))
            agrees(read(tensors, **given), tuple(None if t is None else t.detach() for t in other(tensors, **given)))
        files = [load_file(tmp_path / f"{name}{i}" / "adapter_model.safetensors") for name in ("ours", "theirs")]
        assert {k: t.shape for k, t in files[0].items()} == {k: t.shape for k, t in files[1].items()}
        assert json.loads((tmp_path / f"ours{i}" / "adapter_config.json").read_text())["target_modules"] == ["layer"]


@pytest.mark.parametrize("roles", [["q", "v"], ["o"], ["q", "o"], ["q", "k", "v", "o"]])
def test_roles_are_rows_of_in_proj(peft, tmp_path, roles):
    base = attention()
    model = made(copy.deepcopy(base), target_modules=roles)
    value = model.lora_adapter()
    assert set(value.factors) == {
        *(["layer"] if set(roles) & set("qkv") else []),
        *(["layer.out_proj"] if "o" in roles else []),
    }
    if "layer" in value.factors:
        delta = value.factors["layer"].delta()
        assert [role for role in "qkv" if delta["qkv".index(role) * 8 :][:8].any()] == [r for r in roles if r != "o"]
    model.save_lora(tmp_path)
    loaded = copy.deepcopy(base)
    loaded.load_lora(tmp_path)
    for path, pair in loaded.lora_adapter().factors.items():
        assert pair.equal(value.factors[path])
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()  # what a file lacks, is zero
    for tensors, given in calls()[:4]:
        agrees(model(tensors, **given), dense(base, value)(tensors, **given))
        agrees(loaded(tensors, **given), model(tensors, **given))
        agrees(model(tensors, **given)[0], theirs(tensors, **given)[0].detach())


def test_siglip(peft, tmp_path):
    """Its pooling head is an nn.MultiheadAttention, whose query is one vector for all."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipVisionConfig(**sizes, image_size=8, patch_size=4)
    base = transformers.SiglipVisionModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    model = copy.deepcopy(base)
    inputs = {"pixel_values": torch.randn(3, 3, 8, 8)}
    made(model, target_modules=["head.attention", "q_proj"])

    def pooled(model):
        with torch.no_grad():
            return model(**inputs).pooler_output

    model.save_lora(tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora")).eval()
    agrees(pooled(model), pooled(theirs))
    whole = pooled(model)
    with model.route_lora(["default", None, "default"]):
        agrees(pooled(model)[::2], whole[::2])
    model.merge_and_save(tmp_path / "merged")
    agrees(pooled(transformers.SiglipVisionModel.from_pretrained(tmp_path / "merged").eval()), whole)
    report = hf_lora.export.merge.merge_to_folder(tmp_path / "lora", tmp_path / "streamed", tmp_path / "base")
    assert report is not None
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("merged", "streamed")]
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())


def test_values(tmp_path):
    base = attention()
    one, two = (made(copy.deepcopy(base), seed=s, r=r).lora_adapter() for s, r in ((1, 4), (2, 2)))
    both = combine([one, two], [0.5, -1.0])
    both.save(tmp_path)
    again = LoRAAdapter.load(tmp_path)
    for path, pair in again.factors.items():
        agrees(pair.delta(), 0.5 * one.factors[path].delta() - two.factors[path].delta())
    assert one.truncate(rank=1).factors["layer"].kind == "attention"
    tuned = dense(base, two)
    found = hf_lora.extract_lora(base, tuned, rank=2, target_modules=["layer"])
    for path, pair in found.factors.items():
        agrees(pair.delta(), two.factors[path].delta(), 1e-4)
    model = made(copy.deepcopy(base))
    assert "q+k+v" in str(model.lora_summary())


# ---- what is refused, and named --------------------------------------------------------------------------------------


class Own(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("layer", "text"), [(nn.MultiheadAttention(8, 2, kdim=4), "kdim"), (Own(8, 2), "its forward is not that")]
)
def test_which_are_no_layers(layer, text):
    model = Attention(layer)
    with pytest.raises(LoRAUnsupportedError, match=text):
        made(model)
    with pytest.raises(LoRAUnsupportedError, match="never calls it"):
        made(model, target_modules=["out_proj"])


def test_out_proj_comes_with_its_module():
    model = attention()
    with pytest.raises(LoRAUnsupportedError, match="name that module"):
        made(model, target_modules=["out_proj"])
    with pytest.raises(LoRATargetError, match="out_proj"):
        made(model, rank_pattern={"layer.out_proj": 2})
    with pytest.raises(LoRATargetError):
        made(model, exclude_modules=["layer"])


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"use_dora": True},
            {"lora_bias": True},
            {"kasa_config": {}},
            {"velora_config": {}},
            {"monteclora_config": {}},
        ),
        *({"use_qalora": True, "qalora_group_size": 4}, {"alora_invocation_tokens": [1]}, {"bias": "lora_only"}),
        *({"init": init} for init in ("pissa", "olora", "mica", "loftq")),
    ],
    ids=str,
)
def test_variants_that_peft_refuses_there(fields):
    model = attention()
    state = bits(model)
    with pytest.raises(LoRAError):
        made(model, **fields)
    assert bits(model) == state
    assert type(model.layer) is nn.MultiheadAttention


def test_all_biases_are_refused_beside_it():
    model = encoder()
    with pytest.raises(LoRAUnsupportedError, match="adds biases of its own"):
        made(model, target_modules=["linear1"], bias="all")
    made(model, target_modules=["linear1"], bias="lora_only")


def test_modules_that_are_trained_whole():
    base = encoder()
    inputs = {"x": states()["x"]}
    for path in ("linear1", "self_attn"):
        model = copy.deepcopy(base)
        model.add_lora(LoRAConfig(r=2, target_modules=["linear2"], modules_to_save=[path]))
        assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
        for name, parameter in model.named_parameters():
            if "lora_heads" in name:
                parameter.data += 0.3
        other = copy.deepcopy(base)
        for name, parameter in other.named_parameters():
            if f".{path}." in name:
                parameter.data += 0.3
        agrees(logits(model, inputs), logits(other, inputs))
        model.remove_lora()
        assert torch.equal(logits(model, inputs), logits(base, inputs))
    with pytest.raises(LoRAError, match="never calls it"):
        base.add_lora(LoRAConfig(r=2, target_modules=["linear2"], modules_to_save=["out_proj"]))


def test_copies_and_pickles_keep_the_encoders_classes():
    import pickle

    model = made(encoder(), target_modules=["self_attn"])
    inputs = states()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, inputs), logits(model, inputs))
        with other.no_lora(), model.use_lora("default"):
            assert not torch.equal(logits(other, inputs), logits(model, inputs))
        other.remove_lora()
        assert type(other.encoder) is nn.TransformerEncoder


def test_nested_tensors_and_wrong_masks():
    model = made(attention("batch first"))
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    with torch.no_grad(), pytest.raises(LoRAUnsupportedError, match="nested"):
        model((nested, nested, nested))
    x = torch.randn(2, 3, 8)
    for given in (
        {"attn_mask": torch.zeros(3, 4)},
        {"key_padding_mask": torch.zeros(3, 3).bool()},
        {"is_causal": True},
    ):
        with pytest.raises(RuntimeError):
            model((x, x, x), **given)


def test_a_file_that_cannot_be_written(tmp_path):
    value = made(attention(), target_modules=["q", "v", "o"]).lora_adapter()
    wide = made(attention(), r=8).lora_adapter()
    factors = {"layer": value.factors["layer"], "layer.out_proj": wide.factors["layer.out_proj"]}
    LoRAAdapter(value.config, factors).save(tmp_path)  # 4 for q and 4 for v, 8 for out_proj
    factors["layer"] = value.factors["layer"].__class__.stack(value.factors["layer"].split()[:1], **LIKE)
    with pytest.raises(LoRAFileError, match="out_proj has rank 8"):
        LoRAAdapter(value.config, factors).save(tmp_path / "other")


LIKE = {"out_features": 24, "alpha": 6.0, "kind": "attention"}
