"""Variants: what each computes, held against PEFT and against W' written out in float64; and every verb with them."""

from __future__ import annotations

import math

import pytest
import torch
from loras import bits, logits, randomise
from torch import nn

from hf_lora import LoRAConfig
from hf_lora.errors import LoRAConfigError, LoRAFileError, LoRAMismatchError, LoRAStateError, LoRAUnsupportedError
from hf_lora.values import AdapterValue

VARIANTS = {
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "both": {"use_dora": True, "lora_bias": True},
    "kasa": {"kasa_config": {}},
}
KINDS = {  # kind of layer -> model, targets
    "linear": ("llama", ["q_proj", "v_proj", "down_proj"]),
    "linear with bias": ("bert", ["query", "output.dense"]),
    "conv1d": ("gpt2", ["c_attn", "c_fc"]),
    "embedding": ("llama", ["embed_tokens", "q_proj"]),
}
CASES = [(variant, kind) for variant in VARIANTS for kind in KINDS if variant == "dora" or kind != "embedding"]


def made(tiny, variant, kind, *, seed=0, name="default", model=None, **changes):
    """A model with a trainable adapter of random values; magnitudes stay near the norms."""
    family, targets = KINDS[kind]
    model = tiny(family) if model is None else model
    config = LoRAConfig(**{"r": 4, "alpha": 6, "target_modules": targets, **VARIANTS[variant], **changes})
    model.add_lora(config, name)
    magnitudes = {k: p.detach().clone() for k, p in model.named_parameters() if ".magnitude" in k}
    randomise(model, seed)
    for key, norm in magnitudes.items():
        parameter = model.get_parameter(key)
        if parameter.requires_grad:
            parameter.data.copy_(norm * (1 + parameter.data))
    return model


def agrees(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def written_out(base, value: AdapterValue, weight=1.0, into=None):
    """A float64 copy of the base with W' and b' in place of W and b: the formulas, and none of the package's code."""
    into = base if into is None else into
    into.double()
    for path, f in value.factors.items():
        module, own = into.get_submodule(path), base.get_submodule(path)
        turned = not isinstance(module, nn.Linear)
        W = own.weight.detach().double()
        W = W.T if turned else W
        V = W + f.scaling * f.B.double() @ f.A.double()
        if "diagonal" in f.extras:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            kept = len(S) - f.rank
            V = (U[:, :kept] * S[:kept]) @ Vh[:kept]
            V = V + f.scaling * f.B.double() @ torch.diag(f.extras["diagonal"].double()) @ f.A.double()
        if "magnitude" in f.extras:
            V = f.extras["magnitude"].double()[:, None] * V / torch.linalg.vector_norm(V, dim=1, keepdim=True)
        change = weight * (V - W)
        with torch.no_grad():
            module.weight += change.T if turned else change
            if "offset" in f.extras:
                shift = weight * f.scaling * f.extras["offset"].double()
                if module.bias is None:
                    module.bias = nn.Parameter(torch.zeros(len(shift), dtype=torch.float64))
                module.bias += shift
    return into


# ---- step 0, and the forward -----------------------------------------------------------------------------------------


AT_ZERO = [case for case in CASES if case[0] == "dora"] + [("lora_bias", "linear"), ("both", "linear with bias")]


@pytest.mark.parametrize(("variant", "kind"), AT_ZERO)
def test_step_zero_is_the_base(tiny, batch, variant, kind):
    family, targets = KINDS[kind]
    model = tiny(family)
    inputs = batch(model)
    before, state = logits(model, inputs), bits(model)
    model.add_lora(LoRAConfig(r=4, target_modules=targets, dropout=0.1, **VARIANTS[variant]))
    assert torch.equal(logits(model, inputs), before)
    model.train_lora([])  # into the banks
    assert torch.equal(logits(model, inputs), before)
    model.train_lora("default")
    model.remove_lora()
    assert bits(model) == state
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_forward_is_the_formula(tiny, batch, variant, kind):
    model = made(tiny, variant, kind)
    inputs = batch(model)
    value = model.lora_adapter("default")
    expected = logits(written_out(tiny(KINDS[kind][0]), value), inputs).float()
    agrees(logits(model, inputs), expected)
    model.train_lora([])
    agrees(logits(model, inputs), expected)
    assert model.lora_adapter("default").equal(value)  # bit for bit, though it is folded in the banks


# ---- PEFT ------------------------------------------------------------------------------------------------------------

# PEFT refuses lora_bias with DoRA, and KaSA on Conv1D.
WITH_PEFT = [case for case in CASES if case[0] != "both" and case != ("kasa", "conv1d")]


@pytest.mark.parametrize(("variant", "kind"), WITH_PEFT)
def test_peft_loads_ours_and_we_load_peft(tiny, batch, peft, tmp_path, variant, kind):
    model = made(tiny, variant, kind, use_rslora=kind == "conv1d")
    inputs = batch(model)
    ours = logits(model, inputs)
    model.save_lora(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(KINDS[kind][0]), str(tmp_path / "ours")).eval()
    agrees(ours, logits(theirs, inputs))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.1)
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny(KINDS[kind][0])
    for name, trainable in (("frozen", False), ("trainable", True)):
        again.load_lora(tmp_path / "theirs", name=name, trainable=trainable)
        again.set_lora(name)
        agrees(logits(again, inputs), logits(theirs, inputs))


