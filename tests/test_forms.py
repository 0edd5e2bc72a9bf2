"""Factors in a smaller form (BD-LoRA, QA-LoRA): held against PEFT's layers and against ΔW written out in float64."""

from __future__ import annotations

import math
import re

import pytest
import torch
from loras import bits, logits, randomise
from safetensors.torch import load_file, save_file
from torch import nn

from hf_lora import LoRAAdapter, LoRAConfig, combine
from hf_lora.errors import LoRAConfigError, LoRAFileError, LoRAMismatchError, LoRAUnsupportedError

BLOCKS = {"nblocks": 2, "target_modules_bd_a": ["o_proj", "down_proj"], "target_modules_bd_b": ["q_proj", "up_proj"]}
TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
VARIANTS = {"bd": {"use_bdlora": BLOCKS}, "qa": {"use_qalora": True, "qalora_group_size": 8}}
COUNTS = {  # of the two layers: hidden 32, intermediate 48, r = 4
    "bd": 2 * (4 * 32 + 32 * 2 + 4 * 16 + 32 * 4 + 4 * 32 + 48 * 2 + 4 * 24 + 32 * 4),
    "qa": 2 * (4 * 4 + 32 * 4 + 4 * 4 + 32 * 4 + 4 * 4 + 48 * 4 + 4 * 6 + 32 * 4),
}


def made(tiny, variant, *, seed=0, name="default", model=None, **changes):
    model = tiny("llama") if model is None else model
    config = LoRAConfig(**{"r": 4, "alpha": 6, "target_modules": TARGETS, **VARIANTS[variant], **changes})
    model.add_lora(config, name)
    randomise(model, seed)
    return model