@pytest.mark.parametrize("variant", ["dora", "lora_bias", "kasa"])
def test_gradients_and_a_step_are_pefts(tiny, batch, peft, tmp_path, variant):
    model = made(tiny, variant, "linear with bias", dropout=0.0)
    model.save_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("bert"), str(tmp_path), is_trainable=True).train()
    inputs = batch(model)
    found = []
    for each in (model.train(), theirs):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        each(**inputs).last_hidden_state.square().sum().backward()
        found.append([p.grad for n, p in each.named_parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    # By norm: the two name and order their parameters otherwise.
    assert torch.allclose(
        torch.stack(sorted((g.norm() for g in found[0]), key=float)),
        torch.stack(sorted((g.norm() for g in found[1]), key=float)),
        rtol=1e-4,
    )


def test_strict_files(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    model = made(tiny, "dora", "linear")
    model.save_lora(tmp_path)
    path, model = tmp_path / "adapter_model.safetensors", tiny("llama")
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("lora_magnitude_vector"))

    def refused(changed, match, error=LoRAFileError):
        save_file(changed, path)
        with pytest.raises(error, match=match):
            model.load_lora(tmp_path, name="x")

    refused({k: v for k, v in tensors.items() if k != name}, "lora_magnitude_vector, which use_dora needs")
    refused(tensors | {name: tensors[name][1:]}, "it should be a floating")
    refused(tensors | {name: tensors[name].int()}, "it should be a floating")
    refused(tensors | {name: tensors[name] * math.nan}, "not finite")
    refused(tensors | {name.replace("magnitude_vector", "B.bias"): tensors[name].clone()}, "does not set lora_bias")
    odd = name.replace("q_proj", "k_proj").replace("v_proj", "k_proj").replace("down_proj", "k_proj")
    refused(tensors | {odd: tensors[name].clone()}, "has no factors")
    assert not hasattr(model, "_lora_state")
    save_file({k.replace("_vector", "_vector.weight"): v for k, v in tensors.items()}, path)  # as PEFT 0.9 has it
    model.load_lora(tmp_path, name="x")


# ---- switch, route, mix ----------------------------------------------------------------------------------------------


def zoo(tiny, kind="linear"):
    """Two DoRAs, lora_bias, both and a plain adapter on one model, frozen; and their values."""
    model = None
    named = {"dora": "dora", "dora2": "dora", "biased": "lora_bias", "both": "both", "kasa": "kasa", "plain": None}
    for seed, (name, variant) in enumerate(named.items()):
        VARIANTS.setdefault(None, {})
        model = made(tiny, variant, kind, seed=seed, name=name, model=model, r=2 + seed)
    del VARIANTS[None]
    model.train_lora([])
    return model


@pytest.mark.parametrize("trained", [(), ("both", "kasa", "biased", "dora2")])
def test_rows_of_a_route_are_what_each_adapter_gives(tiny, batch, trained):
    model = zoo(tiny, "linear with bias")
    names = ["dora", None, "plain", "both", "dora2", "kasa", "biased", "dora"]
    inputs = batch(model, rows=len(names))
    alone = []
    for name in names:
        model.set_lora(name)
        alone.append(logits(model, inputs))
    model.train_lora(trained)
    model.set_lora(None)
    with model.route_lora(names):
        routed = logits(model, inputs)
    for row in range(len(names)):
        agrees(routed[row], alone[row][row])
    with model.route_lora(["dora"] * len(names)):
        agrees(logits(model, inputs), alone[0])


MIXTURES = [
    {"dora": 0.6, "dora2": -0.3},
    {"dora": 0.5, "plain": 1.0, "both": 0.25},
    {"biased": 2.0, "kasa": 0.5},
    ["dora", "dora2"],
]


@pytest.mark.parametrize("trained", [(), ("dora", "both", "kasa")])
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_a_mixture_adds_changes_of_the_weight(tiny, batch, mixture, trained):
    model = zoo(tiny, "linear with bias")
    inputs = batch(model)
    base = tiny("bert")
    weights = mixture if isinstance(mixture, dict) else dict.fromkeys(mixture, 1.0)
    into = None
    for name, weight in weights.items():
        into = written_out(base, model.lora_adapter(name), weight, tiny("bert") if into is None else into)
    expected = logits(into, inputs).float()
    model.train_lora(trained)
    model.set_lora(mixture)
    agrees(logits(model, inputs), expected)
    model.merge_lora()
    agrees(logits(model, inputs), expected)


# ---- merge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("linear with bias", torch.float32), ("conv1d", torch.bfloat16), ("linear with bias", torch.float16)],
)
def test_merge_and_unmerge_every_bit(tiny, batch, kind, dtype):
    model = zoo(tiny, kind).to(dtype)
    inputs, fresh = batch(model), {}
    before = bits(model)
    for which in ("dora", "both", "kasa", {"dora": 0.5, "biased": 1.0, "plain": 2.0}):
        model.set_lora(which)
        expected = logits(model, inputs).float()
        model.merge_lora()
        agrees(logits(model, inputs).float(), expected, 1e-5 if dtype == torch.float32 else 0.05)
        fresh[str(which)] = bits(model)
        model.unmerge_lora()
        assert bits(model) == before
    model.merge_lora("dora2")
    for which in ("both", {"dora": 0.5, "biased": 1.0, "plain": 2.0}):  # B after A is B alone
        model.merge_lora(which, replace=True)
        assert bits(model) == fresh[str(which)]
    model.unmerge_lora()
    assert bits(model) == before


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.6), (torch.bfloat16, 0.4)])
def test_the_record_of_a_gain_is_no_second_copy_of_the_weight(dtype, most):
    from hf_lora.exact import Factored, Scratch, added, restored

    torch.manual_seed(0)
    weight = (0.02 * torch.randn(256, 256)).to(dtype)
    for gain in (1 + 0.2 * torch.randn(256, 1), 1 + 0.2 * torch.randn(1, 256), torch.zeros(256, 1)):
        change = Factored(0.01 * torch.randn(256, 4), 0.02 * torch.randn(4, 256), gain)
        new, record = added(weight, change, "w", Scratch())
        assert torch.equal(restored(new.clone(), record, "w", Scratch()), weight)
        if gain.all():
            assert record.nbytes - record.change.nbytes < most * weight.nbytes


def test_an_offset_cannot_be_merged_where_there_is_no_bias(tiny):
    model = zoo(tiny)
    before = bits(model)
    for which in ("biased", {"dora": 1.0, "both": 1.0}):
        with pytest.raises(LoRAUnsupportedError, match="none, so it cannot be merged"):
            model.merge_lora(which)
    assert bits(model) == before
    model.merge_lora("dora")
    with pytest.raises(LoRAUnsupportedError, match="cannot be merged"):
        model.merge_lora("biased", replace=True)
    model.unmerge_lora()
    assert bits(model) == before


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_drops_what_the_whole_layer_sees(variant):
    from hf_lora.dropout import draw_seed, dropout_reference
    from hf_lora.model import add, read, train

    layer = nn.ModuleDict({"proj": nn.Linear(12, 7)})
    torch.manual_seed(3)
    add(layer, LoRAConfig(r=3, alpha=5, dropout=0.4, target_modules=["proj"], init="off", **VARIANTS[variant]))
    if "use_dora" in VARIANTS[variant]:
        layer.proj.lora_slots.magnitude0.data.mul_(torch.linspace(0.5, 1.5, 7))
    (f,) = read(layer, "default").factors.values()
    x, own = torch.randn(5, 12), layer.proj
    for frozen in (False, True):
        if frozen:
            train(layer, [])
        torch.manual_seed(8)
        found = layer.train()["proj"](x)
        torch.manual_seed(8)
        dropped = dropout_reference(x, 0.4, draw_seed()).double()
        W, b = own.weight.double(), own.bias.double()
        delta = f.scaling * dropped @ f.A.double().T @ f.B.double().T
        if "diagonal" in f.extras:  # what is taken from W is not dropped
            diagonal = torch.diag(f.extras["diagonal"].double())
            delta = f.scaling * dropped @ f.A.double().T @ diagonal @ f.B.double().T
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            W = (U[:, : 7 - f.rank] * S[: 7 - f.rank]) @ Vh[: 7 - f.rank]
        expected = x.double() @ W.T + b + delta
        if "magnitude" in f.extras:  # PEFT: result + (g − 1) W D x + g s B A D x
            V = W + f.scaling * f.B.double() @ f.A.double()
            g = f.extras["magnitude"].double() / torch.linalg.vector_norm(V, dim=1)
            expected = x.double() @ W.T + b + (g - 1) * (dropped @ W.T) + g * delta
        if "offset" in f.extras:
            expected = expected + f.scaling * f.extras["offset"].double()
        agrees(found.double(), expected)