def agrees(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def change(variant, path, A, B, scaling):
    """ΔW from the stored tensors, by the papers' definitions, in float64."""
    A, B = A.double(), B.double()
    if variant == "qa":
        pool = torch.zeros(8 * A.shape[1], A.shape[1], dtype=torch.float64)
        for i in range(len(pool)):
            pool[i, i // 8] = A.shape[1] / 8  # the mean of 8, times the number of means
        return scaling * B @ A @ pool.T
    for i in range(2):
        if any(name in path for name in BLOCKS["target_modules_bd_a"]):
            half, width = A.shape[0] // 2, A.shape[1]
            if i == 0:
                whole = torch.zeros(A.shape[0], 2 * width, dtype=torch.float64)
            whole[i * half : (i + 1) * half, i * width : (i + 1) * width] = A[i * half : (i + 1) * half]
        else:
            half, width = B.shape[0] // 2, B.shape[1]
            if i == 0:
                whole = torch.zeros(B.shape[0], 2 * width, dtype=torch.float64)
            whole[i * half : (i + 1) * half, i * width : (i + 1) * width] = B[i * half : (i + 1) * half]
    return scaling * (B @ whole if whole.shape[0] == B.shape[1] else whole @ A)


def written_out(variant, tensors, model, weight=1.0, scaling=1.5):
    """W + weight · ΔW in a float64 model, from PEFT-named tensors."""
    model.double()
    for key in tensors:
        if key.endswith("lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B = tensors[key.replace("lora_A", "lora_B")]
            model.get_submodule(path).weight.data += weight * change(variant, path, tensors[key], B, scaling)
    return model


def with_peft(peft, model, folder, variant, **options):
    """The file in PEFT. It pools in layers of GPTQ alone, so for QA-LoRA such a layer is put around each Linear."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    config = peft.LoraConfig.from_pretrained(str(folder))
    if variant == "qa":
        config._register_custom_module({nn.Linear: GPTQLoraLinear})
    return peft.PeftModel.from_pretrained(model, str(folder), config=config, **options)


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_ours_and_we_load_peft(tiny, batch, peft, tmp_path, variant):
    model = made(tiny, variant)
    inputs = batch(model)
    ours = logits(model, inputs)
    agrees(ours, logits(written_out(variant, model.lora_state_dict(), tiny("llama")), inputs).float())
    model.save_lora(tmp_path / "ours")
    theirs = with_peft(peft, tiny("llama"), tmp_path / "ours", variant).eval()
    agrees(ours, logits(theirs, inputs))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.1)
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny("llama")
    for name, trainable in (("frozen", False), ("trainable", True)):
        again.load_lora(tmp_path / "theirs", name=name, trainable=trainable)
        again.set_lora(name)
        agrees(logits(again, inputs), logits(theirs, inputs))
    value = LoRAAdapter.load(tmp_path / "theirs")
    assert value.equal(LoRAAdapter.load(value.save(tmp_path / "again")))
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    given = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert written.keys() == given.keys()
    assert all(torch.equal(written[key], given[key]) for key in given)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_begins_at_the_base_and_leaves_it(tiny, batch, variant):
    model = tiny("llama")
    inputs = batch(model)
    before, state = logits(model, inputs), bits(model)
    torch.manual_seed(0)
    model.add_lora(LoRAConfig(r=4, target_modules=TARGETS, dropout=0.1, **VARIANTS[variant]))
    assert torch.equal(logits(model, inputs), before)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == COUNTS[variant] == model.lora_adapter("default").num_parameters
    assert model.lora_summary().adapters[0].parameters == trained
    for layer in model.model.layers:
        A = layer.mlp.down_proj.lora_slots.A0
        bound = math.sqrt(6 / 24) if variant == "bd" else math.sqrt(1 / 6)  # PEFT's, of the stored shape
        assert 0.8 * bound < A.abs().max() <= bound
    model.train_lora([])
    assert torch.equal(logits(model, inputs), before)
    assert model.lora_summary().adapters[0].parameters == trained
    model.train_lora("default")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    model.remove_lora()
    assert bits(model) == state


def test_the_plan_counts_what_trains(tiny):
    import hf_lora

    for variant in VARIANTS:
        found = hf_lora.plan(tiny("llama"), LoRAConfig(r=4, target_modules=TARGETS, **VARIANTS[variant]))
        assert found.trainable_parameters == COUNTS[variant]
    with pytest.raises(LoRAUnsupportedError, match="use_bdlora"):
        hf_lora.plan(tiny("llama"), LoRAConfig(target_modules=TARGETS, **VARIANTS["bd"]), budget=5000)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_pefts(tiny, batch, peft, tmp_path, variant):
    model = made(tiny, variant)
    model.save_lora(tmp_path)
    theirs = with_peft(peft, tiny("llama"), tmp_path, variant, is_trainable=True)
    inputs, found = batch(model), []
    for each in (model.train(), theirs.train()):
        each(**inputs).logits.square().sum().backward()
        grads = [p.grad.norm() for n, p in each.named_parameters() if p.grad is not None]
        found.append(torch.stack(sorted(grads, key=float)))
    agrees(found[0], found[1], 1e-4)


def test_a_pooled_layer_keeps_no_input_and_drops_what_it_reads():
    from hf_lora.dropout import draw_seed, dropout_reference
    from hf_lora.model import add, read

    torch.manual_seed(0)
    layer = nn.ModuleDict({"proj": nn.Linear(64, 7)})
    config = LoRAConfig(r=2, alpha=3, dropout=0.4, init="off", use_qalora=True, qalora_group_size=16)
    add(layer, config.replace(target_modules=["proj"]))
    (pair,) = read(layer, "default").factors.values()
    x, shapes = torch.randn(5, 64), []
    torch.manual_seed(8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        found = layer.train()["proj"](x)
    assert (5, 64) not in shapes
    torch.manual_seed(8)
    means = dropout_reference(x, 0.4, draw_seed()).double().view(5, 4, 16).mean(-1) * 4
    A, B = (tensor.double() for tensor in pair.stored())
    expected = x.double() @ layer.proj.weight.double().T + layer.proj.bias.double() + 1.5 * means @ A.T @ B.T
    agrees(found.double(), expected)


def test_with_dora_it_is_the_gain_of_the_whole_change(tiny, batch):
    model = made(tiny, "bd", use_dora=True, init="off")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".magnitude" in name:
                parameter.copy_(1 + parameter)
    inputs = batch(model)
    tensors = model.lora_state_dict()
    expected = written_out("bd", tensors, tiny("llama"))
    for key, m in tensors.items():
        if key.endswith("magnitude_vector"):
            W = expected.get_submodule(key.removeprefix("base_model.model.").rpartition(".")[0]).weight
            W.data = m.double()[:, None] * W / torch.linalg.vector_norm(W, dim=1, keepdim=True)
    agrees(logits(model, inputs), logits(expected, inputs).float())
    model.train_lora([])
    agrees(logits(model, inputs), logits(expected, inputs).float())


# ---- every verb ------------------------------------------------------------------------------------------------------


def zoo(tiny, dtype=torch.float32):
    model = tiny("llama")
    for seed, name in enumerate(("bd", "qa", "bd2")):
        made(tiny, name[:2], seed=seed, name=name, model=model)
    model.add_lora(LoRAConfig(r=3, target_modules=TARGETS), "plain")
    randomise(model, 5)
    model.train_lora([])
    return model.to(dtype)


def test_routes_mixtures_and_merges(tiny, batch):
    model = zoo(tiny)
    names = ["bd", None, "plain", "qa", "bd2"]
    inputs, before, alone = batch(model, rows=5), bits(model), []
    for name in names:
        model.set_lora(name)
        alone.append(logits(model, inputs))
    model.set_lora(None)
    for trained in ([], ["bd", "qa"]):
        model.train_lora(trained)
        with model.route_lora(names):
            routed = logits(model, inputs)
        for row in range(5):
            agrees(routed[row], alone[row][row])
    model.train_lora([])
    weights = {"bd": 0.6, "qa": -0.5, "bd2": 2.0}
    expected = tiny("llama")
    for name, weight in weights.items():
        expected = written_out(name[:2], model.lora_state_dict(name), expected, weight)
    expected = logits(expected, inputs).float()
    model.set_lora(weights)
    agrees(logits(model, inputs), expected)
    model.merge_lora()
    agrees(logits(model, inputs), expected)
    model.unmerge_lora()
    assert bits(model) == before
    model.half()
    before = bits(model)
    model.merge_lora("qa")
    model.merge_lora("bd", replace=True)
    model.unmerge_lora()
    assert bits(model) == before
    model.remove_lora()
    assert not any("lora" in key for key in model.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_a_checkpointed_region_and_a_compiled_one(tiny, batch, variant):
    found = []
    for how in ("plain", "reentrant", "saved", "compiled"):
        model = made(tiny, variant, dropout=0.0).train()
        inputs = batch(model)
        if how in ("reentrant", "saved"):
            model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        if how == "compiled":
            torch.compiler.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if how == "compiled" else model
        run(**inputs).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, grad in found[0].items():
            assert grad.abs().max() > 0
            agrees(other[key], grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_in_trainer_is_the_run_without_a_break(tiny, tmp_path, variant):
    from transformers import Trainer, TrainingArguments

    from hf_lora import LoRACallback

    def run(steps, resume=None):
        torch.manual_seed(0)
        model = tiny("llama")
        model.add_lora(LoRAConfig(r=4, target_modules=["q_proj", "o_proj"], dropout=0.1, **VARIANTS[variant]))
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(12)]
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[LoRACallback()])
        trainer.train(resume_from_checkpoint=resume)
        return model.lora_adapter("default")

    whole = run(4)
    again = run(4, str(tmp_path / "run" / "checkpoint-2"))
    assert whole.equal(again)


def test_arithmetic_gives_plain_adapters_of_the_same_change(tiny):
    model = zoo(tiny)
    bd, qa = model.lora_adapter("bd"), model.lora_adapter("qa")
    together, less = combine([bd, qa], [0.5, -2.0]), qa.truncate(rank=2)
    assert (together.config.use_bdlora, together.config.use_qalora, less.config.use_qalora) == (None, False, False)
    assert combine([qa], [1.0]).config.use_qalora is False
    for path, pair in together.factors.items():
        agrees(pair.delta(), 0.5 * bd.factors[path].delta() - 2 * qa.factors[path].delta())
        key = f"base_model.model.{path}.lora_"
        for name, one in (("bd", bd), ("qa", qa)):
            tensors = model.lora_state_dict(name)
            written = change(name, path, tensors[f"{key}A.weight"], tensors[f"{key}B.weight"], 1.5)
            agrees(one.factors[path].delta().double(), written)
        U, S, Vh = torch.linalg.svd(qa.factors[path].delta().double(), full_matrices=False)
        agrees(less.factors[path].delta().double(), (U[:, :2] * S[:2]) @ Vh[:2])
    assert bd.negate().config.use_bdlora == bd.config.use_bdlora
    assert bd.truncate(rank=4) is bd


# ---- files and layers that PEFT takes otherwise ----------------------------------------------------------------------


def test_a_layer_that_peft_does_not_pool_is_plain(tiny, batch, peft, tmp_path):
    """Only GPTQ's layers are pooled in PEFT; on a dense Linear it trains, and writes, a plain pair all the same."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, use_qalora=True)
    theirs = peft.get_peft_model(tiny("llama"), config).eval()
    theirs.save_pretrained(tmp_path)
    inputs = batch(theirs)
    for trainable in (False, True):
        model = tiny("llama")
        model.load_lora(tmp_path, name="x", trainable=trainable)
        agrees(logits(model, inputs), logits(theirs, inputs))
        model.save_lora(tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "ours")).eval()
        agrees(logits(again, inputs), logits(theirs, inputs))


def test_strict_files(tiny, tmp_path):
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    for variant in VARIANTS:
        made(tiny, variant).save_lora(tmp_path)
        tensors = load_file(path)
        name = next(key for key in tensors if "o_proj.lora_A" in key)
        for bad, error in ((tensors[name][:, 1:], LoRAMismatchError), (tensors[name][1:], LoRAFileError)):
            save_file(tensors | {name: bad.contiguous()}, path)
            with pytest.raises(error):
                tiny("llama").load_lora(tmp_path, name="x")
    made(tiny, "bd").save_lora(tmp_path)
    text = config.read_text()
    config.write_text(text.replace('"nblocks": 2', '"nblocks": 1'))
    with pytest.raises(LoRAFileError, match="were not saved together"):
        tiny("llama").load_lora(tmp_path, name="x")
    save_file(load_file(path), path)  # without the digest of its config, as PEFT writes it
    for old, new, match in (
        ('"nblocks": 2', '"nblocks": 3', "has rank 4"),
        (r'"o_proj",\s+"down_proj"', '"down_proj"', "o_proj: use_bdlora names it in neither list"),
        ('"target_modules_bd_a"', '"odd"', "is not a mapping of target_modules_bd_a"),
        ('"use_bdlora": {', '"use_bdlora": null, "unread": {', "unread"),
    ):
        changed = re.sub(old, new, text)
        assert changed != text
        config.write_text(changed)
        with pytest.raises((LoRAFileError, LoRAConfigError, LoRAUnsupportedError), match=match):
            tiny("llama").load_lora(tmp_path, name="x")


def test_a_file_cannot_ask_for_much_more_than_it_holds(tiny, tmp_path):
    made(tiny, "qa").save_lora(tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(load_file(path), path)
    config.write_text(config.read_text().replace('"qalora_group_size": 8', '"qalora_group_size": 1000000000'))
    with pytest.raises(LoRAFileError, match=r"use_qalora: factors of [0-9,]+ numbers would become"):
        tiny("llama").load_lora(tmp_path, name="x")


def test_match_strict_off_leaves_others_plain(tiny, batch, peft, tmp_path):
    blocks = {"nblocks": 4, "target_modules_bd_a": ["0.self_attn.o"], "match_strict": False}
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=4, target_modules=["q_proj", "o_proj"], use_bdlora=blocks))
    randomise(model)
    assert model.model.layers[0].self_attn.o_proj.lora_slots.A0.shape == (4, 8)
    assert model.model.layers[1].self_attn.o_proj.lora_slots.A0.shape == (4, 32)
    model.save_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()
    inputs = batch(model)
    agrees(logits(model, inputs), logits(theirs, inputs))


@pytest.mark.parametrize(
    ("family", "fields", "error", "name"),
    [
        ("llama", {"use_qalora": True, "qalora_group_size": 5}, LoRAConfigError, "use_qalora"),
        ("llama", {"use_bdlora": {**BLOCKS, "nblocks": 3}}, LoRAConfigError, "use_bdlora"),
        ("llama", {"use_bdlora": {**BLOCKS, "nblocks": 4}, "r": 6}, LoRAConfigError, "use_bdlora"),
        ("llama", {"use_bdlora": {"target_modules_bd_a": ["self"], "nblocks": 2}}, LoRAConfigError, "use_bdlora"),
        ("llama", {"use_bdlora": {**BLOCKS, "target_modules_bd_b": ["mlp", "proj"]}}, LoRAConfigError, "use_bdlora"),
        ("llama", {"use_bdlora": BLOCKS, "init": "pissa"}, LoRAConfigError, "use_bdlora"),
        ("llama", {"use_qalora": True, "init": "orthogonal"}, LoRAConfigError, "use_qalora"),
        ("llama", {"use_qalora": True, "target_modules": ["embed_tokens"]}, LoRAUnsupportedError, "use_qalora"),
        ("gpt2", {"use_qalora": True, "target_modules": ["q", "v"]}, LoRAUnsupportedError, "use_qalora"),
        ("llama", {"use_bdlora": BLOCKS, "use_qalora": True}, LoRAConfigError, "use_bdlora"),
        ("llama", {"use_bdlora": BLOCKS, "lora_bias": True}, LoRAConfigError, "lora_bias"),
        ("llama", {"use_bdlora": BLOCKS, "kasa_config": {}}, LoRAConfigError, "use_bdlora"),
        ("llama", {"use_bdlora": {"nblocks": 0}}, LoRAConfigError, "use_bdlora['nblocks']"),
        ("llama", {"use_bdlora": {"blocks": 2}}, LoRAConfigError, "use_bdlora"),
        ("llama", {"use_bdlora": {"target_modules_bd_a": "q"}}, LoRAConfigError, "use_bdlora['target_modules_bd_a']"),
        ("llama", {"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]}}, LoRAConfigError, None),
        ("llama", {"use_qalora": True, "qalora_group_size": 1}, LoRAConfigError, "qalora_group_size"),
        ("llama", {"qalora_group_size": 0}, LoRAConfigError, "qalora_group_size"),
    ],
)
def test_what_has_no_meaning_is_refused_by_field(tiny, family, fields, error, name):
    model = tiny(family)
    with pytest.raises(error) as caught:
        model.add_lora(LoRAConfig(**{"r": 4, "target_modules": TARGETS, **fields}))
    assert caught.value.name == (name or "use_bdlora")
    assert caught.value.remedy
    assert not hasattr(model, "_lora_state")