@pytest.mark.parametrize("kind", ["linear", "linear with bias", "embedding"])
def test_gradients_are_those_of_the_formula(tiny, batch, kind):
    model = made(tiny, "dora" if kind == "embedding" else "both", kind).double()
    inputs = batch(model)
    value = model.lora_adapter("default")
    base = tiny(KINDS[kind][0]).double()
    leaves = {}
    with torch.no_grad():
        norms = {}
        for path, f in value.factors.items():
            W = base.get_submodule(path).weight
            W = W.T if f.kind == "embedding" else W
            norms[path] = torch.linalg.vector_norm(W + f.scaling * f.B @ f.A, dim=1, keepdim=True)
    weights = {}
    for path, f in value.factors.items():
        leaf = leaves[path] = {"A": f.A, "B": f.B, **f.extras}
        for tensor in leaf.values():
            tensor.requires_grad_()
        module = base.get_submodule(path)
        W = module.weight.detach()
        V = (W.T if f.kind == "embedding" else W) + f.scaling * leaf["B"] @ leaf["A"]
        V = leaf["magnitude"][:, None] * V / norms[path]
        weights[f"{path}.weight"] = V.T if f.kind == "embedding" else V
        if "offset" in leaf:
            weights[f"{path}.bias"] = f.scaling * leaf["offset"] + (0 if module.bias is None else module.bias.detach())
            if module.bias is None:
                module.bias = nn.Parameter(torch.zeros_like(leaf["offset"]))
    output = torch.func.functional_call(base, weights, (), inputs)
    (output.logits if hasattr(output, "logits") else output.last_hidden_state).square().sum().backward()
    output = model.train()(**inputs) if kind != "linear with bias" else model(**inputs)
    (output.logits if hasattr(output, "logits") else output.last_hidden_state).square().sum().backward()
    for path, leaf in leaves.items():
        slots = model.get_submodule(path).lora_slots
        for name, tensor in leaf.items():
            agrees(getattr(slots, f"{name}0").grad, tensor.grad, 1e-9)


def test_it_trains_and_keeps_nothing_dense(tiny, batch):
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=4, target_modules=["q_proj", "up_proj", "o_proj"], use_dora=True, lora_bias=True))
    inputs = batch(model, rows=4, length=9)
    start = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-2)
    weights = {tuple(p.shape) for k, p in model.named_parameters() if k not in start and p.dim() == 2}
    own = {p.data_ptr() for p in model.parameters()}
    losses, kept = [], []
    model.train()
    for _ in range(5):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03
    assert all(not torch.equal(p, start[k]) for k, p in model.named_parameters() if k in start)
    assert {k.rpartition(".")[2].rstrip("0") for k in start} == {"A", "B", "magnitude", "offset"}
    dense = [t for t in kept if t.dim() == 2 and {tuple(t.shape), tuple(t.T.shape)} & weights]
    assert all(t.data_ptr() in own for t in dense)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_region_gives_the_same_gradients(tiny, batch, reentrant):
    found = []
    for checkpointed in (False, True):
        model = made(tiny, "both", "linear", dropout=0.2).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        inputs = batch(model)
        torch.manual_seed(1)
        with model.use_lora("default"):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        found.append({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        agrees(found[1][key], grad, 1e-5)


def test_resume_in_trainer_is_the_run_without_a_break(tiny, tmp_path):
    from transformers import Trainer, TrainingArguments

    from hf_lora import LoRACallback

    rows = [
        {"input_ids": (ids := torch.randint(3, 60, (8,), generator=torch.Generator().manual_seed(i))), "labels": ids}
        for i in range(8)
    ]

    def run(steps, resume=None):
        model = tiny("llama")
        torch.manual_seed(0)
        model.add_lora(LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True, lora_bias=True))
        args = TrainingArguments(
            tmp_path / "run", max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2, seed=1,
            report_to=[], disable_tqdm=True, lr_scheduler_type="constant", use_cpu=True, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[LoRACallback()])
        trainer.train(resume_from_checkpoint=resume)
        return model.lora_adapter("default")

    whole = run(4)
    again = run(4, str(tmp_path / "run" / "checkpoint-2"))
    assert whole.equal(again)
    assert any(f.extras["offset"].any() for f in whole.factors.values())


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [("both", "kasa")])
def test_one_graph_serves_every_switch_and_route(tiny, batch, trained):
    torch.compiler.reset()
    model = zoo(tiny, "linear with bias")
    model.train_lora(trained)
    inputs = batch(model, rows=3)
    choices = ["dora", "both", "kasa", {"dora": 0.5, "dora2": 0.25, "both": -0.5}, None, "plain", "biased"]
    model.set_lora(choices[3])  # the widest mixture first: a wider one is one more graph
    expected = []
    for which in choices:
        model.set_lora(which)
        expected.append(logits(model, inputs))
    route = ["dora", None, "both"]
    with model.route_lora(route):
        routed = logits(model, inputs)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for which, eager in zip(choices, expected, strict=True):
        model.set_lora(which)
        agrees(logits(compiled, inputs), eager)
    with model.route_lora(route):
        agrees(logits(compiled, inputs), routed)
    assert len(graphs) == 1


@pytest.mark.parametrize("variant", ["both", "kasa"])
def test_a_compiled_step_has_the_gradients_of_the_eager_one(variant):
    from hf_lora.model import add

    torch.compiler.reset()
    torch.manual_seed(0)
    net = nn.ModuleDict({"proj": nn.Linear(12, 9), "head": nn.Linear(9, 5)})
    add(net, LoRAConfig(r=3, target_modules=["proj", "head"], init="off", **VARIANTS[variant]))
    x, found = torch.randn(4, 12), []

    def run(x):
        return net["head"](net["proj"](x).relu()).square().sum()

    net.train()
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        function(x).backward()
        found.append({k: p.grad for k, p in net.named_parameters() if p.requires_grad})
    for key, grad in found[0].items():
        assert grad.abs().max() > 0
        agrees(found[1][key], grad)


# ---- LoRA-FA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_lora_fa_trains_b_and_keeps_no_input(tiny, batch, peft, tmp_path, variant):
    found, kept = {}, {}
    fields = {"use_dora": variant == "dora", "target_modules": ["q_proj", "down_proj", "embed_tokens"]}
    for freeze in (False, True):
        model = tiny("llama")
        torch.manual_seed(0)
        model.add_lora(LoRAConfig(r=4, freeze_a=freeze, **fields))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".B0" in name and "embed" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
        inputs, shapes = batch(model, rows=3, length=5), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=shapes: to.append(tuple(t.shape)) or t, lambda t: t):
            loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        found[freeze] = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        kept[freeze] = shapes
    fixed = {k for k in found[False] if (".B0" if "embed" in k else ".A0") in k}
    assert found[True].keys() == found[False].keys() - fixed
    for key, grad in found[True].items():
        agrees(grad, found[False][key])
    assert {k for k, p in model.named_parameters() if not p.requires_grad and ".lora_slots." in k} == fixed
    wide = {freeze: sum(shape[-1:] == (48,) for shape in shapes) for freeze, shapes in kept.items()}
    assert wide[True] == wide[False] - 2  # what the two layers' down_proj is given
    with torch.no_grad():
        for key in found[True]:
            model.get_parameter(key).add_(0.05)
    model.eval()
    model.save_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()
    agrees(logits(model, inputs), logits(theirs, inputs))
    model.train_lora([])
    model.train_lora("default")
    assert {k for k, p in model.named_parameters() if not p.requires_grad and ".lora_slots." in k} == fixed


# ---- what is refused, and what else takes them -----------------------------------------------------------------------


def test_what_has_no_meaning_is_refused_by_field(tiny, tmp_path):
    from hf_lora import combine
    from hf_lora.analysis import subspace_similarity

    for model, targets, field, match in (
        (tiny("gpt2"), ["q", "v"], "use_dora", "slices of a fused one .q, v."),
        (tiny("gpt2"), ["q"], "lora_bias", "slices of a fused one"),
        (tiny("llama"), ["embed_tokens"], "lora_bias", "not for an embedding"),
    ):
        with pytest.raises(LoRAUnsupportedError, match=match) as caught:
            model.add_lora(LoRAConfig(r=2, target_modules=targets, **{field: True}))
        assert caught.value.name == field
        assert caught.value.remedy
        assert not hasattr(model, "_lora_state")
    model = zoo(tiny)
    for name, field in (("dora", "use_dora"), ("biased", "lora_bias")):
        value = model.lora_adapter(name)
        for verb in (
            lambda v=value: combine([v, v], [1, 1]),
            lambda v=value: v.truncate(rank=1),
            lambda v=value: v.negate(),
            lambda v=value: subspace_similarity(v, v),
        ):
            with pytest.raises(LoRAUnsupportedError, match=f"trained with {field}"):
                verb()
    with pytest.raises(LoRAUnsupportedError, match="use_dora"):
        next(iter(model.lora_adapter("dora").factors.values())).delta()


def test_a_quantised_base_has_no_norm(tiny, tmp_path):
    model = tiny("llama")
    for layer in model.model.layers:
        own = layer.self_attn.q_proj
        own.weight = nn.Parameter(torch.zeros(own.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LoRAUnsupportedError, match="q_proj: use_dora needs the weight of the base"):
        model.add_lora(LoRAConfig(r=2, target_modules=["q_proj"], use_dora=True))
    value = made(tiny, "dora", "linear").lora_adapter("default")
    with pytest.raises(LoRAMismatchError) as caught:
        model.load_lora(value.save(tmp_path), name="x")
    assert any("use_dora needs the weight" in fact for fact in caught.value.facts)
    model.add_lora(LoRAConfig(r=2, target_modules=["q_proj"], lora_bias=True))


def test_a_change_of_the_base_changes_the_norm(tiny, batch):
    model = made(tiny, "dora", "linear")
    inputs = batch(model)
    logits(model, inputs)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(1.5)
    base = tiny("llama")
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.q_proj.weight.mul_(1.5)
    expected = logits(written_out(base, model.lora_adapter("default")), inputs).float()
    agrees(logits(model, inputs), expected)


def test_half_a_base_learns_small_magnitudes(tiny, batch):
    """bfloat16 has steps of 2⁻⁷ above 1: a gain between two of them is not rounded to one."""
    model = tiny("llama", dtype=torch.bfloat16)
    inputs = batch(model)
    model.add_lora(LoRAConfig(r=2, target_modules=["q_proj"], use_dora=True))
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    own = layer(x).double()
    layer.lora_slots.magnitude0.data.mul_(1 + 1.4 * 2**-7)
    for frozen in (False, True):
        if frozen:
            model.train_lora([])
        grown = layer(x).double()
        ratio = (grown * own).sum() / (own * own).sum() - 1
        assert abs(ratio - 1.4 * 2**-7) < 0.1 * 2**-7
    assert torch.isfinite(logits(model, inputs)).all()


def test_parameter_groups_and_the_summary_know_the_vectors(tiny):
    import hf_lora

    model = made(tiny, "both", "linear")
    groups = {g["name"]: g for g in hf_lora.optimizer_groups(model, 1e-3, b_lr_ratio=4, weight_decay=0.1)}
    assert {p.dim() for p in groups["vector"]["params"]} == {1}
    assert len(groups["vector"]["params"]) == 2 * 6
    assert groups["vector"]["weight_decay"] == 0
    (summary,) = model.lora_summary().adapters
    trained = [p for p in model.parameters() if p.requires_grad]
    assert summary.parameters == model.lora_adapter("default").num_parameters == sum(p.numel() for p in trained)


def test_a_merge_on_disk_is_the_merge_in_memory(tiny, tmp_path):
    from hf_lora.export import merge_to_folder

    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    made(tiny, "dora", "linear", model=model)
    value = model.lora_adapter("default")
    merge_to_folder(value, tmp_path / "merged", tmp_path / "base")
    model.train_lora([])
    model.eval().merge_lora()
    merged = type(base).from_pretrained(tmp_path / "merged")
    assert bits(merged) == {k: v for k, v in bits(model).items() if "lora_" not in k}
    biased = made(tiny, "lora_bias", "linear").lora_adapter("default")
    with pytest.raises(LoRAUnsupportedError, match="trained with lora_bias"):
        merge_to_folder(biased, tmp_path / "again", tmp_path / "base")


# ---- KaSA ------------------------------------------------------------------------------------------------------------


def test_kasa_begins_without_the_smallest_singular_values_and_leaves_the_base_alone(tiny, batch, peft):
    model = tiny("llama")
    inputs = batch(model)
    before, state = logits(model, inputs), bits(model)
    model.add_lora(LoRAConfig(r=16, target_modules=["up_proj"], kasa_config={"beta": 0.5}))
    config = peft.LoraConfig(r=16, target_modules=["up_proj"], kasa_config=peft.KasaConfig())
    theirs = peft.get_peft_model(tiny("llama"), config)
    agrees(logits(model, inputs), logits(theirs.eval(), inputs))  # it is not the base's
    assert (logits(model, inputs) - before).abs().max() > 1e-3 * before.abs().max()
    with model.no_lora():
        assert torch.equal(logits(model, inputs), before)
    model.remove_lora()
    assert bits(model) == state
    with pytest.raises(LoRAUnsupportedError, match="rank 32 leaves no singular value"):
        model.add_lora(LoRAConfig(r=32, target_modules=["q_proj"], kasa_config={}))
    for bad in ({"alpha": 1}, {"beta": -1}, True, [1]):
        with pytest.raises(LoRAConfigError, match="kasa_config"):
            LoRAConfig(kasa_config=bad)
    with pytest.raises(LoRAConfigError, match="cannot be combined with use_dora"):
        LoRAConfig(kasa_config={}, use_dora=True)


def test_kasa_loss_is_pefts(tiny, peft, tmp_path):
    import hf_lora

    model = made(tiny, "kasa", "linear", kasa_config={"beta": 0.25, "gamma": 0.5})
    model.save_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path), is_trainable=True)
    ours, expected = hf_lora.kasa_loss(model), theirs._get_kasa_loss()
    agrees(ours, expected)
    ours.backward()
    expected.backward()
    found = [[p.grad.norm() for p in m.parameters() if p.grad is not None] for m in (model, theirs)]
    agrees(torch.stack(sorted(found[0], key=float)), torch.stack(sorted(found[1], key=float)), 1e-4)
    model.train_lora([])
    with pytest.raises(LoRAStateError, match="kasa_config"):
        hf_lora.kasa_loss(model)
